"""SAM (Foret et al. 2021, algorithm 1): the gradient at the worst point in a neighbourhood."""

import torch
from torch import nn
from torch.nn.functional import cross_entropy

from nexus_core import Engine, Plugin, PluginConfig, hookimpl
from nexus_plugins.clip import ClipPlugin
from nexus_plugins.lr_cosine import LrCosinePlugin


class SamPlugin(Plugin[PluginConfig]):
    radius = 0.05

    @hookimpl
    @torch.no_grad()
    def optimizer_step(self, engine, step, again):
        moved = [p for p in engine.parameters(step.turn) if p.grad is not None]
        if moved:
            before = [p.clone() for p in moved]
            length = torch.stack([p.grad.norm() for p in moved]).norm()
            for p in moved:
                p.add_(p.grad * (self.radius / (length + 1e-12)))
            try:
                again()  # runs every hook from `forward` to `after_backward`, so it is clipped too
            finally:
                for p, value in zip(moved, before, strict=True):
                    p.copy_(value)  # the optimizer then uses the gradient of the perturbed weights


if __name__ == "__main__":
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(2, 64), nn.ReLU(), nn.Linear(64, 2))
    data = [(x, (x.norm(dim=1) > 1).long()) for x in torch.randn(20, 64, 2)]
    plugins = SamPlugin(), ClipPlugin(max_norm=1.0), LrCosinePlugin(warmup=None)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.2, momentum=0.9)
    engine = Engine(
        model, optimizer, loss=lambda m, b: cross_entropy(m(b[0]), b[1]), plugins=plugins
    )
    print(f"loss {engine.fit(data, until='200 steps').metrics['train/loss']:.3f}")
