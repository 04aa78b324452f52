"""How much of a known graph the causal module recovers, compared with NOTEARS and DAGMA.

    python -m benchmarks.graphs [--graphs 5] [--first-seed 1000] [--edges 20]

Ten variables with the given number of random edges, standardised so that variances do not reveal
the order. Data come from a linear model (coefficients 0.5 to 2 of either sign, noise of variance 1)
or a random network for each variable: 1,000 observations and 200 more with an intervention on each
variable, or 3,000 observations. The module has the defaults of `loss_causal`. NOTEARS (Zheng et al.
2018, algorithm 1, with its penalty of 0.1 and threshold of 0.3) and DAGMA (the package `dagma` with
its defaults, if installed) see only the observations, since they cannot use interventions.

Found: true edges in the right direction. Wrong: pairs of variables, of 45, with a missing, extra or
reversed edge.
"""

from __future__ import annotations

import argparse
import itertools
import math
import statistics
from collections.abc import Callable, Iterable, Iterator, Mapping
from importlib.util import find_spec
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.linalg import expm
from scipy.optimize import minimize
from torch import Tensor

from nexus_core import Engine
from nexus_plugins.loss_causal import LossCausalPlugin
from nexus_plugins.lr_linear import LrLinearPlugin
from nexus_plugins.model_nexus.causal import CausalGraph
from nexus_plugins.modules.graphs import Graph
from nexus_plugins.modules.looks import edges_right

VARIABLES, OBSERVATIONS, INTERVENTIONS = 10, 1000, 200
STEPS, ROWS, LR, UNITS = 1500, 512, 0.02, 8
Kind = Literal["linear", "network"]
Peer = Callable[[NDArray[np.float64]], NDArray[np.float64]]
LEAST: dict[Kind, float] = {"linear": 0.1, "network": 0.03}
"""Minimum strength of an edge."""


def known(seed: int, edges: int, kind: Kind, intervened: bool) -> Graph:
    """A random graph, with data from it."""
    draw = torch.Generator().manual_seed(seed)
    if intervened:
        return Graph(draw, VARIABLES, edges, kind, OBSERVATIONS, INTERVENTIONS)
    return Graph(draw, VARIABLES, edges, kind, OBSERVATIONS + VARIABLES * INTERVENTIONS, 0)


def learned(values: Tensor, marks: Tensor, hidden: int, seed: int) -> Tensor:
    """The edge strengths found by the causal module."""

    def batches() -> Iterator[dict[str, Tensor]]:
        draw = torch.Generator().manual_seed(seed)
        while True:
            rows = torch.randint(len(values), (ROWS,), generator=draw)
            yield {"variables": values[rows], "do": marks[rows]}

    torch.manual_seed(seed)
    graph = CausalGraph(VARIABLES, hidden)
    optimizer = torch.optim.Adam(graph.parameters(), lr=LR)
    plugins: list[Any] = [LossCausalPlugin(weight=1.0), LrLinearPlugin(warmup="1 step")]
    Engine(graph, optimizer, plugins=plugins).fit(batches(), until=f"{STEPS} steps")
    return graph.adjacency.detach().abs()


def notears(values: NDArray[np.float64], penalty: float = 0.1) -> NDArray[np.float64]:
    """The edge strengths found by NOTEARS: least squares with an L1 penalty, acyclic."""
    rows, n = values.shape
    rho, alpha, h = 1.0, 0.0, math.inf
    both = np.zeros(2 * n * n)
    limits = [(0, 0) if i == j else (0, None) for _ in range(2) for i in range(n) for j in range(n)]

    def unpacked(both: NDArray[np.float64]) -> NDArray[np.float64]:
        return (both[: n * n] - both[n * n :]).reshape(n, n)

    def objective(both: NDArray[np.float64]) -> tuple[float, NDArray[np.float64]]:
        w = unpacked(both)
        left, power = values - values @ w, expm(w * w)
        cycles = np.trace(power) - n
        slope = -values.T @ left / rows + (rho * cycles + alpha) * power.T * w * 2
        total = (left**2).sum() / (2 * rows) + rho / 2 * cycles**2 + alpha * cycles
        return total + penalty * both.sum(), np.concatenate(
            [slope + penalty, penalty - slope], None
        )

    while h > 1e-8 and rho < 1e16:
        before = h
        while rho < 1e16:
            found = minimize(objective, both, method="L-BFGS-B", jac=True, bounds=limits).x
            w = unpacked(found)
            h = float(np.trace(expm(w * w)) - n)
            if h <= before / 4:
                break
            rho *= 10
        both, alpha = found, alpha + rho * h
    return np.abs(unpacked(both))


def dagma(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """The strengths that DAGMA finds with its defaults, among them a threshold of 0.3."""
    from dagma.linear import DagmaLinear

    return np.abs(DagmaLinear(loss_type="l2").fit(values))


Scores = list[tuple[float, int]]
"""Of each graph: the share of the edges that was found, and the pairs that are wrong."""


def compared(
    kind: Kind, intervened: bool, seeds: Iterable[int], edges: int, peers: Mapping[str, Peer]
) -> dict[str, Scores]:
    """What the causal module finds, and what its peers do where the data are theirs."""
    found: dict[str, Scores] = {"causal": []}
    for seed in seeds:
        graph = known(seed, edges, kind, intervened)
        ours = learned(graph.values, graph.is_set, 0 if kind == "linear" else UNITS, seed)
        found["causal"].append(edges_right(graph.edges, ours, LEAST[kind]))
        for name, peer in peers.items() if kind == "linear" and not intervened else ():
            theirs = torch.from_numpy(peer(graph.values.double().numpy()))
            found.setdefault(name, []).append(edges_right(graph.edges, theirs, 0.3))
    return found


def main() -> None:
    """Print the results for each kind of data."""
    parser = argparse.ArgumentParser(prog="benchmarks.graphs", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--graphs", type=int, default=5)
    parser.add_argument("--first-seed", type=int, default=1000)
    parser.add_argument("--edges", type=int, default=20)
    options = parser.parse_args()
    peers: dict[str, Peer] = {"NOTEARS": notears}
    if find_spec("dagma"):
        peers["DAGMA"] = dagma
    else:
        print("DAGMA is skipped: pip install dagma")
    seeds = range(options.first_seed, options.first_seed + options.graphs)
    for kind, intervened in itertools.product(LEAST, (True, False)):
        data = f"{kind}, {'with' if intervened else 'without'} interventions"
        for name, scores in compared(kind, intervened, seeds, options.edges, peers).items():
            shares, wrong = zip(*scores, strict=True)
            print(
                f"{data}, {name}: found {statistics.mean(shares):.0%} ({min(shares):.0%} to "
                f"{max(shares):.0%}), wrong {', '.join(map(str, wrong))} of 45",
                flush=True,
            )


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
