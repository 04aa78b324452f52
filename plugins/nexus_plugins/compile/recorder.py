"""Work of the device that is captured in graphs, and what is said if it is not."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch

from nexus_core import ConfigError

if TYPE_CHECKING:
    from nexus_core import Engine

__all__ = ["UNLIKE", "WARM_UP", "Recorder", "tell"]

WARM_UP = 3  # eager steps of a kind before it is captured; the last of them is watched
UNLIKE = 5  # consecutive steps, each of a new kind, after which no more are captured


class Recorder:
    """Captures work of the device in graphs, which share their memory.

    Args:
        device: of the run.

    Attributes:
        module: of the device, such as `torch.cuda`.
    """

    def __init__(self, device: torch.device) -> None:
        self.module: Any = torch.get_device_module(device)
        self._stream = self.module.Stream()
        self._pool: object = None

    @contextmanager
    def beside(self) -> Iterator[None]:
        """Queue work on the stream that graphs are captured on."""
        self._stream.wait_stream(self.module.current_stream())
        try:
            with self.module.stream(self._stream):
                yield
        finally:
            self.module.current_stream().wait_stream(self._stream)

    def captured(
        self, what: str, work: Callable[[], object], generators: Iterable[torch.Generator] = ()
    ) -> Any:
        """A graph of some work, none of which is executed.

        Args:
            what: the work in words.
            work: queues it.
            generators: of the device, besides its default, that it may draw from.

        Raises:
            ConfigError: it cannot be captured.
        """
        graph = self.module.CUDAGraph()
        for generator in generators:
            graph.register_generator_state(generator)
        try:
            with self.module.graph(
                graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"
            ):
                work()
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            raise ConfigError(
                f"compile.step_graph: {what} cannot be captured in a graph: {_first(error)}; leave "
                "out compile.step_graph"
            ) from error
        self._pool = self._pool or graph.pool()
        return graph


def tell(engine: Engine, what: str, reason: str) -> None:
    """Say why something runs eagerly."""
    said = f"compile.step_graph: {what} run eagerly instead of from a graph: {reason}"
    warnings.warn(said, RuntimeWarning, stacklevel=2)
    engine.hook.on_note(engine=engine, title="compile/step_graph", text=said)


def _first(error: BaseException) -> str:
    """What went wrong first: a capture that fails cannot be ended without a further error."""
    while error.__context__ is not None:
        error = error.__context__
    return str(error).partition("\n")[0]
