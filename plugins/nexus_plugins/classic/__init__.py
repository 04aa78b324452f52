"""The classic API: one config object, one trainer, two loaders, on top of the engine."""

from __future__ import annotations

from nexus_plugins.classic.config import TrainingConfig
from nexus_plugins.classic.data import NEXUSCollator, NEXUSDataset, create_dataloader
from nexus_plugins.classic.trainer import NEXUSTrainer

__all__ = ["NEXUSCollator", "NEXUSDataset", "NEXUSTrainer", "TrainingConfig", "create_dataloader"]
