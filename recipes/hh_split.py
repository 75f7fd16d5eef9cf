"""Split a file of HH transcripts into a part to train on and a part that no stage sees.

    python recipes/hh_split.py DATA FOLDER

writes FOLDER/train.jsonl and FOLDER/held_out.jsonl, a tenth of the dialogs held out by seed 0. Dialogs that open with the
same words of the human stay together, so that SFT, which reads whole dialogs, sees no opening of a held-out pair.
"""

import gzip
import json
import random
import sys
from pathlib import Path

SHARE_HELD_OUT = 0.1


def opening(row: dict[str, str]) -> str:
    """What the human says first."""
    return row["chosen"].split("\n\nAssistant:")[0]


def main(source: Path, folder: Path) -> None:
    """Reads, splits and writes."""
    text = gzip.decompress(source.read_bytes()) if source.suffix == ".gz" else source.read_bytes()
    rows = [json.loads(line) for line in text.decode("utf-8").split("\n") if line.strip()]
    openings = sorted({opening(row) for row in rows})
    random.Random(0).shuffle(openings)
    held_out = set(openings[: round(SHARE_HELD_OUT * len(openings))])
    folder.mkdir(parents=True, exist_ok=True)
    for name, wanted in (("train", False), ("held_out", True)):
        part = [row for row in rows if (opening(row) in held_out) is wanted]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in part), encoding="utf-8")
        print(f"{folder / name}.jsonl: {len(part)} rows")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
