"""The NEXUS model as a plugin: `NEXUSCore` on selective state-space layers."""

from __future__ import annotations

from nexus_plugins.model_nexus.nexus import NEXUSConfig, NEXUSCore, NEXUSOutput
from nexus_plugins.model_nexus.plugin import ModelNexusConfig, ModelNexusPlugin

__all__ = ["ModelNexusConfig", "ModelNexusPlugin", "NEXUSConfig", "NEXUSCore", "NEXUSOutput"]
