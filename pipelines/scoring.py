"""How far a set of samples is from a data set, or from another set: the scores, and the record of them.

What is added up over the pictures is in :mod:`pipelines.moments`, what holds every picture against every other in
:mod:`pipelines.pairs`, how both are spread over the cluster in :mod:`pipelines.statistics` and
:mod:`pipelines.pair_scores`.
"""

import logging
from collections.abc import Callable
from itertools import chain
from typing import Any, NamedTuple

import numpy as np

from pipelines.champion import promote, record_score, suffix
from pipelines.cluster import cluster
from pipelines.errors import ConfigurationError, DataError
from pipelines.intervals import STUDENT, TENTHS, standard_error
from pipelines.mlflow_door import named_here, to_record_at
from pipelines.moments import Moments, frechet_distance, frechet_distances, merged
from pipelines.pair_scores import Kept, check_neighbours, hold_against
from pipelines.pairs import Tables
from pipelines.picture_sets import DataPictures, Pair, Pictures
from pipelines.reference_cache import FOLDER, ReferenceCache
from pipelines.score_config import ScoreJob
from pipelines.statistics import statistics
from pipelines.storage import Folder

METRIC = "frechet_distance"
VALUES = (METRIC, "kid", "precision", "recall", "density", "coverage")
"""The names of all that may be measured."""

log = logging.getLogger("brickyard.scoring")


class Value(NamedTuple):
    """Something that was measured."""

    name: str
    value: float
    without: list[float]
    """The value without each tenth of the samples; none if that is not known."""


class Side:
    """What is found out about one of the two sets."""

    def __init__(self, pictures: Pictures, labels: list[str]) -> None:
        self.pictures, self.labels = pictures, labels
        self.tenths: list[Moments] = []
        """The moments of each group of parts."""
        self.by_label: list[Moments] = []
        """Those over all groups: of all pictures, or first of those without label, then of each label."""
        self.kept = Kept()

    def measure(self, job: ScoreJob, groups: int, moments: bool) -> None:
        """Go through the set once."""
        what = statistics(
            self.pictures,
            job.features,
            labels=len(self.labels),
            moments=moments,
            keep=job.needs_pairs,
            pairs_images=job.pairs_images,
        )
        self.tenths, self.by_label = [], []
        for number, part in enumerate(what):
            self.kept.add(number, part.features)
            if not part.moments:
                continue
            if number < groups:
                self.tenths.append(merged(part.moments))
            else:
                self.tenths[number % groups] += merged(part.moments)
            several = zip(self.by_label or part.moments, part.moments, strict=True)
            self.by_label = [a + b for a, b in several] if self.by_label else part.moments

    def without(self, tenth: int) -> Moments:
        """The moments of all pictures but those of a group."""
        return merged(several for i, several in enumerate(self.tenths) if i != tenth)


def score(job: ScoreJob) -> dict[str, Any]:
    """Return what the job asks for, and all that it was measured on.

    Raises:
        DataError: if either set cannot be used, or the two cannot be compared.
        ConfigurationError: if it is not said what they are compared with, or by.
    """
    pair = _pair(job)
    labels = pair.labels if job.per_class else []
    samples, reference = Side(pair.samples, labels), Side(pair.reference, labels)
    log.info("score: %s of %s against %s", ", ".join(job.metrics), pair.samples.folder.url, pair.reference.folder.url)
    result, values = _facts(job, pair), list[Value]()
    with cluster():
        groups = TENTHS if job.interval and pair.samples.n >= 2 * TENTHS else 1
        samples.measure(job, groups, "frechet" in job.metrics)
        if "frechet" in job.metrics:
            of_reference, result["reference_cached"] = _reference_moments(job, reference)
            real, drawn = merged(of_reference), samples.by_label
            result |= {"samples_n": merged(drawn).n, "reference_n": real.n}  # less what could not be used
            values += [_frechet(samples, real)]
            if labels:
                result["per_class"] = _by_class(labels, drawn[1:], of_reference[1:])
        else:
            reference.measure(job, 1, moments=False)
        if job.needs_pairs:
            check_neighbours(job, (samples.kept.n, reference.kept.n))
            result |= {"pairs_n": [samples.kept.n, reference.kept.n], "neighbours": job.neighbours}
            values += _of_pairs(job, hold_against(job, samples.kept, reference.kept, groups), groups)
    errors = {one.name: standard_error(one.without) for one in values if one.without}
    for one in values:
        within = f", within {STUDENT * errors[one.name]:.2g} at 95 %" if one.name in errors else ""
        log.info("%s: %.4g%s", one.name, one.value, within)
    return result | {one.name: one.value for one in values} | {
        "standard_errors": errors,
        "intervals": {
            one.name: [one.value - STUDENT * errors[one.name], one.value + STUDENT * errors[one.name]]
            for one in values
            if one.without
        },
    }  # fmt: skip


def _facts(job: ScoreJob, pair: Pair) -> dict[str, Any]:
    lineage = pair.samples.lineage
    return {
        "features": job.features.identity,
        "samples": pair.samples.folder.url,
        "samples_n": pair.samples.n,
        "samples_digest": pair.samples.digest,
        "seeds": pair.samples.seeds,
        "reference": pair.reference.folder.url,
        "reference_n": pair.reference.n,
        "reference_digest": pair.reference.digest,
        "same_data_as_trained_on": pair.reference.digest == lineage.get("data_digest"),
        "side": pair.samples.shape[0],
        "lineage": lineage,
        "reference_is_data": isinstance(pair.reference, DataPictures),
        "drawn_by": pair.samples.drawn_by,
    }


def _reference_moments(job: ScoreJob, reference: Side) -> tuple[list[Moments], bool]:
    """Return the moments of the reference, and whether they were kept from another time."""
    pictures = reference.pictures
    zoom = pictures.view.zoom if isinstance(pictures, DataPictures) else 1.0
    about = {
        "digest": pictures.digest,
        "features": job.features.identity,
        "shape": list(pictures.shape),
        "zoom": zoom,
        "labels": reference.labels,
    }
    folder = None if job.cache == "none" else Folder(job.cache) if job.cache else pictures.folder / FOLDER
    cache = ReferenceCache(folder, about)
    kept = cache.load()
    if kept is None or job.needs_pairs:
        reference.measure(job, 1, moments=kept is None)
    if kept is not None:
        return kept, True
    cache.save(reference.by_label)
    return reference.by_label, False


def _frechet(samples: Side, real: Moments) -> Value:
    groups = range(len(samples.tenths) if len(samples.tenths) > 1 else 0)
    # One after the other: a table of D × D is large.
    value, *without = frechet_distances(chain([merged(samples.by_label)], map(samples.without, groups)), real)
    return Value(METRIC, value, without)


def _by_class(labels: list[str], drawn: list[Moments], real: list[Moments]) -> dict[str, float | None]:
    """Return the distance of each label by itself, None where either set has fewer than two pictures of it."""
    both = zip(labels, drawn, real, strict=True)
    return {name: frechet_distance(a, b) if min(a.n, b.n) > 1 else None for name, a, b in both}


def _of_pairs(job: ScoreJob, tables: Tables, groups: int) -> list[Value]:
    k = job.neighbours
    asked: dict[str, Callable[[int | None], float]] = {}
    if "kid" in job.metrics:
        asked["kid"] = tables.kid
    if "precision-recall" in job.metrics:
        asked["precision"] = tables.precision
    if "density-coverage" in job.metrics:
        asked |= {"density": lambda without: tables.density(k, without), "coverage": tables.coverage}
    several = groups > 1 and len(set(tables.group)) == groups
    values = [Value(name, value(None), [value(i) for i in range(groups * several)]) for name, value in asked.items()]
    if "precision-recall" in job.metrics:  # without a tenth of the samples the balls of all others are larger
        values.append(Value("recall", tables.recall(), []))
    return values


def score_job(job: ScoreJob) -> dict[str, Any]:
    """Do what the job says, and write the scores to the MLflow run that trained the network.

    Raises:
        DataError: if the sets cannot be used.
        ConfigurationError: if a network is to be promoted, and none can be.
        TryAgainError: if the network was to be promoted, and MLflow does not answer.
    """
    result = score(job)
    lineage, drawn_by = result["lineage"], result.pop("drawn_by")
    if not (lineage and result["reference_is_data"]):
        log.info("the scores are not recorded: they hold no samples against data")
        return result | {"recorded": False}
    measured_on = lineage | {"data_digest": result["reference_digest"], "data_url": result["reference"]}
    recorded = []
    for uri, run in ([lineage["tracking_uri"], lineage["tracking_run"]], drawn_by):
        if run:
            to, values = to_record_at(uri, job.tracking.uri), _named(job, result).items()
            recorded += [record_score(to, run, name, value, measured_on) for name, value in values]
    result |= {"recorded": bool(recorded) and all(recorded)}
    if job.promote:
        to = named_here(lineage["tracking_uri"], job.tracking.uri)
        verdict = promote(to, lineage["tracking_run"], job.promote, result, METRIC)
        log.info("%s", verdict["why"])
        result |= verdict
    return result


def _named(job: ScoreJob, result: dict[str, Any]) -> dict[str, float]:
    """Return what was measured by the names that it has on record."""
    behind = suffix(job.features, result["reference_digest"], result["lineage"])
    return {name + behind: result[name] for name in VALUES if name in result and np.isfinite(result[name])}


def dry_run(job: ScoreJob) -> dict[str, Any]:
    """Return what would be compared, having changed nothing."""
    pair = _pair(job)
    labels = pair.labels if job.per_class else []
    facts = _facts(job, pair)
    del facts["lineage"], facts["drawn_by"]
    return {"dry_run": True, "metrics": list(job.metrics), **facts} | ({"labels": labels} if labels else {})


def _pair(job: ScoreJob) -> Pair:
    pair = Pair.find(Folder(job.samples), Folder(job.reference) if job.reference else None, job.side)
    job.features.check_shape(pair.samples.shape)
    if job.features.kind == "file":
        from pipelines.file_features import check_digest

        check_digest(job.features)  # before a cluster is started for it
    check_neighbours(job, (pair.samples.n, pair.reference.n))
    if "frechet" in job.metrics and min(pair.samples.n, pair.reference.n) < 2:
        raise DataError("a Fréchet distance needs at least two pictures on each side")
    if job.promote:
        _check_promotable(job, pair)
    return pair


def _check_promotable(job: ScoreJob, pair: Pair) -> None:
    """Refuse what could never be promoted before it is measured for long."""
    lineage, said = pair.samples.lineage, f"promote is {job.promote!r}"
    if not (lineage and isinstance(pair.reference, DataPictures)):
        raise ConfigurationError(
            f"{said}; a champion is the network of samples that are held against data, and "
            + (f"{pair.reference.folder.url} is no data" if lineage else f"{pair.samples.folder.url} is no samples")
        )
    trained_at, run = lineage["tracking_uri"], lineage["tracking_run"]
    if not run or (trained_at, job.tracking.uri) == ("none", ""):
        raise ConfigurationError(
            f"{said}; the run that trained this network is in no MLflow, so it has no model to promote: train with "
            "--tracking.uri"
        )
    if named_here(trained_at, job.tracking.uri) == "none":
        raise ConfigurationError(
            f"{said}; the run that trained this network is recorded at {trained_at}, which is not named here: set "
            f"MLFLOW_TRACKING_URI={trained_at} if it is to be asked"
        )
