"""Text data: rows, order, mixtures and the plugin."""

from __future__ import annotations

import json
import lzma
import math
import pickle
import zlib
from collections import Counter
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from torch import nn

from nexus_core import CheckpointError, DataError, Engine, Plugin, PluginConfig, hookimpl
from nexus_core.bases.loader import ResumableLoader, permute
from nexus_core.processes import Ranks
from nexus_plugins.data_text import DataTextConfig, DataTextPlugin
from nexus_plugins.data_text.baselines import (
    bigram_bits_per_byte,
    compared,
    gzip_bits_per_byte,
    xz_bits_per_byte,
)
from nexus_plugins.data_text.dataset import TextData, open_data
from nexus_plugins.data_text.prepare import Job, prepare
from nexus_plugins.data_text.rows import Layout, PackedRows, PaddedRows, as_it_is
from nexus_plugins.data_text.stream import Chain, Named, Stream, TokenStream
from nexus_plugins.data_text.tokenizer import ByteTokenizer
from nexus_plugins.data_text.trace import trained_on

TOKENIZER = ByteTokenizer()
EOS, PAD = TOKENIZER.eos, TOKENIZER.pad
ORIGIN = Named((("memory", 0),))
DOCUMENTS = st.lists(st.lists(st.integers(0, 255), max_size=9), min_size=1, max_size=12)


def contiguous(documents: Sequence[Sequence[int]]) -> TokenStream:
    """Documents with their eos in one array, as in a .bin file."""
    flat = [token for document in documents for token in (*document, EOS)]
    starts = np.cumsum([0, *(len(document) + 1 for document in documents)])
    return TokenStream(np.array(flat, np.uint16), starts, origin=ORIGIN)


def scattered(documents: Sequence[Sequence[int]]) -> TokenStream:
    """Documents with garbage between them and implied eos, as in a .txt file."""
    data: list[int] = []
    sources = []
    for document in documents:
        data.append(99)
        sources.append(len(data))
        data.extend(document)
    starts = np.cumsum([0, *(len(document) + 1 for document in documents)])
    array = np.array(data, np.uint8)
    return TokenStream(array, starts, sources=np.array(sources), eos=EOS, origin=ORIGIN)


def chain(documents: Sequence[Sequence[int]]) -> Chain:
    half = len(documents) // 2
    parts = [part for part in (documents[:half], documents[half:]) if part]
    return Chain(
        [scattered(part) if number else contiguous(part) for number, part in enumerate(parts)]
    )


def expected_rows(documents: Sequence[Sequence[int]], length: int) -> list[dict[str, Any]]:
    """The expected rows, by a simple loop over tokens."""
    tokens = [(t, d) for d, document in enumerate(documents) for t in (*document, EOS)]
    rows = []
    for first in range(0, len(tokens), length):
        row: dict[str, Any] = {"input_ids": [], "labels": [], "segment_ids": [], "label_bytes": 0}
        segment = 0
        for position in range(first, first + length):
            if position >= len(tokens):
                row["input_ids"].append(PAD)
                row["labels"].append(-100)
                row["segment_ids"].append(segment)
                continue
            token, document = tokens[position]
            segment += position > first and document != tokens[position - 1][1]
            follows = tokens[position + 1] if position + 1 < len(tokens) else (0, -1)
            label = follows[0] if follows[1] == document else -100
            row["input_ids"].append(token)
            row["labels"].append(label)
            row["segment_ids"].append(segment)
            row["label_bytes"] += 0 <= label < 256
        rows.append(row)
    return rows


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "cache"


def data_of(cache: Path, **wish: Any) -> TextData:
    return open_data(DataTextConfig(cache_dir=cache, **wish))


def write_lines(path: Path, lines: Sequence[str]) -> Path:
    path.write_text("".join(f"{line}\n" for line in lines))
    return path


def sentences(count: int, word: str = "word") -> list[str]:
    return [f"{word} {number} " + "x" * (number * 7 % 40) for number in range(count)]


@given(
    documents=DOCUMENTS,
    length=st.integers(2, 11),
    kind=st.sampled_from([contiguous, scattered, chain]),
)
@settings(deadline=None, max_examples=150)
def test_packed_rows_are_those_of_a_plain_loop(documents: Any, length: int, kind: Any) -> None:
    """A wrong label, segment or byte count would silently train on the wrong thing."""
    rows = PackedRows([kind(documents)], TOKENIZER, length)
    expected = expected_rows(documents, length)
    assert len(rows) == len(expected)
    batch = rows.__getitems__(range(len(rows)))
    for name in ("input_ids", "labels", "segment_ids", "label_bytes"):
        assert batch[name].tolist() == [row[name] for row in expected], name


@given(documents=DOCUMENTS, length=st.integers(2, 11), sample=st.integers(0, 10**6))
@settings(deadline=None, max_examples=60)
def test_a_row_depends_on_its_number_alone(documents: Any, length: int, sample: int) -> None:
    """Rows that depend on their batch would differ after a resume or on other ranks."""
    rows = PackedRows([contiguous(documents)], TOKENIZER, length)
    number = sample % len(rows)
    together = rows.__getitems__(range(len(rows)))
    alone = rows[number]
    assert all(torch.equal(alone[name], together[name][number]) for name in alone)


def test_training_rows_leave_out_only_the_last_partial_row_and_say_so() -> None:
    """Lost tokens must be counted, and evaluation must lose none."""
    stream = contiguous([[1] * 20, [2] * 12])  # 34 tokens
    train = PackedRows([stream], TOKENIZER, 10, complete=False)
    assert (len(train), train.lost) == (3, 4)
    complete = PackedRows([stream], TOKENIZER, 10)
    assert (len(complete), complete.lost) == (4, 0)
    assert sum(map(len, complete.tokens(range(4)))) == 34


@given(documents=DOCUMENTS, length=st.integers(2, 6))
@settings(deadline=None, max_examples=60)
def test_padded_rows_hold_one_document_each(documents: Any, length: int) -> None:
    """Padding that counts as a label, or unreported truncation, would falsify the loss."""
    rows = PaddedRows([scattered(documents)], TOKENIZER, length)
    whole = [[*document, EOS] for document in documents]
    batch = rows.__getitems__(range(len(rows)))
    assert rows.lost == sum(max(0, len(document) - length) for document in whole)
    for number, document in enumerate(whole):
        kept = document[:length]
        mask = batch["attention_mask"][number].bool()
        assert batch["input_ids"][number][mask].tolist() == kept
        assert set(batch["input_ids"][number][~mask].tolist()) <= {PAD}
        counted = batch["labels"][number] != -100
        assert batch["labels"][number][counted].tolist() == kept[1:]
        assert int(batch["label_bytes"][number]) == sum(token < 256 for token in kept[1:])


@given(size=st.integers(1, 20_000), seed=st.integers(-(2**70), 2**70), epoch=st.integers(0, 99))
@settings(deadline=None, max_examples=40)
def test_the_order_of_an_epoch_is_a_permutation(size: int, seed: int, epoch: int) -> None:
    """A sample skipped or repeated in an epoch would go unnoticed."""
    order = permute(np.arange(size), size, seed, epoch)
    assert np.array_equal(np.sort(order), np.arange(size))
    some = np.arange(0, size, 7)
    assert np.array_equal(permute(some, size, seed, epoch), order[some])


@pytest.mark.parametrize("size", [1000, 5000, 6561], ids=["sorted", "feistel", "odd"])
def test_the_order_is_uniform(size: int) -> None:
    """A biased order would feed some samples early in every run: chi-square over 16 x 16 cells."""
    counts = np.zeros((16, 16))
    for seed in range(60):
        order = permute(np.arange(size), size, seed, 0)
        np.add.at(counts, (np.arange(size) * 16 // size, order * 16 // size), 1)
    row, column = counts.sum(1, keepdims=True), counts.sum(0, keepdims=True)
    expected = row @ column / counts.sum()
    chi = float(((counts - expected) ** 2 / expected).sum())
    assert stats.chi2.sf(chi, 15 * 15) > 1e-4
    fixed = sum(
        int((permute(np.arange(size), size, seed, 1) == np.arange(size)).sum())
        for seed in range(100)
    )
    assert abs(fixed - 100) < 5 * math.sqrt(100)  # one per permutation, Poisson


@pytest.mark.parametrize("size", [3000, 50_000])
def test_epochs_and_seeds_have_orders_of_their_own(size: int) -> None:
    """Epochs with related orders would repeat the same order."""
    orders = [permute(np.arange(size), size, seed, epoch) for seed in (0, 1) for epoch in range(4)]
    bound = 5 / math.sqrt(size)
    for number, one in enumerate(orders):
        assert abs(np.corrcoef(one, np.arange(size))[0, 1]) < bound
        for other in orders[:number]:
            assert abs(np.corrcoef(one, other)[0, 1]) < bound
            assert abs(np.corrcoef(np.diff(one), np.diff(other))[0, 1]) < 2 * bound
    neighbours = np.corrcoef(orders[0][:-1], orders[0][1:])[0, 1]
    assert abs(neighbours) < bound


def loader_of(data: TextData, **wish: Any) -> ResumableLoader:
    return ResumableLoader(data.train, 4, 7, collate=as_it_is, **wish)


def test_a_run_resumed_anywhere_with_other_workers_sees_the_same_batches(
    tmp_path: Path, cache: Path
) -> None:
    """Otherwise a resumed run differs."""
    data = data_of(cache, train=str(write_lines(tmp_path / "a.txt", sentences(200))), seq_len=32)
    straight = list(loader_of(data).batches(epoch=2))
    for workers in (0, 2):
        resumed = list(loader_of(data, num_workers=workers).batches(epoch=2, start=9))
        assert len(resumed) == len(straight) - 9
        for one, other in zip(straight[9:], resumed, strict=True):
            assert all(torch.equal(one[name], other[name]) for name in one)


def test_two_processes_share_each_batch_of_one(tmp_path: Path, cache: Path) -> None:
    """The order of the data must not depend on how many processes train."""
    data = data_of(cache, train=str(write_lines(tmp_path / "a.txt", sentences(80))), seq_len=32)
    halves = [list(loader_of(data, ranks=Ranks(rank, 2))) for rank in (0, 1)]
    for whole, first, second in zip(loader_of(data), *halves, strict=True):
        joined = torch.cat([first["sample_ids"], second["sample_ids"]])
        assert torch.equal(joined, whole["sample_ids"])


@given(
    rows=st.lists(st.integers(1, 90), min_size=1, max_size=4),
    weights=st.lists(st.floats(0.1, 9), min_size=4, max_size=4),
)
@settings(deadline=None, max_examples=25)
def test_a_mixture_keeps_its_shares_and_leaves_out_no_row(
    rows: list[int], weights: list[float]
) -> None:
    """Shares that drift, or rows never seen, would silently change the data."""
    layout = Layout.mixture(rows, weights[: len(rows)])
    sources, picked = layout.locate(np.arange(len(layout)))
    total = sum(weights[: len(rows)])
    for number, (count, weight) in enumerate(zip(rows, weights, strict=False)):
        uses = np.bincount(picked[sources == number], minlength=count)
        assert len(uses) == count
        assert uses.min() >= 1
        assert uses.max() - uses.min() <= 1
        assert abs(uses.sum() - len(layout) * weight / total) <= len(rows)


def test_a_mixture_evaluates_each_source_by_name(tmp_path: Path, cache: Path) -> None:
    """A loss that gets worse on one source must be visible."""
    one = write_lines(tmp_path / "code.txt", sentences(300, "code"))
    two = write_lines(tmp_path / "prose.txt", sentences(100, "prose"))
    sources = [{"path": str(one), "weight": 3}, {"path": str(two), "name": "books"}]
    data = data_of(cache, train=sources, seq_len=16, valid_share=0.2)
    assert set(data.valid) == {"val", "val_code", "val_books"}
    assert len(data.valid["val"]) == len(data.valid["val_code"]) + len(data.valid["val_books"])
    ids = data.valid["val_books"].tokens(range(len(data.valid["val_books"])))
    text = TOKENIZER.decode(np.concatenate(ids).tolist())
    assert "prose" in text
    assert "code" not in text
    used, _ = data.train.layout.locate(np.arange(len(data.train)))
    assert abs((used == 0).mean() - 0.75) < 0.01
    with pytest.raises(DataError, match="two sources are called 'code'"):
        data_of(cache, train=[{"path": str(one)}, {"path": str(one)}])


def test_evaluation_counts_every_label_once(tmp_path: Path, cache: Path) -> None:
    """A validation loss that skips or repeats data would be a different number."""
    lines = sentences(150)
    path = str(write_lines(tmp_path / "v.txt", lines))
    data = data_of(cache, train=path, valid=path, seq_len=64)
    rows = data.valid["val"]
    batches = list(ResumableLoader(rows, 7, shuffle=False, collate=as_it_is))
    labels = torch.cat([batch["labels"] for batch in batches])
    assert int((labels != -100).sum()) == sum(len(line) for line in lines)  # the rest, and eos
    assert sum(int(batch["label_bytes"].sum()) for batch in batches) == sum(
        len(line) - 1 for line in lines
    )
    assert torch.cat([batch["sample_ids"] for batch in batches]).tolist() == list(range(len(rows)))


def test_a_limited_evaluation_is_spread_evenly_and_says_so(tmp_path: Path, cache: Path) -> None:
    path = str(write_lines(tmp_path / "v.txt", sentences(300)))
    data = data_of(cache, train=path, valid=path, seq_len=16, valid_limit=160)
    rows = data.valid["val"]
    places = [first for _, first, _ in rows.locate(range(len(rows)))]
    assert len(rows) == 10
    assert max(np.diff(places)) - min(np.diff(places)) <= 16
    assert any("valid_limit" in note for note in data.notes())


def test_copies_of_a_document_are_held_out_together(tmp_path: Path, cache: Path) -> None:
    """A copy of a validation document in the training text would falsify the validation loss."""
    lines = sentences(400) * 2
    data = data_of(
        cache, train=str(write_lines(tmp_path / "a.txt", lines)), seq_len=8, valid_share=0.3
    )

    def documents(streams: Sequence[Stream]) -> set[bytes]:
        ids = np.empty(len(streams[0]), np.int64)
        streams[0].read(0, len(ids), ids)
        return set(np.where(ids == EOS, 10, ids).astype(np.uint8).tobytes().splitlines())

    train, valid = documents(data.train.streams), documents(data.valid["val"].streams)
    assert not train & valid
    assert train | valid == {line.encode() for line in lines}
    assert 0.2 < len(valid) / 400 < 0.4


def test_the_embedded_text_is_this_pythons_library(cache: Path) -> None:
    """The quickstart must have text on every machine, the same at every start."""
    data = data_of(cache)
    names = {
        data.train.streams[0].place(position).file
        for position in range(0, len(data.train.streams[0]), 20_000)
    }
    assert "argparse.py" in names
    assert not [name for name in names if {"test", "tests", "site-packages"} & set(name.split("/"))]
    train, valid = data.train.streams[0].documents, data.valid["val"].streams[0].documents
    assert 0.03 < valid / (train + valid) < 0.07
    first = data.train[0]
    assert first["input_ids"].shape == (512,)
    assert torch.equal(first["input_ids"], data_of(cache).train[0]["input_ids"])


@pytest.mark.parametrize(
    ("reached", "said"),
    [
        (1.5, "1.50 bits/byte: beats xz 1.92, gzip 2.15 and bigram 3.37, on the same text"),
        (2.0, "2.00 bits/byte: beats gzip 2.15 and bigram 3.37, but not xz 1.92, on the same text"),
        (4.0, "4.00 bits/byte: does not beat xz 1.92, gzip 2.15 and bigram 3.37 on the same text"),
        (math.nan, "xz 1.92, gzip 2.15 and bigram 3.37 bits/byte on the same text"),
    ],
)
def test_the_summary_says_what_the_model_beats(reached: float, said: str) -> None:
    told = compared(reached, {"gzip": 2.148, "xz": 1.919, "bigram": 3.366})
    assert told == f"{said} (xz and gzip see nothing else)"
    assert compared(reached, {}) == ""


def test_baselines_are_those_of_gzip_of_xz_and_of_counting() -> None:
    """The baselines printed next to the model's result must be correct."""
    train, text = b"abracadabra " * 50, b"abracadabra cadabra"
    assert gzip_bits_per_byte(text) == 8 * (len(zlib.compress(text, 9)) - 6) / len(text)
    container = len(lzma.compress(text, preset=9 | lzma.PRESET_EXTREME))
    assert 40 <= container - xz_bits_per_byte(text) * len(text) / 8 <= 72
    pairs, firsts = Counter(pairwise(train)), Counter(train[:-1])
    seconds = Counter(train[1:])
    candidates = []
    for strength in (2.0**power for power in range(-2, 11)):
        bits = 0.0
        for pair in pairwise(text):
            single = (seconds[pair[1]] + 1) / (len(train) - 1 + 256)
            bits -= math.log2((pairs[pair] + strength * single) / (firsts[pair[0]] + strength))
        candidates.append(bits / (len(text) - 1))
    assert min(abs(bigram_bits_per_byte(train, text) - one) for one in candidates) < 1e-12


class Recorder(Plugin[PluginConfig]):
    """Records the samples of every step."""

    def __init__(self) -> None:
        super().__init__()
        self.steps: list[list[int]] = []

    @hookimpl
    def on_batch(self, engine: Engine, batch: Any) -> None:
        while len(self.steps) <= engine.state.step:
            self.steps.append([])
        self.steps[engine.state.step] += batch["sample_ids"].tolist()


def tiny_engine(plugins: list[Plugin[Any]], vocabulary: int = 259, **wish: Any) -> Engine:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(vocabulary, 8), nn.Linear(8, vocabulary))

    def loss(model: nn.Module, batch: Any) -> torch.Tensor:
        logits = model(batch["input_ids"])
        return nn.functional.cross_entropy(logits.flatten(0, 1), batch["labels"].flatten())

    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    return Engine(model, optimizer, loss=loss, plugins=plugins, **wish)


@pytest.mark.parametrize("ends", [False, True])
def test_at_names_what_a_step_trained_on(tmp_path: Path, cache: Path, ends: bool) -> None:
    """Tracing a loss spike must find the right documents."""
    lines = sentences(60)
    path = write_lines(tmp_path / "a.txt", lines)
    settings_ = {"train": str(path), "seq_len": 16, "batch_size": 4, "cache_dir": str(cache)}
    recorder = Recorder()
    run = tmp_path / "run"
    wish: dict[str, Any] = {"accumulate": 3, "step_at_epoch_end": ends}
    engine = tiny_engine([DataTextPlugin(**settings_), recorder], seed=5, out=run, **wish)
    result = engine.fit(until="13 steps")
    assert engine.state.epoch >= 1
    assert math.isfinite(result.metrics["val/loss"])
    config = {"seed": 5, **wish, "plugins": {"data_text": settings_}}
    (run / "config.yaml").write_text(json.dumps(config))
    for step in (1, 7, 13):
        rows = trained_on(run, step)
        assert [row.sample for row in rows] == recorder.steps[step - 1]
        for excerpt in (excerpt for row in rows for excerpt in row.excerpts):
            line = lines[excerpt.place.document]
            assert (
                excerpt.text == line[excerpt.place.offset : excerpt.place.offset + excerpt.tokens]
            )


def test_the_tokenizer_goes_with_the_run_and_another_is_refused(
    tmp_path: Path, cache: Path
) -> None:
    """Weights trained with another tokenizer would be useless."""
    path = str(write_lines(tmp_path / "a.txt", sentences(60)))
    run = tmp_path / "run"
    plugin = DataTextPlugin(train=path, seq_len=16, cache_dir=cache)
    engine = tiny_engine([plugin], out=run)
    engine.fit(until="1 steps")
    assert (run / "tokenizer.json").read_text() == TOKENIZER.to_json()
    snapshot = engine.state_dict()
    again = DataTextPlugin(train=path, seq_len=16, cache_dir=cache)
    resumed = tiny_engine([again])
    resumed.load_state_dict(snapshot)
    resumed.fit(until="2 steps")

    np.arange(4000, dtype=np.uint16).tofile(tmp_path / "ids.bin")
    other = DataTextPlugin(
        train=str(tmp_path / "ids.bin"), seq_len=16, cache_dir=cache, valid_share=0
    )
    mixed = tiny_engine([other], vocabulary=4000)
    snapshot["model"] = mixed.model.state_dict()
    mixed.load_state_dict(snapshot)
    with pytest.raises(
        CheckpointError, match=r"bytes tokenizer of 259 .* unknown tokenizer of 4,000"
    ):
        mixed.fit(until="2 steps")
    with pytest.raises(CheckpointError, match="is not the unknown tokenizer of 4,000"):
        tiny_engine(
            [
                DataTextPlugin(
                    train=str(tmp_path / "ids.bin"), seq_len=16, cache_dir=cache, valid_share=0
                )
            ],
            vocabulary=4000,
            out=run,
        ).fit(until="1 steps")


def test_a_tokenizer_with_any_line_breaks_is_that_of_its_run(tmp_path: Path, cache: Path) -> None:
    """A run with a tokenizer.json from Windows must be resumable."""
    from nexus_plugins.data_text.formats import Reading
    from nexus_plugins.data_text.training import train_tokenizer

    path = write_lines(tmp_path / "a.txt", sentences(60))
    file = tmp_path / "crlf.json"
    train_tokenizer([path], file, 300, Reading())
    file.write_bytes(file.read_bytes().replace(b"\n", b"\r\n"))
    for steps in (1, 2):
        plugin = DataTextPlugin(
            train=str(path), seq_len=16, tokenizer=str(file), cache_dir=cache, valid_share=0
        )
        tiny_engine([plugin], vocabulary=300, out=tmp_path / "run").fit(until=f"{steps} steps")
        assert (tmp_path / "run/tokenizer.json").read_bytes() == file.read_bytes()


def test_a_character_corpus_of_nanogpt_trains_as_it_is(tmp_path: Path, cache: Path) -> None:
    """Headerless .bin files with a meta.pkl need no conversion, and decode to their characters."""
    text = "to be or not to be, that is the question: é\n" * 40
    letters = sorted(set(text))
    ids = np.array([letters.index(letter) for letter in text], np.uint16)
    ids[:1500].tofile(tmp_path / "train.bin")
    ids[1500:].tofile(tmp_path / "val.bin")
    meta = {"vocab_size": len(letters), "itos": dict(enumerate(letters)), "stoi": {}}
    (tmp_path / "meta.pkl").write_bytes(pickle.dumps(meta))
    plugin = DataTextPlugin(train=str(tmp_path), seq_len=32, batch_size=4, cache_dir=cache)
    engine = tiny_engine([plugin], vocabulary=len(letters))
    engine.fit(until="2 steps")
    assert engine.data is not None
    assert engine.data.codec is not None
    assert engine.data.codec.decode(ids[:20].tolist()) == text[:20]
    batch = next(iter(engine.data.valid["val"]))
    labels = batch["labels"][0]
    shown = "".join(letters[token] for token in labels[labels != -100].tolist())
    assert int(batch["label_bytes"][0]) == len(shown.encode())


class Bomb:
    def __reduce__(self) -> tuple[Any, ...]:
        return print, ("this must never run",)


def test_a_meta_file_cannot_run_code(tmp_path: Path, cache: Path, capsys: Any) -> None:
    """A downloaded corpus must not be able to execute code."""
    np.zeros(99, np.uint16).tofile(tmp_path / "train.bin")
    (tmp_path / "meta.pkl").write_bytes(pickle.dumps({"vocab_size": Bomb()}))
    with pytest.raises(DataError, match=r"not the meta\.pkl"):
        data_of(cache, train=str(tmp_path))
    assert capsys.readouterr().out == ""


def test_a_bpe_corpus_of_nanogpt_splits_at_eos(tmp_path: Path, cache: Path) -> None:
    """With a tokenizer, a bare .bin is split at eos; without one, ids are one document."""
    from tokenizers import Tokenizer, models

    vocabulary = {f"t{number}": number for number in range(9)} | {"<|endoftext|>": 9}
    Tokenizer(models.WordLevel(vocabulary, "t0")).save(str(tmp_path / "tok.json"))
    np.array([1, 2, 9, 3, 4, 5, 9, 6], np.uint16).tofile(tmp_path / "ids.bin")
    wish = {"train": str(tmp_path / "ids.bin"), "seq_len": 8, "valid_share": 0}
    apart = data_of(cache, tokenizer=str(tmp_path / "tok.json"), **wish)
    assert apart.train[0]["segment_ids"].tolist() == [0, 0, 0, 1, 1, 1, 1, 2]
    plain = data_of(cache, **wish)
    assert plain.tokenizer.size == 10
    assert plain.train[0]["segment_ids"].tolist() == [0] * 8
    assert "label_bytes" not in plain.train[0]
    with pytest.raises(DataError, match=r"holds id 9, but the vocabulary has 5"):
        data_of(cache, vocab_size=5, **wish)


def test_a_document_gives_the_same_logits_alone_and_packed(tmp_path: Path, cache: Path) -> None:
    """State must not leak from one document into the next."""
    from nexus_plugins.model_nexus import NEXUSConfig, NEXUSCore

    lines = sentences(12)
    data = data_of(
        cache, train=str(write_lines(tmp_path / "a.txt", lines)), seq_len=300, valid_share=0
    )
    torch.manual_seed(0)
    model = NEXUSCore(NEXUSConfig(vocab_size=259, d_model=32, ssm_n_layers=2)).eval()
    row = {name: value[None] for name, value in data.train[0].items()}
    with torch.no_grad():
        packed = model(row["input_ids"], segment_ids=row["segment_ids"])[0]
        for segment in row["segment_ids"].unique().tolist():
            mine = row["segment_ids"][0] == segment
            alone = model(row["input_ids"][:, mine])[0]
            assert torch.allclose(packed[mine], alone, atol=1e-5)
    assert int(row["segment_ids"].max()) > 5


def test_a_file_that_changes_under_a_run_is_noticed(tmp_path: Path, cache: Path) -> None:
    """Reading on would train on garbage, or kill the process if the file is shorter."""
    path = write_lines(tmp_path / "a.txt", sentences(60))
    data = data_of(cache, train=str(path), seq_len=16)
    data.train.__getitems__([0])
    path.write_text("short")
    with pytest.raises(DataError, match=r"a\.txt changed while it was in use"):
        data.train.__getitems__([0])


def test_data_goes_to_worker_processes_as_paths(tmp_path: Path, cache: Path) -> None:
    """With spawned processes, a mapped file must not be pickled by value."""
    path = write_lines(tmp_path / "a.txt", sentences(3000))
    data = data_of(cache, train=str(path), seq_len=16)
    travelling = pickle.dumps(data.train)
    assert len(travelling) < 10_000
    copy = pickle.loads(travelling)
    assert torch.equal(copy[3]["input_ids"], data.train[3]["input_ids"])


@pytest.mark.parametrize(
    ("wish", "message"),
    [
        ({"train": "nowhere.txt"}, "data_text.train: no file or folder 'nowhere.txt'"),
        ({"train": "*.nothing"}, "data_text.train: no file or folder"),
        ({"train": []}, "the list of sources is empty"),
        ({"train": ""}, "the path of the data is empty"),
        ({"tokenizer": "missing.json"}, "data_text.tokenizer: no tokenizer 'missing.json'"),
        ({"seq_len": 100_000_000}, "too few for a row of 100000000"),
    ],
)
def test_wishes_that_cannot_be_met_say_why(cache: Path, wish: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        data_of(cache, **wish)


def test_a_split_that_leaves_nothing_to_evaluate_is_refused(tmp_path: Path, cache: Path) -> None:
    """A run must not silently have no validation."""
    path = write_lines(tmp_path / "a.txt", ["only one document, and it is long enough for a row"])
    with pytest.raises(DataError, match=r"is left for evaluation|too few for a row"):
        data_of(cache, train=str(path), seq_len=8)
    assert data_of(cache, train=str(path), seq_len=8, valid_share=0).valid == {}


def lossy_tokenizer(path: Path) -> str:
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers

    words = {"[UNK]": 0, "[SEP]": 1, "[PAD]": 2, "cafe": 3, "##s": 4, "the": 5, ",": 6}
    tokenizer = Tokenizer(models.WordPiece(words, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.enable_truncation(2)
    tokenizer.save(str(path))
    return str(path)


@pytest.mark.parametrize("kind", ["byte level", "lossy", "bytes", "bytes256"])
def test_label_bytes_add_up_to_the_text_for_any_tokenizer(
    tmp_path: Path, cache: Path, kind: str
) -> None:
    """Bits per byte must account for text that the tokenizer loses, which must be reported."""
    from nexus_plugins.data_text.formats import Reading
    from nexus_plugins.data_text.training import train_tokenizer

    lines = ["  The Cafés,   the cafés  ", "the <|endoftext|> [SEP] ε", "unknown wörds the"] * 9
    path = write_lines(tmp_path / "a.txt", lines)
    name = {"lossy": "tok.json", "byte level": "bpe.json"}.get(kind, kind)
    if kind == "lossy":
        name = lossy_tokenizer(tmp_path / name)
    if kind == "byte level":
        name = str(tmp_path / name)
        train_tokenizer([path], Path(name), 300, Reading())
    data = data_of(cache, train=str(path), valid=str(path), tokenizer=name, seq_len=4)
    rows = data.valid["val"]
    batch = rows.__getitems__(range(len(rows)))
    stream = rows.streams[0]
    firsts = 0
    for document in range(stream.documents):
        first, _ = stream.span(document)
        known = stream.read_bytes(first, first + 1)
        ids = np.empty(1, np.int64)
        stream.read(first, first + 1, ids)
        table = data.tokenizer.token_bytes
        firsts += int(known[0] if known is not None else table[ids[0]])  # type: ignore[index]
    lost = 9 * len("<|endoftext|>[SEP]εunknownwörds".encode()) if kind == "lossy" else 0
    text = sum(len(line.encode()) for line in lines)
    assert int(batch["label_bytes"].sum()) + firsts == text - lost
    said = [note for note in data.notes() if f"{lost:,} bytes of text have no id" in note]
    assert len(said) == (kind == "lossy")
    prepare([path], tmp_path / "p", Job(tokenizer=name))
    again = data_of(cache, train=str(tmp_path / "p"), seq_len=4, valid_share=0).notes()
    assert any("the tokenizer is lossy" in note for note in again) == (kind == "lossy")
    assert (batch["label_bytes"] >= 0).all()


def test_256_ids_are_enough_for_bytes(tmp_path: Path, cache: Path) -> None:
    """Fails if a model of 256 ids gets id 256, or a byte 0 in the text is silently lost."""
    path = write_lines(tmp_path / "a.txt", ["one ε", "two", "t\0o"])
    data = data_of(cache, train=str(path), valid=str(path), tokenizer="bytes256", seq_len=4)
    ids = data.train.streams[0]
    whole = np.empty(len(ids), np.int64)
    ids.read(0, len(ids), whole)
    assert whole.astype(np.uint8).tobytes() == "one ε\0two\0t\0o\0".encode()
    assert data.tokenizer.size == 256
    assert data.tokenizer.decode(whole.tolist()) == "one εtwoto"
    assert any("1 bytes of text have no id" in note for note in data.notes())


@pytest.mark.parametrize("mixture", [False, True])
def test_bytes_that_nobody_counted_are_not_guessed(
    tmp_path: Path, cache: Path, mixture: bool
) -> None:
    """Bits per byte would be wrong if the bytes of only some ids are known."""
    name = lossy_tokenizer(tmp_path / "tok.json")
    path = write_lines(tmp_path / "a.txt", ["the cafés, the", "the unknown"] * 9)
    np.array([5, 3, 4, 1] * 9, np.uint16).tofile(tmp_path / "bare.bin")
    counted = data_of(cache, train=str(path), tokenizer=name, seq_len=5, valid_share=0)
    assert "label_bytes" in counted.train.__getitems__(range(len(counted.train)))
    both = [str(path), str(tmp_path / "bare.bin")]
    wish = [{"path": one} for one in both] if mixture else both
    mixed = data_of(cache, train=wish, tokenizer=name, seq_len=5, valid_share=0)
    assert "label_bytes" not in mixed.train.__getitems__(range(len(mixed.train)))
