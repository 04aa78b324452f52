"""Loaders of other libraries, in real processes that are killed and resumed twice.

Each test is skipped if its library is not installed; none is a dependency.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from nexus_core import Engine, Plugin, PluginConfig, hookimpl
from nexus_core.plan import load

ROWS, SIZE, STEPS = 38, 4, 24


class Rows(Dataset[Tensor]):
    """Row i is i."""

    def __len__(self) -> int:
        return ROWS

    def __getitem__(self, index: int) -> Tensor:
        return torch.tensor([float(index)])


def from_torch(folder: Path) -> Iterable[Any]:
    return DataLoader(Rows(), SIZE, shuffle=True, num_workers=2)


def from_torchdata(folder: Path) -> Iterable[Any]:
    from torchdata.stateful_dataloader import StatefulDataLoader

    loader: Iterable[Any] = StatefulDataLoader(Rows(), SIZE, shuffle=True, num_workers=2)
    return loader


def streamed() -> Any:
    import datasets

    rows = datasets.Dataset.from_dict({"id": list(range(ROWS))})
    return rows.to_iterable_dataset(num_shards=2).shuffle(seed=3, buffer_size=12)


def from_datasets(folder: Path) -> Iterable[Any]:
    return DataLoader(streamed(), SIZE)


def from_datasets_batched(folder: Path) -> Iterable[Any]:
    return streamed().batch(SIZE)  # type: ignore[no-any-return]


def from_both(folder: Path) -> Iterable[Any]:
    from torchdata.stateful_dataloader import StatefulDataLoader

    loader: Iterable[Any] = StatefulDataLoader(streamed(), SIZE, num_workers=2)
    return loader


def from_grain(folder: Path) -> Iterable[Any]:
    import grain.python as grain

    rows = grain.MapDataset.range(ROWS).shuffle(seed=1)
    return rows.to_iter_dataset().batch(SIZE)  # type: ignore[no-any-return]


def from_grain_loader(folder: Path) -> Iterable[Any]:
    import grain.python as grain

    sampler = grain.IndexSampler(
        ROWS, shuffle=True, seed=1, num_epochs=1, shard_options=grain.NoSharding()
    )
    batch = grain.Batch(SIZE)
    source = list(range(ROWS))
    return grain.DataLoader(  # type: ignore[no-any-return]
        data_source=source, sampler=sampler, operations=[batch], worker_count=0
    )


def a_row(index: int) -> dict[str, Tensor]:
    return {"id": torch.tensor([index])}


def from_litdata(folder: Path) -> Iterable[Any]:
    import litdata

    if not folder.exists():
        litdata.optimize(
            fn=a_row,
            inputs=list(range(ROWS)),
            output_dir=str(folder),
            chunk_size=5,
            num_workers=1,
            start_method="fork",
        )
    data = litdata.StreamingDataset(str(folder), shuffle=True, seed=1)
    return litdata.StreamingDataLoader(data, batch_size=SIZE, num_workers=2)  # type: ignore[no-any-return]


MAKES: dict[str, tuple[Callable[[Path], Iterable[Any]], tuple[str, ...]]] = {
    "torch": (from_torch, ()),
    "torchdata": (from_torchdata, ("torchdata",)),
    "datasets": (from_datasets, ("datasets",)),
    "datasets, batched": (from_datasets_batched, ("datasets",)),
    "datasets in torchdata": (from_both, ("datasets", "torchdata")),
    "grain": (from_grain, ("grain",)),
    "grain's loader": (from_grain_loader, ("grain",)),
    "litdata": (from_litdata, ("litdata",)),
}


def ids_of(batch: Any) -> list[int]:
    rows = batch["id"] if isinstance(batch, dict) else batch
    return np.asarray(rows).flatten().astype(int).tolist()  # type: ignore[no-any-return]


class NotesPlugin(Plugin[PluginConfig]):
    """Records the ids of each step, and the weights after it."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self._path = path
        self._ids: list[int] = []

    @hookimpl
    def on_batch(self, batch: Any) -> None:
        self._ids += ids_of(batch)

    @hookimpl
    def on_step_end(self, engine: Engine) -> None:
        weights = [value.flatten().tolist() for value in engine.model.state_dict().values()]
        note = {"step": engine.state.step, "ids": self._ids, "weights": weights}
        with self._path.open("a") as file:
            file.write(json.dumps(note) + "\n")
        self._ids = []


def loss(model: nn.Module, batch: Any) -> Tensor:
    x = torch.tensor([[float(index)] for index in ids_of(batch)])
    return model(x / ROWS).square().mean()  # type: ignore[no-any-return]


def live(make: str, folder: Path) -> None:
    """The work of a process: the run, resumed if there is a checkpoint."""
    multiprocessing.set_start_method("fork", force=True)  # for the workers, as on Linux
    torch.manual_seed(int.from_bytes(os.urandom(4), "big") if (folder / "out").exists() else 1)
    data = MAKES[make][0](folder.parent / "rows")
    torch.manual_seed(1)
    model = nn.Sequential(nn.Dropout(0.5), nn.Linear(1, 1))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    plugins = [
        load("checkpoint")(every="1 steps", keep_last=3, best=None),
        NotesPlugin(folder / "notes.jsonl"),
    ]
    engine = Engine(
        model, optimizer, loss=loss, plugins=plugins, out=folder / "out", accumulate=2, seed=1
    )
    engine.resume("auto")
    engine.fit(data, until=f"{STEPS} steps")


def notes(folder: Path) -> list[dict[str, Any]]:
    path = folder / "notes.jsonl"
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]


def finish(nursery: Any, make: str, folder: Path, kill_at: int | None) -> None:
    """Run a process, and kill it after a step."""
    process = nursery.Process(target=live, args=(make, folder))
    process.start()
    while process.is_alive():
        if kill_at is not None and (seen := notes(folder)) and seen[-1]["step"] >= kill_at:
            process.kill()
            break
        process.join(0.002)
    process.join()
    assert process.exitcode == (0 if kill_at is None else -signal.SIGKILL)


@pytest.mark.slow
@pytest.mark.parametrize("make", MAKES)
def test_a_run_killed_twice_and_resumed_twice_trains_on_the_same_rows(
    make: str, tmp_path: Path
) -> None:
    """Fails if rows are repeated or skipped, or the final weights differ."""
    for library in MAKES[make][1]:
        pytest.importorskip(library, reason=f"{library} is not installed: pip install {library}")
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    for folder in (whole, killed):
        folder.mkdir()
    nursery = multiprocessing.get_context("forkserver")
    nursery.set_forkserver_preload([__name__])
    finish(nursery, make, whole, None)
    for kill_at in (4, 13, None):
        finish(nursery, make, killed, kill_at)
    seen = notes(killed)
    assert len({note["step"] for note in seen}) == STEPS
    starts = [i for i in range(1, len(seen)) if seen[i]["step"] <= seen[i - 1]["step"] + 1]
    assert starts
    expected = {note["step"]: note for note in notes(whole)}
    assert [note for note in seen if note != expected[note["step"]]] == []
