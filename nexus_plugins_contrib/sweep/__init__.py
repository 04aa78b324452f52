"""`nexus-run sweep`: search settings with Optuna, each trial an ordinary run."""
