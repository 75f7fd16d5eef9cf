"""A chat: who remembers what, what commands do, and what Ctrl-C does; never a traceback."""

import fcntl
import os
import re
import select
import signal
import struct
import subprocess
import sys
import termios
import threading
import time
from collections.abc import Callable, Sequence
from io import BytesIO, TextIOWrapper
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from prefopt.config import check
from prefopt.data.examples import Message
from prefopt.pipeline.answer_settings import ChatSettings
from prefopt.pipeline.chat import COMMANDS, Chat, chat, read_prompt, stop_at_interrupt
from prefopt.pipeline.voices import open_voices
from prefopt.rollout.stream import Stream


class Recorder:
    """A screen that keeps what it was given."""

    def __init__(self, at: Callable[[], None] = lambda: None) -> None:
        self.said: list[str] = []
        self.answers: list[dict[str, str]] = []
        self.notes: list[dict[str, str]] = []
        self.prompts: list[dict[str, list[int]]] = []
        self.at = at

    def say(self, line: str) -> None:
        self.said.append(line)

    def show(self, streams: Sequence[tuple[str, Stream]], note: Callable[[Stream], str], stopped: Callable[[], bool]) -> None:
        for _, stream in streams:
            for _ in stream:
                self.at()
                if stopped():
                    break
        self.answers.append({name: stream.text for name, stream in streams})
        self.notes.append({name: note(stream) for name, stream in streams})
        self.prompts.append({name: stream._prompt.tolist() for name, stream in streams})


def talk(model: Path, screen: Recorder, **settings: Any) -> Chat:
    small = {"max_new_tokens": 6, "precision": "float32", "device": "cpu"}
    given = check(ChatSettings, {"model": str(model)} | small | settings)
    return Chat(open_voices(given), given, screen)


def typed(*lines: str | type[BaseException]) -> Callable[[str], str]:
    """Gives the lines one by one, raises those that are exceptions, and then ends."""
    left = iter(lines)

    def read(mark: str) -> str:
        line = next(left, EOFError)
        if isinstance(line, str):
            return line
        raise line

    return read


def test_each_model_remembers_its_own_side(chat_run: Path):
    screen = Recorder()
    conversation = talk(chat_run, screen)
    conversation.go_on(typed("Is number 1 good?", "And number 2?"))
    tokenizer = AutoTokenizer.from_pretrained(chat_run / "model")
    first, second = screen.answers
    assert first["policy"] != first["reference"]
    for place, role in enumerate(("policy", "reference")):
        turns = [
            {"role": "user", "content": "Is number 1 good?"},
            {"role": "assistant", "content": first[role]},
            {"role": "user", "content": "And number 2?"},
        ]
        expected = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
        assert screen.prompts[1][role] == tokenizer(expected, add_special_tokens=False)["input_ids"]
        assert conversation.remembered[place] == (*(Message(**turn) for turn in turns), Message("assistant", second[role]))


def test_the_reference_stands_first_and_is_the_model_before(chat_run: Path, model_folder: Any):
    screen = Recorder()
    talk(chat_run, screen).go_on(typed("Is number 1 good?"))
    assert list(screen.answers[0]) == ["reference", "policy"]
    alone = Recorder()
    talk(model_folder(), alone).go_on(typed("Is number 1 good?"))
    assert alone.answers[0] == {"policy": screen.answers[0]["reference"]}


def test_raw_text_starts_anew_each_time(lora_run: Path):
    screen = Recorder()
    conversation = talk(lora_run, screen)
    conversation.go_on(typed("Is number 1 good?", "Is number 1 good?"))
    assert screen.prompts[0] == screen.prompts[1]
    tokenizer = AutoTokenizer.from_pretrained(lora_run / "model")
    assert tokenizer.decode(screen.prompts[0]["policy"]) == "Is number 1 good?"
    assert screen.answers[0] != screen.answers[1]  # other draws
    again = Recorder()
    talk(lora_run, again).go_on(typed("Is number 1 good?", "Is number 1 good?"))
    assert again.answers == screen.answers  # and the same ones another day


def test_commands(chat_run: Path):
    screen = Recorder()
    conversation = talk(chat_run, screen)
    conversation.go_on(typed("/again", "one", "/again", "", "/reset", "two", "/help", "/nothing", "//slash", "/quit", "never"))
    assert screen.said[0] == "Nothing was asked yet."
    assert len(screen.answers) == 4
    assert screen.prompts[0] == screen.prompts[1]  # asked again, not gone on
    assert screen.answers[0] != screen.answers[1]
    tokenizer = AutoTokenizer.from_pretrained(chat_run / "model")
    assert "one" not in tokenizer.decode(screen.prompts[2]["policy"])
    assert tokenizer.decode(screen.prompts[3]["policy"]).endswith("<turn>user\n/slash<end>\n<turn>assistant\n")
    assert "The conversation starts anew." in screen.said
    assert "/nothing is no command. Text that begins with a slash is typed with two." in screen.said
    assert all(sum(line.strip().startswith(name) for line in screen.said) >= 2 for name in COMMANDS)


def test_lines_that_end_in_a_backslash_go_on():
    assert read_prompt(typed("one\\", "two\\", "three")) == "one\ntwo\nthree"
    assert read_prompt(typed("one\\")) == "one"
    with pytest.raises(EOFError):
        read_prompt(typed())


def test_what_cannot_be_asked_is_said_and_forgotten(chat_run: Path):
    screen = Recorder()
    conversation = talk(chat_run, screen)
    conversation.go_on(typed("one", "bad <end> token", "long " * 600, "two"))
    assert len(screen.answers) == 2
    assert any(line.startswith("The reference cannot be asked that: a turn of the user holds <end>") for line in screen.said)
    assert any("its last turn alone takes" in line for line in screen.said)
    assert [message.content for message in conversation.remembered[0] if message.role == "user"] == ["one", "two"]


def test_old_turns_make_room_and_that_is_said(chat_run: Path):
    screen = Recorder()
    conversation = talk(chat_run, screen, max_new_tokens=200)
    conversation.go_on(typed("good " * 150, "good " * 150, "last"))
    assert any(line.startswith("The policy reads 512 tokens, so the first 2 messages no longer count") for line in screen.said)
    assert all(len(ids) <= 512 - 128 for prompts in screen.prompts[1:] for ids in prompts.values())
    assert len(conversation.remembered[0]) == 6  # remembered all the same, for a template may write less


def test_notes_say_why_an_answer_is_over(chat_run: Path, lora_run: Path):
    screen = Recorder()
    conversation = talk(chat_run, screen, max_new_tokens=2)
    conversation.go_on(typed("one"))
    assert "(cut at 2 tokens; --max-new-tokens allows more)" in screen.notes[0].values()
    long = Recorder()
    talk(lora_run, long, max_new_tokens=600, reference="none").go_on(typed("good " * 600))
    assert long.notes[0]["policy"] in ("(the longest text that the model can read ends here)", "(an empty answer)")
    assert any("tokens of the prompt no longer count" in line for line in long.said)


# Ctrl-C.


def press() -> None:
    signal.raise_signal(signal.SIGINT)


def test_ctrl_c_stops_the_answer_and_not_the_chat(lora_run: Path):
    pressed: list[int] = []

    def once() -> None:
        if not pressed:
            pressed.append(1)
            press()

    screen = Recorder(at=once)
    before = signal.getsignal(signal.SIGINT)
    conversation = talk(lora_run, screen, max_new_tokens=50)
    conversation.go_on(typed("one", "two"))
    assert screen.notes[0] == {"reference": "(stopped)", "policy": "(stopped)"}
    assert screen.notes[1] != screen.notes[0]
    assert len(screen.answers) == 2
    assert signal.getsignal(signal.SIGINT) is before


def test_ctrl_c_twice_while_answering_leaves(lora_run: Path):
    def twice() -> None:
        press()
        press()

    screen = Recorder(at=twice)
    talk(lora_run, screen, max_new_tokens=50).go_on(typed("one", "two"))
    assert screen.answers == []


def test_ctrl_c_twice_in_a_row_leaves_and_typing_in_between_does_not(lora_run: Path):
    screen = Recorder()
    talk(lora_run, screen).go_on(typed(KeyboardInterrupt, "one", KeyboardInterrupt, KeyboardInterrupt, "never"))
    assert len(screen.answers) == 1
    assert screen.said.count("\nCtrl-C once more leaves, and so does Ctrl-D.") == 2


def test_ctrl_c_while_answering_and_then_at_the_prompt_leaves(lora_run: Path):
    pressed: list[int] = []
    screen = Recorder(at=lambda: None if pressed else (pressed.append(1), press())[0])
    talk(lora_run, screen, max_new_tokens=50).go_on(typed("one", KeyboardInterrupt, "never"))
    assert len(screen.answers) == 1


def test_outside_of_the_main_thread_signals_are_left_alone():
    found: list[Any] = []

    def inside() -> None:
        with stop_at_interrupt() as stop:
            found.append((stop.asked, signal.getsignal(signal.SIGINT)))

    before = signal.getsignal(signal.SIGINT)
    thread = threading.Thread(target=inside)
    thread.start()
    thread.join()
    assert found == [(False, before)]


# Pipes.


def test_through_a_pipe(chat_run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    monkeypatch.setattr("sys.stdin", TextIOWrapper(BytesIO("Is number 1 good?\n\xe9\r\n".encode() + b"\xff bad bytes\n/quit\nnever\n")))
    chat(check(ChatSettings, {"model": str(chat_run), "max_new_tokens": 4, "precision": "float32", "device": "cpu"}))
    out, err = capsys.readouterr()
    assert "policy:    " in out
    assert "without the adapter, in the same memory" in out
    assert "each model remembers its own answers" in out
    parts = out.split("\n> ")
    assert len(parts) == 5
    assert parts[1].startswith("Is number 1 good?\nreference: ")
    assert "\npolicy: " in parts[1]
    assert parts[2].startswith("é\nreference: ")
    assert parts[3].startswith("\ufffd bad bytes\n")
    assert parts[4].startswith("/quit")
    assert "Traceback" not in err


class Typist:
    """Types into a real process on a pseudo-terminal, and keeps what stands on it."""

    def __init__(self, command: list[str], width: int) -> None:
        self.terminal, inside = os.openpty()
        fcntl.ioctl(inside, termios.TIOCSWINSZ, struct.pack("HHHH", 40, width, 0, 0))
        environment = {name: value for name, value in os.environ.items() if name not in ("COLUMNS", "LINES")} | {"TERM": "xterm"}
        self.process = subprocess.Popen(command, stdin=inside, stdout=inside, stderr=inside, env=environment)
        os.close(inside)
        self.seen = ""
        self.place = 0

    def wait_for(self, pattern: str, seconds: float = 200) -> None:
        """Until it appears behind what was waited for before."""
        end = time.monotonic() + seconds
        while (found := re.compile(pattern).search(self.seen, self.place)) is None:
            assert time.monotonic() < end, f"{pattern!r} did not come; the terminal shows:\n{self.seen}"
            if select.select([self.terminal], [], [], 0.2)[0]:
                self.seen += os.read(self.terminal, 65536).decode(errors="replace")
        self.place = found.end()

    def type(self, text: str) -> None:
        os.write(self.terminal, text.encode())


@pytest.mark.parametrize("width", [60, 140])
def test_on_a_terminal(lora_run: Path, width: int):
    typist = Typist([sys.executable, "-m", "prefopt", "chat", str(lora_run), "--max-new-tokens", "400", "--precision", "float32"], width)
    try:
        typist.wait_for(r"Ctrl-D\s+leaves\.")
        typist.wait_for("> ")
        typist.type("Is number 1 good?\r")
        typist.wait_for("reference[^\n]*policy" if width >= 100 else "reference")
        typist.process.send_signal(signal.SIGINT)
        typist.wait_for(r"\((stopped|not begun)\)")
        typist.wait_for("> ")
        typist.type("/help\r")
        typist.wait_for("/reset")
        typist.wait_for("> ")
        typist.type("\x04")
        assert typist.process.wait(60) == 0
        assert "Traceback" not in typist.seen
        side_by_side = any("reference" in line and "policy" in line for line in typist.seen.split("\n")[6:])
        assert side_by_side == (width >= 100)
    finally:
        typist.process.kill()
        typist.process.wait()
        os.close(typist.terminal)


def test_a_real_process_answers_and_ends_with_its_input(lora_run: Path):
    command = [sys.executable, "-m", "prefopt", "chat", str(lora_run), "--max-new-tokens", "4", "--precision", "float32"]
    ended = subprocess.run(command, input=b"Is number 1 good?\n", capture_output=True, check=False, env=os.environ)
    assert ended.returncode == 0, ended.stderr.decode()
    out = ended.stdout.decode()
    assert out.count("reference: ") == 2  # who answers, and the answer
    assert "each prompt starts anew" in out
    assert ended.stderr.decode() == ""
