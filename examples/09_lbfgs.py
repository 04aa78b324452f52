"""LBFGS: an optimizer that evaluates loss and gradient several times per step, passed directly."""

import torch
from torch import nn
from torch.nn.functional import mse_loss

from nexus_core import Engine
from nexus_plugins.lr_cosine import LrCosinePlugin

torch.manual_seed(0)
x = torch.linspace(-3, 3, 256).unsqueeze(1)
parts = [{"x": x[place::4], "y": x[place::4].sin()} for place in range(4)]
model = nn.Sequential(nn.Linear(1, 32), nn.Tanh(), nn.Linear(32, 1))
optimizer = torch.optim.LBFGS(model.parameters(), lr=1.0, line_search_fn="strong_wolfe")

engine = Engine(
    model,
    optimizer,
    loss=lambda model, batch: mse_loss(model(batch["x"]), batch["y"]),
    plugins=[LrCosinePlugin(warmup=None, min_lr=0.1)],
    accumulate=4,  # each evaluation by LBFGS uses all the data, in four micro-batches
)
result = engine.fit(parts, until="10 epochs")
loss = engine.evaluate(parts)["val/loss"]
evaluations = optimizer.state[model[0].weight]["func_evals"]
print(f"{result.step} steps, {evaluations} evaluations of the loss: {loss:.7f}")
