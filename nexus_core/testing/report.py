"""The contract without pytest: each check of a class, one after another, with how it went."""

from __future__ import annotations

import contextlib
import io
import tempfile
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from inspect import signature
from pathlib import Path
from typing import Any, Literal
from unittest import SkipTest

from nexus_core.testing.contract import PluginContract

__all__ = ["Outcome", "run_contract"]


@dataclass(frozen=True)
class Outcome:
    """How one check went.

    Args:
        check: its name, as of the method, without `test_`.
        case: which settings and which accumulation.
        status: "pass", "FAIL" or "skip".
        reason: why it failed or was left out.
        said: what it tells besides, such as where the plugin waits for an accelerator.
    """

    check: str
    case: str
    status: Literal["pass", "FAIL", "skip"]
    reason: str = ""
    said: tuple[str, ...] = ()


def run_contract(contract: type[PluginContract], *names: str) -> Iterator[Outcome]:
    """Make the checks of a contract, in their order, each in a temporary folder of its own.

    What the plugin prints or warns of meanwhile is not shown.

    Args:
        contract: a subclass that names its plugin.
        names: of the checks to make, without `test_`; none: all.
    """
    for name, case in contract.checks():
        check = name.removeprefix("test_")
        if not names or check in names:
            yield _outcome(contract, name, case)


def _outcome(contract: type[PluginContract], name: str, case: dict[str, Any]) -> Outcome:
    check, shown, trial = name.removeprefix("test_"), _shown(contract, case), contract()
    try:
        with tempfile.TemporaryDirectory() as folder, _silent():
            method = getattr(trial, name)
            own_folder = (
                {"tmp_path": Path(folder)} if "tmp_path" in signature(method).parameters else {}
            )
            method(**case, **own_folder)
    except SkipTest as reason:
        return Outcome(check, shown, "skip", str(reason))
    except AssertionError as fault:
        return Outcome(check, shown, "FAIL", str(fault), trial.said)
    except Exception as error:  # a plugin may raise anything; that is what is told
        notes = "".join(f" [{note}]" for note in getattr(error, "__notes__", []))
        return Outcome(check, shown, "FAIL", f"{type(error).__name__}: {error}{notes}")
    return Outcome(check, shown, "pass", said=trial.said)


@contextlib.contextmanager
def _silent() -> Iterator[None]:
    streams = (contextlib.redirect_stdout, contextlib.redirect_stderr)
    with contextlib.ExitStack() as stack:
        for redirect in streams:
            stack.enter_context(redirect(io.StringIO()))
        stack.enter_context(warnings.catch_warnings(action="ignore"))
        yield


def _shown(contract: type[PluginContract], case: dict[str, Any]) -> str:
    """A case in words; settings by their place where there are several."""
    words = [f"accumulate {case['accumulate']}"] if "accumulate" in case else []
    cases = contract.cases()
    if "settings" in case and len(cases) > 1:
        words.insert(0, f"config {cases.index(case['settings'])}")
    return ", ".join(words)
