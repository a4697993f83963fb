"""The whole road, as a user walks it: commands in processes of their own, killed where it hurts."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray
import yaml
from safetensors.torch import load, load_file

from pipelines import checkpoints
from pipelines.images import View
from pipelines.manifest import Manifest
from pipelines.plan import Plan
from pipelines.storage import Folder
from tests.jobs import recorded
from tests.processes import CODE, kill, of_session, wait_for, without_ray

pytestmark = [
    pytest.mark.ray,
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # MLflow's own dependencies
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]

SHORT = [
    "--fit.images=3840", "--fit.log-images=640", "--fit.checkpoint-images=1280", "--fit.grid-images=1920",
    "--fit.warm-up-images=640", "--evaluate-images=60", "--draw.steps=5", "--draw.shard-images=20",
    "--data.held-out=97",
]  # fmt: skip


def start(root: Path | str, *command: str, code: Path = CODE, **env: str) -> subprocess.Popen[str]:
    assert not ray.is_initialized(), "one Ray cluster at a time"
    return subprocess.Popen(
        [sys.executable, *command, "--root", str(root)],
        cwd=code,
        env=without_ray() | {"OMP_NUM_THREADS": "1"} | env,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
    )


def finish(process: subprocess.Popen[str], lines: int = 1) -> dict[str, Any]:
    out, err = process.communicate(timeout=600)
    assert process.returncode == 0, err[-5000:]
    assert len(out.splitlines()) == lines
    return json.loads(out.splitlines()[-1])  # type: ignore[no-any-return]


def committed(root: Path, position: int) -> Callable[[], bool]:
    manifest = root / "runs/digits" / checkpoints.folder_name(position) / "manifest.json"
    return manifest.exists


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    root = tmp_path_factory.mktemp("whole")
    return root, finish(start(root, "-m", "jobs.train", "digits", *SHORT))


def test_it_leaves_what_it_says(uninterrupted: tuple[Path, dict[str, Any]]) -> None:
    _, said = uninterrupted
    assert said["trained_images"] == said["images"] == 3840
    assert 0 < said["loss"] < 1
    assert 0 < said["frechet_distance"] < 10
    for name in ("contact_sheet", "strip"):
        assert Path(said[name].removeprefix("file://")).read_bytes().startswith(b"\x89PNG")
    names = set(Folder(said["run"]).names())
    assert {"run.json", "start-0001.yaml", "export", checkpoints.folder_name(3840)} <= names
    assert not [name for name in names if name.startswith("ray-")], "what Ray kept of its own is gone"
    plain, pipeline = {"ema.safetensors", "model.safetensors", "config.json"}, {"model_index.json", "unet", "scheduler"}
    assert plain | pipeline == set((Folder(said["run"]) / "export").names())


def validated(root: Path) -> dict[int, float]:
    """The loss of the images that are held out, by position; none may be on record twice."""
    from mlflow import MlflowClient

    (run,) = recorded.mlflow_runs(root)
    points = MlflowClient(tracking_uri=f"sqlite:///{root}/mlflow.db").get_metric_history(
        run.info.run_id, "validation_loss"
    )
    positions = [point.step for point in points]
    assert len(set(positions)) == len(positions) and set(positions) <= {1280, 2560, 3840}
    return {point.step: point.value for point in points}


def test_the_record_has_what_a_reader_looks_for(uninterrupted: tuple[Path, dict[str, Any]]) -> None:
    from mlflow import MlflowClient

    root, said = uninterrupted
    (run,) = recorded.mlflow_runs(root)
    assert run.info.run_id == said["mlflow_run"] and run.info.status == "FINISHED"
    assert run.data.params["fit.learning_rate"] == "0.002" and run.data.params["parameters"] == "701345"
    assert run.data.params["data_digest"] == said["data_digest"]
    assert (run.data.tags["brickyard.workers"], run.data.tags["brickyard.worker_starts"]) == ("2", "1")
    bands = {f"loss_band_{i}_of_4" for i in range(1, 5)}
    assert {"loss", "images_per_s", "data_wait_percent", "gradient_norm", "frechet_distance"} | bands <= set(
        run.data.metrics
    )
    assert run.data.metrics["frechet_distance"] == said["frechet_distance"]
    client = MlflowClient(tracking_uri=f"sqlite:///{root}/mlflow.db")
    losses = client.get_metric_history(run.info.run_id, "loss")
    assert [metric.step for metric in losses] == list(range(640, 3841, 640))
    assert validated(root)[3840] == run.data.metrics["validation_loss"] == said["validation_loss"]
    assert {f"validation_loss_band_{i}_of_4" for i in range(1, 5)} <= set(run.data.metrics)
    pictures = [file.path for file in client.list_artifacts(run.info.run_id, "images") if "samples" in file.path]
    grids = {path.split("+")[2] for path in pictures}
    assert grids == {"0", "1920", "3840"}, "from the noise on"


def test_killed_in_the_middle_it_ends_bit_for_bit_the_same(
    uninterrupted: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    """SIGKILL for the driver and all of its group, twice: after a checkpoint, and again when it has gone on from it."""
    whole, expected = uninterrupted
    for number in (1, 2):
        process = start(tmp_path, "-m", "jobs.train", "digits", *SHORT)
        # On a busy machine the first blow may come a checkpoint late; then the second start must at least have begun.
        wait_for((tmp_path / f"runs/digits/start-{number:04d}.yaml").exists, process)
        wait_for(committed(tmp_path, 1280 * number), process)
        kill(process)
    newest = checkpoints.newest(Folder(str(tmp_path / "runs/digits")))
    assert newest and newest[1].position in (2560, 3840)
    said = finish(start(tmp_path, "jobs/train.py", "digits", *SHORT))
    assert said["trained_images"] == 3840 - newest[1].position

    for weights in ("model", "ema"):
        a, b = (load_file(root / f"runs/digits/export/{weights}.safetensors") for root in (whole, tmp_path))
        assert a.keys() == b.keys()
        assert all(a[name].equal(b[name]) for name in a), f"{weights} differ"
    assert said["frechet_distance"] == pytest.approx(expected["frechet_distance"], rel=1e-9)

    (run,) = recorded.mlflow_runs(tmp_path)
    assert run.info.status == "FINISHED" and run.data.tags["brickyard.starts"] == "3"
    one, other = validated(whole), validated(tmp_path)
    assert newest[1].position in other, "the checkpoint that a start goes on from is measured by that start"
    assert all(one[position] == other[position] for position in one.keys() & other.keys())
    assert 3840 in one.keys() & other.keys()

    # Fired again it is done at once, and has changed nothing.
    before = (tmp_path / "runs/digits/export/ema.safetensors").read_bytes()
    again = finish(start(tmp_path, "jobs/train.py", "digits", *SHORT))
    assert again["trained_images"] == 0 and again["validation_loss"] == said["validation_loss"]
    assert (tmp_path / "runs/digits/export/ema.safetensors").read_bytes() == before


def claims(home: Folder) -> list[str]:
    """What says by which id a tracker knows a run."""
    return [name for name in home.names() if name.startswith("mlflow-")]


def test_everything_but_the_bucket_is_lost(
    uninterrupted: tuple[Path, dict[str, Any]], s3: Folder, tmp_path: Path
) -> None:
    """The cluster, the driver's disk, its code and the tracker's database, between two starts of one command."""
    from mlflow import MlflowClient

    home = s3 / "runs" / "digits"
    for life in ("first", "second"):
        at = tmp_path / "machine"
        for part in ("jobs", "pipelines", "models"):
            shutil.copytree(CODE / part, at / life / part)
        flags = ["digits", *SHORT, "--evaluate-images=0", f"--tracking.uri=sqlite:///{at}/mlflow.db"]
        if life == "first":  # the database is there, or the run could be over before it is named in the bucket
            made = [sys.executable, "-m", "mlflow", "db", "upgrade", f"sqlite:///{at}/mlflow.db"]
            subprocess.run(made, check=True, capture_output=True)
        process = start(s3.url, "-m", "jobs.train", *flags, code=at / life, HOME=str(at), XDG_CACHE_HOME=f"{at}/cache")
        if life == "first":
            wait_for(lambda: bool(claims(home)) and checkpoints.newest(home) is not None, process)
            kill(process)
            (claim,) = claims(home)
            unknown = json.loads(home.get(claim))
            assert list((at / "cache").rglob("*.db"))
            shutil.rmtree(at)
    said = finish(process)
    assert said["images"] == 3840 and 0 < said["trained_images"] < 3840
    for weights in ("model", "ema"):
        a = load_file(uninterrupted[0] / f"runs/digits/export/{weights}.safetensors")
        b = load(home.get(f"export/{weights}.safetensors"))
        assert a.keys() == b.keys() and all(a[name].equal(b[name]) for name in a), f"{weights} differ"
    client = MlflowClient(tracking_uri=f"sqlite:///{at}/mlflow.db")
    (run,) = client.search_runs([client.get_experiment_by_name("brickyard").experiment_id])
    assert run.info.run_id == said["mlflow_run"] == json.loads(home.get(claim))["mlflow_run"] != unknown["mlflow_run"]
    assert run.data.tags["brickyard.run"] == unknown["run"]
    assert (run.info.status, run.data.params["fit.images"], run.data.metrics["loss"] > 0) == ("FINISHED", "3840", True)


def test_a_worker_that_is_killed_is_replaced_and_nothing_is_lost(
    uninterrupted: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    process = start(tmp_path, "-m", "jobs.train", "digits", *SHORT, "--evaluate-images=0")
    wait_for(committed(tmp_path, 1280), process)
    victims = list(of_session(process.pid, b"RayTrainWorker"))
    assert len(victims) == 2
    os.kill(victims[1], signal.SIGKILL)
    _, err = process.communicate(timeout=600)
    assert process.returncode == 0, err[-5000:]
    first, second = re.findall(r"(\d+) workers train from (\d+) images on", err)
    (run,) = recorded.mlflow_runs(tmp_path)
    assert run.data.tags["brickyard.worker_starts"] == "2" and run.data.tags["brickyard.starts"] == "1"
    assert first == ("2", "0") and second[0] == "2" and 1280 <= int(second[1]) < 3840
    for weights in ("model", "ema"):
        a, b = (load_file(root / f"runs/digits/export/{weights}.safetensors") for root in (uninterrupted[0], tmp_path))
        assert all(a[name].equal(b[name]) for name in a), f"{weights} differ"


def test_a_flipped_bit_costs_what_was_trained_since_the_checkpoint_before(
    uninterrupted: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    shutil.copytree(uninterrupted[0], tmp_path, dirs_exist_ok=True)
    damaged = tmp_path / "runs/digits" / checkpoints.folder_name(3840) / "__0_0.distcp"
    data = bytearray(damaged.read_bytes())
    data[1000] ^= 4
    damaged.write_bytes(data)
    longer = ["--fit.images=5120", "--evaluate-images=0", "--tracking.uri=none"]
    process = start(tmp_path, "jobs/train.py", "digits", *SHORT, *longer)
    out, err = process.communicate(timeout=600)
    assert process.returncode == 0, err[-5000:]
    assert f"passing over a damaged checkpoint: {damaged.as_uri()} has sha256" in err
    assert "2 workers train from 2560 images on" in err
    said = json.loads(out.splitlines()[-1])
    assert (said["trained_images"], said["images"]) == (2560, 5120)
    newest = checkpoints.newest(Folder(str(tmp_path / "runs/digits")))
    assert newest and newest[1].position == 5120
    again = checkpoints.read_verified(Folder(str(damaged.parent)))
    assert again.position == 3840, "committed anew, in the place of the damaged one"


def test_what_workers_are_handed_is_the_plan_across_a_kill_and_other_numbers_of_them(tmp_path: Path) -> None:
    """SIGKILL for one of two workers in the middle of a step and of an epoch; then one worker goes on."""
    out = tmp_path / "handed"
    out.mkdir()
    flags = ["digits", "--evaluate-images=0", "--tracking.uri=none", "--fit.micro-images=32",
             "--fit.log-images=640", "--fit.checkpoint-images=640", "--data.window-bytes=16384"]  # fmt: skip
    first = [*flags, "--fit.images=1920", f"--root={tmp_path}"]
    then = [*flags, "--fit.images=2560", "--scaling.workers=1"]
    finish(start(tmp_path, "-m", "tests.jobs.recorded", str(out), "1000", *first, "--then", *then), lines=2)
    attempts = recorded.written(out)
    assert [(at, attempt.world) for at, attempt in attempts.items()] == [(0, 2), (640, 2), (1920, 1)]

    # Without Ray: the plan alone, and the images as they are stored.
    data = next(Folder(f"{tmp_path}/data") / name for name in Folder(f"{tmp_path}/data").names() if "-8x8x1-" in name)
    manifest = Manifest.load(data)
    stored = manifest.read(data, np.arange(manifest.rows), View(side=8, channels=1), None, {})
    ids = Plan(0, manifest.rows, manifest.row_group_rows, 256).rows(0, 2560)
    expected = {
        position: recorded.Entry(row, int(stored.label[row]), zlib.crc32(stored.image[row].tobytes()))
        for position, row in enumerate(ids.tolist())
    }
    kept = [
        {position: entry for position, entry in attempts[at].ledger.items() if position < until}
        for at, until in ((0, 640), (640, 1920), (1920, 2560))
    ]
    assert [len(ledger) for ledger in kept] == [640, 1280, 640]
    assert kept[0] | kept[1] | kept[2] == expected
    # What was handed out beyond the checkpoint was handed out again, and was the same.
    lost = {position: entry for position, entry in attempts[0].ledger.items() if position >= 640}
    assert {*range(640, 896), 1000} <= lost.keys()
    assert lost == {position: expected[position] for position in lost} and lost.items() <= kept[1].items()


def test_an_interrupt_ends_a_run_cleanly(tmp_path: Path) -> None:
    """As Ctrl-C sends it; SIGTERM goes to the job of tests/faults whose nodes go and come."""
    process = start(tmp_path, "-m", "jobs.train", "digits", *SHORT)
    wait_for(committed(tmp_path, 1280), process)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 130, err[-3000:]
    assert json.loads(out.splitlines()[-1]) == {"error": "interrupted", "exit_code": 130}
    (run,) = recorded.mlflow_runs(tmp_path)
    assert run.info.status == "KILLED"


def test_the_kept_configuration_repeats_the_run(uninterrupted: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    kept = uninterrupted[0] / "runs/digits/start-0001.yaml"
    assert yaml.safe_load(kept.read_text())["fit"]["images"] == 3840
    process = start(tmp_path, "-m", "jobs.train", "--config", str(kept), "--dry-run")
    said = finish(process)
    assert (said["dry_run"], said["steps"], said["starts_at"]) == (True, 30, 0)
    assert list(tmp_path.iterdir()) == [], "a dry run changes nothing"
