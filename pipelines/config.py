"""What each job is asked to do: the owners' configurations, composed.

Order: preset < ``--config file.yaml`` < flags. The resolved configuration is printed, kept with the run as YAML and
logged; handing that file back with ``--config`` repeats the run.
"""

import math
import re
from dataclasses import dataclass, field, replace
from typing import Literal

from models.network import NetworkConfig
from models.parallelize import ParallelConfig
from models.schedule import ScheduleConfig
from pipelines.cluster import node_labels
from pipelines.draw_config import DrawConfig, check_steps
from pipelines.errors import ConfigurationError, checked
from pipelines.fit_config import FitConfig
from pipelines.images import View
from pipelines.ingest_plan import IngestConfig
from pipelines.scaling import ScalingConfig
from pipelines.sizing_config import SizingConfig
from pipelines.storage import Folder, settled
from pipelines.tracking_config import TrackingConfig


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Where the images are and how thoroughly they are shuffled."""

    url: str = ""
    """A data set that jobs/ingest.py made, or a folder of raw images, which is then ingested first."""
    builtin: Literal["none", "digits"] = "none"
    """Real images that come with the installation, written out as PNG files; with a url of your own, say none."""
    side: int = 0
    """Height and width of the training images, in pixels; 0: as the data set has them, or data.ingest.side."""
    zoom: float = 1.0
    """The short side of a picture is made zoom · side pixels long, and a square of side pixels is cut out of it."""
    crop: Literal["center", "random"] = "center"
    """Where the square is cut: in the middle, or anew each time that the picture is seen."""
    window_bytes: int = 64 << 20
    """Images that are shuffled into each other, and that one task reads, in bytes as they are stored; rounded down to a
    power of two of batches, and at most 8192 images."""
    held_out: int = 0
    """Images that are kept from training, spread evenly over the data set: their loss, at the t and ε that each has in
    all runs, is measured beside training at each checkpoint. They are held in memory as pixels."""
    keep_gb: float = 0.0
    """Gigabytes of each node's disk, below TMPDIR, for what was read of the shards of a data set in object storage, so
    that later epochs need not fetch it again; what does not fit is fetched each time."""
    node_labels: tuple[str, ...] = ()
    """Ray's labels, KEY=VALUE, of the nodes that ingest, read and decode, such as CPU-only ones; none: any
    node."""
    ingest: IngestConfig = field(default_factory=IngestConfig)

    def __post_init__(self) -> None:
        if self.url and self.builtin != "none":
            raise ConfigurationError(
                f"data.url is {self.url} and data.builtin is {self.builtin}; only one can be: add --data.builtin none"
            )
        if self.side < 0 or self.side > 4096:
            raise ConfigurationError(f"data.side is {self.side}; it must lie in 0..4096 pixels: try 0")
        if not 1 <= self.zoom <= 8:
            raise ConfigurationError(f"data.zoom is {self.zoom}; it must lie in 1..8: try 1.125")
        if self.window_bytes < 1:
            raise ConfigurationError(f"data.window_bytes is {self.window_bytes}; it must be at least 1: try 67108864")
        if not self.keep_gb >= 0:
            raise ConfigurationError(f"data.keep_gb is {self.keep_gb}; it must not be negative: try 100, or 0")
        self.wanted_labels  # noqa: B018  (it checks)
        if self.held_out < 0:
            raise ConfigurationError(f"data.held_out is {self.held_out}; it must not be negative: try 1000, or 0")

    @property
    def wanted_labels(self) -> dict[str, str]:
        """`node_labels` by key."""
        return node_labels("data.node_labels", self.node_labels)

    def check_rows(self, rows: int) -> None:
        """Raise ConfigurationError unless a data set of as many rows has more than are held out."""
        if self.held_out >= rows:
            raise ConfigurationError(
                f"data.held_out is {self.held_out}; it must be less than the images of the data set, which are {rows}: "
                f"try {rows // 20}"
            )

    def view(self, side: int, channels: Literal[1, 3]) -> View:
        """Return how training sees the pictures of a data set of this side (0: each has its own) and channels.

        Raises:
            ConfigurationError: if it is not said how large they are to be.
        """
        if not (self.side or side):
            raise ConfigurationError(
                "data.side is 0, and the pictures of the data set have sizes of their own: give the side, in pixels, "
                "to train at, such as --data.side 64"
            )
        seen = self.side or side
        if side and seen * self.zoom > side:
            raise ConfigurationError(
                f"data.side is {seen} and data.zoom {self.zoom}; the data set has pictures of {side} pixels, which is "
                f"less than the product: ingest with a side of {math.ceil(seen * self.zoom)} or more (ingest.side; "
                "data.ingest.side in a training job), or take a smaller data.side or data.zoom"
            )
        if side and self.crop == "random" and self.zoom == 1:
            raise ConfigurationError(
                "data.crop is random and data.zoom 1; of square pictures nothing is left over to cut from then: take "
                f"data.zoom 1.125 and a data.side of at most {int(side / 1.125)}, or data.crop center"
            )
        return View(side=seen, channels=channels, zoom=self.zoom)


@dataclass(frozen=True, kw_only=True)
class TrainJob:
    """Train ε_θ on images, then draw samples from it and score them."""

    name: str = "run"
    """The run's name: its folder below the root, and its name in MLflow."""
    root: str = "~/brickyard"
    """Folder or URL below which everything is kept: data sets, runs, samples."""
    seed: int = 0
    """Everything that the run draws is a function of this and of positions."""
    data: DataConfig = field(default_factory=DataConfig)
    network: NetworkConfig = field(default_factory=NetworkConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    fit: FitConfig = field(default_factory=FitConfig)
    scaling: ScalingConfig = field(default_factory=ScalingConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    tracking: TrackingConfig = field(default_factory=TrackingConfig)
    evaluate_images: int = 0
    """Samples to draw and to score at the end; 0 for none."""
    draw: DrawConfig = field(default_factory=DrawConfig)
    keep_checkpoints: int = 3
    """Checkpoints that are kept, the newest."""
    sizing: SizingConfig = field(default_factory=SizingConfig)

    def __post_init__(self) -> None:
        object.__setattr__(self, "root", settled(self.root))
        object.__setattr__(self, "data", replace(self.data, url=settled(self.data.url)))
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", self.name):
            raise ConfigurationError(
                f"name is {self.name!r}; it becomes a folder: letters, digits, '.', '_' and '-', such as digits-2"
            )
        if not self.data.url and self.data.builtin == "none":
            raise ConfigurationError(
                "data.url is empty: give --data.url s3://bucket/images (or file:/folder), or start from the preset "
                "`digits`, which brings its own images"
            )
        if self.keep_checkpoints < 1:
            raise ConfigurationError(f"keep_checkpoints is {self.keep_checkpoints}; it must be at least 1")
        if self.evaluate_images < 0 or self.evaluate_images == 1:
            raise ConfigurationError(f"evaluate_images is {self.evaluate_images}; it must be 0, or at least 2")
        self.fit.check_workers(self.scaling.workers)
        check_steps(self.draw, self.schedule)
        if self.scaling.min_workers and self.parallel.strategy == "hybrid":
            raise ConfigurationError(
                f"scaling.min_workers is {self.scaling.min_workers} and parallel.strategy hybrid, of which the workers "
                "must be a multiple of parallel.shards: take parallel.strategy fsdp, or scaling.min_workers 0"
            )
        with checked():
            self.parallel.check_workers(self.scaling.workers)
            self.fit.objective.check_schedule(self.schedule.zero_terminal_snr)
            self.fit.timesteps.check_schedule(self.schedule.tables())
        if self.draw.ema_std and not self.fit.ema.power_stds:
            raise ConfigurationError(
                f"draw.ema_std is {self.draw.ema_std}; it is made of snapshots: add --fit.ema.power-stds 0.05 0.1"
            )
        if (self.draw.label or self.draw.guidance != 1) and not self.network.labels:
            asked = f"label is {self.draw.label!r}" if self.draw.label else f"guidance is {self.draw.guidance}"
            raise ConfigurationError(f"draw.{asked}; that needs a network that learns labels: add --network.labels")
        if self.draw.guidance not in (0, 1) and self.fit.label_dropout == 0:
            raise ConfigurationError(
                f"draw.guidance is {self.draw.guidance} and fit.label_dropout 0; guidance needs a network that was "
                "also trained without labels: try --fit.label-dropout 0.1"
            )
        if self.draw.label and self.evaluate_images:
            raise ConfigurationError(
                f"draw.label is {self.draw.label!r} and evaluate_images {self.evaluate_images}; samples of one label "
                "cannot be scored against all images: add --evaluate-images 0, and draw with jobs/sample.py"
            )

    @property
    def run(self) -> Folder:
        return Folder(self.root) / "runs" / self.name
