"""What users say about their data."""

import math
from pathlib import Path
from typing import Any, Literal

from pydantic import field_validator, model_validator

from prefopt.config import NOT_UNICODE, REQUIRED, Setting, Settings, is_unicode, printable, readings, shown
from prefopt.data.given import as_text
from prefopt.data.kinds import PairsOfRanks

NOT_OF_TEMPLATES = (
    *("conversation", "messages", "chat_template", "add_generation_prompt", "continue_final_message", "tokenize", "tokenizer_kwargs"),
    *("sanitize_control_tokens", "padding", "truncation", "max_length"),
    *("return_tensors", "return_dict", "return_assistant_tokens_mask"),
)
"""Arguments of the tokenizer's method that renders a template: no template sees them, and prefopt gives those that matter."""

DEEPEST_ARG = 20
"""Lists and mappings within each other in `template_args`."""


class DataSettings(Settings):
    """Where the examples are and how their text becomes tokens."""

    data: list[str] = Setting(
        REQUIRED,
        min_length=1,
        help="Files, folders, `-` for standard input, a folder written by `datasets`, or a hub name. Behind a colon a weight may stand: of "
        "`b.jsonl:0.3` each epoch takes three in ten examples.",
    )
    eval_data: list[str] = Setting([], help="Held-out examples, from the same kinds of sources.")
    eval_fraction: float = Setting(
        0.0,
        ge=0,
        lt=1,
        help="Share of the data held out when no eval_data is given: by seed and by what a conversation opens with, so about that share.",
    )
    data_format: str = Setting("auto", help="Format of the rows; `auto` recognises it by looking and says what it saw.")
    columns: dict[str, str] = Setting({}, help="Other column names, as `field: column`, for example `chosen: better_answer`.")
    on_bad_row: Literal["stop", "drop"] = Setting(
        "stop", help="`stop` lists the bad rows; `drop` leaves them out and writes each with its reason beside the run."
    )
    chat_template: str | None = Setting(None, help="Jinja template, or the path of one, in place of the tokenizer's own.")
    template_args: dict[str, Any] = Setting({}, help="Further arguments for the chat template.")
    text_as: Literal["raw", "chat"] = Setting(
        "raw",
        help="Prompts and answers given as plain text: `raw` takes them as they are, `chat` as one question and one answer.",
    )
    max_length: int = Setting(2048, ge=8, help="Longest prompt with completion, in tokens.")
    too_long: Literal["cut", "drop"] = Setting(
        "cut", help="What to do with a prompt that is too long: cut whole turns from its left, or drop the row."
    )
    data_workers: int = Setting(0, ge=0, le=256, help="Processes that tokenize; 0 takes one per core where there is enough to do.")
    cache_dir: Path | None = Setting(
        None, help="Folder of the token and reference caches; the default is ~/.cache/prefopt or $PREFOPT_CACHE."
    )

    @field_validator("data", "eval_data", mode="before")
    @classmethod
    def _sources_as_text(cls, given: Any) -> Any:
        """A source given by its parts becomes the text that says the same."""
        listed = [given] if isinstance(given, dict) else given
        return [as_text(item) for item in listed] if isinstance(listed, list) else listed

    @field_validator("template_args")
    @classmethod
    def _args_reach_the_template(cls, args: dict[str, Any]) -> dict[str, Any]:
        if taken := [name for name in NOT_OF_TEMPLATES if name in args]:
            raise ValueError(f"{', '.join(taken)} cannot be given to a template: leave it out")
        for name, value in args.items():
            check_plain(name, value)
        return args


class ConversationSettings(Settings):
    """What runs on demonstrations add: which turns of a conversation are learned."""

    score: Literal["completion", "assistant"] = Setting(
        "completion", help="What SFT learns of a conversation: the last answer, or every assistant turn."
    )


class PairSettings(Settings):
    """What runs on pairs add: how rankings come to pairs."""

    pairs_of_ranks: PairsOfRanks = Setting(
        "all",
        help="Pairs of a ranking: `all` of different rank, the `best` against each of the others, or both `ends`, the best and the worst.",
    )

    @model_validator(mode="after")
    def _what_is_no_pair_is_not_made_of_ranks(self) -> "PairSettings":
        switched = [(name, kind) for name, kind in readings(type(self)).items() if getattr(self, name)]  # of methods that have such
        if self.pairs_of_ranks != "all" and switched:
            [(name, kind), *_] = switched
            how = "reads it whole" if kind == "ranked" else "reads single answers"
            raise ValueError(f"pairs_of_ranks says which pairs are made of a ranking, and {name} {how}: leave one of them out")
        return self


def check_plain(name: str, value: object, depth: int = DEEPEST_ARG) -> None:
    """Refuses what `config.yaml` could not hold as it is.

    Raises:
        ValueError: something else than text, finite numbers, switches, null, and lists and mappings of them; or nested too deeply.
    """
    if depth == 0:
        raise ValueError(f"{printable(name)} is nested too deeply")
    if isinstance(value, str):
        if not is_unicode(value):
            raise ValueError(f"{printable(name)} {NOT_UNICODE}")
    elif isinstance(value, list):
        for item in value:
            check_plain(name, item, depth - 1)
    elif isinstance(value, dict):
        for key, item in value.items():
            if not isinstance(key, str):
                raise ValueError(f"{printable(name)} has the name {shown(key)}, and names must be text")
            check_plain(name, key, depth - 1)
            check_plain(name, item, depth - 1)
    elif not (value is None or isinstance(value, bool | int) or (isinstance(value, float) and math.isfinite(value))):
        raise ValueError(
            f"{printable(name)} must be text, a finite number, on or off, null, or a list or mapping of them (given: {shown(value)})"
        )
