"""A loop like timm's train.py in plain PyTorch and with the engine: bitwise equal weights.

    pip install scikit-learn
    python examples/14_timm_like.py

Mixup with soft targets, an average of weights and running statistics that is evaluated as well as
the model, clipping by value, no weight decay of biases, and a plateau schedule on the accuracy of
the average.
"""

from copy import deepcopy

import numpy as np
import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn.functional import cross_entropy, one_hot
from torch.nn.utils import clip_grad_value_
from torch.optim import AdamW
from torch.optim.lr_scheduler import ReduceLROnPlateau
from torch.utils.data import DataLoader, TensorDataset

from nexus_core import Engine, Plugin, PluginConfig, hookimpl
from nexus_plugins.clip import ClipPlugin
from nexus_plugins.console import ConsolePlugin
from nexus_plugins.ema import EmaPlugin
from nexus_plugins.lr_torch import LrTorchPlugin

EPOCHS, DECAY = 8, 0.9
digits = load_digits()
images = torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1) / 16  # (row, 1, 8, 8)
labels = torch.tensor(digits.target)


def new_model():
    torch.manual_seed(42)
    np.random.seed(42)
    layers = [nn.Conv2d(1, 8, 3, 2), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Dropout(0.1)]
    return nn.Sequential(*layers, nn.Linear(72, 10))


def new_loaders():
    train = TensorDataset(images[:1400], one_hot(labels[:1400], 10).float())
    order, other = torch.Generator().manual_seed(1), torch.Generator()
    tests = DataLoader(TensorDataset(images[1400:], labels[1400:]), 397, generator=other)
    return DataLoader(train, 100, shuffle=True, generator=order), tests


def new_optimizer(model):
    vectors = [p for p in model.parameters() if p.ndim < 2]
    matrices = {"params": [p for p in model.parameters() if p.ndim > 1], "weight_decay": 0.05}
    return AdamW([{"params": vectors, "weight_decay": 0.0}, matrices], lr=0.02)


def mixed(x, y):
    share = np.random.beta(0.8, 0.8)
    return x * share + x.flip(0) * (1 - share), y * share + y.flip(0) * (1 - share)


def validate(model, tests):
    model.eval()
    right = rows = 0
    with torch.no_grad():
        for x, y in tests:
            right += (model(x).argmax(1) == y).sum().item()
            rows += len(y)
    return right / rows


def by_hand():
    model, (loader, tests) = new_model(), new_loaders()
    optimizer, average = new_optimizer(model), deepcopy(model)
    scheduler = ReduceLROnPlateau(optimizer, mode="max", factor=0.1, patience=1)
    for epoch in range(EPOCHS):
        model.train()
        for number, (x, y) in enumerate(loader):
            x, y = mixed(x, y)
            optimizer.zero_grad()
            loss = cross_entropy(model(x), y)
            loss.backward()
            clip_grad_value_(model.parameters(), 0.05)
            optimizer.step()
            with torch.no_grad():
                pairs = zip(average.state_dict().values(), model.state_dict().values(), strict=True)
                for mean, value in pairs:
                    if mean.is_floating_point():
                        mean.lerp_(value, 1 - DECAY)
            if number % 10 == 0:
                rate = optimizer.param_groups[0]["lr"]
                print(f"epoch {epoch} batch {number} loss {loss.item():.4f} lr {rate:.4g}")
        accuracy, averaged = validate(model, tests), validate(average, tests)
        print(f"epoch {epoch} accuracy {accuracy:.1%}, of the average {averaged:.1%}")
        scheduler.step(averaged)
    return model, average.state_dict(), (accuracy, averaged, optimizer.param_groups[0]["lr"])


class MixupPlugin(Plugin[PluginConfig]):
    """Mixes each row of a batch, and its target, with those of another row."""

    @hookimpl
    def on_batch(self, batch):
        return mixed(*batch)


def by_engine():
    model, (loader, tests) = new_model(), new_loaders()
    optimizer = new_optimizer(model)

    def loss(model, batch):
        x, y = batch
        output = model(x)
        if not engine.training:
            engine.log("accuracy", (output.argmax(1) == y).sum(), units=len(y))
        return cross_entropy(output, y)

    scheduler = ReduceLROnPlateau(optimizer, mode="max", factor=0.1, patience=1)
    ema = EmaPlugin(decay=DECAY, ramp=False, buffers=True, evaluate="both")
    plugins = [MixupPlugin(), ClipPlugin(by="value", max_value=0.05), ema]
    plugins += [LrTorchPlugin(scheduler, metric="val/accuracy"), ConsolePlugin()]
    engine = Engine(model, optimizer, loss=loss, plugins=plugins)
    until = f"{EPOCHS} epochs"
    found = engine.fit(loader, until=until, eval_data=tests, eval_every="1 epochs").metrics
    rate = optimizer.param_groups[0]["lr"]
    return model, ema.weights(), (found["val_live/accuracy"], found["val/accuracy"], rate)


def main():
    (one, mean, expected), (other, average, found) = by_hand(), by_engine()
    pairs = [*zip(one.parameters(), other.parameters(), strict=True)]
    pairs += [(mean[name], average[name]) for name in average]
    same = all(torch.equal(a, b) for a, b in pairs) and expected == found
    print(f"accuracy {found[0]:.1%}, of the average {found[1]:.1%}, learning rate {found[2]:.1g}")
    print(f"bitwise equal: {same}")


if __name__ == "__main__":
    main()
