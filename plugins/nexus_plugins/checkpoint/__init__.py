"""Checkpoints that survive anything: what is in a folder is whole, verified, and never executed.

| module | what it knows |
|---|---|
| `plugin` | when to save, what to resume from |
| `course` | which checkpoint a run was resumed from, until it has saved by itself |
| `codec` | trees of Python values as JSON and tensors |
| `storable` | what cannot be stored, found at the first step |
| `hostcopy` | the copy that lets the loop continue while a thread writes |
| `writer` | that thread |
| `peers` | what several processes add to a checkpoint, and each takes from it |
| `lock` | which plugins, versions and settings wrote a checkpoint, and how this run differs |
| `export` | the model alone, for other programs |
| `validate` | the shape that a snapshot must have before anything is restored from it |
| `optimizer` | whose state an optimizer takes over, and which settings are this run's |
| `kinds` | the kinds of values in a plugin's state |

What a checkpoint is on the disk is in `nexus_plugins._shared.checkpoints`.
"""

from __future__ import annotations

from nexus_plugins.checkpoint.plugin import CheckpointConfig, CheckpointPlugin

__all__ = ["CheckpointConfig", "CheckpointPlugin"]
