"""What each format makes of a row, and how a format is recognised."""

import pytest

from prefopt.data.examples import Answer, Example, Fields, Message
from prefopt.data.formats import FORMATS
from prefopt.data.recognise import check_mapping, recognise, rename
from prefopt.data.rows import Dropped, Row, RowFault
from prefopt.errors import DataError


def user(text: str) -> Message:
    return Message("user", text)


def gpt(text: str) -> Message:
    return Message("assistant", text)


def system(text: str) -> Message:
    return Message("system", text)


def pair(prompt, chosen, rejected, **more) -> Example:
    return Example(prompt, (Answer(chosen, rank=0), Answer(rejected, rank=1)), **more)


def demonstration(prompt, answer) -> Example:
    return Example(prompt, (Answer(answer),))


U, A = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}
B = {"role": "assistant", "content": "b"}

PAIRS = [
    ("text_pair", {"prompt": "q", "chosen": "a", "rejected": "b"}, pair("q", "a", "b")),
    ("chat_pair", {"prompt": [U], "chosen": [A], "rejected": [B]}, pair((user("q"),), (gpt("a"),), (gpt("b"),))),
    ("chat_pair", {"prompt": "q", "chosen": A, "rejected": [B]}, pair((user("q"),), (gpt("a"),), (gpt("b"),))),
    ("chat_pair", {"prompt": [U], "chosen": "a", "rejected": "b"}, pair((user("q"),), (gpt("a"),), (gpt("b"),))),
    ("chat_pair", {"prompt": "q", "chosen": [U, A], "rejected": [U, B]}, pair((user("q"),), (gpt("a"),), (gpt("b"),))),
    ("conversation_pair", {"chosen": [U, A], "rejected": [U, B]}, pair((user("q"),), (gpt("a"),), (gpt("b"),))),
    (
        "conversation_pair",
        {"chosen": [U, A, U, A], "rejected": [U, A, U, B]},
        pair((user("q"), gpt("a"), user("q")), (gpt("a"),), (gpt("b"),)),
    ),
    (
        "conversation_pair",
        {"chosen": [U, A, U, A], "rejected": [U, B]},
        pair((user("q"),), (gpt("a"), user("q"), gpt("a")), (gpt("b"),)),
    ),
    (
        "hh",
        {
            "chosen": "\n\nHuman: q\n\nmore\n\nAssistant: x\n\nHuman: r\n\nAssistant: a",
            "rejected": "\n\nHuman: q\n\nmore\n\nAssistant: x\n\nHuman: r\n\nAssistant:  b",
        },
        pair((user("q\n\nmore"), gpt("x"), user("r")), (gpt("a"),), (gpt(" b"),)),
    ),
    (
        "sharegpt_pair",
        {
            "conversations": [{"from": "system", "value": "s"}, {"from": "human", "value": "q"}],
            "chosen": {"from": "gpt", "value": "a"},
            "rejected": {"from": "gpt", "value": "b"},
        },
        pair((system("s"), user("q")), (gpt("a"),), (gpt("b"),)),
    ),
    (
        "sharegpt_pair",
        {"system": "s", "conversations": [{"from": "human", "value": "q"}], "chosen": "a", "rejected": "b"},
        pair((system("s"), user("q")), (gpt("a"),), (gpt("b"),)),
    ),
    (
        "instruction_pair",
        {"instruction": "do", "input": "it", "chosen": "a", "rejected": "b"},
        pair((user("do\n\nit"),), (gpt("a"),), (gpt("b"),)),
    ),
    ("instruction_pair", {"instruction": "do", "input": "", "chosen": "a", "rejected": "b"}, pair((user("do"),), (gpt("a"),), (gpt("b"),))),
    ("text_pair", {"prompt": "q", "chosen": "a", "rejected": "b", "weight": "0.5"}, pair("q", "a", "b", weight=0.5)),
]

DEMONSTRATIONS = [
    ("messages", {"messages": [U, A]}, demonstration((user("q"),), (gpt("a"),))),
    (
        "messages",
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "q"}, {"type": "text", "value": "?"}]}, A]},
        demonstration((user("q?"),), (gpt("a"),)),
    ),
    (
        "sharegpt",
        {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]},
        demonstration((user("q"),), (gpt("a"),)),
    ),
    ("text_completion", {"prompt": "q", "completion": "a"}, demonstration("q", "a")),
    ("chat_completion", {"prompt": [U], "completion": [A]}, demonstration((user("q"),), (gpt("a"),))),
    ("chat_completion", {"prompt": "q", "completion": A}, demonstration((user("q"),), (gpt("a"),))),
    (
        "instruction",
        {"instruction": "do", "input": "it", "output": "a", "system": "s"},
        demonstration((system("s"), user("do\n\nit")), (gpt("a"),)),
    ),
    ("text", {"text": "a"}, demonstration("", "a")),
    ("segments", {"segments": [{"text": "q", "label": False}, {"text": "a", "label": True}]}, demonstration("q", "a")),
]


TWO = {"completion_a": "a", "completion_b": "b"}


def best(prompt, *answers, reward=None) -> Example:
    rewards = reward or [None] * len(answers)
    return Example(prompt, tuple(Answer(answer, rank=rank, reward=rewards[rank]) for rank, answer in enumerate(answers)))


COMPARISONS = [
    ("comparison", {"prompt": "q", **TWO, "preference": "a"}, best("q", "a", "b")),
    ("comparison", {"prompt": "q", **TWO, "preference": "B"}, best("q", "b", "a")),
    ("comparison", {"prompt": "q", **TWO, "winner": "model_b"}, best("q", "b", "a")),
    ("comparison", {"prompt": "q", **TWO, "preference": "a-is-slightly-better"}, best("q", "a", "b", reward=[1, 0])),
    ("comparison", {"prompt": "q", **TWO, "preference": "b-is-better"}, best("q", "b", "a", reward=[2, 0])),
    ("comparison", {"prompt": "q", **TWO, "preference": "b_is_much_better"}, best("q", "b", "a", reward=[3, 0])),
    ("comparison", {"prompt": "q", **TWO, "preference": 2}, best("q", "b", "a")),
    ("comparison", {"prompt": "q", "response_0": "a", "response_1": "b", "better_response_id": 1}, best("q", "b", "a")),
    ("comparison", {"prompt": "q", "answer_1": "a", "answer_2": "b", "label": "1"}, best("q", "a", "b")),
    ("comparison", {"question": "q", "response1": "a", "response2": "b", "winner": "response2"}, best("q", "b", "a")),
    ("comparison", {"instruction": "do", "input": "it", **TWO, "choice": "a"}, best((user("do\n\nit"),), (gpt("a"),), (gpt("b"),))),
    ("comparison", {"prompt": [U], **TWO, "preference": "a"}, best((user("q"),), (gpt("a"),), (gpt("b"),))),
    ("comparison", {"prompt": "q", "response_a": [U, A], "response_b": B, "preference": "b"}, best((user("q"),), (gpt("b"),), (gpt("a"),))),
    (
        "comparison",
        {"prompt": "q", **TWO, "preference": "tie", "completion_a_is_acceptable": "yes", "completion_b_is_acceptable": "no"},
        Example("q", (Answer("a", rank=0, label=True), Answer("b", rank=0, label=False))),
    ),
    (
        "votes",
        {"instruction": "do", "response1": "a", "response2": "b", "annotator1": 1, "annotator2": 2, "annotator3": 2},
        best((user("do"),), (gpt("b"),), (gpt("a"),)),
    ),
    ("votes", {"prompt": "q", **TWO, "annotator1": "a", "annotator2": None}, best("q", "a", "b")),
    (
        "votes",
        {"prompt": "q", "response1": "a", "response2": "b", "annotator1": 1, "annotator2": 2},
        Example("q", (Answer("a", rank=0), Answer("b", rank=0))),
    ),
    ("arena", {"conversation_a": [U, A], "conversation_b": [U, B], "winner": "model_b"}, best((user("q"),), (gpt("b"),), (gpt("a"),))),
    (
        "arena",
        {"conversation_a": [U, A, U, A], "conversation_b": [U, B, U, B], "winner": "tie (bothbad)"},
        Example((user("q"),), (Answer((gpt("a"), user("q"), gpt("a")), rank=0), Answer((gpt("b"), user("q"), gpt("b")), rank=0))),
    ),
    ("arguments", {"#id": "x", "label": "a2", "a1": "a", "a2": "b"}, best("", "b", "a")),
]

RANKED = [
    ("ranked_completions", {"prompt": "q", "completions": ["a", "b", "c"], "ranks": [3, 1, 2]}, best("q", "b", "c", "a")),
    ("ranked_completions", {"prompt": [U], "responses": ["a", B], "rank": [0, 1]}, best((user("q"),), (gpt("a"),), (gpt("b"),))),
    (
        "ranked_completions",
        {"prompt": "q", "answers": ["a", "b", "c", "b"], "ranks": [2, 1, 1, 1]},
        Example("q", (Answer("b", rank=0), Answer("c", rank=0), Answer("a", rank=1))),
    ),
    (
        "scored_completions",
        {"prompt": "q", "completions": ["a", "b", "c"], "scores": [0.5, 2, -1]},
        best("q", "b", "a", "c", reward=[2, 0.5, -1]),
    ),
    (
        "scored_completions",
        {"instruction": "do", "outputs": ["a", "b"], "rewards": [1, 2]},
        best((user("do"),), (gpt("b"),), (gpt("a"),), reward=[2, 1]),
    ),
    (
        "rated_completions",
        {"prompt": "q", "answers": [{"answer": "a", "rank": 2}, {"answer": "b", "rank": 1, "model": "x"}]},
        best("q", "b", "a"),
    ),
    (
        "rated_completions",
        {"instruction": "do", "completions": [{"response": "a", "overall_score": 4}, {"response": "b", "overall_score": 7.5}]},
        best((user("do"),), (gpt("b"),), (gpt("a"),), reward=[7.5, 4]),
    ),
]

THUMBS = [
    ("text_label", {"prompt": "q", "completion": "a", "label": True}, ("q", ["a"], [True])),
    ("text_label", {"prompt": "q", "completion": "a", "label": "0"}, ("q", ["a"], [False])),
    ("text_label", {"prompt": [U], "completion": [A], "label": "thumbs_down"}, ((user("q"),), [(gpt("a"),)], [False])),
    ("text_label", {"prompt": "q", "completion": A, "label": 1}, ((user("q"),), [(gpt("a"),)], [True])),
    ("text_label", {"prompt": "q", "completion": "a", "is_correct": False}, ("q", ["a"], [False])),
    ("text_label", {"prompt": "q", "completion": "a", "label": None, "correct": "no"}, ("q", ["a"], [False])),
    ("text_label", {"prompt": "q", "completion": "a", "label": True, "correct": "Paris"}, ("q", ["a"], [True])),
    ("messages_label", {"messages": [U, A], "label": False}, ((user("q"),), [(gpt("a"),)], [False])),
    (
        "sharegpt_label",
        {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}], "kto_tag": True},
        ((user("q"),), [(gpt("a"),)], [True]),
    ),
    ("instruction_label", {"instruction": "do", "output": "a", "label": -1}, ((user("do"),), [(gpt("a"),)], [False])),
    ("labelled_completions", {"prompt": "q", "completions": ["a", "b"], "labels": [True, False]}, ("q", ["a", "b"], [True, False])),
    (
        "gsm8k_solutions",
        {
            "question": "q",
            **{
                f"{name}_{way}": {"solution": f"{name} {way}", "is_correct": name == "6b"}
                for name in ("6b", "175b")
                for way in ("finetuning", "verification")
            },
        },
        (
            (user("q"),),
            [(gpt("6b finetuning"),), (gpt("6b verification"),), (gpt("175b finetuning"),), (gpt("175b verification"),)],
            [True, True, False, False],
        ),
    ),
]


def reply(text: str, **more) -> dict:
    return {"role": "assistant", "text": text, "replies": [], **more}


def question(text: str, *replies, **more) -> dict:
    return {"role": "prompter", "text": text, "replies": [*replies], **more}


TREE = question(
    "q",
    reply("worst", rank=2, emojis={"-1": 3, "+1": 1}),
    reply("best", rank=0, emojis={"+1": 1})
    | {"replies": [question("why", reply("so", rank=1), reply("thus", rank=0), reply("even", emojis={"+1": 1, "-1": 1}))]},
    reply("good", rank=1) | {"replies": [question("and", reply("only", emojis={"_skip_reply": 2, "+1": 2}))]},
    reply("gone", rank=0, deleted=True) | {"replies": [question("lost", reply("never"))]},
)


@pytest.mark.parametrize(("name", "row", "expected"), COMPARISONS)
def test_comparisons(name, row, expected):
    found = recognise("rows", [Row("rows:1", row)], "pair").format
    assert (found.name, found.read(Fields(row), "pair")) == (name, expected)


@pytest.mark.parametrize(("name", "row", "expected"), RANKED)
def test_rankings(name, row, expected):
    found = recognise("rows", [Row("rows:1", row)], "ranked").format
    assert (found.name, found.read(Fields(row), "ranked")) == (name, expected)


@pytest.mark.parametrize(("name", "row", "expected"), THUMBS)
def test_thumbs(name, row, expected):
    found = recognise("rows", [Row("rows:1", row)], "thumbs").format
    prompt, contents, labels = expected
    made = found.read(Fields(row), "thumbs")
    assert (found.name, made) == (
        name,
        Example(prompt, tuple(Answer(content, label=label) for content, label in zip(contents, labels, strict=True))),
    )


def test_a_tree_of_messages_gives_an_example_for_each_question_that_says_something():
    found = recognise("rows", [Row("rows:1", {"prompt": TREE})], "ranked").format
    assert found.name == "message_tree"
    q, why, and_ = (user("q"),), (user("q"), gpt("best"), user("why")), (user("q"), gpt("good"), user("and"))

    def texts(kind):
        return {
            entry.prompt: [(answer.content[0].content, answer.rank, answer.label) for answer in entry.answers]
            for entry in found.read(Fields({"prompt": TREE}), kind)
        }

    assert texts("ranked") == {
        q: [("best", 0, True), ("good", 1, None), ("worst", 2, False)],
        why: [("thus", 0, None), ("so", 1, None)],
    }
    assert texts("thumbs") == {q: [("worst", 2, False), ("best", 0, True)], and_: [("only", None, True)]}
    assert {prompt: entries[0][0] for prompt, entries in texts("demonstration").items()} == {q: "best", why: "thus", and_: "only"}


@pytest.mark.parametrize(
    ("kind", "tree", "reason"),
    [
        ("ranked", question("q", reply("a", rank=0)), "no_ranking"),
        ("thumbs", question("q", reply("a", rank=0)), "no_label"),
        ("demonstration", question("q"), "no_ranking"),
        ("ranked", question("q", {"role": "robot", "text": "a", "replies": []}), "unknown_role"),
        ("ranked", question("q", {"role": "assistant", "replies": []}), "wrong_type"),
        ("ranked", {"role": "prompter", "text": "q", "replies": [3]}, "wrong_type"),
        ("ranked", 3, "wrong_type"),
    ],
)
def test_trees_that_say_nothing_or_are_broken(kind, tree, reason):
    found = next(entry for entry in FORMATS if entry.name == "message_tree")
    with pytest.raises(RowFault) as caught:
        found.examples(Fields({"prompt": tree}), kind)
    assert caught.value.reason == reason


def test_a_blank_reply_costs_its_question_only():
    tree = question("q", reply("a", rank=0) | {"replies": [question("r", reply("b", rank=1), reply(" ", rank=0))]}, reply("c", rank=1))
    found = next(entry for entry in FORMATS if entry.name == "message_tree")
    good, bad = found.examples(Fields({"prompt": tree}), "ranked")
    assert isinstance(good, Example)
    assert [answer.content for answer in good.answers] == [(gpt("a"),), (gpt("c"),)]
    assert isinstance(bad, RowFault)
    assert bad.reason == "blank_answer"


@pytest.mark.parametrize(
    ("row", "rewards"),
    [
        ({"score_chosen": 8, "score_rejected": "6.5"}, [8, 6.5]),
        ({"chosen_score": 0, "rejected_score": 0}, [0, 0]),
        ({"chosen_rating": 5, "rejected_rating": 1, "margin": 9}, [5, 1]),
        ({"margin": 0.3}, [0.3, 0]),
        ({}, [None, None]),
    ],
)
def test_scores_and_margins_of_pairs_are_rewards(row, rewards):
    entry = next(entry for entry in FORMATS if entry.name == "text_pair")
    made = entry.read(Fields({"prompt": "q", "chosen": "a", "rejected": "b", **row}), "pair")
    assert [answer.reward for answer in made.answers] == rewards


@pytest.mark.parametrize(("name", "row", "expected"), PAIRS)
def test_pairs(name, row, expected):
    found = recognise("rows", [Row("rows:1", row)], "pair").format
    assert (found.name, found.read(Fields(row), "pair")) == (name, expected)


@pytest.mark.parametrize(("name", "row", "expected"), DEMONSTRATIONS)
def test_demonstrations(name, row, expected):
    found = recognise("rows", [Row("rows:1", row)], "demonstration").format
    assert (found.name, found.read(Fields(row), "demonstration")) == (name, expected)


@pytest.mark.parametrize(("name", "row", "expected"), [case for case in PAIRS if case[1] != PAIRS[7][1]])
def test_pairs_serve_as_demonstrations_of_the_chosen_answer(name, row, expected):
    found = recognise("rows", [Row("rows:1", row)], "demonstration").format
    made = found.read(Fields(row), "demonstration")
    assert found.name == name
    assert (made.prompt, made.weight) == (expected.prompt, expected.weight)
    assert made.answers == (Answer(expected.answers[0].content),)


def test_every_format_has_a_case():
    cases = [*PAIRS, *DEMONSTRATIONS, *COMPARISONS, *RANKED, *THUMBS]
    assert {entry.name for entry in FORMATS} == {name for name, _, _ in cases} | {"message_tree"}


def test_reference_columns_are_carried():
    row = {"prompt": "q", "chosen": "a", "rejected": "b", "reference_chosen_logp": -3.5, "reference_rejected_logp": -4}
    found = recognise("rows", [Row("rows:1", row)], "pair").format
    assert [answer.reference_logp for answer in found.read(Fields(row), "pair").answers] == [-3.5, -4.0]


def text_row(**changes):
    return {"prompt": "q", "chosen": "a", "rejected": "b", **changes}


FAULTS = [
    ("text_pair", {"prompt": "q", "chosen": "a"}, "missing_field", "`rejected`"),
    ("text_pair", text_row(chosen=None), "wrong_type", "null"),
    ("text_pair", text_row(chosen=True), "wrong_type", "boolean"),
    ("text_pair", text_row(prompt=3), "wrong_type", "number"),
    ("text_pair", text_row(rejected=["b"]), "wrong_type", "list"),
    ("text_pair", text_row(rejected=" \n\u2028"), "blank_answer", "`rejected`"),
    ("text_pair", text_row(rejected="a"), "same_answers", "same"),
    ("text_pair", text_row(weight=float("nan")), "bad_number", "nan"),
    ("text_pair", text_row(weight=-1), "bad_number", "-1"),
    ("text_pair", text_row(weight=True), "bad_number", "boolean"),
    ("text_pair", text_row(weight="much"), "bad_number", "much"),
    ("text_pair", text_row(weight=10**400), "bad_number", "weight"),
    ("text_pair", text_row(reference_chosen_logp=-1), "missing_field", "both"),
    ("text_pair", text_row(reference_chosen_logp=0.5, reference_rejected_logp=-1), "bad_number", "0.5"),
    ("text_pair", text_row(chosen="a\ud800"), "not_utf8", "surrogate"),
    ("chat_pair", {"prompt": [U], "chosen": [{"role": "robot", "content": "a"}], "rejected": [B]}, "unknown_role", "robot"),
    ("chat_pair", {"prompt": [U], "chosen": [{"content": "a"}], "rejected": [B]}, "missing_field", "role"),
    ("chat_pair", {"prompt": [U], "chosen": [{"role": "assistant"}], "rejected": [B]}, "missing_field", "content"),
    ("chat_pair", {"prompt": [U], "chosen": [{"role": "assistant", "content": None}], "rejected": [B]}, "wrong_type", "null"),
    ("chat_pair", {"prompt": [U], "chosen": [], "rejected": [B]}, "wrong_type", "empty"),
    (
        "chat_pair",
        {"prompt": [U], "chosen": [{"role": "assistant", "content": [{"type": "image"}]}], "rejected": [B]},
        "needs_text_only",
        "image",
    ),
    ("chat_pair", {"prompt": [U], "chosen": [A | {"tool_calls": [1]}], "rejected": [B]}, "wrong_type", "tool_calls"),
    ("chat_pair", {"prompt": [U], "chosen": [A | {"tool_calls": [{"id": "x"}]}], "rejected": [B]}, "wrong_type", "a call of no tool"),
    ("chat_pair", {"prompt": [U], "chosen": [A | {"weight": 0.5}], "rejected": [B]}, "bad_number", "`weight` is 0.5, and must be 0 or 1"),
    (
        "sharegpt",
        {"conversations": [{"from": "human", "value": "q"}, {"from": "function_call", "value": "{"}]},
        "wrong_type",
        "must hold JSON",
    ),
    ("chat_pair", {"prompt": "other", "chosen": [U, A], "rejected": [U, B]}, "prompts_differ", "begins with"),
    ("chat_pair", {"prompt": [U], "chosen": [A, U], "rejected": [B]}, "no_answer", "user"),
    ("conversation_pair", {"chosen": [U, A], "rejected": [{"role": "user", "content": "r"}, B]}, "prompts_differ", "turn 1"),
    ("conversation_pair", {"chosen": [U, A], "rejected": [U, A]}, "same_answers", "same"),
    ("conversation_pair", {"chosen": [A], "rejected": [B]}, "no_prompt", "no turn"),
    ("conversation_pair", {"chosen": [U, U], "rejected": [U, U]}, "no_answer", "follows"),
    ("hh", {"chosen": "\n\nHuman: q\n\nAssistant: ", "rejected": "\n\nHuman: q\n\nAssistant: b"}, "blank_answer", "chosen"),
    ("hh", {"chosen": "\n\nHuman: q\n\nAssistant: a", "rejected": "\n\nHuman: r\n\nAssistant: b"}, "prompts_differ", "turn 1"),
    ("hh", {"chosen": "\n\nHuman: q\n\nAssistant: a\n\nHuman: x", "rejected": "\n\nHuman: q\n\nAssistant: b"}, "no_answer", "Human"),
    ("hh", {"chosen": "hello", "rejected": "\n\nHuman: q\n\nAssistant: b"}, "wrong_type", "hello"),
    ("messages", {"messages": [U]}, "no_answer", "user"),
    ("messages", {"messages": [A]}, "no_prompt", "no turn"),
    ("messages", {"messages": [U, "a"]}, "wrong_type", "turns"),
    ("text", {"text": "\n"}, "blank_answer", "`text`"),
    ("text_pair", text_row(score_chosen=1), "missing_field", "score_rejected"),
    ("text_pair", text_row(margin="wide"), "bad_number", "wide"),
    ("comparison", {"prompt": "q", **TWO, "preference": 0}, "unknown_verdict", "`preference` is 0"),
    ("comparison", {"prompt": "q", **TWO, "preference": "c"}, "unknown_verdict", "a-is-better, or tie"),
    ("comparison", {"prompt": "q", **TWO, "preference": True}, "unknown_verdict", "True"),
    ("comparison", {"prompt": "q", **TWO, "preference": None}, "unknown_verdict", "`preference` is None"),
    ("comparison", {"prompt": "q", "completion_a": "a", "preference": "a"}, "missing_field", "completion_b"),
    ("comparison", {"prompt": "q", "completion_a": "a", "completion_b": True, "preference": "a"}, "wrong_type", "boolean"),
    ("comparison", {"prompt": "q", "completion_a": "a", "completion_b": "a", "preference": "a"}, "same_answers", "`completion_b`"),
    ("comparison", {"prompt": "q", **TWO, "preference": "a", "completion_a_is_acceptable": "perhaps"}, "unknown_verdict", "perhaps"),
    (
        "comparison",
        {"prompt": [U], "completion_a": [{"role": "user", "content": "r"}, A], "completion_b": B, "preference": "a"},
        "prompts_differ",
        "not the prompt's",
    ),
    ("votes", {"prompt": "q", **TWO, "annotator1": "x"}, "unknown_verdict", "annotator1"),
    ("votes", {"prompt": "q", "response1": True, "response2": "b", "annotator1": 1}, "wrong_type", "boolean"),
    ("arguments", {"label": "a3", "a1": "a", "a2": "b"}, "unknown_verdict", "a3"),
    ("arena", {"conversation_a": [A], "conversation_b": [B], "winner": "a"}, "no_prompt", "no turn"),
    (
        "ranked_completions",
        {"prompt": "q", "completions": ["a", "b"], "ranks": [1]},
        "wrong_type",
        "`ranks` has 1 entries, and `completions` has 2",
    ),
    ("ranked_completions", {"prompt": "q", "completions": ["a", "a"], "ranks": [1, 2]}, "same_answers", "different ranks"),
    ("ranked_completions", {"prompt": "q", "completions": ["a", "a"], "ranks": [1, 1]}, "same_answers", "no two different"),
    ("ranked_completions", {"prompt": "q", "completions": ["a", " "], "ranks": [1, 2]}, "blank_answer", "completions[1]"),
    ("scored_completions", {"prompt": "q", "completions": ["a", "b"], "scores": [1, None]}, "bad_number", "null"),
    ("scored_completions", {"prompt": "q", "completions": "a", "scores": [1, 2]}, "wrong_type", "list"),
    ("scored_completions", {"prompt": "q", "completions": ["a", "b"], "scores": 1}, "wrong_type", "one entry for each"),
    ("rated_completions", {"prompt": "q", "completions": [{"text": "a", "score": 1}, "b"]}, "wrong_type", "rank or score"),
    (
        "rated_completions",
        {"prompt": "q", "completions": [{"text": "a", "score": 1}, {"text": "b", "score": float("inf")}]},
        "bad_number",
        "inf",
    ),
    (
        "rated_completions",
        {"prompt": "q", "completions": [{"text": "a", "rating": 1}, {"text": "b", "rating": None}]},
        "bad_number",
        "`completions[1].rating` is null",
    ),
    (
        "rated_completions",
        {"prompt": "q", "completions": [{"text": "a", "rank": None}, {"text": "b", "rank": 1}]},
        "bad_number",
        "`completions[0].rank` is null",
    ),
    ("text_label", {"prompt": "q", "completion": "a", "label": 2}, "unknown_verdict", "2"),
    ("text_label", {"prompt": "q", "completion": "", "label": 1}, "blank_answer", "completion"),
    ("messages_label", {"messages": [U, A]}, "missing_field", "label"),
    ("messages_label", {"messages": [A], "label": True}, "no_prompt", "no turn"),
    ("labelled_completions", {"prompt": "q", "completions": ["a", "b"], "labels": [True]}, "wrong_type", "1 entries"),
    ("gsm8k_solutions", {"question": "q", "6b_finetuning": {"solution": 3, "is_correct": True}}, "wrong_type", "6b_finetuning"),
]


@pytest.mark.parametrize(("name", "row", "reason", "says"), FAULTS)
def test_faults(name, row, reason, says):
    entry = next(entry for entry in FORMATS if entry.name == name)
    with pytest.raises(RowFault) as caught:
        entry.read(Fields(row), entry.kind)
    assert caught.value.reason == reason
    assert says in caught.value.detail


def rows(*values):
    return [Row(f"rows:{number}", value) for number, value in enumerate(values, start=1)]


def test_the_majority_decides():
    good = text_row()
    found = recognise("rows", rows(good, good, {"prompt": "q"}), "pair")
    assert found.format.name == "text_pair"
    assert found.because == "2 of the first 3 rows have prompt, chosen, rejected"


def test_nothing_is_guessed_from_mostly_broken_rows():
    broken = [Dropped(f"rows:{number}", "invalid_json", "no JSON", "{") for number in range(3)]
    with pytest.raises(DataError, match="3 of the first 4 rows cannot be parsed"):
        recognise("rows", [*broken, *rows(text_row())], "pair")
    assert recognise("rows", [*broken, *rows(text_row())], "pair", "text_pair").format.name == "text_pair"


def test_an_unknown_shape_lists_columns_formats_and_a_mapping():
    with pytest.raises(DataError) as caught:
        recognise("rows.csv", rows({"question": "q", "better": "a", "worse": "b"}), "pair")
    message = str(caught.value)
    assert "columns seen: question, better, worse" in message
    assert "columns: {prompt: question, chosen: better, rejected: worse}" in message
    assert "text_pair (prompt, chosen, rejected)" in message


def test_a_label_of_another_name_is_found():
    with pytest.raises(DataError, match=r"perhaps: columns: \{completion: response, label: thumb\}"):
        recognise("rows", rows({"prompt": "q", "response": "a", "thumb": "up"}), "thumbs")


@pytest.mark.parametrize(
    "row",
    [
        {"completions": [{"text": "a", "score": 1}, {"text": "b", "score": None}, {"text": "c", "score": 3}]},
        {"completions": ["a", "b", "c"], "scores": [1, None, 3]},
        {"completions": ["a", "b"], "ranks": [None, 1]},
    ],
)
def test_a_score_that_is_null_makes_a_bad_row_and_no_unknown_format(row):
    row = {"prompt": "q", **row}
    entry = recognise("rows", rows(row), "ranked").format
    with pytest.raises(RowFault) as caught:
        entry.read(Fields(row), "ranked")
    assert caught.value.reason == "bad_number"


def test_scores_that_are_all_null_are_no_ranking():
    for row in ({"completions": [{"text": "a", "score": None}] * 2}, {"completions": ["a", "b"], "scores": [None, None]}):
        with pytest.raises(DataError, match="not recognised"):
            recognise("rows", rows({"prompt": "q", **row}), "ranked")


@pytest.mark.parametrize(
    ("kind", "row", "near"),
    [
        ("ranked", {"prompt": "q", "completions": '["a", "b"]', "ranks": "[1,2]"}, "ranked_completions"),
        ("pair", {"prompt": "q", "completions": '["a", "b"]', "ranks": "[1,2]"}, "ranked_completions"),
        ("demonstration", {"messages": '[{"role": "user", "content": "q"}]'}, "messages"),
    ],
)
def test_lists_in_the_cells_of_a_table_are_named_as_such(kind, row, near):
    with pytest.raises(DataError, match="format is not recognised") as caught:
        recognise("rows.csv", rows(row), kind)
    first = next(line for line in str(caught.value).splitlines() if line.startswith("  near: "))
    assert first.startswith(f"  near: {near}: the columns are there, but `")
    assert "is a list written as text in 1 of 1 rows. Cells of tables (.csv, .tsv, .xlsx) are text" in first
    assert first.endswith("give such rows as .jsonl, .json or .parquet")


def test_a_column_of_the_wrong_type_is_named():
    with pytest.raises(DataError, match="`chosen` is missing or of another type in 2 of 2 rows"):
        recognise("rows", rows(text_row(chosen=1), text_row(chosen=2)), "pair")


@pytest.mark.parametrize("words", [("correct", "incorrect"), ("Right", "Wrong"), ("positive", "negative"), ("correct", "wrong")])
def test_words_of_labels(words):
    for word, says in zip(words, (True, False), strict=True):
        for row in ({"prompt": "q", "completion": "a", "label": word}, {"messages": [U, A], "label": word}):
            entry = recognise("rows", rows(row), "thumbs").format
            assert [answer.label for answer in entry.read(Fields(row), "thumbs").answers] == [says]


def test_labels_that_say_nothing_are_named_beside_those_that_do():
    said = ["maybe", 2, None, 0.5, "good"]
    with pytest.raises(DataError) as caught:
        recognise("rows", rows(*({"prompt": "q", "completion": "a", "label": label} for label in said)), "thumbs")
    near = [line for line in str(caught.value).splitlines() if line.startswith("  near: ")]
    assert near[0].startswith("  near: text_label: the columns are there, but `label` is maybe, 2, null, 0.5 in 4 of 5 rows, and must be ")
    assert "true or false" in near[0]
    assert "correct or incorrect" in near[0]
    assert [line.split(": ")[1] for line in near[1:]] == ["messages_label", "sharegpt_label", "instruction_label"]


def test_a_label_is_looked_for_where_it_is_read():
    row = {"prompt": "q", "completion": "a", "label": "geography", "is_correct": True}
    assert recognise("rows", rows(row), "demonstration").format.name == "text_completion"
    with pytest.raises(DataError, match="`label` is geography in 1 of 1 rows"):
        recognise("rows", rows(row), "thumbs")
    row = rename(row, {"label": "is_correct"})
    assert recognise("rows", rows(row), "thumbs").format.name == "text_label"


def test_formats_of_the_kind_asked_for_come_first_in_what_is_near():
    with pytest.raises(DataError, match=r"near: text_label: lacks label\n"):
        recognise("rows", rows({"prompt": "q", "completion": "a"}), "thumbs")


def test_demonstrations_where_pairs_are_needed():
    with pytest.raises(DataError, match="look like demonstrations"):
        recognise("rows", rows({"messages": [U, A]}), "pair")
    with pytest.raises(DataError, match="needs pairs"):
        recognise("rows", rows({"messages": [U, A]}), "pair", "messages")
    with pytest.raises(DataError, match="look like thumbs: single answers"):
        recognise("rows", rows({"messages": [U, A], "label": True}), "pair")
    with pytest.raises(DataError, match="holds thumbs, and what is asked for needs rankings: hh"):
        recognise("rows", rows({"messages": [U, A], "label": True}), "ranked", "messages_label")


def test_an_unknown_format_name_gets_the_nearest():
    with pytest.raises(DataError, match="did you mean text_pair"):
        recognise("rows", rows(text_row()), "pair", "text_pairs")


def test_columns_are_renamed_and_unknown_fields_refused():
    assert rename({"question": "q", "prompt": "old", "x": 1}, {"prompt": "question"}) == {"x": 1, "prompt": "q"}
    check_mapping({"prompt": "question"})
    with pytest.raises(DataError, match="did you mean chosen"):
        check_mapping({"chosn": "better"})
