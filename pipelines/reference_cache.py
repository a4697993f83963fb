"""Statistics of a set of pictures, kept for the next time that something is held against it."""

import hashlib
import io
import json
import logging
from typing import Any

import numpy as np

from pipelines.errors import BrickyardError
from pipelines.moments import Moments
from pipelines.storage import Folder

FOLDER = "statistics"
FORM = 1
"""Of what is kept; another form has other names."""

log = logging.getLogger("brickyard.scoring")


class ReferenceCache:
    """The moments of one set, by what they depend on. No failure of it is one of the job."""

    def __init__(self, folder: Folder | None, about: dict[str, Any]) -> None:
        """Keep nothing where there is no folder. ``about`` is all that the statistics are a function of."""
        self.folder = folder
        self.about = json.dumps({**about, "form": FORM}, sort_keys=True)
        self.name = f"{hashlib.sha256(self.about.encode()).hexdigest()[:24]}.npz"

    def load(self) -> list[Moments] | None:
        """Return what was kept, if anything was and it is whole."""
        if not self.folder:
            return None
        try:
            if not self.folder.exists(self.name):
                return None
            with np.load(io.BytesIO(self.folder.get(self.name)), allow_pickle=False) as kept:
                # To read a member to its end is to check the sum that zip keeps of it.
                about, n, sums, outer = (kept[name] for name in ("about", "n", "sum", "outer"))
            if about.tobytes().decode() != self.about:
                raise ValueError("it is of another set")
            return [Moments(int(a), b, c) for a, b, c in zip(n, sums, outer, strict=True)]
        except Exception as error:  # a flipped bit makes zip and numpy raise whatever they have
            log.warning("the statistics in %s/%s are not used, but made anew: %s", self.folder.url, self.name, error)
            return None

    def save(self, moments: list[Moments]) -> None:
        """Keep statistics, whole or not at all."""
        if not self.folder:
            return
        buffer = io.BytesIO()
        np.savez(
            buffer,
            about=np.frombuffer(self.about.encode(), np.uint8),
            n=np.array([one.n for one in moments]),
            sum=np.stack([one.sum for one in moments]),
            outer=np.stack([one.outer for one in moments]),
        )
        try:
            self.folder.put(self.name, buffer.getvalue())
        except BrickyardError as error:
            log.warning("the statistics of the reference are not kept, so the next score makes them anew: %s", error)
