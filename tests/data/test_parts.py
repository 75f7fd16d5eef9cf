"""Parts of an answer that are learned, and parts that are not: from the row to the mask of its tokens."""

import copy
import json
import pickle

import numpy as np
import pytest
from tests.data.conftest import CHATML, byte_bpe, word_level
from tests.data.turns import gpt, user
from tokenizers import normalizers

from prefopt.data.dataset import load
from prefopt.data.examples import Answer, Example, Fields, Message
from prefopt.data.formats import FORMATS
from prefopt.data.marks import Marked
from prefopt.data.recognise import recognise
from prefopt.data.rows import Row, RowFault
from prefopt.data.show import decode, show_completion, show_tree
from prefopt.data.template import chat_of
from prefopt.data.tokenize import Grower, TreeOptions
from prefopt.errors import DataError

WORDS = word_level(["q", "r", "a", "b", "c", "d", "user", "assistant"])
WORD_CHATML = (
    "{% for message in messages %}<|im_start|> {{ message.role }} {{ message.content }} <|im_end|> {% endfor %}"
    "{% if add_generation_prompt %}<|im_start|> assistant {% endif %}"
)


def part(text, mark=None, key="train"):
    return {"type": "text", "text": text} | ({} if mark is None else {key: mark})


def masked(text):
    return part(text, False)


@pytest.fixture
def tree(write, settings):
    """tree(row, tokenizer, kind): the only tree of a file of that row."""

    def make(row, tokenizer, kind="demonstration", **given):
        (made,) = load([str(write("a.jsonl", [row]))], settings(**given), tokenizer, kind=kind).trees
        return made

    return make


def words(completion, tokenizer=WORDS):
    """Each token's text, in brackets where it does not count."""
    mask = np.ones(len(completion.ids), np.bool_) if completion.scored is None else completion.scored
    texts = tokenizer.convert_ids_to_tokens(completion.ids.tolist())
    return " ".join(text if own else f"[{text}]" for text, own in zip(texts, mask, strict=True))


THOUGHT = [masked("a b "), part("c")]


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        (gpt(THOUGHT), "[a] [b] c <|im_end|>"),
        (gpt([part("a "), masked("b "), part("c")]), "a [b] c <|im_end|>"),
        (gpt([part("a "), "b ", masked("c")]), "a b [c] <|im_end|>"),
        (gpt([part("a ", 0, "weight"), part("b ", 1.0, "loss_weight"), part("c ", True), part("d")]), "[a] b c d <|im_end|>"),
        (gpt([part("a ", True), part("b")]), "a b <|im_end|>"),
        (gpt([part("a ", True), part("b")], train=False), "a [b] <|im_end|>"),
        (gpt([masked("a "), part("b")], weight=1), "[a] b <|im_end|>"),
    ],
)
def test_masks_of_a_chat(tree, answer, expected):
    made = tree({"messages": [user("q"), answer]}, WORDS, chat_template=WORD_CHATML)
    assert words(made.completions[0]) == expected


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        (THOUGHT, "[a] [b] c <eos>"),
        ([part("a "), masked("b")], "a [b] <eos>"),
        ([{"text": "a "}, {"text": "b"}], "a b <eos>"),
        ("a b", "a b <eos>"),
    ],
)
def test_masks_of_raw_text(tree, answer, expected):
    made = tree({"prompt": "q ", "completion": answer}, WORDS)
    assert words(made.completions[0]) == expected
    assert WORDS.decode(made.prompt_ids) == "q"
    as_chat = tree({"prompt": "q", "completion": answer}, WORDS, text_as="chat", chat_template=WORD_CHATML)
    assert words(as_chat.completions[0]) == expected.replace("<eos>", "<|im_end|>")


def test_an_end_that_the_text_brings_is_one_end(tree):
    made = tree({"prompt": "q ", "completion": [part("a "), masked("b <eos> <eos>")]}, WORDS)
    assert words(made.completions[0]) == "a [b] <eos>"


PARTS = [part("a ", False), part("b")]


@pytest.mark.parametrize(
    ("kind", "name", "row", "expected"),
    [
        ("pair", "text_pair", {"prompt": "q ", "chosen": PARTS, "rejected": "c"}, ["[a] b", "c"]),
        ("pair", "instruction_pair", {"instruction": "q", "chosen": PARTS, "rejected": "c"}, ["[a] b", "c"]),
        ("pair", "chat_pair", {"prompt": [user("q")], "chosen": PARTS, "rejected": [gpt("c")]}, ["[a] b", "c"]),
        ("pair", "comparison", {"prompt": "q ", "answer_a": "c", "answer_b": PARTS, "winner": "b"}, ["[a] b", "c"]),
        (
            "pair",
            "sharegpt_pair",
            {
                "conversations": [{"from": "human", "value": "q"}],
                "chosen": {"from": "gpt", "value": PARTS},
                "rejected": {"from": "gpt", "value": "c"},
            },
            ["[a] b", "c"],
        ),
        ("ranked", "ranked_completions", {"prompt": "q ", "completions": ["c", PARTS], "ranks": [2, 1]}, ["[a] b", "c"]),
        ("thumbs", "text_label", {"prompt": "q ", "completion": PARTS, "label": True}, ["[a] b"]),
        ("thumbs", "instruction_label", {"instruction": "q", "output": PARTS, "label": 1}, ["[a] b"]),
        ("demonstration", "instruction", {"instruction": "q", "output": PARTS}, ["[a] b"]),
        ("demonstration", "chat_completion", {"prompt": [user("q")], "completion": PARTS}, ["[a] b"]),
        ("demonstration", "text", {"text": PARTS}, ["[a] b"]),
        ("demonstration", "text_pair", {"prompt": "q ", "chosen": PARTS, "rejected": "c"}, ["[a] b"]),
    ],
)
def test_parts_stand_wherever_the_text_of_an_answer_does(tree, kind, name, row, expected):
    assert recognise("rows", [Row("rows:1", row)], kind).format.name == name
    made = tree(row, WORDS, kind, chat_template=WORD_CHATML)
    assert [words(one).rpartition(" ")[0] for one in made.completions] == expected


@pytest.mark.parametrize(
    ("labels", "prompt", "expected"),
    [
        ((False, True, False), "q r", "a b [c] [d] <eos>"),
        ((True, False, True), "<bos>", "q r [a] [b] c d <eos>"),
        ((False, False, True), "q r a b", "c d <eos>"),
    ],
)
def test_segments_begin_with_the_prompt(tree, labels, prompt, expected):
    row = {"segments": [{"label": label, "text": text} for label, text in zip(labels, ("q r ", "a b ", "c d <eos>"), strict=True)]}
    made = tree(row, WORDS)
    assert (WORDS.decode(made.prompt_ids), words(made.completions[0])) == (prompt, expected)


# Turns.


def test_parts_follow_score_where_they_say_nothing(tree):
    turns = [user("q"), gpt([masked("a "), part("b")]), user("r"), gpt([part("c "), masked("d")])]
    header = "[<|im_start|>] [user] [r] [<|im_end|>] [<|im_start|>] [assistant]"
    last = tree({"messages": turns}, WORDS, chat_template=WORD_CHATML)
    assert words(last.completions[0]) == "c [d] <|im_end|>"
    every = tree({"messages": turns}, WORDS, chat_template=WORD_CHATML, score="assistant")
    assert words(every.completions[0]) == f"[a] b <|im_end|> {header} c [d] <|im_end|>"
    turns[1] = gpt([part("a ", True), part("b")])  # of an earlier turn this part alone says that it is learned
    last = tree({"messages": turns}, WORDS, chat_template=WORD_CHATML)
    assert words(last.completions[0]) == f"a [b] <|im_end|> {header} c [d] <|im_end|>"
    turns[3] = gpt([masked("c "), masked("d")])
    last = tree({"messages": turns}, WORDS, chat_template=WORD_CHATML)
    assert words(last.completions[0]) == f"a [b] <|im_end|> {header} [c] [d] [<|im_end|>]"


def test_marks_on_parts_of_others_change_nothing(tree):
    row = {"messages": [{"role": "system", "content": [part("r", "no")]}, user([masked("q")]), gpt("a b")]}
    made = tree(row, WORDS, chat_template=WORD_CHATML, score="assistant")
    assert words(made.completions[0]) == "a b <|im_end|>"


def test_a_cut_leaves_something_to_learn(tree):
    turns = [user("q"), gpt("a", weight=0), user("q"), gpt("b", weight=1), user("r"), gpt([masked("c")])]
    made = tree({"messages": turns}, WORDS, chat_template=WORD_CHATML, max_length=16)
    assert decode(made.prompt_ids, WORDS) == "<|im_start|> user q <|im_end|> <|im_start|> assistant"
    assert words(made.completions[0]).startswith("b <|im_end|> [<|im_start|>]")
    with pytest.raises(DataError, match="answer_too_long 1"):
        tree({"messages": turns}, WORDS, chat_template=WORD_CHATML, max_length=9, on_bad_row="drop")


# Templates and tokenizers.

TRIMMED = CHATML.replace("message.content", "(message.content | trim)")
NO_END = (
    "{% for message in messages %}[{{ message.role }}] {{ message.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)
THINKS = CHATML.replace(
    "message.content", "('<think>\\n\\n</think>\\n\\n' if message.role == 'assistant' and loop.last else '') + message.content"
)


@pytest.mark.parametrize(
    ("template", "parts", "shown"),
    [
        (CHATML, [masked("I think."), part(" Red")], "⟦I think.⟧ Red<|im_end|>"),
        (TRIMMED, [masked("\n I think."), part(" Red \n")], "⟦I think.⟧ Red<|im_end|>"),
        (TRIMMED, [masked(" \n"), part(" Red "), masked("\n")], "Red<|im_end|>"),
        (CHATML.replace("message.content", "message.content.lstrip()"), [masked("\n I"), part(" Red ")], "⟦I⟧ Red <|im_end|>"),
        (CHATML.replace("message.content", "message.content.rstrip()"), [part(" I"), masked(" Red\n ")], " I⟦ Red⟧<|im_end|>"),
        (None, [masked("I think."), part(" Red")], "⟦ I think.⟧ Red<eos>"),
        (None, [part("Red"), masked(" I think.")], " Red⟦ I think.⟧<eos>"),
        (NO_END, [masked("I think."), part(" Red")], "⟦ I think.⟧ Red<eos>"),
        (THINKS, [masked("I think."), part(" Red")], "<think>\n\n</think>\n\n⟦I think.⟧ Red<|im_end|>"),
    ],
)
def test_parts_are_found_in_what_the_template_writes(tree, tokenizer, template, parts, shown):
    made = tree({"messages": [user("What?"), gpt(parts)]}, tokenizer, chat_template=template)
    assert show_completion(made.completions[0], tokenizer) == shown


def test_what_a_template_writes_beside_the_content_is_as_the_turn(tree, tokenizer):
    row = {"messages": [user("What?"), gpt([masked("I think."), part(" Red", True)], train=False)]}
    made = tree(row, tokenizer, chat_template=THINKS)
    assert show_completion(made.completions[0], tokenizer) == "⟦<think>\n\n</think>\n\nI think.⟧ Red<|im_end|>"


def test_parts_of_an_answer_that_is_set_behind_its_prompt(tree, tokenizer):
    opens_otherwise = CHATML.replace("assistant\\n' }}{% endif %}", "assistant\\n<think>\\n' }}{% endif %}")
    made = tree({"messages": [user("What?"), gpt([masked("I think."), part(" Red")])]}, tokenizer, chat_template=opens_otherwise)
    assert show_completion(made.completions[0], tokenizer) == "⟦I think.⟧ Red<|im_end|>"


@pytest.mark.parametrize(
    ("template", "says"),
    [
        (CHATML.replace("message.content", "message.content.replace('think', 'guess')"), "changes the content"),
        (CHATML.replace("message.content", "message.content + '|' + message.content"), "repeats the content"),
    ],
)
def test_a_template_that_changes_marked_content_refuses(tree, tokenizer, template, says):
    with pytest.raises(DataError, match=rf"a\.jsonl:1: template_refused: the chat template {says}"):
        tree({"messages": [user("What?"), gpt([masked("I think."), part(" Red")])]}, tokenizer, chat_template=template)


def test_a_part_begins_a_token_and_what_it_would_merge_with_is_counted(write, settings, tokenizer):
    def ids_of(text):
        return tokenizer(text, add_special_tokens=False)["input_ids"]

    answers = ([masked(" cap"), part("ital")], [masked(" red"), part(" capital")])
    rows = [{"prompt": "What?", "completion": answer} for answer in answers]
    made = load([str(write("a.jsonl", rows))], settings(), tokenizer, kind="demonstration")
    split, kept = (tree.completions[0] for tree in made.trees)
    assert len(ids_of(" capital")) == 1
    assert split.ids.tolist() == [*ids_of(" cap"), *ids_of("ital"), tokenizer.eos_token_id]
    assert split.scored.tolist() == [False] * len(ids_of(" cap")) + [True] * (len(ids_of("ital")) + 1)
    assert kept.ids.tolist() == [*ids_of(" red capital"), tokenizer.eos_token_id]
    assert kept.scored.tolist() == [False] * len(ids_of(" red")) + [True, True]
    assert made.summary.num_merges == 1


@pytest.mark.parametrize("is_chat", [True, False])
def test_words_and_whole_texts_give_the_same_masks(is_chat):
    tokenizer = byte_bpe()
    chat = chat_of(tokenizer, CHATML, {}) if is_chat else None
    options = TreeOptions("completion", "raw", 200, "cut")
    examples = []
    for number in range(450):
        words = Marked([("Let me think", False), (f" {number} good", None), (" or bad", number % 2 == 0), (".", True)])
        text = words if number % 3 else str(words)
        prompt = f"red blue {number}?"
        answer = Answer((Message("assistant", text),) if is_chat else f" {text}" if text is not words else text, label=True)
        examples.append(Example((Message("user", prompt),) if is_chat else prompt, (answer,)))
    quick = Grower(tokenizer, chat, options)
    trees = [grown.tree for grown in quick.grow(examples)]
    encoder = quick.chat_encoder if is_chat else quick.raw_encoder
    assert encoder.words is not None
    slow = Grower(tokenizer, chat, options)
    for example, tree in zip(examples, trees, strict=True):
        [grown] = slow.grow([example])
        one, other = tree.completions[0], grown.tree.completions[0]
        assert one.ids.tolist() == other.ids.tolist()
        assert (one.scored is None) == (other.scored is None) == (not isinstance(answer_text(example), Marked))
        if one.scored is not None:
            assert one.scored.tolist() == other.scored.tolist()
            learned = decode(one.ids[one.scored], tokenizer)
            number = int(learned.split()[0])
            assert learned.startswith(f" {number} good{' or bad.' if number % 2 == 0 else '.'}<")
    assert slow.chat_encoder.words is slow.raw_encoder.words is None


def answer_text(example):
    content = example.answers[0].content
    return content if isinstance(content, str) else content[0].content


# What is the same, and what is at fault.


def test_marks_are_no_difference():
    marked = Marked([("a", False), ("b", None)])
    assert marked == "ab"
    assert hash(marked) == hash("ab")
    assert Message("assistant", marked) == Message("assistant", "ab")
    for again in (copy.deepcopy(marked), pickle.loads(pickle.dumps(marked)), copy.copy(marked)):
        assert (again, again.parts) == ("ab", marked.parts)
    assert json.dumps(marked) == '"ab"'


def test_prompts_that_differ_in_marks_alone_are_one_prompt(tree):
    turns = [user("q"), gpt(PARTS), user("r")]
    plain = [user("q"), gpt("a b"), user("r")]
    made = tree({"chosen": [*turns, gpt("c")], "rejected": [*plain, gpt("d")]}, WORDS, "pair", chat_template=WORD_CHATML)
    assert [words(one) for one in made.completions] == ["c <|im_end|>", "d <|im_end|>"]


ALL_MASKED = [masked("a "), masked("b")]


@pytest.mark.parametrize(
    ("kind", "row", "reason", "says"),
    [
        ("demonstration", {"messages": [user("q"), gpt([part("a", 2)])]}, "bad_number", "`messages.content` has a part whose `train` is 2"),
        ("demonstration", {"messages": [user("q"), gpt([part("a", "no")])]}, "bad_number", "must be 0 or 1"),
        ("demonstration", {"prompt": "q", "completion": [part("a", -1, "weight")]}, "bad_number", "`completion` has a part whose `weight`"),
        ("pair", {"prompt": "q", "chosen": "b", "rejected": [part("a", [], "loss_weight")]}, "bad_number", "`rejected` has a part"),
        ("demonstration", {"messages": [user("q"), gpt(ALL_MASKED)]}, "nothing_to_learn", "all its parts"),
        ("demonstration", {"prompt": "q", "completion": ALL_MASKED}, "nothing_to_learn", "all its parts"),
        ("demonstration", {"prompt": "q", "completion": [masked("a"), part(" \n")]}, "nothing_to_learn", "all its parts"),
        ("demonstration", {"messages": [user("q"), gpt([masked("a"), part(" \n")])]}, "nothing_to_learn", "all its parts"),
        ("demonstration", {"messages": [user("q"), gpt([part("a")], train=False)]}, "nothing_to_learn", "it is not to be learned"),
        ("pair", {"prompt": "q", "chosen": "c", "rejected": ALL_MASKED}, "nothing_to_learn", "all its parts"),
        ("pair", {"prompt": [user("q")], "chosen": [gpt(ALL_MASKED)], "rejected": [gpt("c")]}, "nothing_to_learn", "all its parts"),
        ("thumbs", {"messages": [user("q"), gpt(ALL_MASKED)], "label": True}, "nothing_to_learn", "all its parts"),
        ("ranked", {"prompt": "q", "completions": ["c", ALL_MASKED], "ranks": [1, 2]}, "nothing_to_learn", "all its parts"),
        ("demonstration", {"prompt": "q", "completion": [masked(" "), part("\n")]}, "blank_answer", "`completion` is blank"),
        ("pair", {"prompt": "q", "chosen": PARTS, "rejected": "a b"}, "same_answers", "are the same"),
        ("pair", {"prompt": "q", "chosen": [gpt(PARTS)], "rejected": [gpt("a b")]}, "same_answers", "are the same"),
        ("pair", {"prompt": "q", "chosen": PARTS, "rejected": [{"text": 3}]}, "wrong_type", "`rejected` is a number"),
        ("pair", {"prompt": "q", "chosen": PARTS, "rejected": [{"text": "a", "type": "image"}]}, "needs_text_only", "image"),
        ("demonstration", {"segments": [{"text": "q", "label": 0}, {"text": "a", "label": 0}]}, "nothing_to_learn", "no segment"),
        ("demonstration", {"segments": [{"text": "q", "label": 0}, {"text": "a"}]}, "missing_field", "without `label`"),
        ("demonstration", {"segments": [{"text": "q", "label": "x"}]}, "bad_number", "a segment whose `label` is x"),
        ("demonstration", {"segments": [{"text": "q", "label": 0}, {"text": " ", "label": 1}]}, "blank_answer", "`segments` is blank"),
    ],
)
def test_a_row_at_fault_is_named_with_its_reason(write, settings, chatml, kind, row, reason, says):
    with pytest.raises(DataError) as caught:
        load([str(write("a.jsonl", [row]))], settings(), chatml, kind=kind)
    assert f"a.jsonl:1: {reason}: " in str(caught.value)
    assert says in str(caught.value)


def test_segments_that_are_none_are_told():
    entry = next(entry for entry in FORMATS if entry.name == "segments")
    for value in ("q", [], [3], [{"label": True}], None):
        with pytest.raises(RowFault) as caught:
            entry.read(Fields({"segments": value}), "demonstration")
        assert caught.value.reason == "wrong_type"


def test_a_learned_part_without_tokens_leaves_nothing_to_learn(write, settings):
    tokenizer = word_level(["q", "a"])
    tokenizer.backend_tokenizer.normalizer = normalizers.Replace("~", "")
    row = {"prompt": "q ", "completion": [masked("a "), part("~")]}
    with pytest.raises(DataError, match=r"a\.jsonl:1: nothing_to_learn: the tokenizer has no token"):
        load([str(write("a.jsonl", [row]))], settings(), tokenizer, kind="demonstration")


def test_masks_come_back_from_the_cache_and_marks_make_it_another_entry(write, settings, chatml):
    def read(mark):
        row = {"prompt": [user("What?")], "chosen": [gpt([part("I think.", mark), part(" Red")])], "rejected": [gpt("Blue")]}
        return load([str(write("a.jsonl", [row]))], settings(), chatml, kind="pair")

    first, again, other = read(False), read(False), read(True)
    assert (first.summary.from_cache, again.summary.from_cache, other.summary.from_cache) == (False, True, False)
    assert again.trees[0].completions[0].scored.tolist() == first.trees[0].completions[0].scored.tolist()
    assert not all(first.trees[0].completions[0].scored)
    assert other.trees[0].completions[0].scored is None
    assert "⟦I think.⟧ Red" in show_tree(again.trees[0], chatml)
    assert first.fingerprint == again.fingerprint != other.fingerprint
