"""What users say about their data."""

from pathlib import Path
from typing import Any, Literal

from prefopt.config import REQUIRED, Setting, Settings


class DataSettings(Settings):
    """Where the examples are and how their text becomes tokens."""

    data: list[str] = Setting(
        REQUIRED, min_length=1, help="Files, folders, `-` for standard input, a folder written by `datasets`, or a hub name."
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
    data_workers: int = Setting(0, ge=0, help="Processes that tokenize; 0 takes one per core where there is enough to do.")
    cache_dir: Path | None = Setting(
        None, help="Folder of the token and reference caches; the default is ~/.cache/prefopt or $PREFOPT_CACHE."
    )


class ConversationSettings(Settings):
    """What runs on demonstrations add: which turns of a conversation are learned."""

    score: Literal["completion", "assistant"] = Setting(
        "completion", help="What SFT learns of a conversation: the last answer, or every assistant turn."
    )
