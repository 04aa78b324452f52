"""data_hf: rows of data sets, mixtures and streams, in a stateless order."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip("datasets")
pytest.importorskip("transformers")

import datasets

from nexus_core import ConfigError, DataError
from nexus_core.processes import Ranks
from nexus_plugins_contrib._shared.mixture import Mixture, MixtureOrder, Ramp
from nexus_plugins_contrib._shared.rows import _best_fit
from nexus_plugins_contrib._shared.tokenizer import HubTokenizer
from nexus_plugins_contrib.data_hf import DataHfPlugin
from tests.contrib import tokens

datasets.disable_progress_bars()


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> str:
    return tokens.saved(tmp_path_factory.mktemp("tokenizer"))


def texts(name: str, count: int) -> list[str]:
    return [f"{name}{number} " + "xy" * (number * 7 % 11) for number in range(count)]


def write(path: Path, name: str, count: int) -> str:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts(name, count)))
    return str(path)


def engine(rank: int = 0, size: int = 1, seed: int = 1) -> Any:
    cpu = torch.device("cpu")
    return SimpleNamespace(ranks=Ranks(rank, size), seed=seed, device=cpu, out=None)


def opened(tmp: Path, tokenizer: str, run: Any = None, **settings: Any) -> Any:
    chosen = {"tokenizer": tokenizer, "seq_len": 16, "batch_size": 4, "valid_share": 0.0}
    plugin = DataHfPlugin(**{**chosen, "cache_dir": tmp / "cache", **settings})
    return plugin.make_data(run or engine())


def lines(batches: Any) -> list[tuple[Any, ...]]:
    """The rows of some batches, without padding, as ids, labels and documents."""
    found = []
    for batch in batches:
        count = len(batch["input_ids"])
        for row in range(count):
            kept = {k: batch[k][row].tolist() for k in ("input_ids", "labels")}
            extra = batch.get("segment_ids", batch.get("attention_mask"))[row].tolist()
            if "attention_mask" in batch:
                kept = {k: [v for v, on in zip(kept[k], extra, strict=True) if on] for k in kept}
                extra = [1] * sum(extra)
            found.append((*map(tuple, kept.values()), tuple(extra)))
    return found


pytestmark = pytest.mark.filterwarnings("ignore:.*tokens of the training data")


# -- rows


@pytest.mark.parametrize("streaming", [False, True])
def test_packed_rows_hold_every_token_once_with_the_next_as_label(
    tmp_path: Path, tokenizer: str, streaming: bool
) -> None:
    """Compared with a loop over one list of tokens, independent of the code under test."""
    path = write(tmp_path / "a.jsonl", "a", 30)
    data = opened(tmp_path, tokenizer, train=path, streaming=streaming, shuffle=1)
    inner = tokens.byte_level()
    stream: list[tuple[int, int]] = []
    for number, text in enumerate(texts("a", 30)):
        stream += [(token, number) for token in [*inner(text)["input_ids"], inner.eos_token_id]]
    expected = []
    for first in range(0, len(stream) - 15, 16):
        row = stream[first : first + 16]
        after = [*stream[first + 1 : first + 17], (0, -1)][:16]
        ids = tuple(token for token, _ in row)
        labels = tuple(
            b if one == other else -100 for (_, one), (b, other) in zip(row, after, strict=True)
        )
        expected.append((ids, labels, tuple(n - row[0][1] for _, n in row)))
    found = lines(data.train)[: len(expected)]
    assert sorted(found) == sorted(expected)
    batch = next(iter(data.train))
    starts = batch["position_ids"] == 0
    changes = torch.ones_like(starts)
    changes[:, 1:] = batch["segment_ids"][:, 1:] != batch["segment_ids"][:, :-1]
    assert torch.equal(starts, changes)


def test_padded_rows_are_documents_and_long_ones_are_cut_and_counted(
    tmp_path: Path, tokenizer: str
) -> None:
    path = write(tmp_path / "a.jsonl", "a", 30)
    with pytest.warns(RuntimeWarning, match=r"tokens of the training data are truncated"):
        data = opened(tmp_path, tokenizer, train=path, batching="pad", seq_len=12)
    inner = tokens.byte_level()
    whole = [[*inner(text)["input_ids"], inner.eos_token_id] for text in texts("a", 30)]
    found = lines(data.train)
    assert sorted(ids for ids, _, _ in found) == sorted(tuple(ids[:12]) for ids in whole)
    assert all(labels[:-1] == ids[1:] and labels[-1] == -100 for ids, labels, _ in found)


def test_ids_and_labels_of_columns_are_taken_as_they_are(tmp_path: Path, tokenizer: str) -> None:
    rows = {"ids": [[5, 6, 7, 8]], "marks": [[-100, -100, 7, 8]]}
    datasets.Dataset.from_dict(rows).to_parquet(tmp_path / "a.parquet")
    names = {"column": "ids", "labels_column": "marks", "batching": "pad", "batch_size": 1}
    data = opened(tmp_path, tokenizer, train=str(tmp_path / "a.parquet"), **names)
    (batch,) = data.train
    assert batch["labels"].tolist() == [[-100, 7, 8, -100]]


@given(st.lists(st.integers(1, 20), min_size=1, max_size=60))
def test_whole_examples_share_rows_without_one_too_many(lengths: list[int]) -> None:
    rows = _best_fit(np.array(lengths), 20)
    assert sorted(sum(rows, [])) == list(range(len(lengths)))
    sums = [sum(lengths[n] for n in row) for row in rows]
    assert max(sums) <= 20
    assert len(rows) <= 11 / 9 * -(-sum(lengths) // 20) + 1 or min(lengths) > 6
    assert all(a + b > 20 for n, a in enumerate(sums) for b in sums[:n]) or len(rows) == 1


# -- sources


def of_kind(kind: str, folder: Path) -> dict[str, Any]:
    rows = datasets.Dataset.from_dict({"text": texts("a", 9)})
    if kind == "saved":
        datasets.DatasetDict({"train": rows, "test": rows}).save_to_disk(str(folder / "saved"))
        return {"path": str(folder / "saved")}
    if kind == "folder":
        rows.to_parquet(folder / "train-00000.parquet")
        datasets.Dataset.from_dict({"text": ["other"]}).to_parquet(folder / "test-00000.parquet")
        return {"path": str(folder)}
    path = folder / f"a.{kind}"
    if kind == "jsonl":
        write(path, "a", 9)
    elif kind == "txt":
        path.write_text("".join(f"{text}\n" for text in texts("a", 9)))
    else:
        getattr(rows, {"csv": "to_csv", "parquet": "to_parquet", "json": "to_json"}[kind])(path)
    return {"path": str(path)}


@pytest.mark.parametrize("kind", ["jsonl", "json", "txt", "csv", "parquet", "saved", "folder"])
def test_each_format_gives_the_same_rows_as_a_set_and_as_a_stream(
    kind: str, tmp_path: Path, tokenizer: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "hf"))
    (tmp_path / "data").mkdir()
    wish = of_kind(kind, tmp_path / "data")
    settings = {"train": wish, "batching": "pad", "seq_len": 40}
    found = [
        {ids for ids, _, _ in lines(opened(tmp_path, tokenizer, streaming=s, **settings).train)}
        for s in (False, True)
    ]
    inner = tokens.byte_level()
    assert found[0] == found[1]
    assert found[0] == {(*inner(t)["input_ids"], inner.eos_token_id) for t in texts("a", 9)}


def test_what_is_held_out_is_the_same_wherever_a_record_stands(
    tmp_path: Path, tokenizer: str
) -> None:
    first = write(tmp_path / "a.jsonl", "a", 60)
    more = tmp_path / "b.jsonl"
    more.write_text(write(tmp_path / "c.jsonl", "c", 20) and Path(tmp_path / "c.jsonl").read_text())
    more.write_text(more.read_text() + Path(first).read_text())
    wish = {"batching": "pad", "seq_len": 40, "valid_share": 0.3}
    one = opened(tmp_path, tokenizer, train=first, **wish)
    two = opened(tmp_path, tokenizer, train=str(more), **wish)
    held, held_two = ({i for i, _, _ in lines(d.valid["val"])} for d in (one, two))
    trained, trained_two = ({i for i, _, _ in lines(d.train)} for d in (one, two))
    assert held
    assert held <= held_two
    assert trained <= trained_two
    assert not held & trained
    assert 8 < len(held) < 30


@pytest.mark.slow
def test_ids_of_the_hub_are_found_in_its_cache_offline(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The cache layout of huggingface_hub: refs to a commit, and its snapshot."""
    import huggingface_hub.constants as hub

    monkeypatch.setattr(hub, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(hub, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets")
    for kind, name in (("datasets", "corpus"), ("models", "tokenizer")):
        home = tmp_path / "hub" / f"{kind}--org--{name}"
        (home / "refs").mkdir(parents=True)
        (home / "refs/main").write_text("0" * 40)
        snapshot = home / "snapshots" / ("0" * 40)
        snapshot.mkdir(parents=True)
        if kind == "models":
            tokens.saved(snapshot)
            (snapshot / "config.json").write_text('{"model_type": "llama"}')
        else:
            (snapshot / "data").mkdir()
            rows = datasets.Dataset.from_dict({"text": texts("a", 9)})
            rows.to_parquet(snapshot / "data/train-00000-of-00001.parquet")
    data = opened(tmp_path, "org/tokenizer", train="org/corpus", batching="pad", seq_len=40)
    assert len(lines(data.train)) == 9
    with pytest.raises(DataError, match="cannot open the data 'org/missing'"):
        opened(tmp_path, "org/tokenizer", train="org/missing")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"train": "nowhere.jsonl"}, "data_hf.train: no file or folder 'nowhere.jsonl'"),
        ({"column": "body"}, r"a.jsonl, row 1: no value in column 'body'"),
        ({"tokenizer": "nowhere"}, "cannot open the tokenizer 'nowhere'"),
        ({"seq_len": 4000}, "too few tokens for a row of 4000"),
        ({"streaming": True, "num_workers": 1}, "num_workers has no effect"),
        ({"train": ["a.jsonl", "a.jsonl"]}, "two sources are called 'a'"),
        ({"train": []}, "the list of sources is empty"),
    ],
)
def test_mistakes_are_told(
    change: dict[str, Any], said: str, tmp_path: Path, tokenizer: str, monkeypatch: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "a.jsonl", "a", 9)
    with pytest.raises((DataError, ConfigError), match=said):
        opened(tmp_path, **{"tokenizer": tokenizer, "train": "a.jsonl", **change})


def test_bad_records_are_skipped_and_counted_on_request(tmp_path: Path, tokenizer: str) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "good"}\n\n{"text": ""}\n{"text": 5}\n{"text": "fine"}\n')
    with pytest.raises(DataError, match=r"a.jsonl, row 3: its text is empty"):
        opened(tmp_path, tokenizer, train=str(path), batching="pad")
    wish = {"train": str(path), "batching": "pad", "on_bad_rows": "skip"}
    with pytest.warns(RuntimeWarning) as said:
        data = opened(tmp_path, tokenizer, **wish)
    assert len(lines(data.train)) == 2
    assert any("1 records of 'a' skipped: empty text" in str(one.message) for one in said)


# -- mixtures

RAMPS = st.lists(
    st.lists(st.tuples(st.integers(0, 3000), st.floats(0.01, 9)), min_size=1, max_size=3),
    min_size=2, max_size=4,
)  # fmt: skip


def mixture(points: Any, seed: int = 3) -> Mixture:
    rows = [dict(one) for one in points]
    return Mixture([Ramp(tuple(sorted(r)), tuple(r[k] for k in sorted(r))) for r in rows], seed)


@given(RAMPS, st.integers(0, 2**40), st.integers(0, 1500), st.integers(0, 300))
def test_a_row_of_a_mixture_is_a_function_of_seed_and_number(
    points: Any, seed: int, first: int, count: int
) -> None:
    mixed = mixture(points, seed)
    whole = mixed.sources(0, first + count)
    assert mixed.sources(first, first + count).tolist() == whole[first:].tolist()
    tally = Counter(whole[:first].tolist())
    assert mixed.counts(first).tolist() == [tally[n] for n in range(len(points))]
    assert mixture(points, seed).sources(first, first + count).tolist() == whole[first:].tolist()


@given(RAMPS)
def test_shares_follow_the_weights_in_every_stretch_of_256_rows(points: Any) -> None:
    """To within one row per source if the weights were constant, plus their change in 256 rows."""
    mixed = mixture(points)
    found = mixed.sources(0, 256 * 16).reshape(16, 256)
    for block in range(16):
        rows = np.arange(block * 256, block * 256 + 256)
        weights = np.stack([np.interp(rows, ramp.rows, ramp.weights) for ramp in mixed.ramps])
        shares = weights / weights.sum(axis=0)
        tally = np.bincount(found[block], minlength=len(points))
        moved = np.ptp(shares.cumsum(axis=0), axis=1).max() * 256
        assert np.abs(tally - shares.sum(axis=1)).max() <= 2 + 2 * moved


def test_each_source_goes_round_in_whole_rounds() -> None:
    mixed = mixture([[(0, 3.0)], [(0, 1.0)]])
    order, sizes = MixtureOrder(mixed, (10, 7)), (10, 7)
    samples = np.concatenate([order(np.arange(17), 17, 5, epoch) for epoch in range(40)])
    for offset, size in zip((0, 10), sizes, strict=True):
        mine = samples[(samples >= offset) & (samples < offset + size)]
        rounds = mine[: len(mine) // size * size].reshape(-1, size)
        assert (np.sort(rounds, axis=1) == offset + np.arange(size)).all()
        assert len({tuple(one) for one in rounds.tolist()}) > len(rounds) // 2
    assert abs((samples < 10).mean() - 0.75) < 0.01


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("batching", ["pack", "pad"])
def test_processes_share_one_global_order(
    streaming: bool, batching: str, tmp_path: Path, tokenizer: str
) -> None:
    weights: list[Any] = [[0, 3], ["40 samples", 1]]
    train = [
        {"path": write(tmp_path / "a.jsonl", "a", 30), "weight": weights},
        {"path": write(tmp_path / "b.jsonl", "b", 20)},
    ]
    wish = {"train": train, "batching": batching, "streaming": streaming, "shuffle": 8}
    whole = opened(tmp_path, tokenizer, **wish).train
    shares = [opened(tmp_path, tokenizer, engine(r, 3), **wish).train for r in range(3)]
    for one, *parts in zip(islice(whole, 6), *(islice(s, 6) for s in shares), strict=True):
        assert lines([one]) == [row for part in parts for row in lines([part])]


def test_weights_at_tokens_are_counted_in_packed_rows(tmp_path: Path, tokenizer: str) -> None:
    def first(at: str) -> list[tuple[Any, ...]]:
        train = [
            {"path": write(tmp_path / "a.jsonl", "a", 30), "weight": [[0, 1], [at, 0]]},
            {"path": write(tmp_path / "b.jsonl", "b", 30), "weight": [[0, 0.001], [at, 1]]},
        ]
        return lines(opened(tmp_path, tokenizer, train=train).train)

    assert first("320 tokens") == first("20 samples") != first("400 tokens")
    with pytest.raises(ConfigError, match="points? at '5 steps'.*expected 0, or an amount"):
        first("5 steps")


def test_weights_that_mean_nothing_are_refused(tmp_path: Path, tokenizer: str) -> None:
    path = write(tmp_path / "a.jsonl", "a", 30)
    for weight, said in (
        (-1.0, "expected numbers of 0 or more"),
        ([[0, 1], ["9 samples", 1], ["5 samples", 1]], "expected increasing rows"),
        ([[0, 1], ["9 samples", 0]], "weights of all sources are 0 at the same time"),
    ):
        train = [{"path": path, "weight": weight, "name": name} for name in ("a", "b")]
        with pytest.raises(ConfigError, match=said):
            opened(tmp_path, tokenizer, train=train)


# -- streams


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
@pytest.mark.parametrize("batching", ["pack", "pad"])
def test_a_stream_resumes_from_every_place_again_and_again(
    kind: str, batching: str, tmp_path: Path, tokenizer: str
) -> None:
    """The state after each batch, through JSON as in a checkpoint, twice in a row."""
    (tmp_path / "data").mkdir()
    other = write(tmp_path / "b.jsonl", "b", 5)
    train = [{**of_kind(kind, tmp_path / "data"), "weight": 2}, {"path": other}]
    wish = {"train": train, "batching": batching, "streaming": True, "shuffle": 4}

    def endless(loader: Any) -> Iterator[Any]:
        while True:
            yield from loader

    def loader() -> Any:
        return opened(tmp_path, tokenizer, **{**wish, "batch_size": 2}).train

    unbroken, states, expected = loader(), [], []
    for batch in islice(endless(unbroken), 16):
        expected += lines([batch])
        states.append((json.dumps(unbroken.state_dict()), len(expected)))
    for state, done in states[::3]:
        again = loader()
        again.load_state_dict(json.loads(state))
        found = lines(islice(endless(again), 2))
        second = json.loads(json.dumps(again.state_dict()))
        third = loader()
        third.load_state_dicts([second, second])
        found += lines(islice(endless(third), 2))
        assert found[: len(expected) - done] == expected[done : done + len(found)]


def test_an_epoch_of_a_stream_has_every_row_once(tmp_path: Path, tokenizer: str) -> None:
    path = write(tmp_path / "a.jsonl", "a", 21)
    wish = {"train": path, "batching": "pad", "streaming": True, "seq_len": 40}
    loader = opened(tmp_path, tokenizer, **wish, shuffle=6).train
    epochs = [[ids for ids, _, _ in lines(loader)] for _ in range(3)]
    assert len(epochs[0]) == 21
    assert epochs[0] != epochs[1] != epochs[2]
    assert sorted(epochs[0]) == sorted(epochs[1]) == sorted(epochs[2])


@pytest.mark.parametrize("batching", ["pack", "pad"])
def test_what_is_held_out_of_a_stream_is_the_same_and_never_trained_on(
    batching: str, tmp_path: Path, tokenizer: str
) -> None:
    """Fails if held-out data is trained on, differs from that of a set, or ignores the limit."""
    path = write(tmp_path / "a.jsonl", "a", 60)
    wish = {"train": path, "batching": batching, "seq_len": 40, "valid_share": 0.3, "shuffle": 7}
    as_set, as_stream = (opened(tmp_path, tokenizer, **wish, streaming=s) for s in (False, True))
    held = lines(as_stream.valid["val"])
    assert held == lines(as_set.valid["val"])
    inner = tokens.byte_level()

    def records(rows: Any) -> set[str]:
        text = "".join(inner.decode(ids) for ids, _, _ in rows)
        return {record for record in text.replace("<pad>", "").split("<eos>") if record}

    trained = set[str]()
    for _ in range(3):  # epochs; a row may end in the middle of a record
        trained |= records(lines(as_stream.train)) & {*texts("a", 60)}
    assert trained
    assert records(held) == {*texts("a", 60)} - trained
    few = opened(tmp_path, tokenizer, **wish, streaming=True, valid_limit=3)
    assert len(lines(few.valid["val"])) == 3
    assert few.train.fingerprint == as_stream.train.fingerprint


def test_label_bytes_are_those_of_the_text_that_is_predicted(
    tmp_path: Path, tokenizer: str
) -> None:
    """Fails if words of several bytes count as one, special ids as text, or rows lose theirs."""
    texts = ["hello the \u6771\u4eac", "is N\u00e4he \U0001f600", "llo llo, the hello", "x"]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in texts))
    (tmp_path / "b.jsonl").write_text(json.dumps({"text": "for training"}) + "\n")
    wish = {"train": str(tmp_path / "b.jsonl"), "valid": str(tmp_path / "a.jsonl")}
    inner = tokens.byte_level()
    firsts = sum(len(inner.decode(inner(text)["input_ids"][:1]).encode()) for text in texts)
    for settings in ({"batching": "pad", "seq_len": 40}, {"seq_len": 5, "eval_batch_size": 3}):
        data = opened(tmp_path, tokenizer, **wish, **settings)
        counted = [batch["label_bytes"] for batch in data.valid["val"]]
        assert sum(int(c.sum()) for c in counted) == sum(len(t.encode()) for t in texts) - firsts
        assert "label_bytes" not in next(iter(data.train))


@pytest.mark.parametrize(
    ("normalizer", "told"), [(None, True), ("lowercase", True), ("strip", False)]
)
def test_bytes_of_sentencepiece_add_up_or_are_not_told(normalizer: str | None, told: bool) -> None:
    """Fails if the space marker of a piece counts as three bytes, or lost text is not noticed."""
    from tokenizers import Tokenizer, decoders, models, normalizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {"<unk>": 0, "<eos>": 1, **{f"<0x{n:02X}>": n + 2 for n in range(256)}}
    for piece in ("\u2581", "h", "e", "\u2581h", "\u00e4", "\u2581he"):
        vocabulary[piece] = len(vocabulary)
    merges = [("\u2581", "h"), ("\u2581h", "e")]
    inner = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", byte_fallback=True))
    more = {
        None: [],
        "lowercase": [normalizers.Lowercase()],
        "strip": [normalizers.Replace("q", "")],
    }
    space = [normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")]
    inner.normalizer = normalizers.Sequence([*more[normalizer], *space])
    inner.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    made = HubTokenizer(PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<eos>"), "here")
    table = made.token_bytes
    assert (table is not None) == told
    for text in ("he h\u00e4h", "\U0001f600 hehe", "h"):
        if table is not None:
            assert table[made.encode(text)].sum() == 1 + len(text.encode())


def test_another_tokenizer_is_refused_on_resuming(tmp_path: Path, tokenizer: str) -> None:
    from nexus_core import CheckpointError

    path = write(tmp_path / "a.jsonl", "a", 30)
    other = tokens.saved(tmp_path / "other", ["<more>"])
    settings = {"train": path, "seq_len": 16, "valid_share": 0.0, "cache_dir": tmp_path / "cache"}
    first, second = (DataHfPlugin(tokenizer=one, **settings) for one in (tokenizer, other))
    first.make_data(engine())
    second.load_state_dict(first.state_dict())
    with pytest.raises(CheckpointError, match="a different tokenizer"):
        second.make_data(engine())
