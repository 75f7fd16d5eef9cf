"""One model of base and adapter: found, merged, written, and compared with what was trained at every turn.

    find -> run base with adapter on texts -> merge in float32 -> run again -> write -> read back, run again -> publish

Nothing is published that was not read back from disk and found to be the model that was trained.
"""

import json
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from peft import PeftModel
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

import prefopt
from prefopt.data.prompts import Renderer
from prefopt.disk import draft_of, replace_folder
from prefopt.errors import DataError, ModelError, RunError
from prefopt.models.load import ADAPTER_CONFIG, LoadedModel, load_tokenizer, locate
from prefopt.models.merge import DTYPES, MERGED, Change, adapter_off, cast_weights, load_to_merge, merge_weights, token_values, write_model
from prefopt.models.policy import on_device, transformers_logging_at
from prefopt.models.read import read_model
from prefopt.models.settings import ModelSettings
from prefopt.models.speakers import adapter_folder, device_named
from prefopt.pipeline.merge_check import Comparison, Unmerged, compare, largest, moved_from_run
from prefopt.pipeline.merge_settings import MergeSettings
from prefopt.pipeline.merge_words import base_warning, card, check_lines, found_lines, four_bit_sentence, loss_lines, name_lines
from prefopt.pipeline.texts import texts_for
from prefopt.pipeline.trained import Trained, look_up
from prefopt.report.files import read_json

Say = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Source:
    """What is to be merged.

    Attributes:
        base: folder or hub name of the whole model below.
        adapter: the adapter's folder.
        named_base: the base that the adapter itself names.
        trained: what is known of the run.
    """

    base: str
    adapter: str
    named_base: str | None
    trained: Trained


@dataclass(frozen=True, slots=True)
class MergeResult:
    """What a merge leaves.

    Attributes:
        folder: of the model.
        comparison: with what was trained.
        change: of the weights, and what rounding does to it.
    """

    folder: Path
    comparison: Comparison
    change: Change


def merge(settings: MergeSettings, *, say: Say = print) -> MergeResult:
    """Merge an adapter into its base and save the model.

    Raises:
        ModelError: adapter or base cannot be found, read or put together, or the merged model is not the one that was trained.
        RunError: `out` is taken or cannot be written.
    """
    out = settings.out.expanduser()
    source = find(settings)
    check_out(out, source, overwrite=settings.overwrite)
    dtype = DTYPES[settings.precision]
    loaded = load_to_merge(source.base, source.adapter, device=device_named(settings.device), trust_remote_code=settings.trust_remote_code)
    assert loaded.adapter is not None, "load_to_merge puts one in"
    check_room(out, sum(parameter.numel() for parameter in loaded.model.parameters()) * dtype.itemsize)
    kind = kind_of(loaded.adapter)
    tokenizer = tokenizer_of(source, settings.trust_remote_code)
    if loaded.kind == "reward":  # its base has no padding token of its own choice, and the model needs one to find the last token
        loaded.model.config.get_text_config().pad_token_id = loaded.model.config.pad_token_id = tokenizer.pad_token_id
    unmerged = run_unmerged(loaded, source, tokenizer)
    model, change = merge_weights(loaded, dtype)
    merged = token_values(model, unmerged.texts.trees)
    unmerged.refuse_other(merged, unmerged.trained, f"merging {source.adapter} into {source.base} did not give the same model")
    moved = moved_from_run(unmerged, source.trained)
    for line in [*found_lines(source.base, source.adapter, model, kind, change), *name_lines(source.named_base, source.base, moved)]:
        say(line)
    if source.trained.in_4bit:
        say(f"note: {four_bit_sentence(moved)}")
    draft = draft_of(out)
    shutil.rmtree(draft, ignore_errors=True)  # of a merge that was killed
    try:
        saved = write_and_read_back(model, tokenizer, draft, source, settings, unmerged)
        comparison = compare(unmerged, merged, saved)
        write_notes(draft, source, settings, tokenizer, comparison, change, moved)
        publish(draft, out)
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    for line in [*check_lines(comparison), *loss_lines(comparison, change, settings.precision)]:
        say(line)
    # Behind the figures, which compare with this very base and so look well.
    if doubt := base_warning(source.base, moved, in_4bit=source.trained.in_4bit):
        say(f"WARNING: {doubt} Give that model with --model, and --overwrite to replace this one.")
    say(f"model: {out}")
    return MergeResult(out, comparison, change)


def kind_of(adapter: PeftModel) -> str:
    """The adapter's type in words."""
    config = adapter.active_peft_config
    name = {"LORA": "DoRA" if getattr(config, "use_dora", False) else "LoRA"}.get(config.peft_type.value, config.peft_type.value)
    return f"{name} of rank {config.r}" if isinstance(getattr(config, "r", None), int) else name


def run_unmerged(loaded: LoadedModel, source: Source, tokenizer: PreTrainedTokenizerBase) -> Unmerged:
    """Base with adapter and base alone, on texts of the run where there is one."""
    embeddings = loaded.model.get_input_embeddings().weight
    assert isinstance(embeddings, Tensor)
    texts = texts_for(source.trained, tokenizer, num_tokens=len(embeddings))
    if loaded.kind == "reward":  # what is compared are scores of single tokens, whose sums are no rewards
        texts = replace(texts, are_pairs=False)
    trained, again = token_values(loaded.model, texts.trees), token_values(loaded.model, texts.trees, together=True)
    with adapter_off(loaded) as base:
        alone = token_values(base, texts.trees)
    return Unmerged(texts, trained, alone, largest(trained - again), loaded.kind)


def write_and_read_back(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, draft: Path, source: Source, settings: MergeSettings, unmerged: Unmerged
) -> Tensor:
    """Writes the model in the wanted precision; the log-probs, or scores, of what then lies on disk, computed in float32, [N].

    Raises:
        ModelError: what was read back is not what was written, or a weight is too large for the precision.
        RunError: it cannot be written.
    """
    device = model.device
    cast_weights(model, DTYPES[settings.precision])
    if broken := [name for name, parameter in model.named_parameters() if not parameter.isfinite().all()]:
        raise ModelError(
            f"{settings.precision} cannot hold all weights: {broken[0]} has numbers beyond its largest. Save in float32 or bf16."
        )
    write_model(model, tokenizer, draft, end_of_turn=end_of_turn(source.trained, tokenizer))
    cast_weights(model, torch.float32)
    written = token_values(model, unmerged.texts.trees)
    model.to("meta")  # type: ignore[arg-type]  # its memory is needed for the next one, whoever still holds it
    read = read_model(str(draft), dtype=torch.float32, trust_remote_code=settings.trust_remote_code, kind=unmerged.kind)
    saved = token_values(on_device(read, device).eval(), unmerged.texts.trees)
    unmerged.refuse_other(saved, written, "the model read back from disk is not the one that was written")
    return saved


def find(settings: MergeSettings) -> Source:
    """What is to be merged.

    Raises:
        ModelError: it is no adapter, or names a base that is not there.
    """
    name = settings.adapter
    folder = Path(adapter_folder(name))
    if not (folder / ADAPTER_CONFIG).is_file():
        if (folder / "config.json").is_file():
            raise ModelError(f"{name} holds a whole model: there is no adapter to merge, and it can be used as it is.")
        raise ModelError(f"{name} holds no adapter: there is no {ADAPTER_CONFIG} in it. Give the folder of a run or of an adapter.")
    config = read_json(folder / ADAPTER_CONFIG)
    if config is None:
        raise ModelError(f"{folder / ADAPTER_CONFIG} cannot be read. The folder is damaged.")
    named = config.get("base_model_name_or_path")
    named = named if isinstance(named, str) and named else None
    wanted = settings.model or named
    if wanted is None:
        raise ModelError(f"{name} does not name its base. Give the model that it was trained on with --model.")
    try:
        base, on_it = locate(wanted)
    except ModelError:
        if settings.model is not None:
            raise
        raise ModelError(f"{name} is an adapter of {named}, which is not there any more. Give its place with --model.") from None
    if on_it is not None:
        raise ModelError(f"{wanted} is an adapter itself. Give the whole model that {name} was trained on with --model.")
    return Source(base, str(folder), named, look_up(name))


def check_out(out: Path, source: Source, *, overwrite: bool) -> None:
    """Whether the folder can be written, before any work is done.

    Raises:
        RunError: it holds something that is not to be replaced.
    """
    try:
        if out.is_file() or not out.name:
            raise RunError(f"{out} is {'a file' if out.name else 'no folder that can be replaced'}. Give a folder as out.")
        if not out.is_dir() or not any(out.iterdir()):
            return
    except OSError as error:
        raise RunError(f"cannot look at {out}: {error.strerror}. Give another folder as out.") from None
    if not overwrite:
        raise RunError(f"{out} is not empty. Give another folder as out, or --overwrite to replace the merged model in it.")
    if not (out / MERGED).is_file():
        raise RunError(f"{out} holds no merged model (no {MERGED}), so --overwrite does not replace it. Give another folder as out.")
    for name in (source.base, source.adapter):
        if Path(name).exists() and Path(name).resolve().is_relative_to(out.resolve()):
            raise RunError(f"{name} lies in {out}, and --overwrite would delete it. Give another folder as out.")


def check_room(out: Path, needed: int) -> None:
    """Whether the disk has room for the weights.

    Raises:
        RunError: it has not.
    """
    above = next(folder for folder in (out.absolute(), *out.absolute().parents) if folder.is_dir())
    free = shutil.disk_usage(above).free
    if free < needed:
        raise RunError(
            f"the model takes {needed / 1e9:.2f} GB, and {free / 1e9:.2f} GB are free in {above}. Make room, give another folder as out, "
            "or save in fewer bits with --precision bf16."
        )


def tokenizer_of(source: Source, trust_remote_code: bool) -> PreTrainedTokenizerBase:
    """The adapter's own tokenizer, which has the chat template of its training; else the base's.

    Raises:
        ModelError: there is none.
    """
    if (Path(source.adapter) / "tokenizer_config.json").is_file():
        try:
            with transformers_logging_at("ERROR"):
                own: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(source.adapter, trust_remote_code=trust_remote_code)
        except Exception as error:  # the library lets errors of many kinds through
            raise ModelError(f"the tokenizer in {source.adapter} cannot be read: {' '.join(str(error).split())}") from None
        return own
    return load_tokenizer(ModelSettings(model=source.base, trust_remote_code=trust_remote_code))


def end_of_turn(trained: Trained, tokenizer: PreTrainedTokenizerBase) -> str:
    """The token that closed the answers in training, at which generation should stop; empty where none is known."""
    text_as, _ = trained.meant("auto", tokenizer)
    try:
        return Renderer(tokenizer, text_as=text_as, template_args=trained.template_args).end_of_turn
    except DataError:  # no template that can be used, or no end-of-sequence token
        return ""


def write_notes(
    draft: Path,
    source: Source,
    settings: MergeSettings,
    tokenizer: PreTrainedTokenizerBase,
    comparison: Comparison,
    change: Change,
    moved: float | None,
) -> None:
    """The page and the notes beside the weights.

    Args:
        draft: the folder to write them to.
        source, settings, tokenizer: what was merged, and how.
        comparison, change: what was found.
        moved: how far the base is from what the run noted of its own, as `moved_from_run` gives it.

    Raises:
        RunError: they cannot be written.
    """
    text_as, _ = source.trained.meant("auto", tokenizer)
    notes = {
        "prefopt": prefopt.__version__,
        "base": source.base,
        "adapter": source.adapter,
        "trained_in_4bit": source.trained.in_4bit,
        "precision": settings.precision,
        "text_as": text_as,
        "template_args": dict(source.trained.template_args),
        "comparison": asdict(comparison),
        "base_moved": moved,
        "rounding": {"weights": change.lost, "worst_layer": change.worst.name, "worst": change.worst.lost, "vanished": change.vanished},
    }
    run = source.trained.files.path if source.trained.files else None
    page = card(source.base, source.adapter, run, settings.precision, comparison, change, moved, in_4bit=source.trained.in_4bit)
    try:
        (draft / MERGED).write_text(json.dumps(notes, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        (draft / "README.md").write_text(page, encoding="utf-8")
    except OSError as error:
        raise RunError(f"cannot write {draft}: {error.strerror}. Make room, or give another folder as out.") from None


def publish(draft: Path, out: Path) -> None:
    """The draft takes its place; what stood there is gone only then.

    Raises:
        RunError: it cannot be moved there; what stood there is as it was.
    """
    try:
        replace_folder(draft, out)
    except OSError as error:
        raise RunError(f"cannot move the merged model to {out}: {error.strerror}.") from None
