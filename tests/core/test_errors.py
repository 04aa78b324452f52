"""Hints must be applicable where the user is: on the command line or in Python."""

from __future__ import annotations

import io
import pickle
from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nexus_core.cli.tables import folded
from nexus_core.errors import (
    ConfigError,
    Hint,
    hint_add,
    hint_leave_out,
    hint_out,
    hint_resume,
    hint_set,
)


@pytest.mark.parametrize(
    ("hint", "command", "python"),
    [
        (lambda: hint_set("clip.norm", 0.5), "--set clip.norm=0.5", "ClipPlugin(norm=0.5)"),
        (lambda: hint_set("until", "2 epochs"), "--set until='2 epochs'", "until='2 epochs'"),
        (lambda: hint_set("ema.on", True), "--set ema.on=true", "EmaPlugin(on=True)"),
        (
            lambda: hint_set("lr_torch.match", ["a*"]),
            """--set lr_torch.match='["a*"]'""",
            "LrTorchPlugin(match=['a*'])",
        ),
        (
            lambda: hint_add("ema", "lr_wsd"),
            "--plugins ema,lr_wsd",
            "plugins=[..., EmaPlugin(), LrWsdPlugin()]",
        ),
        (
            lambda: hint_leave_out("loss_lm"),
            "--plugins no:loss_lm",
            "drop LossLmPlugin() from plugins=[...]",
        ),
        (hint_resume, "--resume auto", "engine.resume('auto')"),
        (hint_out, "--out FOLDER", "Engine(..., out='FOLDER')"),
    ],
)  # fmt: skip
def test_a_hint_is_in_the_words_of_the_place(
    hint: Callable[[], Hint], command: str, python: str
) -> None:
    error = ConfigError("try ", hint(), ", or not")
    assert str(error) == f"try {python}, or not"
    assert error.on_command_line() == f"try {command}, or not"
    assert pickle.loads(pickle.dumps(error)).on_command_line() == error.on_command_line()


class Terminal(io.StringIO):
    """A stream that claims to be a terminal."""

    def isatty(self) -> bool:
        return True


@settings(max_examples=15, deadline=None)
@given(
    lines=st.lists(st.lists(st.text("ab-/", min_size=1, max_size=90), max_size=9), max_size=3),
    indent=st.integers(0, 40),
)
def test_text_is_folded_between_words_on_a_terminal_alone(
    lines: list[list[str]], indent: int
) -> None:
    """Fails if a terminal gets long lines or broken paths, or a pipe gets changed lines."""
    text = "\n".join(map(" ".join, lines))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("COLUMNS", "80")
        shown = folded(text, indent, Terminal())
    space = "\n" + " " * indent
    assert folded(text, indent, io.StringIO()) == text.replace("\n", space)
    words = [word for word in text.split() if len(word) <= 80 - indent or "/" in word]
    assert "".join(shown.split()) == "".join(text.split()), "nothing is lost"
    assert [word for word in words if word not in shown.split()] == [], "paths stay whole"
    parts = shown.split(space)
    assert all(len(part) <= 80 - indent or "/" in part for part in parts)
    assert len(parts) == len(lines or [[]]) or max(map(len, text.split("\n"))) > 80 - indent
