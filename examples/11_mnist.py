"""pytorch/examples' mnist as a plain PyTorch loop and with the engine: bitwise equal results.

    pip install scikit-learn
    python examples/11_mnist.py

A convolutional network with dropout, Adadelta and StepLR, tested after each epoch.
"""

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import nn
from torch.optim import Adadelta
from torch.optim.lr_scheduler import StepLR
from torch.utils.data import DataLoader, TensorDataset

from nexus_core import Engine
from nexus_plugins.console import ConsolePlugin
from nexus_plugins.lr_torch import LrTorchPlugin

EPOCHS = 4
digits = load_digits()
images = torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1) / 16  # (row, 1, 8, 8)
labels = torch.tensor(digits.target)


def new_model():
    torch.manual_seed(1)
    layers = [nn.Conv2d(1, 16, 3), nn.ReLU(), nn.Conv2d(16, 32, 3), nn.ReLU(), nn.MaxPool2d(2)]
    layers += [nn.Dropout(0.25), nn.Flatten(), nn.Linear(128, 64), nn.ReLU(), nn.Dropout(0.5)]
    return nn.Sequential(*layers, nn.Linear(64, 10), nn.LogSoftmax(1))


def new_loaders():
    """Each loader has its own generator, so its order does not depend on dropout."""
    train, test = (
        TensorDataset(images[:1500], labels[:1500]),
        TensorDataset(images[1500:], labels[1500:]),
    )
    order, other = torch.Generator().manual_seed(1), torch.Generator()
    return DataLoader(train, 64, shuffle=True, generator=order), DataLoader(
        test, 297, generator=other
    )


def by_hand():
    model, (loader, tests) = new_model(), new_loaders()
    optimizer = Adadelta(model.parameters(), lr=1.0)
    scheduler = StepLR(optimizer, step_size=1, gamma=0.7)
    for epoch in range(EPOCHS):
        model.train()
        for number, (x, y) in enumerate(loader):
            optimizer.zero_grad()
            loss = F.nll_loss(model(x), y)
            loss.backward()
            optimizer.step()
            if number % 10 == 0:
                print(f"epoch {epoch} batch {number}/{len(loader)} loss {loss.item():.4f}")
        model.eval()
        total = correct = 0
        with torch.no_grad():
            for x, y in tests:
                output = model(x)
                total += F.nll_loss(output, y, reduction="sum").item()
                correct += (output.argmax(1) == y).sum().item()
        rows = len(tests.dataset)
        print(f"epoch {epoch} test loss {total / rows:.4f} accuracy {correct / rows:.1%}")
        scheduler.step()
    return model, correct / rows


def by_engine():
    model, (loader, tests) = new_model(), new_loaders()
    optimizer = Adadelta(model.parameters(), lr=1.0)
    scheduler = StepLR(optimizer, step_size=1, gamma=0.7)

    def loss(model, batch):
        x, y = batch
        output = model(x)
        engine.log("accuracy", (output.argmax(1) == y).sum(), units=len(y))
        return F.nll_loss(output, y)

    plugins = [LrTorchPlugin(scheduler, every="epoch"), ConsolePlugin()]
    engine = Engine(model, optimizer, loss=loss, plugins=plugins)
    until = f"{EPOCHS} epochs"
    result = engine.fit(loader, until=until, eval_data=tests, eval_every="1 epochs")
    return model, result.metrics["val/accuracy"]


def main():
    (one, expected), (other, accuracy) = by_hand(), by_engine()
    pairs = zip(one.parameters(), other.parameters(), strict=True)
    same = all(torch.equal(a, b) for a, b in pairs) and expected == accuracy
    print(f"accuracy {accuracy:.1%}; bitwise equal: {same}")


if __name__ == "__main__":
    main()
