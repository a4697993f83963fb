"""Which slots are due, what they are called and which seeds they have: functions of time alone."""

from datetime import UTC, datetime, timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipelines import slots
from pipelines.errors import ConfigurationError
from pipelines.firing_config import FiringConfig

DAY = timedelta(days=1)
EVENING = datetime(2026, 11, 26, 3, tzinfo=UTC)
times = st.datetimes(
    min_value=datetime(1970, 1, 2), max_value=datetime(2999, 1, 1), timezones=st.just(UTC)
)  # fmt: skip
minutes = times.map(lambda time: time.replace(second=0, microsecond=0))
periods = st.integers(1, 60 * 24 * 40).map(lambda several: several * slots.MINUTE)


def days(*which: int) -> list[datetime]:
    return [datetime(2026, 11, day, 3, tzinfo=UTC) for day in which]


@pytest.mark.parametrize(
    ("text", "length"),
    [("30m", timedelta(minutes=30)), ("12h", DAY / 2), ("1d", DAY), ("2w", 14 * DAY), ("0m", timedelta())],
)
def test_periods(text: str, length: timedelta) -> None:
    assert slots.period(text) == length


@pytest.mark.parametrize("text", ["", "d", "1", "1 d", "-1d", "1.5h", "1D", "1s", "1month", "٣d", "1d "])
def test_what_is_no_period(text: str) -> None:
    with pytest.raises(ConfigurationError, match=r"firing.every is .*such as 30m, 12h, 1d or 2w"):
        FiringConfig(every=text)


@pytest.mark.parametrize(
    "text",
    ["2026-11-26T03:00Z", "2026-11-26T03:00:00+00:00", "2026-11-26T04:00+01:00", "20261126T0300Z", "2026-11-25T22-05"],
)
def test_a_slot_has_one_id_however_it_is_written(text: str) -> None:
    assert slots.slot_id(FiringConfig(slot=text).due(EVENING)) == "2026-11-26T03:00Z"


@pytest.mark.parametrize(
    "text", ["2026-11-26", "2026-11-26T03:00", "2026-11-26T03:00:01Z", "tonight", "2026-13-26T03:00Z"]
)
def test_what_is_no_slot(text: str) -> None:
    with pytest.raises(ConfigurationError, match=r"firing.slot is .*whole minutes with its zone.*, or now"):
        FiringConfig(slot=text)


def test_a_slot_to_come_is_not_worked_on() -> None:
    assert FiringConfig(slot="2026-11-26T03:04Z").due(EVENING), "clocks differ"
    with pytest.raises(ConfigurationError, match="not due yet at 2026-11-26T03:00Z"):
        FiringConfig(slot="2026-11-27T03:00Z").due(EVENING)
    with pytest.raises(ConfigurationError, match=r"firing.slot is empty"):
        FiringConfig().due(EVENING)


@given(minutes)
def test_folders_are_named_after_slots_and_sort_as_they_do(slot: datetime) -> None:
    name = slots.folder_name(slot)
    assert slots.slots_among([name, "lease", "2026-02-30T00-00Z", f"{name}.txt", slots.slot_id(slot)]) == [slot]
    assert slots.instant(slots.slot_id(slot)) == slot
    assert not set(name) & set(':/\\?*"<>| ')
    assert name < slots.folder_name(slot + slots.MINUTE)


@given(times, periods, st.integers(0, 60 * 24 * 40))
def test_the_last_that_is_due_is_the_last_that_is_due(now: datetime, every: timedelta, offset: int) -> None:
    slot = slots.latest(now, every, offset * slots.MINUTE)
    assert slot <= now < slot + every
    assert (slot - slots.EPOCH - offset * slots.MINUTE) % every == timedelta()


def test_now_is_the_last_slot_by_period_and_offset() -> None:
    now = datetime(2026, 11, 26, 2, 59, 59, tzinfo=UTC)
    assert slots.slot_id(FiringConfig(slot="now").due(now)) == "2026-11-26T00:00Z"
    assert slots.slot_id(FiringConfig(slot="now", offset="3h").due(now)) == "2026-11-25T03:00Z"
    assert slots.slot_id(FiringConfig(slot="now", every="12h", offset="3h").due(now)) == "2026-11-25T15:00Z"
    assert slots.slot_id(FiringConfig(slot="now", every="10m").due(now)) == "2026-11-26T02:50Z"


@given(minutes, periods, st.integers(0, 1000), st.integers(0, 10**6), st.integers(1, 10**5))
def test_fresh_seeds_are_of_one_slot_alone_and_leave_none_out(
    slot: datetime, every: timedelta, back: int, first: int, several: int
) -> None:
    """Slots that follow each other have seeds that follow each other; what is asked for later is not there yet."""
    asked = range(first, first + several)
    own, next_ones = slots.shifted(asked, slot, every), slots.shifted(asked, slot + every, every)
    assert len(own) == several and own.stop == next_ones.start
    assert own == slots.shifted(asked, slot, every)
    assert own.start >= 0 and own.stop < 2**63


def test_fresh_seeds_in_figures() -> None:
    assert slots.shifted(range(100), datetime(1970, 1, 3, 5, tzinfo=UTC), DAY) == range(200, 300)
    assert slots.shifted(range(7, 57), EVENING, DAY) == range(7 + 20783 * 50, 57 + 20783 * 50)


WEEK = 7 * DAY


def test_what_lies_between_the_first_slot_and_this_one_can_be_missed() -> None:
    assert slots.before(EVENING, days(22), EVENING, DAY, WEEK) == days(22, 23, 24, 25)
    assert slots.before(EVENING, days(22, 24, 26), EVENING, DAY, WEEK) == days(22, 23, 24, 25)


def test_before_a_schedule_began_nothing_was_missed() -> None:
    assert slots.before(EVENING, [], EVENING, DAY, WEEK) == []
    assert slots.before(EVENING, days(26, 27, 28), EVENING, DAY, WEEK) == []
    moved = [slot + timedelta(hours=1) for slot in days(20, 21)]
    assert slots.before(EVENING, moved, EVENING, DAY, WEEK) == [], "a schedule at another hour is another one"


def test_what_is_too_late_is_not_looked_at() -> None:
    later = EVENING + timedelta(hours=5)
    assert slots.before(EVENING, days(1), later, DAY, 2 * DAY) == days(25)
    assert slots.before(EVENING, days(1), EVENING, DAY, 2 * DAY) == days(24, 25)


@given(minutes, st.integers(1, 40), periods, st.integers(0, 10**5), st.integers(1, 60 * 24 * 400))
def test_those_before_are_the_ones_that_are_neither_too_old_nor_too_late(
    slot: datetime, several: int, every: timedelta, passed: int, patience: int
) -> None:
    """Beside a search of the whole schedule."""
    now, late, first = slot + passed * slots.MINUTE, patience * slots.MINUTE, slot - several * every
    schedule = [slot - every * back for back in range(several + 5, 0, -1)]
    expected = [one for one in schedule if one >= first and not slots.is_late(one, now, late)]
    assert slots.before(slot, [first, slot], now, every, late) == expected


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"every": "0m"}, "firing.every is '0m'; it must be longer than nothing: try 1d"),
        ({"offset": "x"}, "firing.offset is 'x'"),
        ({"late": "x"}, "firing.late is 'x'"),
        ({"catch_up": -1}, "firing.catch_up is -1; it must not be negative: try 0"),
        ({"deadline_s": -1.0}, "firing.deadline_s is -1.0"),
        ({"deadline_s": float("nan")}, "firing.deadline_s is nan"),
        ({"backoff_s": -1.0}, "firing.backoff_s is -1.0"),
        ({"lease_s": 0.5}, "firing.lease_s is 0.5; it must be at least 1 second: try 60"),
        ({"attempts": 0}, "firing.attempts is 0; it must be at least 1: try 3"),
        ({"alert": ""}, "firing.alert is not the name of an environment variable"),
    ],
)
def test_bad_settings_say_which(settings: dict[str, object], words: str) -> None:
    with pytest.raises(ConfigurationError, match=words):
        FiringConfig(**settings)  # type: ignore[arg-type]


def test_a_url_given_in_place_of_a_name_is_refused_and_not_said() -> None:
    with pytest.raises(ConfigurationError) as told:
        FiringConfig(alert="https://hooks.example.org/T0/secret")
    assert "secret" not in str(told.value).replace("a secret", "")


def test_a_webhook_that_is_named_and_not_there_is_missed_before_it_is_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("BRICKYARD_ALERT_URL", raising=False)
    assert FiringConfig().alert_url() == ""
    with pytest.raises(ConfigurationError, match=r"firing.alert is 'HOOK'; the environment has no such variable"):
        FiringConfig(alert="HOOK").alert_url()
    monkeypatch.setenv("HOOK", "http://127.0.0.1/hook")
    assert FiringConfig(alert="HOOK").alert_url() == "http://127.0.0.1/hook"
