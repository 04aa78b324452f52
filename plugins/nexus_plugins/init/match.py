"""Match source tensors to the model's, after renaming and filtering."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor
from torch.nn.parameter import is_lazy

from nexus_core.errors import ConfigError
from nexus_plugins._shared.parameters import matching

__all__ = ["Match", "check_rule", "match", "renamed"]

SHOWN = 4  # names in a message


@dataclass(frozen=True)
class Match:
    """How a source's tensors match a model's.

    Args:
        taken: name of a tensor in the model to its name in the source.
        missing: names that only the model has.
        unexpected: names, after renaming, that only the source has.
        unlike: names of tensors that differ in shape or dtype, and how.
    """

    taken: Mapping[str, str]
    missing: tuple[str, ...]
    unexpected: tuple[str, ...]
    unlike: Mapping[str, str]

    @property
    def is_whole(self) -> bool:
        """Whether every tensor of both sides is matched."""
        return not (self.missing or self.unexpected or self.unlike)

    def faults(self) -> list[str]:
        """What could not be matched, in words."""
        unlike = [f"{name} ({how})" for name, how in self.unlike.items()]
        told = (
            ("missing in the source", self.missing),
            ("not in the model", self.unexpected),
            ("different from the model's", unlike),
        )
        return [f"{len(names)} {what}: {_some(names)}" for what, names in told if names]

    def hint(self) -> str:
        """A rule for `map` that would match missing with unexpected tensors, if there is one."""
        for name in self.missing:
            for other in self.unexpected:
                if other.endswith(f".{name}"):
                    return f'init.map: {{"{other.removesuffix(name)}*": "*"}}'
                if name.endswith(f".{other}"):
                    return f'init.map: {{"*": "{name.removesuffix(other)}*"}}'
        return ""


def check_rule(pattern: str, name: str) -> None:
    """Reject a rule whose new name has more stars than its pattern.

    Raises:
        ValueError: it has.
    """
    if name.count("*") > pattern.count("*"):
        raise ValueError(f"'{name}' has more * than the pattern '{pattern}'")


def renamed(names: Iterable[str], rules: Mapping[str, str]) -> dict[str, str]:
    """Maps the new name of each tensor to its old one; the first matching rule applies.

    Args:
        names: names in the source.
        rules: pattern to new name; each `*` of the name is what that of the pattern matched.

    Raises:
        ConfigError: a pattern matches nothing, or two tensors get the same name.
    """
    patterns = {re.compile(_as_regex(pattern)): name for pattern, name in rules.items()}
    used, found = set[re.Pattern[str]](), dict[str, str]()
    for old in names:
        new = old
        for pattern, name in patterns.items():
            if matched := pattern.fullmatch(old):
                used.add(pattern)
                new = _filled(name, matched.groups())
                break
        if new in found:
            raise ConfigError(f"init.map gives '{found[new]}' and '{old}' the same name, '{new}'")
        found[new] = old
    for pattern, rule in zip(patterns, rules, strict=True):
        if pattern not in used:
            matching(names, rule, "init.map", "tensor not matched by an earlier rule")
    return found


def match(
    own: Mapping[str, Tensor],
    theirs: Mapping[str, Tensor],
    names: Mapping[str, str],
    only: Sequence[str],
    skip: Sequence[str],
) -> Match:
    """Match a model's tensors with a source's.

    Args:
        own: the model's tensors by name; tied ones are the same object.
        theirs: the source's tensors by name.
        names: new name of each of them to its old one.
        only: patterns of names to load; empty: all.
        skip: patterns of names not to load.

    Raises:
        ConfigError: a pattern matches no name of either side.
    """
    every = dict.fromkeys((*own, *names))
    chosen = set(every)
    if only:
        chosen = {name for pattern in only for name in matching(every, pattern, "init.only")}
    for pattern in skip:
        chosen -= set(matching(every, pattern, "init.skip"))
    taken, unlike = dict[str, str](), dict[str, str]()
    for name in (name for name in own if name in names and name in chosen):
        if how := _difference(own[name], theirs[names[name]]):
            unlike[name] = how
        else:
            taken[name] = names[name]
    filled = {id(own[name]) for name in taken}
    missing = (n for n in own if n in chosen and n not in names and id(own[n]) not in filled)
    unexpected = (name for name in names if name in chosen and name not in own)
    return Match(taken, tuple(missing), tuple(unexpected), unlike)


def _difference(own: Tensor, theirs: Tensor) -> str:
    if not is_lazy(own) and own.shape != theirs.shape:
        return f"{tuple(theirs.shape)}, not {tuple(own.shape)}"
    kinds = [t.is_complex() * 2 + t.is_floating_point() for t in (own, theirs)]
    return f"{theirs.dtype}, not {own.dtype}" if len({*kinds}) > 1 else ""


def _as_regex(pattern: str) -> str:
    signs = {"*": "(.*)", "?": "."}
    return "".join(signs.get(sign) or re.escape(sign) for sign in pattern)


def _filled(name: str, parts: Sequence[str]) -> str:
    pieces = name.split("*")
    filled = [piece + part for piece, part in zip(pieces, (*parts, ""), strict=False)]
    return "".join(filled[: len(pieces) - 1]) + pieces[-1]


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:SHOWN]) + (", ..." if len(names) > SHOWN else "")
