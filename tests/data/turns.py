"""Turns of a chat, as rows have them."""

from typing import Any


def user(content: str) -> dict[str, Any]:
    return {"role": "user", "content": content}


def gpt(content: Any, **more: Any) -> dict[str, Any]:
    """The assistant's, with what else stands beside the content."""
    return {"role": "assistant", "content": content, **more}
