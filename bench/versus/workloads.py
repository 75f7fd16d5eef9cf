"""What is trained on: real preference data as plain text, or made-up texts of exact lengths.

Everything becomes rows of `prompt`, `chosen` and `rejected` as text, which both trainers read as they are. Rows that prefopt
would drop or cut are left out and counted, so that both see the same tokens.
"""

import csv
import gzip
import json
import random
import string
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bench.versus.contestants import UsageError
from bench.versus.shapes import Lengths

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Row = dict[str, str]

REAL = {"hh": "hh-rlhf/harmless-base.jsonl.gz", "ukp": "ukp-convarg", "dpo_en": "llamafactory-demo/dpo_en_demo.json"}
MADE = {"k2": (512, 64, 2), "k4": (512, 64, 4), "k8": (512, 64, 8), "long-prompt": (2048, 64, 2), "no-prefix": (1, 256, 2)}
"""Made-up workloads: tokens of the prompt, of each completion, and completions per prompt."""

WORKLOADS = (*REAL, *MADE, "lengths")
ANSWERED = "\n\nAssistant:"
SPEAKERS = {"human": "Human", "user": "Human", "gpt": "Assistant", "assistant": "Assistant", "system": "System"}


@dataclass(frozen=True, slots=True)
class Workload:
    """Examples, ready to be trained on.

    Attributes:
        name: of the workload.
        pairs: the rows, as a file of JSON lines; prefopt reads it, in an order of its own.
        rows: the same.
        branches: completions per example; two for pairs. The rows of an example stand together, `branches / 2` of them.
        lengths: of each example, in tokens.
        ids: of each row: ids of prompt, chosen and rejected, as prefopt has them.
        fitting: lengths of all pairs that fit, those that were not taken too.
        account: what was read and left out.
    """

    name: str
    pairs: Path
    rows: tuple[Row, ...]
    branches: int
    lengths: tuple[Lengths, ...]
    ids: tuple[tuple[list[int], list[int], list[int]], ...]
    fitting: tuple[Lengths, ...]
    account: dict[str, Any]

    @property
    def rows_per_example(self) -> int:
        """Pairs of an example."""
        return self.branches // 2

    def rows_of(self, example: int) -> range:
        """Places of an example's rows."""
        return range(example * self.rows_per_example, (example + 1) * self.rows_per_example)


def hh_rows(file: Path) -> Iterator[Row]:
    """HH transcripts: the last answer is the completion, what stands before it the prompt; rows with two prompts are left out."""
    with gzip.open(file, "rt", encoding="utf-8") as lines:
        for line in lines:
            row = json.loads(line)
            prompt, answered, chosen = row["chosen"].rpartition(ANSWERED)
            other, _, rejected = row["rejected"].rpartition(ANSWERED)
            if prompt == other and answered:
                yield {"prompt": prompt + answered, "chosen": chosen, "rejected": rejected}


def ukp_rows(folder: Path) -> Iterator[Row]:
    """Which of two arguments convinces more: the topic, in the file's name, is the prompt."""
    for file in sorted(folder.glob("*.csv.gz")):
        topic, _, stance = file.name.removesuffix(".csv.gz").partition("_")
        prompt = f"{topic.replace('-', ' ')}: {stance.replace('-', ' ')}\n\nArgument:"
        with gzip.open(file, "rt", encoding="utf-8", newline="\n") as lines:
            for _, label, first, second in csv.reader(lines, delimiter="\t", quoting=csv.QUOTE_NONE):
                if label in ("a1", "a2"):
                    better, worse = (first, second) if label == "a1" else (second, first)
                    yield {"prompt": prompt, "chosen": f" {better}", "rejected": f" {worse}"}


def sharegpt_rows(file: Path) -> Iterator[Row]:
    """Conversations of from/value turns with two answers, written as transcripts."""
    for row in json.loads(file.read_text(encoding="utf-8")):
        turns = "".join(f"\n\n{SPEAKERS[turn['from']]}: {turn['value']}" for turn in row["conversations"])
        chosen, rejected = (f" {row[side]['value']}" for side in ("chosen", "rejected"))
        yield {"prompt": turns + ANSWERED, "chosen": chosen, "rejected": rejected}


READERS = {"hh": hh_rows, "ukp": ukp_rows, "dpo_en": sharegpt_rows}


def real_rows(name: str, data: Path) -> list[Row]:
    """All rows of a workload of real data.

    Raises:
        UsageError: the file is not there.
    """
    place = data / REAL[name]
    if not place.exists():
        raise UsageError(f"{place} is not there. Give the folder that holds {REAL[name]} as --data, or in PREFOPT_SHARED.")
    return list(READERS[name](place))


def pseudo_words(seed: int = 0, count: int = 3000) -> list[str]:
    """Words that no language has, to make texts of."""
    rng = random.Random(seed)
    syllables = [consonant + vowel for consonant in "bdfgklmnprstvz" for vowel in "aeiou"]
    return sorted({"".join(rng.choices(syllables, k=3)) for _ in range(count)})


def tokenizer_texts(name: str, data: Path | None) -> list[str]:
    """What a workload's tokenizer learns from: its own texts, or made-up words."""
    if name in REAL:
        assert data is not None
        return [text for row in real_rows(name, data) for text in row.values()]
    return [" " + " ".join(pseudo_words())] * 4


def train_tokenizer(texts: Sequence[str], *, vocabulary: int) -> "PreTrainedTokenizerBase":
    """A tokenizer of at most that many tokens that splits words as Qwen2's does.

    Of Qwen2's own class, because that is what `AutoTokenizer` loads for a Qwen2 model, whatever class was saved: its splitting
    of words and its normalisation must be those that the merges were learned with. As there, no token begins a text.
    """
    from transformers.models.qwen2 import Qwen2Tokenizer

    learned: PreTrainedTokenizerBase = Qwen2Tokenizer(pad_token="<|pad|>").train_new_from_iterator(texts, vocabulary, show_progress=False)
    return learned


def one_token_words(tokenizer: "PreTrainedTokenizerBase") -> list[str]:
    """Words that are one token each with a space before them, wherever they stand."""
    pieces = sorted(
        token for token in tokenizer.get_vocab() if token[0] == "Ġ" and len(token) > 2 and set(token[1:]) <= set(string.ascii_lowercase)
    )
    words = [" " + piece[1:] for piece in pieces]
    encoded = tokenizer(words, add_special_tokens=False)["input_ids"]
    found = [word for word, ids in zip(words, encoded, strict=True) if len(ids) == 1]
    if len(found) < 50:
        raise UsageError(f"the tokenizer has {len(found)} whole words only, too few to make texts of.")
    return found


def made_rows(lengths: Sequence[Lengths], tokenizer: "PreTrainedTokenizerBase", *, seed: int) -> list[Row]:
    """Rows of these lengths in tokens, the end-of-text token of each completion counted; an example of K completions is K / 2 rows."""
    rng = random.Random(seed)
    words = one_token_words(tokenizer)

    def text(length: int) -> str:
        return "".join(rng.choices(words, k=length))

    rows = []
    for prompt_length, completions in lengths:
        prompt = text(prompt_length)
        answers = [text(length - 1) for length in completions]
        rows += [
            {"prompt": prompt, "chosen": chosen, "rejected": rejected} for chosen, rejected in zip(answers[::2], answers[1::2], strict=True)
        ]
    return rows


def lengths_in_file(file: Path | None) -> list[Lengths]:
    """Lengths of pairs, as `--only lengths` writes them.

    Raises:
        UsageError: there is no such file, or it is of another kind.
    """
    if file is None or not file.is_file():
        raise UsageError("the workload `lengths` needs --lengths FILE, as `--only lengths` writes it.")
    try:
        return [(prompt, (chosen, rejected)) for prompt, chosen, rejected in json.loads(file.read_text(encoding="utf-8"))["lengths"]]
    except (ValueError, KeyError, TypeError) as error:
        raise UsageError(f"{file} holds no lengths: {error}. `--only lengths` writes such a file.") from None


def rows_for(
    name: str,
    needed: int,
    tokenizer: "PreTrainedTokenizerBase",
    *,
    seed: int,
    data: Path | None,
    lengths: Path | None,
    sizes: tuple[int | None, int | None],
    max_length: int,
) -> tuple[list[Row], int]:
    """Rows to choose from, in random order, and how many completions an example has.

    Args:
        name: of the workload.
        needed: examples.
        tokenizer: that will read them.
        seed: of the draw.
        data, lengths: folder of real data; file of lengths.
        sizes: tokens of prompt and completion of made-up workloads, in place of their own; None: their own.
        max_length: longest prompt with completion: longer ones of a file of lengths are not drawn.

    Raises:
        UsageError: data or lengths are not there, or none of the lengths fits.
    """
    rng = random.Random(seed)
    if name in REAL:
        assert data is not None
        rows = real_rows(name, data)
        rng.shuffle(rows)
        return rows, 2
    if name == "lengths":
        # A completion is at least a word and the token that ends it: what is shorter would be a blank answer.
        known = [(prompt, both) for prompt, both in lengths_in_file(lengths) if min(both) >= 2 and prompt + max(both) <= max_length]
        if not known:
            raise UsageError(f"none of the lengths in {lengths} fits within {max_length} tokens. Give a larger --max-length.")
        return made_rows(rng.choices(known, k=needed), tokenizer, seed=seed), 2
    own_prompt, own_completion, branches = MADE[name]
    prompt, completion = sizes[0] or own_prompt, sizes[1] or own_completion
    return made_rows([(prompt, (completion,) * branches)] * needed, tokenizer, seed=seed), branches


def choose_rows(
    name: str, candidates: Sequence[Row], needed: int, branches: int, folder: Path, tokenizer: "PreTrainedTokenizerBase", *, max_length: int
) -> Workload:
    """The first examples that fit, written to a file.

    Args:
        name: of the workload.
        candidates: rows, those of an example together.
        needed: examples.
        branches: completions of each.
        folder: for files.
        tokenizer: of the model.
        max_length: longest prompt with completion, in tokens.

    Raises:
        UsageError: too few fit.
    """
    from prefopt.data.dataset import load
    from prefopt.data.settings import DataSettings

    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "candidates.jsonl"
    write_rows(file, candidates)
    settings = DataSettings(
        data=[str(file)], on_bad_row="drop", too_long="drop", max_length=max_length, cache_dir=folder / "cache", data_format="text_pair"
    )
    dataset = load([str(file)], settings, tokenizer, kind="pair")
    fits = {int(tree.row_id.rpartition(":")[2]) - 1: tree for tree in dataset.trees}
    per_example = branches // 2
    whole = [start for start in range(0, len(candidates), per_example) if all(row in fits for row in range(start, start + per_example))]
    if len(whole) < needed:
        raise UsageError(
            f"{name}: {len(whole)} examples fit within {max_length} tokens, and the run takes {needed}. "
            "Give fewer --blocks, --block-steps or a smaller --batch, or a larger --max-length."
        )
    places = [row for start in whole[:needed] for row in range(start, start + per_example)]
    trees = [fits[place] for place in places]
    rows = [candidates[place] for place in places]
    pairs = folder / "pairs.jsonl"
    write_rows(pairs, rows)
    lengths = []
    for start in range(0, len(trees), per_example):
        own = trees[start : start + per_example]
        lengths.append((len(own[0].prompt_ids), tuple(len(completion.ids) for tree in own for completion in tree.completions)))
    account = {
        "rows": len(candidates),
        "left_out": dict(dataset.summary.dropped or {}),
        "taken": len(rows),
        "mean_prompt": sum(prompt for prompt, _ in lengths) / len(lengths),
        "mean_completion": sum(sum(completions) for _, completions in lengths) / len(lengths) / branches,
        "longest": max(prompt + max(completions) for prompt, completions in lengths),
        "boundary_merges": dataset.summary.num_merges,
    }
    ids = tuple(tuple(part.tolist() for part in (tree.prompt_ids, *(own.ids for own in tree.completions))) for tree in trees)
    fitting = tuple((len(tree.prompt_ids), tuple(len(own.ids) for own in tree.completions)) for tree in dataset.trees)
    return Workload(name, pairs, tuple(rows), branches, tuple(lengths), ids, fitting, account)


def write_rows(file: Path, rows: Sequence[Row]) -> None:
    """Rows as JSON lines."""
    file.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8", newline="\n")


def write_lengths(workload: Workload, out: Path, *, max_length: int) -> int:
    """Write the lengths of all pairs of a workload that fit, for machines that do not have its data; how many there are."""
    lengths = [[prompt, *completions] for prompt, completions in workload.fitting]
    what = f"{workload.name}: tokens of prompt, chosen and rejected of each pair, up to {max_length} in all"
    text = ",\n".join(json.dumps(lengths[start : start + 12])[1:-1] for start in range(0, len(lengths), 12))
    out.write_text(f'{{"what": {json.dumps(what)}, "lengths": [\n{text}\n]}}\n', encoding="utf-8")
    return len(lengths)
