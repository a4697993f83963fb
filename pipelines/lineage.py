"""Where things come from: the revision of the code, and the network behind a checkpoint."""

import subprocess
from dataclasses import dataclass
from pathlib import Path

import torch

from models.init import empty
from models.schedule import Schedule, ScheduleConfig, article
from models.unet import UNet, UNetConfig
from pipelines import checkpoints
from pipelines.checkpoints import Checkpoint
from pipelines.config import from_dict
from pipelines.errors import DataError
from pipelines.storage import Folder


def git_revision() -> str:
    """Return the revision of this code, with ``+`` if it was changed since, or an empty string outside a checkout."""
    here = Path(__file__).parent
    try:
        answer = subprocess.run(
            ["git", "describe", "--always", "--abbrev=40", "--dirty=+"],
            cwd=here, capture_output=True, text=True, timeout=10, check=True,
        )  # fmt: skip
    except (OSError, subprocess.SubprocessError):
        return ""
    return answer.stdout.strip()


@dataclass(frozen=True)
class Trained:
    """A checkpoint, found and verified."""

    folder: Folder
    checkpoint: Checkpoint

    @staticmethod
    def find(url: str) -> "Trained":
        """Find the newest valid checkpoint of a run's folder, or the one whose own folder this is.

        Raises:
            DataError: if there is none, or if the one that is named is damaged.
        """
        folder = Folder(url)
        if folder.exists(checkpoints.MANIFEST):
            return Trained(folder, checkpoints.read_verified(folder))
        if found := checkpoints.newest(folder):
            return Trained(*found)
        raise DataError(
            f"{folder.url} holds no valid checkpoint; give the folder of a run of jobs/train.py, or of one checkpoint"
        )

    def schedule(self) -> Schedule:
        return schedule_of(from_dict(ScheduleConfig, self.checkpoint.config["schedule"], self.folder.url))

    def network(self, averaged: bool) -> UNet:
        """Return ε_θ with the weights of the checkpoint, or their average, ready to evaluate on the CPU."""
        config = from_dict(UNetConfig, self.checkpoint.config["network"], self.folder.url)
        channels, height, _ = self.checkpoint.shape
        model = empty(lambda: UNet(config, channels, height))
        model = model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        checkpoints.load_weights(self.folder, self.checkpoint, model, averaged)
        return model.requires_grad_(False).eval()  # type: ignore[no-any-return]


def schedule_of(config: ScheduleConfig) -> Schedule:
    """Return the tables of a configured schedule."""
    return article(config.T, config.rate)
