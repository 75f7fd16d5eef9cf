"""Answers that a program has graded, as pairs: of each question every answer that passed beside one that failed.

    python recipes/graded_pairs.py GRADED OUT

GRADED is a file of thumbs in any format that prefopt reads: up for what passed. Each answer is used once at most, so a question with two
that passed and one that failed gives one pair. Questions of which all answers passed, or all failed, give none, and are counted.
"""

import json
import sys
from collections import defaultdict
from pathlib import Path

from prefopt.data import sources
from prefopt.data.dataset import check
from prefopt.data.examples import Conversation
from prefopt.data.settings import DataSettings


def plain(content: str | Conversation) -> object:
    """Text as it is, turns as objects."""
    return content if isinstance(content, str) else [message.as_dict() for message in content]


def main(graded: str, out: Path) -> None:
    """Reads, pairs and writes."""
    opened = [sources.read(place) for place in sources.find([graded]).places]
    found = check(opened, DataSettings(data=[graded], on_bad_row="drop"), "thumbs")
    by_prompt: defaultdict[object, dict[bool, list[object]]] = defaultdict(lambda: {True: [], False: []})
    for example in found.examples:
        answer = example.answers[0]
        by_prompt[example.prompt][bool(answer.label)].append(plain(answer.content))
    rows = [
        {"prompt": plain(prompt), "chosen": passed, "rejected": failed}
        for prompt, answers in by_prompt.items()
        for passed, failed in zip(answers[True], answers[False], strict=False)
    ]
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    alone = sum(not (answers[True] and answers[False]) for answers in by_prompt.values())
    print(f"{out}: {len(rows)} pairs of {len(found.examples)} answers to {len(by_prompt)} questions; {alone} questions give none")


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
