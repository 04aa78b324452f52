"""Tasks that each need one module of the model; every file but `task.py` holds one `TASK`."""
