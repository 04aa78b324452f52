"""`nexus-run chat`: a conversation with the model of a run."""

from __future__ import annotations

import sys
from collections.abc import Iterator

import click

from nexus_core.cli.errors import reported
from nexus_plugins.sample.command import options_of_sampling, sampling_of, spoken

__all__ = ["main"]


@click.command(name="chat", context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("source", metavar="RUN[@STEP]")
@click.option("--system", help="System prompt.")
@options_of_sampling(400)
def main(
    source: str,
    system: str | None,
    max_new_tokens: int,
    temperature: float,
    top_k: int | None,
    top_p: float | None,
    seed: int,
    device: str | None,
    trust: bool,
    debug: bool,
) -> None:
    """Talk with the model of a run, through the chat template of its tokenizer.

    Each line is a turn; Ctrl-D ends the conversation. RUN is as in `nexus-run generate`.

    \b
    nexus-run chat runs/sft
    echo "Who are you?" | nexus-run chat runs/sft@best --temperature 0
    """
    with reported(debug):
        from nexus_core.errors import ConfigError
        from nexus_core.paths import expanded
        from nexus_plugins.sample.rebuilt import writer_of

        sampling = sampling_of(temperature, top_k, top_p)
        with writer_of(expanded(source), device=device, trust=trust) as writer:
            encode = getattr(writer.codec, "encode_chat", None)
            if encode is None or not getattr(writer.codec, "has_chat_template", False):
                raise ConfigError(
                    f"the tokenizer of '{source}' has no chat template; use: nexus-run "
                    f"generate {source} --prompt TEXT"
                )
            turns = [{"role": "system", "content": system}] if system else []
            for number, line in enumerate(_lines()):
                turns.append({"role": "user", "content": line})
                answer, _ = spoken(
                    writer, encode(turns), sampling, max_new_tokens, seed + number, echo=True
                )
                click.echo()
                turns.append({"role": "assistant", "content": answer})


def _lines() -> Iterator[str]:
    """The user's lines; empty ones are skipped."""
    is_asked = sys.stdin.isatty()
    while True:
        if is_asked:
            click.echo(click.style("> ", bold=True), nl=False)
        line = sys.stdin.readline()
        if not line:
            return
        if line.strip():
            yield line.rstrip("\n")


if __name__ == "__main__":
    main()
