"""Shows how a run goes: `plugin` the bar and the lines, `words` their text, `notebook` its bar."""

from nexus_plugins.console.plugin import ConsoleConfig, ConsolePlugin

__all__ = ["ConsoleConfig", "ConsolePlugin"]
