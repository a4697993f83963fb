"""What a process and all below it use, out of /proc: needs Linux, and no library in whatever environment it runs."""

import os
import time
from collections.abc import Callable
from pathlib import Path
from threading import Event, Thread

TICKS_PER_S = os.sysconf("SC_CLK_TCK")


def _stats() -> dict[int, list[str]]:
    """Return of each process what /proc says of it, from its state on."""
    stats = {}
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            try:
                stats[int(folder.name)] = (folder / "stat").read_text().rsplit(")", 1)[1].split()
            except OSError:  # it has just ended
                continue
    return stats


def _tree(root: int) -> dict[int, list[str]]:
    stats = _stats()
    children: dict[int, list[int]] = {}
    for process, stat in stats.items():
        children.setdefault(int(stat[1]), []).append(process)
    found, due = {}, [root]
    while due:
        process = due.pop()
        if process in stats:
            found[process] = stats[process]
            due += children.get(process, [])
    return found


def cpu_seconds(root: int) -> float:
    """Return the CPU time of a process and of all below it, those included that ended and were waited for."""
    return sum(int(ticks) for stat in _tree(root).values() for ticks in stat[11:15]) / TICKS_PER_S


def pss_bytes(root: int) -> int:
    """Return the proportional set sizes of a process and of all below it: a page that n of them share counts 1/n."""
    size = 0
    for process in _tree(root):
        try:
            lines = Path(f"/proc/{process}/smaps_rollup").read_text().splitlines()
        except OSError:
            continue
        size += sum(int(line.split()[1]) << 10 for line in lines if line.startswith("Pss:"))
    return size


class Watch:
    """Looks twice a second at what this process and all below it hold, and at something else, until its block ends."""

    def __init__(self, other: Callable[[], float] = lambda: 0.0) -> None:
        self.seen: list[tuple[float, int, float]] = []
        """When (by the monotonic clock), bytes, and the other."""
        self._other, self._done = other, Event()
        self._thread = Thread(target=self._look, daemon=True)

    @property
    def peak(self) -> int:
        """The most bytes that were seen."""
        return max((size for _, size, _ in self.seen), default=0)

    def __enter__(self) -> "Watch":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()

    def _look(self) -> None:
        while not self._done.wait(0.5):
            self.seen.append((time.monotonic(), pss_bytes(os.getpid()), self._other()))
