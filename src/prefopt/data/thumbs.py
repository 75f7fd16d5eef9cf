"""Rows with a thumb, up or down, for each answer."""

from typing import Any

from prefopt.data.columns import asked, check_prompt, each_of, fitted, instruction_prompt, turns_of, weight_of, with_system
from prefopt.data.examples import Answer, Conversation, Example, Fields, Message, check_answer
from prefopt.data.kinds import Kind
from prefopt.data.rows import RowFault, clip

LABELS = ("label", "kto_tag", "is_correct", "correct")
"""What the label may be called."""

LISTS = ("completions", "responses", "answers", "outputs")
"""What a list of answers may be called."""

WORDS = {
    **dict.fromkeys(("true", "yes", "up", "good", "1", "+1", "1.0", "desirable", "thumbs up", "accepted", "liked"), True),
    **dict.fromkeys(("correct", "right", "positive"), True),
    **dict.fromkeys(("false", "no", "down", "bad", "0", "-1", "0.0", "undesirable", "thumbs down", "rejected", "disliked"), False),
    **dict.fromkeys(("incorrect", "wrong", "negative"), False),
}
"""What a label may say."""

LABEL_SAYS = "true or false, 1 or 0, yes or no, up or down, good or bad, correct or incorrect, right or wrong, positive or negative"
"""The most usual of these words, for messages."""

SOLUTIONS = ("6b_finetuning", "6b_verification", "175b_finetuning", "175b_verification")
"""Whose solutions the makers of GSM8K published."""


def label_of(value: Any, name: str) -> bool:
    """The value as a thumb.

    Raises:
        RowFault: it says neither up nor down.
    """
    if is_label(value):
        return WORDS[said(value)]
    raise RowFault("unknown_verdict", f"`{name}` is {clip(value)}, and must be {LABEL_SAYS}")


def is_label(value: object) -> bool:
    """A switch, 1, 0 or -1, or a word for one of them."""
    return isinstance(value, bool | int | float | str) and said(value) in WORDS


def is_labels(value: object) -> bool:
    """A list of labels."""
    return isinstance(value, list) and len(value) > 1 and all(is_label(entry) for entry in value)


def said(value: object) -> str:
    """The value as the table of words has it."""
    return str(value).strip().lower().replace("_", " ").removeprefix("thumbs-")


def is_solution(value: object) -> bool:
    """A solution, and whether it is right."""
    return isinstance(value, dict) and isinstance(value.get("is_correct"), bool) and "solution" in value


def text_label(row: Fields, kind: Kind) -> Example:
    """`prompt`, `completion` and `label`, at least one of the first two as text."""
    prompt, (content,) = fitted(asked(row), {"completion": row.value("completion")})
    return thumb(row, prompt, content, "completion")


def messages_label(row: Fields, kind: Kind) -> Example:
    """`messages` that end with the assistant, and `label`."""
    turns = row.conversation("messages")
    return thumb(row, turns[:-1], turns[-1:], "messages")


def sharegpt_label(row: Fields, kind: Kind) -> Example:
    """`conversations` that end with gpt, and `label`."""
    turns = with_system(row, row.conversation("conversations"))
    return thumb(row, turns[:-1], turns[-1:], "conversations")


def instruction_label(row: Fields, kind: Kind) -> Example:
    """Alpaca's `instruction`, `input` and `output`, and `label`."""
    return thumb(row, instruction_prompt(row), (Message("assistant", row.answer("output")),), "output")


def labelled_completions(row: Fields, kind: Kind) -> Example:
    """A prompt, a list of answers, and a list of their labels."""
    name = row.first(LISTS) or LISTS[0]
    answers = row.value(name)
    if not isinstance(answers, list):
        raise RowFault("wrong_type", f"`{name}` is {clip(answers)}, and must be a list of answers")
    labels = [label_of(value, "labels") for value in each_of(row, "labels", len(answers), name)]
    prompt, contents = fitted(asked(row), {f"{name}[{place}]": value for place, value in enumerate(answers)})
    return labelled(row, prompt, [(content, label, name) for content, label in zip(contents, labels, strict=True)])


def gsm8k_solutions(row: Fields, kind: Kind) -> Example:
    """A question of GSM8K, and four solutions of models with whether they are right."""
    solved = [(name, row.value(name)) for name in SOLUTIONS if row.has(name)]
    for name, value in solved:
        if not is_solution(value):
            raise RowFault("wrong_type", f"`{name}` is {clip(value)}, and must be a solution with `is_correct`")
    prompt, contents = fitted(row.text("question"), {name: value["solution"] for name, value in solved})
    answers = [(content, bool(value["is_correct"]), name) for content, (name, value) in zip(contents, solved, strict=True)]
    return labelled(row, as_question(prompt), [(as_reply(content), label, name) for content, label, name in answers])


def as_question(prompt: str | Conversation) -> Conversation:
    """Text as a turn of the user."""
    return turns_of(prompt, "question", role="user") if isinstance(prompt, str) else prompt


def as_reply(content: str | Conversation) -> Conversation:
    """Text as a turn of the assistant."""
    return turns_of(content, "solution", role="assistant") if isinstance(content, str) else content


def thumb(row: Fields, prompt: str | Conversation, content: str | Conversation, name: str) -> Example:
    """One answer with its label.

    Raises:
        RowFault: the label says nothing, no prompt stands before the answer, or it is blank.
    """
    called = row.first(LABELS) or LABELS[0]
    return labelled(row, prompt, [(content, label_of(row.value(called), called), name)])


def labelled(row: Fields, prompt: str | Conversation, answers: list[tuple[str | Conversation, bool, str]]) -> Example:
    """Answers to one prompt, each with its label and what it is called.

    Raises:
        RowFault: no prompt stands before the answers, or one is blank.
    """
    check_prompt(prompt)
    for content, _, name in answers:
        check_answer(content, name)
    return Example(prompt, tuple(Answer(content, label=label) for content, label, _ in answers), weight=weight_of(row))
