"""Compiles the model with `torch.compile`."""

from __future__ import annotations

import shutil
from collections.abc import Generator
from contextlib import ExitStack, nullcontext
from inspect import ismethod
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self

import torch
from pydantic import ConfigDict, Field, model_validator
from torch import nn
from torch._functorch import config as functorch_config

from nexus_core import ConfigError, Plugin, PluginConfig, hookimpl
from nexus_core.signatures import Several
from nexus_plugins._shared.parameters import blocks
from nexus_plugins._shared.process_setting import ProcessSetting
from nexus_plugins.compile.graphs import StepGraphs

if TYPE_CHECKING:
    from nexus_core import Engine, Step

__all__ = ["CompileConfig", "CompilePlugin"]

COMPILERS = ("c++", "g++", "clang++")
DONATED = ProcessSetting(
    "functorch's donated_buffer",
    lambda: functorch_config.donated_buffer,
    lambda value: setattr(functorch_config, "donated_buffer", value),
)
"""Whether compiled code may reuse what it saved; not where a step goes backward once a term."""


class CompileConfig(PluginConfig):
    """Settings of compilation."""

    model_config = ConfigDict(json_schema_extra={"examples": [{"backend": "aot_eager"}]})
    match: Several[str] = Field(
        default=(),
        description="patterns of names of modules to compile separately; none: the members of "
        "every ModuleList, otherwise the whole model",
    )
    whole: bool = Field(
        default=False,
        description="compile the model as a whole: faster steps, but minutes of startup",
    )
    methods: Several[str] = Field(
        default=("hidden",),
        description="with `whole`: methods that run the model, besides forward; missing ones are "
        "skipped",
    )
    mode: Literal["default", "reduce-overhead", "max-autotune"] = Field(
        default="default", description="mode of torch.compile"
    )
    backend: str = Field(
        default="inductor", description="backend; see `torch.compiler.list_backends()`"
    )
    dynamic: bool | None = Field(
        default=None, description="whether shapes may vary; null: from the second shape on"
    )
    fullgraph: bool = Field(default=False, description="treat graph breaks as errors")
    step_graph: bool = Field(
        default=False,
        description="CUDA: replay the gradient of a step (forward, losses, backward) and the "
        "update from CUDA graphs, if nothing in them needs the host",
    )

    @model_validator(mode="after")
    def _chooses_once(self) -> Self:
        if self.whole and self.match:
            raise ValueError("match selects modules, and whole compiles all of them; set only one")
        if self.step_graph and self.mode != "default":
            raise ValueError(f"mode={self.mode} makes its own graphs; leave out step_graph")
        return self


class CompilePlugin(Plugin[CompileConfig]):
    """Runs the model compiled, in training and evaluation.

    Repeated blocks are compiled once and reused, so startup takes seconds instead of minutes;
    `whole` takes minutes, and also optimizes across blocks. Parameter names and `state_dict` do not
    change, and the model is restored at the end. Rounding may differ from eager code; a resumed run
    is bitwise identical to an uninterrupted one. Compiled code is cached on disk by PyTorch for the
    next run. `compile/graphs` and `compile/graph_breaks` are logged.

    Source: Ansel et al. 2024, "PyTorch 2".
    """

    config_class = CompileConfig
    api_version: ClassVar[str] = "1.2"
    _compiled: list[nn.Module]
    _methods_before: dict[str, object]
    _graphs: StepGraphs | None = None

    def __post_init__(self) -> None:
        self._compiled, self._methods_before = [], {}
        self._held = ExitStack()

    @hookimpl(stage="compile")
    def on_start(self, engine: Engine) -> None:
        """Set up the modules to be compiled on their first call.

        Raises:
            ConfigError: a pattern matches nothing, or the backend does not exist.
        """
        self._check_backend(engine.device)
        self._graphs = StepGraphs(engine) if self.config.step_graph else None
        self._compiled = self._chosen(engine.model)
        self._held.callback(DONATED.hold(False))
        options: dict[str, Any] = {
            "mode": None if self.config.mode == "default" else self.config.mode,
            "backend": self.config.backend,
            "dynamic": self.config.dynamic,
            "fullgraph": self.config.fullgraph,
        }
        for module in self._compiled:
            module.compile(**options)
        for name in self._methods(engine.model):
            self._methods_before[name] = vars(engine.model).get(name)
            setattr(engine.model, name, torch.compile(getattr(engine.model, name), **options))

    @hookimpl
    def accumulate_gradient(self, engine: Engine, step: Step) -> bool | None:
        """Replay the gradient of a step from a graph, if configured."""
        if self._graphs is None:
            return None
        self._graphs.accumulate(engine, step)
        return True

    @hookimpl(wrapper=True)
    def optimizer_step(self, engine: Engine, step: Step) -> Generator[None, bool, bool]:
        """Replay the update from a graph too, if possible."""
        with self._graphs.updating(engine, step) if self._graphs is not None else nullcontext():
            return (yield)

    @hookimpl
    def on_load(self, engine: Engine) -> None:
        """Discard captured graphs: weights may have moved."""
        self._graphs = StepGraphs(engine) if self._graphs is not None else None

    @hookimpl
    def on_close(self, engine: Engine) -> None:
        """Restore the model and PyTorch's setting."""
        self._held.close()
        self._graphs = None
        for module in self._compiled:
            module._compiled_call_impl = None
        self._compiled = []
        for name, before in self._methods_before.items():
            delattr(engine.model, name)
            if before is not None:
                setattr(engine.model, name, before)
        self._methods_before = {}

    @hookimpl
    def collect_metrics(self) -> dict[str, float]:
        """The number of graphs and graph breaks."""
        from torch._dynamo.utils import counters  # slow to import, and there by now

        graphs = self._graphs
        replayed = (graphs.replayed, graphs.replayed_updates) if graphs is not None else (0, 0)
        names = ("compile/replayed_steps", "compile/replayed_updates")
        return {
            **(
                dict(zip(names, map(float, replayed), strict=True))
                if self.config.step_graph
                else {}
            ),
            "compile/graphs": float(counters["stats"]["unique_graphs"]),
            "compile/graph_breaks": float(sum(counters["graph_break"].values())),
        }

    def _methods(self, model: nn.Module) -> list[str]:
        names = self.config.methods if self.config.whole else ()
        return [name for name in names if ismethod(getattr(model, name, None))]

    def _chosen(self, model: nn.Module) -> list[nn.Module]:
        if self.config.whole:
            return [model]
        chosen = blocks(model, self.config.match, "compile.match")
        return list(chosen.values()) or [model]

    def _check_backend(self, device: torch.device) -> None:
        backend = self.config.backend
        known = torch.compiler.list_backends(exclude_tags=())
        if backend not in known:
            raise ConfigError(
                f"compile.backend is '{backend}', which is not available; known: {', '.join(known)}"
            )
        if backend == "inductor" and device.type == "cpu" and not any(map(shutil.which, COMPILERS)):
            raise ConfigError(
                "compile needs a C++ compiler on the CPU, and none was found in PATH; install "
                "one (apt install g++, xcode-select --install), or remove compile"
            )
