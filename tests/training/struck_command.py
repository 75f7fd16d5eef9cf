"""The command line, in whose fourth step process 1 is killed; for a launcher to start."""

import sys

from tests.training.group_scenarios import prepare_trouble

from prefopt.cli import main
from prefopt.training.group.processes import place

if __name__ == "__main__":
    import os

    if place(os.environ)[0] == 1:
        prepare_trouble({"step": 3, "do": "kill"})
    sys.exit(main())
