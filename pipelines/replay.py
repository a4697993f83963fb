"""What runs have recorded and no tracker has taken yet, delivered."""

import logging
import sqlite3
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from typing import Any

from pipelines import leftovers
from pipelines.delivery import Delivery
from pipelines.errors import ConfigurationError, DataError, TryAgainError
from pipelines.mlflow_door import check_trusted, recipient_of
from pipelines.run_folder import RUN, run_id
from pipelines.spool import Spool
from pipelines.storage import Folder

log = logging.getLogger("brickyard.tracking")


@dataclass(frozen=True, kw_only=True)
class ReplayJob:
    """Deliver what runs have recorded while their tracker was away. The next start of a run does so too."""

    runs: tuple[str, ...]
    """Folders of runs; on the command line they may be given without this flag."""
    patience_s: float = 30.0
    """How long to wait for a tracker that takes nothing, in seconds."""

    def __post_init__(self) -> None:
        if not self.runs:
            raise ConfigurationError("runs is empty; it must name folders of runs, such as yard/runs/digits")
        if not self.patience_s >= 0:
            raise ConfigurationError(f"patience_s is {self.patience_s}; it must not be negative: try 30")


def replay(job: ReplayJob) -> dict[str, Any]:
    """Deliver what the spools of the runs hold.

    Returns:
        How many entries were delivered, in all and by run.

    Raises:
        DataError: if a folder is not that of a run, or storage refuses.
        TryAgainError: if a tracker did not take all of it.
    """
    delivered: dict[str, int] = {}
    waiting: list[str] = []
    away: set[str] = set()
    for home in map(_run, job.runs):
        delivered[home.url] = 0
        for spool in _spools(home):
            held, uri = spool.entries(), spool.target.uri
            if not held:
                continue
            if uri in away:  # to wait for it once is enough
                waiting.append(f"{held} records of {home.url} for {uri}")
                continue
            log.info("%s: %d records for %s", home.url, held, uri)
            check_trusted(uri)
            delivery = Delivery(spool, recipient_of(spool.target, home))
            if not delivery.finish(job.patience_s):
                reason = "another process delivers them" if delivery.shared else "it did not take all of them"
                waiting.append(f"{spool.entries()} records of {home.url} for {uri}: {reason}")
                if not delivery.shared:
                    away.add(uri)
            delivered[home.url] += held - spool.entries()
    if waiting:
        raise TryAgainError(f"{'; '.join(waiting)}; run the same command later")
    return {"delivered": sum(delivered.values()), "runs": delivered}


def dry_run(job: ReplayJob) -> dict[str, Any]:
    """Return how many entries wait, having changed nothing."""
    waiting = {}
    for url in job.runs:
        home = _run(url)
        waiting[home.url] = leftovers.waiting(home, run_id(home))
    return {"dry_run": True, "waiting": sum(waiting.values()), "runs": waiting}


def _run(url: str) -> Folder:
    home = Folder(url)
    if not home.exists(RUN):
        raise DataError(
            f"{home.url} is not the folder of a run: it has no {RUN}; give one below ROOT/runs, or of samples"
        )
    return home


def _spools(home: Folder) -> Iterator[Spool]:
    """Yield the spools of a run, the oldest first."""
    yield from leftovers.brought(home)
    for path in leftovers.here(home, run_id(home)):
        try:
            with closing(Spool(path, None)) as spool:
                yield spool
        except (sqlite3.Error, ValueError) as error:  # damaged, or of another version: the others are none the worse
            log.warning("%s cannot be delivered: %s", path, error)
