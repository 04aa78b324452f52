"""The checkpoint folder format, shared by everything that writes or reads one.

| module | content |
|---|---|
| `store` | the folder of a run's checkpoints: names, retention, leftovers |
| `folder` | one checkpoint: written atomically, read only if every hash matches |
| `tensorfile` | safetensors, hashed in the same pass that reads or writes them |
| `shards` | sharded tensors, written and read by all ranks together |
| `weights` | the model's tensors by name, from a checkpoint |
"""
