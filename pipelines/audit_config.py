"""What an audit is asked to do."""

from dataclasses import dataclass, field
from typing import Literal

from pipelines.errors import ConfigurationError
from pipelines.features import FeatureConfig
from pipelines.tracking_config import TrackingConfig


@dataclass(frozen=True, kw_only=True)
class AuditJob:
    """Look for copies of training images among samples, and for samples that are nearly alike."""

    samples: str
    """The folder of a finished jobs/sample.py."""
    reference: str = ""
    """The folder of a data set; empty for the one that the samples' network was trained on."""
    out: str = ""
    """Folder or URL for audit.json, audit.parquet and pairs.png; empty for that of the samples."""
    features: FeatureConfig = field(default_factory=FeatureConfig)
    neighbours: int = 50
    """k: how near a picture is to the data in general is its mean distance to its k nearest training images."""
    threshold: float = 0.333
    """A sample is a copy if its nearest training image is nearer than this share of that mean."""
    held_out: int = -1
    """Images of the data set that training held out (data.held_out); -1: as the checkpoint says."""
    control_images: int = 2000
    """Pictures that are judged in the same way as the samples, to compare with: images that were held out, or else
    training images, each as if it were not in the data; at most so many, and 0 for none."""
    mirrored: Literal["as-trained", "yes", "no"] = "as-trained"
    """Whether a mirror image of a training image counts as that image; as-trained: if the network was shown them."""
    pairs: int = 24
    """The closest pairs, sample beside training image, that pairs.png shows."""
    tracking: TrackingConfig = field(default_factory=TrackingConfig)

    def __post_init__(self) -> None:
        if not 2 <= self.neighbours <= 1000:
            raise ConfigurationError(f"neighbours is {self.neighbours}; it must lie in 2..1000: try 50")
        if not 0 < self.threshold < 1:
            raise ConfigurationError(f"threshold is {self.threshold}; it must lie between 0 and 1: try 0.333")
        if self.held_out < -1:
            raise ConfigurationError(
                f"held_out is {self.held_out}; it must not be negative, or -1 for what is on record"
            )
        if self.control_images < 0:
            raise ConfigurationError(f"control_images is {self.control_images}; it must not be negative: try 2000")
        if not 1 <= self.pairs <= 100:
            raise ConfigurationError(f"pairs is {self.pairs}; it must lie in 1..100: try 24")
