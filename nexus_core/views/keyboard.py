"""Ctrl-C, and the stop button of a notebook, in a program that embeds the engine."""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType

__all__ = ["INTERRUPTED", "stopping_on_interrupt"]

INTERRUPTED = ("interrupted (Ctrl-C)", "SIGINT")
"""Reasons to stop that are somebody at the keyboard: in a program, and by command."""


@contextmanager
def stopping_on_interrupt(stop: Callable[[str], None], step: Callable[[], int]) -> Iterator[None]:
    """Let the first Ctrl-C call `stop`, and the second interrupt, where nobody else listens.

    Args:
        stop: ends the loop after its present step.
        step: how many are done; what interrupts says so.
    """
    listens = signal.getsignal(signal.SIGINT) is not signal.default_int_handler
    if listens or threading.current_thread() is not threading.main_thread():
        yield
        return

    def handle(number: int, _: FrameType | None) -> None:
        signal.signal(number, signal.default_int_handler)
        stop(INTERRUPTED[0])
        with suppress(OSError, RuntimeError):  # the program was within a print
            print("stopping after this step; interrupt again to stop at once", file=sys.stderr)

    signal.signal(signal.SIGINT, handle)
    try:
        yield
    except KeyboardInterrupt as error:
        done = f"at once; kept are the {step():,} steps that are done, and fit continues from there"
        error.args = error.args or (done,)
        raise
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)
