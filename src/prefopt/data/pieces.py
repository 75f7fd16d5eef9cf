"""An answer's text in pieces that count, and pieces that do not."""

from dataclasses import dataclass

from prefopt.data.examples import Message
from prefopt.data.marks import Parts, joined, parts_of
from prefopt.data.rows import RowFault, clip


@dataclass(frozen=True, slots=True)
class Piece:
    """A stretch of an answer's text.

    Attributes:
        text: without the end-of-turn token.
        scored: whether its tokens count.
        ends_turn: whether the end-of-turn token follows it.
        end_scored: whether that token counts.
        goes_on: whether the turn of the piece before goes on with it.
    """

    text: str
    scored: bool = True
    ends_turn: bool = False
    end_scored: bool = True
    goes_on: bool = False


def in_pieces(parts: Parts, *, end_scored: bool = True) -> tuple[Piece, ...]:
    """A whole turn's text as pieces.

    The token that ends it counts wherever something of the turn does, whichever part is the last one: that the answer is over
    there belongs to none of the parts, and a model that is never shown it does not stop.
    """
    last = len(parts) - 1
    return tuple(
        Piece(text, learned, ends_turn=place == last, end_scored=end_scored, goes_on=place > 0)
        for place, (text, learned) in enumerate(parts)
    )


def turn_pieces(message: Message, text: str) -> tuple[Piece, ...]:
    """A turn of the assistant as the template wrote it, in pieces.

    Raises:
        RowFault: its parts cannot be found in the text.
    """
    own = message.learned is not False
    if not message.counts:
        return in_pieces(((text, False),), end_scored=False)
    parts = parts_of(message.content, own)
    if len(parts) > 1 or any(learned != own for _, learned in parts):
        return in_pieces(spread(parts, text, own))
    return in_pieces(((text, own),))


def spread(parts: Parts, text: str, own: bool) -> Parts:
    """The parts of a turn's content as they stand in the text of the turn.

    Args:
        parts: all of the content.
        text: of the turn, as the template wrote it: the content, maybe without white space at its ends, and what is around it.
        own: whether what is around it is learned. White space goes with the part beside it, since tokens hold both.

    Raises:
        RowFault: the content is not there, or there more than once.
    """
    content = "".join(part for part, _ in parts)
    kept = next((kept for kept in (content, content.rstrip(), content.lstrip(), content.strip()) if kept in text), None)
    if kept is None or text.find(kept) != text.rfind(kept):
        how = "changes" if kept is None else "repeats"
        raise RowFault(
            "template_refused",
            f"the chat template {how} the content of a turn with marked parts ({clip(content)}), so that they cannot be told apart in it",
        )
    start = text.find(kept)
    stop = start + len(kept)
    before, after = text[:start], text[stop:]
    found = [(before, own if before.strip() else parts[0][1])]
    place = start - content.find(kept)
    for part, learned in parts:
        found.append((text[max(place, start) : max(start, min(place + len(part), stop))], learned))
        place += len(part)
    return joined([*found, (after, own if after.strip() else parts[-1][1])])
