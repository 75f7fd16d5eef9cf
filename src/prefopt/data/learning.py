"""What of an example is learned, and what it opens with: as the settings and the row itself want it, before it is tokens."""

from dataclasses import replace
from hashlib import blake2b

from prefopt.data.examples import Example, Message
from prefopt.data.marks import counts
from prefopt.data.rows import RowFault


def learned_turns(example: Example, *, every: bool) -> Example:
    """The demonstration with each turn of the assistant in its answer that is to be learned; text examples stay as they are.

    A turn, or a part of it, is learned or not as the row says; where it says nothing, the answer's turns are learned, and with
    `every` those before them too. The prompt becomes everything before the first turn of which something is learned.

    Raises:
        RowFault: one of the turns to be learned is blank, or there is nothing to learn.
    """
    answer = example.answers[0]
    if isinstance(example.prompt, str) or isinstance(answer.content, str):
        check_learned(example)
        return example

    def settled(place: int, message: Message) -> Message:
        # A greeting that opens the chat cannot be learned: no prompt comes before it.
        if message.role != "assistant" or place == 0:
            return replace(message, content=str(message.content), learned=False)
        return message.settled(every or place >= len(example.prompt))

    turns = tuple(settled(place, message) for place, message in enumerate(example.prompt + answer.content))
    learned = [message.counts for message in turns]
    if not any(learned):
        raise RowFault("nothing_to_learn", "the row says of every turn of the assistant, or of all its parts, that it is not to be learned")
    if any(message.counts and message.says_nothing for message in turns):
        raise RowFault("blank_answer", "one of the assistant's turns is blank, and it is to be learned")
    first = min(learned.index(True), len(example.prompt)) if not every else learned.index(True)
    return replace(example, prompt=turns[:first], answers=(replace(answer, content=turns[first:]),))


def check_learned(example: Example) -> None:
    """Answers that are judged must have something in them that counts.

    Raises:
        RowFault: the row says of every turn or part of one that it is not to be learned.
    """
    for answer in example.answers:
        content = answer.content
        said = counts(content, True) if isinstance(content, str) else any(turn.counts for turn in content if turn.role == "assistant")
        if not said:
            raise RowFault("nothing_to_learn", "the row says of every turn of an answer, or of all its parts, that it is not to be learned")


def opening_of(example: Example) -> str:
    """A digest of what the example opens with: the user's first message, the text of the prompt, or the text itself.

    It is read from the text before anything is shaped or cut, so that a row read as a pair, as a demonstration of its
    last answer or of all its answers opens with the same: the whole prompts of those three differ.
    """
    answer = example.answers[0].content
    if isinstance(example.prompt, str):
        text = example.prompt if example.prompt.strip() else str(answer)
    else:
        turns = example.prompt if isinstance(answer, str) else example.prompt + answer
        text = next((message for message in turns if message.role == "user"), turns[0]).content
    return blake2b(text.strip().encode(), digest_size=8).hexdigest()


def as_chat(example: Example) -> Example:
    """The raw-text example as a chat of one question and one answer; text without a prompt stays as it is."""
    if not isinstance(example.prompt, str) or not example.prompt.strip():
        return example
    answers = tuple(replace(answer, content=(Message("assistant", answer.text),)) for answer in example.answers)
    return replace(example, prompt=(Message("user", example.prompt),), answers=answers)
