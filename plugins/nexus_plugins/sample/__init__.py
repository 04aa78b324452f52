"""Generate text: at each evaluation of a run, or from a run folder.

`plugin` generates at evaluations; `writing` continues ids with any model; `rebuilt` rebuilds the
model of a run without its data; `command` and `chat_command` are `nexus-run generate` and
`nexus-run chat`.
"""

from __future__ import annotations

from nexus_plugins.sample.plugin import SampleConfig, SamplePlugin

__all__ = ["SampleConfig", "SamplePlugin"]
