"""What the folder of a run says about itself: which run it is, and how each of its starts was configured."""

import json
import uuid
from typing import Any

from pipelines.errors import DataError
from pipelines.storage import Folder

RUN = "run.json"
"""Written once, by whoever is first."""


def claim(folder: Folder, identity: dict[str, Any]) -> bool:
    """Write down what a run is, with an id that no other run has. Return whether this call did: it is done once."""
    return folder.create(RUN, json.dumps({"id": uuid.uuid4().hex, "identity": identity}, indent=1).encode())


def run_id(folder: Folder) -> str:
    """Return our own id of a run, by which it is known wherever it is recorded."""
    return str(_about(folder)["id"])


def identity(folder: Folder) -> dict[str, Any]:
    """Return what makes the run the run that it is, as its first start has written it down."""
    return dict(_about(folder)["identity"])


def count_start(folder: Folder, config: str) -> int:
    """Keep the configuration of a start, as ``start-0001.yaml``; return which start this is, from 1.

    No two starts have one number, even of two that begin at once.
    """
    start = 1 + sum(name.startswith("start-") for name in folder.names())
    while not folder.create(f"start-{start:04d}.yaml", config.encode()):
        start += 1
    return start


def check_whole(folder: Folder, claim: str, begins: tuple[str, ...], flag: str) -> None:
    """Check that a folder, of a run or of samples, says what it is of if it has anything.

    Args:
        folder: the folder.
        claim: the file that says it.
        begins: how the names begin of what would else be taken for anything.
        flag: which names another folder.

    Raises:
        DataError: if it does not say it.
    """
    names = folder.names()
    left = next((name for name in names if name.startswith(begins)), "")
    if left and claim not in names:
        raise DataError(
            f"{folder.url} holds {left} and no {claim}, so nothing says what that is of: the folder was deleted, or "
            f"copied, in part. Delete the rest, bring {claim} back, or give another {flag}"
        )


def _about(folder: Folder) -> dict[str, Any]:
    return dict(json.loads(folder.get(RUN)))
