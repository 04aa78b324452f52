"""The modules that a config enables."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import nn

from nexus_plugins.model_nexus.causal import CausalModule
from nexus_plugins.model_nexus.classic_causal import ClassicCausal
from nexus_plugins.model_nexus.classic_energy import ClassicEnergyModule
from nexus_plugins.model_nexus.classic_reasoning import ClassicReasoner
from nexus_plugins.model_nexus.classic_world import ClassicWorldModel
from nexus_plugins.model_nexus.energy import EnergyModule
from nexus_plugins.model_nexus.reasoning import Reasoner
from nexus_plugins.model_nexus.world import RememberingWorldModel, WorldModel

if TYPE_CHECKING:
    from nexus_plugins.model_nexus.config import NEXUSConfig
    from nexus_plugins.model_nexus.residual import Part

__all__ = ["make_parts"]


def _world(config: NEXUSConfig) -> Part:
    sizes = (config.d_model, config.d_latent, config.world_levels)
    if config.classic:
        return ClassicWorldModel(*sizes)
    extent = (*sizes, config.world_heads, config.world_stride)
    return (
        RememberingWorldModel(*extent, config.world_memory, config.ssm_chunk_length)
        if config.world_memory
        else WorldModel(*extent)
    )


def make_parts(config: NEXUSConfig) -> nn.ModuleDict:
    """The modules on the backbone; each reads its states and writes a gated update."""
    width, parts = config.d_model, nn.ModuleDict()
    if config.world:
        parts["world"] = _world(config)
    if config.reason:
        rules = (config.n_rules, config.reasoning_steps)
        parts["reason"] = (
            ClassicReasoner(width, config.n_predicates, *rules)
            if config.classic
            else Reasoner(width, *rules, config.reason_window, config.window_head_dim)
        )
    if config.energy:
        sizes = (width, config.d_code, config.n_memories)
        limits = (config.max_energy_iters, config.energy_threshold)
        parts["energy"] = (
            ClassicEnergyModule(*sizes, *limits)
            if config.classic
            else EnergyModule(*sizes, *limits, config.energy_window)
        )
    if config.causal and config.classic:
        parts["causal"] = ClassicCausal(width, config.n_variables)
    elif config.causal:
        names = config.variable_names or config.n_variables
        parts["causal"] = CausalModule(width, names, config.mechanism_units)
    return parts
