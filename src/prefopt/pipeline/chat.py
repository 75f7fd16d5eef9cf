"""A conversation with a policy and its reference: both are asked the same, each remembers what it answered itself."""

import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from types import FrameType

from rich.console import Console

from prefopt.data.examples import Conversation, Message
from prefopt.data.prompts import Content
from prefopt.data.rows import RowFault
from prefopt.pipeline.answer_settings import ChatSettings
from prefopt.pipeline.screen import LiveScreen, PlainScreen, Screen
from prefopt.pipeline.voices import Voice, Voices, explaining_out_of_memory, open_voices
from prefopt.rollout.stream import Stream

COMMANDS = {
    "/again": "answer the last prompt once more, with other draws",
    "/reset": "forget the conversation",
    "/help": "this list",
    "/quit": "leave; so do Ctrl-D, and Ctrl-C twice",
}
LEAVE = ("/quit", "/exit")

Reader = Callable[[str], str]
"""Gives what is typed after a prompt such as `> `; raises EOFError at the end, KeyboardInterrupt at Ctrl-C."""


@dataclass(slots=True)
class Stop:
    """Whether answers are to be broken off."""

    asked: bool = False


@dataclass(slots=True)
class Chat:
    """A conversation.

    Attributes:
        voices: who answers.
        settings: how.
        screen: where answers appear.
        remembered: each voice's own conversation, in the order of `voices.all`.
        asked: the last prompt, for `/again`; None: nothing was asked since the beginning or `/reset`.
        num_answered: how many times there was an answer; each has draws of its own.
    """

    voices: Voices
    settings: ChatSettings
    screen: Screen
    remembered: list[Conversation] = field(default_factory=list)
    asked: str | None = None
    num_answered: int = 0

    def __post_init__(self) -> None:
        self.reset()

    @property
    def has_turns(self) -> bool:
        """Whether what was said before counts: with a chat template it does, raw text starts anew each time."""
        return self.voices.text_as == "chat"

    def reset(self) -> None:
        """Forget what was said."""
        self.remembered = [() for _ in self.voices.all]
        self.asked = None

    def go_on(self, read: Reader) -> None:
        """Read and answer until the end of input, `/quit`, or Ctrl-C twice."""
        interrupted = 0
        while interrupted < 2:
            try:
                typed = read_prompt(read)
            except EOFError:
                return
            except KeyboardInterrupt:
                interrupted += 1
                if interrupted < 2:
                    self.screen.say("\nCtrl-C once more leaves, and so does Ctrl-D.")
                continue
            if typed.strip() in LEAVE:
                return
            with stop_at_interrupt() as stop:
                try:
                    self.take(typed, stop)
                except KeyboardInterrupt:  # the second one, while a token was on its way
                    return
            interrupted = int(stop.asked)

    def take(self, typed: str, stop: Stop) -> None:
        """What was typed: a command, or a prompt to answer."""
        word = typed.strip()
        if not word:
            return
        if word == "/again":
            if self.asked is None:
                self.screen.say("Nothing was asked yet.")
            else:
                self.remembered = [turns[:-2] for turns in self.remembered]
                self.answer(self.asked, stop)
        elif word == "/reset":
            self.reset()
            self.screen.say("The conversation starts anew.")
        elif word == "/help" or (word.startswith("/") and not word.startswith("//")):
            if word != "/help":
                self.screen.say(f"{word} is no command. Text that begins with a slash is typed with two.")
            for name, does in COMMANDS.items():
                self.screen.say(f"  {name:<8}{does}")
            self.screen.say("  A line that ends in \\ goes on in the next.")
        else:
            self.answer(typed.replace("//", "/", 1) if typed.startswith("//") else typed, stop)

    def answer(self, prompt: str, stop: Stop) -> None:
        """Ask everyone, show what they say, and remember it."""
        order = list(reversed(range(len(self.voices.all))))  # the reference first: what there was before
        asked: dict[int, Conversation] = {}
        streams: dict[int, Stream] = {}
        for place in order:
            voice = self.voices.all[place]
            asked[place] = (*self.remembered[place], Message("user", prompt)) if self.has_turns else ()
            try:
                streams[place] = self.open_stream(voice, asked[place] or prompt)
            except RowFault as fault:
                self.screen.say(f"The {voice.role} cannot be asked that: {fault.detail}.")
                return
        self.screen.show([(self.voices.all[place].role, streams[place]) for place in order], self.note, lambda: stop.asked)
        self.asked = prompt
        self.num_answered += 1
        if self.has_turns:
            self.remembered = [(*asked[place], Message("assistant", streams[place].text)) for place in range(len(self.voices.all))]

    def open_stream(self, voice: Voice, content: Content) -> Stream:
        """An answer of one voice, not begun yet.

        Raises:
            RowFault: it cannot be asked like that.
        """
        # Earlier turns give way to the answer, up to a quarter of the context; the last turn does not.
        reserve = 1 if voice.speaker.context is None else max(1, min(self.settings.max_new_tokens, voice.speaker.context // 4))
        try:
            fitted = voice.fit(content, reserve=reserve if self.has_turns else 1)
        except RowFault as fault:
            if fault.reason != "last_turn_too_long":
                raise
            fitted = voice.fit(content)
        if fitted.num_cut:
            what = f"the first {fitted.num_cut} messages" if self.has_turns else f"the first {fitted.num_cut} tokens of the prompt"
            self.screen.say(f"The {voice.role} reads {voice.speaker.context} tokens, so {what} no longer count.")
        return voice.stream(
            fitted.ids,
            max_new_tokens=self.settings.max_new_tokens,
            temperature=self.settings.temperature,
            seed=self.settings.seed + self.num_answered,
        )

    def note(self, stream: Stream) -> str:
        """What to say below an answer."""
        if stream.stopped == "limit":
            return f"(cut at {self.settings.max_new_tokens} tokens; --max-new-tokens allows more)"
        if stream.stopped == "context":
            return "(the longest text that the model can read ends here" + ("; /reset starts anew)" if self.has_turns else ")")
        if stream.stopped is None:
            return "(stopped)" if stream.ids else "(not begun)"
        return "" if stream.text.strip() else "(an empty answer)"


@explaining_out_of_memory("Lower max_new_tokens, or leave the reference out with --reference none.")
def chat(settings: ChatSettings) -> None:
    """Talk, on the terminal or through pipes.

    Raises:
        PrefoptError: who answers cannot be loaded, or the settings do not fit together.
    """
    voices = open_voices(settings)
    console = Console(highlight=False, emoji=False)
    screen: Screen = LiveScreen(console) if console.is_terminal else PlainScreen(sys.stdout)
    for line in voices.lines():
        screen.say(line)
    has_turns = voices.text_as == "chat"
    screen.say("each model remembers its own answers" if has_turns else "each prompt starts anew")
    typed = sys.stdin is not None and sys.stdin.isatty()
    if typed:
        screen.say("Type a prompt. /help lists commands; Ctrl-C stops an answer, Ctrl-D leaves.\n")
    talk = Chat(voices, settings, screen)
    talk.go_on(keyboard if typed else echoing(screen))


def keyboard(mark: str) -> str:
    """What is typed on a terminal, with the arrow keys and earlier lines that `readline` gives."""
    with suppress(ImportError):
        import readline  # noqa: F401 (input() uses it once it is imported; it is not there on every system)
    try:
        return input(mark).encode(errors="replace").decode()
    except EOFError:
        print()  # the shell's prompt goes on a line of its own
        raise
    except UnicodeDecodeError:  # bytes that are no text in this terminal's encoding
        return ""


def echoing(screen: Screen) -> Reader:
    """Lines of a pipe, shown as if they had been typed."""

    def read(mark: str) -> str:
        line = sys.stdin.buffer.readline().decode(errors="replace") if sys.stdin is not None else ""
        if not line:
            raise EOFError
        screen.say(mark + line.rstrip("\r\n"))
        return line.rstrip("\r\n")

    return read


def read_prompt(read: Reader) -> str:
    """A prompt of one line, or of several where lines end in a backslash."""
    lines = [read("> ")]
    while lines[-1].endswith("\\"):
        lines[-1] = lines[-1][:-1]
        try:
            lines.append(read(". "))
        except EOFError:
            break
    return "\n".join(lines)


@contextmanager
def stop_at_interrupt() -> Iterator[Stop]:
    """Ctrl-C asks to stop, a second one interrupts at once; outside of the main thread Ctrl-C is not ours to take."""
    stop = Stop()

    def handle(number: int, frame: FrameType | None) -> None:
        if stop.asked:
            raise KeyboardInterrupt
        stop.asked = True

    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    before = signal.signal(signal.SIGINT, handle)
    try:
        yield stop
    finally:
        signal.signal(signal.SIGINT, before)
