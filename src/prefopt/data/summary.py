"""What was read, dropped, cut and altered, in numbers: for the terminal and for JSON."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

from prefopt.data.counts import shape_lines
from prefopt.data.rows import LENGTH_REASONS
from prefopt.data.store import Sizes


@dataclass(frozen=True, slots=True)
class SourceSummary:
    """One source.

    Attributes:
        name: as it is called in places.
        format: the name of its format.
        says: the format in words.
        because: why it was recognised.
        num_rows: rows in it, bad ones included.
        unread_columns: columns that no setting and no format reads.
    """

    name: str
    format: str
    says: str
    because: str
    num_rows: int
    unread_columns: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class DataSummary:
    """Everything that happened between the rows and the trees: `num_rows` and `num_more` are `num_trees` and all that was dropped.

    Attributes:
        sources: each file, stream or dataset.
        ignored: what stood in given folders and was not read.
        num_rows: rows read, bad ones included.
        num_more: examples, and parts left out, beyond one for each row: a pair read as thumbs is two.
        num_trees: trees made.
        dropped: rows left out, by reason.
        num_cut: prompts cut to fit in max_length.
        num_merges: boundaries where joint tokenisation would have merged prompt and answer, or parts of an answer of which one
            is not learned; the two were encoded apart.
        num_rewritten: answers set behind the prompt as they stand because the chat template breaks the prefix.
        num_duplicates: examples that repeat an earlier one exactly; they are kept.
        num_glued: raw-text prompts and answers that meet without white space.
        template: whose chat template rendered the chats: tokenizer, settings or default; empty where there was no chat.
        num_tokens: tokens of all trees, each prompt counted once.
        mean_prompt, mean_answer: mean lengths in tokens.
        mean_chosen, mean_rejected: of the answers of pairs; 0 where the data is not pairs.
        longest: tokens of the longest prompt with its answer.
        prompt_share: share of the tokens that are prompt, when every completion is held with its own.
        seconds: time taken, from files to trees.
        from_cache: whether the trees came from the disk.
        notes: further remarks that the user should read.
        num_up, num_down, branches, num_ties: as in `prefopt.data.counts.Counts`.
    """

    sources: tuple[SourceSummary, ...] = ()
    ignored: tuple[str, ...] = ()
    num_rows: int = 0
    num_more: int = 0
    num_trees: int = 0
    dropped: Mapping[str, int] | None = None
    num_cut: int = 0
    num_merges: int = 0
    num_rewritten: int = 0
    num_duplicates: int = 0
    num_glued: int = 0
    template: str = ""
    num_tokens: int = 0
    mean_prompt: float = 0.0
    mean_answer: float = 0.0
    mean_chosen: float = 0.0
    mean_rejected: float = 0.0
    longest: int = 0
    prompt_share: float = 0.0
    seconds: float = 0.0
    from_cache: bool = False
    notes: tuple[str, ...] = ()
    num_up: int = 0
    num_down: int = 0
    branches: Mapping[str, int] | None = None
    num_ties: int = 0

    @property
    def num_dropped(self) -> int:
        """Rows left out, for all reasons."""
        return sum((self.dropped or {}).values())

    @property
    def rows_per_second(self) -> float:
        """Rows read and made into trees per second."""
        return self.num_rows / self.seconds if self.seconds > 0 else 0.0

    def with_sizes(self, sizes: Sizes, num_pairs: int, num_chosen: int, num_rejected: int) -> "DataSummary":
        """The summary with the sizes of the trees.

        Args:
            sizes: of all trees.
            num_pairs: how many are pairs.
            num_chosen, num_rejected: tokens of all chosen and rejected answers of pairs.
        """
        prompts, answers = int(sizes.prompt.sum()), int(sizes.answers.sum())
        repeated = int((sizes.prompt * sizes.branches).sum())
        return replace(
            self,
            num_trees=len(sizes.prompt),
            num_tokens=prompts + answers,
            mean_prompt=prompts / max(len(sizes.prompt), 1),
            mean_answer=answers / max(int(sizes.branches.sum()), 1),
            mean_chosen=num_chosen / max(num_pairs, 1),
            mean_rejected=num_rejected / max(num_pairs, 1),
            longest=int((sizes.prompt + sizes.longest).max(initial=0)),
            prompt_share=repeated / max(repeated + answers, 1),
        )

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self) | {
            "dropped": dict(self.dropped or {}),
            "branches": dict(self.branches or {}),
            "num_dropped": self.num_dropped,
            "rows_per_second": round(self.rows_per_second, 1),
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "DataSummary":
        """What `to_dict` gave, back again."""
        names = {entry.name for entry in fields(cls)}
        kept = {name: value for name, value in values.items() if name in names}
        kept["sources"] = tuple(
            SourceSummary(**{**source, "unread_columns": tuple(source["unread_columns"])}) for source in kept["sources"]
        )
        return cls(**{**kept, "ignored": tuple(kept["ignored"]), "notes": tuple(kept["notes"])})

    def lines(self) -> list[str]:
        """For the terminal."""
        lines = [line for source in self.sources[:8] for line in source_lines(source)]
        if len(self.sources) > 8:
            lines.append(f"… and {len(self.sources) - 8} more sources")
        if self.ignored:
            more = f" and {len(self.ignored) - 8} more" if len(self.ignored) > 8 else ""
            lines.append(f"ignored: {', '.join(self.ignored[:8])}{more}")
        speed = "from the cache" if self.from_cache else f"{self.rows_per_second:,.0f} rows/s"
        lines.append(f"{self.num_rows:,} rows -> {self.num_trees:,} examples in {self.seconds:.1f} s ({speed})")
        lines += shape_lines(self.num_up, self.num_down, self.branches or {}, self.num_ties)
        if self.num_dropped:
            lines.append(
                f"dropped {self.num_dropped:,}: {', '.join(f'{reason} {count:,}' for reason, count in (self.dropped or {}).items())}"
            )
        lines += [f"{count:,} {words}" for count, words in self.remarks() if count]
        lines.append(
            f"{self.num_tokens:,} tokens; prompt {self.mean_prompt:.0f} and answer {self.mean_answer:.0f} on average, "
            f"the longest together {self.longest:,}; {self.prompt_share:.0%} of what would be read without sharing is prompt"
        )
        return lines + [f"note: {note}" for note in self.notes]

    def remarks(self) -> list[tuple[int, str]]:
        """Counts that are mentioned where they are not zero."""
        lengths = sum(count for reason, count in (self.dropped or {}).items() if reason in LENGTH_REASONS)
        return [
            (lengths, "of the dropped rows did not fit in max_length"),
            (self.num_more, "of the examples, or of what was left out, are further ones of rows that hold several"),
            (self.num_cut, "prompts were cut from the left to fit in max_length"),
            (
                self.num_merges,
                "answers, or parts of them, were tokenised apart from what they follow, because joint tokenisation merges the two",
            ),
            (
                self.num_rewritten,
                "answers were set behind their prompt as they stand: the chat template writes a prompt differently once an answer follows",
            ),
            (self.num_duplicates, "examples repeat an earlier one exactly (kept)"),
            (self.num_glued, "answers follow their raw-text prompt without white space between"),
        ]


def source_lines(source: SourceSummary) -> list[str]:
    """One source, for the terminal."""
    lines = [f"{source.name}: {source.num_rows:,} rows of {source.says} [{source.format}; {source.because}]"]
    if source.unread_columns:
        lines.append(f"  columns not read: {', '.join(source.unread_columns)}")
    return lines
