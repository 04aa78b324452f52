"""The pictures of the README and the site, made from real runs: `python -m docs.pictures`.

All are made, which takes some minutes, or those that are named after it: `terminal`, `quickstart`,
and the examples in `EXAMPLES`. They are small, and committed: building the site runs nothing.
"""

from __future__ import annotations

import fcntl
import json
import os
import pty
import re
import runpy
import shutil
import struct
import sys
import termios
from collections.abc import Callable, Sequence
from contextlib import redirect_stdout
from io import BytesIO, StringIO
from itertools import groupby
from math import log
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import matplotlib as mpl
import numpy as np
import pyte
import torch
from matplotlib import pyplot as plt
from matplotlib.figure import Figure
from pyte.screens import Char
from rich.console import Console
from rich.style import Style
from rich.text import Text

from nexus_core import Engine, Plugin, PluginConfig, hookimpl

ROOT = Path(__file__).parents[1]
IMAGES = ROOT / "docs/images"
GRAY, BLUE, GREEN, ORANGE = "#8a8f98", "#5c6bc0", "#26a69a", "#ef8a3c"  # seen on white and black
COLUMNS, LINES = 104, 400


# -- the terminal


def terminal() -> None:
    """The first run, as a terminal shows it once it is over; its metrics make `quickstart`."""
    command = ["nexus-run", "--out", "runs/first"]
    with TemporaryDirectory() as folder:
        screen = _recorded(command, Path(folder))
        shutil.copy(Path(folder) / "runs/first/metrics.jsonl", IMAGES / "quickstart.jsonl")
    console = Console(record=True, width=COLUMNS, file=StringIO(), color_system="truecolor")
    console.print(Text("$ ", "bold green") + Text("nexus-run"))
    for row in range(screen.cursor.y + 1):
        console.print(_line(screen.buffer[row]))
    drawn = console.export_svg(title="NEXUS trainer", unique_id="terminal")
    local = re.sub(r"@font-face \{.*?\}", "", drawn, flags=re.DOTALL)  # nothing from elsewhere
    mono = "ui-monospace, Menlo, Consolas, DejaVu Sans Mono, monospace"
    (IMAGES / "terminal.svg").write_text(local.replace("Fira Code, monospace", mono))


def _recorded(command: list[str], folder: Path) -> pyte.Screen:
    """The screen of a terminal in which a command has run."""
    screen = pyte.Screen(COLUMNS, LINES)
    stream = pyte.ByteStream(screen)
    child, terminal = pty.fork()
    if child == 0:
        os.chdir(folder)
        place = Path(sys.executable).with_name(command[0])
        os.execve(place, command, {**os.environ, "TERM": "xterm-256color"})
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", LINES, COLUMNS, 0, 0))
    try:
        while said := os.read(terminal, 65536):
            stream.feed(said)
    except OSError:
        pass  # how a terminal says that nobody writes to it any more
    _, code = os.waitpid(child, 0)
    if code:
        raise SystemExit("\n".join(line.rstrip() for line in screen.display).strip())
    return screen


def _line(cells: dict[int, Char]) -> Text:
    """A row of the screen, as few pieces as it has styles."""
    text = Text()
    for style, piece in groupby((cells[column] for column in range(COLUMNS)), key=_style):
        text.append("".join(cell.data for cell in piece), style)
    text.rstrip()
    return text


def _style(cell: Char) -> Style:
    color = None if cell.fg == "default" else cell.fg.replace("brown", "yellow")
    return Style(color=color, bold=cell.bold)


# -- curves


def quickstart() -> None:
    """Bits per byte over the run that `terminal` recorded."""
    lines = [json.loads(line) for line in (IMAGES / "quickstart.jsonl").read_text().splitlines()]
    figure, axes = _figure(6.4, 3.0)
    training = [(n["step"], n["train/lm_loss"] / log(2)) for n in lines if "train/lm_loss" in n]
    held_out = [(n["step"], n["val/bits_per_byte"]) for n in lines if "val/bits_per_byte" in n]
    axes.plot(*zip(*training, strict=True), color=BLUE, label="training", lw=1.6)
    axes.plot(*zip(*held_out, strict=True), "o", color=ORANGE, label="held out", ms=5)
    for step, bits in held_out:
        axes.annotate(f"{bits:.2f}", (step, bits), (0, 8), textcoords="offset points", color=ORANGE)
    axes.set(xlabel="step", ylabel="bits per byte", ylim=(1, 4))
    axes.legend(frameon=False, labelcolor=GRAY)
    _save(figure, IMAGES / "quickstart.svg")


# -- examples


def minimal() -> Figure:
    ran = _ran("01_minimal")
    with torch.no_grad():
        fitted = ran["model"](ran["x"])
    figure, axes = _figure()
    axes.plot(ran["x"], ran["x"].sin(), color=GRAY, lw=5, alpha=0.4, label="sine")
    axes.plot(ran["x"], fitted, color=BLUE, label="the model")
    axes.legend(frameon=False, labelcolor=GRAY)
    return figure


def nexus_from_python() -> Figure:
    arguments = ["--steps", "60", "--out", "out"]
    _ran("02_nexus_from_python", *arguments)
    lines = [json.loads(line) for line in Path("out/metrics.jsonl").read_text().splitlines()]
    points = [(line["step"], line["train/lm_loss"]) for line in lines if "train/lm_loss" in line]
    figure, axes = _figure()
    axes.plot(*zip(*points, strict=True), "o-", color=BLUE, ms=4)
    axes.set(xlabel="step", ylabel="loss, nats")
    return figure


def own_loop() -> Figure:
    (model, *_), ran = _call_of("accuracy", "03_own_loop")
    torch.manual_seed(1)
    batch = ran["spirals"](200)
    figure, axes = _figure()
    _regions(axes, model, batch["point"], batch["arm"], 1.15)
    return figure


def huggingface_model() -> Figure:
    ran = _loaded("04_huggingface_model")
    batches = ran["rows_of_bytes"](length=32, rows=8)
    figure, axes = _figure()
    by_hand = ran["losses_by_hand"](ran["fresh_model"](), batches)
    axes.plot(by_hand, color=GRAY, lw=6, alpha=0.4, label="a loop by hand")
    axes.plot(ran["losses_by_engine"](ran["fresh_model"](), batches), color=BLUE, label="engine")
    axes.set(xlabel="step", ylabel="loss, nats")
    axes.legend(frameon=False, labelcolor=GRAY)
    return figure


def vision() -> Figure:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    _ran("05_vision")
    events = EventAccumulator("runs/digits/tensorboard/misread", {"images": 0}).Reload()
    (tag,) = events.Tags()["images"]  # digits side by side, each pixel eight times as large
    shown = plt.imread(BytesIO(events.Images(tag)[-1].encoded_image_string))[4::8, 4::8, 0]
    rows = [row for line in np.split(shown, len(shown) // 8) for row in np.hsplit(line, 8)]
    return _tiles([digit for digit in rows if digit.any()], 4)


def reinforcement() -> Figure:
    (_, lengths), _ = _call_of("games", "06_reinforcement")
    figure, axes = _figure()
    axes.plot(lengths, color=GREEN)
    axes.set(xlabel="step", ylabel="moves that the pole stands")
    return figure


def classic() -> Figure:
    _ran("07_classic", "--steps", "100", "--out", "out")
    lines = [json.loads(line) for line in Path("out/metrics.jsonl").read_text().splitlines()]
    figure, axes = _figure()
    colors = {"lm": BLUE, "world": GREEN, "energy": ORANGE, "causal": GRAY}
    for term, color in colors.items():
        points = [(n["step"], n[f"train/{term}_loss"]) for n in lines if "train/lm_loss" in n]
        axes.plot(*zip(*points, strict=True), color=color, label=term)
    axes.set(xlabel="step", ylabel="loss terms")
    axes.legend(frameon=False, labelcolor=GRAY)
    return figure


def gan() -> Figure:
    ran = _ran("08_gan")
    with torch.no_grad():
        drawn = ran["nets"][1](torch.randn(150, 2))
    figure, axes = _figure()
    axes.scatter(*ran["data"].flatten(0, 1)[:150].T, s=8, color=GRAY, alpha=0.5, label="data")
    axes.scatter(*drawn.T, s=8, color=BLUE, alpha=0.7, label="generated")
    axes.legend(frameon=False, labelcolor=GRAY)
    return figure


def lbfgs() -> Figure:
    ran = _ran("09_lbfgs")
    with torch.no_grad():
        apart = (ran["model"](ran["x"]) - ran["x"].sin()).abs()
    figure, axes = _figure()
    axes.semilogy(ran["x"], apart, color=GREEN, lw=1.2)
    axes.set(ylabel="error after 10 steps")
    return figure


def sam() -> Figure:
    ran = _ran("10_sam")
    points, kinds = (torch.cat(parts) for parts in zip(*ran["data"][:4], strict=True))
    figure, axes = _figure()
    _regions(axes, ran["model"], points, kinds, 2.6)
    return figure


def mnist() -> Figure:
    ran = _loaded("11_mnist")
    model, _ = ran["by_engine"]()
    images, labels = ran["images"][1500:1512], ran["labels"][1500:1512]
    with torch.no_grad():
        read = model.eval()(images).argmax(1)
    colors = [GREEN if right else ORANGE for right in read == labels]
    said = list(zip(map(str, read.tolist()), colors, strict=True))
    return _tiles(list(images[:, 0].numpy()), 4, said)


def word_language_model() -> Figure:
    ran, kept = _loaded("12_word_language_model"), _KeptPlugin()
    ran["main"].__globals__["ConsolePlugin"] = lambda: kept
    ran["by_engine"]()
    with redirect_stdout(StringIO()) as printed:
        ran["by_hand"]()
    by_hand = [float(loss) for loss in re.findall(r"validation loss ([\d.]+)", printed.getvalue())]
    figure, axes = _figure()
    epochs = range(1, len(by_hand) + 1)
    axes.plot(epochs, by_hand, color=GRAY, lw=6, alpha=0.4, label="a loop by hand")
    axes.plot(epochs, kept.metrics["val/nats"], color=BLUE, label="engine")
    axes.set(xlabel="epoch", ylabel="validation loss, nats")
    axes.legend(frameon=False, labelcolor=GRAY)
    return figure


def vae() -> Figure:
    ran = _loaded("13_vae")
    _, _, drawn = ran["by_engine"]()
    return _tiles(list(drawn[-1].detach().reshape(-1, 8, 8)[:12].numpy()), 4)


def timm_like() -> Figure:
    ran, kept = _loaded("14_timm_like"), _KeptPlugin()
    ran["main"].__globals__["ConsolePlugin"] = lambda: kept
    ran["by_engine"]()
    figure, axes = _figure()
    for name, color, label in (
        ("val_live/accuracy", ORANGE, "weights"),
        ("val/accuracy", BLUE, "their average"),
    ):
        shares = kept.metrics[name]
        axes.plot(range(1, len(shares) + 1), shares, "o-", color=color, ms=4, label=label)
    axes.set(xlabel="epoch", ylabel="accuracy")
    axes.legend(frameon=False, labelcolor=GRAY)
    return figure


EXAMPLES: dict[str, Callable[[], Figure]] = {
    "01_minimal": minimal,
    "02_nexus_from_python": nexus_from_python,
    "03_own_loop": own_loop,
    "04_huggingface_model": huggingface_model,
    "05_vision": vision,
    "06_reinforcement": reinforcement,
    "07_classic": classic,
    "08_gan": gan,
    "09_lbfgs": lbfgs,
    "10_sam": sam,
    "11_mnist": mnist,
    "12_word_language_model": word_language_model,
    "13_vae": vae,
    "14_timm_like": timm_like,
}


class _KeptPlugin(Plugin[PluginConfig]):
    """Keeps what each evaluation measured."""

    def __init__(self) -> None:
        super().__init__()
        self.metrics: dict[str, list[float]] = {}

    @hookimpl
    def on_eval(self, engine: Engine, metrics: dict[str, float]) -> None:
        for name, value in metrics.items():
            self.metrics.setdefault(name, []).append(value)


def _loaded(name: str) -> dict[str, Any]:
    """The names of an example that is not run."""
    return runpy.run_path(str(ROOT / f"examples/{name}.py"), run_name="example")


def _ran(name: str, *arguments: str) -> dict[str, Any]:
    """The names of an example that has run."""
    before, sys.argv = sys.argv, [name, *arguments]
    try:
        torch.manual_seed(0)
        return runpy.run_path(str(ROOT / f"examples/{name}.py"), run_name="__main__")
    finally:
        sys.argv = before


def _call_of(function: str, name: str) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """What an example last called a function of its own with, and its names."""
    names, calls = _loaded(name), []
    own = names[function]
    named = names["main"].__globals__
    named[function] = lambda *given: (calls.append(given), own(*given))[1]
    names["main"]()
    return calls[-1], names


def _regions(
    axes: Any, model: Any, points: torch.Tensor, kinds: torch.Tensor, reach: float
) -> None:
    """Where a classifier of two kinds draws the line, and points of both."""
    side = torch.linspace(-reach, reach, 121)
    grid = torch.cartesian_prod(side, side)
    with torch.no_grad():
        share = model(grid).softmax(1)[:, 1].reshape(121, 121).T
    axes.contourf(side, side, share, levels=[0, 0.5, 1], colors=[BLUE, ORANGE], alpha=0.2)
    for kind, color in ((0, BLUE), (1, ORANGE)):
        axes.scatter(*points[kinds == kind].T, s=6, color=color)
    axes.set(xlim=(-reach, reach), ylim=(-reach, reach), aspect="equal")


def _tiles(pictures: list[Any], columns: int, said: Sequence[tuple[str, str]] = ()) -> Figure:
    """Pictures of one size in rows, each with what is said of it, in a color, in its corner."""
    tiles = [np.pad(picture, 1) for picture in pictures[: len(pictures) // columns * columns]]
    lines = [np.hstack(tiles[n : n + columns]) for n in range(0, len(tiles), columns)]
    figure, axes = _figure()
    axes.imshow(np.vstack(lines), cmap="magma")
    height, width = tiles[0].shape
    for place, (text, color) in enumerate(said):
        y, x = divmod(place, columns)
        axes.text(x * width + 0.2, y * height + 1.8, text, color=color, weight="bold", size=11)
    axes.axis("off")
    return figure


# -- drawing


def _figure(width: float = 3.6, height: float = 2.4) -> tuple[Figure, Any]:
    return plt.subplots(figsize=(width, height), layout="constrained")


def _save(figure: Figure, path: Path) -> None:
    figure.savefig(path, transparent=True, metadata={"Date": None})
    plt.close(figure)


def main(names: list[str]) -> None:
    """Make the pictures that are named, or all."""
    mpl.use("agg")
    spines = {f"axes.spines.{side}": False for side in ("top", "right")}
    colors = dict.fromkeys(
        ("axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color"), GRAY
    )
    mpl.rcParams.update(
        {**spines, **colors, "svg.fonttype": "none", "svg.hashsalt": "nexus", "font.size": 9}
    )
    for name in names or ["terminal", "quickstart", *EXAMPLES]:
        print(name, flush=True)
        if name in EXAMPLES:
            before = Path.cwd()
            with TemporaryDirectory() as folder:
                os.chdir(folder)
                _save(EXAMPLES[name](), IMAGES / f"examples/{name}.svg")
                os.chdir(before)
        else:
            {"terminal": terminal, "quickstart": quickstart}[name]()


if __name__ == "__main__":
    main(sys.argv[1:])
