"""A loop that no longer comes round: it is said where it stands, and the process ends to make room for another."""

import faulthandler
import math
import os
import tempfile
import threading
import time
from collections.abc import Callable


class Watch:
    """Ends this process when the loop has not come round for too long.

    It begins with the first :meth:`step`: to start, to compile and to open the stream may take what they take.
    """

    def __init__(self, limit_s: float, say: Callable[[str], None]) -> None:
        """Start to watch, in a thread.

        Args:
            limit_s: how long a step may take, in seconds.
            say: is given the stacks of all threads before the end.
        """
        self._limit_s, self._say = limit_s, say
        self._due = math.inf
        threading.Thread(target=self._run, name="watch", daemon=True).start()

    def step(self) -> None:
        """The loop has come round."""
        self._due = time.monotonic() + self._limit_s

    def pause(self) -> None:
        """Until the next step time does not count: storage, which has a patience of its own, may be slow."""
        self._due = math.inf

    def _run(self) -> None:
        while time.monotonic() < self._due:
            time.sleep(min(1.0, self._limit_s / 10))
        # To whom it is said may be what does not answer.
        saying = threading.Thread(target=self._say, args=(stacks(),), daemon=True)
        saying.start()
        saying.join(timeout=10)
        os._exit(70)  # the loop is stuck in a call that no exception reaches


def stacks() -> str:
    """Return where each thread of this process stands, in the form of faulthandler."""
    with tempfile.TemporaryFile("w+") as file:
        faulthandler.dump_traceback(file, all_threads=True)
        file.seek(0)
        return file.read()
