"""The checkpoint folder format, for everything that writes, resumes from or reads weights of one.

| module | what it knows |
|---|---|
| `store` | the folder of a run's checkpoints: names, retention, leftovers |
| `folder` | one checkpoint: written whole or not at all, read only if every hash holds |
| `tensorfile` | safetensors, hashed in the same pass that reads or writes them |
| `shards` | tensors of which each process holds a part, written and read by all together |
| `weights` | the model's tensors by name, out of a checkpoint |
"""
