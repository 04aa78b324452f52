"""YAML 1.2: a misread number or a silently replaced key would change a run's settings."""

from __future__ import annotations

import math
import time
import tracemalloc
from functools import reduce
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from nexus_core.cli.yaml12 import YamlError, dump, parse, parse_value


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("010", 10), ("008", 8), ("0o17", 15), ("0x1F", 31), ("+5", 5), ("-0", 0),
        ("1e3", 1000.0), ("1e-4", 1e-4), (".5", 0.5), ("1.", 1.0),
        (".inf", math.inf), ("-.INF", -math.inf), ("1e400", math.inf),
        ("true", True), ("False", False), ("null", None), ("~", None), ("", None),
        ("yes", "yes"), ("on", "on"), ("n", "n"), ("1:30:00", "1:30:00"), ("1_000", "1_000"),
        ("2024-01-01", "2024-01-01"), ("=", "="), ("inf", "inf"), ("0o8", "0o8"), (".", "."),
    ],
)  # fmt: skip
def test_plain_scalars_are_those_of_yaml_1_2_in_files_and_options(text: str, value: object) -> None:
    assert parse(f"key: {text}").value == {"key": value}
    found = parse_value(text).value
    assert found == value
    assert type(found) is type(value)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("corpus #1.txt", "corpus #1.txt"),
        ("#EOS", "#EOS"),
        ("a: b", "a: b"),
        ("- a", "- a"),
        ("*.txt", "*.txt"),
        ("&a b", "&a b"),
        ("!!int 3", "!!int 3"),
        ("| x", "| x"),
        ("%", "%"),
        ("[a] b", "[a] b"),
        ("[a, b] # not a comment", "[a, b] # not a comment"),
        ("[a, b", "[a, b"),
        ("{a: 1, a: 2}", "{a: 1, a: 2}"),
        ('"007"', "007"),
        ("'it''s'", "it's"),
        ('"\\ud83d\\ude00"', "😀"),
        ("[a, 1, {b: c}]", ["a", 1, {"b": "c"}]),
        ("  5 steps ", "5 steps"),
    ],
)
def test_what_stands_behind_set_is_a_value_or_text_but_no_document(
    text: str, value: object
) -> None:
    assert parse_value(text).value == value


def test_how_it_was_written_is_kept_for_whoever_wants_text() -> None:
    document = parse("name: 007\ntoken: [SEP]\ntags: {a: 1.0, b: x}\nwarm: yes\n")
    assert document.written == {
        ("name",): "007",
        ("token",): "[SEP]",
        ("tags",): "{a: 1.0, b: x}",
        ("tags", "a"): "1.0",
    }
    assert parse_value("[SEP]").written == {(): "[SEP]"}


def test_keys_are_text_as_in_the_other_formats() -> None:
    assert parse("1: a\ntrue: b\nnull: c\nyes: d").value == {
        "1": "a",
        "true": "b",
        "null": "c",
        "yes": "d",
    }


def test_a_merge_key_brings_what_is_not_there() -> None:
    text = "base: &b {x: 1, y: 2}\nmine: {y: 3, <<: *b}\nboth: {<<: [{y: 9}, *b]}\n"
    value = parse(text).value
    assert value["mine"] == {"y": 3, "x": 1}
    assert value["both"] == {"y": 9, "x": 1}


BOMB = "a: &a [x,x,x,x,x,x,x,x,x,x]\n" + "".join(
    f"{name}: &{name} [{','.join([f'*{before}'] * 10)}]\n"
    for before, name in zip("abcdefgh", "bcdefghi", strict=True)
)
MERGED = "a: &a {x: 1}\n" + "".join(
    f"{name}: &{name} {{<<: [{','.join([f'*{before}'] * 10)}]}}\n"
    for before, name in zip("abcdefgh", "bcdefghi", strict=True)
)


NESTED_MERGES = reduce(lambda x, n: f"{{<<: [&a{n} {x}, *a{n}]}}", range(40), "{y: 1}")
TEXT = "é" * 2**15


@pytest.mark.parametrize(
    "text",
    [
        f"a: &a '{TEXT}'\nb: [{'*a,' * 500}]",
        f"a: &a ['{TEXT}']\nb: [{'*a,' * 500}]",
        f"a: {{? &a '{TEXT}' : 1}}\nb: [{'{? *a : 1},' * 500}]",
    ],
    ids=["text", "list", "key"],
)
def test_an_alias_takes_no_memory_of_its_own(text: str) -> None:
    """Fails if a config of 70 kB takes a gigabyte."""
    tracemalloc.start()
    try:
        parse(text)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 10 * 2**20


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: 1\nb: 2\na: 3", "duplicate key 'a', in lines 1 and 3"),
        ("x: {a: 1, a: 1}", "duplicate key 'a', in line 1"),
        ("1: a\n1: b", "duplicate key '1'"),
        (BOMB, "more than 40,000 values"),
        (MERGED, "more than 40,000 values"),
        (f"x: {NESTED_MERGES}", "more than 40,000 values"),
        (f"a: [{'1,' * 100_000}]", "more than 40,000 values"),
        ("a: &a [*a]", "nested deeper than 50 levels"),
        ("a: &a {<<: *a}", "nested deeper|'<<' takes a mapping"),
        ("a: {<<: 3}", "'<<' takes a mapping"),
        ("[" * 3000, "nested deeper than 50 levels"),
        ("- " * 3000, "nested deeper than 50 levels"),
        ("[" * 60 + "]" * 60, "nested deeper than 50 levels"),
        ("a: !!python/object/apply:os.system [x]", "is not allowed in settings"),
        ("a: !!timestamp x", "cannot be read as"),
        ("a: !!int x", "cannot be read as"),
        ("? [a]\n: 1", "keys must be text"),
        ("a: b: c", "line 1: mapping values are not allowed here"),
        ("a: 1\n--- \nb: 2", "expected a single document"),
        ("a: \0", "special characters are not allowed"),
        ("a: *b", "undefined alias"),
        ("x" * (2**20 + 1), "1,048,577 characters"),
    ],
)
def test_what_is_no_config_is_one_quick_error(text: str, message: str) -> None:
    began = time.process_time()  # CPU time, independent of other programs
    with pytest.raises(YamlError, match=message):
        parse(text)
    assert time.process_time() - began < 5


TREES = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**63) | st.floats(allow_nan=False)
    | st.text(st.characters(codec="utf-8")) | st.from_regex(r"\A[-+.0-9eExXo_:~a-fn]{1,6}\Z")
    | st.sampled_from(["yes", "null", "<<", "=", "1e3", "0o7", "1:30", "true", "\udcff", "\x85"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner),
    max_leaves=8,
)  # fmt: skip


@given(TREES)
def test_what_is_written_is_read_again_and_by_readers_of_yaml_1_1(tree: Any) -> None:
    text = dump({"key": tree})
    assert parse(text).value == {"key": tree}
    assert yaml.safe_load(text) == {"key": tree}
