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
"""The reasons recorded for Ctrl-C: in a program, and on the command line."""


@contextmanager
def stopping_on_interrupt(stop: Callable[..., None], step: Callable[[], int]) -> Iterator[None]:
    """Let the first Ctrl-C call `stop` and the second interrupt, unless SIGINT is handled.

    Args:
        stop: of the engine; ends the loop after the current step, and a running evaluation.
        step: the number of completed steps, for the message of the interrupt.
    """
    listens = signal.getsignal(signal.SIGINT) is not signal.default_int_handler
    if listens or threading.current_thread() is not threading.main_thread():
        yield
        return

    def handle(number: int, _: FrameType | None) -> None:
        signal.signal(number, signal.default_int_handler)
        stop(INTERRUPTED[0], at_once=True)
        with suppress(OSError, RuntimeError):  # the interrupt came during a print
            print("stopping after this step; interrupt again to stop at once", file=sys.stderr)

    signal.signal(signal.SIGINT, handle)
    try:
        yield
    except KeyboardInterrupt as error:
        kept = f"within a step: {step():,} completed steps are kept, and fit continues from there"
        error.args = error.args or (kept,)
        raise
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)
