"""`nexus-data`: prepare text, train a tokenizer, inspect data, trace a step's documents."""

from __future__ import annotations

import json
import os
import sys
import traceback
import warnings
from collections.abc import Callable
from importlib.metadata import entry_points
from io import TextIOWrapper
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

import click

from nexus_core.cli.errors import Group
from nexus_core.errors import ConfigError, NexusError
from nexus_plugins._shared.paths import expanded, printable

if TYPE_CHECKING:
    from nexus_plugins.data_text.folders import Found
    from nexus_plugins.data_text.inspection import Report
    from nexus_plugins.data_text.prepare import Summary
    from nexus_plugins.data_text.trace import Row

__all__ = ["main"]

_INPUT = click.argument("inputs", nargs=-1, required=True, metavar="INPUT...")
_TEXT_KEY = click.option(
    "--text-key", default="text", show_default=True, help="Key of the text in .jsonl and .parquet."
)
_WHOLE = click.option(
    "--one-file-one-document", is_flag=True, help="A text file is one document, not one per line."
)
_AS_TEXT = click.option(
    "--as-text", is_flag=True, help="Read every file as text, whatever its suffix."
)
_UTF8 = click.option(
    "--invalid-utf8",
    type=click.Choice(["error", "replace", "skip"]),
    default="error",
    show_default=True,
    help="What to do with bytes that are not UTF-8.",
)


def main() -> None:
    """Run the command; errors are one line with exit code 2, plus the traceback with --debug."""
    warnings.showwarning = lambda message, *_, **__: _note(str(message))
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    try:
        _group()
    except NexusError as error:
        _end(error.on_command_line(), error)
    except BrokenPipeError:  # the reader has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except OSError as error:
        place = f" '{error.filename}'" if error.filename else ""
        _end(f"system error{place}: {error.strerror or error}", error)
    except Exception as error:
        hint = "run `nexus-data --debug ...` to see the traceback"
        _end(f"{type(error).__name__}: {error} ({hint})", error)


def _end(message: str, error: BaseException) -> NoReturn:
    if "--debug" in sys.argv[1:2]:
        traceback.print_exception(error)
    click.echo(f"error: {printable(' '.join(message.split()))}", err=True)
    sys.exit(2)


@click.group(cls=Group, name="nexus-data", context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--debug", is_flag=True, help="Show the traceback of an error.")
def _group(debug: bool) -> None:
    """Prepare, inspect and trace training text."""


def _found(inputs: tuple[str, ...], as_text: bool) -> list[Path]:
    """The files of all inputs; what is left out is reported."""
    from nexus_plugins.data_text.apart import in_words, split_by_name
    from nexus_plugins.data_text.folders import find, root_of

    paths: list[Path] = []
    for one in inputs:
        found: Found = find(one, as_text)
        files = list(found.files)
        for note in found.left_out:
            _note(f"{one}: {note}")
        if not found.named:
            split = split_by_name(files, root_of(expanded(one)))
            files = files if as_text else list(split.train)
            if as_text and split.valid:
                _note(f"{in_words(split.valid)} named as held-out text, but used (--as-text)")
            elif not as_text and (split.valid or split.test):
                _note(
                    f"{in_words([*split.valid, *split.test])} named as held-out text, so "
                    "skipped; name a file explicitly to use it"
                )
        paths += files
    twice = [path for path in dict.fromkeys(paths) if paths.count(path) > 1]
    if twice:
        _note(f"{in_words(twice)} named twice, so read twice")
    return paths


def _note(text: str) -> None:
    click.echo(f"note: {printable(text)}", err=True)


@_group.command("prepare")
@_INPUT
@click.option("--out", required=True, type=click.Path(path_type=Path), help="Output folder.")
@click.option(
    "--tokenizer",
    default="bytes",
    show_default=True,
    help='"bytes", "bytes256", or a tokenizer.json.',
)
@click.option("--eos-token", help="End-of-document token, if it has no usual name.")
@click.option("--pad-token", help="Padding token, if it has no usual name.")
@click.option("--workers", type=click.IntRange(1), help="Worker processes; default: one per core.")
@click.option(
    "--val",
    type=click.FloatRange(0, 1, max_open=True),
    default=0.0,
    show_default=True,
    help="Share of the documents to hold out for evaluation.",
)
@click.option("--deduplicate", is_flag=True, help="Keep one copy of identical documents.")
@_TEXT_KEY
@_WHOLE
@_AS_TEXT
@_UTF8
def _prepare(
    inputs: tuple[str, ...],
    out: Path,
    tokenizer: str,
    eos_token: str | None,
    pad_token: str | None,
    workers: int | None,
    val: float,
    deduplicate: bool,
    text_key: str,
    one_file_one_document: bool,
    as_text: bool,
    invalid_utf8: str,
) -> None:
    """Tokenize text once: writes train.bin and val.bin with their indexes, and the tokenizer.

    If interrupted, the same command continues where it stopped.
    """
    from tqdm import tqdm

    from nexus_plugins.data_text.prepare import Job, prepare

    out = expanded(out)
    paths = _found(inputs, as_text)
    job = Job(
        tokenizer,
        eos_token,
        pad_token,
        text_key,
        one_file_one_document,
        invalid_utf8,
        as_text,
        val,
        deduplicate,
    )
    size = sum(path.stat().st_size for path in paths)
    with tqdm(total=size, unit="B", unit_scale=True, desc="preparing", disable=None) as bar:
        summary = prepare(paths, out, job, workers or os.cpu_count() or 1, bar.update)
    _show_summary(summary, out)


def _show_summary(summary: Summary, out: Path) -> None:
    from nexus_plugins.data_text.dataset import loss_in_words

    for name, documents, tokens in (
        ("train", summary.train_documents, summary.train_tokens),
        ("val", summary.valid_documents, summary.valid_tokens),
    ):
        if documents:
            click.echo(f"{name:<6}{documents:>14,} documents {tokens:>16,} tokens")
    tokens = summary.train_tokens + summary.valid_tokens
    share = summary.text_bytes / max(1, tokens)
    click.echo(f"text  {summary.text_bytes:>14,} bytes, {share:.2f} per token")
    for what, count in (
        ("duplicates skipped", summary.duplicates),
        ("documents skipped, not UTF-8", summary.skipped),
        ("documents with bytes replaced", summary.replaced),
        ("empty documents skipped", summary.empty),
        ("files without a document", len(summary.barren)),
    ):
        if count:
            click.echo(f"{count:,} {what}")
    loss = loss_in_words(summary.compared, summary.altered, summary.lost_bytes)
    if loss:
        click.echo(loss)
    click.echo(f"train on it: nexus-run --set data_text.train={out}")


@_group.command("train-tokenizer")
@_INPUT
@click.option("--out", required=True, type=click.Path(path_type=Path), help="tokenizer.json.")
@click.option("--vocab-size", type=click.IntRange(258), default=32000, show_default=True)
@_TEXT_KEY
@_WHOLE
@_AS_TEXT
@_UTF8
def _train_tokenizer(
    inputs: tuple[str, ...],
    out: Path,
    vocab_size: int,
    text_key: str,
    one_file_one_document: bool,
    as_text: bool,
    invalid_utf8: str,
) -> None:
    """Train a byte-level BPE vocabulary on text; it can encode any text."""
    from nexus_plugins.data_text.formats import Reading
    from nexus_plugins.data_text.training import train_tokenizer

    out = expanded(out)
    paths = _found(inputs, as_text)
    reading = Reading(text_key, one_file_one_document, invalid_utf8, as_text)
    tokenizer = train_tokenizer(paths, out, vocab_size, reading)
    click.echo(f"{out}: {tokenizer}")


@_group.command("inspect")
@click.argument("path")
@click.option("--tokenizer", default="auto", help="Tokenizer; default: the one next to the ids.")
@click.option("--samples", type=click.IntRange(0), default=3, show_default=True)
@click.option("--ids-dtype", help="dtype of bare ids, such as uint32; default: uint16.")
@_TEXT_KEY
@_WHOLE
@_AS_TEXT
@_UTF8
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@click.option("--as", "kind", help='Type of data, if not text: "chat" shows conversations.')
@click.option(
    "--set", "sets", multiple=True, metavar="KEY=VALUE", help="With --as: a data setting."
)
def _inspect(
    path: str,
    tokenizer: str,
    samples: int,
    ids_dtype: str | None,
    text_key: str,
    one_file_one_document: bool,
    as_text: bool,
    invalid_utf8: str,
    as_json: bool,
    kind: str | None,
    sets: tuple[str, ...],
) -> None:
    """Count and check all documents of a file or folder; exits with 1 if something is wrong."""
    if kind is not None:
        pairs = dict(one.partition("=")[::2] for one in sets)
        sys.exit(0 if _inspector(kind)(path, tokenizer, samples, pairs) else 1)
    from nexus_plugins.data_text.inspection import inspect
    from nexus_plugins.data_text.plugin import DataTextPlugin

    plugin = DataTextPlugin(
        train=[{"path": path, "as": "text"}] if as_text else path,
        valid_share=0.0,
        tokenizer=tokenizer,
        ids_dtype=ids_dtype,
        text_key=text_key,
        one_file_one_document=one_file_one_document,
        invalid_utf8=invalid_utf8,
    )
    found, reports = inspect(plugin.config, samples)
    if as_json:
        click.echo(json.dumps([_as_json(report) for report in reports], indent=1))
    else:
        click.echo(str(found.tokenizer))
        for reading in found.readings:
            click.echo(f"read as: {printable(reading)}")
        for remark in found.remarks:
            click.echo(f"note: {printable(remark)}")
        for report in reports:
            _show_report(report)
    if any(report.faults for report in reports):
        sys.exit(1)


def _inspector(kind: str) -> Callable[[str, str, int, dict[str, str]], bool]:
    """What prints data of a kind, of an installed plugin; it answers whether all is well."""
    found = {entry.name: entry for entry in entry_points(group="nexus.inspectors")}
    if kind not in found:
        raise ConfigError(f"--as {kind}: expected one of {', '.join(sorted(found)) or 'none'}")
    inspect: Callable[[str, str, int, dict[str, str]], bool] = found[kind].load()
    return inspect


def _as_json(report: Report) -> dict[str, object]:
    from dataclasses import asdict

    return asdict(report)


def _show_report(report: Report) -> None:
    click.echo(f"\n{report.name}: {report.documents:,} documents, {report.tokens:,} tokens")
    most = max((count for _, _, count in report.histogram), default=1)
    for shortest, longest, count in report.histogram:
        bar = "#" * -(-40 * count // most)
        click.echo(f"  {shortest:>11,} to {longest:>11,} tokens {count:>12,} {bar}")
    for place, text in report.samples:
        file = printable(place.file)
        click.echo(f"  {file}, document {place.document}: {_one_line(text)}")
    for fault in report.faults:
        click.echo(f"  WRONG: {printable(fault)}")
    if not report.faults:
        click.echo("  checks passed: all ids are in the vocabulary, all documents end with eos")


@_group.command("at")
@click.argument("run", type=click.Path(path_type=Path))
@click.option("--step", type=click.IntRange(1), required=True, help="Counted from 1.")
@click.option("--text", is_flag=True, help="Also print the text.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON, with the text.")
def _at(run: Path, step: int, text: bool, as_json: bool) -> None:
    """Show which documents and offsets a step of a run trained on."""
    from dataclasses import asdict

    from nexus_plugins.data_text.trace import trained_on

    rows = trained_on(expanded(run), step)
    if as_json:
        click.echo(json.dumps([asdict(row) for row in rows], indent=1))
        return
    for row in rows:
        _show_row(row, text)


def _show_row(row: Row, text: bool) -> None:
    click.echo(f"epoch {row.epoch}, batch {row.batch}, sample {row.sample}")
    for excerpt in row.excerpts:
        place = excerpt.place
        span = f"tokens {place.offset:,} to {place.offset + excerpt.tokens - 1:,}"
        click.echo(f"  {printable(place.file)}, document {place.document}, {span}")
        if text:
            click.echo(f"    {_one_line(excerpt.text)}")


def _one_line(text: str) -> str:
    return printable(json.dumps(text, ensure_ascii=False))


if __name__ == "__main__":
    main()
