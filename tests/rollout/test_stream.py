"""Streams: the draws of `sample`, pieces that add up, ends where they should be, and turns that do not disturb each other."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager

import pytest
import torch
from tests.models.architectures import ARCHITECTURES, tiny_model
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from prefopt.errors import ModelError
from prefopt.rollout.sample import sample
from prefopt.rollout.stream import REPLACEMENT, Stream
from prefopt.trees import TokenIds, token_ids

MakeModel = Callable[..., PreTrainedModel]
Use = Callable[[], AbstractContextManager[PreTrainedModel]]
PROMPT = token_ids([5, 9, 17, 4, 8, 60, 31, 44, 21, 3, 77, 80, 12, 15, 19])


def using(model: PreTrainedModel) -> Use:
    @contextmanager
    def use() -> Iterator[PreTrainedModel]:
        yield model

    return use


def sharp(make_model: MakeModel) -> PreTrainedModel:
    """A random model whose next tokens are far from equally likely, so that rounding does not decide."""
    return make_model("llama", seed=3, initializer_range=0.5).eval()


def stream_of(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, prompt: TokenIds = PROMPT, **settings: object) -> Stream:
    return Stream(using(model), tokenizer, prompt, **({"eos_ids": {2}, "max_new_tokens": 24} | settings))  # type: ignore[arg-type]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_draws_are_those_of_sample_on_every_architecture(architecture: str, tokenizer: PreTrainedTokenizerFast):
    model = tiny_model(architecture)  # prompt and answer cross its windows and chunks of 12 tokens
    ((expected,),) = sample(model, [PROMPT], eos_ids={2}, max_new_tokens=20, seed=7)
    stream = stream_of(model, tokenizer, max_new_tokens=20, seed=7)
    for _ in stream:
        pass
    assert stream.ids == expected.tolist()


@pytest.mark.parametrize("temperature", [0.0, 0.7, 1.0])
def test_pieces_add_up_to_what_sample_decodes(make_model: MakeModel, tokenizer: PreTrainedTokenizerFast, temperature: float):
    model = sharp(make_model)
    texts = set()
    for seed in range(5):
        ((expected,),) = sample(model, [PROMPT], eos_ids={2}, max_new_tokens=24, temperature=temperature, seed=seed)
        stream = stream_of(model, tokenizer, temperature=temperature, seed=seed)
        pieces = list(stream)
        assert "".join(pieces) == stream.text == tokenizer.decode(expected, skip_special_tokens=True)
        assert len(pieces) == len(expected)
        texts.add(stream.text)
    assert len(texts) == (1 if temperature == 0 else 5)


class Scripted(Stream):
    """A stream whose tokens are given."""

    script: Iterator[int]

    def _next_token(self) -> int:
        return next(self.script)


def scripted(make_model: MakeModel, tokenizer: PreTrainedTokenizerFast, text: str, **settings: object) -> Scripted:
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    arguments = {"eos_ids": {2}, "max_new_tokens": len(ids)} | settings
    stream = Scripted(using(make_model("llama")), tokenizer, PROMPT, **arguments)  # type: ignore[arg-type]
    stream.script = iter(ids)
    return stream


def test_characters_of_several_tokens_come_whole(make_model: MakeModel, tokenizer: PreTrainedTokenizerFast):
    text = "é, 好, 🙂 and \u200d e\u0301 end"
    stream = scripted(make_model, tokenizer, text)
    pieces = list(stream)
    assert "".join(pieces) == text
    assert len(pieces) > len(text)  # more tokens than characters: some characters took several
    assert not any(REPLACEMENT in piece for piece in pieces)
    assert "🙂" in pieces


def test_half_a_character_at_the_limit_is_shown_as_decoding_shows_it(make_model: MakeModel, tokenizer: PreTrainedTokenizerFast):
    ids = tokenizer("ok 🙂", add_special_tokens=False)["input_ids"]
    stream = scripted(make_model, tokenizer, "ok 🙂", max_new_tokens=len(ids) - 1)
    assert "".join(stream) == tokenizer.decode(ids[:-1]) == stream.text
    assert stream.text.endswith(REPLACEMENT)


def test_a_broken_byte_in_the_middle_holds_nothing_back_for_ever(make_model: MakeModel, tokenizer: PreTrainedTokenizerFast):
    broken = tokenizer("好", add_special_tokens=False)["input_ids"][:1]
    stream = scripted(make_model, tokenizer, "ab", max_new_tokens=3)
    stream.script = iter([*broken, *tokenizer("ab", add_special_tokens=False)["input_ids"]])
    pieces = list(stream)
    assert pieces[0] == ""
    assert pieces[1].startswith(REPLACEMENT)
    assert "".join(pieces) == tokenizer.decode(stream.ids)


def test_says_why_it_is_over(make_model: MakeModel, tokenizer: PreTrainedTokenizerFast):
    model = make_model("llama", seed=1)
    ended = stream_of(model, tokenizer, eos_ids=set(range(4, 200)), max_new_tokens=50, seed=1)
    for _ in ended:
        pass
    assert ended.stopped == "end"
    assert ended.ids[-1] in range(4, 200)
    assert not set(ended.ids[:-1]) & set(range(4, 200))
    limited = stream_of(model, tokenizer, eos_ids=frozenset(), max_new_tokens=5)
    assert len(list(limited)) == 5
    assert limited.stopped == "limit"
    full = stream_of(model, tokenizer, eos_ids=frozenset(), max_new_tokens=50, context=len(PROMPT) + 3)
    assert len(list(full)) == 3
    assert full.stopped == "context"
    broken_off = stream_of(model, tokenizer, eos_ids=frozenset())
    next(iter(broken_off))
    assert broken_off.stopped is None
    assert len(broken_off.ids) == 1


def test_a_shorter_limit_does_not_change_the_draws(make_model: MakeModel, tokenizer: PreTrainedTokenizerFast):
    model = sharp(make_model)
    long, short = (stream_of(model, tokenizer, eos_ids=frozenset(), max_new_tokens=count, seed=4) for count in (20, 8))
    assert len(list(long)) == 20
    assert len(list(short)) == 8
    assert long.ids[:8] == short.ids


def test_streams_that_take_turns_write_what_they_write_alone(make_model: MakeModel, tokenizer: PreTrainedTokenizerFast):
    model = sharp(make_model)
    other = token_ids([7, 8, 9])
    alone = []
    for prompt in (PROMPT, other):
        stream = stream_of(model, tokenizer, prompt, eos_ids=frozenset(), max_new_tokens=10, seed=3)
        assert len(list(stream)) == 10
        alone.append(stream.ids)
    both = [stream_of(model, tokenizer, prompt, eos_ids=frozenset(), max_new_tokens=10, seed=3) for prompt in (PROMPT, other)]
    for _ in zip(*both, strict=True):
        pass
    assert [stream.ids for stream in both] == alone


def test_gradients_and_random_numbers_are_left_alone(make_model: MakeModel, tokenizer: PreTrainedTokenizerFast):
    model = sharp(make_model)
    before = torch.random.get_rng_state()
    for _ in stream_of(model, tokenizer):
        assert torch.is_grad_enabled()  # between tokens others may run
    assert torch.equal(torch.random.get_rng_state(), before)
    assert all(parameter.grad is None for parameter in model.parameters())


def test_refuses_what_cannot_work(make_model: MakeModel, tokenizer: PreTrainedTokenizerFast):
    model = make_model("llama")
    with pytest.raises(ModelError, match="end-of-turn token 5000 is not among"):
        stream_of(model, tokenizer, eos_ids={5000})
    with pytest.raises(ValueError, match="15 tokens and the model reads 15: no room"):
        stream_of(model, tokenizer, context=15)
    with pytest.raises(ValueError, match="at least one token"):
        stream_of(model, tokenizer, token_ids([]))
    with pytest.raises(ValueError, match="0 or more"):
        stream_of(model, tokenizer, temperature=-1.0)
