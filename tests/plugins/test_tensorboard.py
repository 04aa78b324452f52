"""TensorBoard files, read with TensorBoard's own reader."""

from __future__ import annotations

import io
import re
import warnings
from html import unescape
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
import torch
from click.testing import CliRunner
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.custom_scalar.layout_pb2 import Layout
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData
from tensorboard.summary.writer import event_file_writer
from torch import nn

from nexus_core import ConfigError, Engine
from nexus_core.cli.run import main as nexus_run
from nexus_plugins.tensorboard import TensorboardPlugin

DATA = [torch.ones(2, 2)]


@pytest.fixture(autouse=True)
def files_sort_as_they_were_made(monkeypatch: pytest.MonkeyPatch) -> None:
    """Files of the same second are sorted by number as text: the tenth before the ninth."""
    monkeypatch.setattr(event_file_writer, "_global_uid", event_file_writer.AtomicCounter(1000))


def engine_of(out: Path | None, baseline: str | None = None, **settings: Any) -> Engine:
    torch.manual_seed(0)
    model = nn.Linear(2, 1)
    return Engine(
        model,
        torch.optim.SGD(model.parameters(), lr=0.1),
        loss=lambda m, b: m(b).square().mean(),
        plugins=[TensorboardPlugin(baseline=baseline)],
        out=out,
        log_every=2,
        **settings,
    )


def read(out: Path) -> EventAccumulator:
    return EventAccumulator(str(out / "tensorboard")).Reload()


def steps_of(events: EventAccumulator, tag: str) -> list[int]:
    return [point.step for point in events.Scalars(tag)]


def test_every_metric_is_a_curve(tmp_path: Path) -> None:
    """Fails if TensorBoard does not find a metric under its name, step and value."""
    engine = engine_of(tmp_path)
    result = engine.fit(DATA, until="6 steps", eval_data=DATA, eval_every="3 steps")
    events = read(tmp_path)
    assert set(result.metrics) <= set(events.Tags()["scalars"])
    assert steps_of(events, "train/total_loss") == [2, 4, 6]
    assert steps_of(events, "val/loss") == [3, 6]
    last = events.Scalars("val/loss")[-1].value
    assert last == pytest.approx(result.metrics["val/loss"], rel=1e-6)


def test_steps_done_again_after_a_crash_are_shown_once(tmp_path: Path) -> None:
    """Fails if a resumed run shows overlapping curves."""
    first = engine_of(tmp_path)
    for state in first.steps(DATA, until="12 steps"):
        if state.step == 4:
            snapshot = first.state_dict()
        if state.step == 9:
            break
    second = engine_of(tmp_path)
    second.load_state_dict(snapshot)
    second.fit(DATA, until="12 steps")
    assert steps_of(read(tmp_path), "train/total_loss") == [2, 4, 6, 8, 10, 12]


def test_a_new_run_in_an_old_folder_replaces_the_old_curve(tmp_path: Path) -> None:
    """Fails if the curves of two runs are mixed in one."""
    engine_of(tmp_path).fit(DATA, until="6 steps")
    engine_of(tmp_path).fit(DATA, until="4 steps")
    assert steps_of(read(tmp_path), "train/total_loss") == [2, 4]


def test_the_config_is_there_as_text_and_as_hparams(tmp_path: Path) -> None:
    """Fails if curves cannot be distinguished by settings in TensorBoard."""
    config = {"seed": 0, "out": "x", "plugins": {"optim_adamw": {"lr": 0.25, "groups": []}}}
    engine_of(tmp_path, config=config).fit(DATA, until="2 steps")
    events = read(tmp_path)
    (text,) = events.Tensors("config/text_summary")
    assert "lr: 0.25" in text.tensor_proto.string_val[0].decode()
    hparams = events.summary_metadata["_hparams_/session_start_info"]
    content = HParamsPluginData.FromString(hparams.plugin_data.content)
    assert content.session_start_info.hparams["optim_adamw.lr"].number_value == 0.25
    assert set(content.session_start_info.hparams) == {
        "seed",
        "optim_adamw.lr",
        "optim_adamw.groups",
    }
    assert "_hparams_/experiment" not in events.summary_metadata, "which would hide what differs"


def test_what_a_run_changes_of_its_preset_is_the_first_of_its_hparams(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fails if a run's own settings are hidden among a hundred of its preset, or reading the
    preset unloads the code of the run.
    """
    monkeypatch.chdir(tmp_path)
    Path("small.txt").write_text("a few words\n" * 60)
    changed = "until=1 steps, data_text.train=small.txt, data_text.valid_share=0.0, "
    changed += (
        "data_text.seq_len=32, model_nexus.d_model=16, model_nexus.ngrams=[], clip.max_norm=0.5"
    )
    sets = [word for setting in changed.split(", ") for word in ("--set", setting)]
    Path("own.py").write_text(
        "import sys\nfrom nexus_core import Plugin, PluginConfig, hookimpl\n"
        "class OwnPlugin(Plugin[PluginConfig]):\n    @hookimpl\n    def summarize(self):\n"
        "        return {'loaded': str('own' in sys.modules)}\n"
    )
    same = ["--set", "clip.eps=0.001", "--plugins", "ema,no:checkpoint,no:guard,./own.py"]
    ran = CliRunner().invoke(nexus_run, ["quickstart", *sets, *same, "--out", "."])
    assert ran.exit_code == 0, ran.output
    assert re.search(r"loaded +True\n", ran.output)
    content = read(tmp_path).summary_metadata["_hparams_/session_start_info"].plugin_data.content
    hparams = HParamsPluginData.FromString(content).session_start_info.hparams
    first = hparams[min(hparams)].string_value  # TensorBoard sorts them by name
    said = (
        changed.replace("clip", "no:guard, clip")
        + ", no:checkpoint, +ema, +./plugins/own.py:OwnPlugin"
    )
    assert (min(hparams), first) == ("(changed)", said)


def test_a_baseline_that_is_no_preset_is_refused(tmp_path: Path) -> None:
    """Fails if the requested comparison is silently missing."""
    with pytest.raises(ConfigError, match=r"no preset or config file named 'quick'.*quickstart"):
        engine_of(tmp_path, "quick", config={"seed": 0}).fit(DATA, until="1 step")


def test_the_custom_scalars_begin_with_the_loss_and_show_no_empty_chart(tmp_path: Path) -> None:
    """Fails if the loss is not the first chart, as parsed by TensorBoard."""
    result = engine_of(tmp_path).fit(DATA, until="4 steps", eval_data={"val": DATA, "test": DATA})
    last = read(tmp_path).Tensors("custom_scalars__config__")[-1]
    (category,) = Layout.FromString(last.tensor_proto.string_val[0]).category
    shown = {
        chart.title: [
            name for name in result.metrics for tag in chart.multiline.tag if re.match(tag, name)
        ]
        for chart in category.chart
    }
    assert list(shown.items()) == [
        ("training loss", ["train/total_loss"]),
        ("evaluation loss", ["val/loss", "test/loss"]),
        ("learning rate", ["train/learning_rate"]),
    ]


def test_without_a_folder_the_run_does_not_start() -> None:
    """Fails if metrics are silently lost because `out` is missing."""
    with pytest.raises(ConfigError, match=r"tensorboard writes to the output folder.*out="):
        engine_of(None).fit(DATA, until="1 step")


WORDS = (
    "a_b and __init__: 3 * 4 < 5 * 6, see [docs](x) `code`\n# 2 of 2 (num_workers) \\ 1e-07 & so"
)


def test_a_note_is_shown_as_it_was_said(tmp_path: Path) -> None:
    """Fails if the Text tab drops or reformats text; the oracle is TensorBoard's own rendering."""
    engine = engine_of(tmp_path)
    for state in engine.steps(DATA, until="3 steps"):
        if state.step == 2:
            engine.hook.on_note(engine=engine, title="talk/words", text=WORDS)
    events = read(tmp_path)
    assert "talk/words/text_summary" in events.PluginTagToContent("text")
    (note,) = events.Tensors("talk/words/text_summary")
    assert note.step == 2
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of its dependencies
        from tensorboard.plugin_util import markdown_to_safe_html

        shown = markdown_to_safe_html(note.tensor_proto.string_val[0])
    assert unescape(re.sub(r"<br ?/?>|</?p>", "", shown)) == WORDS


def test_an_image_is_stored_with_its_step_and_its_caption(tmp_path: Path) -> None:
    """Fails if the Images tab shows other pixels, or uses a metric's name."""
    engine = engine_of(tmp_path)
    given = torch.arange(24, dtype=torch.uint8).reshape(2, 4, 3)
    for state in engine.steps(DATA, until="3 steps"):
        if state.step > 1:
            engine.note("val/loss", "from below", image=given.numpy() * state.step)
    events = read(tmp_path)
    assert [image.step for image in events.Images("val/loss/image")] == [2, 3]
    last = events.Images("val/loss/image")[-1]
    assert (last.width, last.height) == (4, 2)
    shown = np.asarray(PIL.Image.open(io.BytesIO(last.encoded_image_string)))
    assert (shown == given.numpy() * 3).all()
    said = events.Tensors("val/loss/text_summary")[-1]
    assert said.tensor_proto.string_val == [b"from below"]
