"""Rows with one answer to learn: demonstrations."""

from prefopt.data.columns import check_prompt, instruction_prompt, turns_of, weight_of, with_system
from prefopt.data.examples import Answer, Conversation, Example, Fields, Message, check_answer, text_of
from prefopt.data.kinds import Kind
from prefopt.data.marks import Marked, is_parts, learned_of
from prefopt.data.rows import RowFault, clip


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
    return demonstration(row, row.text("prompt"), row.answer("completion"), "completion")


def chat_completion(row: Fields, kind: Kind) -> Example:
    """`prompt` and `completion`, at least one of them as messages."""
    prompt = turns_of(row.value("prompt"), "prompt", role="user")
    return demonstration(row, prompt, turns_of(row.value("completion"), "completion", role="assistant"), "completion")


def instruction_demonstration(row: Fields, kind: Kind) -> Example:
    """Alpaca's `instruction`, `input` and `output`."""
    return demonstration(row, instruction_prompt(row), (Message("assistant", row.answer("output")),), "output")


def plain_text(row: Fields, kind: Kind) -> Example:
    """`text`, learned from its first token on."""
    return demonstration(row, "", row.answer("text"), "text")


def text_segments(row: Fields, kind: Kind) -> Example:
    """`segments` of a text, each with `label` true where it is learned; what stands before the first of those is the prompt.

    Raises:
        RowFault: they are no such segments, one has no label, or none is to be learned.
    """
    segments = row.value("segments")
    if not is_parts(segments):
        raise RowFault("wrong_type", f"`segments` is {clip(segments)}, and must be a list of objects with text and label")
    parts = [(text_of(one["text"], "segments[].text"), learned_of(one, "segments", "segment", ("label",))) for one in segments]
    if any(learned is None for _, learned in parts):
        raise RowFault("missing_field", "`segments` has a segment without `label`")
    first = next((place for place, (_, learned) in enumerate(parts) if learned), None)
    if first is None:
        raise RowFault("nothing_to_learn", "no segment is to be learned: none has a `label` that is true")
    return demonstration(row, "".join(text for text, _ in parts[:first]), Marked(parts[first:]), "segments")


def demonstration(row: Fields, prompt: str | Conversation, answer: str | Conversation, name: str) -> Example:
    """A prompt with the answer to learn.

    Raises:
        RowFault: no prompt before the answer, or a blank answer.
    """
    check_answer(answer, name)
    check_prompt(prompt)
    return Example(prompt, (Answer(answer),), weight=weight_of(row))
