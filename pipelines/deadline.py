"""An end for work that has none: it is told, then interrupted, then the process leaves."""

import contextlib
import logging
import os
import signal
import threading
from collections.abc import Callable, Iterator

from pipelines.errors import TryAgainError
from pipelines.lease import now_s

GRACE_S = 30.0
"""Between being told, being interrupted, and the end."""

log = logging.getLogger("brickyard.firing")


class Deadline:
    """A point in time, from now on."""

    def __init__(self, seconds: float) -> None:
        """Begin to count.

        Args:
            seconds: until then; 0: for ever.
        """
        self._seconds, self._ends = seconds, now_s() + seconds if seconds else float("inf")

    @property
    def left_s(self) -> float:
        """Seconds that are left, 0 at least."""
        return max(0.0, self._ends - now_s())

    def check(self) -> None:
        """Raise TryAgainError if it is over."""
        if not self.left_s:
            raise TryAgainError(
                f"the deadline of {self._seconds:g} s (firing.deadline_s) is over; the same command goes on from here"
            )

    @contextlib.contextmanager
    def enforced(self, last_words: Callable[[], None]) -> Iterator[None]:
        """End this block soon after the deadline: work that does not :meth:`check` is interrupted as by Ctrl-C, after
        :data:`GRACE_S`; and if it does not even end then, the process does, after as long, with exit code 75.

        Args:
            last_words: is called before the latter, in another thread.

        Raises:
            TryAgainError: if the block was interrupted.
        """
        if self.left_s == float("inf"):
            yield
            return
        over, struck, lock = threading.Event(), threading.Event(), threading.Lock()

        def end() -> None:
            over.wait(self.left_s + GRACE_S)
            with lock:  # or it would strike somebody who has just left
                if over.is_set():
                    return
                struck.set()
                # A signal, not only its exception: it also wakes what waits. Only the main thread can be struck. It is
                # not that of Ctrl-C, which is ignored by what a shell has started in the background.
                signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGALRM)
            if over.wait(GRACE_S):
                return
            log.error("the work goes on %g s after its deadline, also when interrupted: the process ends", 2 * GRACE_S)
            try:
                last_words()
            finally:
                os._exit(os.EX_TEMPFAIL)

        can_be_struck = threading.current_thread() is threading.main_thread()
        if can_be_struck:
            before = signal.signal(signal.SIGALRM, signal.default_int_handler)
            threading.Thread(target=end, name="deadline", daemon=True).start()
        try:
            try:
                yield
            finally:
                with lock:
                    over.set()
        except KeyboardInterrupt:
            if struck.is_set():
                self.check()
            raise
        finally:
            over.set()  # also where an interrupt came before the one above, or the process would be ended later
            if can_be_struck:
                signal.signal(signal.SIGALRM, before or signal.SIG_DFL)
