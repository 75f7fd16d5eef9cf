"""The padding token of a reward model.

`transformers` takes a sequence's score at its rightmost token that is not padding. Where padding is also what ends an answer, as in
many tokenizers, it passes over that end and reads the score one token too early, without an error. So a reward model is given a
padding token that ends no answer; the layers never see it, for a causal model's padding stands behind all that is read.
"""

from collections.abc import Collection, Iterator
from itertools import chain

from torch import Tensor
from transformers import PreTrainedTokenizerBase

from prefopt.errors import ModelError
from prefopt.models.load import LoadedModel

NUL = ("Ā", "<0x00>")
"""The byte 0 in byte-level vocabularies, and in those that fall back to bytes: no text holds it."""


def choose_padding(loaded: LoadedModel, ends: Collection[int], used: Collection[int] = ()) -> str:
    """Give model and tokenizer a padding token that ends no answer, and if there is one, stands in no text.

    Args:
        loaded: a reward model; its config and its tokenizer are changed.
        ends: tokens that answers end in.
        used: tokens of the texts. One that begins them would pad, but code that takes padding for what is to be masked would mask it.

    Returns:
        the token.

    Raises:
        ModelError: the vocabulary has none that would do.
    """
    tokenizer, model = loaded.tokenizer, loaded.model
    embeddings = model.get_input_embeddings().weight
    assert isinstance(embeddings, Tensor)
    eos = tokenizer.eos_token_id
    taken = {*ends, *(eos if isinstance(eos, list) else [eos])}
    free = [(token, index) for token, index in candidates(tokenizer) if index not in taken and index < len(embeddings)]
    chosen = next(chain((found for found in free if found[1] not in used), free), None)
    if chosen is None:
        raise ModelError(
            "the tokenizer has no token that could pad: its padding token also ends answers, and a reward model's score would be read "
            "before that end. Add a padding token of its own to the tokenizer, resize the model's embeddings, and save both."
        )
    token, index = chosen
    for config in {id(config): config for config in (model.config, model.config.get_text_config())}.values():
        config.pad_token_id = index
    tokenizer.pad_token = token
    tokenizer.padding_side = "right"
    return repr(token)


def candidates(tokenizer: PreTrainedTokenizerBase) -> Iterator[tuple[str, int]]:
    """Tokens that could pad, the most usual first."""
    vocabulary = tokenizer.get_vocab()
    named = (tokenizer.pad_token, tokenizer.unk_token, tokenizer.bos_token, *tokenizer.all_special_tokens)
    for token in (*named, *sorted(tokenizer.get_added_vocab()), *NUL):
        if token is not None and token in vocabulary:
            yield str(token), vocabulary[token]
