"""Muon for the hidden matrices, AdamW for the rest.

| module | content |
|---|---|
| `plugin` | chooses what Muon trains, and builds the optimizer |
| `muon` | the optimizers |
"""

from nexus_plugins.optim_muon.muon import Muon, MuonAndAdamw
from nexus_plugins.optim_muon.plugin import OptimMuonConfig, OptimMuonPlugin

__all__ = ["Muon", "MuonAndAdamw", "OptimMuonConfig", "OptimMuonPlugin"]
