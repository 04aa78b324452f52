"""`nexus-run export --to hf`: export a run's model as a folder that transformers loads."""

from nexus_plugins_contrib.export_hf.export import export

__all__ = ["export"]
