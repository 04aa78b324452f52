"""Check that any config gives either a plan or one clear error.

    python -m benchmarks.fuzz_config                    10,000 configs, about ten minutes
    python -m benchmarks.fuzz_config --examples 500

Hypothesis generates files (YAML, TOML, JSON, and bytes that are none of these), plugin names,
`--set` options and environment variables, with valid and unknown keys. Each must give a plan whose
config, written and read again, is the same, or a `NexusError`; and none may take more memory than
twice its bytes plus 64 MiB. Prints the outcomes, and exits with 1 if there was any other.
"""

from __future__ import annotations

import argparse
import functools
import json
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any
from unittest.mock import patch

import yaml
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from benchmarks.fuzz import Outcome, above_limit, reset_peak
from nexus_core import NexusError, plan
from nexus_core.cli import settings as asked
from nexus_core.cli import yaml12
from nexus_core.cli.build import build_plugins
from nexus_core.cli.config import RunConfig
from nexus_core.cli.settings import read_settings
from nexus_core.plan import load

__all__ = ["Case", "cases", "try_case"]

PLUGINS = (
    "data_text", "model_nexus", "loss_lm", "optim_adamw", "lr_cosine", "lr_wsd", "clip", "guard",
    "checkpoint", "console", "jsonl", "tensorboard", "schedule", "curriculum", "ema", "amp", "ddp",
    "early_stop", "optim_muon", "lr_torch", "auto_accumulate",
)  # fmt: skip


@dataclass(frozen=True)
class Case:
    """A user's input.

    Args:
        suffix: suffix of the file name, which determines the format.
        content: content of the file.
        plugins: value of `--plugins`.
        sets: values of `--set`.
        environment: environment variables.
    """

    suffix: str
    content: bytes
    plugins: str = ""
    sets: tuple[str, ...] = ()
    environment: dict[str, str] = field(default_factory=dict)


def try_case(case: Case, folder: Path) -> str:
    """Read a config and, if it is valid, the config that it resolves to.

    Returns:
        "plan", or the kind of error.

    Raises:
        AssertionError: it resolves differently the second time.
        Exception: any other error, which no user should see.
    """
    path = folder / f"case{case.suffix}"
    path.write_bytes(case.content)
    again = folder / "config.yaml"
    try:
        read = read_settings(str(path), case.plugins, case.sets, case.environment)
        build = build_plugins(read)
        resolved = build.resolved(Path("out"))
        again.write_text(yaml12.dump(resolved), encoding="utf-8")
        json.dumps(resolved, allow_nan=False)
    except NexusError as error:
        return type(error).__name__ if str(error).strip() else "an error without a message"
    repeated = build_plugins(read_settings(str(again)))
    assert repeated.resolved(Path("out")) == resolved
    assert [p.name for p in repeated.plan.plugins] == [p.name for p in build.plan.plugins]
    return "plan"


def _defaults(plugin: str) -> dict[str, Any]:
    """A valid value for each key of a plugin; null if there is no default."""
    fields = load(plugin).config_class.model_fields
    found = {key: None if f.is_required() else f.get_default() for key, f in fields.items()}
    return {key: json.loads(json.dumps(value, default=str)) for key, value in found.items()}


GOOD = {name: _defaults(name) for name in PLUGINS}
ENGINE: dict[str, Any] = json.loads(RunConfig().model_dump_json(exclude={"plugins"}))
DOTTED = {**ENGINE, **{f"{name}.{k}": v for name in GOOD for k, v in GOOD[name].items()}}
ODD_SCALARS = (
    "", "~", "null", "yes", "no", "on", "010", "0o17", "0x1F", "1e3", "1e400", "-1e400", ".inf",
    ".nan", "NaN", "Infinity", "1:30:00", "1_000", "2024-01-01", "[SEP]", "#EOS", "a #b", "a: b",
    "{a: 1}", "[1, 2", "*.txt", "&a", "!!python/object:os.system x", "<<", "=", "%", "@", "`",
    "500 steps", "2 epochs", "10%", "10M tokens", "15 min", "auto", "true", "false", "0", "-1",
    "9" * 30, "9" * 5000, "0." + "1" * 400, "~/x", "$HOME", "$UNSET_VARIABLE", "a\0b", "\ufeff",
    "\ud83d", "😀", "..", "/", "a/../b", "cpu", "min", "val/loss", "bytes", "stdlib",
    "x.py", "./x.py:build", "os:system", "a.b:c.d", "x" * 300 + ".py:a",
)  # fmt: skip
SCALARS = (
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8)
    | st.sampled_from(ODD_SCALARS)
)  # fmt: skip
VALUES = st.recursive(
    SCALARS,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(list(DOTTED)) | st.text(max_size=5), inner, max_size=3)
    ),
    max_leaves=6,
)


def _chance(of: int) -> st.SearchStrategy[bool]:
    """True about once in so many draws; more often, as hypothesis prefers the ends of a range."""
    return st.sampled_from(range(of)).map(lambda number: number == of // 2)


def _value(good: Any) -> st.SearchStrategy[Any]:
    """Mostly a valid value for a key."""
    return _chance(5).flatmap(lambda odd: VALUES if odd else st.just(good))


@st.composite
def _blocks(draw: st.DrawFn) -> dict[str, Any]:
    """A config, mostly with existing keys, mostly of the right shape."""
    config: dict[str, Any] = {}
    if not draw(_chance(4)):
        config["preset"] = draw(_value(draw(st.sampled_from(["quickstart", "nexus"]))))
    for key in draw(st.lists(st.sampled_from(list(ENGINE)), max_size=3, unique=True)):
        config[key] = draw(_value(ENGINE[key]))
    blocks: dict[str, Any] = {}
    for name in draw(st.lists(st.sampled_from(PLUGINS), max_size=4, unique=True)):
        keys = draw(st.lists(st.sampled_from([*GOOD[name], "x"]), max_size=2, unique=True))
        block: Any = {key: draw(_value(GOOD[name].get(key))) for key in keys if key in GOOD[name]}
        blocks[name] = draw(VALUES) if draw(_chance(20)) else block
    config["plugins"] = draw(VALUES) if draw(_chance(40)) else blocks
    if draw(_chance(40)):
        config[draw(st.text(max_size=6))] = draw(VALUES)
    return config


def _toml(config: Any) -> str:
    if isinstance(config, dict):
        return "{" + ", ".join(f"{json.dumps(k)} = {_toml(v)}" for k, v in config.items()) + "}"
    if isinstance(config, list):
        return "[" + ", ".join(map(_toml, config)) + "]"
    if isinstance(config, float):
        return str(config)
    return '"null"' if config is None else json.dumps(config)


def _written(config: dict[str, Any], suffix: str, *, flow: bool) -> bytes:
    if suffix == ".json":
        text = json.dumps(config)
    elif suffix == ".toml":
        text = "\n".join(f"{json.dumps(key)} = {_toml(value)}" for key, value in config.items())
    else:
        text = yaml.safe_dump(config, default_flow_style=flow, allow_unicode=True)
    return text.encode("utf-8", "surrogatepass")


@st.composite
def _files(draw: st.DrawFn) -> tuple[str, bytes]:
    suffix = draw(st.sampled_from([".yaml", ".toml", ".json", ".yml", ".YAML"]))
    kind = draw(st.sampled_from(range(40)))
    if kind == 0:
        return suffix, draw(st.binary(max_size=200))
    if kind == 1:
        return suffix, draw(st.text(max_size=200)).encode("utf-8", "surrogatepass")
    if kind == 2:
        deep = draw(st.sampled_from(["[", "{a: ", '{"a": [', "- ", "a.", "? "]))
        return suffix, (deep * draw(st.integers(1, 3000))).encode()
    content = _written(draw(_blocks()), suffix.lower(), flow=draw(st.booleans()))
    if kind == 3:
        content = content.decode("utf-8", "replace").encode(draw(st.sampled_from(ENCODINGS)))
    for _ in range(draw(st.integers(0, 3)) if kind < 10 else 0):
        place = draw(st.integers(0, len(content)))
        piece = draw(st.binary(max_size=3) | st.sampled_from(PIECES))
        content = content[:place] + piece + content[place + draw(st.integers(0, 3)) :]
    return suffix, content


ENCODINGS = ("utf-8-sig", "utf-16", "utf-32", "utf-16-le", "utf-7")
PIECES = (
    b"\n", b": ", b"&a ", b"*a ", b"- ", b"<<: *a", b"\t", b"#", b"'", b'"', b"!!int ", b"|\n",
    b"%YAML 1.1\n", b"---\n", b"...\n", b"\xef\xbb\xbf", b"\0", b"{", b"]", b"\r", b"\x85",
)  # fmt: skip


@st.composite
def cases(draw: st.DrawFn) -> Case:
    """A file, plugins, options and variables."""
    suffix, content = draw(_files())
    odd = st.sampled_from(ODD_SCALARS) | st.text(max_size=12) | VALUES.map(json.dumps)
    good = [(key, v if isinstance(v, str) else json.dumps(v)) for key, v in DOTTED.items()]
    pairs = st.sampled_from(good) | st.tuples(st.sampled_from(list(DOTTED)), odd)
    some = st.integers(0, 2).map(lambda number: max(0, number - 1))
    sets = draw(some.flatmap(lambda n: st.lists(pairs, min_size=n, max_size=n)))
    variables = draw(some.flatmap(lambda n: st.lists(pairs, min_size=n, max_size=n)))
    if draw(_chance(30)):
        sets.append((draw(st.text(max_size=6)), draw(odd)))
    names = st.sampled_from([*PLUGINS, *PLUGINS, *(f"no:{name}" for name in PLUGINS), "x", "no:"])
    return Case(
        suffix,
        content,
        ",".join(draw(some.flatmap(lambda n: st.lists(names, min_size=n, max_size=n)))),
        tuple(f"{key}={value}" for key, value in sets),
        {
            f"NEXUS_{key.upper().replace('.', '__')}": value.replace("\0", "")
            for key, value in variables
        },
    )


@contextmanager
def _packages_read_once() -> Iterator[None]:
    """Cache the metadata of installed packages, which would take half of the time."""
    once = functools.cache(entry_points)
    with patch.object(plan, "entry_points", once), patch.object(asked, "entry_points", once):
        yield


def main() -> None:
    """Try many, and print the outcomes."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--examples", type=int, default=10_000)
    wish = parser.parse_args()
    warnings.simplefilter("ignore")
    counts: Counter[str] = Counter()
    outcome, began = Outcome(), time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        for preset in ("quickstart", "nexus"):  # so that memory of imports is not counted
            try_case(Case(".yaml", f"preset: {preset}".encode()), Path(folder))

        @settings(
            max_examples=wish.examples,
            deadline=None,
            database=None,
            derandomize=True,
            phases=[Phase.generate, Phase.shrink],
            suppress_health_check=list(HealthCheck),
        )
        @given(cases())
        def attempt(case: Case) -> None:
            before = reset_peak()
            counts[try_case(case, Path(folder))] += 1
            fault = above_limit(before, len(case.content), outcome)
            assert fault is None, fault

        with _packages_read_once():
            attempt()
    print(f"{sum(counts.values()):,} configs in {time.monotonic() - began:,.0f} s: {dict(counts)}")
    memory = f"{outcome.most_mib:.0f} MiB" if outcome.measured else "not measured"
    print(f"peak memory of one config: {memory}")


if __name__ == "__main__":
    sys.exit(main())
