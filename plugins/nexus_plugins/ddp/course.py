"""Plan how a rank adds up its cells of a step in tree order, with few buffers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from nexus_core.cells import Node, owned
from nexus_core.processes import Ranks
from nexus_plugins._shared.cell_sums import Nodes, nodes_of

__all__ = ["Course", "Move", "course_of"]


@dataclass(frozen=True)
class Move:
    """What to do with a cell's gradient.

    Args:
        slot: the slot that it is added to.
        is_first: whether the slot is still empty.
        merges: pairs of slots to add up afterwards, the second into the first.
    """

    slot: int
    is_first: bool
    merges: tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class Course:
    """The plan by which a rank adds up its cells in tree order, with few slots.

    Args:
        moves: one per cell of the rank.
        rows: the final slot of each complete subtree.
        slots: number of slots needed.
        nodes: the subtrees of all ranks.
    """

    moves: dict[int, Move]
    rows: dict[Node, int]
    slots: int
    nodes: Nodes


def course_of(of: Sequence[int], count: int, ranks: Ranks) -> Course:
    """The plan for a step.

    Args:
        of: the number of cells in each of its batches.
        count: the number of cells in a full batch.
        ranks: the ranks of the run.
    """
    cells, parts, free, used = sum(of), dict[Node, int](), list[int](), 0
    moves = {}
    for cell in owned(of, count, ranks.rank, ranks.size):
        level, place, merges = 0, cell, list[tuple[int, int]]()
        slot = parts.pop((0, cell - 1), None) if cell % 2 else None
        is_first = slot is None
        if slot is None:
            slot = free.pop() if free else used
            used = max(used, slot + 1)
        else:
            level, place = 1, cell // 2
        first = slot
        while 1 << level < cells:
            left, is_alone = (level, place - 1), place + 1 << level >= cells
            if place % 2 and left in parts:
                other = parts.pop(left)
                merges.append((other, slot))
                free.append(slot)
                slot = other
            elif place % 2 or not is_alone:
                break
            level, place = level + 1, place // 2
        parts[level, place] = slot
        moves[cell] = Move(first, is_first, tuple(merges))
    return Course(moves, parts, max(used, 1), nodes_of(of, count, ranks.size))
