"""`nexus-run generate`: text from the model of a run."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import click

from nexus_core.cli.errors import reported

if TYPE_CHECKING:
    from nexus_plugins._shared.sampling import Sampling
    from nexus_plugins.sample.rebuilt import Writer

__all__ = ["main", "options_of_sampling", "sampling_of", "spoken"]

Options = Callable[[Callable[..., Any]], Callable[..., Any]]


def options_of_sampling(most: int) -> Options:
    """The sampling options; `most` is the default length."""
    options = [
        click.option("--max-new-tokens", default=most, show_default=True,
                     type=click.IntRange(min=1), help="Maximum tokens to generate."),
        click.option("--temperature", default=0.8, show_default=True, type=click.FloatRange(min=0),
                     help="Sampling temperature; 0: always the most likely token."),
        click.option("--top-k", type=click.IntRange(min=1),
                     help="Sample among this many most likely tokens."),
        click.option("--top-p", type=click.FloatRange(0, 1, min_open=True),
                     help="Sample among the most likely tokens with this total "
                            "probability."),
        click.option("--seed", default=0, show_default=True,
                     type=click.IntRange(0, 2**63 - 1), help="The same seed gives the same text."),
        click.option("--device", metavar="NAME", help="As in a config; default: the run's."),
        click.option("--trust", is_flag=True,
                     help="Load the local code that the run's config names."),
        click.option("--debug", is_flag=True, help="Show the traceback of an error."),
    ]  # fmt: skip

    def add(command: Callable[..., Any]) -> Callable[..., Any]:
        for option in reversed(options):
            command = option(command)
        return command

    return add


def sampling_of(temperature: float, top_k: int | None, top_p: float | None) -> Sampling:
    """The sampling settings from the options."""
    from nexus_plugins._shared.sampling import Sampling

    return Sampling(temperature, top_k, top_p)


@click.command(name="generate", context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("source", metavar="RUN[@STEP]")
@click.option("--prompt", default="", help="Text to continue; '-' reads it from stdin.")
@click.option("--samples", default=1, show_default=True, type=click.IntRange(min=1),
              help="Number of texts, each with the next seed.")  # fmt: skip
@click.option("--json", "as_json", is_flag=True, help="Print the texts as JSON.")
@options_of_sampling(200)
def main(
    source: str,
    prompt: str,
    samples: int,
    as_json: bool,
    max_new_tokens: int,
    temperature: float,
    top_k: int | None,
    top_p: float | None,
    seed: int,
    device: str | None,
    trust: bool,
    debug: bool,
) -> None:
    """Write text with the model of a run.

    RUN is the folder of a run, which means its newest checkpoint; RUN@STEP, RUN@best or the path of
    a checkpoint name another one. Weights that the run evaluates with (an average) are used.

    \b
    nexus-run generate runs/mine --prompt "def main(" --max-new-tokens 300
    nexus-run generate runs/mine@best --samples 3 --temperature 1 --top-p 0.95
    """
    with reported(debug):
        from nexus_core.paths import expanded
        from nexus_plugins.sample.rebuilt import writer_of

        if prompt == "-":
            prompt = _read_input()
        sampling = sampling_of(temperature, top_k, top_p)
        with writer_of(expanded(source), device=device, trust=trust) as writer:
            ids = beginning(writer, prompt)
            texts = []
            for number in range(samples):
                if not as_json:
                    click.echo(_heading(number, samples) + prompt, nl=False)
                began = time.perf_counter()
                text, count = spoken(
                    writer, ids, sampling, max_new_tokens, seed + number, echo=not as_json
                )
                seconds = time.perf_counter() - began
                texts.append({"seed": seed + number, "text": text, "tokens": count,
                              "seconds": round(seconds, 3)})  # fmt: skip
                if not as_json:
                    click.echo()
            if as_json:
                facts = {"checkpoint_step": writer.step, "prompt": prompt, "samples": texts}
                click.echo(json.dumps(facts, indent=2))


def beginning(writer: Writer, prompt: str) -> list[int]:
    """The ids of a prompt; without one, the token between documents."""
    ids = list(writer.codec.encode(prompt)) if prompt else []
    starts = [getattr(writer.codec, name, None) for name in ("bos", "eos")]
    return ids or [next((start for start in starts if start is not None), 0)]


def spoken(
    writer: Writer, ids: Sequence[int], sampling: Sampling, most: int, seed: int, *, echo: bool
) -> tuple[str, int]:
    """Continue some ids, streaming to the terminal; returns the text and the number of tokens."""
    from nexus_plugins._shared.texts import harmless
    from nexus_plugins.sample.writing import pieces, tokens

    count, said = 0, list[str]()

    def counted() -> Any:
        nonlocal count
        stop = getattr(writer.codec, "eos", None)
        for token in tokens(writer.engine, ids, sampling, most, stop, seed):
            count += 1
            yield token

    for piece in pieces(writer.codec.decode, ids, counted()):
        said.append(piece)
        if echo:
            click.echo(harmless(piece), nl=False)
    return "".join(said), count


def _read_input() -> str:
    from nexus_core.errors import ConfigError

    try:
        return sys.stdin.buffer.read().decode()
    except UnicodeDecodeError as error:
        raise ConfigError(f"--prompt -: stdin is not UTF-8 at byte {error.start}") from None


def _heading(number: int, samples: int) -> str:
    if samples == 1:
        return ""
    return (
        click.style(f"{'' if number == 0 else chr(10)}--- {number + 1} of {samples}", dim=True)
        + "\n"
    )


if __name__ == "__main__":
    main()
