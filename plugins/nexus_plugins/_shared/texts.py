"""Text of models, as it is shown to people."""

from __future__ import annotations

__all__ = ["harmless"]


def harmless(text: str) -> str:
    """The text with what would steer a terminal as escapes; line breaks stay."""
    return "".join(
        letter if letter.isprintable() or letter in "\n\t" else ascii(letter)[1:-1]
        for letter in text
    )
