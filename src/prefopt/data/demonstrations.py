"""Rows with one answer to learn: demonstrations."""

from prefopt.data.columns import check_prompt, instruction_prompt, turns_of, weight_of, with_system
from prefopt.data.examples import Answer, Conversation, Example, Fields, Message, check_answer
from prefopt.data.kinds import Kind


def messages_demonstration(row: Fields, kind: Kind) -> Example:
    """`messages` that end with the assistant."""
    turns = row.conversation("messages")
    return demonstration(row, turns[:-1], turns[-1:], "messages")


def sharegpt_demonstration(row: Fields, kind: Kind) -> Example:
    """`conversations` of from/value turns that end with gpt."""
    turns = with_system(row, row.conversation("conversations"))
    return demonstration(row, turns[:-1], turns[-1:], "conversations")


def text_completion(row: Fields, kind: Kind) -> Example:
    """`prompt` and `completion` as text."""
    return demonstration(row, row.text("prompt"), row.text("completion"), "completion")


def chat_completion(row: Fields, kind: Kind) -> Example:
    """`prompt` and `completion`, at least one of them as messages."""
    prompt = turns_of(row.value("prompt"), "prompt", role="user")
    return demonstration(row, prompt, turns_of(row.value("completion"), "completion", role="assistant"), "completion")


def instruction_demonstration(row: Fields, kind: Kind) -> Example:
    """Alpaca's `instruction`, `input` and `output`."""
    return demonstration(row, instruction_prompt(row), (Message("assistant", row.text("output")),), "output")


def plain_text(row: Fields, kind: Kind) -> Example:
    """`text`, learned from its first token on."""
    return demonstration(row, "", row.text("text"), "text")


def demonstration(row: Fields, prompt: str | Conversation, answer: str | Conversation, name: str) -> Example:
    """A prompt with the answer to learn.

    Raises:
        RowFault: no prompt before the answer, or a blank answer.
    """
    check_answer(answer, name)
    check_prompt(prompt)
    return Example(prompt, (Answer(answer),), weight=weight_of(row))
