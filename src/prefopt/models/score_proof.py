"""What the proof of the engine compares: log-probabilities, or the scores of a reward model; and that these are the model's own.

Shapes: N numbers that are compared.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel

from prefopt.engine.batch import TreeBatch, pack
from prefopt.engine.logps import TokenLogps
from prefopt.errors import ModelError
from prefopt.models.policy import EnginePath, Policy
from prefopt.trees import PromptTree


def values_of(logps: TokenLogps, batch: TreeBatch) -> Tensor:
    """Log-probabilities [N]; of a reward model scores at the tokens that predict, and at each completion's last, in the trees' order."""
    if logps.scalar_T is None:
        return logps.values_N
    predicting = batch.predict_from_N[: batch.num_completion_tokens].split(batch.lengths_C.tolist())
    return logps.scalar_T[torch.cat([part for own, last in zip(predicting, batch.last_C, strict=True) for part in (own, last[None])])]


def prove_scores(model: PreTrainedModel, trees: Sequence[PromptTree], floor: float) -> None:
    """A reward model's own forward must give the score layer's number at the last token.

    Raises:
        ModelError: it does not.
    """
    batch = pack(trees, sharing="plain", device=model.device)
    text = model.config.get_text_config()
    padding, text.pad_token_id = text.pad_token_id, None  # random tokens may be padding, which it would pass over
    try:
        with torch.no_grad():
            found = Policy(model, EnginePath("plain", None, scores=True))(batch).last_scalars(batch.last_C)
            rows = [row[mask.bool()][None] for row, mask in zip(batch.input_ids, _mask_of(batch), strict=True)]
            own = torch.cat([model(input_ids=row, use_cache=False).logits.flatten() for row in rows])
    finally:
        text.pad_token_id = padding
    if not (moved := relative(found, own)) <= floor:
        raise ModelError(
            f"{type(model).__name__} makes its scores in another way than by one linear layer at the last token (they differ by "
            f"{moved:.0e}), so that it cannot be trained as a reward model. Begin with a model of another architecture."
        )


def _mask_of(batch: TreeBatch) -> Tensor:
    assert batch.attention_mask is not None, "it is packed plain"
    return batch.attention_mask


def relative(values: Tensor, base: Tensor) -> float:
    """‖values − base‖ / ‖base‖."""
    values, base = values.double(), base.double()
    return float((values - base).norm() / base.norm().clamp(min=1e-30))
