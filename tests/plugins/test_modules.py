"""The preset `modules`: puzzles with known answers, a contest of several models, and its plot."""

from __future__ import annotations

import copy
import itertools
import json
import math
import statistics
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.data import default_collate

from nexus_core import ConfigError, Engine, Plugin, PluginConfig, hookimpl
from nexus_core.cli.run import main
from nexus_core.places import in_run_folder, used
from nexus_core.plan import load
from nexus_plugins.modules import contender
from nexus_plugins.modules.contest import ContestPlugin
from nexus_plugins.modules.graphs import Graph
from nexus_plugins.modules.looks import Depth, Edges, Hops, looks, spearman
from nexus_plugins.modules.puzzles import Rule, dynamics, hops, noisy, puzzles

NEXUS = {"d_model": 8, "ssm_n_layers": 1, "ssm_head_dim": 8, "ssm_expand": 1, "ssm_d_state": 4}
BARE = {**NEXUS, **dict.fromkeys(("world", "reason", "energy"), False)}


def drawn(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


# -- puzzles


def test_who_knows_a_cycle_knows_what_comes_next() -> None:
    """Fails if labels are not the next observation, or a row does not follow a cycle."""
    part = dynamics(drawn(), 5, 40, shortest=3, longest=6)
    ids, labels = part["input_ids"], part["labels"]
    assert torch.equal(ids[:, 1:], labels[:, :-1])
    for row in ids:
        assert any(torch.equal(row[n:], row[:-n]) for n in range(3, 7))


def test_a_clean_token_follows_from_the_two_before_it() -> None:
    """Fails if labels do not follow the rule, or other tokens are replaced than reported."""
    rule, level = Rule.drawn(drawn(), 5), torch.tensor([[0.0], [1.0]])
    part = noisy(drawn(1), rule, level, 30, blanks=1.0)
    labels = part["labels"].tolist()
    for before, last, token in itertools.chain(
        *(zip(r, r[1:], r[2:], strict=False) for r in labels)
    ):
        assert token == rule.sums[(rule.first[last] + rule.second[before]) % 5]
    assert torch.equal(part["input_ids"][0], part["labels"][0])
    assert (part["input_ids"][1] == 5).all()


def test_hops_are_those_through_the_table_of_the_document() -> None:
    """Fails if an answer does not follow from the document, or has other hops than it says."""
    part = hops(drawn(), 3, 30, places=5, most=3)
    assert part["segment_ids"].tolist() == [[0] * 9 + [1] * 9 + [2] * 9] * 3
    values = (part[key].view(-1, 9).tolist() for key in ("input_ids", "labels", "hops"))
    for ids, labels, jumps in zip(*values, strict=True):
        table = dict(divmod(line, 5) for line in ids[:5])
        assert len(table) == 5
        place, expected = ids[5] - 25, []
        for _ in range(3):
            place = table[place]
            expected.append(25 + place)
        assert ids[6:] == [30] * 3
        assert labels == [-100] * 6 + expected
        assert jumps == [0] * 6 + [1, 2, 3]
    further = hops(drawn(), 2, 1, most=4, least=4)
    assert further["hops"].tolist() == [[0] * 10 + [4]] * 2
    assert ((further["labels"] == -100) == (further["hops"] == 0)).all()


def test_a_graph_has_no_cycle_and_interventions_where_it_says() -> None:
    """Fails if the data follow another graph, or reveal it by variance."""
    graph = Graph(drawn(), variables=4, edges=5, observations=400, interventions=100)
    assert graph.edges.sum() == 5
    assert torch.matrix_power(graph.edges.float(), 4).sum() == 0
    torch.testing.assert_close(graph.values[:400].std(0), torch.ones(4))
    assert not graph.is_set[:400].any()
    assert graph.is_set[400:500].all(0).tolist() == [True, False, False, False]


# -- the contest


def small() -> dict[str, Any]:
    """The preset's contest, with models as small as they can be."""
    return {
        "dynamics": {
            "all": {"model_nexus": {**BARE, "vocab_size": 12}, "loss_lm": {}},
            "world": {"model_nexus": {"world": True}, "loss_world": {}},
            "backbone": {},
        },
        "denoising": {
            "energy": {
                "model_nexus": {**BARE, "vocab_size": 9, "energy": True},
                "loss_lm": {},
                "loss_energy": {},
            }
        },
        "hops": {
            "reason": {"model_nexus": {**BARE, "vocab_size": 31, "reason": True}, "loss_lm": {}}
        },
        "graph": {
            "causal": {
                "model": {
                    "call": "nexus_plugins.model_nexus.causal:CausalGraph",
                    "args": {"variables": 10},
                },
                "loss_causal": {"weight": 1.0},
            }
        },
    }


DATA = {
    "call": "nexus_plugins.modules.puzzles:puzzles",
    "args": {"rows": 8, "held_out": 4, "length": 10},
    "batch_size": 4,
}


def contest(out: Path | None = None, **only: Any) -> Engine:
    plugins = [
        load("data")(**DATA),
        ContestPlugin(puzzles=only or small()),
        load("optim_adamw")(lr=1e-2),
    ]
    return Engine(plugins=plugins, seed=3, out=out)


def beside() -> dict[str, Any]:
    """The same, with contenders whose losses act after an update."""
    every = small()
    every["dynamics"] |= {
        "classic": {
            "model_nexus": {"world": True, "classic": True, "causal": False},
            "loss_world": {"classic": True, "decay": 0.5},
        },
        "reason": {
            "model_nexus": {"reason": True},
            "loss_reason": {"weight": 1.0, "balance_weight": 1.0, "decay": 0.5},
        },
    }
    return every


def rows() -> list[dict[str, dict[str, Tensor]]]:
    both = puzzles(rows=12, held_out=1, length=10)["train"]
    return [default_collate([both[4 * batch + row] for row in range(4)]) for batch in range(3)]


def test_each_contender_is_trained_as_it_would_be_alone() -> None:
    """Fails if a hook is not called as in a run of its own, or contenders interact."""
    whole, batches = contest(**beside()), rows()
    whole.fit(batches, until="3 steps")
    for puzzle, entries in beside().items():
        shared = entries.pop("all", {})
        for name, own in entries.items():
            settings = {p: {**shared.get(p, {}), **own.get(p, {})} for p in {**shared, **own}}
            settings |= {"data": DATA, "optim_adamw": {"lr": 1e-2}, "clip": {"max_norm": 1.0}}
            alone = Engine(plugins=[load(p)(**given) for p, given in settings.items()], seed=3)
            before = copy.deepcopy(alone.model.state_dict())
            alone.fit([batch[puzzle] for batch in batches], until="3 steps")
            mine = whole.model.get_submodule(f"{puzzle}.{name}").state_dict()
            assert mine.keys() == before.keys()
            for weight, value in alone.model.state_dict().items():
                assert torch.equal(mine[weight], value), (puzzle, name, weight)
            assert any(not torch.equal(mine[weight], before[weight]) for weight in mine)


def test_a_contest_resumes_with_what_its_contenders_keep() -> None:
    """Fails if the state of a contender's plugin is not in the checkpoint, or is not restored."""
    only = {"dynamics": {name: beside()["dynamics"][name] for name in ("all", "reason")}}
    whole, first, second = (contest(**only) for _ in range(3))
    batches = rows()
    whole.fit(batches, until="3 steps")
    first.fit(batches[:2], until="2 steps")
    second.load_state_dict(first.state_dict())
    second.fit(batches[2:], until="3 steps")
    for name, value in whole.model.state_dict().items():
        assert torch.equal(second.model.state_dict()[name], value), name


def test_metrics_of_a_contender_carry_its_place() -> None:
    """Fails if two contenders log to one metric, or a loss is not set up for its model."""
    model = small()["hops"]["reason"]["model_nexus"]
    teacher = {"call": "nexus_plugins.model_nexus:NEXUSCore", "args": model}
    taught = {"model_nexus": model, "loss_distill": {"teacher": teacher}}
    only = {"hops": {"taught": taught}, "graph": small()["graph"]}
    result = contest(**only).fit(rows(), until="2 steps")
    assert "graph/causal/causal/dag_constraint" in result.metrics
    assert result.metrics["train/hops/taught/distill_loss"] > 0


def test_a_contenders_plugin_sees_its_own_model_from_the_start(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Fails if a hook without a result is not forwarded, or sees the model or terms of another."""

    class SpyPlugin(Plugin[PluginConfig]):
        api_version = "1.2"

        @hookimpl
        def on_build(self, engine: Any) -> None:
            engine.model.seen = ["on_build"]

        @hookimpl
        def on_start(self, engine: Any) -> None:
            engine.model.seen.append("on_start")

        @hookimpl
        def on_step(self, engine: Any, step: Any) -> None:
            engine.model.seen += step.losses

    only = {"hops": small()["hops"], "graph": small()["graph"]}
    only["hops"]["reason"]["spy"] = {}
    found = {"spy": SpyPlugin}
    monkeypatch.setattr(contender, "plugin_class", lambda name: found.get(name) or load(name))
    engine = contest(**only)
    engine.fit(rows(), until="2 steps")
    seen = engine.model.get_submodule("hops.reason").seen
    assert seen == ["on_build", "on_start", "lm", "lm"]
    assert not hasattr(engine.model.get_submodule("graph.causal"), "seen")


def test_a_run_shows_all_there_is_to_see(tmp_path: Path) -> None:
    """Fails if a measure is missing, the plot is not drawn, or curves are lost on resume."""
    engine = contest(tmp_path)
    result = engine.fit(until="2 steps", eval_every="1 steps")
    found = {key.removeprefix("val/") for key in result.metrics if key.startswith("val/")}
    assert found >= {
        "dynamics/world/lm_loss", "dynamics/world/world_loss", "dynamics/backbone/lm_loss",
        "denoising/energy/refinements", "hops/reason/right_3", "graph/causal/edges_found",
    }  # fmt: skip
    assert (tmp_path / "modules.png").read_bytes().startswith(b"\x89PNG")
    kept = engine.state_dict()["plugins"]["contest"]
    curves = kept["state"]["curves"]
    assert [step for step, _ in curves["dynamics/world"]] == [1.0, 2.0]
    again = contest()
    again.load_state_dict(engine.state_dict())
    assert again.state_dict()["plugins"]["contest"] == kept


@pytest.mark.parametrize(
    "plugins",
    [{}, {"loss_lm": {}}, {"model_nexus": {"vocab_size": 9}}, {"model_nexus": {}, "clip": {}}],
)
def test_a_contender_is_a_model_and_losses(plugins: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=r"puzzles.hops.mine has .*; give one plugin that makes"):
        ContestPlugin(puzzles={"hops": {"mine": plugins}})


def test_what_a_contest_cannot_train_is_refused_in_words() -> None:
    """Fails if a hook is dropped silently, or a name or puzzle fails with an error of torch."""
    model, loss = {"model_nexus": {**BARE, "vocab_size": 12}}, {"loss_lm": {}}
    with pytest.raises(ConfigError, match=r"hops.mine: clip implements after_backward, which a c"):
        ContestPlugin(puzzles={"hops": {"mine": {**model, **loss, "clip": {}}}})
    with pytest.raises(ConfigError, match=r"puzzles.hops has no contender"):
        ContestPlugin(puzzles={"hops": {"all": {**model, **loss}}})
    for name in ("a.b", "a/b", "", "float"):
        with pytest.raises(ConfigError, match=rf"hops.{name}: '{name}' cannot name a module"):
            ContestPlugin(puzzles={"hops": {name: {**model, **loss}}})
    with pytest.raises(ConfigError, match=r"puzzles.maze: the data have no such puzzle; they have"):
        contest(maze={"mine": {**model, **loss}}).fit(rows(), until="1 steps")


def test_a_contender_may_be_made_by_a_plugin_in_a_file(tmp_path: Path) -> None:
    """Fails if it cannot be loaded, or a run would not keep a copy of it."""
    file = tmp_path / "mine.py"
    file.write_text(
        "from torch import nn\n"
        "from nexus_core import Plugin, PluginConfig, hookimpl\n"
        "class MinePlugin(Plugin[PluginConfig]):\n"
        "    slot = 'model'\n"
        "    @hookimpl\n"
        "    def make_model(self): return nn.Linear(2, 2)\n"
    )
    place = f"{file}:MinePlugin"
    contest = ContestPlugin(puzzles={"one": {"mine": {place: {}, "loss_lm": {}}}})
    assert [source.path for source in used(contest)] == [file]
    kept = in_run_folder(contest.config.model_dump(mode="json"))
    assert [*kept["puzzles"]["one"]["mine"]] == ["./plugins/mine.py:MinePlugin", "loss_lm"]
    with pytest.raises(ConfigError, match=f"has no class; write {place}"):
        ContestPlugin(puzzles={"one": {"mine": {str(file): {}, "loss_lm": {}}}})


def test_looks_say_what_was_found() -> None:
    """Fails if refinements, hops or edges are counted wrongly."""

    class Output:
        def __init__(self, answers: Tensor, **reports: Any) -> None:
            self.logits = torch.nn.functional.one_hot(answers, 4)
            self.module_outputs = reports

    answers = torch.tensor([[0, 1, 2, 3]])
    part = {"hops": torch.tensor([[0, 1, 2, 2]]), "labels": torch.tensor([[-100, 1, 2, 0]])}
    (right,) = looks("hops/reason", [(part, Output(answers))])
    assert right == Hops("hops/reason", (1.0, 0.5))

    level = torch.tensor([[0.1], [0.6], [0.3]])
    made = torch.tensor([[1.0, 1.0], [5.0, 3.0], [2.0, 3.0]])
    (depth,) = looks("d/e", [({"level": level}, Output(answers, energy={"refinements": made}))])
    assert isinstance(depth, Depth)
    assert depth.metrics == pytest.approx({"refinements": 2.5, "rank_correlation": 1.0})
    assert Depth("d/e", level[:, 0], torch.ones(3)).metrics == {"refinements": 1.0}
    assert depth.summary.startswith("refinements 1.0 where there is little noise, 4.0")

    edges = torch.tensor([[0, 1, 1], [0, 0, 1], [0, 0, 0]], dtype=torch.bool)
    strengths = torch.tensor([[0.0, 0.5, 0.05], [0.0, 0.0, 0.0], [0.0, -0.4, 0.0]])
    reports = {"causal": {"adjacency": strengths}}
    (graph,) = looks("g/c", [({"edges": edges[None]}, Output(answers, **reports))])
    assert isinstance(graph, Edges)
    assert graph.metrics == pytest.approx({"edges_found": 1 / 3, "pairs_wrong": 2.0})
    assert [*looks("g/other", [({"edges": edges[None]}, Output(answers))])] == []


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3)), min_size=2, max_size=8))
def test_equal_values_share_a_rank(pairs: list[tuple[int, int]]) -> None:
    """Fails if ties are ranked by their order, which makes a correlation where there is none."""
    columns = list(zip(*pairs, strict=True))
    found = spearman(*(torch.tensor(column, dtype=torch.float32) for column in columns))
    if any(len(set(column)) == 1 for column in columns):
        assert math.isnan(found)
        return
    ranks = [[sum(a < b for a in c) + sum(a == b for a in c) / 2 for b in c] for c in columns]
    assert found == pytest.approx(statistics.correlation(*ranks), abs=1e-9)


@pytest.mark.slow
def test_the_preset_draws_its_picture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails if `nexus-run modules` breaks, or its config does not repeat the run."""
    monkeypatch.chdir(tmp_path)
    few = ["until=2 steps", "data.args.rows=8", "data.args.held_out=4", "data.args.length=12"]
    words = [word for one in (*few, "data.batch_size=4") for word in ("--set", one)]
    first_time = ["modules", "-p", "no:tensorboard", *words]
    for out, command in (("one", first_time), ("two", ["one/config.yaml"])):
        ran = CliRunner().invoke(main, [*command, "--out", out])
        assert ran.exit_code == 0, ran.output
    summaries = [json.loads(Path(out, "summary.json").read_text()) for out in ("one", "two")]
    first, second = (summary["metrics"] for summary in summaries)
    assert first["val/loss"] == second["val/loss"]
    assert Path("two/modules.png").read_bytes().startswith(b"\x89PNG")
