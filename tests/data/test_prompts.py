"""Prompts: the same tokens as in training, from any file that can be trained on, and from files without answers."""

import gzip
import json
from io import BytesIO, TextIOWrapper
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from prefopt.data.dataset import load
from prefopt.data.examples import Message
from prefopt.data.prompts import Content, Prompt, Renderer, TextAs, read_prompts, refuse_faulty, refuse_unread
from prefopt.data.rows import Dropped, RowFault
from prefopt.data.settings import ConversationSettings, DataSettings
from prefopt.errors import ConfigError, DataError

USER, REPLY = Message("user", "Is tea hot?"), Message("assistant", "It is.")

TRAINING_ROWS: list[tuple[dict[str, Any], Content]] = [
    ({"prompt": "Is tea hot?", "chosen": " It is.", "rejected": " No."}, "Is tea hot?"),
    ({"prompt": "Is tea hot?", "completion": " It is."}, "Is tea hot?"),
    ({"chosen": "\n\nHuman: Is tea hot?\n\nAssistant: It is.", "rejected": "\n\nHuman: Is tea hot?\n\nAssistant: No."}, (USER,)),
    ({"messages": [USER.as_dict(), REPLY.as_dict()]}, (USER,)),
    ({"messages": [USER.as_dict(), REPLY.as_dict(), USER.as_dict(), REPLY.as_dict()]}, (USER, REPLY, USER)),
    ({"conversations": [{"from": "human", "value": "Is tea hot?"}, {"from": "gpt", "value": "It is."}]}, (USER,)),
    ({"instruction": "Is it hot?", "input": "tea", "output": "It is."}, (Message("user", "Is it hot?\n\ntea"),)),
    ({"prompt": [USER.as_dict()], "chosen": "It is.", "rejected": "No."}, (USER,)),
    (
        {"chosen": [USER.as_dict(), REPLY.as_dict()], "rejected": [USER.as_dict(), {"role": "assistant", "content": "No."}]},
        (USER,),
    ),
]

LONE_ROWS: list[tuple[dict[str, Any], Content]] = [
    ({"prompt": "Is tea hot?"}, "Is tea hot?"),
    ({"prompt": ""}, ""),
    ({"prompt": [USER.as_dict()]}, (USER,)),
    ({"messages": [USER.as_dict()]}, (USER,)),
    ({"messages": [USER.as_dict(), REPLY.as_dict(), USER.as_dict()]}, (USER, REPLY, USER)),
    ({"conversations": [{"from": "human", "value": "Is tea hot?"}], "system": "Be brief."}, (Message("system", "Be brief."), USER)),
    ({"instruction": "Is tea hot?"}, (USER,)),
    ({"text": "Tea is"}, "Tea is"),
    ({"prompt": "Is tea hot?", "chosen": "the same", "rejected": "the same"}, "Is tea hot?"),  # no pair, and still a prompt
    ({"prompt": "Is tea hot?", "chosen": " ", "rejected": " "}, "Is tea hot?"),
]


def written(folder: Path, rows: list[dict[str, Any]]) -> str:
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def stdin(monkeypatch: pytest.MonkeyPatch, content: bytes) -> None:
    monkeypatch.setattr("sys.stdin", TextIOWrapper(BytesIO(content)))


# Where they come from.


@pytest.mark.parametrize(("row", "content"), [*TRAINING_ROWS, *LONE_ROWS])
def test_rows_give_their_prompts(tmp_path: Path, row: dict[str, Any], content: Content):
    prompts, faulty = read_prompts(written(tmp_path, [row]), {})
    assert prompts == [Prompt(content, "rows.jsonl:1")]
    assert faulty == []


def test_other_column_names(tmp_path: Path):
    path = written(tmp_path, [{"question": "Is tea hot?", "answer": "It is."}])
    assert read_prompts(path, {"prompt": "question"})[0] == [Prompt("Is tea hot?", "rows.jsonl:1")]
    with pytest.raises(DataError, match=r"rows.jsonl:1: no prompt: the row has question, answer.*Perhaps: --columns prompt=question"):
        read_prompts(path, {})
    with pytest.raises(DataError, match=r"no row has a column qestion \(did you mean question\?\)"):
        read_prompts(path, {"prompt": "qestion"})


def test_text_files_hold_one_prompt_per_line(tmp_path: Path):
    path = tmp_path / "asked.txt"
    path.write_bytes("\ufeffIs tea hot?\r\n\n  and coffee \n".encode())
    expected = [Prompt("Is tea hot?", "asked.txt:1"), Prompt("  and coffee ", "asked.txt:3")]
    assert read_prompts(str(path), {}) == (expected, [])
    packed = tmp_path / "asked.txt.gz"
    packed.write_bytes(gzip.compress(path.read_bytes()))
    assert [prompt.content for prompt in read_prompts(str(packed), {})[0]] == ["Is tea hot?", "  and coffee "]


def test_tables_are_read_too(tmp_path: Path):
    path = tmp_path / "asked.csv"
    path.write_text('prompt,chosen,rejected\n"Is tea\nhot?",yes,no\n')
    assert read_prompts(str(path), {})[0] == [Prompt("Is tea\nhot?", "asked.csv:2")]


def test_standard_input_holds_lines_or_json_lines(monkeypatch: pytest.MonkeyPatch):
    stdin(monkeypatch, b"Is tea hot?\n\nAnd coffee?")
    assert [prompt.content for prompt in read_prompts("-", {})[0]] == ["Is tea hot?", "And coffee?"]
    stdin(monkeypatch, b'{"prompt": "Is tea hot?"}\n{"messages": [{"role": "user", "content": "And coffee?"}]}\n')
    assert [prompt.content for prompt in read_prompts("-", {})[0]] == ["Is tea hot?", (Message("user", "And coffee?"),)]
    stdin(monkeypatch, b"Is tea hot?\n\n\nAnd coffee?")
    assert [prompt.location for prompt in read_prompts("-", {})[0]] == ["stdin:1", "stdin:4"]
    stdin(monkeypatch, b'\n{"prompt": "Is tea hot?"}\n\n{"prompt": 3}\n')
    assert [row.location for row in read_prompts("-", {})[1]] == ["stdin:4"]
    stdin(monkeypatch, b" \n")
    with pytest.raises(DataError, match="standard input is empty"):
        read_prompts("-", {})


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("none.txt", None, r"none.txt does not exist"),
        ("blank.txt", b"\n \n", r"blank.txt holds no prompt: every line is blank. Write one prompt per line"),
        ("broken.txt", b"\xff\n", r"broken.txt holds no prompt: byte 1 is not UTF-8"),
        ("asked.jsonl", b'{"other": 1}\n', r"no row holds a prompt. The first, asked.jsonl:1: no prompt: the row has other"),
        ("asked.docx", b"x", r"files that end in .docx are not read"),
    ],
)
def test_what_cannot_be_read_is_said(tmp_path: Path, name: str, content: bytes | None, says: str):
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(DataError, match=says):
        read_prompts(str(path), {})


def test_rows_without_a_prompt_are_named_and_kept_apart(tmp_path: Path):
    prompts, faulty = read_prompts(written(tmp_path, [{"prompt": "a"}, {"other": 1}, {"prompt": 3}]), {})
    assert [prompt.content for prompt in prompts] == ["a"]
    assert [(entry.location, entry.reason) for entry in faulty] == [("rows.jsonl:2", "missing_field"), ("rows.jsonl:3", "wrong_type")]
    with pytest.raises(
        DataError, match=r"(?s)2 of 3 rows hold no prompt that can be asked:\n  rows.jsonl:2: missing_field.*--on-bad-row drop"
    ):
        refuse_faulty(faulty, 3)
    refuse_faulty([], 3)
    many = [Dropped(f"x:{number}", "no_prompt", "none", None) for number in range(30)]
    with pytest.raises(DataError, match="… and 10 more"):
        refuse_faulty(many, 30)


# What they become.


@pytest.mark.parametrize("text_as", ["raw", "chat"])
@pytest.mark.parametrize(("row", "content"), TRAINING_ROWS)
def test_tokens_are_those_of_training(
    tmp_path: Path, chat_tokenizer: PreTrainedTokenizerFast, row: dict[str, Any], content: Content, text_as: TextAs
):
    class Both(DataSettings, ConversationSettings):
        """As `prefopt data` has them."""

    settings = Both(data=["x"], text_as=text_as, cache_dir=tmp_path / "cache", data_workers=1)
    kind = "pair" if "rejected" in row else "demonstration"
    (tree,) = load([written(tmp_path, [row])], settings, chat_tokenizer, kind=kind).trees
    renderer = Renderer(chat_tokenizer, text_as=text_as, with_chats=True)
    assert renderer.fit(content, room=None).ids.tolist() == tree.prompt_ids.tolist()
    assert int(tree.completions[0].ids[-1]) in renderer.end_ids


def test_without_a_template_chats_are_transcripts_as_in_training(tokenizer: PreTrainedTokenizerFast):
    renderer = Renderer(tokenizer, text_as="chat")
    assert tokenizer.decode(renderer.fit("Is tea hot?", room=None).ids) == "\n\nHuman: Is tea hot?\n\nAssistant:"
    assert renderer.end_of_turn == tokenizer.eos_token


def test_an_empty_raw_prompt_begins_with_the_begin_token(chat_tokenizer: PreTrainedTokenizerFast):
    assert Renderer(chat_tokenizer, text_as="raw").fit("", room=None).ids.tolist() == [chat_tokenizer.bos_token_id]


def test_a_system_message_opens_chats_that_have_none(chat_tokenizer: PreTrainedTokenizerFast):
    renderer = Renderer(chat_tokenizer, text_as="chat", system="Be brief.")
    own = (Message("system", "Be long."), USER)
    assert renderer.shape("Is tea hot?") == (Message("system", "Be brief."), USER)
    assert renderer.shape((USER,)) == (Message("system", "Be brief."), USER)
    assert renderer.shape(own) == own


def test_settings_of_chats_need_a_chat():
    refuse_unread("chat", system="Be brief.", chat_template=None, template_args={})
    refuse_unread("raw", system=None, chat_template=None, template_args={})
    with pytest.raises(ConfigError, match=r"^system, chat_template: for chats, and these prompts are raw text"):
        refuse_unread("raw", system="Be brief.", chat_template="x", template_args={})


def test_what_is_too_long_loses_its_left_raw_text_by_tokens_and_chats_by_turns(chat_tokenizer: PreTrainedTokenizerFast):
    raw = Renderer(chat_tokenizer, text_as="raw")
    whole = raw.fit("one two three four five six", room=None)
    cut = raw.fit("one two three four five six", room=7)
    assert cut.ids.tolist() == whole.ids.tolist()[-7:]
    assert cut.num_cut == len(whole.ids) - 7
    chat = Renderer(chat_tokenizer, text_as="chat")
    system = Message("system", "Be brief.")
    turns = (system, USER, REPLY, Message("user", "And coffee?"), REPLY, Message("user", "And ice?"))
    last = (system, turns[-1])
    room = len(chat.fit(last, room=None).ids)
    fitted = chat.fit(turns, room=room)
    assert fitted.ids.tolist() == chat.fit(last, room=None).ids.tolist()
    assert fitted.num_cut == 4
    assert chat.fit(turns, room=None).num_cut == 0
    with pytest.raises(RowFault, match=f"its last turn alone takes {room} tokens, and there is room for {room - 1}"):
        chat.fit(turns, room=room - 1)


def test_control_tokens_are_refused_as_in_training(chat_tokenizer: PreTrainedTokenizerFast):
    with pytest.raises(RowFault, match="a turn of the user holds <end>, which the chat template uses"):
        Renderer(chat_tokenizer, text_as="chat").fit("Is it?<end>", room=None)


def test_prompts_for_people_and_for_files():
    assert Prompt((USER, REPLY, USER), "x").as_json() == [USER.as_dict(), REPLY.as_dict(), USER.as_dict()]
    assert Prompt("Is tea hot?", "x").as_json() == "Is tea hot?"


def test_prompts_with_tools_are_refused_rather_than_asked_without_them(tmp_path):
    rows = [{"messages": [{"role": "user", "content": "q"}], "tools": tools} for tools in ([{"name": "weather"}], [])]
    prompts, faulty = read_prompts(written(tmp_path, rows), {})
    assert [prompt.location for prompt in prompts] == ["rows.jsonl:2"]
    assert [(row.location, row.reason) for row in faulty] == [("rows.jsonl:1", "template_refused")]


def test_prompts_of_trees_rankings_and_thumbs_are_asked(tmp_path):
    tree = {
        "role": "prompter",
        "text": "q",
        "replies": [{"role": "assistant", "text": text, "rank": rank, "replies": []} for rank, text in enumerate("ab")],
    }
    rows = [{"prompt": "q", "completions": ["a", "b"], "ranks": [1, 1]}, {"prompt": tree}, {"prompt": "q", "completion": "", "label": True}]
    prompts, faulty = read_prompts(written(tmp_path, rows), {})
    assert [prompt.as_json() for prompt in prompts] == ["q", [{"role": "user", "content": "q"}], "q"]
    assert not faulty
