"""The adapter of a run's model for lm-evaluation-harness."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from lm_eval import simple_evaluate
from lm_eval.api.model import TemplateLM
from lm_eval.tasks import TaskManager
from torch import Tensor

from nexus_core import ConfigError
from nexus_plugins._shared.outputs import rows_of

if TYPE_CHECKING:
    from nexus_core.engine import Engine
    from nexus_plugins_contrib.eval_harness.plugin import EvalHarnessConfig

__all__ = ["asked"]


def asked(engine: Engine, codec: Any, config: EvalHarnessConfig) -> dict[str, float]:
    """The metrics of all tasks, as `harness/<task>/<metric>`.

    Args:
        engine: the engine whose forward pass is used.
        codec: the tokenizer of the data.
        config: the settings.

    Raises:
        ConfigError: a task does not exist.
    """
    logging.getLogger("lm_eval").setLevel(logging.WARNING)
    tasks = TaskManager(include_path=None if config.include is None else str(config.include))
    if unknown := [name for name in config.tasks if name not in tasks.all_tasks]:
        raise ConfigError(
            f"eval_harness.tasks: no task '{unknown[0]}'; `lm_eval ls tasks` lists them, "
            "and eval_harness.include adds a folder of tasks"
        )
    found: Any = simple_evaluate(
        model=_Model(engine, codec, config),
        tasks=[*config.tasks],
        task_manager=tasks,
        num_fewshot=config.shots,
        limit=config.limit,
        bootstrap_iters=0,
        random_seed=engine.seed,
        numpy_random_seed=engine.seed,
        torch_random_seed=engine.seed,
        fewshot_random_seed=engine.seed,
        log_samples=False,
    )
    return _metrics(found["results"])


class _Model(TemplateLM):  # type: ignore[misc]
    """The adapter of a run's model for the harness."""

    def __init__(self, engine: Engine, codec: Any, config: EvalHarnessConfig) -> None:
        super().__init__()
        self._engine, self._codec, self._config = engine, codec, config
        self.eot = int(codec.eos)

    @property
    def eot_token_id(self) -> int:
        return self.eot

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **_: Any
    ) -> list[int]:
        ids: list[int] = self._codec.encode(string)
        return ids

    def _loglikelihood_tokens(
        self, requests: Sequence[Any], disable_tqdm: bool = False, **_: Any
    ) -> list[tuple[float, bool]]:
        """The log-probability of each continuation, in nats, and whether it is greedy."""
        found: list[tuple[float, bool]] = []
        size = self._config.batch_size
        for first in range(0, len(requests), size):
            some = [(context, ending) for _, context, ending in requests[first : first + size]]
            found += self._scored(some)
        return found

    def _scored(self, pairs: Sequence[tuple[list[int], list[int]]]) -> list[tuple[float, bool]]:
        rows = [[*context, *ending][-self._config.max_length - 1 :] for context, ending in pairs]
        logits = self._logits([row[:-1] for row in rows])
        found = []
        for row, (_, ending), own in zip(rows, pairs, logits, strict=True):
            last = len(row) - 1
            shares = F.log_softmax(own[last - len(ending) : last].float(), -1)
            wanted = torch.tensor(row[-len(ending) :], device=shares.device)
            total = float(shares.gather(1, wanted[:, None]).sum())
            found.append((total, bool((shares.argmax(-1) == wanted).all())))
        return found

    def loglikelihood_rolling(
        self, requests: Sequence[Any], disable_tqdm: bool = False
    ) -> list[float]:
        """The log-probability of each text, in nats, in windows if it is long."""
        totals = []
        for (text,) in [request.args for request in requests]:
            ids = self.tok_encode(text)
            width = self._config.max_length
            parts = [ids[place : place + width] for place in range(0, len(ids), width)]
            pairs = [
                ([self.eot] if not place else [ids[place * width - 1]], part)
                for place, part in enumerate(parts)
            ]
            totals.append(sum(total for total, _ in self._loglikelihood_tokens(
                [((), *pair) for pair in pairs]
            )))  # fmt: skip
        return totals

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """The greedy continuation of each context, up to its stop texts."""
        return [self._generated(*request.args) for request in requests]

    def _generated(self, context: str, settings: Mapping[str, Any]) -> str:
        stops = settings.get("until") or []
        stops = [stops] if isinstance(stops, str) else stops
        ids, written = self.tok_encode(context) or [self.eot], ""
        start = len(ids)
        for _ in range(int(settings.get("max_gen_toks", 256))):
            (logits,) = self._logits([ids[-self._config.max_length :]])
            ids.append(int(logits[min(len(ids), self._config.max_length) - 1].argmax()))
            written = self._codec.decode(ids[start:])
            if ids[-1] == self.eot or any(stop in written for stop in stops):
                break
        ends = [written.find(stop) for stop in stops if stop in written]
        return written[: min(ends, default=len(written))]

    def _logits(self, rows: Sequence[Sequence[int]]) -> Tensor:
        """The logits `(B, T, V)` of right-padded rows."""
        width = max(map(len, rows))
        ids = torch.tensor([[*row, *[self.eot] * (width - len(row))] for row in rows])
        batch = {"input_ids": ids.to(self._engine.device)}
        with torch.no_grad():
            output: Any = self._engine.hook.forward(engine=self._engine, batch=batch, step=None)
        states, head = rows_of(output)
        return states if head is None else states.to(head.dtype) @ head.T


def _metrics(results: Mapping[str, Mapping[str, Any]]) -> dict[str, float]:
    """All metrics of all tasks by name, without their standard errors."""
    return {
        f"harness/{task}/{name.partition(',')[0]}": float(value)
        for task, found in results.items()
        for name, value in found.items()
        if isinstance(value, int | float) and "_stderr" not in name and "," in name
    }
