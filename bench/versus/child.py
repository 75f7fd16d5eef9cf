"""A contestant's process: python -m bench.versus.child SPEC READ WRITE."""

import time

BEGAN = time.perf_counter()

import json  # noqa: E402  (the clock starts before anything is loaded)
import os  # noqa: E402
import sys  # noqa: E402
import traceback  # noqa: E402
from pathlib import Path  # noqa: E402

from bench.versus.turns import Turns  # noqa: E402


def main() -> None:
    spec = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    turns = Turns(int(sys.argv[2]), int(sys.argv[3]), BEGAN)
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
