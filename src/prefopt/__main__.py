"""`python -m prefopt` is the command `prefopt`."""

import sys

from prefopt.cli import main

if __name__ == "__main__":
    sys.exit(main())
