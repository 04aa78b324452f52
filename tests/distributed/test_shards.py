"""Sharded checkpoints: any number of processes can resume from them."""

from __future__ import annotations

import errno
import json
import os
import resource
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from nexus_core import CheckpointError
from nexus_plugins._shared.checkpoints import folder as checkpoint_folder
from nexus_plugins.checkpoint.export import export
from nexus_plugins.ema import EmaPlugin
from nexus_plugins.fsdp import FsdpPlugin
from nexus_plugins.init import InitPlugin
from nexus_plugins.optim_adamw import OptimAdamwPlugin
from tests.distributed.processes import together
from tests.distributed.works import Seen, train_with

DIVIDED = partial(
    train_with,
    partial(FsdpPlugin, timeout=20),
    optimizer=partial(OptimAdamwPlugin, lr=1e-2, eps=1e-4),
)


def ids(seen: list[Seen], step: int) -> list[int]:
    return sorted(number for process in seen for number in process.ids[step])


@pytest.mark.slow
@pytest.mark.parametrize(("before", "after"), [(2, 4), (2, 1), (1, 2), (3, 2)])
def test_a_divided_run_goes_on_with_other_processes(
    before: int, after: int, tmp_path: Path
) -> None:
    """Fails if weights, optimizer states or averages are assembled wrongly, or samples differ."""
    work = partial(DIVIDED, 20, EmaPlugin, eval_every=5)
    alone = work()
    saved = partial(work, out=tmp_path / "run", every=6)
    first = together(before, partial(saved, stop_at=11))
    second = together(after, partial(saved, resume=True))
    assert {seen.step for seen in first} == {11}
    for seen in second:
        assert seen.losses == pytest.approx(alone.losses[11:], rel=1e-5)
        assert seen.weights == pytest.approx(alone.weights, rel=1e-5, abs=1e-6)
        assert [e["val/loss"] for e in seen.evaluations] == pytest.approx(
            [e["val/loss"] for e in alone.evaluations[2:]], rel=1e-5
        )
    for step in (11, 12):
        assert ids(second, step) == sorted(alone.ids[step])


def test_a_divided_run_that_goes_on_is_the_same_bit_for_bit(tmp_path: Path) -> None:
    """Fails if the written copy is not that of the step, or generators are lost."""
    work = partial(DIVIDED, 14, dropout=0.2)
    whole = together(2, work)
    saved = partial(work, out=tmp_path / "run", every=3)
    together(2, partial(saved, stop_at=8))
    for one, other in zip(whole, together(2, partial(saved, resume=True)), strict=True):
        assert other.losses == one.losses[8:]
        assert other.weights == one.weights


def test_the_files_hold_each_part_once_and_nothing_is_pickled(tmp_path: Path) -> None:
    """Fails if a process writes more than its shard, or a file that only PyTorch can read."""
    seen = together(2, partial(DIVIDED, 4, out=tmp_path / "run"))
    (saved,) = (tmp_path / "run/checkpoints").glob("step-*")
    found = sorted(path.name for path in (saved / "shards").iterdir())
    assert found == [f"shard-0000{n}-model-00001-of-00001.safetensors" for n in (1, 2)]
    listed = json.loads((saved / "manifest.json").read_text())["files"]
    assert {f"shards/{name}" for name in found} <= listed.keys()
    rows: dict[str, int] = {}
    for name in found:
        with safe_open(saved / "shards" / name, "pt") as file:
            for key in file.keys():  # noqa: SIM118 (it is no dict)
                rows[key] = rows.get(key, 0) + file.get_tensor(key).shape[0]
    with safe_open(saved / "shards" / found[0], "pt") as file:
        widths = {key: file.get_tensor(key)[0].numel() for key in rows}
    weights = sum(rows[key] * widths[key] for key in rows if key.startswith("model."))
    assert weights == len(seen[0].weights)
    assert load_file(saved / "model.safetensors") == {}


@pytest.mark.slow
def test_divided_weights_begin_another_run_divided_or_not(tmp_path: Path) -> None:
    """Fails if a process fills its shard with that of another."""
    together(2, partial(DIVIDED, 4, out=tmp_path / "run"))
    work = partial(DIVIDED, 3, partial(InitPlugin, source=tmp_path / "run"))
    alone, anew = work(), DIVIDED(3)
    assert alone.losses[0] < 0.95 * anew.losses[0]
    for seen in together(2, work):
        assert seen.losses == pytest.approx(alone.losses, rel=1e-6)
        assert seen.weights == pytest.approx(alone.weights, rel=1e-5, abs=1e-6)


@pytest.mark.parametrize(
    "fault", ["damaged", *(pytest.param(f, marks=pytest.mark.slow) for f in ("gone", "longer"))]
)
def test_a_damaged_part_makes_all_take_the_checkpoint_before(fault: str, tmp_path: Path) -> None:
    """Fails if a process uses a shard that another found damaged, or all start from scratch."""
    work = partial(DIVIDED, 9, out=tmp_path / "run", every=3)
    before = together(2, work)
    part = tmp_path / "run/checkpoints/step-00000009/shards"
    part /= "shard-00002-model-00001-of-00001.safetensors"
    content = bytearray(part.read_bytes())
    content[-1] ^= 1
    if fault == "gone":
        part.unlink()
    else:
        part.write_bytes(content + b"x" * (fault == "longer"))
    for seen, one in zip(together(2, partial(work, resume=True)), before, strict=True):
        assert seen.losses == one.losses[6:]
        assert seen.weights == one.weights


def test_one_process_without_a_launcher_goes_on_and_exports(tmp_path: Path) -> None:
    """Fails if one process cannot resume a sharded run, or export its weights."""
    seen = together(2, partial(DIVIDED, 6, out=tmp_path / "run"))
    export(tmp_path / "run", tmp_path / "model")
    weights = load_file(tmp_path / "model/model.safetensors")
    flat = [number for tensor in weights.values() for number in tensor.reshape(-1).tolist()]
    assert sorted(flat) == sorted(seen[0].weights)
    assert DIVIDED(8, out=tmp_path / "run", resume=True).step == 8


def full_disk(folder: Path) -> None:
    """A run whose second process cannot write files."""
    if os.environ["RANK"] == "1":
        resource.setrlimit(resource.RLIMIT_FSIZE, (64, resource.RLIM_INFINITY))
    DIVIDED(4, out=folder)


def unusable_folder(folder: Path) -> None:
    """A run whose rank 0 fails before the others have written anything."""
    folder.mkdir(exist_ok=True)
    (folder / "checkpoints").touch()
    DIVIDED(4, out=folder)


def full_disk_at_the_end(folder: Path) -> None:
    """A run whose rank 0 fails after the others have written their shards."""

    def fail(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    if os.environ["RANK"] == "0":
        checkpoint_folder.write_tensors = fail
    DIVIDED(4, out=folder)


@pytest.mark.slow
@pytest.mark.parametrize("broken", [full_disk, unusable_folder, full_disk_at_the_end])
def test_a_process_that_cannot_write_does_not_leave_the_others_waiting(
    broken: Callable[[Path], None], tmp_path: Path
) -> None:
    """Fails if a disk error in one process hangs the others, or leaves a partial checkpoint."""
    with pytest.raises(AssertionError) as raised:
        together(2, partial(broken, tmp_path / "run"))
    assert all(f"rank {rank}: Traceback" in str(raised.value) for rank in (0, 1))
    assert str(raised.value).count("RunError: the checkpoint of step 4 could not be written") == 2
    assert not list((tmp_path / "run").glob("checkpoints/*"))


class TiedNet(nn.Module):
    """Two layers with a tied weight of fewer rows than processes."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(5, 2), nn.Linear(5, 2)
        self.second.weight = self.first.weight
        self.between, self.last = nn.Linear(2, 5), nn.Linear(2, 4)

    def forward(self, x: Tensor) -> Tensor:
        between = self.between(self.first(x)).tanh()
        return self.last(self.second(between).tanh())


@pytest.mark.slow
def test_a_process_that_holds_nothing_of_a_tied_weight_saves_with_the_others(
    tmp_path: Path,
) -> None:
    """Fails if tied weights can only be saved if every process has a row of them."""
    work = partial(DIVIDED, 6, net=TiedNet, out=tmp_path / "run", every=4)
    alone = DIVIDED(9, net=TiedNet)
    together(3, work)
    for seen in together(2, partial(DIVIDED, 9, net=TiedNet, out=tmp_path / "run", resume=True)):
        assert seen.losses == pytest.approx(alone.losses[6:], rel=1e-5)


@pytest.mark.parametrize("intruder", ["a file", "a link"])
def test_what_the_manifest_does_not_list_is_not_read(intruder: str, tmp_path: Path) -> None:
    """Fails if unlisted shards are used as weights of the run."""
    together(2, partial(DIVIDED, 4, out=tmp_path / "run"))
    (saved,) = (tmp_path / "run/checkpoints").glob("step-*")
    if intruder == "a file":
        found = next((saved / "shards").iterdir())
        (saved / "shards/zz.safetensors").write_bytes(found.read_bytes())
    else:
        (saved / "shards").rename(tmp_path / "elsewhere")
        (saved / "shards").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(CheckpointError, match="does not match the manifest"):
        export(tmp_path / "run", tmp_path / "model")
