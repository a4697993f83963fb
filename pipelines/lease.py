"""One holder at a time, on any storage that can create an object if there is none of its name.

Numbered objects: whoever creates the next number holds the lease, and the number is its fencing token. The holder
overwrites its own object, in which a counter grows; whoever waits takes over when the newest object has stood still for
as long as its holder said, by the waiter's own clock, or says that it was released. No two clocks are compared.

Why two never believe to hold it at once: a holder believes for :data:`SHARE` of ``lease_s`` after the *beginning* of
the last write that came to its end in time, and never again afterwards. A waiter has seen that write, so it began to
count after it. The rest of ``lease_s`` is for clocks that run differently, and for what is written just after a
:meth:`Lease.check`. What is written later than that, by a process that was stopped between the two, no storage of this
kind can refuse: so what is written under a lease must be the same whoever writes it, as the shards of samples are.
"""

import contextlib
import json
import logging
import os
import re
import socket
import threading
import time
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from pipelines.errors import BrickyardError, DamagedError, TryAgainError
from pipelines.storage import Folder

SHARE = 0.9
"""Of ``lease_s``, for which a holder believes in its last sign of life."""
SIGNS = 6
"""Of life that a holder gives within ``lease_s``; and a waiter looks twice as often."""
LEAVE_S = 10.0
"""For which the end of a lease waits for storage to be told."""
_NAME = re.compile(r"lease-([0-9]+)\.json")
_CLOCK = getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC)  # the former goes on while a machine sleeps

log = logging.getLogger("brickyard.lease")


def now_s() -> float:
    """Return the seconds of a clock that nobody sets."""
    return time.clock_gettime(_CLOCK)


@dataclass(frozen=True)
class Fence:
    """What is left of a lease on another machine: its number. It can be pickled."""

    folder: Folder
    number: int

    def check(self) -> None:
        """Raise TryAgainError if somebody else has taken the lease since, or storage does not answer for long."""
        newest = _newest(self.folder)
        if newest != self.number:
            raise TryAgainError(
                f"{self.folder.url}: another firing has taken the lease (number {newest}, this one has {self.number}), "
                "since this one gave no sign of life for too long; what it had begun is left to the other"
            )


class Lease:
    """A lease that is held. It is kept by a thread, until :meth:`release`."""

    def __init__(self, fence: Fence, about: dict[str, Any], lease_s: float, since_s: float) -> None:
        self.fence, self.lost = fence, ""
        self._about, self._lease_s, self._believes_until = about, lease_s, since_s + SHARE * lease_s
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._keep, name="lease", daemon=True)
        self._thread.start()

    def check(self) -> None:
        """Return if the lease is still held, and will be for a tenth of ``lease_s``.

        Raises:
            TryAgainError: if somebody else has it, if storage took no sign of life for so long that somebody may, or
                if it does not answer now.
        """
        self.fence.check()
        self._believe()  # after storage was asked, which may have taken long
        if self.lost:
            raise TryAgainError(self.lost)

    def release(self) -> None:
        """Let the next one in at once, if storage can be told so within :data:`LEAVE_S`."""
        self._over.set()
        self._thread.join(LEAVE_S)
        if self._thread.is_alive():
            log.warning("%s cannot be told that the lease is free: the next one waits", self.fence.folder.url)

    def _believe(self) -> None:
        # For good: once it is over, a sign of life that arrives late may be seen by nobody.
        if not self.lost and now_s() > self._believes_until:
            self.lost = (
                f"{self.fence.folder.url}: storage took no sign of life within {SHARE * self._lease_s:g} s, so that "
                "others may take the lease"
            )

    def _keep(self) -> None:
        """Give signs of life to the end; nobody else writes this object, so they arrive in order."""
        said = False
        while not self._over.wait(self._lease_s / SIGNS) and not self.lost:
            began, until = now_s(), self._believes_until
            self._about["beat"] += 1
            try:
                self._put()
                until = began + SHARE * self._lease_s
            except BrickyardError as error:
                if not said:
                    log.warning("%s did not take a sign of life: %s", self.fence.folder.url, error)
                said = True
            self._believe()
            self._believes_until = until
        self._over.wait()
        self._about["released"] = True
        with contextlib.suppress(BrickyardError):
            self.fence.check()  # else there is nobody to be told
            self._put()

    def _put(self) -> None:
        self.fence.folder.put(_name(self.fence.number), json.dumps(self._about).encode())


@contextlib.contextmanager
def hold(folder: Folder, lease_s: float, wait_s: float = 0, about: str = "") -> Iterator[Lease | None]:
    """Hold the lease of a folder, or learn that another one does.

    Args:
        folder: of its own for each thing that one at a time may do.
        lease_s: for how long this holder may give no sign of life; others find out after that.
        wait_s: for how long to wait for a holder that is alive. For one of which that is not known, it is found out,
            which takes as long as its ``lease_s`` at most.
        about: a word on what it is held for, for people.

    Yields:
        The lease, or None if another one holds it.

    Raises:
        TryAgainError, DataError: if storage does not do what it is asked.
    """
    lease = _take(folder, lease_s, wait_s, about)
    try:
        yield lease
    finally:
        if lease:
            lease.release()


def _take(folder: Folder, lease_s: float, wait_s: float, about: str) -> Lease | None:
    nothing = (0, b"")
    seen, since, began, alive, told = nothing, now_s(), now_s(), False, False
    while True:
        looked = now_s()
        found = _look(folder)
        if found != seen:
            alive = seen != nothing  # the first look says nothing; another object after it does
            seen, since = found, now_s()
        number, said = found[0], _read(found[1])
        theirs_s = said.get("lease_s", lease_s)
        if not number or said.get("released") or looked - since >= theirs_s:
            if lease := _create(folder, number + 1, lease_s, about):
                if number and not said.get("released"):
                    log.warning("%s: taken over from %s, which gives no sign of life", folder.url, _who(said))
                return lease
            alive = True  # somebody was faster
        if alive and not told:
            told = True
            log.info("%s: held by %s, which is alive", folder.url, _who(_read(_look(folder)[1])))
        if alive and now_s() - began >= wait_s:
            return None
        time.sleep(theirs_s / SIGNS / 2)


def _create(folder: Folder, number: int, lease_s: float, about: str) -> Lease | None:
    since = now_s()
    said = {
        "number": number, "beat": 0, "lease_s": lease_s, "released": False, "for": about,
        "by": f"process {os.getpid()} on {socket.gethostname()}", "id": uuid.uuid4().hex,
    }  # fmt: skip
    # The id makes each object differ from any other that had its number.
    if not folder.create(_name(number), json.dumps(said).encode()):
        return None
    numbers = _numbers(folder)
    if numbers and numbers[-1] > number:  # the number was old, and swept, by the time that it was created here
        return None
    for old in numbers[:-1]:
        with contextlib.suppress(BrickyardError):
            (folder / _name(old)).delete()
    return Lease(Fence(folder, number), said, lease_s, since)


def _look(folder: Folder) -> tuple[int, bytes]:
    """Return the newest number and what its object holds; 0 if there is none."""
    while number := _newest(folder):
        with contextlib.suppress(DamagedError):  # it was swept: there is a newer one
            return number, folder.get(_name(number))
    return 0, b""


def _numbers(folder: Folder) -> list[int]:
    return sorted(int(match[1]) for match in map(_NAME.fullmatch, folder.names()) if match)


def _newest(folder: Folder) -> int:
    return max(_numbers(folder), default=0)


def _name(number: int) -> str:
    return f"lease-{number:06d}.json"


def _read(content: bytes) -> dict[str, Any]:
    return dict(json.loads(content)) if content else {}


def _who(said: dict[str, Any]) -> str:
    return f"{said.get('by', 'somebody')} ({said.get('for') or 'number ' + str(said.get('number'))})"
