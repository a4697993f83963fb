"""Networks that come and go: the ``export/`` of a run, which `diffusers` loads too, and pipelines of theirs as ours.

safetensors and JSON only.
"""

import hashlib
import json
import logging
from collections.abc import Mapping
from typing import Any

import safetensors
import safetensors.torch
from torch import Tensor

from models.interchange import (
    PREDICTION_TYPES,
    from_diffusers,
    from_scheduler_config,
    pipeline_index,
    scheduler_config,
    to_diffusers,
)
from models.network import NetworkConfig
from models.objective import ObjectiveConfig, Target
from models.schedule import Schedule, ScheduleConfig
from pipelines.checkpoint_manifest import Checkpoint
from pipelines.errors import DataError
from pipelines.plain import to_dict
from pipelines.storage import Folder

INDEX = "model_index.json"
UNET, UNET_WEIGHTS = "unet/config.json", "unet/diffusion_pytorch_model.safetensors"
SCHEDULER = "scheduler/scheduler_config.json"

log = logging.getLogger("brickyard.exchange")


def write_pipeline(
    folder: Folder,
    network: NetworkConfig,
    target: Target,
    about: Checkpoint,
    weights: Mapping[str, Tensor],
    tables: Schedule,
) -> bool:
    """Write a network as a folder that ``diffusers.DDPMPipeline.from_pretrained`` loads, if that can say what it is.

    A network that knows labels is loaded too, but ``DDPMPipeline`` itself asks for none: call its ``unet``.

    Returns:
        Whether it was written; if not, the log says why.
    """
    if network.kind != "unet" or target not in PREDICTION_TYPES:
        log.info(
            "export: not for diffusers' DDPMPipeline, which knows no network.kind %s with target %s",
            network.kind,
            target,
        )
        return False
    channels, side, _ = about.shape
    classes = len(about.labels) if network.labels else 0
    config, theirs = to_diffusers(network.unet, channels, side, classes, dict(weights))
    folder.put(UNET_WEIGHTS, safetensors.torch.save(theirs, metadata={"format": "pt"}))
    for name, content in (
        (UNET, config),
        (SCHEDULER, scheduler_config(tables, PREDICTION_TYPES[target])),
        (INDEX, pipeline_index()),  # last: it makes the folder a pipeline
    ):
        folder.put(name, json.dumps(content, indent=1).encode())
    return True


def read_pipeline(folder: Folder) -> Checkpoint:
    """Describe a ``DDPMPipeline`` of `diffusers` as if it were a checkpoint of a run at position 0.

    Raises:
        DataError: if it is not one, or not of a form that this package knows.
    """
    if not folder.exists(UNET_WEIGHTS):
        raise DataError(
            f"{folder.url}/{UNET_WEIGHTS} is missing; only safetensors are read: save the pipeline again with "
            "save_pretrained(folder, safe_serialization=True)"
        )
    files = {name: folder.get(name) for name in (UNET, SCHEDULER, UNET_WEIGHTS)}
    try:
        unet, channels, side, classes, _ = from_diffusers(
            json.loads(files[UNET]), safetensors.torch.load(files[UNET_WEIGHTS])
        )
        betas, prediction_type = from_scheduler_config(json.loads(files[SCHEDULER]))
        target = {theirs: ours for ours, theirs in PREDICTION_TYPES.items()}[prediction_type]
        schedule = ScheduleConfig(kind="given", T=len(betas), betas=betas)
    except (ValueError, TypeError, LookupError, AttributeError, safetensors.SafetensorError) as error:
        raise DataError(f"{folder.url} cannot be taken over: {type(error).__name__}: {error}") from error
    if classes:
        log.warning("%s: label %d of 0..%d is taken for `no label`", folder.url, classes, classes)
    config: dict[str, Any] = {
        "network": to_dict(NetworkConfig(unet=unet, labels=classes > 0)),
        "schedule": to_dict(schedule),
        "fit": {"objective": to_dict(ObjectiveConfig(target=target))},  # type: ignore[arg-type]
    }
    return Checkpoint(
        position=0,
        files={name: (len(data), hashlib.sha256(data).hexdigest()) for name, data in files.items()},
        config=config,
        data_digest="",
        data_url="",
        shape=(channels, side, side),
        labels=[str(i) for i in range(classes)],
        tracking_uri="none",
        tracking_run="",
        git_revision="",
    )


def read_pipeline_weights(folder: Folder, checkpoint: Checkpoint) -> dict[str, Tensor]:
    """Return the weights of a described pipeline under our names.

    Raises:
        DataError: if they are not the ones that were described.
    """
    files = {name: folder.get(name) for name in (UNET, UNET_WEIGHTS)}
    for name, data in files.items():
        if hashlib.sha256(data).hexdigest() != checkpoint.files[name][1]:
            raise DataError(f"{folder.url}/{name} has changed since the job began; run it again")
    return from_diffusers(json.loads(files[UNET]), safetensors.torch.load(files[UNET_WEIGHTS]))[-1]
