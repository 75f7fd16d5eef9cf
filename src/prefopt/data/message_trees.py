"""Trees of messages, as Open-Assistant publishes them: questions with several replies, which are questioned further.

Every message of the prompter with replies is one example; what was said before it is its prompt. The ranks of the replies come
from people who ordered them, and their thumbs from votes.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from prefopt.data.columns import weight_of
from prefopt.data.examples import Answer, Conversation, Example, Fields, Message, check_answer, text_of
from prefopt.data.kinds import Kind, in_order
from prefopt.data.rows import RowFault, clip

ROLES = {"prompter": "user", "assistant": "assistant"}
UP, DOWN = "+1", "-1"


def is_tree(value: object) -> bool:
    """A message with replies."""
    return isinstance(value, dict) and "text" in value and isinstance(value.get("replies"), list)


def message_tree(row: Fields, kind: Kind) -> Sequence[Example | RowFault]:
    """`prompt` with its `replies`, and theirs."""
    root = row.value("prompt")
    if not is_tree(root):
        raise RowFault("wrong_type", f"`prompt` is {clip(root)}, and must be a message with `text` and `replies`")
    weight = weight_of(row)
    found: list[Example | RowFault] = []
    for before, replies in asked_and_replied(root):
        try:
            answers = answers_for(kind, [reply for reply in replies if not reply.get("deleted")])
            if answers:
                found.append(Example(before, answers, weight=weight))
        except RowFault as fault:
            found.append(fault)
    if not found and kind == "thumbs":
        raise RowFault("no_label", "no reply in the tree has votes that decide")
    if not found:
        raise RowFault("no_ranking", "no message in the tree has " + ("a reply" if kind == "demonstration" else "two ranked replies"))
    return found


def asked_and_replied(root: Mapping[str, Any]) -> Iterator[tuple[Conversation, Sequence[Mapping[str, Any]]]]:
    """Each message of the prompter, with all that was said before it, and its replies.

    Raises:
        RowFault: a message has no text, or is nobody's.
    """
    waiting: list[tuple[Mapping[str, Any], Conversation]] = [(root, ())]
    while waiting:
        node, before = waiting.pop()
        turns = (*before, turn_of(node))
        replies = node.get("replies") or []
        if not isinstance(replies, list) or not all(isinstance(reply, Mapping) for reply in replies):
            raise RowFault("wrong_type", f"`replies` is {clip(replies)}, and must be a list of messages")
        if turns[-1].role == "user":
            own = [reply for reply in replies if turn_of(reply).role == "assistant"]
            if own and not node.get("deleted"):
                yield turns, own
        waiting += [(reply, turns) for reply in reversed(replies) if not reply.get("deleted")]


def turn_of(node: Mapping[str, Any]) -> Message:
    """A message of the tree.

    Raises:
        RowFault: it has no text, or is nobody's.
    """
    role = node.get("role")
    if not isinstance(role, str) or role not in ROLES:
        raise RowFault("unknown_role", f"a message of the tree has the role {clip(role)}; known are {', '.join(ROLES)}")
    return Message(ROLES[role], text_of(node.get("text"), "text"))


def answers_for(kind: Kind, replies: Sequence[Mapping[str, Any]]) -> tuple[Answer, ...]:
    """The replies that say something to that kind of data: all with thumbs, all with ranks, or the best one.

    Raises:
        RowFault: one of them is blank, or the same as another of another rank.
    """
    answers = [Answer((turn_of(reply),), label=thumb_of(reply), rank=rank_of(reply)) for reply in replies]
    ranked = [answer for answer in answers if answer.rank is not None]
    if kind == "thumbs":
        used = [answer for answer in answers if answer.label is not None]
    elif kind == "demonstration" and len(answers) == 1:
        used = answers
    else:
        used = ranked if len(ranked) > 1 else []
    for answer in used:
        check_answer(answer.content, "text")
    return in_order(used) if len(used) > 1 and kind != "thumbs" else tuple(used)


def rank_of(reply: Mapping[str, Any]) -> int | None:
    """Its place among the replies, 0 for the best; None where nobody has ordered them."""
    rank = reply.get("rank")
    return rank if isinstance(rank, int) and not isinstance(rank, bool) else None


def thumb_of(reply: Mapping[str, Any]) -> bool | None:
    """What most of those who voted for or against it say; None where as many are for as against, or nobody voted."""
    votes = reply.get("emojis")
    up, down = (votes.get(sign) or 0 for sign in (UP, DOWN)) if isinstance(votes, Mapping) else (0, 0)
    return up > down if isinstance(up, int) and isinstance(down, int) and up != down else None
