"""What each rank contributes to a checkpoint, and restores from it."""

from __future__ import annotations

from typing import Any, cast

from nexus_core.bases.parallel import own_seed
from nexus_core.device import RandomState, random_state, seed_everything
from nexus_core.errors import CheckpointError
from nexus_core.holders import Held
from nexus_core.meter import added
from nexus_core.processes import Ranks, gather
from nexus_core.snapshot import Snapshot

__all__ = ["check_same_step", "own_share", "with_peers"]


def with_peers(snapshot: Snapshot, ranks: Ranks) -> Snapshot:
    """Add the state of the other ranks: generators, data positions, sums not yet logged.

    Args:
        snapshot: this rank's snapshot; every rank must call this at the same step.
        ranks: this process's rank.

    Returns:
        The same snapshot; on rank 0 it covers all ranks.
    """
    if ranks.size == 1:
        return snapshot
    data = snapshot.get("data")
    place = data and data["loader"]
    everyone = gather(ranks, (snapshot["random"], snapshot["pending"], place))
    random = {**snapshot["random"], "peers": [generators for generators, _, _ in everyone[1:]]}
    snapshot["random"] = cast(RandomState, random)
    if data is not None and place is not None:
        snapshot["data"] = {**data, "peers": [cast(Held, other) for _, _, other in everyone[1:]]}
    snapshot["pending"] = added([pending for _, pending, _ in everyone])
    return snapshot


def own_share(snapshot: Snapshot, ranks: Ranks, seed: int) -> Snapshot:
    """What this rank restores from a checkpoint, however many ranks wrote it.

    The sums not yet logged go to rank 0. A rank without a counterpart gets generators derived from
    seed, rank and step.
    """
    random = dict(cast(dict[str, Any], snapshot["random"]))
    peers: list[RandomState] = random.pop("peers", [])
    if not ranks.is_main:
        snapshot["pending"] = {name: [0.0, 0.0] for name in snapshot["pending"]}
        if ranks.rank <= len(peers):
            random = dict(peers[ranks.rank - 1])
        else:
            seed_everything(own_seed(seed, ranks) + int(snapshot["train"]["step"]))
            random = dict(random_state())
    snapshot["random"] = cast(RandomState, random)
    return snapshot


def check_same_step(step: int, ranks: Ranks) -> None:
    """Raise an error if the ranks found different checkpoints.

    Raises:
        CheckpointError: they did; the message lists what each found.
    """
    steps = gather(ranks, step)
    if len(set(steps)) > 1:
        found = ", ".join(f"rank {rank} step {step}" for rank, step in enumerate(steps))
        raise CheckpointError(
            f"the processes found checkpoints of different steps: {found}; the run folder must "
            "be on a file system shared by all machines"
        )
