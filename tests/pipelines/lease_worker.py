"""One who wants a lease, as a process of its own: what a test starts several of, stops and kills.

python lease_worker.py count FOLDER LEASE_S     adds 1 to a number, in a way that two at once would spoil
python lease_worker.py leave FOLDER LEASE_S     the same, unless another holds the lease
python lease_worker.py commit FOLDER LEASE_S    commits at each line of stdin, until one says `end`

It says on stdout what it did, a line each.
"""

import sys
import time

from pipelines.errors import TryAgainError
from pipelines.lease import Lease, hold
from pipelines.storage import Folder


def main(how: str, url: str, lease_s: str) -> int:
    folder = Folder(url)
    with hold(folder / "lease", float(lease_s), 0 if how == "leave" else float("inf"), how) as lease:
        if lease is None:
            say("held")
            return 0
        say("holds", lease.fence.number)
        try:
            commit(folder, lease) if how == "commit" else count(folder, lease)
        except TryAgainError as error:
            say("lost", error)
            return 75
    return 0


def say(*words: object) -> None:
    sys.stdout.write(f"{' '.join(map(str, words))}\n")
    sys.stdout.flush()


def count(folder: Folder, lease: Lease) -> None:
    lease.check()
    before = int(folder.get("count")) if folder.exists("count") else 0
    time.sleep(0.2)
    lease.check()
    folder.put("count", str(before + 1).encode())


def commit(folder: Folder, lease: Lease) -> None:
    for line in sys.stdin:
        if line.strip() == "end":
            return
        lease.check()
        folder.put(f"commit-{time.monotonic_ns():020d}", str(lease.fence.number).encode())
        say("committed")


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
