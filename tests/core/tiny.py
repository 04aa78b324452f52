"""A tiny problem for tests of the engine: a linear regression with ragged labels."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from nexus_core import Engine, Loss, LossConfig, Plugin, PluginConfig, hookimpl


class Regression:
    """A map-style data set: sample i has `1 + i % 3` of 4 labels (the rest is nan)."""

    def __init__(self, size: int = 23, dtype: torch.dtype = torch.float32) -> None:
        generator = torch.Generator().manual_seed(7)
        self.x = torch.randn(size, 5, generator=generator, dtype=dtype)
        self.y = self.x @ torch.randn(5, 4, generator=generator, dtype=dtype)
        for i in range(size):
            self.y[i, 1 + i % 3 :] = torch.nan

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"x": self.x[index], "y": self.y[index]}


class Net(nn.Module):
    """5 inputs, 4 outputs, and dropout, so that random numbers matter."""

    def __init__(self, dropout: float = 0.0, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.dropout = nn.Dropout(dropout)
        self.hidden = nn.Linear(5, 8, dtype=dtype)
        self.head = nn.Linear(8, 4, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.hidden(self.dropout(x))))


class SquaredPlugin(Loss[LossConfig]):
    """Squared error over the labels that are not nan."""

    def units(self, batch: dict[str, Tensor]) -> Tensor:
        return batch["y"].isfinite().sum()

    def loss(self, batch: dict[str, Tensor], output: Tensor) -> Tensor:
        return (output - batch["y"])[batch["y"].isfinite()].square().sum()


class AbsolutePlugin(Loss[LossConfig]):
    """Absolute error over the rows of the batch, with units as a plain number."""

    def units(self, batch: dict[str, Tensor]) -> float:
        return float(len(batch["y"]))

    def loss(self, batch: dict[str, Tensor], output: Tensor) -> Tensor:
        return (output - batch["y"].nan_to_num()).abs().sum()


class RecorderPlugin(Plugin[PluginConfig]):
    """Records every log and evaluation."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[tuple[int, dict[str, float]]] = []

    @hookimpl
    def on_log(self, engine: Engine, metrics: dict[str, float]) -> None:
        self.lines.append((engine.state.step, dict(metrics)))

    @hookimpl
    def on_eval(self, engine: Engine, metrics: dict[str, float]) -> None:
        self.lines.append((engine.state.step, dict(metrics)))


class Reads(TorchDispatchMode):
    """Counts how often a tensor is read as a number, which syncs."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


def tiny_engine(*plugins: Plugin[Any], dropout: float = 0.0, **options: Any) -> Engine:
    """An engine over `Net` with AdamW and the squared loss, always from the same weights."""
    torch.manual_seed(3)
    model = Net(dropout)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    options = {"seed": 5, "log_every": 3, **options}
    return Engine(model, optimizer, plugins=[SquaredPlugin(), *plugins], **options)


def weights(engine: Engine) -> list[Tensor]:
    """A copy of the model's parameters."""
    return [parameter.detach().clone() for parameter in engine.model.parameters()]
