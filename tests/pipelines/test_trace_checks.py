"""Traces of what somebody else has sent, or has harmed. None of them starts Ray."""

import hashlib
import io
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import safetensors.torch
import torch

from jobs.presets import DIGITS
from models.init import initialize
from models.network import NetworkConfig
from models.noise import normal
from models.schedule import article
from models.unet import UNet
from pipelines import checkpoints, exports, trace_checks
from pipelines.checkpoint_manifest import Checkpoint
from pipelines.draw_config import DrawConfig
from pipelines.draw_shard import DrawShard
from pipelines.errors import ConfigurationError, DamagedError, DataError
from pipelines.fit import new_state
from pipelines.images import encode
from pipelines.mlflow_door import named_here
from pipelines.plain import to_dict
from pipelines.sample_config import SampleJob
from pipelines.sample_plan import SamplePlan, plan_samples
from pipelines.sample_set import SampleSet, read_shard
from pipelines.sample_shards import read_samples, shard_name
from pipelines.stamp import stamped
from pipelines.storage import Folder
from pipelines.trace import trace
from pipelines.trace_checks import Claims, redrawn
from pipelines.trace_config import TraceJob
from pipelines.world import World
from tests.pipelines.hostile import chunk
from tests.pipelines.sample_sets import write_samples
from tests.pipelines.states import FIT, TINY

SAME = "the same pixels, bit for bit"


@pytest.fixture(scope="module")
def plan(tmp_path_factory: pytest.TempPathFactory) -> SamplePlan:
    """Of four samples, each in a shard of its own, of a network that knows no labels; they are drawn."""
    root = Folder(str(tmp_path_factory.mktemp("checks")))
    model = UNet(TINY, 1, 8)
    initialize(model, 0)
    with torch.no_grad():  # an untrained network does nothing
        for at, p in enumerate(model.parameters()):
            p.add_(0.1 * normal(0, "test", torch.tensor([at]), tuple(p.shape))[0])
    about = Checkpoint(
        position=0, files={}, config=to_dict(replace(DIGITS, network=NetworkConfig(unet=TINY))), data_digest="d",
        data_url=(root / "data").url, shape=(1, 8, 8), labels=[], tracking_uri="none", tracking_run="traced",
        git_revision="g",
    )  # fmt: skip
    state = new_state(model, FIT, article())
    state.position = 128
    checkpoints.commit(root / "run", state, about, World())
    draw = DrawConfig(sampler="random", steps=4, shard_images=1, batch_images=2, actors=1)
    planned = plan_samples(SampleJob(checkpoint=(root / "run").url, out=(root / "s").url, seeds="100-103", draw=draw))
    assert len(list(DrawShard(planned)({"id": np.arange(4)}))) == 4
    return planned


def pixels(plan: SamplePlan) -> Any:
    """uint8 [4, 8, 8, 1]."""
    return read_samples(plan.out, [shard_name(i) for i in range(4)], (1, 8, 8))


def image(plan: SamplePlan) -> bytes:
    """The PNG of seed 100."""
    return encode(pixels(plan)[0], "png")


def file(folder: Path, data: bytes, name: str = "x.png") -> str:
    (folder / name).write_bytes(data)
    return str(folder / name)


def test_a_shard_of_no_finished_set_is_a_strangers(plan: SamplePlan, tmp_path: Path) -> None:
    shard = file(tmp_path, plan.out.get(shard_name(2)), shard_name(2))
    told = trace(TraceJob(image=shard, seed=102))["checked"]
    assert told["shard"] == "it is part of no finished set of samples, so nothing proves it"
    with pytest.raises(ConfigurationError, match="to load weights from there is not safe: give --checkpoint"):
        trace(TraceJob(image=shard, seed=102, redraw=True))
    job = TraceJob(image=shard, seed=102, redraw=True, checkpoint=plan.trained.folder.url)
    assert trace(job)["checked"]["redraw"] == SAME
    finished = write_samples(Folder(str(tmp_path / "set")), pixels(plan), plan.lineage, first=100)
    job = TraceJob(image=finished.path(shard_name(0)), seed=102, redraw=True)
    assert trace(job)["checked"]["redraw"] == SAME


def test_nothing_is_asked_or_made_where_a_strangers_shard_points_to(plan: SamplePlan, tmp_path: Path) -> None:
    base = f"sqlite:///{tmp_path}/not-here.db"
    lineage = {**plan.lineage, "tracking_uri": base, "checkpoint": "s3://theirs/c", "data_url": "http://127.0.0.1:9/d"}
    there = write_samples(Folder(str(tmp_path / "set")), pixels(plan), lineage)
    Path(there.path("_SUCCESS")).unlink()
    told = trace(TraceJob(image=there.path(shard_name(0)), seed=0))["checked"]
    assert told["mlflow_run"] == "not asked: give --tracking.uri"
    assert told["checkpoint"] == "not asked: only the image says that it is at s3://theirs/c"
    assert told["data"] == "not asked: only the image says that it is at http://127.0.0.1:9/d"
    assert not (tmp_path / "not-here.db").exists()


def test_no_database_is_made_where_a_set_was_recorded(
    plan: SamplePlan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And no server is asked that only the set names, password or not."""
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", "secret")
    for at, uri in enumerate([f"sqlite:///{tmp_path}/not-here.db", "http://127.0.0.1:9"]):
        there = write_samples(Folder(str(tmp_path / f"{at}")), pixels(plan), {**plan.lineage, "tracking_uri": uri})
        told = trace(TraceJob(image=there.path(shard_name(0)), seed=0))["checked"]
        assert told["mlflow_run"] == f"not asked: give --tracking.uri {uri}"
    assert not (tmp_path / "not-here.db").exists()


def test_a_tracker_is_taken_if_it_is_named_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    there, missing = f"sqlite:///{tmp_path}/a.db", f"sqlite:///{tmp_path}/b.db"
    (tmp_path / "a.db").touch()
    assert named_here(there, "") == there
    for recorded in (
        missing,
        f"sqlite:///{tmp_path}",
        "sqlite:///" + "x" * 5000,
        "sqlite:///\0",
        "http://a",
        "none",
        "",
    ):
        assert named_here(recorded, "") == "none"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://b")
    assert named_here(there, "") == named_here("http://a", "") == "http://b"
    assert named_here(there, "http://c") == "http://c" and named_here(there, "none") == "none"


ELSEWHERE = [
    "hf://datasets/a/b", "s3://theirs/c", "gs://theirs/c", "http://127.0.0.1:9/c", "HTTP://127.0.0.1:9/c",
    " http://127.0.0.1:9", "simplecache::http://127.0.0.1:9/c", "dir://", "reference://x", "git://x", "zip://x",
    "memory://x", "smb://h/c", "models:/digits@champion", "data:,x",
]  # fmt: skip
NOWHERE = ["x://[d", "file:///\0", "/" + "x" * 5000, "~nobody-of-this-name/c", "\ud800", "file::http://127.0.0.1:9"]


@pytest.mark.parametrize("url", ELSEWHERE + NOWHERE)
def test_a_url_of_a_stranger_may_be_anything(url: str, plan: SamplePlan, tmp_path: Path) -> None:
    lineage = {**plan.lineage, "seed": 100, "checkpoint": url, "data_url": url}
    told = trace(TraceJob(image=file(tmp_path, stamped(image(plan), lineage)), redraw=True))["checked"]
    for said in (told["checkpoint"], told["data"]):
        assert said.startswith("not asked: only the image says that it is at " if url in ELSEWHERE else "gone: ")
    assert told["redraw"].startswith("not drawn: ")


def test_a_checkpoint_that_came_with_a_picture_may_say_anything(plan: SamplePlan, tmp_path: Path) -> None:
    odd = replace(plan.trained.checkpoint, files={}, config={})
    Folder(str(tmp_path / "c")).put("manifest.json", json.dumps(vars(odd)).encode())
    lineage = {**plan.lineage, "seed": 1, "checkpoint": str(tmp_path / "c"), "checkpoint_digest": odd.digest}
    told = trace(TraceJob(image=file(tmp_path, stamped(image(plan), lineage))))["checked"]
    assert told["checkpoint"] == "not known: KeyError: 'network'"


def test_a_picture_of_another_size_is_not_drawn_for(
    plan: SamplePlan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def draws(plan: SamplePlan) -> None:
        raise AssertionError(f"{plan.draw.batch_images} images would be drawn")

    monkeypatch.setattr(trace_checks, "DrawShard", draws)
    lineage = {**plan.lineage, "seed": 100, "draw": {**plan.lineage["draw"], "batch_images": 1 << 23}}
    point = np.zeros((1, 1, 1), np.uint8)
    job = TraceJob(
        image=file(tmp_path, stamped(encode(point, "png"), lineage)), redraw=True, checkpoint=plan.trained.folder.url
    )
    told = trace(job)["checked"]["redraw"]
    assert told == "differs: it has the shape (8, 8, 1), the picture has (1, 1, 1)"
    with pytest.raises(ConfigurationError, match="batch_images is 8388608; no memory holds that"):
        redrawn(plan.trained, Claims(lineage, 100, -1, point, is_ours=False), use_gpu=False)


def test_the_lineage_is_that_of_the_shard(plan: SamplePlan, tmp_path: Path) -> None:
    """A set may be finished by another revision than the one that began it."""
    first = write_samples(Folder(str(tmp_path / "a")), pixels(plan), {**plan.lineage, "git_revision": "one"}, 100, 2)
    second = write_samples(Folder(str(tmp_path / "b")), pixels(plan), {**plan.lineage, "git_revision": "two"}, 100, 2)
    about, older = (json.loads(one.get("manifest.json")) for one in (second, first))
    second.put(shard_name(0), first.get(shard_name(0)))
    about["files"][0] = older["files"][0]
    second.put("manifest.json", json.dumps(about).encode())
    for at, revision in ((0, "one"), (3, "two")):
        own = {**plan.lineage, "git_revision": revision, "seed": 100 + at, "label": -1}
        carried = file(tmp_path, stamped(encode(pixels(plan)[at], "png"), own))
        told = trace(TraceJob(image=carried, samples=second.url))
        assert (told["seed"], told["lineage"]["git_revision"]) == (100 + at, revision)
        assert told["checked"]["carried"] == "the lineage that it carries agrees"
        wrong = file(tmp_path, stamped(image(plan), {**own, "seed": 100, "label": 3, "git_revision": "three"}))
        told = trace(TraceJob(image=wrong, samples=second.url))["checked"]
        assert told["carried"] == "it carries another lineage: label 3, not -1; git_revision 'three', not 'one'"


def test_samples_of_an_export_name_the_checkpoint_that_it_is_of(plan: SamplePlan, tmp_path: Path) -> None:
    trained, folder, files = plan.trained, Folder(str(tmp_path / "export")), {}
    for name, averaged in ((exports.LAST, False), (exports.AVERAGE, True)):
        weights = {k: v.contiguous() for k, v in trained.network(averaged).state_dict().items()}
        data = safetensors.torch.save(weights)
        folder.put(name, data)
        files[name] = len(data), hashlib.sha256(data).hexdigest()
    folder.put("config.json", exports.describe(trained.checkpoint, trained.digest, files))
    samples = write_samples(Folder(str(tmp_path / "s")), pixels(plan), {**plan.lineage, "checkpoint": folder.url}, 100)
    told = trace(TraceJob(image=samples.path(shard_name(0)), seed=100, redraw=True))["checked"]
    assert (told["checkpoint"], told["redraw"]) == (f"it is at {folder.url}, with this digest", SAME)


def text(content: bytes) -> bytes:
    return chunk(b"tEXt", b"brickyard\0" + content)


STAMPS = {
    "two": (text(b"{}") * 2, "more than one lineage"),
    "a wrong CRC": (text(b"{}")[:-1] + b"?", "its CRC differs"),
    "no JSON": (text(b"seed 1"), "is not JSON"),
}


@pytest.mark.parametrize(("stamp", "reason"), STAMPS.values(), ids=STAMPS)
def test_a_picture_with_a_damaged_stamp_is_found_by_its_pixels(
    stamp: bytes, reason: str, plan: SamplePlan, tmp_path: Path
) -> None:
    samples = write_samples(Folder(str(tmp_path / "s")), pixels(plan), plan.lineage, first=100)
    path = file(tmp_path, image(plan)[:33] + stamp + image(plan)[33:])
    told = trace(TraceJob(image=path, samples=samples.url))
    assert told["seed"] == 100 and told["checked"]["carried"].startswith("damaged: ")
    assert reason in told["checked"]["carried"]
    with pytest.raises(DataError, match=reason):
        trace(TraceJob(image=path))


def test_the_bytes_that_are_proved_are_those_that_are_used(
    plan: SamplePlan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What storage gives at another time may be something else."""
    samples = write_samples(Folder(str(tmp_path / "s")), pixels(plan), plan.lineage, first=100)
    true, other = samples.get(shard_name(0)), plan.out.get(shard_name(0))
    answers = iter([other, true, true])
    get = Folder.get
    monkeypatch.setattr(Folder, "get", lambda self, name: next(answers) if "part" in name else get(self, name))
    with pytest.raises(DamagedError, match="is not what was written"):
        trace(TraceJob(image=samples.path(shard_name(0)), seed=100))


GOOD: dict[str, Any] = {
    "seed": pa.array([1], pa.int64()),
    "label": pa.array([1], pa.int32()),
    "image": pa.array([b"1"], pa.binary()),
}
TABLES: dict[str, tuple[dict[str, Any], bytes | None, str]] = {
    "empty": ({name: column[:0] for name, column in GOOD.items()}, b"{}", "it has none"),
    "no image": ({**GOOD, "image": pa.array([None], pa.binary())}, b"{}", "it has gaps"),
    "no seed": ({**GOOD, "seed": pa.array([None], pa.int64())}, b"{}", "it has gaps"),
    "half seeds": ({**GOOD, "seed": pa.array([0.5])}, b"{}", "seeds and labels must be integers"),
    "images in words": ({**GOOD, "image": pa.array(["1"])}, b"{}", "images bytes"),
    "no column": ({"seed": GOOD["seed"]}, b"{}", "is no shard of samples"),
    "no lineage": (GOOD, None, "carries no lineage"),
    "no JSON": (GOOD, b"?", "carries no lineage"),
    "no object": (GOOD, b"[1]", "carries no lineage"),
}


@pytest.mark.parametrize(("table", "lineage", "reason"), TABLES.values(), ids=TABLES)
def test_a_shard_that_is_none_is_told(table: dict[str, Any], lineage: bytes | None, reason: str) -> None:
    buffer = io.BytesIO()
    pq.write_table(pa.table(table).replace_schema_metadata({b"brickyard": lineage} if lineage else None), buffer)
    with pytest.raises(DamagedError) as caught:
        read_shard(buffer.getvalue(), "here")
    assert str(caught.value).startswith("here ") and reason in str(caught.value)


FILE = {"name": "part-000000.parquet", "images": 1, "sha256": "0"}
ABOUT: dict[str, Any] = {"seeds": [0, 0], "shape": [1, 8, 8], "lineage": {}, "files": [FILE]}
MANIFESTS: dict[str, tuple[Any, str]] = {
    "a list": ([1], "it must have"),
    "files that are numbers": ({**ABOUT, "files": [1]}, r"files\.0"),
    "a file without images": ({**ABOUT, "files": [{**FILE, "images": None}]}, r"files\.0\.images"),
    "no files": ({**ABOUT, "files": []}, "must have files, and names none"),
    "a lineage that is a number": ({**ABOUT, "lineage": 3}, "lineage: "),
    "a flat shape": ({**ABOUT, "shape": [1, 8]}, r"shape\.2"),
    "four channels": ({**ABOUT, "shape": [4, 8, 8]}, r"shape\.0"),
    "seeds in words": ({**ABOUT, "seeds": "0-1"}, "seeds: "),
    "labels that are numbers": ({**ABOUT, "labels": [1]}, r"labels\.0"),
}


@pytest.mark.parametrize(("about", "reason"), MANIFESTS.values(), ids=MANIFESTS)
def test_a_manifest_that_is_none_is_told(about: Any, reason: str, tmp_path: Path) -> None:
    folder = Folder(str(tmp_path))
    folder.put("_SUCCESS", b"")
    folder.put("manifest.json", json.dumps(ABOUT | {"more": 1}).encode())
    assert SampleSet.find(folder).shape == (8, 8, 1)
    folder.put("manifest.json", json.dumps(about).encode())
    with pytest.raises(DataError, match=f"manifest.json is not the manifest of samples: .*{reason}"):
        SampleSet.find(folder)
