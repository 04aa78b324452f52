"""Speed of turning text into batches, compared with others: `python -m benchmarks.data`.

Prints a table and writes JSON. All sides are measured in interleaved rounds on the same files; each
figure is the median, ratios are taken within a round, and every measurement starts with the file in
the page cache.

- prepare: `nexus-data prepare`, bare `tokenizers.encode_batch_fast` (the upper limit), and
  `datasets.map` as in the guides of transformers and with `encode_batch_fast` substituted, on the
  same text with the same tokenizer and cores. Our time includes reading the text file, starting
  workers and writing a file of ids; the others have the text in memory or in Arrow's cache already,
  and `datasets.map` writes Arrow lists;
- bytes: `nexus-data prepare` with the bytes tokenizer;
- batches: 32 x 2,048 tokens from a .bin: ours (inputs, labels, segments, checks), nanoGPT's
  `get_batch` reimplemented from its description (random offsets, inputs and labels, one memory map
  per call), and a plain `DataLoader` over a map-style data set;
- open: peak memory and time of opening a large .txt, the first and the second time, in a process
  without torch (which takes more memory than this by itself).
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import shutil
import statistics
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from nexus_core.bases.loader import ResumableLoader
from nexus_plugins.data_text import DataTextConfig
from nexus_plugins.data_text.binary import TokenWriter
from nexus_plugins.data_text.dataset import open_data
from nexus_plugins.data_text.formats import Reading
from nexus_plugins.data_text.prepare import Job, prepare
from nexus_plugins.data_text.rows import as_it_is
from nexus_plugins.data_text.tokenizer import IdTokenizer
from nexus_plugins.data_text.training import train_tokenizer

ROWS, LENGTH = 32, 2048
Timed = Callable[[], float]


def main() -> None:
    """Run all parts, or the given ones."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else "")
    parser.add_argument("parts", nargs="*", default=["prepare", "bytes", "batches", "open"])
    parser.add_argument("--megabytes", type=int, default=64, help="text for the tokenizers")
    parser.add_argument("--gigabytes", type=float, default=2.0, help="size of the .txt to open")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path, help="write the results to this file")
    wish = parser.parse_args()
    found: dict[str, Any] = {"cores": os.cpu_count()}
    with tempfile.TemporaryDirectory(dir=os.environ.get("BENCH_DIR")) as name:
        folder = Path(name)
        for part in wish.parts:
            measure = {
                "prepare": lambda: prepare_text(folder, wish.megabytes, wish.rounds),
                "bytes": lambda: prepare_bytes(folder, wish.rounds),
                "batches": lambda: read_batches(folder, wish.rounds),
                "open": lambda: open_large(folder, wish.gigabytes),
            }[part]
            found[part] = measure()
            for what, value in found[part].items():
                print(f"{part:<9}{what:<36}{value:>12,.3f}", flush=True)
    if wish.json:
        wish.json.write_text(json.dumps(found, indent=1))


def interleaved(competitors: dict[str, Timed], rounds: int) -> dict[str, float]:
    """The median result of each over interleaved rounds, and of the first's ratio to each."""
    seen: dict[str, list[float]] = {name: [] for name in competitors}
    for _ in range(rounds):
        for name, run in competitors.items():
            seen[name].append(run())
    found = {name: statistics.median(values) for name, values in seen.items()}
    first, *others = seen
    for other in others:
        ratios = [own / peer for own, peer in zip(seen[first], seen[other], strict=True)]
        found[f"of {other.partition(',')[0]}"] = statistics.median(ratios)
    return found


def library_lines() -> Iterator[str]:
    """Lines of Python's standard library: real text that every machine has."""
    for path in sorted(Path(sysconfig.get_path("stdlib")).rglob("*.py")):
        if "packages" not in str(path):
            yield from path.read_text(errors="ignore").splitlines()


def write_text(path: Path, size: int) -> int:
    """Write documents of about forty lines, one per line, up to a size; returns the bytes."""
    lines = [line.replace("\r", " ") for line in library_lines()]
    documents = [" ".join(lines[first : first + 40]) for first in range(0, len(lines), 40)]
    text = "".join(f"{document}\n" for document in documents).encode()
    with path.open("wb") as file:
        while file.tell() + len(text) <= size:
            file.write(text)
        rest = text[: size - file.tell()]
        file.write(rest[: rest.rfind(b"\n") + 1])
        return file.tell()


def prepare_text(folder: Path, megabytes: int, rounds: int) -> dict[str, float]:
    """The speed of text to ids, in megabytes per second."""
    path, vocabulary = folder / "text.txt", folder / "vocabulary.json"
    size = write_text(path, megabytes << 20) / 1e6
    train_tokenizer([path], vocabulary, 8000, Reading())

    def ours() -> float:
        out = folder / "prepared"
        begin = time.perf_counter()
        prepare([path], out, Job(tokenizer=str(vocabulary)), workers=os.cpu_count() or 1)
        taken = time.perf_counter() - begin
        shutil.rmtree(out)
        return size / taken

    def rate(peer: Timed) -> float:
        return size / peer()

    competitors: dict[str, Timed] = {
        "nexus-data prepare, MB/s": ours,
        "encode_batch_fast alone, MB/s": partial(rate, partial(raw_encoding, path, vocabulary)),
    }
    if importlib.util.find_spec("datasets"):
        for what, encode in {"as in guides": AS_IN_GUIDES, "by hand": BY_HAND}.items():
            peer = partial(mapped, path, vocabulary, folder, encode)
            competitors[f"datasets.map {what}, MB/s"] = partial(rate, peer)
    return interleaved(competitors, rounds)


def raw_encoding(path: Path, vocabulary: Path) -> float:
    """The time of the package alone, in a separate process like the others."""
    return timed_program(
        "from tokenizers import Tokenizer\n"
        f"texts = open({str(path)!r}).read().split('\\n')\n"
        f"tokenizer = Tokenizer.from_file({str(vocabulary)!r})\n"
        "begin = time.perf_counter()\n"
        "for first in range(0, len(texts), 1000):\n"
        "    tokenizer.encode_batch_fast(texts[first:first + 1000], add_special_tokens=False)\n"
    )


AS_IN_GUIDES = (
    "from transformers import PreTrainedTokenizerFast\n"
    "tokenizer = PreTrainedTokenizerFast(tokenizer_file={vocabulary!r})\n"
    "def encode(rows):\n"
    "    return tokenizer(rows['text'])\n"
)
BY_HAND = (
    "from tokenizers import Tokenizer\n"
    "tokenizer = Tokenizer.from_file({vocabulary!r})\n"
    "def encode(rows):\n"
    "    found = tokenizer.encode_batch_fast(rows['text'], add_special_tokens=False)\n"
    "    return {{'ids': [one.ids for one in found]}}\n"
)


def mapped(path: Path, vocabulary: Path, folder: Path, encode: str) -> float:
    """The time of `datasets.map` in batches of a thousand, with one process per core."""
    cache = folder / "datasets"
    taken = timed_program(
        "import datasets\n"
        "datasets.disable_progress_bars()\n"
        + encode.format(vocabulary=str(vocabulary))
        + f"loaded = datasets.load_dataset('text', data_files={str(path)!r}, "
        f"cache_dir={str(cache)!r})['train']\n"
        "begin = time.perf_counter()\n"
        f"loaded.map(encode, batched=True, num_proc={os.cpu_count()}, remove_columns=['text'])\n",
        TOKENIZERS_PARALLELISM="false",
        HF_HUB_OFFLINE="1",
    )
    shutil.rmtree(cache, ignore_errors=True)
    return taken


def timed_program(program: str, **environment: str) -> float:
    """The time of a program from its line `begin = ...` on, in seconds."""
    done = subprocess.run(
        [sys.executable, "-c", f"import time\n{program}print(time.perf_counter() - begin)"],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=True,
    )
    return float(done.stdout.split()[-1])


def prepare_bytes(folder: Path, rounds: int) -> dict[str, float]:
    """The speed with the bytes tokenizer, including the start of workers."""
    path = folder / "bytes.txt"
    size = write_text(path, 256 << 20) / 1e6

    def ours() -> float:
        begin = time.perf_counter()
        prepare([path], folder / "bytes", Job(), workers=os.cpu_count() or 1)
        taken = time.perf_counter() - begin
        shutil.rmtree(folder / "bytes")
        return size / taken

    return interleaved({"nexus-data prepare, MB/s": ours}, rounds)


class PlainRows(Dataset[tuple[torch.Tensor, torch.Tensor]]):
    """The data set of tutorials: inputs and labels from a memory map."""

    def __init__(self, path: Path) -> None:
        self._ids = np.memmap(path, np.uint16, "r")

    def __len__(self) -> int:
        return (len(self._ids) - 1) // LENGTH

    def __getitem__(self, row: int) -> tuple[torch.Tensor, torch.Tensor]:
        piece = torch.from_numpy(self._ids[row * LENGTH : (row + 1) * LENGTH + 1].astype(np.int64))
        return piece[:-1], piece[1:]


def get_batch(path: Path) -> tuple[torch.Tensor, torch.Tensor]:
    """Random spans of a file, remapped at each call so that memory does not grow."""
    ids = np.memmap(path, dtype=np.uint16, mode="r")
    places = torch.randint(len(ids) - LENGTH, (ROWS,)).tolist()
    rows = [ids[at : at + LENGTH + 1].astype(np.int64) for at in places]
    inputs = torch.stack([torch.from_numpy(row[:-1]) for row in rows])
    labels = torch.stack([torch.from_numpy(row[1:]) for row in rows])
    return inputs, labels


def read_batches(folder: Path, rounds: int) -> dict[str, float]:
    """Million tokens per second, in one process."""
    torch.set_num_threads(1)
    stem = folder / "train"
    write_ids(stem, documents=100_000)
    (folder / "tokenizer.json").write_text(IdTokenizer(50_257).to_json())
    config = DataTextConfig(train=str(folder / "train.bin"), seq_len=LENGTH, valid_share=0)
    data = open_data(config)
    ours = ResumableLoader(data.train, ROWS, collate=as_it_is)
    plain = DataLoader(PlainRows(stem.with_suffix(".bin")), ROWS, shuffle=True)
    epoch = iter(range(10**9))

    def rate(batches: Iterator[Any], count: int = 600) -> float:
        next(batches)
        begin = time.perf_counter()
        for _ in range(count):
            next(batches)
        return count * ROWS * LENGTH / (time.perf_counter() - begin) / 1e6

    def nanogpt() -> Iterator[Any]:
        while True:
            yield get_batch(stem.with_suffix(".bin"))

    return interleaved(
        {
            "nexus, Mtokens/s": lambda: rate(ours.batches(next(epoch))),
            "nanoGPT's get_batch, Mtokens/s": lambda: rate(nanogpt()),
            "plain DataLoader, Mtokens/s": lambda: rate(iter(plain)),
        },
        rounds,
    )


def write_ids(stem: Path, documents: int) -> None:
    """Documents of 200 to 1,800 random ids of GPT-2's vocabulary."""
    random = np.random.default_rng(0)
    writer = TokenWriter(stem, 50_257, IdTokenizer(50_257).hash, with_lengths=False)
    for first in range(0, documents, 10_000):
        lengths = random.integers(200, 1800, 10_000)
        ids = random.integers(0, 50_000, lengths.sum()).astype(np.uint16)
        writer.append(ids, lengths, np.arange(first, first + 10_000), int(lengths.sum()))
    writer.finish()


def open_large(folder: Path, gigabytes: float) -> dict[str, float]:
    """Open a .txt twice, each time in a fresh process, and read a batch."""
    path = folder / "large.txt"
    write_text(path, int(gigabytes * 1e9))
    found: dict[str, float] = {"size, GB": path.stat().st_size / 1e9}
    program = (
        "import json, time\n"
        "import numpy as np\n"
        "from pathlib import Path\n"
        "from nexus_plugins.data_text.formats import Reading\n"
        "from nexus_plugins.data_text.index import open_text\n"
        "def peak():\n"
        "    lines = Path('/proc/self/status').read_text().splitlines()\n"
        "    return next(int(line.split()[1]) for line in lines if 'VmHWM' in line) / 1024\n"
        "before, begin = peak(), time.perf_counter()\n"
        f"train, valid = open_text(Path({str(path)!r}), Reading(), 0.05, 256, "
        f"Path({str(folder / 'cache')!r}))\n"
        "row = np.empty(2048, np.int64)\n"
        "for first in np.linspace(0, len(train) - 2048, 32).astype(int).tolist():\n"
        "    train.read(first, first + 2048, row)\n"
        "print(json.dumps([time.perf_counter() - begin, before, peak()]))\n"
    )
    for which in ("first", "second"):
        done = subprocess.run(
            [sys.executable, "-c", program], capture_output=True, text=True, check=True
        )
        taken, before, after = json.loads(done.stdout)
        found |= {
            f"{which} opening and 32 rows, s": taken,
            f"{which} opening, peak MB": after,
            f"{which} opening, peak MB before it": before,
        }
    return found


if __name__ == "__main__":
    main()
