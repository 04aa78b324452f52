"""Tasks that each need one module of the model; every file except `task.py` defines one `TASK`."""
