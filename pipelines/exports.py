"""The ``export/`` of a run, part of which MLflow keeps too: weights as safetensors, and what they are as JSON."""

import hashlib
import json

import safetensors.torch
from pydantic import TypeAdapter, ValidationError
from torch import Tensor

from pipelines.checkpoint_manifest import Checkpoint
from pipelines.entries import ABOUT
from pipelines.errors import DataError
from pipelines.storage import Folder

LAST, AVERAGE = "model.safetensors", "ema.safetensors"
"""The last weights, and their average."""

SEEN = ("zoom", "crop", "held_out")
"""Of a run's settings, what says which pictures the network saw, and how."""


def describe(checkpoint: Checkpoint, digest: str, files: dict[str, tuple[int, str]]) -> bytes:
    """Return what an export of a checkpoint says about itself; of each file the size and the sha256."""
    config = checkpoint.config
    about = {
        "network": config["network"],
        "schedule": config["schedule"],
        "target": config["fit"]["objective"]["target"],
        "shape": checkpoint.shape,
        "labels": checkpoint.labels if config["network"].get("labels") else [],
        "position": checkpoint.position,
        "checkpoint_digest": digest,
        "data_digest": checkpoint.data_digest,
        "data_url": checkpoint.data_url,
        **{name: value for name, value in config.get("data", {}).items() if name in SEEN},
        "flip": config["fit"].get("flip", False),
        "tracking_uri": checkpoint.tracking_uri,
        "tracking_run": checkpoint.tracking_run,
        "files": files,
    }
    return json.dumps(about, indent=1).encode()


def read(folder: Folder) -> tuple[Checkpoint, str] | None:
    """Return what an export says about itself as if it were a checkpoint, and the digest of the one it is of; None if
    the folder is none of ours.

    Raises:
        DataError: if it says what it cannot be.
    """
    if not folder.exists(ABOUT):
        return None
    try:
        about = json.loads(folder.get(ABOUT))
        if "checkpoint_digest" not in about:
            return None
        content = {
            "position": about["position"],
            "files": about.get("files", {}),  # of older ones it is not on record
            "config": {
                "network": about["network"],
                "schedule": about["schedule"],
                "fit": {"objective": {"target": about["target"]}}
                | ({"flip": about["flip"]} if "flip" in about else {}),  # older ones do not say
                "data": {"zoom": 1.0} | {name: about[name] for name in SEEN if name in about},
            },
            "shape": about["shape"],
            "labels": about["labels"],
            **{name: about.get(name, "") for name in ("data_digest", "data_url", "tracking_run", "git_revision")},
            "tracking_uri": about.get("tracking_uri", "none"),
        }
        return TypeAdapter(Checkpoint).validate_python(content), str(about["checkpoint_digest"])
    except (ValueError, KeyError, TypeError, ValidationError) as error:
        raise DataError(f"{folder.url}/{ABOUT} does not say what the export is: {error!r}") from error


def read_weights(folder: Folder, checkpoint: Checkpoint, averaged: bool) -> dict[str, Tensor]:
    """Return the weights of an export.

    Raises:
        DataError: if they are not there, or not what was exported.
    """
    name = AVERAGE if averaged else LAST
    if not averaged and not folder.exists(name):
        raise DataError(f"{folder.url} holds the average of the weights alone; take --draw.weights ema")
    data = folder.get(name)
    size, sha256 = checkpoint.files.get(name, (len(data), ""))
    if len(data) != size or (sha256 and hashlib.sha256(data).hexdigest() != sha256):
        raise DataError(f"{folder.url}/{name} is not what was exported: its sha256 differs")
    try:
        return safetensors.torch.load(data)
    except safetensors.SafetensorError as error:
        raise DataError(f"{folder.url}/{name} is damaged: {error}") from error
