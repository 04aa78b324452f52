"""Text that a model writes: at each evaluation of a run, and from a run that lies in a folder.

`plugin` writes at evaluations; `writing` continues ids with any model; `rebuilt` builds the model
of a run again, without its data; `command` and `chat_command` are `nexus-run generate` and
`nexus-run chat`.
"""

from __future__ import annotations

from nexus_plugins.sample.plugin import SampleConfig, SamplePlugin

__all__ = ["SampleConfig", "SamplePlugin"]
