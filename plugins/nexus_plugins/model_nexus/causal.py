"""The causal module: variables and a learned causal graph."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from nexus_plugins.model_nexus.residual import GatedWrite, Part, widened

__all__ = ["CausalGraph", "CausalModule"]

EDGE_STD = 0.05
HIDDEN_STD = 0.1
LENGTH_FLOOR = 1e-12  # inside the square root, whose slope at 0 would be infinite
LEAST_LOG_STD = -4.0


class CausalGraph(nn.Module):
    """Explain each variable by the others: `v_j = f_j(v) + noise`, with a strength for each edge.

    A mechanism f_j is linear, or a small network (tanh) of which each variable but j itself is an
    input. The strength of the edge from i to j is the weight, or the norm of the weights from i in
    the first layer of f_j: if it is 0, j does not depend on i. The noise of each variable is
    Gaussian, with a learned scale.

    It also works as a standalone model: an `Engine` with `CausalGraph(["rain", "wet"])` and
    `LossCausalPlugin` learns a graph from batches of `variables`, and `do` for interventions.

    Args:
        variables: their names, or their number; at least 2.
        hidden: hidden units of each mechanism; 0: linear.

    Source: linear and multilayer structural models of NOTEARS (Zheng et al. 2018; 2020, section
        3.2); noise of unequal scale as in GOLEM-NV (Ng et al. 2020).
    """

    active_modules: tuple[str, ...] = ("causal",)

    def __init__(self, variables: int | Sequence[str], hidden: int = 0) -> None:
        super().__init__()
        numbered = isinstance(variables, int)
        self.names = tuple(map(str, range(variables) if numbered else variables))  # type: ignore[arg-type]
        n, self.hidden = len(self.names), hidden
        self.bias = nn.Parameter(torch.zeros(n))
        self.log_std = nn.Parameter(torch.zeros(n))
        if hidden:
            self.first = nn.Parameter(torch.randn(n, n, hidden) * HIDDEN_STD)
            self.first_bias = nn.Parameter(torch.randn(n, hidden) * HIDDEN_STD)
            self.second = nn.Parameter(torch.randn(n, hidden) * hidden**-0.5)
        else:
            self.edges = nn.Parameter(torch.randn(n, n) * EDGE_STD)

    @property
    def adjacency(self) -> Tensor:
        """`(n, n)`: the strength of the effect of variable i on variable j; its diagonal is 0."""
        if not self.hidden:
            return self.edges.masked_fill(self._itself(), 0)
        lengths = (self.first.square().sum(-1) + LENGTH_FLOOR).sqrt()
        return lengths.masked_fill(self._itself(), 0)

    def explained(self, variables: Tensor) -> Tensor:
        """The prediction of each variable from the others, `(..., n)`."""
        kind = variables.dtype
        if not self.hidden:
            return variables @ self.adjacency.to(kind) + self.bias.to(kind)
        first = self.first.masked_fill(self._itself().unsqueeze(-1), 0).to(kind)
        units = torch.einsum("...i,ijh->...jh", variables, first) + self.first_bias.to(kind)
        return (units.tanh() * self.second.to(kind)).sum(-1) + self.bias.to(kind)

    def reports(self, variables: Tensor) -> dict[str, Tensor]:
        """The inputs of the loss: `adjacency`, `variables`, `explained` and `log_std` of the noise.

        Variables are detached, so that training does not make them easy to explain; float32 or
        wider.
        """
        with torch.autocast(variables.device.type, enabled=False):
            given = widened(variables.detach())
            return {
                "adjacency": self.adjacency,
                "variables": given,
                "explained": self.explained(given),
                "log_std": self.log_std.clamp_min(LEAST_LOG_STD),
            }

    def forward(self, variables: Tensor) -> dict[str, dict[str, dict[str, Tensor]]]:
        """Explain observed variables `(..., n)`.

        Returns:
            `{"module_outputs": {"causal": reports}}`, as `loss_causal` reads it.
        """
        return {"module_outputs": {"causal": self.reports(variables)}}

    def _itself(self) -> Tensor:
        return torch.eye(len(self.names), dtype=torch.bool, device=self.bias.device)


class CausalModule(Part):
    """A probe: read variables from each token's state, and learn their causal graph.

    It writes the graph's prediction of the variables to the stream. No gradient flows from what it
    reads to the backbone.

    Shapes: B batch, T time, D model, n variables.

    Args:
        d_model: width D of the backbone states.
        variables: their names, or their number; at least 2.
        hidden: hidden units of each mechanism; 0: linear.
    """

    def __init__(self, d_model: int, variables: int | Sequence[str] = 16, hidden: int = 0) -> None:
        super().__init__()
        self.graph = CausalGraph(variables, hidden)
        n = len(self.graph.names)
        self.read = nn.Linear(d_model, n)
        self.write = GatedWrite(n, d_model)

    @property
    def adjacency(self) -> Tensor:
        """As in `CausalGraph`."""
        return self.graph.adjacency

    def forward(
        self, h: Tensor, document: Tensor | None = None
    ) -> tuple[Tensor, dict[str, dict[str, Tensor]]]:
        """Update states of any leading shape, each independently.

        Args:
            h: `(..., D)` normalized backbone states.
            document: unused: tokens do not interact.

        Returns:
            The update `(..., D)`, and `{"causal": reports}` as in `CausalGraph.reports`, with the
            variables as they are `read`, `(..., n)`.
        """
        variables = self.read(h.detach())
        update: Tensor = self.write(self.graph.explained(variables))
        return update, {"causal": {**self.graph.reports(variables), "read": variables}}
