"""First-party plugins of the NEXUS trainer: one file, one plugin."""
