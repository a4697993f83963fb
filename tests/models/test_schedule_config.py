"""What a schedule may be, and how what it may not be is refused: with a way out that is one."""

import math
import re

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from models.schedule import LEAST_LEFT, MOST_LEFT, ScheduleConfig, article


def refusal(**options):
    with pytest.raises(ValueError) as caught:
        ScheduleConfig(**options)
    return str(caught.value)


def test_the_default_configuration_is_the_articles():
    config = ScheduleConfig()
    assert (config.kind, config.T, config.rate, config.betas, config.zero_terminal_snr) == (
        "article", 1000, 0.02, (), False,
    )  # fmt: skip
    assert config.tables().alpha_bar.equal(article(1000, 0.02).alpha_bar)


@pytest.mark.parametrize("T", [0, -5, 100_001, 1 << 31])
def test_a_bad_T_is_named(T):
    assert re.fullmatch(rf"schedule\.T is {T}; it must lie in 1\.\.100000: try 1000", refusal(T=T))


@pytest.mark.parametrize("kind", ["article", "linear", "cosine", "constant"])
@pytest.mark.parametrize("rate", [0.0, -0.1, 1.0, math.nan])
def test_a_bad_rate_is_named(kind, rate):
    assert refusal(kind=kind, rate=rate) == f"schedule.rate is {rate}; it must lie between 0 and 1: try 0.02"


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"betas": (0.1, 0.2)}, r"schedule\.betas has 2 values and schedule\.kind is article; .* the kind given"),
        ({"kind": "given"}, r"schedule\.betas has 0 values and schedule\.kind is given; .* only with it"),
        ({"kind": "given", "betas": (0.9, 0.99), "T": 3}, r"schedule\.T is 3; .* has 2 values.*: give schedule\.T 2$"),
        ({"kind": "given", "betas": (0.9, 0.0), "T": 2}, r"schedule\.betas has 0\.0 at t = 2; .* between 0 and 1"),
        ({"kind": "given", "betas": (1.0, 0.9), "T": 2}, r"schedule\.betas has 1\.0 at t = 1; "),
        ({"kind": "given", "betas": (0.9, math.nan), "T": 2}, r"schedule\.betas has nan at t = 2; "),
        ({"kind": "given", "betas": (0.1, 0.1), "T": 2}, r"schedule\.betas ends .* ᾱ_T = 0\.9 .*; raise them$"),
        ({"kind": "given", "betas": (0.999999,) * 3, "T": 3}, r"schedule\.betas ends .* ᾱ_T = 1e-09 .*; lower them$"),
        ({"rate": 0.001}, r"schedule\.rate is 0\.001; .* ᾱ_T = 0\.78 .* 1e-06\.\.0\.05; try 0\.02$"),
        ({"rate": 0.9}, r"schedule\.rate is 0\.9; .*; try 0\.02$"),
        ({"T": 100}, r"schedule\.rate is 0\.02; with schedule\.T = 100 it leaves .*; try 0\.2$"),
        ({"kind": "linear", "T": 100}, r"schedule\.rate is 0\.02; with schedule\.T = 100 it leaves .*; try 0\.2$"),
        ({"kind": "constant", "T": 4}, r"schedule\.T = 4 it leaves .*; take schedule\.T 8 or more$"),
        ({"kind": "cosine", "T": 60_000}, r"schedule\.T is 60000 and schedule\.kind cosine; .*; take fewer steps$"),
        (
            {"kind": "given", "betas": (1 - 1e-9, 0.5), "T": 2, "zero_terminal_snr": True},
            r"schedule\.betas leaves ᾱ_1 = 3\.2e-05 .* schedule\.zero_terminal_snr .* 0\.00024.* lower",
        ),
    ],
)
def test_each_refusal_names_the_field_the_value_the_rule_and_the_way_out(options, says):
    message = refusal(**options)
    assert re.search(says, message), message


@given(
    kind=st.sampled_from(["article", "linear", "constant"]),
    T=st.one_of(st.integers(1, 40), st.integers(41, 3000)),
    rate=st.floats(1e-6, 1, exclude_max=True),
)
def test_the_rate_that_a_refusal_says_to_try_is_accepted(kind, T, rate):
    try:
        ScheduleConfig(kind=kind, T=T, rate=rate)
    except ValueError as error:
        way_out = re.search(r"try ([\d.e-]+)$", str(error))
        assert way_out or T < 8
        ScheduleConfig(kind=kind, T=T if way_out else 8, rate=float(way_out[1]) if way_out else 0.95)


@given(
    kind=st.sampled_from(["article", "linear", "cosine", "constant"]),
    T=st.integers(1, 1200),
    rate=st.floats(0.001, 0.9),
)
def test_what_is_accepted_ends_in_noise_that_can_be_divided_by(kind, T, rate):
    try:
        config = ScheduleConfig(kind=kind, T=T, rate=rate)
    except ValueError:
        assume(False)
    assert LEAST_LEFT <= float(config.tables().alpha_bar[-1]) <= MOST_LEFT


def test_zero_terminal_snr_makes_any_end_one():
    assert float(ScheduleConfig(T=100, zero_terminal_snr=True).tables().alpha_bar[-1]) == pytest.approx(2.0**-12)
    assert refusal(T=100)  # without it the same is refused
