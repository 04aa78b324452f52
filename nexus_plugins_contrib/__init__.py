"""Plugins that need another vendor's package: install the extra of the same name."""
