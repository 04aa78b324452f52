"""Run the contract without pytest, and report the outcome of each check."""

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
from nexus_core.testing.trial import Advice

__all__ = ["Outcome", "run_contract"]


@dataclass(frozen=True)
class Outcome:
    """The outcome of one check.

    Args:
        check: name of the method, without `test_`.
        case: the settings and accumulation.
        status: "pass", "FAIL" or "skip"; "hint" if it passed, with advice.
        reason: why it failed or was skipped, or the advice.
        said: further information, such as where the plugin synchronizes with an accelerator.
    """

    check: str
    case: str
    status: Literal["pass", "FAIL", "skip", "hint"]
    reason: str = ""
    said: tuple[str, ...] = ()


def run_contract(contract: type[PluginContract], *names: str) -> Iterator[Outcome]:
    """Run the checks of a contract in order, each in its own temporary folder.

    Output and warnings of the plugin are hidden.

    Args:
        contract: a subclass that names its plugin.
        names: checks to run, without `test_`; default: all.
    """
    for name, case in contract.checks():
        check = name.removeprefix("test_")
        if not names or check in names:
            yield _outcome(contract, name, case)


def _outcome(contract: type[PluginContract], name: str, case: dict[str, Any]) -> Outcome:
    check, shown, trial = name.removeprefix("test_"), _shown(contract, case), contract()
    try:
        with tempfile.TemporaryDirectory() as folder, _silent() as advice:
            method = getattr(trial, name)
            own_folder = (
                {"tmp_path": Path(folder)} if "tmp_path" in signature(method).parameters else {}
            )
            method(**case, **own_folder)
    except SkipTest as reason:
        return Outcome(check, shown, "skip", str(reason))
    except AssertionError as fault:
        return Outcome(check, shown, "FAIL", str(fault), trial.said)
    except Exception as error:  # a plugin may raise anything, which is reported
        notes = "".join(f" [{note}]" for note in getattr(error, "__notes__", []))
        return Outcome(check, shown, "FAIL", f"{type(error).__name__}: {error}{notes}")
    if advice:
        return Outcome(check, shown, "hint", "; ".join(str(one.message) for one in advice))
    return Outcome(check, shown, "pass", said=trial.said)


@contextlib.contextmanager
def _silent() -> Iterator[list[warnings.WarningMessage]]:
    """Hide what is printed and warned of, except the advice of checks."""
    streams = (contextlib.redirect_stdout, contextlib.redirect_stderr)
    with contextlib.ExitStack() as stack:
        for redirect in streams:
            stack.enter_context(redirect(io.StringIO()))
        advice = stack.enter_context(warnings.catch_warnings(record=True, action="ignore"))
        warnings.simplefilter("always", Advice)
        yield advice


def _shown(contract: type[PluginContract], case: dict[str, Any]) -> str:
    """A readable case; the index of its settings if there are several."""
    words = [f"accumulate {case['accumulate']}"] if "accumulate" in case else []
    cases = contract.cases()
    if "settings" in case and len(cases) > 1:
        words.insert(0, f"config {cases.index(case['settings'])}")
    return ", ".join(words)
