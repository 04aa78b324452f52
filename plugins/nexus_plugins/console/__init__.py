"""Shows progress: `plugin` the bar and lines, `words` their text, `notebook` the notebook's bar."""

from nexus_plugins.console.plugin import ConsoleConfig, ConsolePlugin

__all__ = ["ConsoleConfig", "ConsolePlugin"]
