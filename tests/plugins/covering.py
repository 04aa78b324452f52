"""Groups in which all pairs of names meet: a tenth of the runs of one for each pair."""

from __future__ import annotations

from collections.abc import Callable, Iterable

SIZE = 8
"""Names in a group: more save little, and one could hide what another does."""


def covering(
    pairs: Iterable[frozenset[str]], fits: Callable[[frozenset[str]], bool]
) -> list[frozenset[str]]:
    """Groups of at most `SIZE` names that fit; each pair that fits is in at least one."""
    partners: dict[str, set[str]] = {}
    for one, other in map(sorted, filter(fits, pairs)):
        partners.setdefault(one, set()).add(other)
        partners.setdefault(other, set()).add(one)
    groups = []
    while any(partners.values()):
        group = {max(partners, key=lambda name: len(partners[name]))}
        while len(group) < SIZE:
            met = {name: len(partners[name] & group) for name in partners.keys() - group}
            more = [name for name in met if met[name] and fits(frozenset({*group, name}))]
            if not more:
                break
            group.add(max(more, key=lambda name: (met[name], len(partners[name]), name)))
        for name in group:
            partners[name] -= group
        groups.append(frozenset(group))
    return groups
