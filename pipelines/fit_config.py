"""How ε_θ is trained, as a user says it."""

import math
from dataclasses import dataclass, field

from models.ema import EMAConfig
from models.objective import ObjectiveConfig
from models.timesteps import TimestepConfig
from pipelines.errors import ConfigurationError


@dataclass(frozen=True, kw_only=True)
class FitConfig:
    """How ε_θ is trained."""

    images: int = 204_800
    """Length of the run, in images; a multiple of batch_images. Raise it and run again to train on."""
    batch_images: int = 128
    """B, the images behind one step of the optimizer, over all workers."""
    micro_images: int = 64
    """b, the images that one worker computes at once; B must be a multiple of b times the workers."""
    learning_rate: float = 2e-3
    """Of AdamW, after the warm-up."""
    warm_up_images: int = 10_000
    """Images over which the learning rate rises from 0."""
    weight_decay: float = 0.0
    """Of AdamW."""
    clip_norm: float = 1.0
    """Largest norm of the gradient; longer ones are shortened to it."""
    flip: bool = False
    """Mirror half of the images, left to right."""
    label_dropout: float = 0.1
    """Share of the images whose label the network is not told, so that it learns both; for network.labels."""
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    timesteps: TimestepConfig = field(default_factory=TimestepConfig)
    ema: EMAConfig = field(default_factory=EMAConfig)
    log_images: int = 12_800
    """Images between two reports; a multiple of batch_images."""
    checkpoint_images: int = 51_200
    """Images between two checkpoints, a multiple of batch_images: what a crash can cost."""
    grid_images: int = 51_200
    """Images between two sample grids; a multiple of batch_images."""

    def __post_init__(self) -> None:
        for name in ("images", "batch_images", "micro_images", "log_images", "checkpoint_images", "grid_images"):
            if getattr(self, name) < 1:
                raise ConfigurationError(f"fit.{name} is {getattr(self, name)}; it must be at least 1")
        for name in ("images", "log_images", "checkpoint_images", "grid_images"):
            value = getattr(self, name)
            if value % self.batch_images:
                near = max(round(value / self.batch_images), 1) * self.batch_images
                raise ConfigurationError(
                    f"fit.{name} is {value}; it must be a multiple of fit.batch_images, which is {self.batch_images}: "
                    f"try {near}"
                )
        if self.checkpoint_images % self.log_images:
            near = max(round(self.checkpoint_images / self.log_images), 1) * self.log_images
            raise ConfigurationError(
                f"fit.checkpoint_images is {self.checkpoint_images}; it must be a multiple of fit.log_images, which is "
                f"{self.log_images}, so that the reports are the same after a resume: try {near}"
            )
        if self.batch_images % self.micro_images:
            raise ConfigurationError(
                f"fit.micro_images is {self.micro_images}; it must divide fit.batch_images, which is "
                f"{self.batch_images}: try {math.gcd(self.batch_images, self.micro_images)}"
            )
        for name, low in (("learning_rate", 0.0), ("clip_norm", 0.0)):
            if not getattr(self, name) > low:
                raise ConfigurationError(f"fit.{name} is {getattr(self, name)}; it must be positive")
        for name in ("warm_up_images", "weight_decay"):
            if not getattr(self, name) >= 0:
                raise ConfigurationError(f"fit.{name} is {getattr(self, name)}; it must not be negative")
        tiny = self.objective.loss == "reconstruction" or self.objective.weight == "article"
        if tiny and self.timesteps.kind == "loss-aware":
            raise ConfigurationError(
                "fit.timesteps.kind is loss-aware; with the article's weight most losses are too small to be told "
                "from 0: take fit.timesteps.kind stratified, or fit.objective.weight simple"
            )
        if not 0 <= self.label_dropout <= 1:
            raise ConfigurationError(f"fit.label_dropout is {self.label_dropout}; it must lie in 0..1: try 0.1")

    def check_workers(self, workers: int) -> None:
        """Raise ConfigurationError unless the workers divide the batch into whole micro-batches."""
        if self.batch_images % (self.micro_images * workers):
            fitting = [w for w in range(1, self.batch_images // self.micro_images + 1)
                       if self.batch_images // self.micro_images % w == 0]  # fmt: skip
            raise ConfigurationError(
                f"scaling.workers is {workers}; fit.batch_images = {self.batch_images} is "
                f"{self.batch_images // self.micro_images} micro-batches of fit.micro_images = {self.micro_images}, "
                f"which {workers} workers cannot share: take one of {fitting} workers, or other sizes"
            )
