"""Settings of data-parallel training."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from nexus_core.bases.parallel import ParallelConfig

__all__ = ["DdpConfig"]


class DdpConfig(ParallelConfig):
    """Settings of data-parallel training."""

    find_unused: bool | None = Field(
        default=None,
        description="search every step for parameters that the loss does not reach; null: only if "
        "the first step has some",
    )
    sum: Literal["tree", "ring"] | None = Field(
        default=None,
        description="how gradients are summed: ring, as the backend does, so the last bits depend "
        "on the number of processes; tree, in the order of the run's cells; null: "
        "tree in a run in cells, else ring",
    )
    bucket_mb: float = Field(
        default=25.0, gt=0, description="size of gradient buckets, in MiB; in cells the maximum"
    )
