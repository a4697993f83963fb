"""A sweep as a user runs it: children in processes of their own, one cluster, one parent in MLflow."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import ray

from pipelines import checkpoints
from pipelines.storage import Folder
from tests.processes import CODE, of_session, of_this_cluster, wait_for, without_ray

pytestmark = [
    pytest.mark.ray,
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # MLflow's own dependencies
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]
SHORT = [
    "--train.fit.images=640", "--train.fit.log-images=320", "--train.fit.batch-images=32",
    "--train.fit.micro-images=32", "--train.scaling.workers=1", "--train.fit.grid-images=640",
    "--train.fit.checkpoint-images=640", "--train.evaluate-images=0", "--train.data.held-out=0",
]  # fmt: skip


def sweep(root: Path, *flags: str, code: int = 0) -> tuple[dict[str, Any], str]:
    done = subprocess.run(
        [sys.executable, "jobs/sweep.py", "digits", f"--train.root={root}", *SHORT, *flags],
        cwd=CODE, env=without_ray() | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=900,
        check=False,
    )  # fmt: skip
    assert done.returncode == code, done.stderr[-5000:]
    return json.loads(done.stdout.splitlines()[-1]), done.stderr


def test_children_train_under_one_parent_and_only_once(tmp_path: Path) -> None:
    """One of the children diverges; the others are none the worse."""
    grid = "fit.learning_rate=1e-3,1e30"
    said, err = sweep(tmp_path, "--grid", grid, code=1)
    assert "1 of 2 children did not get to their end: fit.learning_rate=1e30: exit 1, the gradient of" in said["error"]
    assert len(list((tmp_path / "data").glob("digits-*"))) == 1, "two who start at once do not ingest the same twice"
    assert "the gradient of positions" in (tmp_path / "sweeps/sweep/sweep.learning_rate-1e30.log").read_text()

    said, err = sweep(tmp_path, "--grid", "fit.learning_rate=1e-3 seed=0,1", "fit.learning_rate=1e-3")
    assert "3 children, 1 of them done" in err
    assert [row["child"] for row in said["children"]] == [
        row["child"] for row in sorted(said["children"], key=lambda row: row["loss"])
    ]
    rows = {row["child"]: row for row in said["children"]}
    assert rows.keys() == {
        "fit.learning_rate=1e-3 seed=0", "fit.learning_rate=1e-3 seed=1", "fit.learning_rate=1e-3"
    }  # fmt: skip
    alone, zero, one = (rows[f"fit.learning_rate=1e-3{seed}"]["loss"] for seed in ("", " seed=0", " seed=1"))
    assert alone == zero != one, "what is asked the same comes out the same"
    table = (tmp_path / "sweeps/sweep/table.txt").read_text()
    assert f"{one:.4g}" in table and "fit.learning_rate=1e-3 seed=1" in table

    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{tmp_path}/mlflow.db")
    runs = client.search_runs([client.get_experiment_by_name("brickyard").experiment_id])
    (parent,) = [run for run in runs if run.info.run_name == "sweep"]
    assert parent.info.status == "FINISHED" and parent.info.run_id == said["mlflow_run"]
    children = {
        run.info.run_name: run.info.status
        for run in runs if run.data.tags.get("mlflow.parentRunId") == parent.info.run_id
    }  # fmt: skip
    assert children == {
        "sweep.learning_rate-1e-3": "FINISHED", "sweep.learning_rate-1e30": "FAILED",
        "sweep.learning_rate-1e-3_seed-0": "FINISHED", "sweep.learning_rate-1e-3_seed-1": "FINISHED",
    }  # fmt: skip

    first, second = sorted((run.info.start_time, run.info.end_time) for run in runs if "_seed-" in run.info.run_name)
    assert second[0] < first[1], "side by side"

    again, err = sweep(tmp_path, "--grid", "fit.learning_rate=1e-3 seed=0,1", "fit.learning_rate=1e-3")
    assert again["children"] == said["children"] and "starts" not in err, "nothing is trained again"


def test_a_killed_sweep_takes_its_children_with_it_and_they_go_on(tmp_path: Path, ray_cluster: None) -> None:
    """On a cluster that outlives the sweep, so that nothing else ends its children."""
    where = {"OMP_NUM_THREADS": "1", "RAY_ADDRESS": ray.get_runtime_context().gcs_address}
    environment = without_ray() | of_this_cluster() | where

    def command(images: int) -> list[str]:
        flags = [f"--train.root={tmp_path}", *SHORT, "--grid", "seed=0,1", f"--train.fit.images={images}"]
        return [sys.executable, "jobs/sweep.py", "digits", *flags]

    # At the blow none may be done, however late the other begins; those who go on need not go far.
    killed = subprocess.Popen(command(128_000_000), cwd=CODE, env=environment, stderr=subprocess.PIPE, text=True)
    folders = [tmp_path / f"runs/sweep.seed-{seed}" for seed in (0, 1)]
    wait_for(lambda: all(list(folder.glob("checkpoint-*/manifest.json")) for folder in folders), killed)
    threads = Path(f"/proc/{killed.pid}/task").glob("*/children")
    children = [int(child) for of_thread in threads for child in of_thread.read_text().split()]
    assert len(children) >= 2
    killed.kill()
    killed.communicate()
    end = time.monotonic() + 300
    while any(Path(f"/proc/{pid}").exists() for pid in children) or any(of_session(os.getsid(0), b"RayTrainWorker")):
        assert time.monotonic() < end, "a child outlives its sweep"
        time.sleep(0.1)
    left = [checkpoints.newest(Folder(str(folder))) for folder in folders]
    at = [found[1].position for found in left if found]
    assert len(at) == 2
    images = max(at) + 1280
    done = subprocess.run(
        command(images), cwd=CODE, env=environment, capture_output=True, text=True, timeout=900, check=False
    )
    assert done.returncode == 0, done.stderr[-5000:]
    for seed, folder in enumerate(folders):
        said = json.loads((tmp_path / f"sweeps/sweep/sweep.seed-{seed}.json").read_text())["said"]
        assert (said["images"], said["trained_images"]) == (images, images - at[seed]), "it goes on where it was"
        assert sorted(path.name for path in folder.glob("start-*")) == ["start-0001.yaml", "start-0002.yaml"]
