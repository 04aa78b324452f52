"""Settings of sharded data-parallel training."""

from __future__ import annotations

from typing import Literal, TypeAlias

from pydantic import Field

from nexus_core.bases.parallel import ParallelConfig
from nexus_core.signatures import Several

__all__ = ["FsdpConfig", "Precision"]

Precision: TypeAlias = Literal["fp32", "bf16", "fp16"]


class FsdpConfig(ParallelConfig):
    """Settings of sharded data-parallel training."""

    match: Several[str] = Field(
        default=(),
        description="patterns of names of modules whose weights are gathered together, one module "
        "at a time; none: the members of every ModuleList",
    )
    methods: Several[str] = Field(
        default=("hidden",),
        description="methods that run the model, besides forward; missing ones are skipped",
    )
    compute_dtype: Precision | None = Field(
        default=None, description="dtype of weights during computation; null: as stored"
    )
    reduce_dtype: Precision | None = Field(
        default=None,
        description="dtype in which gradients are summed; null: that of the computation",
    )
    sum: Literal["tree", "ring"] | None = Field(
        default=None,
        description="how gradients are summed: ring, as the backend does, so the last bits depend "
        "on the number of processes; tree, in the order of the run's cells; null: "
        "tree in a run in cells",
    )
    reshard: bool = Field(
        default=True, description="free a module's weights between forward and backward pass"
    )
    reduce_at_end: bool = Field(
        default=False,
        description="reduce gradients only with the last micro-batch of a step: less traffic, but "
        "memory for a full gradient",
    )
    offload: bool = Field(
        default=False, description="keep weights, gradients and optimizer states in CPU memory"
    )
    build_once: bool = Field(
        default=True,
        description="initialize weights only on rank 0; the others receive their shards, and "
        "never hold a whole model",
    )
