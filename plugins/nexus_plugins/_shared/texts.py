"""Display text that a model generated."""

from __future__ import annotations

__all__ = ["harmless"]


def harmless(text: str) -> str:
    """The text with terminal control characters escaped, except line breaks."""
    return "".join(
        letter if letter.isprintable() or letter in "\n\t" else ascii(letter)[1:-1]
        for letter in text
    )
