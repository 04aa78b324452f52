"""Each module of NEXUS on a puzzle of its own: what the preset `modules` trains on, and shows."""
