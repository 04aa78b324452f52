"""The folder of a checkpoint, for all that write, resume from or take weights out of one.

| module | what it knows |
|---|---|
| `store` | the folder of a run's checkpoints: names, retention, leftovers |
| `folder` | one checkpoint: written whole or not at all, read only if every hash holds |
| `tensorfile` | safetensors, hashed in the same pass that reads or writes them |
| `shards` | tensors of which each process holds a part, written and read by all together |
| `weights` | the model's tensors by name, out of a checkpoint |
"""
