"""What a sampling job is asked to do."""

import re
from dataclasses import dataclass, field

from pipelines.draw_config import DrawConfig
from pipelines.errors import ConfigurationError
from pipelines.firing_config import FiringConfig
from pipelines.sample_shards import Form
from pipelines.storage import settled
from pipelines.tracking_config import TrackingConfig


@dataclass(frozen=True, kw_only=True)
class SampleJob:
    """Draw one sample per seed, exactly once, into Parquet shards."""

    out: str
    """Folder or URL for the samples."""
    checkpoint: str = ""
    """A run's folder, for its newest checkpoint; the folder of one checkpoint, of an export, or of a DDPMPipeline of
    diffusers; or in MLflow models:/NAME@ALIAS, models:/NAME/VERSION, runs:/RUN. What an alias means when a folder is
    begun is what the folder is finished with."""
    seeds: str = "0-63"
    """The seeds, both ends included, such as 0-49999."""
    labels: str = ""
    """The URL of a CSV with the columns seed and label, for each of the seeds. Empty: as draw.label says."""
    draw: DrawConfig = field(default_factory=DrawConfig)
    also: tuple[Form, ...] = ()
    """Write the samples as WebDataset tars (in tar/) and single pictures (in png/) as well."""
    verify: bool = False
    """Draw nothing: prove that the folder holds each of its seeds once, as it was written."""
    firing: FiringConfig = field(default_factory=FiringConfig)
    """With a slot the job is a firing of a schedule: the samples of each slot have a folder of their own below out."""
    tracking: TrackingConfig = field(default_factory=lambda: TrackingConfig(experiment="brickyard-samples"))
    """Where the job is recorded, as a run of its own; where models:/ and runs:/ are looked up, too. An empty uri is
    MLFLOW_TRACKING_URI, or else the training's database, if it is on this machine."""

    def __post_init__(self) -> None:
        for name in ("out", "labels"):
            object.__setattr__(self, name, settled(getattr(self, name)))
        self.seed_range  # noqa: B018  (it checks)
        if self.firing.slot and self.verify:
            raise ConfigurationError(
                f"firing.slot is {self.firing.slot!r}, and verify is asked for: leave that out and give --out the "
                "folder of the slot"
            )
        if self.labels and self.firing.slot and self.firing.seeds == "fresh":
            raise ConfigurationError(
                f"labels is {self.labels} and firing.seeds fresh; a table has the seeds of one slot: take firing.seeds "
                "same, or draw.label"
            )
        if not self.checkpoint and not self.verify:
            raise ConfigurationError("checkpoint is empty: give --checkpoint FOLDER of a run, or --verify")
        if self.labels and self.draw.label:
            raise ConfigurationError(
                f"labels is {self.labels} and draw.label {self.draw.label!r}; the table says the label of each seed: "
                "leave out one of them"
            )

    @property
    def seed_range(self) -> range:
        match = re.fullmatch(r"(\d+)-(\d+)", self.seeds)
        if not match or int(match[1]) > int(match[2]):
            said = "; the last comes before the first" if match else ""
            raise ConfigurationError(f"seeds is {self.seeds!r}; it must be FIRST-LAST, such as 0-49999{said}")
        return range(int(match[1]), int(match[2]) + 1)
