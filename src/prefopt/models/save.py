"""A trained model as a folder that transformers, or peft, loads."""

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel

from prefopt.disk import draft_of, replace_folder
from prefopt.errors import RunError
from prefopt.models.load import LoadedModel
from prefopt.models.policy import transformers_logging_at


def save_model(
    loaded: LoadedModel,
    folder: Path,
    *,
    chat_template: str | None = None,
    end_of_turn: str = "",
    weights: Mapping[str, Tensor] | None = None,
) -> None:
    """Write model or adapter and tokenizer; the folder appears whole or not at all.

    Weights are written in float32, as they were trained: in bf16 the small updates of a preference method would be lost.

    Args:
        loaded: the model, its tokenizer and its adapter.
        folder: where to; what it held is replaced.
        chat_template: the template that the data was rendered with, where the tokenizer should carry it.
        end_of_turn: the token that closed the answers: generation should stop at it.
        weights: what is written, by the names of the adapter's or else the model's `state_dict`; None: what the model holds. Where
            processes hold it in parts, they must have been put together.

    Raises:
        RunError: the folder cannot be written; what it held is as it was.
    """
    own_weights: dict[str, Any] = {} if weights is None else {"state_dict": dict(weights)}
    draft = draft_of(folder)
    shutil.rmtree(draft, ignore_errors=True)  # of a process that was killed while writing
    try:
        draft.mkdir(parents=True)
        if loaded.adapter is not None:
            # Embeddings that are trained in full stand in modules_to_save; those of the base are the base's.
            loaded.adapter.save_pretrained(
                str(draft), selected_adapters=[loaded.adapter.active_adapter], save_embedding_layers=False, **own_weights
            )
            (draft / "README.md").unlink(missing_ok=True)  # peft's form of a card with nothing filled in; a run writes its own
        else:
            stop_at(loaded, end_of_turn)
            mend_generation_config(loaded.model)
            with transformers_logging_at("ERROR"):
                loaded.model.save_pretrained(draft, **own_weights)
        own_template = loaded.tokenizer.chat_template
        try:
            loaded.tokenizer.chat_template = chat_template or own_template
            loaded.tokenizer.save_pretrained(draft)
        finally:
            loaded.tokenizer.chat_template = own_template
        replace_folder(draft, folder)
    except Exception as error:  # for a full disk OSError, SafetensorError, and a bare Exception from tokenizers
        shutil.rmtree(draft, ignore_errors=True)
        raise RunError(
            f"cannot write the model to {folder}: {error}. Make room and go on with --resume: the last checkpoint has the weights."
        ) from None


def stop_at(loaded: LoadedModel, end_of_turn: str) -> None:
    """Add the token to those that end generation, where it is one token and not among them."""
    known, config = own_end_ids(loaded), generation_config_of(loaded.model)
    if config is not None and (added := end_ids(loaded, end_of_turn).difference(known)):
        config.eos_token_id = [*known, *sorted(added)]


def mend_generation_config(model: PreTrainedModel) -> None:
    """Make a generation config that transformers refuses to save one that it saves.

    Some published models carry one: a temperature without `do_sample`, which reading passes over and writing does not.
    """
    config = generation_config_of(model)
    if config is None or is_valid(config):
        return
    config.do_sample = True  # what a temperature or top_p is for
    if not is_valid(config):
        model.generation_config = GenerationConfig(
            bos_token_id=config.bos_token_id, eos_token_id=config.eos_token_id, pad_token_id=config.pad_token_id
        )


def generation_config_of(model: PreTrainedModel) -> GenerationConfig | None:
    """How the model generates; None where it cannot, as a reward model."""
    return getattr(model, "generation_config", None)


def is_valid(config: GenerationConfig) -> bool:
    """Whether transformers would save it."""
    try:
        with transformers_logging_at("ERROR"):
            config.validate(strict=True)
    except ValueError:
        return False
    return True


def end_ids(loaded: LoadedModel, end_of_turn: str) -> set[int]:
    """The tokens that end an answer: those that the model names, and the one that closed the answers it was trained on."""
    ids = loaded.tokenizer(end_of_turn, add_special_tokens=False)["input_ids"] if end_of_turn else []
    return {*own_end_ids(loaded), *(ids if len(ids) == 1 else [])}


def own_end_ids(loaded: LoadedModel) -> list[int]:
    """The tokens by which the model itself says that generation ends."""
    config = generation_config_of(loaded.model)
    ids = None if config is None else config.eos_token_id
    return [] if ids is None else list(ids) if isinstance(ids, list) else [ids]
