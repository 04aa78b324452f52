"""Shows how a run goes: `plugin` is the bar and the lines, `words` what they say."""

from nexus_plugins.console.plugin import ConsoleConfig, ConsolePlugin

__all__ = ["ConsoleConfig", "ConsolePlugin"]
