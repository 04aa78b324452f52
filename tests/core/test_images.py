"""Notes and images: valid inputs, their conversion, and no effect on training."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
import torch
from matplotlib.figure import Figure

from nexus_core import ConfigError, Engine, Logger, LoggerConfig
from nexus_core.device import random_state
from nexus_core.images import Image
from nexus_core.processes import Ranks
from tiny import Regression, tiny_engine, weights

GRAY = torch.arange(12, dtype=torch.uint8).reshape(3, 4) * 20
COLOUR = torch.arange(60, dtype=torch.uint8).reshape(3, 5, 4) * 4  # channels first


class KeptPlugin(Logger[LoggerConfig]):
    """Keeps every note."""

    name = "kept"

    def __init__(self) -> None:
        super().__init__()
        self.texts: list[tuple[int, str, str]] = []
        self.images: list[tuple[int, str, Image]] = []

    def write(self, engine: Engine, metrics: Any) -> None:
        pass

    def write_note(self, engine: Engine, title: str, text: str) -> None:
        self.texts.append((engine.state.step, title, text))

    def write_image(self, engine: Engine, title: str, image: Image) -> None:
        self.images.append((engine.state.step, title, image))


def pixels(image: Image) -> np.ndarray[Any, Any]:
    """The pixels, decoded by an independent reader, and checked with the image's metadata."""
    opened = PIL.Image.open(io.BytesIO(image.png))
    assert (opened.format, opened.size) == ("PNG", (image.width, image.height))
    return np.asarray(opened)


def figure() -> Figure:
    drawn = Figure(figsize=(2, 1), dpi=50)
    drawn.subplots().plot([1, 2])
    return drawn


@pytest.mark.parametrize(
    ("given", "shape"),
    [
        (GRAY, (3, 4)),
        (GRAY[None], (3, 4)),
        (GRAY.float() / 255, (3, 4)),
        ((GRAY / 255).bfloat16().requires_grad_(), (3, 4)),
        (GRAY.numpy()[..., None].astype(np.float64) / 255, (3, 4)),
        (COLOUR, (5, 4, 3)),
        (COLOUR.permute(1, 2, 0), (5, 4, 3)),
        (COLOUR.permute(1, 2, 0).numpy(), (5, 4, 3)),
        (COLOUR.double() / 255, (5, 4, 3)),
        (PIL.Image.fromarray(COLOUR.permute(1, 2, 0).numpy()), (5, 4, 3)),
        (torch.ones(4, 2, 2, dtype=torch.uint8), (2, 2, 4)),
    ],
)
def test_an_image_has_the_pixels_that_were_given(given: Any, shape: tuple[int, ...]) -> None:
    """Fails if rows, columns, colours or brightness are mixed up."""
    found = pixels(Image.of(given, "what"))
    assert found.shape == shape
    source = {(3, 4): GRAY, (5, 4, 3): COLOUR.permute(1, 2, 0)}.get(shape, torch.ones(shape))
    assert np.abs(found.astype(int) - source.numpy().astype(int)).max() <= (
        given.dtype == torch.bfloat16 if isinstance(given, torch.Tensor) else 0
    )


def test_a_tensor_has_its_colours_first_and_an_array_last_where_both_could_be() -> None:
    both = torch.arange(27, dtype=torch.uint8).reshape(3, 3, 3)
    assert (pixels(Image.of(both)) == both.permute(1, 2, 0).numpy()).all()
    assert (pixels(Image.of(both.numpy())) == both.numpy()).all()
    assert pixels(Image.of(np.eye(2, dtype=bool))).tolist() == [[255, 0], [0, 255]]


def test_a_file_and_a_figure_are_images_too(tmp_path: Path) -> None:
    PIL.Image.fromarray(GRAY.numpy()).save(tmp_path / "a.png")
    for path in (tmp_path / "a.png", str(tmp_path / "a.png")):
        assert (pixels(Image.of(path)) == GRAY.numpy()).all()
    assert pixels(Image.of(figure())).shape == (50, 100, 4)
    palette = PIL.Image.fromarray(GRAY.numpy()).convert("P")
    assert (pixels(Image.of(palette))[..., 0] == GRAY.numpy()).all()


def test_floats_beyond_the_range_are_clipped_and_said() -> None:
    """Fails if a value above one ends the run, or is clipped without a warning."""
    given = torch.tensor([[-1.0, 0.0], [2.0, torch.nan]])
    with pytest.warns(RuntimeWarning, match="from nan to nan: they are clipped"):
        assert pixels(Image.of(given)).tolist() == [[0, 0], [255, 0]]
    assert pixels(Image.of(torch.tensor([[1.002, -0.004]]))).tolist() == [[255, 0]]


def other_file(tmp_path: Path) -> Path:
    (tmp_path / "a.txt").write_text("no image")
    return tmp_path / "a.txt"


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (lambda path: {"text": ""}, "note 'it' is empty; give it a text, image=... or figure="),
        (
            lambda path: {"text": GRAY},
            "text of the note 'it' is a Tensor; expected a string, or image=",
        ),
        (lambda path: {"image": GRAY, "figure": figure()}, "an image and a figure; make two"),
        (lambda path: {"image": [[1, 2]]}, r"no image: \[\[1, 2\]\]; expected a tensor or array"),
        (lambda path: {"image": torch.ones(2, 3, 4, 4)}, "2x3x4x4 numbers of torch.float32; exp"),
        (lambda path: {"image": torch.ones(2, 4, 5)}, "2x4x5 numbers of torch.float32; expected"),
        (lambda path: {"image": torch.ones(0, 3)}, "no image: 0x3 numbers"),
        (lambda path: {"image": torch.ones(2, 2).long()}, r"2x2 numbers of torch.int64; .*uint8"),
        (lambda path: {"image": "gone.png"}, "there is no file 'gone.png'"),
        (lambda path: {"image": other_file(path)}, "a.txt' is not a readable PNG file"),
        (lambda path: {"title": "", "text": "so"}, "the title of a note is ''; expected a name"),
    ],
)
def test_what_is_no_note_is_refused(
    given: Callable[[Path], dict[str, Any]], said: str, tmp_path: Path
) -> None:
    """Fails if an invalid note is ignored, or fails with another package's error."""
    engine = tiny_engine(KeptPlugin())
    with pytest.raises(ConfigError, match=said):
        engine.note(**{"title": "it", **given(tmp_path)})


def test_notes_reach_every_logger_and_leave_no_trace_in_the_run() -> None:
    """Fails if a note changes weights or generators, or comes with a wrong step or caption."""
    ends = []
    for speaks in (False, True):
        kept = KeptPlugin()
        engine = tiny_engine(kept, dropout=0.2)
        rows = Regression()
        for state in engine.steps([{"x": rows.x[:4], "y": rows.y[:4]}], until="3 steps"):
            if speaks:
                engine.note("words", f"after {state.step}")
                engine.note("head/weights", "of the head", image=engine.model.head.weight > 0)
                engine.note("curve", figure=figure())
        ends.append((weights(engine), repr(random_state())))
    assert all(map(torch.equal, ends[0][0], ends[1][0]))
    assert ends[0][1] == ends[1][1]
    assert kept.texts == [(step, "words", f"after {step}") for step in (1, 2, 3)]
    assert [(step, title, image.caption) for step, title, image in kept.images] == [
        (step, *said)
        for step in (1, 2, 3)
        for said in (("head/weights", "of the head"), ("curve", ""))
    ]


def test_of_several_processes_the_first_alone_writes() -> None:
    kept = KeptPlugin()
    engine = tiny_engine(kept)
    engine.ranks = Ranks(rank=1, size=2)
    lost = "the note '.*' is in no log.*inside a loop over"  # outside a run there is a warning
    with pytest.warns(RuntimeWarning, match=lost):
        engine.note("words", "so")
    with pytest.warns(RuntimeWarning, match=lost):
        engine.note("image", image=GRAY)
    assert (kept.texts, kept.images) == ([], [])


@pytest.mark.parametrize("mode", ["I;16", "I", "F"])
def test_images_of_more_than_bytes_are_refused(mode: str) -> None:
    """Fails if a 16-bit image becomes black and white."""
    image = PIL.Image.fromarray(np.array([[0, 30_000]], dtype=np.uint16)).convert(mode)
    with pytest.raises(ConfigError, match=f"numbers of the mode {mode}; expected bytes"):
        Image.of(image)
