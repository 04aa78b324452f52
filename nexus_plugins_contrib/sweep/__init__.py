"""`nexus-run sweep`: settings searched by Optuna, each trial an ordinary run."""
