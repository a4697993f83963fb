"""The recipes of docs/operations.md, executed as they stand there, by a shell, against real servers."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from mlflow import MlflowClient
from mlflow.exceptions import MlflowException

from pipelines import checkpoints, run_folder, tracking
from pipelines.replay import ReplayJob, replay
from pipelines.storage import Folder
from pipelines.tracking import Tracker, open_tracker
from pipelines.tracking_config import TrackingConfig
from tests.conftest import free_ports, need_postgres
from tests.pipelines.committed import committed
from tests.processes import CODE
from tests.server import deliver

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # MLflow's own dependencies
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]
GUIDE = (CODE / "docs" / "operations.md").read_text()
SERVER = "infra/local/mlflow.sh"
GOES = """mkdir -p goes && cat >goes/sitecustomize.py <<'END'
import fsspec
real = fsspec.url_to_fs
def url_to_fs(url):
    fs, path = real(url)
    find = type(fs).find
    def listed(start):
        found = find(fs, start)
        for name in found:
            if name.endswith("/samples/b"):
                type(fs)(skip_instance_cache=True).rm_file(name)
        return found
    fs.find = listed
    return fs, path
fsspec.url_to_fs = url_to_fs
END
export PYTHONPATH=goes
"""
"""After these words an object goes, by another's hand, when it has been listed."""


def recipe(word: str) -> str:
    """The block of the guide that has a word in it."""
    blocks = [found[0] for found in re.finditer(r"(?m)(^ {4}.*\n|^\n(?= {4}))+", GUIDE)]
    (found,) = [block for block in blocks if word in block]
    return re.sub("(?m)^ {4}", "", found)


class Keeper:
    """Whoever keeps a server, in a folder of their own; the environment of this process is theirs."""

    def __init__(self, folder: Path, yard: Folder, patch: pytest.MonkeyPatch) -> None:
        self.folder, self.yard, self.patch = folder, yard, patch
        self.artifacts = yard / "artifacts"
        (folder / "infra").symlink_to(CODE / "infra")
        port = free_ports(2)
        self.where = [str(folder / "mlflow"), str(port)]
        patch.setenv("HOME", str(folder))
        patch.delenv("XDG_CACHE_HOME", raising=False)
        patch.setenv("MLFLOW_ARTIFACTS", self.artifacts.url)
        patch.setenv("MLFLOW_BIN", str(Path(sys.executable).parent / "mlflow"))
        patch.setenv("PATH", f"{Path(sys.executable).parent}:{self.do('echo $PATH').strip()}")
        told = {"DATA": self.where[0], "PORT": port, "PGHOST": "127.0.0.1", "PGPORT": port + 1, "PGUSER": "mlflow",
                "PGPASSFILE": f"{self.where[0]}/pgpass"}  # fmt: skip
        for name, value in told.items():
            patch.setenv(name, str(value))

    def do(self, words: str, code: int = 0) -> str:
        """Run words of the guide as they are pasted, with the folders of this test in them."""
        for told, ours in {"bucket": self.yard, "backup": self.yard / "backup", "mlflow": self.artifacts}.items():
            words = words.replace(f"s3://{told}", ours.url)
        done = subprocess.run(["bash"], input=words, cwd=self.folder, capture_output=True, text=True, check=False)
        assert done.returncode == code, done.stderr[-3000:]
        return done.stdout + done.stderr

    def learn(self) -> None:
        """Take the address and the password from the script."""
        for name, value in re.findall(r"(MLFLOW_\w+)=(\S+)", self.do(f"{SERVER} env $DATA $PORT")):
            self.patch.setenv(name, value)

    def begin(self) -> Folder:
        """Start the server, and a run, which has a checkpoint; return its folder."""
        self.do(f"{SERVER} up $DATA $PORT")
        self.learn()
        home = self.yard / "yard" / "runs" / "digits"
        run_folder.claim(home, {})
        committed(home, classes=0)
        return home

    def bin(self) -> set[str]:
        """What is deleted in MLflow, and not for good."""
        tables = {"runs": "run_uuid", "logged_models": "model_id", "experiments": "experiment_id::text"}
        asked = [f"SELECT {key} FROM {name} WHERE lifecycle_stage = 'deleted'" for name, key in tables.items()]
        return set(self.do(f'psql -d mlflow -tAc "{" UNION ".join(asked)}"').split())

    def start(self, home: Folder, number: int) -> Tracker:
        return open_tracker(TrackingConfig(), self.yard, home, "digits", run_folder.run_id(home), {}, {}, number)


@pytest.fixture
def keeper(s3: Folder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, patient: None) -> Keeper:
    need_postgres()
    return Keeper(tmp_path, s3, monkeypatch)


def test_back_up_lose_restore_and_renew_the_password(keeper: Keeper, monkeypatch: pytest.MonkeyPatch) -> None:
    try:
        home = keeper.begin()
        tracker = keeper.start(home, 1)
        tracker.metrics({"loss": 0.5}, 10)
        tracker.file("config.yaml", b"seed: 0")
        tracker.finish("FINISHED")
        deliver(home, os.environ["MLFLOW_TRACKING_URI"])  # on a busy machine the server may take its time
        client, run = MlflowClient(), tracker.tracker_id
        model = client.create_logged_model(client.get_run(run).info.experiment_id, source_run_id=run)
        client.create_registered_model("digits")
        client.create_model_version("digits", f"models:/{model.model_id}", run, model_id=model.model_id)
        client.set_registered_model_alias("digits", "champion", "1")

        (keeper.yard / "samples").put("part-000000.parquet", b"pixels")
        home.put("goes-on-at", b"older")
        copy = recipe("copy() {") + "copy s3://bucket/samples s3://"
        keeper.do(f"{copy}a-bucket-that-was-not-made/samples", code=1)
        (keeper.yard / "samples").put("b", b"")
        assert keeper.do(GOES + copy + "backup/some").count("went meanwhile") == 1
        assert (keeper.yard / "backup" / "some").names() == ["part-000000.parquet"]
        back_up = recipe("copy() {") + recipe("pg_dump")
        keeper.do(back_up)
        dumped = (keeper.folder / "backup/users.dump").read_bytes()
        monkeypatch.setenv("PGPORT", "1")
        keeper.do(back_up, code=1)
        assert (keeper.folder / "backup/users.dump").read_bytes() == dumped, "a good one outlives one that fails"
        monkeypatch.setenv("PGPORT", str(int(keeper.where[1]) + 1))
        keeper.do(recipe("pg_restore"), code=1)  # into one that is at work
        assert client.get_run(run).info.lifecycle_stage == "active"
        keeper.do(f"{SERVER} wipe $DATA $PORT")
        for lost in ("yard", "samples", "artifacts"):
            (keeper.yard / lost).delete()
            assert not (keeper.yard / lost).find()
        home.put("goes-on-at", b"newer")
        keeper.do(recipe("copy() {") + recipe("copy s3://backup/mlflow"))
        assert home.get("goes-on-at") == b"newer", "what is there is newer than its copy"
        keeper.do(recipe("pg_restore"))
        found = checkpoints.newest(home)
        assert found and found[1].position == 128
        assert (keeper.yard / "samples").get("part-000000.parquet") == b"pixels"
        assert [(point.step, point.value) for point in client.get_metric_history(run, "loss")] == [(10, 0.5)]
        assert Path(client.download_artifacts(run, "config.yaml")).read_text() == "seed: 0"
        assert client.get_model_version_by_alias("digits", "champion").run_id == run

        # A job is at work while the password is renewed: it has the old one, and loses nothing.
        tracker = keeper.start(home, 2)
        tracker.metrics({"loss": 0.4}, 20)
        secrets = Path(keeper.where[0])
        with monkeypatch.context() as wrong:
            wrong.setenv("MLFLOW_TRACKING_PASSWORD", "not the password")
            keeper.do(recipe("update-password"), code=1)
        keeper.do(recipe("update-password"), code=1)  # what the server may have taken is not written over
        assert (secrets / "password.new").exists()
        keeper.do(f"{SERVER} status $DATA $PORT")
        (secrets / "password.new").unlink()
        keeper.do(recipe("update-password"))
        monkeypatch.setattr(tracking, "SERVER_PATIENCE_S", 0.5)
        tracker.metrics({"loss": 0.3}, 30)
        tracker.finish("FINISHED")
        with pytest.raises(MlflowException, match="not authenticated"):
            client.get_run(run)
        keeper.do(f"{SERVER} status $DATA $PORT")
        keeper.learn()
        assert replay(ReplayJob(runs=(home.url,)))["delivered"] > 0
        assert [point.step for point in client.get_metric_history(run, "loss")] == [10, 20, 30]
    finally:
        keeper.do(f"{SERVER} wipe $DATA $PORT")


def test_a_run_is_deleted_and_nothing_else(keeper: Keeper) -> None:
    try:
        home = keeper.begin()
        tracker = keeper.start(home, 1)
        tracker.file("config.yaml", b"seed: 0")
        tracker.finish("FINISHED")
        deliver(home, os.environ["MLFLOW_TRACKING_URI"])
        client, run = MlflowClient(), tracker.tracker_id
        experiment = client.get_run(run).info.experiment_id
        model = client.create_logged_model(experiment, source_run_id=run).model_id
        client.create_registered_model("digits")
        client.create_model_version("digits", f"models:/{model}", run, model_id=model)
        client.set_registered_model_alias("digits", "champion", "1")
        spools = keeper.folder / ".cache/brickyard/spool"
        spools.mkdir(parents=True, exist_ok=True)
        spool = spools / f"{run_folder.run_id(home)}-other.db"
        spool.write_bytes(b"")
        (spools / "another-run.db").write_bytes(b"")

        # What others have deleted, and may want back; and what they have not.
        theirs = client.create_experiment("theirs")
        binned = {client.create_run(experiment).info.run_id, client.create_run(theirs).info.run_id, theirs}
        for one in binned - {theirs}:
            client.delete_run(one)
        binned.add(client.create_logged_model(experiment).model_id)
        client.delete_logged_model(*(one for one in binned if one.startswith("m-")))
        client.delete_experiment(theirs)
        bystander = client.create_run(experiment).info.run_id
        assert keeper.bin() == binned

        delete = recipe("delete_model_version")
        files = sorted(one.name for one in home.find())
        assert "version 1 of digits is the champion" in keeper.do(delete, code=1)
        assert sorted(one.name for one in home.find()) == files and home.exists("run.json") and spool.exists()
        assert keeper.bin() == binned and client.get_model_version_by_alias("digits", "champion").run_id == run

        client.delete_registered_model_alias("digits", "champion")
        spool.unlink()
        (spool / "in-the-way").mkdir(parents=True)
        keeper.do(delete, code=1)  # it is interrupted halfway
        assert keeper.bin() == {*binned, run, model} and home.exists("deleted-run.json") and not home.exists("run.json")
        (spool / "in-the-way").rmdir()
        spool.rmdir()
        spool.write_bytes(b"")
        assert "deleted: " in keeper.do(delete)
        assert home.names() == [] and [one.name for one in spools.iterdir()] == ["another-run.db"]
        assert client.search_model_versions("name = 'digits'") == []
        assert "nothing was touched" in keeper.do(delete, code=1)
        assert keeper.bin() == {*binned, run, model} and client.get_run(bystander).info.lifecycle_stage == "active"

        keeper.do(recipe("mlflow gc"))
        assert keeper.bin() == {*binned, run, model}, "none of it is 30 days old"
        keeper.do(recipe("mlflow gc").replace("30d", "0d"))
        assert keeper.bin() == set() and client.get_run(bystander).info.lifecycle_stage == "active"
        assert not [one for one in keeper.artifacts.find() if run in one.name], "its files are gone as well"
    finally:
        keeper.do(f"{SERVER} wipe $DATA $PORT")
