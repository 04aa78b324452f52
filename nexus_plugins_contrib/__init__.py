"""Plugins that need a third-party package: install the extra of the same name."""
