"""The Fréchet distance between two sets of pictures, from statistics that merge: a Ray Data reduction.

Each task turns one shard into n, Σx and Σxxᵀ of its features in float64; sums merge in any order. The feature of a
small picture is its pixels in [0, 1]. The distance is that of the Gaussians with the same means and covariances,
d² = ‖μ₁ - μ₂‖² + tr(Σ₁ + Σ₂ - 2 (Σ₁ Σ₂)^½) (Dowson and Landau, 1982); what is called FID is this on the features of
an Inception network.
"""

import json
import logging
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import ray.data
from numpy.typing import NDArray

from pipelines.champion import promote, record_score
from pipelines.cluster import cluster
from pipelines.config import ScoreJob
from pipelines.errors import ConfigurationError, DataError
from pipelines.features import FeatureConfig, pixel_features
from pipelines.images import Pixels, View
from pipelines.manifest import Manifest
from pipelines.mlflow_door import check_trusted
from pipelines.sample_shards import read_samples
from pipelines.sampling import MANIFEST, SUCCESS
from pipelines.storage import Folder

METRIC = "frechet_distance"

log = logging.getLogger("brickyard.scoring")


@dataclass(frozen=True)
class Moments:
    """n, Σx [D] and Σxxᵀ [D, D] of n feature vectors, in float64."""

    n: int
    sum: NDArray[np.float64]
    outer: NDArray[np.float64]

    @staticmethod
    def of(features: NDArray[np.float64]) -> "Moments":
        """Features are [n, D]."""
        return Moments(len(features), features.sum(0), features.T @ features)

    def __add__(self, other: "Moments") -> "Moments":
        return Moments(self.n + other.n, self.sum + other.sum, self.outer + other.outer)

    @property
    def mean(self) -> NDArray[np.float64]:
        return self.sum / self.n

    @property
    def covariance(self) -> NDArray[np.float64]:
        """The unbiased covariance [D, D]; n must be at least 2."""
        centred = self.outer - self.n * np.outer(self.mean, self.mean)
        return centred / (self.n - 1)


def frechet_distance(a: Moments, b: Moments) -> float:
    """Return d² of the Gaussians that fit two sets of features.

    Raises:
        DataError: if a set has fewer than two members, or the features differ in number.
    """
    if a.n < 2 or b.n < 2:
        raise DataError(f"a Fréchet distance needs at least two pictures on each side, not {a.n} and {b.n}")
    if a.sum.shape != b.sum.shape:
        raise DataError(f"the pictures differ in size: {a.sum.size} and {b.sum.size} features cannot be compared")
    # (Σ₁ Σ₂)^½ has the eigenvalues of (√Σ₁ Σ₂ √Σ₁)^½, which is symmetric: no complex roots, no iteration.
    values, vectors = np.linalg.eigh(a.covariance)
    root = (vectors * np.sqrt(values.clip(0))) @ vectors.T
    mixed = np.sqrt(np.linalg.eigvalsh(root @ b.covariance @ root).clip(0)).sum()
    apart = np.square(a.mean - b.mean).sum()
    return float(apart + np.trace(a.covariance) + np.trace(b.covariance) - 2 * mixed)


@dataclass(frozen=True)
class ReadShardMoments:
    """The task: the number of a shard to the moments of its features."""

    read: Callable[[int], Pixels]

    def __call__(self, row: dict[str, int]) -> dict[str, Any]:
        moments = Moments.of(pixel_features(self.read(row["id"])))
        return {"n": moments.n, "sum": moments.sum, "outer": moments.outer}


def moments_of(read: Callable[[int], Pixels], shards: int) -> Moments:
    """Reduce shards 0..shards-1, read by ``read``, to the moments of their pictures; memory holds two D × D."""
    dataset = ray.data.range(shards, override_num_blocks=shards).map(ReadShardMoments(read))
    # In order, so that the sums round the same each time: the root of a singular covariance shows the last digit.
    dataset.context.execution_options.preserve_order = True
    parts = (Moments(int(row["n"]), row["sum"], row["outer"]) for row in dataset.iter_rows())
    total = next(parts)
    for part in parts:
        total += part
    return total


@dataclass(frozen=True)
class DataShards:
    """Reads the shards of a data set."""

    folder: Folder
    manifest: Manifest
    view: View

    def __call__(self, shard: int) -> Pixels:
        start = sum(s.rows for s in self.manifest.shards[:shard])
        rows = np.arange(start, start + self.manifest.shards[shard].rows)
        return self.manifest.read(self.folder, rows, self.view).image


@dataclass(frozen=True)
class SampleShards:
    """Reads the shards of a set of samples."""

    folder: Folder
    names: tuple[str, ...]
    shape: tuple[int, int, int]

    def __call__(self, shard: int) -> Pixels:
        return read_samples(self.folder, [self.names[shard]], self.shape)


@dataclass(frozen=True)
class Comparison:
    """Two sets of pictures that can be compared."""

    samples: Folder
    about: dict[str, Any]
    reference: Folder
    manifest: Manifest
    view: View
    """How the network saw the pictures of the data set."""

    @staticmethod
    def find(samples: Folder, reference: Folder | None) -> "Comparison":
        """Find a finished set of samples and a data set; None is the one that the network was trained on.

        Raises:
            DataError: if either is not there or not finished, or if the two cannot be compared.
        """
        if not samples.exists(SUCCESS):
            raise DataError(
                f"{samples.url} is no finished set of samples: it has no {SUCCESS}; run jobs/sample.py first"
            )
        about = json.loads(samples.get(MANIFEST))
        if not reference and not about["lineage"]["data_url"]:
            raise ConfigurationError(
                "reference is empty, and it is not on record what the network was trained on: give "
                "--reference FOLDER of a data set"
            )
        reference = reference or Folder(about["lineage"]["data_url"])
        manifest = Manifest.load(reference)
        channels, height, width = about["shape"]
        if manifest.channels != channels or 0 < manifest.side < height:
            raise DataError(
                f"samples are {height} x {width} x {channels}, the images of {reference.url} are "
                f"{' x '.join(map(str, manifest.shape))}; they cannot be compared"
            )
        view = View(side=height, channels=channels, zoom=about["lineage"].get("zoom", 1.0))
        FeatureConfig().check_shape((height, width, channels))
        return Comparison(samples, about, reference, manifest, view)


def score(comparison: Comparison) -> dict[str, Any]:
    """Return the Fréchet distance of the samples from the data set, and what it was measured on."""
    samples, about, manifest = comparison.samples, comparison.about, comparison.manifest
    names = tuple(file["name"] for file in about["files"])
    with cluster():
        drawn = moments_of(SampleShards(samples, names, tuple(about["shape"])), len(names))
        real = moments_of(DataShards(comparison.reference, manifest, comparison.view), len(manifest.shards))
    return {
        "frechet_distance": frechet_distance(drawn, real),
        "features": "pixels in [0, 1]",
        "samples": samples.url,
        "samples_n": drawn.n,
        "seeds": about["seeds"],
        "reference": comparison.reference.url,
        "reference_n": real.n,
        "reference_digest": manifest.digest,
        "same_data_as_trained_on": manifest.digest == about["lineage"]["data_digest"],
        "lineage": about["lineage"],
    }


def score_job(job: ScoreJob) -> dict[str, Any]:
    """Do what the job says, and write the score to the MLflow run that trained the network.

    Raises:
        DataError: if the samples or the data set cannot be used.
        TryAgainError: if the network was to be promoted, and MLflow does not answer.
    """
    result = score(_comparison(job))
    lineage = result["lineage"]
    uri = job.tracking.uri or os.environ.get("MLFLOW_TRACKING_URI") or lineage["tracking_uri"]
    if uri == lineage["tracking_uri"]:
        check_trusted(uri)
    result |= {"recorded": record_score(uri, lineage["tracking_run"], METRIC, result[METRIC], lineage)}
    if job.promote:
        verdict = promote(uri, lineage["tracking_run"], job.promote, result, METRIC)
        log.info("%s", verdict["why"])
        result |= verdict
    return result


def dry_run(job: ScoreJob) -> dict[str, Any]:
    """Return what would be compared, having changed nothing."""
    comparison = _comparison(job)
    return {
        "dry_run": True,
        "samples": comparison.samples.url,
        "samples_n": sum(file["images"] for file in comparison.about["files"]),
        "reference": comparison.reference.url,
        "reference_n": comparison.manifest.rows,
    }


def _comparison(job: ScoreJob) -> Comparison:
    return Comparison.find(Folder(job.samples), Folder(job.reference) if job.reference else None)
