"""`nexus-run`: train a model from a config or preset."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from functools import partial
from importlib.metadata import entry_points
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import click

from nexus_core.cli.errors import reported, run_command
from nexus_core.cli.options import PATH

if TYPE_CHECKING:
    from nexus_core.cli.build import Build

__all__ = ["main", "resume"]


class _WithCommands(click.Command):
    """Dispatches to a command of the entry-point group `nexus.commands` named by the first word."""

    def main(self, args: Sequence[str] | None = None, *rest: Any, **options: Any) -> Any:
        words = list(sys.argv[1:] if args is None else args)
        found = [c for c in entry_points(group="nexus.commands") if c.name in words[:1]]
        if not found:
            run_command(partial(super().main, words, *rest, **options))
        options["prog_name"] = f"nexus-run {words[0]}"
        with reported("--debug" in words):
            command = found[0].load()
        run_command(partial(command.main, words[1:], *rest, **options))

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        names = ", ".join(sorted(c.name for c in entry_points(group="nexus.commands")))
        with formatter.section("Commands"):
            formatter.write_text(f"{names}: see nexus-run COMMAND --help")


@click.command(cls=_WithCommands, context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("words", nargs=-1, metavar="[CONFIG|PRESET]")
@click.option("-p", "--plugins", default="",
              help="Add plugins by name or file, or remove some: a,./my.py,no:c.")  # fmt: skip
@click.option("-s", "--set", "sets", multiple=True, metavar="KEY=VALUE",
              help='Override a setting: until="2 epochs", PLUGIN.KEY=0.5.')  # fmt: skip
@click.option("--out", type=PATH, help="Run folder.")
@click.option("--resume", metavar="auto|PATH",
              help="Resume from the newest good checkpoint, or from PATH: a run or a "
              "checkpoint, whose config is used if none is given.")  # fmt: skip
@click.option("--resume-policy", type=click.Choice(["exact", "compatible", "force"]),
              help="What may differ from the run that saved the checkpoint.")  # fmt: skip
@click.option("--trust", is_flag=True,
              help="With --resume RUN: load the local code that its config names.")  # fmt: skip
@click.option("--explain", is_flag=True, help="Show when each plugin is called, and why.")
@click.option("--json", "as_json", is_flag=True, help="With --explain: print JSON.")
@click.option("--schema", is_flag=True, help="Print the JSON schema of config files.")
@click.option("--dry-run", is_flag=True, help="Build everything, try one batch, write nothing.")
@click.option("--plot-lr", is_flag=True, help="Plot the learning rate over the run, and exit.")
@click.option("--profile", is_flag=True,
              help="At the end, show where time and tensor memory went.")  # fmt: skip
@click.option("--profile-trace", type=PATH, metavar="FILE.json",
              help="With --profile: write a Chrome trace of the first steps.")  # fmt: skip
@click.option("--quiet", is_flag=True, help="Print only errors and the final line.")
@click.option("--debug", is_flag=True, help="Show the traceback of an error.")
@click.version_option(package_name="nexus-trainer", prog_name="nexus-run")
def main(
    words: tuple[str, ...],
    plugins: str,
    sets: tuple[str, ...],
    out: Path | None,
    resume: str | None,
    resume_policy: str | None,
    trust: bool,
    explain: bool,
    as_json: bool,
    schema: bool,
    dry_run: bool,
    plot_lr: bool,
    profile: bool,
    profile_trace: Path | None,
    quiet: bool,
    debug: bool,
) -> None:
    """Train a model from a config file or preset (default: the preset quickstart).

    \b
    nexus-run                                    the quickstart, about two minutes
    nexus-run my.yaml --plugins one,no:other     a config file, plugins added and removed
    nexus-run my.yaml --set until="2 epochs"     change a setting
    nexus-run resume runs/mine                   resume a run that was stopped or killed
    """
    with reported(debug), ExitStack() as stack:
        from nexus_core.cli import build, distributed
        from nexus_core.cli.hints import only_config
        from nexus_core.cli.resumed import only_code_of_the_command, resumed_config
        from nexus_core.cli.settings import read_settings
        from nexus_core.errors import ConfigError
        from nexus_core.paths import expanded

        if profile or profile_trace is not None:
            others = {"--schema": schema, "--explain": explain, "--json": as_json,
                      "--dry-run": dry_run, "--plot-lr": plot_lr}  # fmt: skip
            _check_profile(profile, [name for name, given in others.items() if given])
        if schema:
            from nexus_core.cli.editors import json_schema

            click.echo(json.dumps(json_schema(), indent=2))
            return
        values: dict[str, object] = {"out": out}
        if resume_policy is not None:
            from nexus_core.plan import answering

            values[f"{answering('load_snapshot').name}.resume_policy"] = resume_policy
        values = {key: value for key, value in values.items() if value is not None}
        resume = None if resume is None else expanded(resume)
        named = only_config(words, sets)
        config, replaced = resumed_config(resume) if named is None else (named, {})
        trusted = trust or not replaced
        if trust and not replaced:
            raise ConfigError("--trust is for the config found by --resume RUN; drop it")
        if resume is not None and not trusted:
            stack.enter_context(only_code_of_the_command(resume, plugins, sets, os.environ))
        settings = read_settings(
            config, plugins, sets, os.environ, values, replaced, trusted=trusted
        )
        made = build.build_plugins(settings)
        if quiet:
            made.quiet()
        if explain or as_json:
            from nexus_core.cli.explain import explain as table
            from nexus_core.cli.explain import explain_json

            show = explain_json if as_json else table
            click.echo(show(made.plan, settings.defaults, settings.places))
            return
        if plot_lr:
            from nexus_core.cli.plot_lr import plot_lr as drawn

            click.echo(drawn(made))
            return
        if profile:
            code = _run_profiled(made, resume, profile_trace, quiet=quiet)
        else:
            code = _run(made, resume, dry=dry_run, quiet=quiet)
        del made  # releases what plugins hold of the process group
        distributed.leave()
        sys.exit(code)


@click.command(
    name="resume",
    context_settings={
        "help_option_names": ["-h", "--help"],
        "ignore_unknown_options": True,
        "allow_interspersed_args": False,
    },
)
@click.argument("run", required=False)
@click.argument("options", nargs=-1, type=click.UNPROCESSED)
def resume(run: str | None, options: tuple[str, ...]) -> None:
    """Resume a run where it stopped; short for nexus-run --resume RUN.

    RUN is a run folder or a checkpoint; without it, the run below runs/ that saved a checkpoint
    last. All options of nexus-run work.

    \b
    nexus-run resume runs/mine
    nexus-run resume runs/mine --set until="2 epochs"
    nexus-run resume runs/mine --trust           with your own code, which its config names
    """
    words = options if run is None else (run, *options)
    if run is None or run.startswith("-"):  # an option, not a run
        with reported(debug=False):
            from nexus_core.cli.resumed import newest_run
            from nexus_core.errors import ConfigError

            if any(word.startswith("--out") for word in words):
                raise ConfigError("--out without a run; name the one: nexus-run resume RUN")
            if any(word.endswith((".yaml", ".yml")) or Path(word).is_dir() for word in words):
                raise ConfigError("an option before the run; write: nexus-run resume RUN OPTIONS")
            words = (newest_run(), *words)
    main.main(["--resume", *words], prog_name="nexus-run resume")


def _check_profile(profile: bool, others: Sequence[str]) -> None:
    from nexus_core.errors import ConfigError

    if not profile:
        raise ConfigError("--profile-trace requires --profile; add it")
    if others:
        raise ConfigError(
            f"--profile needs a run, and {others[0]} does not train; drop one of them"
        )


def _run(made: Build, resume: str | None, *, dry: bool, quiet: bool) -> int:
    from nexus_core.cli import build, session
    from nexus_core.cli.dry_run import dry_run
    from nexus_core.cli.folder import run_folder

    with run_folder(made, resume, make=not dry) as folder:
        if dry:
            with TemporaryDirectory() as aside:
                engine = build.make_engine(made, Path(aside) / "run")
                if resume is not None:
                    session.try_resume(engine, resume, folder.path)
                report = dry_run(engine, made.run.until)
            if engine.ranks.is_main:
                click.echo(report)
            return 0
        engine = build.make_engine(made, folder.path)
        return session.train(engine, made.run, resume, folder, quiet=quiet)


def _run_profiled(made: Build, resume: str | None, trace: Path | None, *, quiet: bool) -> int:
    from nexus_core.cli import build, session
    from nexus_core.cli.folder import run_folder
    from nexus_core.cli.profile import Profiler, check_trace

    if trace is not None:
        check_trace(trace)
    profiler = Profiler(trace)
    try:
        with run_folder(made, resume) as folder:
            profiler.watch(made.plan)
            engine = build.make_engine(made, folder.path)
            profiler.attach(engine)
            return session.train(engine, made.run, resume, folder, quiet=quiet)
    finally:
        profiler.stop()
        if profiler.has_news:
            click.echo("\n" + profiler.report())


if __name__ == "__main__":
    main()
