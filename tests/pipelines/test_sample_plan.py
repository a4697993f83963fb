"""What a sample depends on: its label, the sampler's settings, and nothing that is not on record."""

import io
import json
import shutil
import threading
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from jobs.presets import DIGITS
from pipelines import sample_shards
from pipelines.config import TrainJob
from pipelines.draw_config import DrawConfig
from pipelines.draw_shard import DrawShard
from pipelines.errors import ConfigurationError, DataError, TryAgainError
from pipelines.images import Pixels, decode
from pipelines.lease import Fence
from pipelines.sample_config import SampleJob
from pipelines.sample_plan import WHAT_A_SAMPLE_DEPENDS_ON, SamplePlan, check_claim, claim, identity, plan_samples
from pipelines.sample_record import recorded
from pipelines.sampling import dry_run
from pipelines.storage import Folder
from tests.pipelines.committed import committed

DRAW = DrawConfig(steps=3, shard_images=10, batch_images=5)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Folder:
    return committed(Folder(str(tmp_path_factory.mktemp("run"))), classes=4)


def plan(run: Folder, out: Path, **draw: Any) -> SamplePlan:
    return plan_samples(SampleJob(checkpoint=run.url, out=str(out), seeds="7-16", draw=replace(DRAW, **draw)))


def drawn(plan: SamplePlan) -> tuple[list[int], np.ndarray]:
    """Draw a shard where we stand; return its labels and pictures."""
    list(DrawShard(plan)({"id": np.array([0])}))
    table = pq.read_table(io.BytesIO(plan.out.get("part-000000.parquet")))
    assert table["seed"].to_pylist() == list(range(7, 17))
    return table["label"].to_pylist(), decode(table["image"].to_pylist(), "png", (8, 8, 1))


def test_a_seed_has_its_label_and_the_file_says_which(run: Folder, tmp_path: Path) -> None:
    labels, pictures = drawn(plan(run, tmp_path / "each"))
    assert labels == [seed % 4 for seed in range(7, 17)]
    only, of_one = drawn(plan(run, tmp_path / "one", label="c"))
    assert only == [2] * 10
    for i, label in enumerate(labels):
        assert np.array_equal(pictures[i], of_one[i]) == (label == 2), "the pixels of a seed depend on its label"


def test_no_samples_are_made_of_what_is_left_of_others(run: Folder, tmp_path: Path) -> None:
    mine = plan(run, tmp_path / "out")
    claim(mine)
    drawn(mine)
    claim(mine)
    (tmp_path / "out/plan.json").unlink()
    with pytest.raises(DataError, match=r"holds part-000000\.parquet and no plan\.json.*another --out"):
        claim(plan(run, tmp_path / "out", steps=2))
    with pytest.raises(DataError, match="no plan"):
        dry_run(SampleJob(checkpoint=run.url, out=mine.out.url, seeds="7-16", draw=DRAW))
    (tmp_path / "out/part-000000.parquet").unlink()
    claim(plan(run, tmp_path / "out", steps=2))


def test_guidance_exaggerates_and_1_is_none(run: Folder, tmp_path: Path) -> None:
    plain, with_1, with_3 = (
        drawn(plan(run, tmp_path / str(i), **draw))[1]
        for i, draw in enumerate([{}, {"guidance": 1.0}, {"guidance": 3.0}])
    )
    assert np.array_equal(plain, with_1)
    assert not np.array_equal(plain, with_3)


def test_each_setting_that_changes_pictures_makes_other_samples(run: Folder, tmp_path: Path) -> None:
    """And all of them are in the claim of the folder, so that no folder mixes two."""
    other = {
        "sampler": "heun", "steps": 4, "spacing": "quadratic", "label": "a", "guidance": 2.0, "clip": False,
        "weights": "last", "batch_images": 4,
    }  # fmt: skip
    mine = plan(run, tmp_path / "mine")
    mine.out.put("plan.json", b"{}")
    pictures = drawn(mine)[1]
    for name, value in other.items():
        theirs = plan(run, tmp_path / name, **{name: value})
        assert identity(theirs) != identity(mine)
        if name != "batch_images":
            assert not np.array_equal(drawn(theirs)[1], pictures), name
    with pytest.raises(ConfigurationError, match="holds other samples"):
        check_claim(mine)
    assert set(other) | {"eta", "ema_std", "compile"} == set(WHAT_A_SAMPLE_DEPENDS_ON)
    with_eta = [drawn(plan(run, tmp_path / f"eta{eta}", sampler="ddim", eta=eta))[1] for eta in (0.0, 1.0)]
    assert not np.array_equal(*with_eta)


@pytest.mark.parametrize(
    ("draw", "message"),
    [
        ({"label": "e"}, r"draw\.label is 'e'; the network knows a, b, c, d"),
        ({"steps": 1001}, r"draw\.steps is 1001; it must be at most the T of the checkpoint, 1000"),
    ],
)
def test_what_the_network_cannot_draw_is_refused(
    draw: dict[str, Any], message: str, run: Folder, tmp_path: Path
) -> None:
    with pytest.raises(ConfigurationError, match=message):
        plan(run, tmp_path, **draw)


def test_labels_of_a_network_that_knows_none_are_refused(tmp_path: Path) -> None:
    run = committed(Folder(str(tmp_path / "run")), classes=0)
    assert drawn(plan(run, tmp_path / "out"))[0] == [-1] * 10
    refused: dict[str, dict[str, Any]] = {
        r"draw\.label is a; .* knows no labels": {"label": "a"},
        r"draw\.guidance is 2\.0; .* train one with network\.labels": {"guidance": 2.0},
    }
    for message, draw in refused.items():
        with pytest.raises(ConfigurationError, match=message):
            plan(run, tmp_path / "out", **draw)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"eta": 1.5, "sampler": "ddim"}, r"draw\.eta is 1\.5; it must lie in 0\.\.1"),
        ({"eta": 0.5}, r"draw\.eta is 0\.5 and draw\.sampler dpm-solver; only ddim takes an eta"),
        ({"guidance": -1.0}, r"draw\.guidance is -1\.0; it must not be negative"),
        ({"ema_std": 0.1, "weights": "last"}, r"draw\.ema_std is 0\.1 and draw\.weights is last"),
    ],
)
def test_settings_that_make_no_sense_are_refused(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        DrawConfig(**wrong)


@pytest.mark.parametrize("std", [0.5, -1.0, float("nan")])
def test_widths_that_cannot_be_are_refused_at_once(std: float) -> None:
    with pytest.raises(ConfigurationError, match=rf"draw\.ema_std is {std}; a width"):
        DrawConfig(ema_std=std)


def test_a_width_needs_snapshots_before_training_and_before_drawing(run: Folder, tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"draw\.ema_std is 0\.1; .* add --fit\.ema\.power-stds"):
        replace(DIGITS, draw=replace(DIGITS.draw, ema_std=0.1))
    with pytest.raises(ConfigurationError, match=r"draw\.ema_std is 0\.1; .* has no snapshots"):
        plan(run, tmp_path / "out", ema_std=0.1)


def test_one_label_is_not_scored_against_all() -> None:
    with pytest.raises(ConfigurationError, match=r"draw\.label is '7' and evaluate_images 1797"):
        replace(DIGITS, network=replace(DIGITS.network, labels=True), draw=replace(DIGITS.draw, label="7"))


@pytest.mark.parametrize(
    ("draw", "evaluations"),
    [({}, 3), ({"sampler": "heun"}, 5), ({"guidance": 2.0}, 6), ({"sampler": "heun", "guidance": 0.0}, 10)],
)
def test_the_cost_of_a_sample_is_counted(draw: dict[str, Any], evaluations: int, run: Folder, tmp_path: Path) -> None:
    """By the rows that really go through the network."""
    through = 0
    shard = DrawShard(plan(run, tmp_path, **draw))
    shard.network.register_forward_pre_hook(lambda _, args: count(len(args[0])))

    def count(rows: int) -> None:
        nonlocal through
        through += rows

    list(shard({"id": np.array([0])}))
    assert shard.plan.draw.evaluations == evaluations == through / 10


def test_guidance_needs_a_network_that_learns_labels() -> None:
    with pytest.raises(ConfigurationError, match=r"draw\.guidance is 2\.0; that needs .* add --network\.labels"):
        replace(DIGITS, draw=replace(DIGITS.draw, guidance=2.0))


def test_where_nothing_of_the_picture_is_left_the_target_must_say_something_of_it() -> None:
    nothing_left = replace(DIGITS.schedule, zero_terminal_snr=True)
    with pytest.raises(ValueError, match=r"fit\.objective\.target is eps; .* take fit\.objective\.target v"):
        replace(DIGITS, schedule=nothing_left)
    objective = replace(DIGITS.fit.objective, target="v")
    job: TrainJob = replace(DIGITS, schedule=nothing_left, fit=replace(DIGITS.fit, objective=objective))
    assert job.schedule.tables().alpha_bar[-1] == pytest.approx(2**-12)


def table(folder: Path, *lines: str) -> str:
    (folder / "labels.csv").write_text("\n".join(lines))
    return str(folder / "labels.csv")


def test_a_table_says_the_label_of_each_seed(run: Folder, tmp_path: Path) -> None:
    """And the pixels are those of the label, whoever said it."""
    labels = ["dcba"[seed % 4] for seed in range(7, 17)]
    job = SampleJob(checkpoint=run.url, out=str(tmp_path / "table"), seeds="7-16", draw=DRAW)
    lines = [f"{seed},{label}" for seed, label in zip(range(7, 17), labels, strict=True)]
    told = plan_samples(replace(job, labels=table(tmp_path, "seed,label", *reversed(lines), "99,unheard of")))
    found, pictures = drawn(told)
    assert found == ["abcd".index(label) for label in labels]
    for label in "abcd":
        alone = drawn(plan(run, tmp_path / label, label=label))[1]
        here = [i for i, one in enumerate(labels) if one == label]
        assert np.array_equal(pictures[here], alone[here])

    other = plan_samples(replace(job, labels=table(tmp_path, "seed,label", "7,d", *lines[1:])))
    assert identity(other) != identity(told), "another table makes other samples"


@pytest.mark.parametrize(
    ("lines", "error", "message"),
    [
        (["seed,label", "7,a"], ConfigurationError, r"has no line for seed 8: each seed needs one"),
        (
            ["seed,label", *(f"{seed},e" for seed in range(7, 17))],
            ConfigurationError,
            "seed 7 has .e.",
        ),
        (["number,label", "7,a"], DataError, r"must be a CSV with the columns seed and label"),
        (["seed,label", "seven,a"], DataError, r"must be a CSV with the columns seed and label"),
    ],
)
def test_a_table_that_does_not_say_it_is_refused(
    lines: list[str], error: type[Exception], message: str, run: Folder, tmp_path: Path
) -> None:
    job = SampleJob(checkpoint=run.url, out=str(tmp_path / "out"), seeds="7-16", draw=DRAW)
    with pytest.raises(error, match=message):
        plan_samples(replace(job, labels=table(tmp_path, *lines)))


def test_a_label_is_said_once() -> None:
    with pytest.raises(ConfigurationError, match=r"labels is .*t\.csv and draw\.label 'a'; .* leave out one of them"):
        SampleJob(out="o", checkpoint="c", labels="/t.csv", draw=replace(DRAW, label="a"))


def test_a_compiled_network_draws_the_same_and_its_samples_are_a_set_of_their_own(
    run: Folder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What becomes of a graph needs a C++ compiler, which not every machine has; what becomes a graph does not."""
    graphs = []

    def counted(graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> Any:
        graphs.append(graph)
        return graph.forward

    compile_ = torch.compile
    monkeypatch.setattr(torch, "compile", lambda model, mode, **more: compile_(model, backend=counted, **more))
    plain, compiled = plan(run, tmp_path / "plain"), plan(run, tmp_path / "compiled", compile=True)
    assert np.array_equal(drawn(plain)[1], drawn(compiled)[1]) and graphs
    assert identity(plain) != identity(compiled)


def test_a_folder_is_finished_as_it_was_begun(run: Folder, tmp_path: Path) -> None:
    """With the table of its labels or without one, in the forms and with the seeds in each file that it has."""
    job = SampleJob(checkpoint=run.url, out=str(tmp_path / "out"), seeds="7-16", draw=DRAW)
    others = [
        replace(job, labels=table(tmp_path, "seed,label", *(f"{seed},a" for seed in range(7, 17)))),
        replace(job, also=("tar",)),
        replace(job, seeds="7-17"),
        replace(job, draw=replace(DRAW, shard_images=5)),
    ]
    for other in others:
        for first, second in ((job, other), (other, job)):
            claim(plan_samples(first))
            with pytest.raises(
                ConfigurationError, match=r"holds other samples: their (labels_digest|also|seeds|shard_images) is"
            ):
                claim(plan_samples(second))
            shutil.rmtree(tmp_path / "out")


def test_a_folder_is_gone_on_with_by_other_versions_and_from_other_places(run: Folder, tmp_path: Path) -> None:
    """Another revision of the code, a run that was moved, another address of the tracker, another version of the model:
    by its digest it is the same network. And folders that were begun before there were tables and forms."""
    told = plan(run, tmp_path / "out")
    claim(told)
    names = ("git_revision", "checkpoint", "data_url", "tracking_uri", "model_version")
    claim(replace(told, lineage=told.lineage | dict.fromkeys(names, "another")))
    said = json.loads(told.out.get("plan.json"))
    assert (said.pop("labels_digest"), said.pop("also")) == ("", [])
    told.out.put("plan.json", json.dumps(said).encode())
    claim(told)
    with pytest.raises(ConfigurationError, match="holds other samples: their also is"):
        claim(replace(told, also=("png",)))


@pytest.mark.parametrize(("shard_images", "sizes"), [(4, [4, 4, 2]), (5, [5, 5]), (10, [10]), (11, [10])])
def test_each_seed_is_in_one_shard(shard_images: int, sizes: list[int], run: Folder, tmp_path: Path) -> None:
    told = plan(run, tmp_path, shard_images=shard_images)
    several = [told.shard_seeds(shard) for shard in range(told.shards)]
    assert [len(seeds) for seeds in several] == sizes
    assert [seed for seeds in several for seed in seeds] == list(range(7, 17))


def test_a_batch_is_always_full(run: Folder, tmp_path: Path) -> None:
    """A convolution may round differently in a batch of another size; what only fills it up is not kept."""
    shard, rows = DrawShard(plan(run, tmp_path, batch_images=4)), []
    shard.network.register_forward_pre_hook(lambda _, args: rows.append(len(args[0])))
    list(shard({"id": np.array([0])}))
    assert rows == [4] * 9, "three batches of three steps"


def test_whatever_bit_of_a_shard_flips_it_is_damaged(run: Folder, tmp_path: Path) -> None:
    """Or it is as good as it was; but no error is of another kind."""
    told = plan(run, tmp_path)
    drawn(told)
    whole, read = told.out.get("part-000000.parquet"), partial(sample_shards.check, told.out, 0, told.seeds)
    shape, labels = told.trained.checkpoint.shape, told.trained.labels
    sha256 = read(shape, (), labels)["sha256"]
    damaged = 0
    for bit in range(0, 8 * len(whole), 41):
        flipped = bytearray(whole)
        flipped[bit // 8] ^= 1 << bit % 8
        told.out.put("part-000000.parquet", bytes(flipped))
        try:
            assert read(shape, (), labels)["sha256"] != sha256
        except sample_shards.DamagedShardError:
            damaged += 1
    assert damaged > 100


def test_an_actor_whose_lease_is_gone_writes_nothing(run: Folder, tmp_path: Path) -> None:
    told = plan(run, tmp_path)
    for number in (1, 2):
        (told.out / "lease").put(f"lease-{number:06d}.json", b"{}")
    with pytest.raises(TryAgainError, match="another firing has taken the lease"):
        list(DrawShard(told, fence=Fence(told.out / "lease", 1))({"id": np.array([0])}))
    assert told.out.names() == ["lease"]
    list(DrawShard(told, fence=Fence(told.out / "lease", 2))({"id": np.array([0])}))
    assert told.out.names() == ["lease", "part-000000.parquet"]


def test_a_shard_that_is_there_is_not_written_over(run: Folder, tmp_path: Path) -> None:
    """Another job may have finished the set with it."""
    told = replace(plan(run, tmp_path), also=("tar", "png"))
    drawn(told)
    there = {one.name: told.out.get(one.name) for one in told.out.find()}
    later = replace(told, lineage=told.lineage | {"git_revision": "another"})
    for shard_is_seen in (True, False):
        actor = DrawShard(later)
        if not shard_is_seen:
            actor._write(0, later.shard_seeds(0), np.zeros((10, 8, 8, 1), np.uint8), 0.0)
        assert [row["images"] for row in actor({"id": np.array([0])})] == [[0]], "it is not drawn either"
        assert {name: told.out.get(name) for name in there} == there
    list(DrawShard(later, anew=True)({"id": np.array([0])}))
    assert len(there) == 12 and all(told.out.get(name) != data for name, data in there.items())


class SlowToWrite(DrawShard):
    """Says what it does. While it may still draw, or for a moment, nothing of it is written."""

    def __init__(self, plan: SamplePlan, batches: int) -> None:
        super().__init__(plan)
        self.did: list[tuple[str, int]] = []
        self._more = threading.Semaphore(0)
        self._batches = batches

    def _draw(self, seeds: range) -> Pixels:
        self.did.append(("drawn", seeds.start))
        self._more.release()
        return super()._draw(seeds)

    def _write(self, shard: int, seeds: range, pixels: Pixels, began: float) -> dict[str, Any]:
        while sum(what == "drawn" for what, _ in self.did) < self._batches and self._more.acquire(timeout=0.5):
            pass
        self.did.append(("written", shard))
        return super()._write(shard, seeds, pixels, began)


def test_a_shard_is_drawn_while_another_is_written_but_not_to_its_end(run: Folder, tmp_path: Path) -> None:
    """So that a kill costs an actor one whole shard at most: the last batch waits until the shard before is there."""
    job = SampleJob(checkpoint=run.url, out=str(tmp_path), seeds="0-26", draw=replace(DRAW, shard_images=9))
    actor = SlowToWrite(plan_samples(replace(job, draw=replace(job.draw, batch_images=3))), batches=9)
    assert len(list(actor({"id": np.arange(3)}))) == 3
    assert actor.did == [
        *(("drawn", seed) for seed in (0, 3, 6, 9, 12)), ("written", 0),
        *(("drawn", seed) for seed in (15, 18, 21)), ("written", 1), ("drawn", 24), ("written", 2),
    ]  # fmt: skip


def test_where_a_shard_is_its_other_forms_are(run: Folder, tmp_path: Path) -> None:
    """What is in the way of a picture leaves no Parquet file, for which the next firing would not draw it again."""
    told = replace(plan(run, tmp_path), also=("tar", "png"))
    (tmp_path / "png").touch()
    with pytest.raises(DataError):
        drawn(told)
    assert told.out.names() == ["png"]


def test_a_stranger_does_not_say_where_a_job_is_recorded(
    run: Folder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    told = plan(run, tmp_path / "out")
    job = SampleJob(checkpoint=run.url, out=told.out.url)
    for uri in (f"sqlite:///{tmp_path}/made/up.db", "http://127.0.0.1:9"):
        there = replace(told, lineage=told.lineage | {"tracking_uri": uri})
        with recorded(job, there) as tracker:
            assert not tracker.run_id
    assert not (tmp_path / "made").exists()
