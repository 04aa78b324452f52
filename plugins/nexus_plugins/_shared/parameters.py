"""Parameter groups of optimizers: by pattern, weight decay, and frozen parameters."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from types import MappingProxyType
from typing import Any

from pydantic import Field
from torch import nn

from nexus_core.errors import ConfigError, suggestion
from nexus_core.plugin import PluginConfig
from nexus_core.signatures import Lax, Several

__all__ = [
    "GroupConfig",
    "OptimizerConfig",
    "blocks",
    "decaying",
    "freeze",
    "groups_of",
    "matching",
]

UNDECAYED_MODULES = (nn.Embedding, nn.EmbeddingBag, nn.LayerNorm, nn.RMSNorm)


class GroupConfig(PluginConfig):
    """Settings for the parameters whose names match a pattern."""

    match: str = Field(
        description="glob pattern of parameter names: '*.lm_head*' matches any lm_head"
    )
    lr: float | None = Field(
        default=None, ge=0, description="base learning rate; null: the shared one"
    )
    weight_decay: float | None = Field(
        default=None,
        ge=0,
        description="weight decay of all matching parameters; null: the shared one, on matrices "
        "only",
    )


class OptimizerConfig(PluginConfig):
    """Settings shared by every optimizer."""

    lr: float = Field(default=1e-4, gt=0, description="base learning rate")
    weight_decay: float = Field(
        default=0.01,
        ge=0,
        description="decoupled weight decay of matrices, per unit of learning rate",
    )
    groups: Lax[tuple[GroupConfig, ...]] = Field(
        default=(), description="parameter groups with their own settings; the first match applies"
    )
    freeze: Several[str] = Field(
        default=(), description="patterns of names of parameters to freeze"
    )
    base_width: int | None = Field(
        default=None,
        ge=1,
        description="width at which the learning rate was tuned: wider linear layers learn "
        "proportionally more slowly (muP); null: off",
    )


def matching(names: Iterable[str], pattern: str, key: str, what: str = "parameter") -> list[str]:
    """The names that match a pattern; a leading `*.` also matches at the root.

    Args:
        names: dotted names of parameters or modules.
        pattern: a glob: `*` matches anything (dots too), `?` one character, `[ab]` a choice.
        key: the setting that the pattern comes from, for the message.
        what: "parameter" or "module".

    Raises:
        ConfigError: none matches.
    """
    names = list(names)
    found = [
        name for name in names if fnmatchcase("." + name, pattern) or fnmatchcase(name, pattern)
    ]
    if not found:
        shown = ", ".join(names[:6]) + (", ..." if len(names) > 6 else "")
        raise ConfigError(
            f"{key}: the pattern '{pattern}' matches no {what}.{suggestion(pattern, names)} "
            f"Names: {shown or 'none'}; a pattern looks like '*.{names[0] if names else 'name'}'"
        )
    return found


def freeze(model: nn.Module, patterns: Iterable[str], key: str) -> None:
    """Freeze the parameters that match the patterns.

    Args:
        model: the model.
        patterns: as for `matching`.
        key: the setting that the patterns come from, for the message.

    Raises:
        ConfigError: a pattern matches no parameter.
    """
    names = [name for name, _ in model.named_parameters()]
    for pattern in patterns:
        for name in matching(names, pattern, key):
            model.get_parameter(name).requires_grad_(False)


def blocks(model: nn.Module, patterns: Sequence[str], key: str) -> dict[str, nn.Module]:
    """The modules of a model that match the patterns, by name, in the model's order.

    Args:
        model: the model; it does not match itself.
        patterns: as for `matching`; empty: the members of every ModuleList.
        key: the setting that the patterns come from, for the message.

    Raises:
        ConfigError: a pattern matches no module.
    """
    named = {name: module for name, module in model.named_modules() if name}
    if patterns:
        names = {n for pattern in patterns for n in matching(named, pattern, key, "module")}
        return {name: module for name, module in named.items() if name in names}
    lists = [module for module in named.values() if isinstance(module, nn.ModuleList)]
    members = {id(member) for members in lists for member in members}
    return {name: module for name, module in named.items() if id(module) in members}


def decaying(model: nn.Module) -> set[int]:
    """The `id` of each parameter to apply weight decay to: the matrices of linear layers.

    Excluded are parameters with fewer than two dimensions, biases, norms, embeddings (and heads
    tied to them), and parameters with an attribute `_no_weight_decay = True`.
    """
    spared = {
        id(parameter)
        for module in model.modules()
        if isinstance(module, UNDECAYED_MODULES)
        for parameter in module.parameters(recurse=False)
    }
    return {
        id(parameter)
        for name, parameter in model.named_parameters()
        if parameter.ndim >= 2
        and id(parameter) not in spared
        and not name.rpartition(".")[2].startswith("bias")
        and not getattr(parameter, "_no_weight_decay", False)
    }


def groups_of(
    model: nn.Module,
    config: OptimizerConfig,
    plugin: str,
    powers: Mapping[int, float] = MappingProxyType({}),
) -> list[dict[str, Any]]:
    """Freeze parameters as configured, and sort the rest into parameter groups.

    Args:
        model: the model.
        config: the optimizer's settings.
        plugin: the optimizer's plugin name, for messages.
        powers: by the `id` of a linear layer's weight, the power of the width that its learning
            rate is divided by if `base_width` is set; 1 for those not listed.

    Returns:
        Groups with `params`, `name`, `weight_decay`, and `lr` if it differs from the common one;
        the common groups come first.

    Raises:
        ConfigError: a pattern matches nothing, or all parameters are frozen.
    """
    names = [name for name, _ in model.named_parameters()]
    freeze(model, config.freeze, f"{plugin}.freeze")
    rest = [name for name in names if model.get_parameter(name).requires_grad]
    if not rest:
        raise ConfigError(f"{plugin}: no parameter is left to train; freeze fewer")
    chosen: list[dict[str, Any]] = []
    for group in config.groups:
        own = matching(rest, group.match, f"{plugin}.groups", "parameter without a group")
        rest = [name for name in rest if name not in set(own)]
        chosen += _split(model, own, group, config.weight_decay)
    groups = _split(model, rest, None, config.weight_decay) + chosen
    if config.base_width is None:
        return groups
    widths = _widths(model)
    return [
        one
        for group in groups
        for one in _by_width(group, config.lr, config.base_width, widths, powers)
    ]


def _widths(model: nn.Module) -> dict[int, int]:
    """The number of inputs of each linear layer, by the `id` of its weight.

    Excludes layers tied to an embedding, and a head whose logits the model scales down itself: the
    learning rate of an output layer with a multiplier is not changed.
    """
    apart = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    apart |= {id(weight) for weight in getattr(model, "shrunk_heads", ())}
    linears = [m for m in model.modules() if isinstance(m, nn.Linear) and id(m.weight) not in apart]
    return {id(m.weight): m.in_features for m in linears}


def _by_width(
    group: dict[str, Any],
    lr: float,
    base: int,
    widths: Mapping[int, int],
    powers: Mapping[int, float],
) -> list[dict[str, Any]]:
    """Split a group by learning rate; weight decay per step is the same for all.

    Source: Yang et al. 2022, "Tensor Programs V", table 8.
    """
    members: dict[float, list[nn.Parameter]] = {}
    for parameter in group["params"]:
        width, power = widths.get(id(parameter), base), powers.get(id(parameter), 1.0)
        members.setdefault((base / width) ** power, []).append(parameter)
    return [
        {
            **group,
            "params": parameters,
            "name": group["name"] if factor == 1 else f"{group['name']}.x{factor:.3g}",
            "lr": group.get("lr", lr) * factor,
            "weight_decay": group["weight_decay"] / factor,
        }
        for factor, parameters in members.items()
    ]


def _split(
    model: nn.Module, names: Sequence[str], group: GroupConfig | None, common: float
) -> list[dict[str, Any]]:
    """Up to two parameter groups: with and without weight decay."""
    decays = decaying(model)
    title = group.match if group else "all"
    own = {"lr": group.lr} if group and group.lr is not None else {}
    parameters = [model.get_parameter(name) for name in names]
    if group and group.weight_decay is not None:
        return [{"params": parameters, "name": title, "weight_decay": group.weight_decay, **own}]
    made = []
    for suffix, wanted, decay in ((".matrices", True, common), (".others", False, 0.0)):
        members = [p for p in parameters if (id(p) in decays) is wanted]
        if members:
            made.append({"params": members, "name": title + suffix, "weight_decay": decay, **own})
    return made
