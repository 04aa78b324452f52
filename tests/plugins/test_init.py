"""Starting from weights: where they are found, what is loaded, and what is rejected."""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file, save_model
from torch import Tensor, nn

import called
from nexus_core import CheckpointError, ConfigError, Engine, Plugin
from nexus_core.cli.run import main as nexus_run
from nexus_plugins.checkpoint import CheckpointPlugin
from nexus_plugins.ema import EmaPlugin
from nexus_plugins.init import InitPlugin
from nexus_plugins.init.match import renamed

Weights = Mapping[str, Tensor]


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def weights(seed: int = 1) -> dict[str, Tensor]:
    """The weights of another net."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return dict(called.Net().state_dict())


def engine_of(
    *plugins: Plugin[Any], net: nn.Module | None = None, out: Path | None = None
) -> Engine:
    torch.manual_seed(0)
    model = net or called.Net()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return Engine(
        model,
        torch.optim.SGD(trained, 0.1),
        loss=lambda model, batch: nn.functional.cross_entropy(model(batch[0]), batch[1]),
        plugins=plugins,
        out=out,
    )


def started(engine: Engine, steps: int = 0) -> dict[str, Tensor]:
    """The weights after some steps; 0: the initial ones."""
    if steps == 0:
        engine.stop()
    engine.fit(list(called.batches([5, 6])), until=steps or "1000 steps")
    return {name: value.clone() for name, value in engine.model.state_dict().items()}


def same(one: Weights, other: Weights) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def run_before(out: Path, *plugins: Plugin[Any]) -> dict[str, Tensor]:
    """A finished run: its weights, with its checkpoints."""
    torch.manual_seed(5)
    return started(engine_of(CheckpointPlugin(every="2 steps"), *plugins, out=out), 4)


# -- where weights are found


def in_file(folder: Path) -> Path:
    save_file(weights(), folder / "weights.safetensors")
    return folder / "weights.safetensors"


def in_folder(folder: Path) -> Path:
    (folder / "model").mkdir()
    save_file(weights(), folder / "model/model.safetensors")
    (folder / "model/config.json").write_text("{}")
    (folder / "model/pytorch_model.bin").write_bytes(b"not read")
    return folder / "model"


def in_parts(folder: Path) -> Path:
    (folder / "model").mkdir()
    table = {}
    for number, (name, tensor) in enumerate(weights().items()):
        table[name] = f"model-{number}.safetensors"
        save_file({name: tensor}, folder / "model" / table[name])
    index = {"metadata": {}, "weight_map": table}
    (folder / "model/model.safetensors.index.json").write_text(json.dumps(index))
    return folder / "model"


def in_cache(folder: Path) -> Path:
    """The layout of the Hugging Face cache: links to blobs."""
    blobs, revision = folder / "models--a--b/blobs", folder / "models--a--b/snapshots/f00"
    blobs.mkdir(parents=True)
    revision.mkdir(parents=True)
    save_file(weights(), blobs / "0123")
    (revision / "model.safetensors").symlink_to("../../blobs/0123")
    return revision


@pytest.mark.parametrize("place", [in_file, in_folder, in_parts, in_cache])
def test_weights_are_found_wherever_they_are_usually(place: Any, folder: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert same(started(engine_of(InitPlugin(source=place(folder)))), weights())


def test_a_run_a_checkpoint_and_an_average_of_one_are_found(folder: Path) -> None:
    ended = run_before(folder / "run", ema := EmaPlugin(decay=0.5))
    for source in ("run", "run/checkpoints", "run/checkpoints/final"):
        assert same(started(engine_of(InitPlugin(source=source))), ended)
    average = ema.state_dict()["average"]
    found = started(engine_of(InitPlugin(source="run", ema=True)))
    assert same(found, average)  # type: ignore[arg-type]
    assert not same(found, ended)


# -- what is loaded


class Larger(nn.Module):
    """A net with another head, and its body under another name."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.ModuleDict({"net": called.Net()})
        self.encoder["net"].head = nn.Linear(8, 5)
        self.extra = nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.encoder["net"](x)
        return found


def test_names_are_changed_and_chosen(folder: Path) -> None:
    plugin = InitPlugin(
        source=in_file(folder),
        map={"body.?.*": "encoder.net.body.0.*", "*": "encoder.net.*"},
        only=["encoder.*"],
        skip=["*.head.*"],
    )
    found, before = started(engine_of(plugin, net=Larger())), weights()
    assert torch.equal(found["encoder.net.body.0.weight"], before["body.0.weight"])
    untouched = started(engine_of(net=Larger()))
    assert torch.equal(found["encoder.net.head.weight"], untouched["encoder.net.head.weight"])


def test_what_fits_is_taken_and_the_rest_is_told(folder: Path) -> None:
    """In warnings, to loggers, and in the run summary."""
    save_file({**weights(), "old.weight": torch.ones(2)}, folder / "weights.safetensors")
    net = called.Net()
    net.head = nn.Linear(8, 2, bias=False)
    net.tail = nn.Linear(2, 2)
    net.body[0] = nn.Linear(2, 8).double()
    net.body[1] = nn.Linear(8, 4)  # of another shape
    save_file(
        {**load_file("weights.safetensors"), "body.1.weight": torch.ones(3, 8)},
        folder / "weights.safetensors",
    )
    plugin = InitPlugin(source=folder / "weights.safetensors", strict=False)
    with pytest.warns(RuntimeWarning) as told:
        found = started(engine_of(plugin, net=net))
    said = str(told[0].message)
    assert "loaded 3 of 7 tensors (" in said
    assert "3 missing in the source: body.1.bias, tail.weight, tail.bias" in said
    assert "2 not in the model: head.bias, old.weight" in said
    assert "1 different from the model's: body.1.weight ((3, 8), not (4, 8))" in said
    assert torch.equal(found["body.0.weight"], weights()["body.0.weight"].double())
    assert plugin.summarize()["began with"].startswith("3 tensors from ")


@pytest.mark.parametrize(
    ("changes", "settings", "said"),
    [
        ({"head.bias": None}, {}, r"1 missing in the source: head\.bias.*init.*skip.*strict"),
        ({"more": torch.ones(1)}, {}, "1 not in the model: more"),
        ({"head.bias": torch.ones(3)}, {}, r"head\.bias \(\(3,\), not \(2,\)\)"),
        ({"head.bias": torch.ones(2, dtype=torch.int8)}, {}, r"torch\.int8, not torch\.float32"),
        ({}, {"map": {"*": "model.*"}}, r'rename: init\.map: \{"model\.\*": "\*"\}'),
        ({}, {"map": {"*": "other*"}, "strict": False}, "do not fit the model"),
        ({}, {"map": {"haed.*": "*"}}, r"init\.map: the pattern 'haed\.\*' matches no tensor"),
        (
            {},
            {"map": {"*.bias": "bias"}},
            "gives 'body.0.bias' and 'head.bias' the same name, 'bias'",
        ),
        ({}, {"skip": ["haed.*"]}, r"init\.skip: the pattern 'haed\.\*' matches no parameter"),
        ({}, {"only": ["haed.*"]}, r"init\.only: the pattern"),
        ({}, {"freeze": ["haed.*"]}, r"init\.freeze: the pattern"),
        ({}, {"map": {"head": "*"}}, r"has more \* than the pattern 'head'"),
        ({}, {"ema": True}, "is not a run's checkpoint"),
    ],
)
def test_what_does_not_fit_is_refused(
    changes: dict[str, Tensor | None], settings: dict[str, Any], said: str, folder: Path
) -> None:
    changed = {**weights(), **changes}
    given = {name: tensor for name, tensor in changed.items() if tensor is not None}
    save_file(given, folder / "weights.safetensors")
    before = called.Net()
    state = {name: value.clone() for name, value in before.state_dict().items()}
    with pytest.raises((ConfigError, CheckpointError), match=said):
        started(engine_of(InitPlugin(source="weights.safetensors", **settings), net=before))
    assert same(before.state_dict(), state)


class Tied(nn.Module):
    """Two names of one tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(2, 2), nn.Linear(2, 2)
        self.second.weight = self.first.weight

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.second(self.first(x))
        return found


def test_tied_weights_need_one_name_and_must_agree(folder: Path) -> None:
    save_model(Tied(), "tied.safetensors")  # omits the second name
    before = load_file("tied.safetensors")
    assert len(before) == 3
    found = started(engine_of(InitPlugin(source="tied.safetensors"), net=Tied()))
    assert torch.equal(found["first.weight"], before.get("first.weight", found["second.weight"]))
    untied = {name: torch.full_like(value, len(name)) for name, value in found.items()}
    save_file(untied, "untied.safetensors")
    with pytest.raises(CheckpointError, match=r"'first\.weight' and 'second\.weight' differ"):
        started(engine_of(InitPlugin(source="untied.safetensors"), net=Tied()))


NAMES = st.lists(st.text("ab.", min_size=1, max_size=6), min_size=1, max_size=5, unique=True)


@given(names=NAMES, prefix=st.text("ab.", max_size=4), rest=st.text("ab.", max_size=4))
def test_renaming_there_and_back_changes_nothing(names: list[str], prefix: str, rest: str) -> None:
    there = renamed(names, {"*": f"{prefix}*{rest}"})
    assert list(there) == [prefix + name + rest for name in names]
    back = renamed(there, {f"{prefix}*{rest}": "*"})
    assert list(back) == names


# -- when


def test_it_is_taken_once_and_before_others_copy_the_weights(folder: Path) -> None:
    """Fails if an average starts from the old weights, or a resumed run is reset."""
    source = in_file(folder)
    whole = started(engine_of(InitPlugin(source=source)), 4)
    ema = EmaPlugin(decay=0.999)
    first = engine_of(InitPlugin(source=source), ema)
    started(first)
    average: Any = ema.state_dict()["average"]
    assert same(average, weights())
    first = engine_of(InitPlugin(source=source))
    started(first, 2)
    source.unlink()
    snapshot = first.state_dict()
    second = engine_of(InitPlugin(source=source))
    second.load_state_dict(snapshot)
    assert same(started(second, 4), whole)


def test_frozen_parameters_stay(folder: Path) -> None:
    plugin = InitPlugin(source=in_file(folder), freeze=["body.*"])
    found, before = started(engine_of(plugin), 3), weights()
    moved = {name for name in found if not torch.equal(found[name], before[name])}
    assert moved == {"head.weight", "head.bias"}


def test_fine_tuning_begins_with_the_loss_of_the_exported_model(folder: Path) -> None:
    """Through the commands: a NEXUS is trained and exported, and its weights start another run."""
    (folder / "corpus.txt").write_text(
        "".join(f"line {i}: {'ab' * (i % 17)}\n" for i in range(300))
    )
    config: dict[str, Any] = {
        "until": "4 steps",
        "log_every": "1 steps",
        "plugins": {
            "data_text": {"train": "corpus.txt", "seq_len": 32, "batch_size": 4},
            "model_nexus": {
                **{"d_model": 16, "ssm_n_layers": 1, "ssm_head_dim": 16, "dropout": 0.0},
                "causal": False,  # it draws noise in training
            },
            "loss_lm": {"label_smoothing": 0.0},
            "optim_adamw": {"lr": 0.01},
            "checkpoint": {},
            "jsonl": {},
        },
    }
    Path("before.yaml").write_text(yaml.safe_dump(config))
    config["seed"] = 9
    config["plugins"]["init"] = {"source": "exported"}
    Path("tuning.yaml").write_text(yaml.safe_dump(config))
    for arguments in (
        ["before.yaml", "--out", "before", "--quiet"],
        ["export", "before/checkpoints/final", "--out", "exported"],
        ["tuning.yaml", "--out", "tuning", "--quiet"],
    ):
        ran = CliRunner().invoke(nexus_run, arguments)
        assert ran.exit_code == 0, ran.output
    assert own_loss(config) == pytest.approx(first_loss("tuning"), rel=1e-6)
    assert first_loss("tuning") < first_loss("before")


def first_loss(out: str) -> float:
    lines = map(json.loads, (Path(out) / "metrics.jsonl").read_text().splitlines())
    return next(float(line["train/lm_loss"]) for line in lines if "train/lm_loss" in line)


def own_loss(config: Mapping[str, Any]) -> float:
    """The loss of the exported model, built and loaded manually, on the run's first batch."""
    from nexus_plugins.data_text import DataTextPlugin
    from nexus_plugins.model_nexus import NEXUSConfig, NEXUSCore

    facts = json.loads(Path("exported/config.json").read_text())
    known = {key: value for key, value in facts.items() if key in NEXUSConfig.model_fields}
    model = NEXUSCore(NEXUSConfig(**known))
    model.load_state_dict(load_file("exported/model.safetensors"))
    run = Engine(
        model,
        torch.optim.SGD(model.parameters(), 0.1),
        loss=lambda model, batch: model(batch["input_ids"]).sum(),
        seed=config["seed"],
        plugins=[data := DataTextPlugin(**config["plugins"]["data_text"])],
    )
    batch = next(iter(data.make_data(run).train))
    with torch.no_grad():
        logits = model(batch["input_ids"], batch.get("segment_ids"))
        loss = nn.functional.cross_entropy(logits.flatten(0, 1), batch["labels"].flatten())
    return float(loss)


# -- what is never read


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("model.pt", r"'model\.pt' is a pickle.*save_file\(torch\.load\('model\.pt', weights_only"),
        ("a/pytorch_model.bin", "is a pickle"),
        ("a/notes.txt", "has no weights; expected a run, a checkpoint, or a folder"),
        ("notes.txt", "is not a safetensors file"),
    ],
)
def test_nothing_is_unpickled(name: str, said: str, folder: Path) -> None:
    (folder / "a").mkdir()
    torch.save(weights(), folder / name)
    source = Path(name).parts[0]
    with pytest.raises(ConfigError, match=said):
        started(engine_of(InitPlugin(source=source)))


def test_what_is_not_there_is_told(folder: Path) -> None:
    in_file(folder)
    for source, said in (
        ("wieghts.safetensors", "no 'wieghts.safetensors'. Did you mean 'weights.saf"),
        ("gpt/small", "`hf download gpt/small"),
    ):
        with pytest.raises(ConfigError, match=said):
            started(engine_of(InitPlugin(source=source)))


def test_no_link_leads_out_of_a_folder(folder: Path) -> None:
    source = in_folder(folder)
    shutil.move(source / "model.safetensors", folder / "elsewhere.safetensors")
    (source / "model.safetensors").symlink_to(folder / "elsewhere.safetensors")
    with pytest.raises(CheckpointError, match="is a link to .* not followed; copy the file"):
        started(engine_of(InitPlugin(source=source)))


@pytest.mark.parametrize("listed", ["../weights.safetensors", "/etc/passwd", 3])
def test_an_index_lists_files_beside_it_alone(listed: Any, folder: Path) -> None:
    source = in_parts(folder)
    index = {"weight_map": {"head.bias": listed}}
    (source / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match="not a file in this folder"):
        started(engine_of(InitPlugin(source=source)))


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"weight_map": 3}', "[" * 100_000])
def test_an_index_that_is_none_is_told(text: str, folder: Path) -> None:
    source = in_parts(folder)
    (source / "model.safetensors.index.json").write_text(text)
    with pytest.raises(CheckpointError, match="is not a safetensors index"):
        started(engine_of(InitPlugin(source=source)))


def test_damaged_files_are_told(folder: Path) -> None:
    source = in_file(folder)
    source.write_bytes(source.read_bytes()[:-8])
    with pytest.raises(CheckpointError, match=r"weights\.safetensors: the header describes"):
        started(engine_of(InitPlugin(source=source)))
    run_before(folder / "run")
    path = folder / "run/checkpoints/final/model.safetensors"
    raw = bytearray(path.read_bytes())
    raw[-1] ^= 1
    path.write_bytes(raw)
    with pytest.raises(CheckpointError, match="SHA-256"):
        started(engine_of(InitPlugin(source="run/checkpoints/final")))
