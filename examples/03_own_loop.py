"""Keep your own loop: `engine.steps` is a generator, and each iteration of your `for` is one step.

    python examples/03_own_loop.py

The program leaves the loop once the loss is low enough, does something else, resumes training, and
finally returns to a snapshot it has kept.
"""

import copy

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from nexus_core import Engine
from nexus_plugins.clip import ClipPlugin


def main() -> None:
    torch.manual_seed(0)
    batches = [spirals(128) for _ in range(16)]
    model = nn.Sequential(
        nn.Linear(2, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 2)
    )
    engine = Engine(
        model,
        torch.optim.AdamW(model.parameters(), lr=1e-2),
        loss=lambda model, batch: cross_entropy(model(batch["point"]), batch["arm"]),
        plugins=[ClipPlugin(max_norm=1.0)],
        log_every=1,
    )

    for _ in engine.steps(batches, until="1000 steps"):
        if engine.metrics["train/loss"] < 0.2:
            break  # leaving the loop closes it; nothing is lost
    print(f"step {engine.state.step}: the loss is below 0.2, accuracy {accuracy(model):.0%}")

    kept = copy.deepcopy(engine.state_dict())
    engine.fit(batches, until="300 steps")  # counted from the first step of the run
    print(f"step {engine.state.step}: accuracy {accuracy(model):.0%}")

    first = engine.metrics["train/loss"]
    engine.load_state_dict(kept)
    engine.fit(batches, until="300 steps")
    same = "bitwise the same" if engine.metrics["train/loss"] == first else "ANOTHER"
    print(f"restored the snapshot and trained again: {same} loss")


def spirals(count: int) -> dict[str, Tensor]:
    """Points on two intertwined spirals."""
    arm = torch.randint(2, (count,))
    radius = torch.rand(count)
    angle = 7 * radius + torch.pi * arm
    point = torch.stack([radius * angle.cos(), radius * angle.sin()], dim=1)
    return {"point": point + 0.02 * torch.randn_like(point), "arm": arm}


def accuracy(model: nn.Module) -> float:
    """The share of new points that the model classifies correctly."""
    generator_state = torch.get_rng_state()
    batch = spirals(1000)
    torch.set_rng_state(generator_state)
    with torch.no_grad():
        return (model(batch["point"]).argmax(1) == batch["arm"]).float().mean().item()


if __name__ == "__main__":
    main()
