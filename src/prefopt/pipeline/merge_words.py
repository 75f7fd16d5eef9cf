"""What is said about a merge: on the terminal, and on the page beside the weights."""

from pathlib import Path

from transformers import PreTrainedModel

from prefopt.errors import ConfigError
from prefopt.models.load import is_hub_name
from prefopt.models.merge import MERGED, Change
from prefopt.pipeline.merge_check import UNIT, WHAT, Comparison, is_other_base
from prefopt.report.card import model_card

TOO_MUCH_BEHAVIOUR = 0.1
"""Share of what the adapter does to log-probs, or to margins, above which rounding is warned of. A tenth of the margins is as if β
or the learning rate had been another by a tenth: about what some hundred held-out pairs can tell apart."""

TOO_MUCH_WEIGHTS = 0.5
"""Length of what rounding does to the weights, relative to what the adapter did, above which it is warned of whatever the texts
show. On a base that is kept in bf16, rounding by 0.37 of the adapter took 5 % of the margins, 0.73 took 42 %, 0.91 took 76 %."""


def found_lines(base: str, adapter: str, model: PreTrainedModel, kind: str, change: Change) -> list[str]:
    """What was merged."""
    layers = len({module.name.rpartition(".")[0] for module in change.modules})
    lines = [
        f"base: {base}, {type(model).__name__}, {model.num_parameters():,} parameters",
        f"adapter: {adapter}, {kind}, changes {layers} layers",
    ]
    if change.is_nothing:
        lines.append("note: the adapter changes no weight at all: the merged model is its base. Was it saved before training?")
    return lines


def name_lines(named: str | None, given: str, moved: float | None) -> list[str]:
    """A note where the base is called otherwise than the one that the adapter names, and nothing is known of its weights.

    Args:
        named: the base that the adapter names.
        given: the base that is merged.
        moved: as `moved_from_run` gives it.
    """
    if not named or named == given or Path(named).name == Path(given).name or moved is not None:
        return []
    return [f"note: the adapter names {named} as its base, and {given} was given. Shapes agree; whether the weights do cannot be seen."]


def four_bit_sentence(moved: float | None) -> str:
    """What is to be known of an adapter that was trained on a base in four bits.

    Args:
        moved: as `moved_from_run` gives it.
    """
    far = "" if moved is None else f", whose log-probs are {moved:.2g} nats per token from those that training saw"
    return (
        "the adapter was trained on its base in 4 bits, and is merged into the base as it is stored, unquantised (merged in 4 bits "
        f"it would be rounded away){far}."
    )


def base_warning(base: str, moved: float | None, *, in_4bit: bool = False) -> str:
    """That the base is probably another one than the adapter was trained on; empty where nothing says so.

    Args:
        base: as it is to be called.
        moved: as `moved_from_run` gives it.
        in_4bit: the run held its base in four bits.
    """
    if not is_other_base(moved, in_4bit=in_4bit):
        return ""
    return (
        f"{base} is probably not the model that the adapter was trained on: its log-probs differ by {moved:.2f} nats per token from those "
        "that the run noted before its first step. What was trained is not what this merged model does."
    )


def check_lines(comparison: Comparison) -> list[str]:
    """How far merged and unmerged are apart, and beside it what the adapter does."""
    words = f"in {UNIT['language']}" if comparison.kind == "language" else "scores after each token"
    return [
        f"compared on {comparison.num_tokens:,} tokens of {comparison.texts}, {words}:",
        f"  the adapter moves {WHAT[comparison.kind]} by {comparison.effect:.2g} on average",
        f"  merged in float32, at most {comparison.merged:.1g} from base with adapter (up to {comparison.allowed:.1g} is arithmetic)",
    ]


def loses_too_much(comparison: Comparison, change: Change) -> bool:
    """Whether saving in the wanted precision loses more of what was learned than should pass without a word."""
    behaviour = comparison.saved_mean > max(TOO_MUCH_BEHAVIOUR * comparison.effect, comparison.noise)
    margins = comparison.margins_moved is not None and comparison.margins_moved > TOO_MUCH_BEHAVIOUR
    return not change.is_nothing and (behaviour or margins or change.lost > TOO_MUCH_WEIGHTS)


def loss_lines(comparison: Comparison, change: Change, precision: str) -> list[str]:
    """What lies on disk, compared with what was trained; a warning where rounding took much of it."""
    if precision == "float32" or change.is_nothing:
        return [f"  read back from disk, in {precision}: at most {comparison.saved_largest:.1g} from base with adapter"]
    far = f"{comparison.saved_mean:.2g} on average from base with adapter, {comparison.saved_largest:.2g} at most"
    lines = [f"  read back from disk, in {precision}: {far}"]
    lines += [f"what saving in {precision} loses, relative to what the adapter did:"]
    lines += [f"  {what:<12}{loss}" for what, loss in losses(comparison, change).items()]
    if loses_too_much(comparison, change):
        lines.append(f"WARNING: {warning(change, precision)}")
    return lines


def losses(comparison: Comparison, change: Change) -> dict[str, str]:
    """What rounding costs, in figures: of the weights, the log-probs and the margins."""
    lost = {
        "weights": f"{change.lost:.1%} ({change.worst.lost:.0%} in {change.worst.name}); "
        f"{change.vanished:.1%} of the changed numbers are the base's again"
    }
    if comparison.effect:
        lost[WHAT[comparison.kind]] = f"{comparison.saved_mean / comparison.effect:.1%}"
    if comparison.margins_moved is not None:
        lost["margins"] = f"{comparison.margins_moved:.1%}; {comparison.preferences_lost} of {comparison.num_pairs} pairs turn around"
    return lost


def warning(change: Change, precision: str) -> str:
    """What is lost and why, and what to do."""
    why = (
        f"the base is kept in {precision}, and whatever is smaller than half the gap to the next number is gone"
        if change.base_is_rounded
        else "rounding the base, which is kept in more bits, is not little beside what the adapter changes"
    )
    return (
        f"{precision} loses a good part of what was learned: {why}. Save in float32 (leave --precision out), "
        "or serve the base as it is with the adapter beside it."
    )


def card(
    base: str,
    adapter: str,
    run: Path | None,
    precision: str,
    comparison: Comparison,
    change: Change,
    moved: float | None = None,
    *,
    in_4bit: bool = False,
) -> str:
    """The page beside the weights: what this model is, how that was checked, and, where its run is there, how it was trained.

    Args:
        base, adapter: what was merged.
        run: the folder of the adapter's run, if there is one.
        precision: in which it was saved.
        comparison, change: what was found.
        moved: as `moved_from_run` gives it.
        in_4bit: the run held its base in four bits.
    """
    hub = is_hub_name(base)
    # Paths of this machine say nothing to others, their last part may.
    short_base = base if hub else Path(base).name
    short_adapter = Path(adapter).parent.name if Path(adapter).name == "model" else Path(adapter).name
    made = f"`{short_base}` with the adapter `{short_adapter}` in its weights, merged in float32 by prefopt and saved in {precision}."
    checked = ["```text", *check_lines(comparison), *loss_lines(comparison, change, precision), "```"]
    doubt = base_warning(f"`{short_base}`", moved, in_4bit=in_4bit)
    if in_4bit:
        made += f" Note: {four_bit_sentence(moved)}"
    merged = "\n".join(
        [made, "", *([f"**WARNING: {doubt}**", ""] if doubt else []), *checked, "", f"The figures stand in `{MERGED}` too.", ""]
    )
    if run is not None:
        try:
            return model_card(run, merged=merged)
        except ConfigError:  # too little is left of the run
            pass
    head = ["---", "library_name: transformers", *([f"base_model: {base}"] if hub else []), "---"]
    return "\n".join([*head, "", "# A merged model", "", merged])
