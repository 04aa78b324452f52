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
        "after another; none: the members of every ModuleList",
    )
    methods: tuple[str, ...] = Field(
        ("hidden",),
        description="methods by which the model is run, besides forward; those that it does not "
        "have are passed over",
    )
    compute_dtype: Precision | None = Field(
        None, description="of weights while they are computed with; null: as they are kept"
    )
    reduce_dtype: Precision | None = Field(
        None, description="in which gradients are summed; null: that of the computation"
    )
    sum: Literal["tree", "ring"] | None = Field(
        None,
        description="how gradients are added: ring, as the backend does, so that the number of "
        "processes changes the last bits; tree, in the order of the run's cells; null: tree in a "
        "run in cells",
    )
    reshard: bool = Field(
        True, description="free a module's weights between its forward and its backward pass"
    )
    reduce_at_end: bool = Field(
        False,
        description="sum gradients with the last micro-batch of a step alone: less traffic, and "
        "memory for a whole gradient",
    )
    offload: bool = Field(
        False, description="keep weights, gradients and optimizer states in host memory"
    )
    build_once: bool = Field(
        True,
        description="only the main process computes first weights; the others get their parts of "
        "them, and never hold a whole model",
    )
