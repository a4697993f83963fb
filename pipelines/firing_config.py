"""When a job is fired, and what is done about firings that are late, missed or stopped, as a user says it."""

import os
import re
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Literal

from pipelines import slots
from pipelines.errors import ConfigurationError

EARLY = timedelta(minutes=5)
"""That the clock of whoever fires may be ahead."""


@dataclass(frozen=True, kw_only=True)
class FiringConfig:
    """A firing of a schedule: each slot is worked on once, in a folder of its own below the job's."""

    slot: str = ""
    """The scheduled time that this firing is for, in UTC or with its zone, such as 2026-11-26T03:00Z; or `now`, for the
    last that is due by `every` and `offset`. Empty: no schedule."""
    every: str = "1d"
    """The period of the schedule: minutes, hours, days or weeks, such as 30m, 12h, 1d or 2w."""
    offset: str = "0m"
    """With slot `now`: how long after midnight UTC, or after a whole period since 1970, slots are due, such as 3h."""
    catch_up: int = 3
    """Missed slots that a firing works on before its own, the oldest of them first; 0: they are skipped."""
    late: str = "1w"
    """A slot that is older than this is skipped."""
    seeds: Literal["same", "fresh"] = "same"
    """The same seeds in each slot; or fresh ones, shifted by the periods since 1970 times how many seeds there are."""
    held: Literal["wait", "leave", "try-again"] = "wait"
    """While another firing works: wait until it has ended or died, and see what is left to do; leave with exit code 0;
    or leave with exit code 75."""
    lease_s: float = 60.0
    """Seconds without a sign of life after which a firing is taken for dead, and another may take over."""
    deadline_s: float = 0.0
    """Seconds after which this firing ends with exit code 75, finished or not; 0: none."""
    attempts: int = 3
    """How often a slot is tried, if something outside fails or workers are lost."""
    backoff_s: float = 30.0
    """Seconds before the second try; they double with each further one, up to ten minutes."""
    alert: str = "BRICKYARD_ALERT_URL"
    """Name of the environment variable with the URL of a webhook, which is sent a JSON object about each slot that
    failed. Configurations are printed and kept, and such a URL is a secret."""

    def __post_init__(self) -> None:
        for name in ("every", "offset", "late"):
            try:
                slots.period(getattr(self, name))
            except ValueError as error:
                raise ConfigurationError(f"firing.{name} is {getattr(self, name)!r}; {error}") from error
        if not self.period:
            raise ConfigurationError(f"firing.every is {self.every!r}; it must be longer than nothing: try 1d")
        if self.slot not in ("", "now"):
            try:
                slots.instant(self.slot)
            except ValueError as error:
                raise ConfigurationError(f"firing.slot is {self.slot!r}; {error}, or now") from error
        for name in ("catch_up", "deadline_s", "backoff_s"):
            if not getattr(self, name) >= 0:
                raise ConfigurationError(f"firing.{name} is {getattr(self, name)}; it must not be negative: try 0")
        if not self.lease_s >= 1:
            raise ConfigurationError(f"firing.lease_s is {self.lease_s}; it must be at least 1 second: try 60")
        if self.attempts < 1:
            raise ConfigurationError(f"firing.attempts is {self.attempts}; it must be at least 1: try 3")
        if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", self.alert):
            raise ConfigurationError(  # and its value, which may be a secret after all, is not said
                "firing.alert is not the name of an environment variable: put the URL into one, such as "
                "BRICKYARD_ALERT_URL, and give that name"
            )

    @property
    def period(self) -> timedelta:
        """`every`, as a length of time."""
        return slots.period(self.every)

    @property
    def patience(self) -> timedelta:
        """`late`, as a length of time."""
        return slots.period(self.late)

    def due(self, now: datetime) -> datetime:
        """Return the slot that is meant.

        Raises:
            ConfigurationError: if there is none, or it is not due yet.
        """
        if not self.slot:
            raise ConfigurationError("firing.slot is empty; it must be a time such as 2026-11-26T03:00Z, or now")
        if self.slot == "now":
            return slots.latest(now, self.period, slots.period(self.offset))
        slot = slots.instant(self.slot)
        if slot > now + EARLY:
            raise ConfigurationError(
                f"firing.slot is {self.slot!r}; it is not due yet at {slots.slot_id(now)}: fire it then, or give now"
            )
        return slot

    def alert_url(self) -> str:
        """Return the URL of the webhook; empty: none.

        Raises:
            ConfigurationError: if a variable is named that is not set.
        """
        default = type(self).alert
        if self.alert != default and not os.environ.get(self.alert):
            raise ConfigurationError(
                f"firing.alert is {self.alert!r}; the environment has no such variable: set it, where the job runs, to "
                "the URL of a webhook, or leave the setting out"
            )
        return os.environ.get(self.alert, "")


def clock() -> datetime:
    """Return the time, in UTC."""
    return datetime.now(UTC)
