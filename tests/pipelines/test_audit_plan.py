"""What an audit compares, and by what names it is recorded. Nothing here is searched, so no cluster starts."""

import json
import socket
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipelines.audit import audit_job
from pipelines.audit_config import AuditJob
from pipelines.audit_plan import AuditPlan, plan_audit
from pipelines.config import DataConfig
from pipelines.errors import ConfigurationError, DataError
from pipelines.features import FeatureConfig
from pipelines.images import View
from pipelines.picture_sets import Pair
from pipelines.storage import Folder
from pipelines.tracking import open_tracker, resolve_uri
from pipelines.tracking_config import TrackingConfig
from tests.pipelines.sets import write_data, write_samples
from tests.pipelines.states import ABOUT

pytestmark = pytest.mark.usefixtures("alone")
RNG = np.random.default_rng(3)
PIXELS = RNG.integers(0, 256, (40, 8, 8, 1), dtype=np.uint8)
LARGE = RNG.integers(0, 256, (40, 12, 12, 1), dtype=np.uint8)
LABELS = np.arange(40) % 3
FILE = FeatureConfig(kind="file", url="/f/network.pt", sha256="a" * 64, name="halves")


class Yard:
    """A data set, the checkpoint of a network that learned from it, and samples."""

    def __init__(self, root: Folder) -> None:
        self.root, self.data = root, root / "data"
        self.manifest = write_data(self.data, PIXELS, LABELS)
        config = {"data": asdict(DataConfig(url="x", held_out=7)), "fit": {"flip": True}}
        self.checkpoint = replace(ABOUT, config=config, data_digest=self.manifest.digest)
        self.where = root / "run" / "checkpoint"
        self.where.put("manifest.json", json.dumps(asdict(self.checkpoint)).encode())
        self.lineage: dict[str, Any] = {
            "checkpoint": self.where.url, "checkpoint_digest": self.checkpoint.digest, "position": 300,
            "data_digest": self.manifest.digest, "data_url": self.data.url, "draw": {},
        }  # fmt: skip

    def samples(self, name: str = "samples", **lineage: object) -> Folder:
        return write_samples(self.root / name, PIXELS[:9], LABELS[:9], **(self.lineage | lineage))

    def plan(self, samples: Folder, **settings: Any) -> AuditPlan:
        return plan_audit(AuditJob(samples=samples.url, **settings))


@pytest.fixture
def yard(folder: Folder) -> Yard:
    return Yard(folder)


def test_what_is_on_record_of_the_training_is_taken(yard: Yard) -> None:
    plan = yard.plan(yard.samples())
    assert (len(plan.held), plan.mirrored, plan.notes) == (7, True, [])
    plan = yard.plan(yard.samples(), held_out=3, mirrored="no")
    assert (len(plan.held), plan.mirrored, plan.notes) == (3, False, [])


def test_an_export_is_asked_too_and_what_it_does_not_know_is_said(yard: Yard) -> None:
    about = {
        "network": {}, "schedule": {}, "target": "eps", "shape": [1, 8, 8], "labels": [], "position": 300,
        "checkpoint_digest": "e" * 64,
    }  # fmt: skip
    yard.root.put("export/config.json", json.dumps(about).encode())
    samples = yard.samples(checkpoint=(yard.root / "export").url, checkpoint_digest="e" * 64)
    plan = yard.plan(samples)
    assert not len(plan.held) and not plan.mirrored and len(plan.notes) == 3
    said = ("images were held out", "the network was shown mirror images", "training cut the images at random places")
    for note, what in zip(plan.notes, said, strict=True):
        assert note.startswith(f"it is not known whether {what}")
    assert len(yard.plan(samples, held_out=7, mirrored="yes").notes) == 1


def test_a_record_that_is_gone_or_of_another_network_is_told_apart(yard: Yard) -> None:
    other = yard.plan(yard.samples("other", checkpoint_digest="0" * 64))
    assert other.notes[0] == f"what is at {yard.where.url} is another network than the one that drew the samples"
    gone = yard.plan(yard.samples("gone", checkpoint=(yard.root / "none").url))
    assert gone.notes[0].endswith("/none holds no checkpoint of ours any more")
    for plan in (other, gone):
        assert not len(plan.held) and not plan.mirrored and len(plan.notes) == 4


@pytest.mark.parametrize("name", ["checkpoint", "checkpoint_digest", "position"])
def test_a_lineage_without_its_network_is_refused(name: str, yard: Yard) -> None:
    with pytest.raises(DataError, match=f"does not say what network .* the {name} of their lineage is None"):
        yard.plan(yard.samples(**{name: None}))
    odd = yard.samples()
    about = json.loads(odd.get("manifest.json"))
    del about["lineage"][name]
    odd.put("manifest.json", json.dumps(about).encode())
    with pytest.raises(DataError, match=f"the {name} of their lineage is None"):
        yard.plan(odd)


def test_samples_and_data_are_taken_as_scores_take_them(yard: Yard) -> None:
    """The same digest of the samples, the same labels, and the same view: other data are not enlarged by the zoom."""
    large = write_data(yard.root / "large", LARGE)
    samples = yard.samples(zoom=1.25)
    for reference, manifest in ((yard.data, yard.manifest), (yard.root / "large", large)):
        plan, pair = yard.plan(samples, reference=reference.url), Pair.find(samples, reference)
        assert plan.data == pair.reference and plan.data.digest == manifest.digest
        assert plan.terms["samples_digest"] == pair.samples.digest
        assert plan.data.view == View(side=8, channels=1, zoom=1.25 if manifest is large else 1.0)
    assert yard.plan(samples).labels == ["0", "1", "2"], "of an older set: those of the data that it learned from"
    assert yard.plan(samples, reference=(yard.root / "large").url).labels == []
    about = json.loads(samples.get("manifest.json")) | {"labels": ["a", "b", "c"]}
    samples.put("manifest.json", json.dumps(about).encode())
    assert yard.plan(samples, reference=(yard.root / "large").url).labels == ["a", "b", "c"]


def test_a_file_that_is_not_the_named_one_is_refused_before_a_cluster_starts(yard: Yard) -> None:
    yard.root.put("network.pt", b"a program")
    url = f"{yard.root.url}/network.pt"
    for sha256, said in (("", "sha256 is empty"), ("0" * 64, "and is not run")):
        with pytest.raises(ConfigurationError, match=said):
            yard.plan(yard.samples(), features=FeatureConfig(kind="file", url=url, sha256=sha256))


def finished(yard: Yard, samples: Folder, out: str, share: float, **settings: Any) -> AuditJob:
    """Leave a finished audit, and return its job."""
    job = AuditJob(samples=samples.url, out=(yard.root / out).url, **settings)
    plan = plan_audit(job)
    copies = {"copies": {"share": share}}
    report = {"of_samples": copies, "of_control": copies, "near_duplicates": {"share": share}, "terms": plan.terms}
    plan.out.put("pairs.png", b"a picture")
    plan.out.put("audit.json", json.dumps(report | {"files": {}}).encode())
    return job


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::ResourceWarning")
def test_audits_by_other_terms_or_data_have_other_names(yard: Yard) -> None:
    """As have scores: they are no points of one curve, and nothing that was measured on the data of the model."""
    from mlflow import MlflowClient

    tracker = open_tracker(TrackingConfig(), yard.root, yard.root / "runs" / "d", "d", "an id of ours", {}, {})
    tracker.finish("FINISHED")
    samples = yard.samples(tracking_uri=resolve_uri(TrackingConfig(), yard.root), tracking_run=tracker.run_id)
    other = write_data(yard.root / "other", PIXELS[:20])
    jobs = [
        finished(yard, samples, "usual", 0.1),
        finished(yard, samples, "half", 0.2, threshold=0.5, neighbours=2),
        finished(yard, samples, "against", 0.3, reference=(yard.root / "other").url),
    ]
    assert all(audit_job(job)["recorded"] for job in jobs)
    client = MlflowClient(tracking_uri=resolve_uri(TrackingConfig(), yard.root))
    assert tracker.tracker_id
    metrics = client.get_run(tracker.tracker_id).data.metrics
    behind = ["", "_neighbours_2_threshold_0.5", f"_against_{other.digest[:8]}"]
    names = ("copied_share", "copied_share_control", "near_duplicate_share")
    assert metrics == {name + b: v for b, v in zip(behind, (0.1, 0.2, 0.3), strict=True) for name in names}
    pictures = {file.path for file in client.list_artifacts(tracker.tracker_id) if file.path.startswith("pairs")}
    assert pictures == {f"pairs-300{b}.png" for b in behind}
    plan = replace(plan_audit(jobs[2]), job=replace(jobs[2], features=FILE))
    assert plan.suffix == f"_halves_against_{other.digest[:8]}"


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::ResourceWarning")
def test_what_samples_say_of_a_tracker_makes_and_reaches_nothing(yard: Yard, tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as theirs:
        theirs.setblocking(False)
        port = theirs.getsockname()[1]
        for uri in (f"sqlite:///{tmp_path}/theirs.db", f"file://{tmp_path}/theirs", f"http://127.0.0.1:{port}"):
            job = finished(yard, yard.samples(tracking_uri=uri, tracking_run="theirs"), "out", 0.1)
            assert audit_job(job)["recorded"] is False
        with pytest.raises(BlockingIOError):
            theirs.accept()
    assert not list(tmp_path.glob("theirs*"))
