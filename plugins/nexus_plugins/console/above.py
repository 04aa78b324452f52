"""What a program prints while a bar is on its terminal: on lines of their own, above the bar."""

from __future__ import annotations

import sys
from contextlib import ExitStack, redirect_stderr, redirect_stdout
from typing import Any, TextIO, cast

from tqdm import tqdm

__all__ = ["above"]


class _Above:
    """A stream to the terminal that a bar is on.

    Whole lines are written above the bar; text without its line break waits for it. What moves the
    cursor, as another bar does, is passed on.

    Args:
        stream: the stream that it stands for.
        bar: the bar.
    """

    def __init__(self, stream: TextIO, bar: tqdm[Any]) -> None:
        self._stream, self._bar, self._held = stream, bar, ""

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        """Write text, as a stream does."""
        lines, end, rest = (self._held + text).rpartition("\n")
        if lines:
            with tqdm.external_write_mode(file=self._bar.fp):
                self._stream.write(lines + end)
                self._stream.flush()
            self._held = rest
        elif end or text.startswith(("\r", "\x1b")) or text.endswith("\r"):
            self._stream.write(self._held + text)
            self._held = ""
        else:
            self._held = rest
        return len(text)

    def finish(self) -> None:
        """Write what still waits for its line break."""
        if self._held:
            self.write("\n")


def above(bar: tqdm[Any]) -> ExitStack:
    """Have what is printed on the terminal appear above a bar, until the result is closed."""
    stack = ExitStack()
    for stream, redirect in ((sys.stdout, redirect_stdout), (sys.stderr, redirect_stderr)):
        if stream is not None and stream.isatty():
            beside = _Above(stream, bar)
            stack.enter_context(redirect(cast(TextIO, beside)))
            stack.callback(beside.finish)
    return stack
