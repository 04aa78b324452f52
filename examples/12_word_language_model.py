"""pytorch/examples' word_language_model as a plain PyTorch loop and with the engine: bitwise equal.

    python examples/12_word_language_model.py

An LSTM that carries its hidden state from batch to batch, with gradient clipping; the learning rate
is divided by four when the validation loss does not improve.
"""

import math

import torch
from torch import nn
from torch.nn.functional import cross_entropy
from torch.nn.utils import clip_grad_norm_
from torch.optim import SGD
from torch.optim.lr_scheduler import ReduceLROnPlateau

from nexus_core import Engine, Plugin, PluginConfig
from nexus_plugins.clip import ClipPlugin
from nexus_plugins.console import ConsolePlugin
from nexus_plugins.lr_torch import LrTorchPlugin

EPOCHS, BPTT, WORDS = 6, 12, 40


def columns(words, rows):
    """Batches of a text laid out in columns: (start of the text, words, next words)."""
    text = torch.tensor(words[: len(words) // rows * rows]).view(rows, -1).t().contiguous()
    ends = [(start, min(start + BPTT, len(text) - 1)) for start in range(0, len(text) - 1, BPTT)]
    return [(start == 0, text[start:end], text[start + 1 : end + 1]) for start, end in ends]


numbers = [(n * n + 3 * n) % WORDS if n % 7 else n % 11 for n in range(2400)]
train, valid = columns(numbers[:2000], 10), columns(numbers[2000:], 10)


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.drop = nn.Dropout(0.2)
        self.embed, self.lstm = nn.Embedding(WORDS, 32), nn.LSTM(32, 32, 2, dropout=0.2)
        self.decode = nn.Linear(32, WORDS)

    def forward(self, words, hidden):
        output, hidden = self.lstm(self.drop(self.embed(words)), hidden)
        return self.decode(self.drop(output)).flatten(0, 1), hidden


def new_model():
    torch.manual_seed(1111)
    return Recurrent()


def by_hand():
    model, rate, best = new_model(), 80.0, None
    for epoch in range(EPOCHS):
        model.train()
        total, hidden = 0.0, None
        for _, words, targets in train:
            if hidden is not None:
                hidden = tuple(part.detach() for part in hidden)
            model.zero_grad()
            output, hidden = model(words, hidden)
            loss = cross_entropy(output, targets.flatten())
            loss.backward()
            clip_grad_norm_(model.parameters(), 0.25)
            for parameter in model.parameters():
                parameter.data.add_(parameter.grad, alpha=-rate)
            total += loss.item()
        print(f"epoch {epoch} rate {rate} loss {total / len(train):.4f}")
        model.eval()
        total, hidden = 0.0, None
        with torch.no_grad():
            for _, words, targets in valid:
                output, hidden = model(words, hidden)
                total += cross_entropy(output, targets.flatten(), reduction="sum").item()
        loss = total / sum(targets.numel() for *_, targets in valid)
        print(f"epoch {epoch} validation loss {loss:.4f} perplexity {math.exp(loss):.1f}")
        if best is None or loss < best:
            best = loss
        else:
            rate /= 4
    return model, rate, loss


class CarryPlugin(Plugin[PluginConfig]):
    """Keeps the hidden state between batches, also in a checkpoint."""

    hidden = ()

    def state_dict(self):
        return {"hidden": list(self.hidden)}

    def load_state_dict(self, state):
        self.hidden = tuple(state["hidden"])


def by_engine():
    model, carry = new_model(), CarryPlugin()
    optimizer = SGD(model.parameters(), lr=80.0)

    def loss(model, batch):
        first, words, targets = batch
        output, hidden = model(words, None if first else carry.hidden)
        carry.hidden = tuple(part.detach() for part in hidden)
        total = cross_entropy(output, targets.flatten(), reduction="sum")
        engine.log("nats", total, units=targets.numel())
        return cross_entropy(output, targets.flatten())

    plateau = ReduceLROnPlateau(optimizer, factor=0.25, patience=0, threshold=0)
    plugins = [carry, ClipPlugin(max_norm=0.25), LrTorchPlugin(plateau, metric="val/nats")]
    plugins += [ConsolePlugin()]
    engine = Engine(model, optimizer, loss=loss, plugins=plugins)
    until = f"{EPOCHS} epochs"
    result = engine.fit(train, until=until, eval_data=valid, eval_every="1 epochs")
    return model, optimizer.param_groups[0]["lr"], result.metrics["val/nats"]


def main():
    (one, *expected), (other, *found) = by_hand(), by_engine()
    same = all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))
    print(f"rate {found[0]}, {found[1]:.4f} nats; bitwise equal: {same and expected == found}")


if __name__ == "__main__":
    main()
