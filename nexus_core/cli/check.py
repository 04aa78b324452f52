"""`nexus-plugins check`: the contract of `nexus_core.testing`, from the command line."""

from __future__ import annotations

import json
import sys
from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from nexus_core.cli import yaml12
from nexus_core.cli.config_file import read_config_file
from nexus_core.cli.errors import reported
from nexus_core.errors import ConfigError, suggestion
from nexus_core.paths import expanded

if TYPE_CHECKING:
    from nexus_core.plugin import Plugin
    from nexus_core.testing import Outcome, PluginContract

__all__ = ["check"]

COLOURS = {"pass": "green", "FAIL": "red", "skip": "yellow", "hint": "yellow"}


@click.command()
@click.argument("plugin", metavar="NAME|FILE.py")
@click.option("-c", "--config", "configs", multiple=True, metavar="FILE|JSON",
              help="Settings to check it with; repeat for several cases.")  # fmt: skip
@click.option("-b", "--beside", default="", metavar="FILE|JSON",
              help="Other plugins it needs, with their settings.")  # fmt: skip
@click.option("-o", "--only", "only", default="", metavar="CHECK,CHECK",
              help="Run only these checks.")  # fmt: skip
@click.option("--json", "as_json", is_flag=True, help="Print the outcomes as JSON.")
@click.option("--debug", is_flag=True, help="Show the traceback of an error.")
def check(
    plugin: str, configs: tuple[str, ...], beside: str, only: str, as_json: bool, debug: bool
) -> None:
    """Check that a plugin resumes bitwise, shares no state, leaks nothing, and more.

    \b
    nexus-plugins check sparkle
    nexus-plugins check ./mine.py
    nexus-plugins check sparkle --config '{"strength": 2.0}' --config sparkle.yaml
    nexus-plugins check sparkle --beside '{"glitter": {"size": 13}}'

    The checks train a tiny model of token ids. A plugin that needs more gets its own test
    class: subclass nexus_core.testing.PluginContract. Exits with 1 if a check fails.
    """
    with reported(debug):
        cases = [_block(text, f"--config of {plugin}") for text in configs]
        wanted = [word.strip() for word in only.split(",") if word.strip()]
        neighbours = _block(beside, "--beside") if beside else {}
        failed = _check(plugin, cases, neighbours, wanted, as_json=as_json)
    sys.exit(int(failed))


def _check(
    word: str,
    configs: list[dict[str, Any]],
    beside: dict[str, Any],
    only: list[str],
    *,
    as_json: bool,
) -> bool:
    """Run the checks, print each outcome, and return whether one failed."""
    from nexus_core.cli.local import giver
    from nexus_core.sources import forget
    from nexus_core.testing import run_contract

    forget()
    contract = _contract(word, configs, beside)
    _refuse_impossible(contract, only)
    plugin = contract.plugin_class()
    if as_json:
        outcomes = list(run_contract(contract, *only))
        facts = {"plugin": plugin.name, "outcomes": [asdict(outcome) for outcome in outcomes]}
        click.echo(json.dumps(facts, indent=2, default=str))
        return any(outcome.status == "FAIL" for outcome in outcomes)
    click.echo(f"{plugin.name} ({giver(plugin, word)})")
    counts: Counter[str] = Counter()
    for outcome in run_contract(contract, *only):
        counts[outcome.status] += 1
        click.echo(_line(outcome))
    hints = f", {counts['hint']} with a hint" if counts["hint"] else ""
    passed = counts["pass"] + counts["hint"]
    click.echo(f"{passed} passed{hints}, {counts['FAIL']} failed, {counts['skip']} skipped")
    return counts["FAIL"] > 0


def _contract(
    word: str, configs: list[dict[str, Any]], beside: dict[str, Any]
) -> type[PluginContract]:
    """The test class an author would write."""
    from nexus_core.cli.local import plugin_class
    from nexus_core.testing import PluginContract

    class Contract(PluginContract):
        def beside(self) -> Iterable[Plugin[Any]]:
            named = [plugin_class(other)(**(settings or {})) for other, settings in beside.items()]
            names = {plugin.name for plugin in named}
            return [*named, *(other for other in super().beside() if other.name not in names)]

    Contract.plugin, Contract.configs = plugin_class(word), configs
    return Contract


def _refuse_impossible(contract: type[PluginContract], only: list[str]) -> None:
    """Report once what would fail every check: mistakes in the command, and wrong hooks."""
    from nexus_core.plan import arrange
    from nexus_core.relay import relay

    plugin_class = contract.plugin_class()
    for settings in contract.cases():
        relay(arrange([plugin_class(**settings), *contract().beside()]), defaults=None)
    known = dict.fromkeys(check.removeprefix("test_") for check, _ in contract.checks())
    for word in only:
        if word not in known:
            names = suggestion(word, known) or f" Checks: {', '.join(known)}"
            raise ConfigError(f"unknown check '{word}'.{names}")


def _line(outcome: Outcome) -> str:
    case = f" ({outcome.case})" if outcome.case else ""
    reason = "".join(f"\n      {text}" for text in (outcome.reason, *outcome.said) if text)
    status = click.style(outcome.status, fg=COLOURS[outcome.status])
    return f"{status}  {outcome.check.replace('_', ' ')}{case}{reason}"


def _block(text: str, origin: str) -> dict[str, Any]:
    """A block of settings: as JSON on the command line, or in a YAML or JSON file.

    Raises:
        ConfigError: it is neither, or not a block of settings.
    """
    if not text.lstrip().startswith("{"):
        path = Path(expanded(text))
        if not path.is_file():
            said = f"'{text}' is neither a file nor JSON such as '{{\"key\": 1}}'"
            raise ConfigError(f"{origin}: {said}")
        settings: dict[str, Any] = read_config_file(path).value
        return settings
    try:
        block = yaml12.parse(text).value
    except yaml12.YamlError as error:
        raise ConfigError(f"{origin}: '{text}' cannot be read: {error}") from None
    if not isinstance(block, dict):
        raise ConfigError(f"{origin}: expected a mapping of settings, got {block!r:.60}")
    return block
