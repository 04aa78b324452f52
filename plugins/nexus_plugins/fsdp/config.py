"""Settings of sharded data-parallel training."""

from __future__ import annotations

from typing import Literal, TypeAlias

from pydantic import Field

from nexus_core.bases.parallel import ParallelConfig

__all__ = ["FsdpConfig", "Precision"]

Precision: TypeAlias = Literal["fp32", "bf16", "fp16"]


class FsdpConfig(ParallelConfig):
    """Settings of sharded data-parallel training."""

    match: tuple[str, ...] = Field(
        (),
        description="patterns of names of modules whose weights are gathered together, one module "
        "at a time; none: the members of every ModuleList",
    )
    methods: tuple[str, ...] = Field(
        ("hidden",),
        description="methods that run the model, besides forward; missing ones are skipped",
    )
    compute_dtype: Precision | None = Field(
        None, description="dtype of weights during computation; null: as stored"
    )
    reduce_dtype: Precision | None = Field(
        None, description="dtype in which gradients are summed; null: that of the computation"
    )
    sum: Literal["tree", "ring"] | None = Field(
        None,
        description="how gradients are summed: ring, as the backend does, so the last bits depend "
        "on the number of processes; tree, in the order of the run's cells; null: "
        "tree in a run in cells",
    )
    reshard: bool = Field(
        True, description="free a module's weights between forward and backward pass"
    )
    reduce_at_end: bool = Field(
        False,
        description="reduce gradients only with the last micro-batch of a step: less traffic, but "
        "memory for a full gradient",
    )
    offload: bool = Field(
        False, description="keep weights, gradients and optimizer states in CPU memory"
    )
    build_once: bool = Field(
        True,
        description="initialize weights only on rank 0; the others receive their shards, and "
        "never hold a whole model",
    )
