"""Shows progress: `plugin` the bar and lines, `words` their text, `notebook` the notebook's bar,
`above` what a program prints meanwhile.
"""

from nexus_plugins.console.plugin import ConsoleConfig, ConsolePlugin

__all__ = ["ConsoleConfig", "ConsolePlugin"]
