"""What a dry run reckons with, as a user says it."""

from dataclasses import dataclass

from pipelines.errors import ConfigurationError


@dataclass(frozen=True, kw_only=True)
class SizingConfig:
    """What --dry-run reckons with. Nothing that a run does or is depends on it."""

    images_per_s_per_worker: float = 0.0
    """Images that a worker trains on in a second, as a short run of the same network, micro-batch and kind of machine
    reports it (images_per_s_per_worker in MLflow); 0: not known."""
    measure_steps: int = 0
    """Steps of one worker, on made-up images, that a dry run times on this machine to find that out; 0: none."""
    price_per_hour: float = 0.0
    """Price of a worker's hour, such as that of a GPU with its share of the machine, in any currency; 0: not known."""

    def __post_init__(self) -> None:
        for name in ("images_per_s_per_worker", "measure_steps", "price_per_hour"):
            if not getattr(self, name) >= 0:
                raise ConfigurationError(f"sizing.{name} is {getattr(self, name)}; it must not be negative: try 0")
        if self.images_per_s_per_worker and self.measure_steps:
            raise ConfigurationError(
                f"sizing.images_per_s_per_worker is {self.images_per_s_per_worker} and sizing.measure_steps "
                f"{self.measure_steps}; it is either known or measured: set one of them to 0"
            )
