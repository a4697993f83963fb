"""What is measured between two sets of pictures, as a user says it."""

from dataclasses import dataclass, field
from typing import Literal, TypeAlias, get_args

from models.choice import check_choice
from pipelines.errors import ConfigurationError, checked
from pipelines.features import FeatureConfig
from pipelines.tracking_config import TrackingConfig, check_model_name

Metric: TypeAlias = Literal["frechet", "kid", "precision-recall", "density-coverage"]


@dataclass(frozen=True, kw_only=True)
class ScoreJob:
    """Measure how far two sets of pictures are apart: a set of samples or a data set each."""

    samples: str
    """The folder of a finished jobs/sample.py, or of a data set."""
    reference: str = ""
    """What they are held against, either too; empty for the data that the samples' network was trained on."""
    metrics: tuple[Metric, ...] = ("frechet",)
    """The Fréchet distance; the kernel distance; by balls around pictures, how much of the samples looks like the
    reference and how much of that they look like, as precision and recall, or as density and coverage."""
    features: FeatureConfig = field(default_factory=FeatureConfig)
    neighbours: int = 5
    """k: the ball around a picture reaches to the k-th nearest of its own set."""
    pairs_images: int = 50_000
    """Pictures of each set, evenly spread, that all but the Fréchet distance look at; 0 for all. What that takes grows
    with the square."""
    per_class: bool = False
    """The Fréchet distance for each label by itself too, where both sets have labels."""
    interval: bool = True
    """Say the interval in which a value lies at 95 %, over the draw of the samples; the reference is taken as it is."""
    side: int = 0
    """Height and width, in pixels, that data sets are seen at; 0: as samples are, or as both data sets are stored."""
    cache: str = ""
    """Folder that keeps the statistics of references for the next time; empty: `statistics`, in the reference's own;
    none: they are not kept."""
    promote: str = ""
    """Name of a registered model in MLflow: the network becomes its `champion` if its Fréchet distance is better than
    that of the one that is, on the same data, features, seeds and settings of the sampler. None if empty."""
    tracking: TrackingConfig = field(default_factory=TrackingConfig)

    def __post_init__(self) -> None:
        for metric in self.metrics:
            with checked():
                check_choice("metrics", metric, Metric)
        if not self.metrics:
            raise ConfigurationError(f"metrics is empty; name at least one of {', '.join(get_args(Metric))}")
        for name, least in (("neighbours", 1), ("pairs_images", 0), ("side", 0)):
            if getattr(self, name) < least:
                raise ConfigurationError(f"{name} is {getattr(self, name)}; it must be at least {least}")
        check_model_name("promote", self.promote)
        for asked, value in (("promote", self.promote), ("per_class", self.per_class)):
            if value and "frechet" not in self.metrics:
                raise ConfigurationError(f"{asked} is {value!r}; it needs frechet among the metrics")

    @property
    def needs_pairs(self) -> bool:
        """Whether every picture is to be held against every other."""
        return any(metric != "frechet" for metric in self.metrics)
