"""A contestant that trains nothing: python -m tests.bench.pretend NAME REFERENCE_PARTS FAILS_AT READ WRITE.

It writes down when it works, so that a test sees who worked when.
"""

import sys
import time
from pathlib import Path

from bench.versus.turns import Parts, Turns


def main() -> None:
    diary, name, reference_parts, fails_at, read, write = sys.argv[1:]
    turns = Turns(int(read), int(write), time.perf_counter())

    def work(what: str) -> None:
        with Path(diary).open("a") as file:
            file.write(f"{name} {what}\n")
        time.sleep(0.01)

    turns.facts(start_seconds=turns.start_seconds)
    if items := int(reference_parts):
        turns.enter("reference")
        parts = Parts(turns, items, 2)
        for item in range(items):
            work(f"reference {item}")
            parts.item()
        turns.finish()
    turns.enter("train")
    for block in range(100):
        if block == int(fails_at):
            print("this is what the log says")
            if name == "killed":
                sys.exit(3)
            turns.failed(ValueError("this is what went wrong"))
            sys.exit(1)
        if name == "stuck":
            time.sleep(60)
        work(f"block {block}")
        turns.cut(losses=[block / 10], memory={"peak": 1, "now": 1})


main()
