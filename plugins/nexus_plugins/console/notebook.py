"""The progress bar in a notebook."""

from __future__ import annotations

import html
import io
import sys
import time
from typing import Any

from tqdm import tqdm

__all__ = ["NotebookBar", "in_notebook"]

TEXT = "{percentage:3.0f}%  {n_fmt}/{total_fmt} {unit} [{elapsed}<{remaining}]{postfix}"
SHORTEST = 0.1  # seconds between two updates


def in_notebook() -> bool:
    """Whether the program runs in the kernel of a notebook."""
    ipython = sys.modules.get("IPython")
    return ipython is not None and hasattr(ipython.get_ipython(), "kernel")


class NotebookBar(tqdm):  # type: ignore[type-arg]
    """A tqdm bar shown as HTML, in a single output that is updated.

    It needs no widgets, and a saved notebook shows its final state. The bar of `tqdm.auto` is plain
    text without ipywidgets, and is saved in its initial state.

    Args:
        options: arguments of tqdm, except file, format and width.
    """

    def __init__(self, **options: Any) -> None:
        from IPython.display import display

        self._handle, self._shown_at = None, 0.0
        super().__init__(**options, file=io.StringIO(), bar_format=TEXT)
        self._handle = display(self, display_id=True)

    def display(self, msg: str | None = None, pos: int | None = None) -> None:
        """Update the output, but not more often than people can see."""
        if self._handle is not None and time.monotonic() - self._shown_at > SHORTEST:
            self._shown_at = time.monotonic()
            self._handle.update(self)

    def close(self) -> None:
        """Show the final state."""
        self._shown_at = 0.0
        super().close()

    def __repr__(self) -> str:
        return str(self)

    def _repr_html_(self) -> str:
        bar = f"<progress value='{self.n}' max='{self.total}' style='width:16em'></progress>"
        return f"<div>{bar} {html.escape(str(self))}</div>"
