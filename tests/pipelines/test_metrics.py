"""What Prometheus is told of a training and of a drawing of samples is what their own records say."""

import os
import re
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import ray
from mlflow import MlflowClient
from prometheus_client.parser import text_string_to_metric_families

from jobs.presets import DIGITS
from models.network import NetworkConfig
from pipelines import metrics, worker, workers
from pipelines.checkpoints import folder_name
from pipelines.config import TrainJob
from pipelines.draw_config import DrawConfig
from pipelines.metrics import METRICS, Counter, Gauge
from pipelines.sample_config import SampleJob
from pipelines.sampling import sample_job
from pipelines.scaling import ScalingConfig
from pipelines.storage import Folder
from pipelines.tracking_config import TrackingConfig
from pipelines.training import lost_since, train
from pipelines.worker import TrainTask
from tests.conftest import free_ports
from tests.jobs import recorded
from tests.pipelines.states import TINY
from tests.processes import CODE, without_ray
from tests.promtool import promtool

pytestmark = pytest.mark.filterwarnings("ignore:The ``noload``:DeprecationWarning")  # MLflow's, of SQLAlchemy

Page = dict[str, dict[str, float]]
"""Of each metric the value of each run: the sum over the processes that tell one."""


class Scraper:
    """Asks an agent again and again, as Prometheus does, and knows the last word of each metric and run."""

    def __init__(self, port: int) -> None:
        self._address = f"http://127.0.0.1:{port}/metrics"
        self.last: Page = {}
        self.text = ""
        self._pages = 0
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        while not self._ended.wait(0.5):
            try:
                with urllib.request.urlopen(self._address, timeout=60) as answer:
                    self.text = answer.read().decode()
            except OSError:  # the agent is still starting
                continue
            found: Page = {}
            for family in text_string_to_metric_families(self.text):
                for sample in family.samples:
                    of_run = found.setdefault(sample.name, {})
                    run = sample.labels.get("run", "")
                    of_run[run] = of_run.get(run, 0) + sample.value
            for name, of_run in found.items():
                self.last.setdefault(name, {}).update(of_run)
            self._pages += 1

    def close(self) -> None:
        self._ended.set()
        self._thread.join()

    def wait(self, metric: metrics.Metric, run: str, value: float | None = None) -> Page:
        """Return what was seen, when a metric of a run is, or has a value: a process tells it every few seconds."""
        end = time.monotonic() + 120
        while (told := self.last.get(metric.exported, {}).get(run)) is None or value not in (None, told):
            assert time.monotonic() < end, {name: of for name, of in self.last.items() if "brickyard" in name}
            time.sleep(0.2)
        # What was told before is on the next page at the latest: the agent takes in one metric after the other.
        seen = self._pages
        while self._pages < seen + 2:
            assert time.monotonic() < end + 120, "the agent does not answer"
            time.sleep(0.2)
        return self.last


@pytest.fixture(scope="module")
def scraper() -> Iterator[Scraper]:
    """Asks the agent of a Ray without a dashboard, as a job makes itself one."""
    assert not ray.is_initialized(), "one Ray cluster at a time"
    port = free_ports(1)
    ray.init(
        address="local", num_cpus=6, include_dashboard=False, log_to_driver=False, logging_level="ERROR",
        _metrics_export_port=port, _system_config={"metrics_report_interval_ms": 3000},
    )  # fmt: skip
    scraper = Scraper(port)
    yield scraper
    scraper.close()
    ray.shutdown()


@pytest.fixture(scope="module")
def checkpoint_times() -> Iterator[list[float]]:
    """All that is told of when the newest checkpoint was made."""
    told: list[float] = []
    tell = Gauge.set

    def spy(gauge: Gauge, run: str, value: float) -> None:
        if gauge is metrics.CHECKPOINT:
            told.append(value)
        tell(gauge, run, value)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Gauge, "set", spy)
        yield told


@pytest.fixture(scope="module")
def trained(
    scraper: Scraper, tmp_path_factory: pytest.TempPathFactory, checkpoint_times: list[float]
) -> tuple[TrainJob, dict[str, Any], float]:
    """A run of 10 steps with two checkpoints, what its job said at its end, and when it began."""
    root = tmp_path_factory.mktemp("root")
    job = replace(
        DIGITS,
        name="seen",
        root=str(root),
        network=NetworkConfig(unet=TINY),
        fit=replace(
            DIGITS.fit,
            images=640,
            batch_images=64,
            micro_images=32,
            log_images=128,
            checkpoint_images=320,
            grid_images=640,
        ),
        scaling=ScalingConfig(workers=2),
        tracking=TrackingConfig(uri=f"sqlite:///{root}/mlflow.db", log_model=False),
        evaluate_images=0,
    )

    def lingers(task: TrainTask) -> None:
        worker.train_worker(task)
        end = time.monotonic() + 120  # of what a worker counts last Ray may lose a part, if it ends then
        while not (root / "seen").exists() and time.monotonic() < end:
            time.sleep(0.1)

    def look() -> None:
        while scraper.last.get(metrics.IMAGES.exported, {}).get("seen") != job.fit.images and not over.wait(0.2):
            pass
        (root / "seen").touch()

    began, over = time.time(), threading.Event()
    looking = threading.Thread(target=look)
    looking.start()
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(workers, "train_worker", lingers)
            return job, train(job), began
    finally:
        over.set()
        looking.join()


def history(root: Path, run: Any) -> Callable[[str], list[float]]:
    """What is on record of a metric, in its order."""
    client = MlflowClient(tracking_uri=f"sqlite:///{root}/mlflow.db")
    return lambda name: [one.value for one in client.get_metric_history(run.info.run_id, name)]


@pytest.mark.ray
def test_a_training_is_seen_as_it_is_on_record(
    scraper: Scraper, trained: tuple[TrainJob, dict[str, Any], float], checkpoint_times: list[float]
) -> None:
    job, said, began = trained
    of = {metric: metric.exported for metric in METRICS}
    scraper.wait(metrics.ENDED, "seen")
    # Its job has ended with the run, and the last of it is recorded after that.
    found = scraper.wait(metrics.SPOOL, "seen", 0)
    value = {metric: found.get(name, {}).get("seen") for metric, name in of.items()}
    (run,) = recorded.mlflow_runs(Path(job.root))
    on_record = history(Path(job.root), run)
    assert value[metrics.LENGTH] == value[metrics.POSITION] == said["images"] == 640
    assert value[metrics.IMAGES] == said["trained_images"] == 640
    assert value[metrics.RATE] == pytest.approx(on_record("images_per_s")[-1])
    assert value[metrics.DATA_WAIT] == pytest.approx(run.data.metrics["data_wait_percent"] / 100)
    assert value[metrics.WORKER_STARTS] == float(run.data.tags["brickyard.worker_starts"]) == 1
    assert value[metrics.CHECKPOINT_TOOK] == pytest.approx(run.data.metrics["checkpoint_s"])
    stalls = on_record("checkpoint_wait_s") + on_record("checkpoint_copy_s")
    assert value[metrics.CHECKPOINT_STALL] == pytest.approx(sum(stalls), rel=1e-6)
    first_start = Path(job.run.path("run.json")).stat().st_mtime
    assert checkpoint_times[0] == pytest.approx(first_start, abs=1e-5) and len(checkpoint_times) == 3
    committed = Path(job.run.path("checkpoint-000000000640/manifest.json")).stat().st_mtime
    assert value[metrics.CHECKPOINT] == pytest.approx(checkpoint_times[-1], abs=1e-3)
    assert value[metrics.CHECKPOINT] > committed - 1
    assert began <= value[metrics.STARTED] < value[metrics.CHECKPOINT] < value[metrics.ENDED] <= time.time()
    assert value[metrics.QUARANTINED] is None and value[metrics.STORAGE_RETRIES] is None, "there was nothing to count"


@pytest.mark.ray
def test_samples_are_seen_as_they_are_counted(
    scraper: Scraper, trained: tuple[TrainJob, dict[str, Any], float]
) -> None:
    job, out = trained[0], Folder(f"{trained[0].root}/drawn")
    draw = DrawConfig(steps=2, shard_images=10, batch_images=10, actors=1)
    said = sample_job(SampleJob(checkpoint=job.run.url, out=out.url, seeds="0-44", draw=draw))
    found = scraper.wait(metrics.ENDED, "drawn")
    assert found[metrics.SAMPLES.exported]["drawn"] == said["drawn_now"] == 45
    assert found[metrics.SAMPLES_LEFT.exported]["drawn"] == 0
    # One shard is missing, and is all that is drawn again.
    for name in ("part-000001.parquet", "_SUCCESS"):
        Path(out.path(), name).unlink()
    assert sample_job(SampleJob(checkpoint=job.run.url, out=out.url, seeds="0-44", draw=draw))["drawn_now"] == 10
    scraper.wait(metrics.SAMPLES, "drawn", 55)


@pytest.mark.ray
def test_the_names_are_as_prometheus_wants_them(
    scraper: Scraper, trained: tuple[TrainJob, dict[str, Any], float]
) -> None:
    """By promtool: base units, `_total` for what is counted, a help for each."""
    ours = "".join(f"{line}\n" for line in scraper.text.splitlines() if "ray_brickyard_" in line)
    for metric in METRICS:
        if metric.exported in ours:
            assert f"# HELP {metric.exported} {metric.help}" in ours
    # How Ray spells the labels that it adds is its own matter.
    promtool("check", "metrics", given=re.sub(r'\w+="', lambda label: label[0].lower(), ours))
    (tags,) = {tuple(sorted(re.findall(r'(\w+)="', line))) for line in ours.splitlines() if not line.startswith("#")}
    assert {"run", "WorkerId"} <= {*tags} and not any("brickyard" in tag for tag in tags) and len(tags) < 10


@pytest.mark.ray
def test_a_gauge_is_told_as_long_as_the_job_works_and_no_longer(scraper: Scraper) -> None:
    """Ray itself would drop it after two of its intervals, of 3 s here."""

    def served() -> bool:
        lines = [line for line in scraper.text.splitlines() if line.startswith(metrics.LENGTH.exported)]
        return any('run="long"' in line for line in lines)

    with metrics.at_work("long"):
        metrics.LENGTH.set("long", 7)
        scraper.wait(metrics.LENGTH, "long", 7)
        time.sleep(9)
        end = time.monotonic() + 6
        while not served():  # it may be said late once, on a busy machine
            assert time.monotonic() < end
            time.sleep(0.2)
    scraper.wait(metrics.ENDED, "long")
    end = time.monotonic() + 60
    while served():
        assert time.monotonic() < end
        time.sleep(0.2)
    with pytest.raises(RuntimeError), metrics.at_work("failed"):
        scraper.wait(metrics.STARTED, "failed")
        raise RuntimeError
    time.sleep(7)
    assert "failed" not in scraper.last[metrics.ENDED.exported]


@pytest.mark.ray
def test_ray_exports_what_the_dashboard_shows_of_it(scraper: Scraper, trained: object) -> None:
    shown = set(re.findall(r"\bray_(?!brickyard)\w+", (CODE / "infra/grafana/brickyard.json").read_text()))
    on_gpus = {name for name in shown if "_gpus_" in name}
    assert shown - on_gpus <= scraper.last.keys() and len(shown) > len(on_gpus) > 0


def test_a_start_of_the_job_makes_no_checkpoint_younger(tmp_path: Path) -> None:
    run = Folder(str(tmp_path))
    run.put("run.json", b"{}")
    os.utime(run.path("run.json"), (1000, 1000))
    run.put("start-0002.yaml", b"")
    assert lost_since(run, None) == 1000
    checkpoint = run / folder_name(64)
    checkpoint.put("manifest.json", b"{}")
    os.utime(checkpoint.path("manifest.json"), (2000, 2000))
    assert lost_since(run, checkpoint) == 2000


SPEAKS = """
import sys, threading, time, urllib.request
import ray
from pipelines import metrics
from pipelines.cluster import cluster

calls, done = [0, 0], threading.Event()

def speak():
    while not done.is_set():
        calls[0] += 1
        metrics.SPOOL.set("r", calls[0])
        metrics.IMAGES.add("r", 1)
        calls[1] += metrics._values.get((metrics.SPOOL, "r")) is not None

real, at_end = ray.shutdown, []

def shutdown():
    at_end.append(list(calls))
    real()
    time.sleep(0.2)
    at_end.append(list(calls))

ray.shutdown = shutdown
threads = [threading.Thread(target=speak, daemon=True) for _ in range(3)]
for _ in range(2):  # and a Ray after it is spoken to again
    before = list(calls)
    with cluster():
        for thread in threads:
            thread.is_alive() or thread.start()
        with metrics.at_work("w"):
            time.sleep(0.5)
        assert calls[1] > before[1] + 3, "they are heard"
    began, ended = at_end[-2:]
    assert ended[0] > began[0], "they went on"
    assert ended[1] <= began[1] + 3, "and were not heard: each was at most at the end of a call"
    assert not metrics._values
done.set()
print("went on")
"""


@pytest.mark.ray
def test_who_speaks_while_ray_ends_is_not_heard_and_does_no_harm() -> None:
    """Ray ends a process that touches it while it shuts down; the thread that delivers the record speaks to the end."""
    done = subprocess.run(
        [sys.executable, "-c", SPEAKS], cwd=CODE, env=without_ray() | {"PYTHONPATH": str(CODE)},
        capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert (done.returncode, done.stdout) == (0, "went on\n"), done.stderr


WITHOUT_RAY = """
import sys
from pipelines.metrics import METRICS, Counter, at_work
with at_work("r"):
    for metric in METRICS:
        (metric.add if isinstance(metric, Counter) else metric.set)("r", 1)
assert "ray" not in sys.modules
import ray.util.metrics
METRICS[0].set("r", 1)
print(len(METRICS), ray.is_initialized())
"""


def test_without_ray_nothing_happens() -> None:
    done = subprocess.run([sys.executable, "-c", WITHOUT_RAY], cwd=CODE, capture_output=True, text=True, check=True)
    assert done.stdout == f"{len(METRICS)} False\n"


def test_each_metric_is_said_somewhere_and_described_once() -> None:
    names = {name for name, value in vars(metrics).items() if isinstance(value, metrics.Metric)}
    code = {path: path.read_text() for path in (CODE / "pipelines").glob("*.py")}
    for name in names:
        assert re.search(rf"\b{name}\.(set|add)\(", "".join(code.values())), f"nobody says {name}"
    assert len({metric.name for metric in METRICS}) == len(METRICS) == len(names)
    for metric in METRICS:
        assert metric.help.endswith(".") and isinstance(metric, Counter | Gauge)
