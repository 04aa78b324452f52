"""A small convolutional network classifies digits, and shows its mistakes in TensorBoard.

    pip install scikit-learn
    python examples/05_vision.py
    tensorboard --logdir runs/digits

It defines two plugins: a loss that also measures accuracy, and one that plots.
"""

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.tensorboard import SummaryWriter

from nexus_core import Batch, Engine, Loss, LossConfig, ResumableLoader, hookimpl
from nexus_core.plugin import Plugin, PluginConfig
from nexus_plugins.tensorboard import TensorboardPlugin


class LossDigitPlugin(Loss[LossConfig]):
    """The cross-entropy of the digit, in nats."""

    def units(self, batch: Batch) -> float:
        return float(len(batch["digit"]))

    def loss(self, batch: Batch, output: Tensor) -> Tensor:
        return cross_entropy(output, batch["digit"], reduction="sum")

    @hookimpl
    def loss_terms(self, engine: Engine, batch: Batch, output: Tensor) -> dict[str, Tensor]:
        hits = (output.argmax(1) == batch["digit"]).sum()
        engine.log("accuracy", hits, units=self.units(batch))
        return super().loss_terms(engine, batch, output)


class MisreadPlugin(Plugin[PluginConfig]):
    """Plots the misclassified digits of the last evaluation."""

    @hookimpl
    def on_start(self) -> None:
        self._misread: list[Tensor] = []

    @hookimpl
    def loss_terms(self, engine: Engine, batch: Batch, output: Tensor) -> None:
        if not engine.training:
            self._misread.append(batch["input"][output.argmax(1) != batch["digit"]])

    @hookimpl
    def on_eval(self, engine: Engine) -> None:
        with SummaryWriter(engine.out / "tensorboard/misread") as writer:
            images = torch.cat(self._misread)[:16].repeat_interleave(8, 2).repeat_interleave(8, 3)
            if len(images):
                writer.add_images("misread", images, engine.state.step)
        self._misread = []


def main() -> None:
    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1) / 16  # (row, 1, 8, 8)
    torch.manual_seed(0)
    rows = [  # shuffled; `input` is the name of the argument of the model's forward
        {"input": images[place], "digit": int(digits.target[place])}
        for place in torch.randperm(len(images))
    ]
    layers = [nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)]
    layers += [nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(), nn.Flatten()]
    model = nn.Sequential(*layers, nn.Linear(32 * 4 * 4, 10))
    engine = Engine(
        model,
        torch.optim.AdamW(model.parameters(), lr=5e-3),
        plugins=[LossDigitPlugin(), MisreadPlugin(), TensorboardPlugin()],
        out="runs/digits",
    )
    engine.fit(
        ResumableLoader(rows[:-360], batch_size=64),
        until="8 epochs",
        eval_data=ResumableLoader(rows[-360:], batch_size=120, shuffle=False),
        eval_every="2 epochs",
    )
    print(f"{engine.metrics['val/accuracy']:.1%} of unseen digits are classified correctly")


if __name__ == "__main__":
    main()
