"""What a trace is asked for."""

from dataclasses import dataclass, field

from pipelines.errors import ConfigurationError
from pipelines.tracking_config import TrackingConfig


@dataclass(frozen=True, kw_only=True)
class TraceJob:
    """Find out where an image comes from: seed, sampler, checkpoint, MLflow run, data and git revision."""

    image: str
    """A PNG, or the shard of a set of samples (part-000042.parquet) with --seed; on the command line it may be given
    without this flag."""
    seed: int = -1
    """Which sample of a shard; -1: the image is a PNG."""
    samples: str = ""
    """A folder of jobs/sample.py to look for the image in, by its pixels: for a PNG that carries no lineage, or to
    prove what it carries."""
    redraw: bool = False
    """Draw the seed again from the checkpoint, as it was drawn, and say whether the pixels are the same."""
    checkpoint: str = ""
    """Where the checkpoint lies now; empty: where the lineage says. To redraw a PNG that was not found in samples, or
    from a shard of no finished set, it must be said: to load weights from where a stranger says is not safe."""
    use_gpu: bool = False
    """Redraw on a GPU, for a sample that was drawn on one."""
    tracking: TrackingConfig = field(default_factory=TrackingConfig)

    def __post_init__(self) -> None:
        if not self.image:
            raise ConfigurationError("image is empty: give a PNG, or part-000000.parquet with --seed 0")
        is_shard = self.image.endswith(".parquet")
        if is_shard and self.seed < 0:
            raise ConfigurationError(f"seed is {self.seed}; {self.image} holds many samples: say which by --seed 0")
        if is_shard and self.samples:
            raise ConfigurationError(
                f"samples is {self.samples} and image {self.image}, which is in a set of its own: drop --samples"
            )
        if not is_shard and self.seed >= 0:
            raise ConfigurationError(f"seed is {self.seed}; it is for a shard (.parquet), and image is {self.image}")
