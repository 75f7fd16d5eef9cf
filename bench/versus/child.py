"""A contestant's process: python -m bench.versus.child SPEC READ WRITE."""

import json
import os
import sys
import time
import traceback
from pathlib import Path

from bench.versus.turns import Turns


def main() -> None:
    began = time.perf_counter()  # nothing that takes time is loaded yet
    spec = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    turns = Turns(int(sys.argv[2]), int(sys.argv[3]), began)
    turns.cuda = spec["device"] == "cuda"
    turns.gives_memory_back = spec["gives_memory_back"]
    try:
        # Each loads its own libraries only: TRL may live in an environment without prefopt.
        if spec["what"] == "tokenise":
            from bench.versus.side_tokenise import play
        elif spec["side"] == "prefopt":
            from bench.versus.side_prefopt import play
        else:
            from bench.versus.side_trl import play
        play(spec, turns)
    except BaseException as error:
        traceback.print_exc()
        sys.stderr.flush()
        turns.failed(error)
        os._exit(1)


if __name__ == "__main__":
    main()
