"""Text to trees: the prefix, the ends of turns, masks, and what happens to what is too long."""

import pytest
from tests.data.conftest import CHATML, byte_bpe, word_level
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from prefopt.data.encode import Encoder, ids_of
from prefopt.data.examples import Answer, Example, Message
from prefopt.data.pieces import Piece
from prefopt.data.rows import RowFault
from prefopt.data.template import TRANSCRIPT, Rendered, chat_of
from prefopt.data.tokenize import Grower, TreeOptions
from prefopt.errors import DataError
from prefopt.trees import PromptTree

WORDS = word_level(["q", "a", "b", "c", "d", "e", "f", "g", "h", "system", "user", "assistant", "s"])
WORD_CHATML = (
    "{% for message in messages %}<|im_start|> {{ message.role }} {{ message.content }} <|im_end|> {% endfor %}"
    "{% if add_generation_prompt %}<|im_start|> assistant {% endif %}"
)


def turns(*texts: str) -> tuple[Message, ...]:
    """Messages from `role: content` texts."""
    names = {"s": "system", "u": "user", "a": "assistant"}
    return tuple(Message(names[text[0]], text[2:].strip()) for text in texts)


def chat_pair(prompt, chosen, rejected) -> Example:
    return Example(prompt, (Answer(chosen, rank=0), Answer(rejected, rank=1)), location="rows:1")


def grow(tokenizer, example, *, template=None, args=None, score="completion", text_as="raw", max_length=1000, too_long="cut"):
    chat = chat_of(tokenizer, template, args or {}) if example.is_chat or text_as == "chat" else None
    (grown,) = Grower(tokenizer, chat, TreeOptions(score, text_as, max_length, too_long)).grow([example])
    return grown


def texts(tokenizer, tree: PromptTree) -> list[str]:
    """Prompt and completions, decoded."""
    return [
        tokenizer.decode(ids.tolist(), clean_up_tokenization_spaces=False)
        for ids in (tree.prompt_ids, *(one.ids for one in tree.completions))
    ]


# Ends of turns and the prefix.


def test_raw_text_joins_prompt_and_answer_and_ends_with_eos(tokenizer):
    tree = grow(tokenizer, Example("The capital", (Answer(" of France", rank=0), Answer(" of Spain<eos>", rank=1)))).tree
    assert texts(tokenizer, tree) == ["The capital", " of France<eos>", " of Spain<eos>"]
    joint = tokenizer("The capital of France", add_special_tokens=False)["input_ids"]
    assert [*tree.prompt_ids, *tree.completions[0].ids[:-1]] == joint
    assert [one.ids.tolist().count(tokenizer.eos_token_id) for one in tree.completions] == [1, 1]


def test_chatml_ends_with_its_token_and_loses_the_newline_behind_it(chatml):
    grown = grow(chatml, chat_pair(turns("s: be good", "u: red"), turns("a: blue"), turns("a: green")))
    assert texts(chatml, grown.tree) == [
        "<|im_start|>system\nbe good<|im_end|>\n<|im_start|>user\nred<|im_end|>\n<|im_start|>assistant\n",
        "blue<|im_end|>",
        "green<|im_end|>",
    ]
    assert (grown.merges, grown.rewritten, grown.cut) == (0, 0, False)
    assert grown.tree.row_id == "rows:1"
    assert [one.rank for one in grown.tree.completions] == [0, 1]


HEADERS = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content | trim }}<|im_end|>\n{% endfor %}"
OPENING = "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
CLOSING = "{% if add_generation_prompt %}<|im_start|>assistant\n{% else %}{{ eos_token }}{% endif %}"
INSTRUCTION = (
    "{% for m in messages %}{{ '[INST] ' + m.content + ' [/INST]' if m.role == 'user' else ' ' + m.content + eos_token }}{% endfor %}"
)
OPENED = "<|im_start|>user\nred<|im_end|>\n<|im_start|>assistant\n"
FAMILIES = {
    "headers": ("{{ bos_token }}" + HEADERS + OPENING, "<bos>" + OPENED, "blue<|im_end|>"),
    "instruction": ("{{ bos_token }}" + INSTRUCTION, "<bos>[INST] red [/INST]", " blue<eos>"),
    "another name": ((HEADERS + OPENING).replace("m.role", "'user' if m.role == 'user' else 'assistant'"), OPENED, "blue<|im_end|>"),
    "closed": (HEADERS + CLOSING, OPENED, "blue<|im_end|>"),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_families_of_templates(tokenizer, family):
    template, prompt, answer = FAMILIES[family]
    grown = grow(tokenizer, chat_pair(turns("u: red"), turns("a: blue"), turns("a: green")), template=template)
    assert texts(tokenizer, grown.tree) == [prompt, answer, answer.replace("blue", "green")]
    assert grown.rewritten == 0


def test_exact_ids_of_a_word_level_chat():
    id_of = WORDS.convert_tokens_to_ids
    tree = grow(WORDS, chat_pair(turns("u: q"), turns("a: a b"), turns("a: c")), template=WORD_CHATML).tree
    assert tree.prompt_ids.tolist() == id_of(["<|im_start|>", "user", "q", "<|im_end|>", "<|im_start|>", "assistant"])
    assert [one.ids.tolist() for one in tree.completions] == [id_of(["a", "b", "<|im_end|>"]), id_of(["c", "<|im_end|>"])]


def test_the_default_template_is_a_transcript_and_ends_with_eos(tokenizer):
    chat = chat_of(tokenizer, None, {})
    assert (chat.text, chat.origin, chat.end_of_turn) == (TRANSCRIPT, "default", "<eos>")
    tree = grow(tokenizer, chat_pair(turns("s: rules", "u: q", "a: x", "u: r"), turns("a: yes"), turns("a: no"))).tree
    assert texts(tokenizer, tree) == [
        "\n\nSystem: rules\n\nHuman: q\n\nAssistant: x<eos>\n\nHuman: r\n\nAssistant:",
        " yes<eos>",
        " no<eos>",
    ]


def test_a_template_without_an_end_gets_eos(tokenizer):
    template = "{% for message in messages %}[{{ message.role }}] {{ message.content }}\n{% endfor %}"
    template += "{% if add_generation_prompt %}[assistant]{% endif %}"
    tree = grow(tokenizer, chat_pair(turns("u: q"), turns("a: yes"), turns("a: no")), template=template).tree
    assert texts(tokenizer, tree) == ["[user] q\n[assistant]", " yes<eos>", " no<eos>"]
    conversation = Example(turns("u: q", "a: x", "u: r"), (Answer(turns("a: yes")),))
    tree = grow(tokenizer, conversation, template=template, score="assistant").tree
    assert texts(tokenizer, tree) == ["[user] q\n[assistant]", " x<eos>\n[user] r\n[assistant] yes<eos>"]


def test_two_end_tokens_of_a_template_become_one(tokenizer):
    template = CHATML.replace("<|im_end|>\\n'", "<|im_end|>\\n<eos>'")
    tree = grow(tokenizer, chat_pair(turns("u: q"), turns("a: yes"), turns("a: no")), template=template).tree
    assert texts(tokenizer, tree)[1:] == ["yes<|im_end|>", "no<|im_end|>"]


@pytest.mark.parametrize("template", [None, CHATML, "{{ bos_token }}" + CHATML])
def test_bos_comes_once_or_as_the_template_says(bos_tokenizer, template):
    tree = grow(bos_tokenizer, chat_pair(turns("u: q"), turns("a: yes"), turns("a: no")), template=template).tree
    assert tree.prompt_ids.tolist().count(bos_tokenizer.bos_token_id) == (0 if template == CHATML else 1)


def test_bos_before_raw_text_comes_once(bos_tokenizer):
    for prompt in ("red", "<bos>red"):
        tree = grow(bos_tokenizer, Example(prompt, (Answer(" blue"),))).tree
        assert texts(bos_tokenizer, tree) == ["<bos>red", " blue<eos>"]


def test_plain_text_hangs_on_bos_or_eos(tokenizer):
    tree = grow(tokenizer, Example("", (Answer("red blue"),))).tree
    assert texts(tokenizer, tree) == ["<bos>", "red blue<eos>"]
    without_bos = byte_bpe()
    without_bos.bos_token = None
    assert texts(tokenizer, grow(without_bos, Example("", (Answer("red blue"),))).tree) == ["<eos>", "red blue<eos>"]


def test_raw_text_as_chat(chatml):
    tree = grow(chatml, Example("red?", (Answer("blue", rank=0), Answer("green", rank=1))), text_as="chat").tree
    assert texts(chatml, tree) == ["<|im_start|>user\nred?<|im_end|>\n<|im_start|>assistant\n", "blue<|im_end|>", "green<|im_end|>"]


def merging_tokenizer() -> PreTrainedTokenizerFast:
    """Merges `a` and `b` into one token wherever they meet."""
    vocabulary = {token: index for index, token in enumerate(["<eos>", "a", "b", "c", "ab", " "])}
    backend = Tokenizer(models.BPE(vocabulary, [("a", "b")]))
    backend.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<eos>")


def test_a_boundary_that_merges_is_tokenised_apart_and_counted():
    tokenizer = merging_tokenizer()
    assert tokenizer("ca" + "bc")["input_ids"] == [3, 4, 3]
    grown = grow(tokenizer, Example("ca", (Answer("bc", rank=0), Answer("cc", rank=1))))
    assert grown.tree.prompt_ids.tolist() == [3, 1]
    assert [one.ids.tolist() for one in grown.tree.completions] == [[2, 3, 0], [3, 3, 0]]
    assert grown.merges == 1


def test_a_long_prompt_sees_the_same_merge_through_the_window():
    grown = grow(merging_tokenizer(), Example("c " * 200 + "ca", (Answer("bc", rank=0), Answer("cc", rank=1))))
    assert [one.ids.tolist() for one in grown.tree.completions] == [[2, 3, 0], [3, 3, 0]]
    assert grown.merges == 1


@pytest.mark.parametrize("words", ["red blue " * 40, "abcdefgh" * 60, "   \n\n  " * 30, "1234567890" * 30, "好坏" * 100])
def test_the_window_sees_what_the_whole_text_sees(tokenizer, words):
    prompts = [words, words + "Human: q\n\nAssistant:", words[:-3] + " x"]
    rendered = [
        Rendered(prompt, False, ((Piece(answer, ends_turn=True),),))
        for prompt in prompts
        for answer in (" good", "good", "\n\nred", "ab", "12")
    ]
    seen = Encoder(tokenizer, "<eos>", ())
    seen.num_untried = 0
    whole = Encoder(tokenizer, "<eos>", ())
    whole.window_size = None
    assert [ids_of(entry) for entry in seen.encode(rendered)] == [ids_of(entry) for entry in whole.encode(rendered)]


class Slow:
    """As much of a tokenizer as is used: an id per letter, no offsets, no backend. With `far`, `y` depends on an `x` anywhere before."""

    eos_token, bos_token, eos_token_id, bos_token_id, chat_template = "</s>", None, 0, None, None
    all_special_tokens = ("</s>",)

    def __init__(self, far: bool = False) -> None:
        self.far = far

    def __call__(self, text, add_special_tokens=True, **options):
        if not isinstance(text, str):
            return {"input_ids": [self(one)["input_ids"] for one in text]}
        return {"input_ids": [999 if self.far and letter == "y" and "x" in text else ord(letter) for letter in text]}

    def convert_tokens_to_ids(self, token):
        return 0


def test_the_window_is_given_up_where_it_sees_something_else():
    far = [Rendered("x" + "k" * 200, False, ((Piece("y", ends_turn=True),),))]
    near = Encoder(Slow(), "</s>", ())
    assert near.encode(far)[0].branches[0].ids.tolist() == [ord("y"), 0]
    assert near.window_size is not None
    encoder = Encoder(Slow(far=True), "</s>", ())
    assert encoder.encode(far)[0].branches[0].ids.tolist() == [999, 0]
    assert encoder.window_size is None


def test_sentencepiece_like_prefix_spaces_keep_the_prefix():
    vocabulary = {token: index for index, token in enumerate(["<eos>", "▁", "a", "b", "▁a", "▁b"])}
    backend = Tokenizer(models.BPE(vocabulary, [("▁", "a"), ("▁", "b")]))
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<eos>")
    tree = grow(tokenizer, Example("a b " * 50 + "a", (Answer(" b"),))).tree
    joint = tokenizer("a b " * 50 + "a b", add_special_tokens=False)["input_ids"]
    assert [*tree.prompt_ids, *tree.completions[0].ids[:-1]] == joint


def test_slow_tokenizers_work():
    tree = grow(Slow(), Example("ab", (Answer("cd", rank=0), Answer("e", rank=1)))).tree
    assert tree.prompt_ids.tolist() == [97, 98]
    assert [one.ids.tolist() for one in tree.completions] == [[99, 100, 0], [101, 0]]


def test_a_template_that_opens_answers_otherwise_is_counted_and_safe(chatml):
    template = CHATML.replace("assistant\\n' }}{% endif %}", "assistant\\n<think>\\n' }}{% endif %}")
    grown = grow(chatml, chat_pair(turns("u: q"), turns("a: yes"), turns("a: no")), template=template)
    assert texts(chatml, grown.tree) == ["<|im_start|>user\nq<|im_end|>\n<|im_start|>assistant\n<think>\n", "yes<|im_end|>", "no<|im_end|>"]
    assert grown.rewritten == 2
    several = Example(turns("u: q", "a: x", "u: r"), (Answer(turns("a: yes")),))
    assert grow(chatml, several, template=template, score="assistant").tree.reason == "template_refused"


def test_a_template_that_strips_earlier_thoughts_is_fine(chatml):
    template = CHATML.replace("message.content +", "(message.content if loop.last else message.content.split('</think>')[-1]) +")
    conversation = Example(turns("u: q", "a: <think>hm</think>x", "u: r"), (Answer(turns("a: <think>oh</think>yes")),))
    grown = grow(chatml, conversation, template=template)
    assert grown.rewritten == 0
    assert texts(chatml, grown.tree)[1] == "<think>oh</think>yes<|im_end|>"
    assert "hm" not in texts(chatml, grown.tree)[0]


# Masks.


def test_every_assistant_turn_is_scored_with_its_end():
    conversation = Example(turns("s: s", "u: q", "a: a b", "u: c"), (Answer(turns("a: d")),))
    tree = grow(WORDS, conversation, template=WORD_CHATML, score="assistant").tree
    assert texts(WORDS, tree) == [
        "<|im_start|> system s <|im_end|> <|im_start|> user q <|im_end|> <|im_start|> assistant",
        "a b <|im_end|> <|im_start|> user c <|im_end|> <|im_start|> assistant d <|im_end|>",
    ]
    assert tree.completions[0].scored.tolist() == [True] * 3 + [False] * 6 + [True] * 2
    last_only = grow(WORDS, conversation, template=WORD_CHATML).tree
    assert texts(WORDS, last_only)[1] == "d <|im_end|>"
    assert last_only.completions[0].scored is None


def test_a_pair_of_several_turns_scores_the_assistant_only():
    tree = grow(WORDS, chat_pair(turns("u: q"), turns("a: a", "u: b", "a: c"), turns("a: d")), template=WORD_CHATML).tree
    assert texts(WORDS, tree)[1:] == ["a <|im_end|> <|im_start|> user b <|im_end|> <|im_start|> assistant c <|im_end|>", "d <|im_end|>"]
    assert tree.completions[0].scored.tolist() == [True] * 2 + [False] * 6 + [True] * 2
    assert tree.completions[1].scored is None


# Bad rows that only the tokenizer can see.


def test_control_tokens_in_a_turn_are_refused(chatml):
    for text in ("u: stop<|im_end|>", "u: <|im_start|>system"):
        fault = grow(chatml, chat_pair(turns(text), turns("a: yes"), turns("a: no"))).tree
        assert fault.reason == "control_token"


def test_a_template_that_refuses_is_a_bad_row(chatml):
    strict = "{% if messages[0].role == 'system' %}{{ raise_exception('no system turns') }}{% endif %}" + CHATML
    fault = grow(chatml, chat_pair(turns("s: x", "u: q"), turns("a: yes"), turns("a: no")), template=strict).tree
    assert (fault.reason, fault.detail) == ("template_refused", "the chat template says: no system turns")


def test_answers_without_tokens_or_with_the_same_tokens_are_refused():
    assert grow(WORDS, chat_pair(turns("u: q"), turns("a: x"), turns("a: y")), template=WORD_CHATML).tree.reason == "same_answers"
    assert grow(merging_tokenizer(), Example("c", (Answer("zzz"),))).tree.reason == "blank_answer"


@pytest.mark.parametrize(
    ("template", "says"),
    [
        ("nowhere.jinja", "neither a Jinja template nor a file"),
        ("{% for %}", "cannot render a question and an answer"),
        ("{{ raise_exception('never') }}", "never"),
        ("{{ messages[0].content }}", "leaves the answer out"),
    ],
)
def test_templates_that_cannot_be_used(tokenizer, template, says):
    with pytest.raises(DataError, match=says):
        chat_of(tokenizer, template, {})


def test_template_from_a_file_and_with_arguments(tokenizer, tmp_path):
    path = tmp_path / "chat.jinja"
    path.write_text("{{ mood }}" + CHATML)
    chat = chat_of(tokenizer, str(path), {"mood": "calm "})
    assert chat.render(turns("u: q"), generate=True).startswith("calm <|im_start|>user\nq")
    assert chat.origin == "settings"


def test_a_tokenizer_without_an_end_is_refused():
    endless = merging_tokenizer()
    endless.eos_token = None
    for example in (Example("a", (Answer("b"),)), chat_pair(turns("u: a"), turns("a: b"), turns("a: c"))):
        with pytest.raises(DataError, match="no end-of-sequence token"):
            grow(endless, example)


# Too long.


def test_whole_turns_are_cut_from_the_left_and_the_system_turn_stays():
    example = chat_pair(turns("s: s", "u: a", "a: b", "u: c", "a: d", "u: e"), turns("a: f g"), turns("a: h"))
    whole = grow(WORDS, example, template=WORD_CHATML)
    assert (whole.tree.longest, whole.cut) == (4 * 6 + 2 + 3, False)
    for limit, expected in ((28, "c d e"), (20, "e"), (13, "e")):
        grown = grow(WORDS, example, template=WORD_CHATML, max_length=limit)
        prompt = texts(WORDS, grown.tree)[0]
        assert grown.cut
        assert [word for word in prompt.split() if word in set("abcdefgh")] == expected.split()
        assert prompt.startswith("<|im_start|> system s <|im_end|> <|im_start|> user")
        assert texts(WORDS, grown.tree)[1:] == ["f g <|im_end|>", "h <|im_end|>"]
        assert grown.tree.longest <= limit
    assert grow(WORDS, example, template=WORD_CHATML, max_length=12).tree.reason == "last_turn_too_long"
    assert grow(WORDS, example, template=WORD_CHATML, max_length=28, too_long="drop").tree.reason == "too_long"


def test_an_answer_is_never_cut():
    example = chat_pair(turns("u: q"), turns("a: " + "a " * 20), turns("a: b"))
    fault = grow(WORDS, example, template=WORD_CHATML, max_length=21).tree
    assert (fault.reason, fault.detail) == ("answer_too_long", "the answer alone takes 21 tokens, and max_length is 21")


def test_raw_text_loses_its_first_tokens_but_not_bos(bos_tokenizer):
    example = Example("red blue green long short", (Answer(" yes", rank=0), Answer(" no", rank=1)))
    whole = grow(bos_tokenizer, example).tree
    grown = grow(bos_tokenizer, example, max_length=whole.longest - 2)
    assert grown.cut
    assert grown.tree.prompt_ids.tolist() == [bos_tokenizer.bos_token_id, *whole.prompt_ids[3:].tolist()]
    assert texts(bos_tokenizer, grown.tree)[1:] == [" yes<eos>", " no<eos>"]
    assert grow(bos_tokenizer, Example("red", (Answer(" yes no" * 20),)), max_length=12).tree.reason == "answer_too_long"


def test_a_learned_conversation_loses_its_first_exchanges():
    example = Example(turns("u: a", "a: b", "u: c", "a: d", "u: e"), (Answer(turns("a: f")),))
    grown = grow(WORDS, example, template=WORD_CHATML, score="assistant", max_length=15)
    assert grown.cut
    assert texts(WORDS, grown.tree) == ["<|im_start|> user e <|im_end|> <|im_start|> assistant", "f <|im_end|>"]
    longer = grow(WORDS, example, template=WORD_CHATML, score="assistant", max_length=16).tree
    assert texts(WORDS, longer) == [
        "<|im_start|> user c <|im_end|> <|im_start|> assistant",
        "d <|im_end|> <|im_start|> user e <|im_end|> <|im_start|> assistant f <|im_end|>",
    ]


def test_reference_columns_forbid_a_cut():
    example = Example("q " * 30, (Answer("a", rank=0, reference_logp=-1.0), Answer("b", rank=1, reference_logp=-2.0)))
    fault = grow(WORDS, example, max_length=10).tree
    assert isinstance(fault, RowFault)
    assert fault.reason == "too_long"
    assert [one.reference_logp for one in grow(WORDS, example).tree.completions] == [-1.0, -2.0]
