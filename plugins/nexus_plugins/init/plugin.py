"""Starts from existing weights: fine-tuning, transfer, a new run from an old model."""

from __future__ import annotations

import warnings
from collections.abc import Generator, Mapping
from typing import TYPE_CHECKING, Any, ClassVar, cast

import torch
from pydantic import ConfigDict, Field, field_validator
from torch import Tensor, nn

from nexus_core.errors import CheckpointError, hint_set
from nexus_core.paths import PathField
from nexus_core.plugin import Plugin, PluginConfig, StateDict, hookimpl
from nexus_core.processes import is_sharded
from nexus_core.signatures import Several
from nexus_plugins._shared.checkpoints.shards import part_of
from nexus_plugins._shared.parameters import freeze
from nexus_plugins.init.match import Match, check_rule, match, renamed
from nexus_plugins.init.source import Weights, read_weights

if TYPE_CHECKING:
    from nexus_core.engine import Engine

__all__ = ["InitConfig", "InitPlugin"]


class InitConfig(PluginConfig):
    """Where the weights come from, which to load, and what must match."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [{"source": "runs/before/checkpoints/best", "skip": ["head.*"]}]
        }
    )

    source: PathField = Field(
        description="source: a run or checkpoint, an exported folder, a safetensors file or a "
        "folder of them, as from Hugging Face"
    )
    ema: bool = Field(
        default=False, description="use the checkpoint's averaged weights (plugin ema)"
    )
    strict: bool = Field(
        default=True,
        description="require every selected tensor in both model and source, with equal shapes; "
        "false: load what fits, and report the rest",
    )
    map: dict[str, str] = Field(
        default={},
        description="renames tensors of the source: a pattern to a name, in which each * stands "
        "for what the pattern's * matched; the first match applies",
    )
    only: Several[str] = Field(default=(), description="patterns of names to load; none: all")
    skip: Several[str] = Field(default=(), description="patterns of names not to load")
    freeze: Several[str] = Field(
        default=(), description="patterns of names of parameters to freeze"
    )

    @field_validator("map")
    @classmethod
    def _rules(cls, rules: dict[str, str]) -> dict[str, str]:
        for pattern, name in rules.items():
            check_rule(pattern, name)
        return rules


class InitPlugin(Plugin[InitConfig]):
    """Starts a run with the weights of another run, an export or a Hugging Face folder.

    The weights are loaded when the run starts, before anything copies them; a resumed run keeps its
    own. Only safetensors are read, links are not followed, and nothing is executed.
    """

    config_class = InitConfig
    api_version: ClassVar[str] = "1.2"

    def __post_init__(self) -> None:
        self._taken: int | None = None  # number of tensors loaded
        self._note: str | None = None  # until the loggers are open

    @hookimpl(wrapper=True)
    def make_model(self, engine: Engine) -> Generator[None, nn.Module, nn.Module]:
        """Freeze the configured parameters before the optimizer is built."""
        model = yield
        freeze(model, self.config.freeze, f"{self.name}.freeze")
        return model

    @hookimpl
    def on_build(self, engine: Engine) -> None:
        """Freeze the same parameters in a model passed by the program."""
        freeze(engine.model, self.config.freeze, f"{self.name}.freeze")

    @hookimpl(stage="claim")
    def on_start(self, engine: Engine) -> None:
        """Load the weights, unless the run is resumed.

        Raises:
            ConfigError: there are none, or a pattern matches nothing.
            CheckpointError: they are damaged, or do not fit the model.
        """
        if self._taken is not None or engine.state.step > 0:
            return
        weights = read_weights(self.config.source, ema=self.config.ema)
        own = tensors_of(engine.model)
        names = renamed(weights.tensors, self.config.map)
        found = match(own, weights.tensors, names, self.config.only, self.config.skip)
        self._check(found, weights)
        _fill(engine.model, own, {n: weights.tensors[old] for n, old in found.taken.items()})
        numbers = sum(weights.tensors[old].numel() for old in found.taken.values())
        self._taken = len({id(own[name]) for name in found.taken})  # tied weights count once
        taken = f"{self._taken} of {len({*map(id, own.values())})} tensors ({numbers:,} numbers)"
        self._note = "; ".join([f"{taken} from {weights.origin}", *found.faults()])
        if not found.is_whole and engine.ranks.is_main:
            warnings.warn(f"init: loaded {self._note}", RuntimeWarning, stacklevel=2)

    @hookimpl
    def on_step(self, engine: Engine) -> None:
        """Log what was loaded, once the loggers are open."""
        if self._note is not None:
            engine.hook.on_note(engine=engine, title="init", text=self._note)
            self._note = None

    @hookimpl
    def summarize(self) -> dict[str, str]:
        """Say which weights were loaded."""
        if self._taken is None:
            return {}
        return {"began with": f"{self._taken} tensors from {self.config.source}"}

    def state_dict(self) -> StateDict:
        """What was loaded, so that it is not loaded again."""
        return {} if self._taken is None else {"taken": self._taken}

    def load_state_dict(self, state: StateDict) -> None:
        """Restore that record."""
        self._taken = int(cast(int, state["taken"]))

    def _check(self, found: Match, weights: Weights) -> None:
        if found.taken and (found.is_whole or not self.config.strict):
            return
        some = ["; load what fits: ", hint_set("init.strict", False)] if found.taken else []
        rule = found.hint()
        raise CheckpointError(
            f"init: the weights of {weights.origin} do not fit the model: "
            f"{'; '.join(found.faults()) or 'none is selected'}; "
            f"{f'rename: {rule}' if rule else 'rename with init.map'}; skip names: ",
            hint_set("init.skip", ["head.*"]),
            *some,
        )


def tensors_of(model: nn.Module) -> dict[str, Tensor]:
    """The tensors of a model's state by name; tied parameters are one object."""
    state: Mapping[str, Any] = model.state_dict(keep_vars=True)
    return {name: tensor for name, tensor in state.items() if isinstance(tensor, Tensor)}


@torch.no_grad()
def _fill(model: nn.Module, own: Mapping[str, Tensor], given: Mapping[str, Tensor]) -> None:
    """Copy tensors into a model, or this rank's part of each.

    Raises:
        CheckpointError: two different tensors belong to tied weights.
    """
    first: dict[int, str] = {}
    for name, tensor in given.items():
        other = first.setdefault(id(own[name]), name)
        if other != name and not torch.equal(given[other], tensor):
            raise CheckpointError(
                f"init: '{other}' and '{name}' differ in the source, but are tied in the "
                "model; skip one: ",
                hint_set("init.skip", [name]),
            )
    parts = {n: part_of(t, own[n]) if is_sharded(own[n]) else t for n, t in given.items()}
    model.load_state_dict(parts, strict=False)
