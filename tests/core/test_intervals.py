"""Intervals: errors would end runs early, or save and evaluate at the wrong steps."""

from datetime import timedelta
from decimal import Decimal
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import TypeAdapter, ValidationError

from nexus_core import ConfigError, Every, Interval, IntervalField, TrainState


@pytest.mark.parametrize(
    ("text", "amount", "unit"),
    [
        ("500 steps", 500, "steps"),
        ("1 step", 1, "steps"),
        (300, 300, "steps"),
        ("1.5 epochs", 1.5, "epochs"),
        ("10M tokens", 10_000_000, "tokens"),
        ("2.5B tokens", 2_500_000_000, "tokens"),
        ("3k samples", 3_000, "samples"),
        ("1_000 steps", 1_000, "steps"),
        ("90 s", 90, "seconds"),
        ("15 min", 900, "seconds"),
        ("15min", 900, "seconds"),
        ("8 h", 28_800, "seconds"),
        ("2 hours", 7_200, "seconds"),
        ("1 hr", 3_600, "seconds"),
        ("1.5 days", 129_600, "seconds"),
        (timedelta(minutes=2), 120, "seconds"),
        ("10 Min", 600, "seconds"),
        ("1e3 steps", 1_000, "steps"),
        ("1.5E6 Tokens", 1_500_000, "tokens"),
        ("2 Epochs", 2, "epochs"),
        ("10 M tokens", 10_000_000, "tokens"),
        ("10M", 10_000_000, "steps"),
        ("300.0", 300, "steps"),
        ("10%", 10, "%"),
        ("0.5 %", 0.5, "%"),
        ("3 percent", 3, "%"),
    ],
)
def test_parse_reads_amount_and_unit(text: str | int | timedelta, amount: float, unit: str) -> None:
    assert Interval.parse(text) == Interval(amount, unit)


@pytest.mark.parametrize(
    ("value", "said"),
    [
        *(dict.fromkeys(["", "steps", "-3 steps", "ten steps", "1,5 h"], "cannot read")).items(),
        ("5 parsecs", "unknown unit 'parsecs'. Known: steps, epochs, samples, tokens .* %"),
        ("10 stepz", "unknown unit 'stepz'. Did you mean 'steps'"),
        ("10M tokns", "unknown unit 'tokns'. Did you mean 'tokens'"),
        ("10 minuets", "unknown unit 'minuets'. Did you mean 'minute'"),
        ("10m", "unknown unit 'm'"),
        *(dict.fromkeys(["0 steps", "0%", timedelta()], "bad interval '0 ")).items(),
        *(dict.fromkeys(["1.5 steps", "1e-3 tokens", "1.5"], "not a whole number")).items(),
        ("101%", "101% is more than the whole run"),
        ("1e999 steps", "cannot read"),
    ],
)
def test_parse_refuses_what_is_not_an_interval(value: str | timedelta, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        Interval.parse(value)


@given(st.integers(1, 10**12), st.integers(1, 10**5))
def test_a_share_of_a_horizon_is_exact(total: int, thousandths: int) -> None:
    """Fails if 10% of 7 tokens is not 0.7 tokens, or differs from 10% of 7 steps."""
    share = Interval.parse(f"{thousandths / 1000}%")
    found = share.of(Interval(total, "tokens"))
    assert found.unit == "tokens"
    assert found.amount == float(Fraction(total * thousandths, 10**5))
    assert Interval(3, "steps").of(None) == Interval(3, "steps")
    with pytest.raises(ConfigError, match="share of a run"):
        share.of(None)


def test_a_share_that_was_not_resolved_is_refused() -> None:
    """Fails if a plugin that does not resolve shares gets an AttributeError."""
    with pytest.raises(ConfigError, match=r"interval\.of\(engine\.horizon\)"):
        Every(Interval(10, "%"), TrainState())


@given(
    st.one_of(
        st.tuples(st.integers(1, 10**15), st.sampled_from(["steps", "tokens", "samples"])),
        st.tuples(st.floats(1e-9, 1e12), st.sampled_from(["epochs", "seconds"])),
    )
)
def test_text_form_reads_back_as_the_same_interval(made_of: tuple[float, str]) -> None:
    """Fails if a run's config.yaml has a different horizon."""
    interval = Interval(*made_of)
    assert Interval.parse(str(interval)) == interval


@given(st.integers(1, 9999), st.integers(0, 3), st.sampled_from("kMB"))
def test_amounts_are_the_decimal_numbers_that_are_written(
    digits: int, places: int, factor: str
) -> None:
    """Fails if "4.1M tokens" is rejected because the nearest float is not an integer."""
    text = f"{digits / 10**places:.{places}f}{factor} tokens"
    whole = digits * {"k": 10**3, "M": 10**6, "B": 10**9}[factor] // 10**places
    assert Interval.parse(text) == Interval(whole, "tokens")


@given(st.integers(1, 40), st.integers(1, 25), st.integers(1, 5))
def test_a_share_of_an_epoch_passes_when_its_last_batch_does(
    periods: int, length: int, epochs: int
) -> None:
    """Fails if a tenth of an epoch is late or skipped because sums of tenths are inexact."""
    state = TrainState(epoch_length=periods * length)
    every = Every(Interval.parse(f"{Decimal(1) / periods:.12f} epochs"), state)
    told = []
    for batch in range(1, epochs * periods * length + 1):
        state.epoch, state.batch = divmod(batch, periods * length)
        told += [batch] if every.due(state) else []
    if 10**9 % periods == 0:  # otherwise the share cannot be written exactly
        assert told == list(range(length, epochs * periods * length + 1, length))


def test_a_horizon_in_parts_of_an_epoch_is_reached_at_its_batch() -> None:
    for tenths in range(1, 200):
        state = TrainState(epoch=tenths // 10, batch=tenths % 10, epoch_length=10)
        assert Interval.parse(f"{tenths / 10} epochs").reached(state)


def test_config_field_reports_a_wrong_interval_as_a_validation_error() -> None:
    adapter = TypeAdapter(IntervalField)
    assert adapter.validate_python("2 epochs") == Interval(2, "epochs")
    assert adapter.dump_python(Interval(2, "epochs")) == "2 epochs"
    with pytest.raises(ValidationError, match="cannot read the interval"):
        adapter.validate_python("soon")


@given(st.integers(1, 50), st.lists(st.integers(1, 30), max_size=60), st.integers(0, 100))
def test_every_tells_each_passed_period_once(period: int, jumps: list[int], start: int) -> None:
    """However far a step jumps, a period is reported at the first step that completes it."""
    state = TrainState(tokens=start)
    every = Every(Interval(period, "tokens"), state)
    for jump in jumps:
        before = state.tokens // period
        state.tokens += jump
        assert every.due(state) == (state.tokens // period != before)
        assert not every.due(state)


def test_epochs_count_the_begun_one_as_a_fraction() -> None:
    state = TrainState(epoch=2, batch=3, epoch_length=4)
    assert state.counted("epochs") == 2.75
    assert not Interval(3, "epochs").reached(state)
    assert Interval(3, "epochs").progress(state) == pytest.approx(2.75 / 3)
