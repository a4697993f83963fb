"""How ε_θ is trained, as a user says it."""

import math
from dataclasses import dataclass, field
from typing import Literal, TypeAlias

from models.choice import check_choice
from models.ema import EMAConfig
from models.objective import ObjectiveConfig
from models.timesteps import TimestepConfig
from pipelines.errors import ConfigurationError

NotFinite: TypeAlias = Literal["stop", "skip"]


@dataclass(frozen=True, kw_only=True)
class FitConfig:
    """How ε_θ is trained."""

    images: int = 204_800
    """Length of the run, in images; a multiple of batch_images. Raise it and run again to train on."""
    batch_images: int = 128
    """B, the images behind one step of the optimizer, over all workers."""
    micro_images: int = 64
    """b, the images that one worker computes at once; it divides B, and there are at most B/b workers."""
    learning_rate: float = 2e-3
    """Of AdamW, after the warm-up."""
    warm_up_images: int = 10_000
    """Images over which the learning rate rises from 0."""
    decay_images: int = 0
    """The position at which the learning rate has come down to 0, along half a cosine from the end of the warm-up on;
    0: it stays."""
    weight_decay: float = 0.0
    """Of AdamW."""
    clip_norm: float = 1.0
    """Largest norm of the gradient; longer ones are shortened to it."""
    not_finite: NotFinite = "stop"
    """What a gradient that is not finite does: end the job before the optimizer moves, naming the positions of the
    batch; or skip that batch, though never ten in a row."""
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
    """Images between two checkpoints; a multiple of batch_images: what a crash can cost, and what is trained while
    a checkpoint is on its way."""
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
        if self.batch_images % self.micro_images:
            near = max(n for n in range(1, self.micro_images + 1) if self.batch_images % n == 0)
            raise ConfigurationError(
                f"fit.micro_images is {self.micro_images}; it must divide fit.batch_images, which is "
                f"{self.batch_images}: try {near}"
            )
        self._check_rate()
        check_choice("fit.not_finite", self.not_finite, NotFinite)
        tiny = self.objective.loss == "reconstruction" or self.objective.weight == "article"
        if tiny and self.timesteps.kind == "loss-aware":
            raise ConfigurationError(
                "fit.timesteps.kind is loss-aware; with the article's weight most losses are too small to be told "
                "from 0: take fit.timesteps.kind stratified, or fit.objective.weight simple"
            )
        if not 0 <= self.label_dropout <= 1:
            raise ConfigurationError(f"fit.label_dropout is {self.label_dropout}; it must lie in 0..1: try 0.1")

    def _check_rate(self) -> None:
        for name, low in (("learning_rate", 0.0), ("clip_norm", 0.0)):
            if not getattr(self, name) > low:
                raise ConfigurationError(f"fit.{name} is {getattr(self, name)}; it must be positive")
        for name in ("warm_up_images", "weight_decay"):
            if not getattr(self, name) >= 0:
                raise ConfigurationError(f"fit.{name} is {getattr(self, name)}; it must not be negative")
        if self.decay_images and not self.warm_up_images < self.decay_images:
            raise ConfigurationError(
                f"fit.decay_images is {self.decay_images}; it must be above fit.warm_up_images, which is "
                f"{self.warm_up_images}: try {self.images}, or 0 for a learning rate that stays"
            )
        if self.decay_images and self.images > self.decay_images:
            raise ConfigurationError(
                f"fit.images is {self.images} and fit.decay_images {self.decay_images}, from where on the learning "
                f"rate is 0: it must reach as far, {self.images} or more, in a run that begins so"
            )

    @property
    def micro_batches(self) -> int:
        """B/b, of a global batch."""
        return self.batch_images // self.micro_images

    def learning_rate_at(self, position: int) -> float:
        """Return the learning rate of the step that leads to a position, in images."""
        if position < self.warm_up_images:
            return self.learning_rate * position / self.warm_up_images
        if not self.decay_images:
            return self.learning_rate
        progress = (position - self.warm_up_images) / (self.decay_images - self.warm_up_images)
        return self.learning_rate * (1 + math.cos(math.pi * min(progress, 1.0))) / 2

    def check_workers(self, workers: int) -> None:
        """Raise ConfigurationError unless each worker has a micro-batch of each global batch."""
        if workers > self.micro_batches:
            raise ConfigurationError(
                f"scaling.workers is {workers}; fit.batch_images = {self.batch_images} is {self.micro_batches} "
                f"micro-batches of fit.micro_images = {self.micro_images}, and each worker must have one: take "
                f"{self.micro_batches} workers at most, or a smaller fit.micro_images"
            )

    def idle_share(self, workers: int) -> float:
        """Return the part of the workers' time that they wait since W does not divide B/b."""
        rounds = -(-self.micro_batches // workers)
        return 1 - self.micro_batches / (rounds * workers)
