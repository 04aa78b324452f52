"""pytorch/examples' vae as a plain PyTorch loop and with the engine: bitwise equal weights.

    pip install scikit-learn
    python examples/13_vae.py

A variational autoencoder of digits, whose loss is a sum over the batch. After each epoch it is
tested, and generates new digits from noise.
"""

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn.functional import binary_cross_entropy, relu
from torch.optim import Adam
from torch.utils.data import DataLoader

from nexus_core import Engine, Plugin, PluginConfig, hookimpl
from nexus_plugins.console import ConsolePlugin

EPOCHS = 4
images = torch.tensor(load_digits().data, dtype=torch.float32) / 16  # (row, 64)


class Autoencoder(nn.Module):
    def __init__(self):
        super().__init__()
        self.encoder, self.mean, self.spread = nn.Linear(64, 48), nn.Linear(48, 6), nn.Linear(48, 6)
        self.decoder, self.image = nn.Linear(6, 48), nn.Linear(48, 64)

    def decode(self, code):
        return torch.sigmoid(self.image(relu(self.decoder(code))))

    def forward(self, x):
        found = relu(self.encoder(x))
        mean, log_variance = self.mean(found), self.spread(found)
        code = mean + torch.randn_like(mean) * (0.5 * log_variance).exp()
        return self.decode(code), mean, log_variance


def elbo(x, image, mean, log_variance):
    divergence = -0.5 * (1 + log_variance - mean.square() - log_variance.exp()).sum()
    return binary_cross_entropy(image, x, reduction="sum") + divergence


def new_model():
    torch.manual_seed(1)
    return Autoencoder()


def new_loaders():
    order, other = torch.Generator().manual_seed(1), torch.Generator()
    train = DataLoader(images[:1500], 128, shuffle=True, generator=order)
    return train, DataLoader(images[1500:], 128, generator=other)


def by_hand():
    model, (loader, tests) = new_model(), new_loaders()
    optimizer = Adam(model.parameters(), lr=3e-3)
    drawn = []
    for epoch in range(EPOCHS):
        model.train()
        total = 0.0
        for number, x in enumerate(loader):
            optimizer.zero_grad()
            loss = elbo(x, *model(x))
            loss.backward()
            total += loss.item()
            optimizer.step()
            if number % 10 == 0:
                print(f"epoch {epoch} batch {number}/{len(loader)} loss {loss.item() / len(x):.4f}")
        print(f"epoch {epoch} mean loss {total / len(loader.dataset):.4f}")
        model.eval()
        total = 0.0
        with torch.no_grad(), torch.random.fork_rng():  # keeps the noise of training unchanged
            torch.manual_seed(0)
            for x in tests:
                total += elbo(x, *model(x)).item()
            print(f"epoch {epoch} test loss {total / len(tests.dataset):.4f}")
            drawn.append(model.decode(torch.randn(16, 6)))
    return model, total / len(tests.dataset), drawn


class DrawPlugin(Plugin[PluginConfig]):
    """Generates new digits after each evaluation."""

    @hookimpl
    def measure(self, engine):
        self.drawn = [*getattr(self, "drawn", []), engine.model.decode(torch.randn(16, 6))]


def by_engine():
    model, (loader, tests) = new_model(), new_loaders()
    optimizer = Adam(model.parameters(), lr=3e-3)

    def loss(model, x):
        total = elbo(x, *model(x))
        engine.log("elbo", total, units=len(x))
        return total

    engine = Engine(model, optimizer, loss=loss, plugins=[draw := DrawPlugin(), ConsolePlugin()])
    until = f"{EPOCHS} epochs"
    result = engine.fit(loader, until=until, eval_data=tests, eval_every="1 epochs")
    return model, result.metrics["val/elbo"], draw.drawn


def main():
    (one, expected, digits), (other, loss, drawn) = by_hand(), by_engine()
    pairs = [
        *zip(one.parameters(), other.parameters(), strict=True),
        *zip(digits, drawn, strict=True),
    ]
    same = all(torch.equal(a, b) for a, b in pairs) and expected == loss
    print(f"test loss {loss:.4f}; bitwise equal: {same}")


if __name__ == "__main__":
    main()
