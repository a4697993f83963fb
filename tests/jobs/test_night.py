"""Nights: a schedule fires against a real S3 server and a real MLflow server, is killed, and fires twice."""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from ray.cluster_utils import Cluster

from jobs.presets import DIGITS
from models.network import NetworkConfig
from pipelines.digits import write_digits
from pipelines.ingest import ingest
from pipelines.ingest_plan import IngestConfig, IngestPlan
from pipelines.lineage import Trained
from pipelines.read_back import verify
from pipelines.results import export, record_results
from pipelines.run_folder import RUN
from pipelines.sample_set import SUCCESS
from pipelines.score_config import ScoreJob
from pipelines.scoring import score_job
from pipelines.slots import folder_name, slot_id
from pipelines.storage import Folder
from pipelines.tracking import open_tracker
from pipelines.tracking_config import TrackingConfig
from tests.pipelines.committed import committed
from tests.pipelines.states import TINY
from tests.processes import CODE, kill, of_this_cluster, wait_for, without_ray
from tests.server import deliver

pytestmark = [
    pytest.mark.ray,
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # MLflow's own dependencies
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]
IMAGES, IN_EACH = 128, 16
"""Of a slot, and of a shard."""
TODAY = datetime.now(UTC).replace(hour=0, minute=0, second=0, microsecond=0)
NIGHTS = [TODAY - timedelta(days=days) for days in (2, 1, 0)]


@dataclass
class Yard:
    """Where the nights' work is done."""

    address: str
    server: str
    out: Folder
    digest: str
    """Of the champion."""

    def environment(self) -> dict[str, str]:
        secret = {name: os.environ[name] for name in ("MLFLOW_TRACKING_USERNAME", "MLFLOW_TRACKING_PASSWORD")}
        return without_ray() | of_this_cluster() | secret | {
            "RAY_ADDRESS": self.address, "OMP_NUM_THREADS": "1", "MLFLOW_TRACKING_URI": self.server,
        }  # fmt: skip


@pytest.fixture(scope="module")
def yard(mlflow_server: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Yard]:
    """Digits in S3, and two networks in MLflow of which the first is the champion and the second the newest."""
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 4, "include_dashboard": False})
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("RAY_ADDRESS", cluster.address)
        patched.setenv("MLFLOW_TRACKING_URI", mlflow_server)
        raw = Folder(str(tmp_path_factory.mktemp("raw")))
        write_digits(raw)
        root = Folder("s3://yard/nights")
        data = root / "data"
        manifest = ingest(IngestPlan.make(raw, data, IngestConfig(side=8, channels=1, shard_rows=900)))
        digests = []
        for number, name in enumerate(("first", "second")):
            config = TrackingConfig(uri=mlflow_server, experiment="nights", register="nightly")
            job = replace(DIGITS, root=root.url, name=name, network=NetworkConfig(unet=TINY), tracking=config)
            job.run.put(RUN, json.dumps({"id": f"nights-{name}"}).encode())
            tracker = open_tracker(config, root, job.run, name, f"nights-{name}", {}, {})
            more = {
                "data_digest": manifest.digest, "data_url": data.url, "labels": manifest.labels,
                "tracking_uri": mlflow_server, "tracking_run": f"nights-{name}",
            }  # fmt: skip
            committed(job.run, classes=0, seed=number, **more)
            trained = Trained.find(job.run.url)
            export(job, trained)
            record_results(job, trained, None, {}, tracker)
            tracker.finish("FINISHED")
            deliver(job.run, mlflow_server)  # on a busy machine the server may take its time
            digests.append(trained.digest)
        client(mlflow_server).set_registered_model_alias("nightly", "champion", "1")
        yield Yard(cluster.address, mlflow_server, root / "samples", digests[0])
    cluster.shutdown()


def client(server: str) -> Any:
    from pipelines import mlflow_find

    return mlflow_find.client(server)


@pytest.fixture
def fire(yard: Yard, tmp_path: Path) -> Iterator[Callable[[datetime], subprocess.Popen[str]]]:
    started: list[subprocess.Popen[str]] = []

    def firing(slot: datetime) -> subprocess.Popen[str]:
        flags = {
            "checkpoint": "models:/nightly@champion", "seeds": f"0-{IMAGES - 1}", "out": yard.out.url,
            "draw.sampler": "posterior", "draw.steps": 150, "draw.shard-images": IN_EACH, "draw.batch-images": IN_EACH,
            "firing.slot": slot_id(slot), "firing.seeds": "fresh", "firing.lease-s": 6,
        }  # fmt: skip
        process = subprocess.Popen(
            [sys.executable, "jobs/sample.py", *(f"--{name}={value}" for name, value in flags.items())],
            cwd=CODE, env=yard.environment(), text=True, stdout=subprocess.PIPE,
            stderr=(tmp_path / f"log-{len(started)}").open("w"), start_new_session=True,
        )  # fmt: skip
        started.append(process)
        return process

    yield firing
    for process in started:
        if process.poll() is None:
            kill(process)


def test_nights(yard: Yard, fire: Callable[[datetime], subprocess.Popen[str]], tmp_path: Path) -> None:
    def finish(process: subprocess.Popen[str], number: int) -> dict[str, str]:
        out, _ = process.communicate(timeout=300)
        assert process.returncode == 0, (tmp_path / f"log-{number}").read_text()[-3000:]
        return {slot: said["state"] for slot, said in json.loads(out.splitlines()[-1])["slots"].items()}

    first, second, third = (slot_id(night) for night in NIGHTS)
    folders = [yard.out / folder_name(night) for night in NIGHTS]
    # The first night nothing happens; in the second the job is killed; in the third two machines fire.
    assert finish(fire(NIGHTS[0]), 0) == {first: "done"}
    killed = fire(NIGHTS[1])
    wait_for(lambda: any(name.startswith("part-") for name in folders[1].names()), killed)
    kill(killed)
    assert not folders[1].exists(SUCCESS)
    one, other = fire(NIGHTS[2]), fire(NIGHTS[2])
    states = [finish(one, 2), finish(other, 3)]
    assert sorted(said[third] for said in states) == ["already done", "done"]
    assert sorted(said.get(second, "already done") for said in states) == ["already done", "done"], "caught up with"

    seeds: set[int] = set()
    for folder in folders:
        deliver(folder, yard.server)  # what it was too busy to take
    server = client(yard.server)
    found = server.search_runs([server.get_experiment_by_name("brickyard-samples").experiment_id])
    runs = [run for run in found if run.data.tags["brickyard.samples"].startswith(yard.out.url)]
    by_slot = {run.data.tags["brickyard.slot"]: run for run in runs}
    assert sorted(by_slot) == [first, second, third] and len(runs) == 3, "one run for each slot, whoever worked on it"
    for night, folder in zip(NIGHTS, folders, strict=True):
        assert verify(folder)["verified"] == IMAGES
        about = json.loads(folder.get("manifest.json"))
        assert about["lineage"]["checkpoint_digest"] == yard.digest and about["lineage"]["model_version"] == "nightly/1"
        seeds |= set(range(about["seeds"][0], about["seeds"][1] + 1))
        score = score_job(ScoreJob(samples=folder.url))
        run = server.get_run(by_slot[slot_id(night)].info.run_id)
        assert run.info.status == "FINISHED" and run.data.tags["brickyard.trained_by"] == "nights-first"
        assert run.data.metrics["frechet_distance"] == pytest.approx(score["frechet_distance"], rel=1e-9)
        assert run.inputs.model_inputs[0].model_id == server.get_model_version("nightly", "1").tags[champion_tag()]
        pictures = [one.path for one in server.list_artifacts(run.info.run_id, "images")]
        assert any("samples" in path for path in pictures)
    assert len(seeds) == 3 * IMAGES, "each night's images are new"


def champion_tag() -> str:
    from pipelines.mlflow_models import MODEL

    return MODEL
