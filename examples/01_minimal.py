"""The minimum: a module, an optimizer, a loss, and one call that trains.

python examples/01_minimal.py
"""

import torch
from torch import nn
from torch.nn.functional import mse_loss

from nexus_core import Engine

torch.manual_seed(0)
x = torch.linspace(-3, 3, 512).unsqueeze(1)
batches = [{"x": x[place::8], "y": x[place::8].sin()} for place in range(8)]
model = nn.Sequential(nn.Linear(1, 32), nn.Tanh(), nn.Linear(32, 1))
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)

engine = Engine(model, optimizer, loss=lambda model, batch: mse_loss(model(batch["x"]), batch["y"]))
result = engine.fit(batches, until="100 epochs")
print(f"{result.status} after {result.step} steps: loss {result.metrics['train/loss']:.5f}")
