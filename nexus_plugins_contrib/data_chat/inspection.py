"""Inspect conversations: which tokens are learned, and what is wrong."""

from __future__ import annotations

import os
import sys
from collections import Counter
from collections.abc import Iterator, Mapping
from itertools import groupby

import click
import yaml

from nexus_core import ConfigError
from nexus_plugins._shared.paths import printable
from nexus_plugins_contrib._shared.examples import Example, Fault, Tokens, examples_of
from nexus_plugins_contrib._shared.records import Place
from nexus_plugins_contrib._shared.settings import SourceConfig, listed
from nexus_plugins_contrib._shared.sources import open_records
from nexus_plugins_contrib._shared.tokenizer import HubTokenizer, open_tokenizer
from nexus_plugins_contrib.data_chat.plugin import ChatEncoder, DataChatPlugin

__all__ = ["inspect"]

_OPEN, _CLOSE = "⟦", "⟧"


def inspect(path: str, tokenizer: str, samples: int, settings: Mapping[str, str]) -> bool:
    """Print how much of the conversations is learned, and samples with the learned part in colour.

    Without colour (`NO_COLOR`, a pipe), it is in brackets: ⟦ ⟧.

    Args:
        path: as in `data_chat.train`.
        tokenizer: as in `data_chat.tokenizer`.
        samples: how many conversations to print.
        settings: other settings of `data_chat`, by key.

    Returns:
        Whether every conversation can be used.
    """
    if tokenizer == "auto":
        raise ConfigError("conversations need a chat template; name its tokenizer: --tokenizer DIR")
    given = {key: yaml.safe_load(value) for key, value in settings.items()}
    config = DataChatPlugin(train=path, tokenizer=tokenizer, **given).config
    opened = open_tokenizer(config.tokenizer, config.tokenizer_revision)
    encoder = ChatEncoder(config, opened)
    how = "markers of the template" if encoder.template.marked else "the prefix before each turn"
    click.echo(f"{opened}\nturns found by: {how}")
    shown = [_shown(source, encoder, opened, samples) for source in listed(config.train)]
    return all(shown)


def _shown(
    source: SourceConfig, encoder: ChatEncoder, tokenizer: HubTokenizer, samples: int
) -> bool:
    faults: Counter[str] = Counter()
    firsts: dict[str, str] = {}
    count = tokens = learned = 0
    kept: list[tuple[Place, list[Example]]] = []
    for place, found in examples_of(iter(open_records(source.wish())), encoder):
        if isinstance(found, Fault):
            faults[found.kind] += 1
            firsts.setdefault(found.kind, f"{place}: {found.what}")
            continue
        count += 1
        kept += [(place, found)] if len(kept) < samples else []
        parts = [part for example in found for part in example]
        tokens += sum(len(part.ids) for part in parts)
        learned += sum(int(part.learnt.sum()) for part in parts)
    share = learned / max(1, tokens)
    click.echo(
        f"\n{source.called}: {count:,} conversations, {tokens:,} tokens, {learned:,} of them "
        f"trained on ({share:.0%})"
    )
    for place, examples in kept:
        for example in examples:
            _show(place, example, tokenizer)
    for kind, times in faults.items():
        click.echo(f"  WRONG: {times:,} times {kind}, first at {printable(firsts[kind])}")
    return not faults


def _show(place: Place, example: Example, tokenizer: HubTokenizer) -> None:
    names = ("",) if len(example) == 1 else (", chosen", ", rejected")
    for name, part in zip(names, example, strict=True):
        click.echo(f"\n{printable(str(place))}{name}:")
        click.echo("".join(_coloured(part, tokenizer)), color=_in_colour())


def _coloured(part: Tokens, tokenizer: HubTokenizer) -> Iterator[str]:
    """The text of each learned or other stretch, with terminal control characters escaped."""
    pairs = zip(part.ids.tolist(), part.learnt.tolist(), strict=True)
    for learned, stretch in groupby(pairs, key=lambda pair: pair[1]):
        text = "\n".join(
            map(printable, tokenizer.inner.decode([one for one, _ in stretch]).split("\n"))
        )
        if not learned:
            yield click.style(text, dim=True) if _in_colour() else text
        elif _in_colour():
            yield click.style(text, fg="green", bold=True)
        else:
            yield f"{_OPEN}{text}{_CLOSE}"


def _in_colour() -> bool:
    """Whether to use colour: on a terminal or if forced, unless disabled.

    Source: https://no-color.org and https://force-color.org.
    """
    wanted = sys.stdout.isatty() or bool(os.environ.get("FORCE_COLOR"))
    return wanted and not os.environ.get("NO_COLOR")
