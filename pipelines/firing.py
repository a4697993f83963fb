"""A firing of a schedule: what is due is worked on once, whoever fires, how often, and whatever befalls them.

A slot is a folder, and one that has ``_SUCCESS`` in it is finished: to fire it again does nothing and writes nothing.
One firing works at a time (:mod:`pipelines.lease`); slots that were missed are caught up with, the oldest first.
"""

import contextlib
import json
import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, Literal, NoReturn, TypeVar

from ray.exceptions import RayError
from tenacity import (
    RetryCallState,
    Retrying,
    retry_if_exception,
    stop_after_attempt,
    stop_before_delay,
    wait_exponential,
)

from pipelines.alerts import alert
from pipelines.deadline import Deadline
from pipelines.errors import BrickyardError, TryAgainError, ours, root
from pipelines.firing_config import FiringConfig, clock
from pipelines.lease import Fence, Lease, hold
from pipelines.redaction import redacted
from pipelines.slots import before, folder_name, is_late, shifted, slot_id, slots_among
from pipelines.storage import Folder

SUCCESS = "_SUCCESS"
"""In the folder of a slot that is finished; its work writes it, last."""
RECORD = "firing.json"
"""In the folder of a slot: what the last firing that worked on it has to say of it."""
LEASE = "lease"
"""Beside the folders of the slots."""
LONGEST_PAUSE_S = 600.0

State = Literal["done", "already done", "too late", "held elsewhere", "failed"]

T = TypeVar("T")

log = logging.getLogger("brickyard.firing")


@dataclass(frozen=True)
class Slot:
    """What there is to do now. Whoever works on it leaves ``_SUCCESS`` in its folder, at the end."""

    id: str
    """Its scheduled time."""
    folder: Folder
    fence: Fence
    """For workers on other machines: its ``check`` is what of :meth:`check` they can know."""
    _due: datetime
    _config: FiringConfig
    _lease: Lease
    _deadline: Deadline
    links: dict[str, str] = field(default_factory=dict)
    """Where there is more to see, by name: the work adds to it, and alerts have it."""

    def seeds(self, asked: range) -> range:
        """Return the seeds of this slot: those that were asked for, or as many that no other slot has."""
        return asked if self._config.seeds == "same" else shifted(asked, self._due, self._config.period)

    def check(self) -> None:
        """Return if this firing may commit: call it before each commit, and it should follow at once.

        Raises:
            TryAgainError: if another firing has taken the lease, or may have, or the deadline is over.
        """
        self._deadline.check()
        self._lease.check()


@dataclass
class _Outcome:
    state: State
    said: dict[str, Any] = field(default_factory=dict)
    error: BaseException | None = None


def fire(
    config: FiringConfig, out: Folder, work: Callable[[Slot], dict[str, Any]], now: datetime | None = None
) -> dict[str, Any]:
    """Work on the slot that is due, after those that were missed.

    Args:
        config: which slot, and what is done about those that are late, missed or held.
        out: the folder of the schedule.
        work: does what there is to do in a slot, and returns what it did. It is called again after an error that may
            pass, and goes on where it was.
        now: the time, if not that of the clock.

    Returns:
        ``slots``: for each its ``state`` (done, already done, too late, held elsewhere) and what the work said.

    Raises:
        ConfigurationError, DataError, or whatever else the work raised: if a slot failed for good; the others were
            worked on.
        TryAgainError: if one failed that may not the next time, the deadline came, or, with held try-again, another
            firing works.
    """
    return _Firing(config, out, work, now or clock()).run()


def due(config: FiringConfig, out: Folder, now: datetime | None = None) -> dict[str, State | Literal["to do"]]:
    """Return what a firing now would find: each slot that it would look at, and what is to do. Nothing is changed."""
    now = now or clock()
    return {slot_id(slot): _state(config, out, slot, now) or "to do" for slot in _slots(config, out, now)}


class _Firing:
    def __init__(
        self, config: FiringConfig, out: Folder, work: Callable[[Slot], dict[str, Any]], now: datetime
    ) -> None:
        self.config, self.out, self.work, self.now = config, out, work, now
        self.deadline, self.alert_url = Deadline(config.deadline_s), config.alert_url()
        self.links: dict[str, str] = {}

    def run(self) -> dict[str, Any]:
        own, outcomes = self.config.due(self.now), dict[str, _Outcome]()
        try:
            due = self._patiently(lambda: list(_slots(self.config, self.out, self.now)))
        except Exception as error:
            self._alert(own, "failed", error)
            raise
        for slot in due:
            outcomes[slot_id(slot)] = outcome = self._settle(slot)
            log.info("slot %s: %s%s", slot_id(slot), outcome.state, f", {outcome.error}" if outcome.error else "")
            if outcome.state == "held elsewhere":
                break  # so would the next be; the next firing catches up with it
            if not self.deadline.left_s and slot != due[-1]:
                late = TryAgainError(f"there was no time left for it; its deadline is {self.config.deadline_s:g} s")
                self._alert(own, "failed", late)
                outcomes[slot_id(own)] = _Outcome("failed", error=late)
                break
        failed = {slot: outcome.error for slot, outcome in outcomes.items() if outcome.error}
        if failed:
            # What no other try would mend counts more than what one may.
            _raise(*min(failed.items(), key=lambda one: _may_pass(one[1])))
        return {"slots": {slot: {"state": outcome.state, **outcome.said} for slot, outcome in outcomes.items()}}

    def _settle(self, slot: datetime) -> _Outcome:
        """Bring a slot to a state that is final for this firing, and tell whoever should know."""
        try:
            outcome = self._patiently(lambda: self._try(slot))
        except Exception as error:
            self._alert(slot, "failed", error)
            return _Outcome("failed", error=error)
        if outcome.state == "too late":
            self._alert(slot, "too late", f"it is older than {self.config.late} (firing.late), and is skipped")
        return outcome

    def _patiently(self, call: Callable[[], T]) -> T:
        return Retrying(
            retry=retry_if_exception(_may_pass),
            wait=wait_exponential(self.config.backoff_s, max=LONGEST_PAUSE_S),
            stop=stop_after_attempt(self.config.attempts) | stop_before_delay(self.deadline.left_s),
            before_sleep=_say,
            reraise=True,
        )(call)

    def _try(self, slot: datetime) -> _Outcome:
        if state := _state(self.config, self.out, slot, self.now):
            return _Outcome(state)
        folder = self.out / folder_name(slot)
        wait_s = self.deadline.left_s if self.config.held == "wait" else 0.0
        ended = f"the process is ended: its deadline of {self.config.deadline_s:g} s (firing.deadline_s) is long over"
        with (
            self.deadline.enforced(lambda: self._alert(slot, "failed", ended)),
            hold(self.out / LEASE, self.config.lease_s, wait_s, slot_id(slot)) as lease,
        ):
            if lease is None:
                return self._held(slot)
            if folder.exists(SUCCESS):  # another firing has done it meanwhile
                return _Outcome("already done")
            mine = Slot(slot_id(slot), folder, lease.fence, slot, self.config, lease, self.deadline, self.links)
            with _recorded(mine):
                said = self.work(mine)
            assert folder.exists(SUCCESS), f"the work on {slot_id(slot)} returned and left no {SUCCESS}"
            return _Outcome("done", said)

    def _held(self, slot: datetime) -> _Outcome:
        self.deadline.check()
        log.warning("slot %s: another firing works at %s; this one leaves it alone", slot_id(slot), self.out.url)
        held = TryAgainError(f"another firing works at {self.out.url}; the same command looks again later")
        return _Outcome("held elsewhere", error=None if self.config.held == "leave" else held)

    def _alert(self, slot: datetime, state: State, error: BaseException | str) -> None:
        links = {"folder": (self.out / folder_name(slot)).url} | self.links
        alert(self.alert_url, {"slot": slot_id(slot), "state": state, "error": _words(error), "links": links})


def _slots(config: FiringConfig, out: Folder, now: datetime) -> Iterator[datetime]:
    """Yield the slots that a firing is for: as many as are missed and may be caught up with, then its own."""
    slot, left = config.due(now), config.catch_up
    missed = before(slot, slots_among(out.names()), now, config.period, config.patience) if left else []
    for earlier in missed:
        if left and not (out / folder_name(earlier)).exists(SUCCESS):
            left -= 1
            yield earlier
    yield slot


def _state(config: FiringConfig, out: Folder, slot: datetime, now: datetime) -> State | None:
    """Return what there is to say of a slot that is not to be worked on; else nothing."""
    if (out / folder_name(slot)).exists(SUCCESS):
        return "already done"
    return "too late" if is_late(slot, now, config.patience) else None


@contextlib.contextmanager
def _recorded(slot: Slot) -> Iterator[None]:
    """Leave word in a slot's folder of who works on it and how that ended: a slot that was begun can be missed."""
    about = {"slot": slot.id, "lease": slot.fence.number, "began": clock().isoformat(timespec="seconds")}

    def say(state: str, **more: Any) -> None:
        slot.folder.put(RECORD, json.dumps({**about, "state": state, **more, "links": slot.links}, indent=1).encode())

    slot.check()
    say("working")
    try:
        yield
    except BaseException as error:
        state = "failed" if isinstance(error, Exception) else "interrupted"
        with contextlib.suppress(BrickyardError):
            slot.fence.check()
            say(state, error=_words(error), ended=clock().isoformat(timespec="seconds"))
        raise
    with contextlib.suppress(BrickyardError):
        slot.fence.check()
        say("done", ended=clock().isoformat(timespec="seconds"))


def _may_pass(error: BaseException) -> bool:
    """Whether the same may go well a little later: something outside failed, or a worker, its node or Ray died."""
    told = ours(error)
    return isinstance(told, TryAgainError) if told else isinstance(root(error), RayError | ConnectionError)


def _words(error: BaseException | str) -> str:
    """Return what an error says, and if it is none of ours, what it is: it is kept, and sent to others."""
    if isinstance(error, str):
        return error
    told = ours(error)
    return redacted(str(told) if told else f"{type(root(error)).__name__}: {root(error)}")


def _say(state: RetryCallState) -> None:
    assert state.outcome and state.next_action
    error = state.outcome.exception()
    assert error
    log.warning("try %d: %s; once more in %g s", state.attempt_number, _words(error), state.next_action.sleep)


def _raise(slot: str, error: BaseException) -> NoReturn:
    """Raise what a slot failed of, with its name if the error is one of ours."""
    told = ours(error)
    if told:
        raise type(told)(f"slot {slot}: {told}") from error
    if _may_pass(error):
        raise TryAgainError(f"slot {slot}: {_words(error)}; the same command goes on from here") from error
    raise error
