"""A policy gradient: the data comes out of the loop itself, since the engine does not own it.

    python examples/06_reinforcement.py

A generator plays with the model as it is now, and what it yields is the next batch. The engine
asks for a batch only when it is about to train on it, so every game is played by the newest policy.
"""

from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.distributions import Categorical

from nexus_core import Batch, Engine, Loss, LossConfig

GAMES, LONGEST, DISCOUNT = 64, 200, 0.98


class LossPolicyPlugin(Loss[LossConfig]):
    """REINFORCE: makes actions likelier by how much better than usual they turned out.

    Source: Williams 1992, "Simple statistical gradient-following algorithms".
    """

    def units(self, batch: Batch) -> float:
        return float(len(batch["action"]))

    def loss(self, batch: Batch, output: Tensor) -> Tensor:
        return -(Categorical(logits=output).log_prob(batch["action"]) * batch["advantage"]).sum()


def games(policy: nn.Module, lengths: list[float]) -> Iterator[dict[str, Tensor]]:
    """Endless batches: each is all moves of `GAMES` games, played when it is asked for."""
    while True:
        with torch.no_grad():
            seen, action, alive = play(policy)
        lengths.append(alive.sum().item() / GAMES)
        played = alive.bool()
        worth = discounted(alive)[played]
        advantage = (worth - worth.mean()) / worth.std()
        # `input` is what the policy's forward calls it
        yield {"input": seen[played], "action": action[played], "advantage": advantage}


def play(policy: nn.Module) -> tuple[Tensor, Tensor, Tensor]:
    """States (time, game, 4), actions (time, game), and 1 where the game was still on."""
    device = next(policy.parameters()).device
    state, alive = 0.05 * torch.randn(GAMES, 4, device=device), torch.ones(GAMES, device=device)
    moves = []
    for _ in range(LONGEST):
        action = Categorical(logits=policy(state)).sample()
        moves.append((state, action, alive))
        state = pushed(state, action)
        alive = alive * ((state[:, 0].abs() < 2.4) & (state[:, 2].abs() < 0.2))
    seen, actions, lives = (torch.stack(parts) for parts in zip(*moves, strict=True))
    return seen, actions, lives


def discounted(alive: Tensor) -> Tensor:
    """(time, game): how long each game still continues, far moments counting less."""
    worth, later = torch.empty_like(alive), torch.zeros_like(alive[0])
    for now in reversed(range(LONGEST)):
        worth[now] = later = alive[now] * (1 + DISCOUNT * later)
    return worth


def pushed(state: Tensor, action: Tensor) -> Tensor:
    """A pole on a cart, 0.02 s after a push of 10 N to the left (0) or to the right (1).

    Source: Barto, Sutton and Anderson 1983: cart 1 kg, pole 0.1 kg and 1 m, no friction.
    """
    speed, angle, spin = state[:, 1:].unbind(1)
    force = (20.0 * action - 10.0 + 0.05 * spin**2 * angle.sin()) / 1.1
    inertia = 0.5 * (4 / 3 - 0.1 * angle.cos() ** 2 / 1.1)
    turn = (9.8 * angle.sin() - angle.cos() * force) / inertia
    pull = force - 0.05 * turn * angle.cos() / 1.1
    return state + 0.02 * torch.stack([speed, pull, spin, turn], dim=1)


def main() -> None:
    torch.manual_seed(0)
    policy = nn.Sequential(nn.Linear(4, 32), nn.Tanh(), nn.Linear(32, 2))
    optimizer = torch.optim.AdamW(policy.parameters(), lr=2e-2)
    engine = Engine(policy, optimizer, plugins=[LossPolicyPlugin()])
    lengths: list[float] = []
    for state in engine.steps(games(policy, lengths), until="40 steps"):
        if state.step % 5 == 1:
            print(f"step {state.step:>3}: the pole stands for {lengths[-1]:.0f} of {LONGEST} moves")


if __name__ == "__main__":
    main()
