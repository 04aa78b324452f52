"""Crash-safe checkpoints: each is complete, verified by hash, and never executed.

| module | what it knows |
|---|---|
| `plugin` | when to save, what to resume from |
| `course` | which checkpoint a run was resumed from, until its first own save |
| `codec` | trees of Python values as JSON and tensors |
| `storable` | finds what cannot be stored, at the first step |
| `hostcopy` | the host copy that lets training continue while a thread writes |
| `writer` | that thread |
| `peers` | what each rank adds to a checkpoint, and takes from it |
| `lock` | which plugins, versions and settings wrote a checkpoint, and how this run differs |
| `export` | exports only the model, for other programs |
| `validate` | validates a snapshot before anything is restored from it |
| `optimizer` | matches a saved optimizer state to this run's optimizer and settings |
| `kinds` | the types of values in a plugin's state |

The on-disk format is in `nexus_plugins._shared.checkpoints`.
"""

from __future__ import annotations

from nexus_plugins.checkpoint.plugin import CheckpointConfig, CheckpointPlugin

__all__ = ["CheckpointConfig", "CheckpointPlugin"]
