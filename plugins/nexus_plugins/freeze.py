"""Freezes parameters for part of the run, then unfreezes them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import ConfigDict, Field
from torch import nn

from nexus_core import ConfigError, IntervalField, Plugin, PluginConfig, hookimpl
from nexus_core.signatures import Lax
from nexus_plugins._shared.parameters import matching

if TYPE_CHECKING:
    from nexus_core import Engine, TrainState

__all__ = ["FreezeConfig", "FreezePlugin", "FreezeRule"]

_EXAMPLE: Any = {"rules": [{"match": "embedding*", "until": "2 epochs"}]}


class FreezeRule(PluginConfig):
    """What is frozen, and when."""

    match: str = Field(description="glob pattern of parameter names: 'encoder.*'")
    start: IntervalField | None = Field(
        default=None, description="when to freeze; null: from the start"
    )
    until: IntervalField | None = Field(default=None, description="when to unfreeze; null: never")
    statistics: bool = Field(
        default=True,
        description="also freeze running statistics, by keeping batch norms with frozen "
        "parameters in evaluation mode",
    )


class FreezeConfig(PluginConfig):
    """Settings of freezing by schedule."""

    model_config = ConfigDict(json_schema_extra={"examples": [_EXAMPLE]})
    rules: Lax[tuple[FreezeRule, ...]] = Field(
        min_length=1,
        description="rules, each with a pattern; a parameter is frozen if any rule freezes it",
    )


class FreezePlugin(Plugin[FreezeConfig]):
    """Freezes parameters for part of the run, and trains them afterwards.

    They stay in the optimizer, get no gradient, no update and no weight decay, and cost
    no backward pass below the lowest trained layer. What was frozen before the run stays frozen.
    When a rule applies is a function of the run's progress, so nothing is saved.
    """

    config_class = FreezeConfig
    api_version: ClassVar[str] = "1.2"

    def __post_init__(self) -> None:
        self._named: dict[str, nn.Parameter] = {}
        self._modules: dict[str, nn.Module] = {}
        self._matched: list[tuple[FreezeRule, list[str]]] = []
        self._frozen: set[str] = set()
        self._still: set[str] = set()  # the modules whose statistics are frozen

    @hookimpl(stage="claim")
    def on_start(self, engine: Engine) -> None:
        """Match the rules against the parameters and freeze what is due.

        Raises:
            ConfigError: a rule matches nothing, freezes every parameter, or covers only part of a
                run with several processes.
        """
        self._named = {n: p for n, p in engine.model.named_parameters() if p.requires_grad}
        self._modules = dict(engine.model.named_modules())
        key, rules = f"{self.name}.rules", self.config.rules
        self._matched = [(rule, matching(self._named, rule.match, key)) for rule in rules]
        changing = [rule.match for rule in rules if rule.start or rule.until]
        if changing and engine.ranks.size > 1:
            raise ConfigError(
                f"{key}: '{changing[0]}' is frozen for part of the run, but distributed training "
                "fixes at its start which gradients are reduced; remove start and until, or train "
                "in one process"
            )
        self._apply(engine)

    @hookimpl
    def on_step_end(self, engine: Engine) -> None:
        """Freeze and unfreeze what is due at the next step."""
        self._apply(engine)

    @hookimpl
    def on_close(self) -> None:
        """Unfreeze everything that the plugin froze."""
        self._set(set(), set())

    def _apply(self, engine: Engine) -> None:
        now = [(rule, names) for rule, names in self._matched if _acts(rule, engine.state)]
        frozen = {name for _, names in now for name in names}
        if frozen == self._named.keys():
            raise ConfigError(
                f"{self.name}: every trainable parameter is frozen at step "
                f"{engine.state.step}; freeze fewer"
            )
        holders = {n.rpartition(".")[0] for rule, names in now if rule.statistics for n in names}
        self._set(frozen, {name for name in holders if _keeps_statistics(self._modules[name])})

    def _set(self, frozen: set[str], still: set[str]) -> None:
        for name in self._frozen ^ frozen:
            self._named[name].requires_grad_(name not in frozen)
        for name in self._still ^ still:
            self._modules[name].train(name not in still)
        self._frozen, self._still = frozen, still


def _acts(rule: FreezeRule, state: TrainState) -> bool:
    begun = rule.start is None or rule.start.reached(state)
    return begun and not (rule.until is not None and rule.until.reached(state))


def _keeps_statistics(module: nn.Module) -> bool:
    """Whether it is a module such as batch norm: it has buffers and no submodules."""
    return any(True for _ in module.buffers(recurse=False)) and not list(module.children())
