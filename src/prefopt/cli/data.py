"""`prefopt data`: read and check files of examples before anything is trained on them."""

from pydantic import model_validator

from prefopt.cli.flags import settings_app
from prefopt.config import Setting
from prefopt.data.kinds import Kind
from prefopt.data.settings import ConversationSettings, DataSettings, PairSettings

NEED_A_MODEL = {"chat_template", "template_args", "text_as", "score", "max_length", "too_long", "data_workers", "cache_dir"}
"""Settings that are about tokens."""


class CheckSettings(DataSettings, ConversationSettings, PairSettings):
    """What can be said about a check of data."""

    kind: Kind = Setting(
        "pair",
        help="What is read: a `pair` of a chosen and a rejected answer, one answer as a `demonstration`, answers with `thumbs` up or down, "
        "or several that are `ranked`.",
    )
    model: str | None = Setting(
        None, help="Folder or hub name of a model whose tokenizer cuts the examples; without it they are only read."
    )

    @model_validator(mode="after")
    def _tokens_need_a_model(self) -> "CheckSettings":
        if self.model is None and (given := sorted(NEED_A_MODEL & self.model_fields_set)):
            raise ValueError(f"{', '.join(given)} shape tokens, and those need a tokenizer: give model too")
        if self.kind != "demonstration" and "score" in self.model_fields_set:
            raise ValueError("score says what is learned of demonstrations: give kind demonstration too")
        if self.kind != "pair" and "pairs_of_ranks" in self.model_fields_set:
            raise ValueError("pairs_of_ranks says which pairs a ranking comes to: give kind pair too")
        return self


def run(settings: CheckSettings) -> None:
    """Read, check and say what was found."""
    for line in rows_of(settings) if settings.model is None else trees_of(settings, settings.model):
        print(line)


def rows_of(settings: CheckSettings) -> list[str]:
    """What the rows hold.

    Raises:
        DataError: a source or a row cannot be used, as `prefopt.data.dataset.load`.
    """
    from prefopt.data import sources
    from prefopt.data.counts import Counts, shape_lines
    from prefopt.data.reading import readings
    from prefopt.data.rows import NOT_FAULTS, Dropped, Faults, stop_at_bad_rows
    from prefopt.data.summary import source_lines

    found = sources.find(settings.data)
    read = readings([sources.read(place) for place in found.places], settings, settings.kind)
    bad, passed, counts, num_examples = Faults(), Faults(), Counts(), 0
    for entry in (entry for reading in read for entry in reading):
        if isinstance(entry, Dropped):
            (passed if entry.reason in NOT_FAULTS else bad).add(entry)
        else:
            num_examples += 1
            counts.add(entry.example.answers)
    num_rows = sum(reading.num_rows for reading in read)
    if settings.on_bad_row == "stop":
        stop_at_bad_rows(bad.first, bad.counts, num_rows)
    lines = [line for reading in read for line in source_lines(reading.summary())]
    lines += [f"{place.name}: each example {place.given.times:g} times in an epoch" for place in found.places if place.given.times != 1]
    lines += [f"ignored: {name}" for name in found.ignored]
    lines.append(f"{num_rows:,} rows -> {num_examples:,} examples")
    lines += shape_lines(**counts.to_dict())
    left_out = bad + passed
    if left_out.num:
        lines.append(f"dropped {left_out.num:,}: {', '.join(f'{reason} {n:,}' for reason, n in left_out.counts.items())}")
    return lines


def trees_of(settings: CheckSettings, model: str) -> list[str]:
    """What the rows become for that model, the first of them in full.

    Raises:
        PrefoptError: the data or the tokenizer cannot be used.
    """
    from prefopt.data.dataset import load
    from prefopt.models.load import load_tokenizer  # loads torch
    from prefopt.models.settings import ModelSettings

    dataset = load(settings.data, settings, load_tokenizer(ModelSettings(model=model)), kind=settings.kind)
    weights = [f"{name}: each example {times:g} times in an epoch" for name, times in dataset.times.items()]
    return [*dataset.summary.lines(), *weights, "the first example:", dataset.first_example]


app = settings_app("data", CheckSettings, run, usage="data FILE... [FLAGS]", positional="data", without=("eval_data", "eval_fraction"))
