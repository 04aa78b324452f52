"""The commands: nexus-run and nexus-plugins."""
