"""From the spool to a tracker, in order, in a thread of its own: nobody waits for it but the end of a job, and that not
for long."""

import logging
import math
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from itertools import chain
from typing import Protocol

from tenacity import RetryCallState, Retrying, retry_if_exception_type, wait_exponential

from pipelines import metrics
from pipelines.entries import Entry
from pipelines.spool import Numbered, Spool

FIRST_WAIT_S, LONGEST_WAIT_S = 0.5, 30.0
"""The waits for a tracker that is away double from the first to the longest."""
LAST_WAIT_S = 1.0
"""At the end of a job they are no longer than this: perhaps it comes back in time."""
FAILURES = 8
"""So often an entry may fail at a tracker that takes others, before it is dropped."""

log = logging.getLogger("brickyard.tracking")


class Recipient(Protocol):
    """A tracker."""

    @property
    def recording_model(self) -> bool:
        """Whether it takes a model right now, which may be large."""

    def take(self, entries: Sequence[Entry]) -> None:
        """Record entries: one, or several metrics. To take the same once more changes nothing.

        What the tracker will never take is said and passed over.

        Raises:
            Exception: whatever it is, if they are not on record and may be later.
        """

    def blames(self, entry: Entry, error: Exception) -> bool:
        """Return whether a failure is one of this entry, and not of the tracker or of the way to it."""


class _NotTakenError(Exception):
    """An entry is still where it was."""


class Delivery:
    """Hands the entries of a spool to a recipient.

    Args:
        spool: whose entries, and those that are appended later.
        recipient: to whom.
        earlier: spools that are emptied before, each dropped from the iteration when it is.
    """

    def __init__(
        self, spool: Spool, recipient: Recipient, earlier: Callable[[], Iterator[Spool]] = lambda: iter(())
    ) -> None:
        self._spool, self._recipient, self._earlier = spool, recipient, earlier
        self.shared = False
        """Whether another process takes from the spool."""
        self._closing, self._left = threading.Event(), threading.Event()
        self._failures = 0
        self._away = False
        self._progress = -math.inf
        self._thread = threading.Thread(target=self._run, name="delivery", daemon=True)
        self._thread.start()

    def finish(self, patience_s: float, longest_s: float = math.inf) -> bool:
        """Wait until all is delivered, but not when nothing was for a while. Return whether all is.

        Args:
            patience_s: for how long nothing may be delivered, unless a model is being recorded.
            longest_s: for how long to wait in all.
        """
        began = time.monotonic()
        self._closing.set()
        self._spool.filled.set()
        while self._thread.is_alive():
            now = time.monotonic()
            stands_still = now - max(began, self._progress) > patience_s and not self._recipient.recording_model
            if stands_still or now - began > longest_s:
                break
            self._thread.join(timeout=0.05)
        self._left.set()
        try:
            return self._spool.entries() == 0
        except sqlite3.Error:
            return False

    @property
    def ended(self) -> bool:
        """Whether the thread has let go of the spool."""
        return not self._thread.is_alive()

    def _run(self) -> None:
        try:
            for spool in chain(self._earlier(), [self._spool]):
                self._empty(spool)
        except Exception as error:  # of storage, of the disk: the record is worth a warning, never a run
            if not self._left.is_set():
                log.warning("what is recorded stays in %s: %s: %s", self._spool.path, type(error).__name__, error)

    def _empty(self, spool: Spool) -> None:
        """Deliver what a spool holds; this job's own, until the job ends."""
        while not self._left.is_set():
            with spool.locked() as alone:
                self.shared = not alone
                while alone and not self._left.is_set():
                    spool.filled.clear()
                    if self._deliver(spool):
                        continue
                    if self._closing.is_set() or spool is not self._spool:
                        return
                    spool.filled.wait(timeout=1)  # other processes append without a word
            if spool.entries() == 0 and self._closing.is_set():  # the other one has done it
                return
            self._left.wait(timeout=0.2)

    def _deliver(self, spool: Spool) -> bool:
        """Deliver the oldest entries, however often it takes; return whether there were any."""
        patiently = Retrying(
            retry=retry_if_exception_type(_NotTakenError),
            wait=wait_exponential(multiplier=FIRST_WAIT_S, max=LONGEST_WAIT_S),
            sleep=self._pause,
            stop=lambda _: self._left.is_set(),
            before_sleep=self._say,
            retry_error_callback=lambda _: False,
        )
        return bool(patiently(self._hand_over, spool))

    def _hand_over(self, spool: Spool) -> bool:
        if self._left.is_set():  # while this one waited for its turn
            return False
        try:
            return self._try(spool)
        except sqlite3.Error as error:  # another process writes for long, or the disk has a bad day
            raise _NotTakenError(f"{spool.path}: {error}") from error

    def _try(self, spool: Spool) -> bool:
        metrics.SPOOL.set(spool.target.name, spool.size_bytes())
        found = spool.oldest(alone=self._failures > 0)
        if not found:
            return False
        known = [entry for _, entry in found if entry is not None]
        if len(known) < len(found):
            log.warning("%s holds entries that another version wrote; they are not on record", spool.path)
        try:
            if known:
                self._recipient.take(known)
        except Exception as error:
            if not self._is_poison(found, known[0], error):
                raise _NotTakenError(f"{type(error).__name__}: {error}") from error
        spool.remove([number for number, _ in found])
        metrics.SPOOL.set(spool.target.name, spool.size_bytes())
        self._failures = 0
        self._progress = time.monotonic()
        if self._away:
            self._away = False
            log.info("the tracker answers again; %d entries wait to be recorded", spool.entries())
        return True

    def _is_poison(self, found: list[Numbered], entry: Entry, error: Exception) -> bool:
        """Whether it is the entry, not the tracker, that something is wrong with."""
        if not self._recipient.blames(entry, error):
            return False
        self._failures += 1
        if len(found) > 1 or self._failures < FAILURES:
            return False
        log.warning("a record (%s) failed %d times and is dropped: %s", type(entry).__name__, self._failures, error)
        return True

    def _pause(self, seconds: float) -> None:
        if self._closing.is_set():
            self._left.wait(timeout=min(seconds, LAST_WAIT_S))
        else:
            self._closing.wait(timeout=seconds)

    def _say(self, state: RetryCallState) -> None:
        if self._away or self._failures:
            return
        self._away = True
        reason = state.outcome.exception() if state.outcome else ""
        log.warning(
            "the tracker takes no records: %s. They wait in %s, up to %d MB of them; nothing else waits",
            reason, self._spool.path, self._spool.max_bytes >> 20,
        )  # fmt: skip
