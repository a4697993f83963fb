"""How samples are drawn."""

from dataclasses import dataclass
from functools import partial
from typing import Literal

from models.ema import check_std
from models.samplers import SAMPLERS, Sampler, ddim
from models.schedule import ScheduleConfig, Spacing
from pipelines.errors import ConfigurationError, checked

SamplerName = Literal["greedy", "random", "posterior", "ddim", "dpm-solver", "heun"]


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
    compile: bool = False
    """Draw with a compiled network (torch.compile): faster after a minute of compilation in each actor."""
    shard_images: int = 256
    """Seeds per file."""
    batch_images: int = 64
    """Samples that one actor draws at once."""
    actors: int = 2
    """Actors that draw side by side at most, one CPU (or GPU) each: as many as there is room for begin, and others when
    nodes join."""
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


def check_steps(draw: DrawConfig, schedule: ScheduleConfig) -> None:
    """Raise ConfigurationError unless the sampler has as many steps to take as it is asked for."""
    if draw.steps > schedule.T:
        raise ConfigurationError(f"draw.steps is {draw.steps}; it must be at most schedule.T, which is {schedule.T}")
