"""Policy and reference, each with the way in which its prompts are written: what `generate` and `chat` have in common."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from prefopt.data.prompts import Content, Fitted, Renderer, TextAs, refuse_unread
from prefopt.errors import ModelError, RunError
from prefopt.models.quantise import quantisation_of
from prefopt.models.speakers import Speaker, Weights, device_named, load_speakers
from prefopt.pipeline.answer_settings import AnswerSettings
from prefopt.pipeline.trained import Trained, look_up
from prefopt.report.files import read_json
from prefopt.rollout.sample import embeddings_of
from prefopt.rollout.stream import Stream
from prefopt.training.memory.out_of_memory import is_out_of_memory
from prefopt.trees import TokenIds

NOBODY = "none"
TEMPLATES = {"tokenizer": "the tokenizer's chat template", "settings": "the chat template given", "default": "a plain transcript"}


@dataclass(frozen=True, slots=True)
class Voice:
    """A speaker that knows how it is asked.

    Attributes:
        speaker: the model.
        renderer: makes its prompts; the policy's own where both read the same tokens.
    """

    speaker: Speaker
    renderer: Renderer

    @property
    def role(self) -> str:
        """`policy` or `reference`."""
        return self.speaker.role

    @property
    def end_ids(self) -> set[int]:
        """All tokens at which an answer ends: those that the model names, and the one that closed answers in training."""
        return self.speaker.end_ids | self.renderer.end_ids

    def fit(self, content: Content, *, reserve: int = 1) -> Fitted:
        """The prompt's tokens, cut so that the model has room for an answer.

        Args:
            content: the prompt.
            reserve: tokens of that room.

        Raises:
            RowFault: it cannot be asked like that.
        """
        context = self.speaker.context
        return self.renderer.fit(content, room=None if context is None else context - reserve)

    def rooms(self, prompts: Sequence[Fitted], max_new_tokens: int) -> list[int]:
        """Tokens that an answer to each prompt may have."""
        context = self.speaker.context
        return [max_new_tokens if context is None else min(max_new_tokens, context - len(prompt.ids)) for prompt in prompts]

    def stream(self, prompt: TokenIds, *, max_new_tokens: int, temperature: float, seed: int) -> Stream:
        """An answer, piece by piece."""
        return Stream(
            self.speaker.speaking,
            self.speaker.tokenizer,
            prompt,
            eos_ids=self.end_ids,
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            seed=seed,
            context=self.speaker.context,
        )

    def text(self, ids: TokenIds) -> str:
        """An answer's text, without control tokens."""
        return str(self.speaker.tokenizer.decode(ids.tolist(), skip_special_tokens=True, clean_up_tokenization_spaces=False))


@dataclass(frozen=True, slots=True)
class Voices:
    """Who answers.

    Attributes:
        all: the policy, and behind it the reference where there is one.
        text_as: how prompts that are plain text are read.
        because: why, in words.
        beta: β of the run, where it had one.
        same_tokens: both read the same tokens, so that the answers of one can be scored by the other.
        alone: nobody is wanted beside the policy.
    """

    all: tuple[Voice, ...]
    text_as: TextAs
    because: str
    beta: float | None
    same_tokens: bool
    alone: bool

    @property
    def policy(self) -> Voice:
        """The one that is always there."""
        return self.all[0]

    def lines(self) -> list[str]:
        """Who answers and how they are asked, in words."""
        lines = [f"{voice.role + ':':<10} {described(voice.speaker, self.policy.speaker)}" for voice in self.all]
        if len(self.all) == 1 and not self.alone:
            lines.append("reference: none is known; with --reference MODEL another answers beside it")
        chat = self.policy.renderer.chat
        template = "" if chat is None else TEMPLATES[chat.origin]
        if self.text_as == "chat":
            return [*lines, f"prompts: plain text is a question in {template}, {self.because}"]
        chats = f"; chats are written in {template}" if template else ""
        return [*lines, f"prompts: plain text is continued as it is, {self.because}{chats}"]


@contextmanager
def explaining_out_of_memory(advice: str) -> Iterator[None]:
    """Turns a failed allocation inside into a `RunError` that says what to lower."""
    try:
        yield
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        raise RunError(f"memory ran out. {advice}") from None


def open_voices(settings: AnswerSettings, *, with_chats: bool = False) -> Voices:
    """Load who answers.

    Args:
        settings: who, and how.
        with_chats: whether there are chats among the prompts.

    Raises:
        ModelError: a model cannot be found, read or put together.
        ConfigError: the settings do not fit together.
        DataError: the chat template cannot be used.
    """
    trained = look_up(settings.adapter or settings.model)
    check_has_model(settings.adapter or settings.model, trained)
    policy = Weights.of(settings.model, settings.adapter)
    speakers = load_speakers(
        policy,
        reference_for(settings, trained, policy),
        precision=settings.precision,
        device=device_named(settings.device),
        load_in_4bit=trained.in_4bit if settings.load_in_4bit is None else settings.load_in_4bit,
        trust_remote_code=settings.trust_remote_code,
    )
    text_as, because = trained.meant(settings.text_as, speakers[0].tokenizer)
    for_chats = {"system": settings.system, "chat_template": settings.chat_template, "template_args": settings.template_args}
    refuse_unread("chat" if with_chats else text_as, **for_chats)
    args = settings.template_args or trained.args_for(settings.chat_template)

    def renderer(speaker: Speaker) -> Renderer:
        return Renderer(
            speaker.tokenizer,
            text_as=text_as,
            with_chats=with_chats,
            chat_template=settings.chat_template,
            template_args=args,
            system=settings.system,
        )

    own = renderer(speakers[0])
    same = all(read_the_same(speakers[0], speaker) for speaker in speakers[1:])
    both_ways = same and all(read_the_same(speaker, speakers[0]) for speaker in speakers[1:])
    voices = tuple(Voice(speaker, own if same else renderer(speaker)) for speaker in speakers)
    return Voices(voices, text_as, because, trained.beta, both_ways, settings.reference == NOBODY)


def reference_for(settings: AnswerSettings, trained: Trained, policy: Weights) -> Weights | None:
    """Who answers beside the policy: as asked, or as the run had it.

    Raises:
        ModelError: it is not there.
    """
    if settings.reference == NOBODY:
        return None
    if settings.reference is not None:
        return Weights.of(settings.reference)
    try:
        return trained.reference(policy)
    except ModelError as error:
        raise ModelError(f"the reference of the run is not there: {error} Or give --reference, or --reference {NOBODY}.") from None


def check_has_model(name: str, trained: Trained) -> None:
    """Whether a run has come to a model.

    Raises:
        ModelError: it has not.
    """
    if trained.files is None or trained.files.model.is_dir():
        return
    status = read_json(trained.files.status) or {}
    state = f" (it is {status['state']})" if isinstance(status.get("state"), str) else ""
    raise ModelError(
        f"the run in {name} has not saved a model yet{state}: {trained.files.model} is written at its end. "
        f"Let it finish, or go on with it: prefopt train --config {trained.files.config} --resume"
    )


def read_the_same(one: Speaker, other: Speaker) -> bool:
    """Whether two models give each number the same meaning: what the one's prompts hold, the other can read."""
    mine, theirs = one.tokenizer.get_vocab(), other.tokenizer.get_vocab()
    rows = len(embeddings_of(other.model))
    return all(theirs.get(token, index) == index and index < rows for token, index in mine.items())


def described(speaker: Speaker, policy: Speaker) -> str:
    """A speaker in words."""
    weights = speaker.weights
    shared = "" if speaker is policy or speaker.model is not policy.model else ", in the same memory"
    if packed := quantisation_of(speaker.model):
        shared = f", in {packed}{shared}"
    if weights.adapter is not None:
        return f"{weights.adapter} on {weights.source}{shared}"
    off = " without the adapter" if speaker.switch is not None else ""
    return f"{weights.source}{off}{shared}"
