"""The slots of a schedule: instants, a period apart, each with a name and a number. Pure functions of time.

A slot is its scheduled time, whenever it is worked on. So its folder, its seeds and whether it was missed are functions
of that time alone, and two firings for one slot, on whatever machines, mean the same.
"""

import re
from collections.abc import Iterable
from datetime import UTC, datetime, timedelta

MINUTE = timedelta(minutes=1)
EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_UNITS = {"m": MINUTE, "h": timedelta(hours=1), "d": timedelta(days=1), "w": timedelta(weeks=1)}
_NAME = re.compile(r"[0-9]{4}-[0-9]{2}-[0-9]{2}T[0-9]{2}-[0-9]{2}Z")


def period(text: str) -> timedelta:
    """Return a length of time like ``30m``, ``12h``, ``1d`` or ``2w``.

    Raises:
        ValueError: if it is something else.
    """
    match = re.fullmatch(r"([0-9]{1,6})([mhdw])", text)
    if not match:
        raise ValueError("it must be a whole number of minutes, hours, days or weeks, such as 30m, 12h, 1d or 2w")
    return int(match[1]) * _UNITS[match[2]]


def instant(text: str) -> datetime:
    """Return the time that ISO 8601 says, with a zone and in whole minutes, in UTC.

    Raises:
        ValueError: if it says something else.
    """
    try:
        time = datetime.fromisoformat(text)
    except ValueError:
        time = None
    if time is None or time.tzinfo is None or time.second or time.microsecond:
        raise ValueError("it must be a time in whole minutes with its zone, as ISO 8601 has it: 2026-11-26T03:00Z")
    return time.astimezone(UTC)


def slot_id(slot: datetime) -> str:
    """Return what a slot is called: ``2026-11-26T03:00Z``."""
    return slot.strftime("%Y-%m-%dT%H:%MZ")


def folder_name(slot: datetime) -> str:
    """Return the slot's folder: its id, but for the colon, which not every storage takes. They sort by time."""
    return slot_id(slot).replace(":", "-")


def slots_among(names: Iterable[str]) -> list[datetime]:
    """Return the slots whose folders are among the names, in order; others are passed over."""
    found = []
    for name in names:
        if _NAME.fullmatch(name):
            try:
                found.append(instant(f"{name[:13]}:{name[14:]}"))
            except ValueError:  # no such day
                continue
    return sorted(found)


def latest(now: datetime, every: timedelta, offset: timedelta) -> datetime:
    """Return the last slot that is due, of those that lie whole periods and an offset after 1970-01-01T00:00Z."""
    return EPOCH + offset + (now - EPOCH - offset) // every * every


def number(slot: datetime, every: timedelta) -> int:
    """Return how many whole periods lie between 1970 and a slot: neighbours on a schedule have neighbouring numbers."""
    return (slot - EPOCH) // every


def shifted(seeds: range, slot: datetime, every: timedelta) -> range:
    """Return as many seeds for a slot that no other slot of its schedule has."""
    shift = number(slot, every) * len(seeds)
    return range(seeds.start + shift, seeds.stop + shift)


def is_late(slot: datetime, now: datetime, late: timedelta) -> bool:
    """Return whether a slot is too old to be worked on."""
    return now - slot > late


def before(
    slot: datetime, known: Iterable[datetime], now: datetime, every: timedelta, late: timedelta
) -> list[datetime]:
    """Return the earlier slots of a schedule that can still be worked on, the oldest first.

    Args:
        slot: the one that is due now.
        known: those that something has been done for. The schedule began with the first of them that lies whole
            periods before ``slot``: what is older was not missed, and a schedule at another hour is another one.
        now: the time.
        every: the period.
        late: how old a slot may be.
    """
    began = min((one for one in known if one < slot and (slot - one) % every == timedelta()), default=slot)
    several = min(slot - began, late - (now - slot)) // every
    return [slot - every * back for back in range(several, 0, -1)]
