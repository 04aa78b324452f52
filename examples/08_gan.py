"""A GAN: two alternating optimizers, each with its own loss term."""

import torch
from torch import nn
from torch.nn.functional import softplus

from nexus_core import Engine, Plugin, PluginConfig, hookimpl
from nexus_plugins.clip import ClipPlugin
from nexus_plugins.lr_linear import LrLinearPlugin


class GanPlugin(Plugin[PluginConfig]):
    @hookimpl
    def take_turns(self, step):
        return ["critic", "generator"]  # 5:1 is ["critic"] * 5 + ["generator"], or by step.number

    @hookimpl
    def forward(self, engine, batch):
        critic, generator = engine.model
        return critic(batch), critic(generator(torch.randn_like(batch)))

    @hookimpl
    def loss_units(self, batch, step):
        return {step.turn: float(len(batch))}

    @hookimpl
    def loss_terms(self, output, step):
        of_critic = softplus(-output[0]) + softplus(output[1])
        return {step.turn: (of_critic if step.turn == "critic" else softplus(-output[1])).sum()}


if __name__ == "__main__":
    data = torch.tensor([2, -1]) + 0.5 * torch.randn(50, 64, 2, generator=torch.manual_seed(0))
    nets = [nn.Sequential(nn.Linear(2, 32), nn.Tanh(), nn.Linear(32, out)) for out in (1, 2)]
    adam = {"lr": 5e-3, "betas": (0.0, 0.9)}  # with momentum, the generated points collapse
    critic, generator = (torch.optim.Adam(net.parameters(), **adam) for net in nets)
    optimizers = {"critic": critic, "generator": generator}
    plugins = GanPlugin(), ClipPlugin(max_norm=1.0), LrLinearPlugin(warmup=None)
    Engine(nn.ModuleList(nets), optimizers, plugins=plugins).fit(data, until="1500 steps")
    print("data around (2, -1), generated around", nets[1](torch.randn(5000, 2)).mean(0).tolist())
