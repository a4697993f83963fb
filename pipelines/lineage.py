"""Where things come from: the revision of the code, and the network behind a checkpoint."""

import json
import os
import platform
import subprocess
from dataclasses import dataclass
from functools import cached_property
from importlib import metadata
from pathlib import Path

import torch
from torch import Tensor, nn

from models.init import empty
from models.network import EpsNetwork, NetworkConfig, build
from models.objective import EpsTheta, ObjectiveConfig, Target, as_eps
from models.samplers import guided
from models.schedule import Schedule, ScheduleConfig
from pipelines import checkpoints, exchange, exports, snapshots
from pipelines.checkpoint_manifest import Checkpoint
from pipelines.errors import ConfigurationError, DataError
from pipelines.images import View
from pipelines.plain import from_dict
from pipelines.storage import Folder


def git_revision() -> str:
    """Return the revision of this code, with ``+`` if it was changed since.

    Outside of a checkout, as where ``ray job submit`` brings the code, it is what ``BRICKYARD_GIT_REVISION`` says.
    """
    if said := os.environ.get("BRICKYARD_GIT_REVISION"):
        return said
    here = Path(__file__).parent
    try:
        answer = subprocess.run(
            ["git", "describe", "--always", "--abbrev=40", "--dirty=+"],
            cwd=here, capture_output=True, text=True, timeout=10, check=True,
        )  # fmt: skip
    except (OSError, subprocess.SubprocessError):
        return ""
    return answer.stdout.strip()


def ray_job() -> str:
    """Return the id of the job that this process was submitted to Ray as, or an empty string."""
    told = json.loads(os.environ.get("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}"))  # so Ray 2.60 tells the entrypoint
    return str((told.get("metadata") or {}).get("job_submission_id", ""))


def installed() -> str:
    """Return the distributions that are installed here and their versions, as pip takes them, a line each."""
    found = {f"{one.metadata['Name']}=={one.version}" for one in metadata.distributions()}
    return "".join(f"{line}\n" for line in [f"# Python {platform.python_version()}", *sorted(found, key=str.lower)])


@dataclass(frozen=True)
class Trained:
    """A checkpoint, found and verified."""

    folder: Folder
    checkpoint: Checkpoint

    @staticmethod
    def find(url: str) -> "Trained":
        """Find the newest valid checkpoint of a run's folder, the one whose own folder this is, an export, or a
        DDPMPipeline.

        Raises:
            DataError: if there is none, or if the one that is named is damaged.
        """
        folder = Folder(url)
        if folder.exists(checkpoints.MANIFEST):
            return Trained(folder, checkpoints.read_verified(folder))
        if export := exports.read(folder):
            return Exported(folder, *export)
        if folder.exists(exchange.INDEX):
            return Imported(folder, exchange.read_pipeline(folder))
        if found := checkpoints.newest(folder):
            return Trained(*found)
        raise DataError(
            f"{folder.url} holds no valid checkpoint; give the folder of a run of jobs/train.py, of one checkpoint, "
            "of an export, or of a DDPMPipeline"
        )

    @property
    def digest(self) -> str:
        """Names these weights in every lineage."""
        return self.checkpoint.digest

    def schedule(self) -> Schedule:
        """Return the whole schedule that the network was trained on."""
        return self._tables

    @cached_property
    def _tables(self) -> Schedule:
        return from_dict(ScheduleConfig, self.checkpoint.config["schedule"], self.folder.url).tables()

    @property
    def target(self) -> Target:
        """What the network puts out."""
        objective = self.checkpoint.config["fit"]["objective"]
        return from_dict(ObjectiveConfig, objective, self.folder.url).target

    @property
    def labels(self) -> list[str]:
        """The labels that the network knows."""
        return self.checkpoint.labels if self._network_config.labels else []

    @property
    def view(self) -> View:
        """How the network saw the pictures that it was trained on."""
        channels, side, _ = self.checkpoint.shape
        return View(side=side, channels=channels, zoom=self.checkpoint.config.get("data", {}).get("zoom", 1.0))  # type: ignore[arg-type]

    @property
    def _network_config(self) -> NetworkConfig:
        return from_dict(NetworkConfig, self.checkpoint.config["network"], self.folder.url)

    def eps_theta(self, network: EpsNetwork, label: Tensor, guidance: float) -> EpsTheta:
        """Return the ε̂ of a network for pictures of the given labels, int64 [B]."""
        told = guided(network, label, guidance) if self.labels else network
        return as_eps(told, self.target, self.schedule().to(label.device))

    def network(self, averaged: bool, std: float = 0.0) -> EpsNetwork:
        """Return the network with the weights of the checkpoint, or their average, ready to evaluate on the CPU.

        With ``std``, the average is the power-function one of this width, made of the run's snapshots.

        Raises:
            ConfigurationError: if the run left no snapshots for it.
            DataError: if a file is missing or is not what was committed.
        """
        channels, height, _ = self.checkpoint.shape
        model = empty(lambda: build(self._network_config, channels, height, len(self.checkpoint.labels)))
        model = model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self._fill(model, averaged, std)
        return model.requires_grad_(False).eval()  # type: ignore[no-any-return]

    def _fill(self, model: nn.Module, averaged: bool, std: float) -> None:
        if std:
            run = Folder(self.folder.url.rpartition("/")[0])
            names, position = self.checkpoint.snapshots, self.checkpoint.position
            model.load_state_dict(snapshots.average(run, names, position, std))
        else:
            checkpoints.load_weights(self.folder, self.checkpoint, model, averaged)


class Imported(Trained):
    """A network that came from elsewhere, with one set of weights."""

    def _fill(self, model: nn.Module, averaged: bool, std: float) -> None:
        if std:
            raise ConfigurationError(f"draw.ema_std is {std}; {self.folder.url} came without snapshots: leave it at 0")
        model.load_state_dict(exchange.read_pipeline_weights(self.folder, self.checkpoint))


@dataclass(frozen=True)
class Exported(Trained):
    """What a run has exported: its last weights and their average, or the average alone, as MLflow keeps it."""

    checkpoint_digest: str

    @property
    def digest(self) -> str:
        return self.checkpoint_digest

    def _fill(self, model: nn.Module, averaged: bool, std: float) -> None:
        if std:
            raise ConfigurationError(f"draw.ema_std is {std}; {self.folder.url} came without snapshots: leave it at 0")
        model.load_state_dict(exports.read_weights(self.folder, self.checkpoint, averaged))
