"""What each job is asked to do: the owners' configurations, composed.

Order: preset < ``--config file.yaml`` < flags. The resolved configuration is printed, kept with the run as YAML and
logged; handing that file back with ``--config`` repeats the run.
"""

import math
import re
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Literal

from models.ema import check_std
from models.network import NetworkConfig
from models.parallelize import ParallelConfig
from models.samplers import SAMPLERS, Sampler, ddim
from models.schedule import ScheduleConfig, Spacing
from pipelines.cluster import node_labels
from pipelines.errors import ConfigurationError, checked
from pipelines.fit_config import FitConfig
from pipelines.images import View
from pipelines.ingest_plan import IngestConfig
from pipelines.scaling import ScalingConfig
from pipelines.storage import Folder, settled
from pipelines.tracking_config import TrackingConfig

SamplerName = Literal["greedy", "random", "posterior", "ddim", "dpm-solver", "heun"]


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
class DrawConfig:
    """How samples are drawn. With the checkpoint and its seed, all that a sample depends on."""

    sampler: SamplerName = "dpm-solver"
    """The way from noise to a picture. Greedy runs to the mode: look at it, but do not score it."""
    steps: int = 20
    """Strides from noise to picture, at most the T of the schedule: evaluations of the network, of which heun takes two
    a stride and one in the last."""
    spacing: Spacing = "even"
    """Where the strides end: even in t; growing with t (rising, quadratic); or even in the log of the SNR."""
    eta: float = 0.0
    """Noise that ddim puts back: 0 for none, 1 for as much as posterior."""
    label: str = ""
    """Draw this label only. Empty: seed i has label i modulo their number, if the network knows labels."""
    guidance: float = 1.0
    """How far the label is exaggerated (classifier-free guidance); 1 for not at all."""
    clip: bool = True
    """Keep the picture that each prediction implies within the range of pixels."""
    weights: Literal["ema", "last"] = "ema"
    """The average of the weights along the run, or the last ones."""
    ema_std: float = 0.0
    """Width of a power-function average, made of what fit.ema.power_stds left; 0 for the average above."""
    shard_images: int = 256
    """Seeds per file."""
    batch_images: int = 64
    """Samples that one actor draws at once."""
    actors: int = 2
    """Actors that draw side by side, one CPU (or GPU) each."""
    use_gpu: bool = False
    """One GPU for each actor."""

    def __post_init__(self) -> None:
        assert self.sampler in SAMPLERS, self.sampler
        for name in ("steps", "shard_images", "batch_images", "actors"):
            if getattr(self, name) < 1:
                raise ConfigurationError(f"draw.{name} is {getattr(self, name)}; it must be at least 1")
        if not 0 <= self.eta <= 1:
            raise ConfigurationError(f"draw.eta is {self.eta}; it must lie in 0..1: try 0")
        if self.eta and self.sampler != "ddim":
            raise ConfigurationError(f"draw.eta is {self.eta} and draw.sampler {self.sampler}; only ddim takes an eta")
        if not self.guidance >= 0:
            raise ConfigurationError(f"draw.guidance is {self.guidance}; it must not be negative: try 1")
        if self.ema_std:
            with checked():
                check_std("draw.ema_std", self.ema_std)
        if self.ema_std and self.weights == "last":
            raise ConfigurationError(f"draw.ema_std is {self.ema_std} and draw.weights is last; take draw.weights ema")

    @property
    def evaluations(self) -> int:
        """Evaluations of the network for each sample; with guidance each is of twice the batch."""
        once = 2 * self.steps - 1 if self.sampler == "heun" else self.steps
        return once if self.guidance == 1 else 2 * once

    @property
    def walk(self) -> Sampler:
        """The sampler with its settings."""
        return partial(ddim, eta=self.eta) if self.sampler == "ddim" else SAMPLERS[self.sampler]


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


@dataclass(frozen=True, kw_only=True)
class SampleJob:
    """Draw one sample per seed, exactly once, into Parquet shards."""

    out: str
    """Folder or URL for the samples."""
    checkpoint: str = ""
    """A run's folder, for its newest checkpoint; the folder of one checkpoint; or a DDPMPipeline of diffusers."""
    seeds: str = "0-63"
    """The seeds, both ends included, such as 0-49999."""
    draw: DrawConfig = field(default_factory=DrawConfig)
    verify: bool = False
    """Draw nothing: prove that the folder holds each of its seeds once, as it was written."""

    def __post_init__(self) -> None:
        self.seed_range  # noqa: B018  (it checks)
        if not self.checkpoint and not self.verify:
            raise ConfigurationError("checkpoint is empty: give --checkpoint FOLDER of a run, or --verify")

    @property
    def seed_range(self) -> range:
        match = re.fullmatch(r"(\d+)-(\d+)", self.seeds)
        if not match or int(match[1]) > int(match[2]):
            raise ConfigurationError(f"seeds is {self.seeds!r}; it must be FIRST-LAST, such as 0-49999")
        return range(int(match[1]), int(match[2]) + 1)


def check_steps(draw: DrawConfig, schedule: ScheduleConfig) -> None:
    """Raise ConfigurationError unless the sampler has as many steps to take as it is asked for."""
    if draw.steps > schedule.T:
        raise ConfigurationError(f"draw.steps is {draw.steps}; it must be at most schedule.T, which is {schedule.T}")
