import io
import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from jobs.presets import DIGITS
from jobs.trace import main
from models.init import initialize
from models.network import NetworkConfig
from models.noise import normal
from models.schedule import article
from models.unet import UNet
from pipelines import checkpoints
from pipelines import trace as trace_module
from pipelines.checkpoint_manifest import Checkpoint
from pipelines.digits import write_digits
from pipelines.draw_config import DrawConfig
from pipelines.errors import ConfigurationError
from pipelines.fit import new_state
from pipelines.images import encode
from pipelines.ingest import ingest
from pipelines.ingest_plan import IngestConfig, IngestPlan
from pipelines.lineage import Trained
from pipelines.manifest import Manifest
from pipelines.plain import to_dict
from pipelines.sample_config import SampleJob
from pipelines.sample_plan import plan_samples
from pipelines.sampling import draw_samples
from pipelines.stamp import stamped
from pipelines.storage import Folder
from pipelines.trace import trace
from pipelines.trace_checks import Claims, redrawn
from pipelines.trace_config import TraceJob
from pipelines.world import World
from tests.pipelines.sample_sets import write_samples
from tests.pipelines.states import FIT, TINY

pytestmark = pytest.mark.ray
DRAW = DrawConfig(sampler="random", steps=4, guidance=2.0, shard_images=1, batch_images=4, actors=1)
SAME = "the same pixels, bit for bit"


class Drawn(NamedTuple):
    """Samples of a network that knows labels, and all that they come from."""

    root: Folder
    samples: Folder
    lineage: dict[str, Any]
    """Of all of them."""

    @property
    def checkpoint(self) -> str:
        return str(self.lineage["checkpoint"])

    def image(self, seed: int) -> bytes:
        """The PNG of a seed."""
        table = pq.read_table(io.BytesIO(self.samples.get(f"part-{seed - 100:06d}.parquet")))
        return bytes(table["image"][0].as_py())


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory, ray_cluster: None) -> Drawn:
    root = Folder(str(tmp_path_factory.mktemp("trace")))
    write_digits(root / "raw")
    manifest = ingest(IngestPlan.make(root / "raw", root / "data", IngestConfig(side=8, channels=1, shard_rows=900)))
    model = UNet(TINY, 1, 8, classes=10)
    initialize(model, 0)
    with torch.no_grad():  # an untrained network does nothing, whatever the label
        for at, p in enumerate(model.parameters()):
            p.add_(0.1 * normal(0, "test", torch.tensor([at]), tuple(p.shape))[0])
    about = Checkpoint(
        position=0, files={}, config=to_dict(replace(DIGITS, network=NetworkConfig(unet=TINY, labels=True))),
        data_digest=manifest.digest, data_url=(root / "data").url, shape=(1, 8, 8), labels=manifest.labels,
        tracking_uri="none", tracking_run="traced", git_revision="g",
    )  # fmt: skip
    state = new_state(model, FIT, article())
    state.position = 128
    checkpoints.commit(root / "run", state, about, World())
    job = SampleJob(checkpoint=(root / "run").url, out=(root / "samples").url, seeds="100-119", draw=DRAW)
    return Drawn(root, root / "samples", draw_samples(plan_samples(job))["lineage"])


def file(folder: Path, data: bytes, name: str = "x.png") -> str:
    (folder / name).write_bytes(data)
    return str(folder / name)


def rewritten(data: bytes) -> bytes:
    """The same pixels, as another program writes them."""
    buffer = io.BytesIO()
    with Image.open(io.BytesIO(data)) as image:
        image.convert("RGB").quantize(256).save(buffer, "PNG", optimize=True)
    return buffer.getvalue()


def test_from_a_shard_and_a_seed_back_to_everything(drawn: Drawn) -> None:
    told = trace(TraceJob(image=drawn.samples.path("part-000013.parquet"), seed=113, redraw=True))
    assert (told["seed"], told["label"], told["label_name"]) == (113, 3, "3")
    assert told["lineage"] == drawn.lineage and told["lineage"]["draw"]["sampler"] == "random"
    assert told["checked"] == {
        "shard": "it is what was written, by its sha256",
        "data": f"it is at {drawn.lineage['data_url']}, with this digest",
        "checkpoint": f"it is at {drawn.checkpoint}, with this digest",
        "mlflow_run": "not asked: give --tracking.uri",
        "redraw": SAME,
    }


@pytest.mark.parametrize("most", [0, 20])
def test_a_stripped_picture_is_found_by_its_pixels(
    most: int, drawn: Drawn, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also among more shards than are looked through here, which are shared out."""
    monkeypatch.setattr(trace_module, "HERE_IMAGES", most)
    other = rewritten(drawn.image(117))
    assert other != drawn.image(117)
    told = trace(TraceJob(image=file(tmp_path, other), samples=drawn.samples.url, redraw=True))
    assert (told["found_by"], told["seed"], told["label"], told["shard"]) == (
        "its pixels", 117, 7, "part-000017.parquet",
    )  # fmt: skip
    assert told["checked"]["carried"] == "it carries no lineage of its own" and told["checked"]["redraw"] == SAME


def test_a_picture_that_carries_its_lineage_is_believed_as_far_as_it_can_be_proved(
    drawn: Drawn, tmp_path: Path
) -> None:
    image = file(tmp_path, stamped(drawn.image(104), {**drawn.lineage, "seed": 104, "label": 4}))
    told = trace(TraceJob(image=image))
    assert (told["found_by"], told["seed"], told["label_name"], told["samples"]) == (
        "the lineage that it carries", 104, "4", None,
    )  # fmt: skip
    assert told["checked"]["checkpoint"] == f"it is at {drawn.checkpoint}, with this digest"
    with pytest.raises(ConfigurationError, match="to load weights from there is not safe: give --checkpoint"):
        trace(TraceJob(image=image, redraw=True))
    assert trace(TraceJob(image=image, redraw=True, checkpoint=drawn.checkpoint))["checked"]["redraw"] == SAME
    found = trace(TraceJob(image=image, samples=drawn.samples.url))
    assert found["checked"]["carried"] == "the lineage that it carries agrees"


def test_a_sample_is_redrawn_with_the_label_that_it_has(drawn: Drawn, tmp_path: Path) -> None:
    """Whatever gave it: the number of the seed, a setting, or a table."""
    lineage = {**drawn.lineage, "draw": {**drawn.lineage["draw"], "label": "7"}}
    trained = Trained.find(drawn.checkpoint)
    picture = redrawn(trained, Claims(lineage, 104, 7, np.zeros((8, 8, 1), np.uint8), is_ours=True), False)
    image = encode(picture, "png")
    assert image != drawn.image(104)
    image_of = stamped(image, {**drawn.lineage, "seed": 104, "label": 7})
    told = trace(TraceJob(image=file(tmp_path, image_of), redraw=True, checkpoint=drawn.checkpoint))
    assert (told["label_name"], told["checked"]["redraw"]) == ("7", SAME)


def test_a_lie_is_found_out(drawn: Drawn, tmp_path: Path) -> None:
    image = file(tmp_path, stamped(drawn.image(104), {**drawn.lineage, "seed": 105, "label": 5}))
    told = trace(TraceJob(image=image, samples=drawn.samples.url))
    assert told["seed"] == 104 and "it carries another lineage: seed 105, not 104" in told["checked"]["carried"]
    again = trace(TraceJob(image=image, redraw=True, checkpoint=drawn.checkpoint))["checked"]["redraw"]
    assert again.startswith("differs: by ")
    url = {"checkpoint": "http://127.0.0.1:9/c", "data_url": "ht[tp://d", "seed": 1}
    told = trace(TraceJob(image=file(tmp_path, stamped(drawn.image(104), {**drawn.lineage, **url}))))
    assert told["checked"]["checkpoint"].startswith("not asked: only the image says that it is at http://127.0.0.1:9")
    assert told["checked"]["data"].startswith("gone: ") and told["label"] == -1


def test_pixels_of_several_seeds_are_told(drawn: Drawn, tmp_path: Path) -> None:
    same = np.zeros((5, 8, 8, 1), np.uint8)
    same[1] = same[3] = 9
    samples = write_samples(Folder(str(tmp_path / "s")), same, drawn.lineage, first=50)
    table = pq.read_table(io.BytesIO(samples.get("part-000000.parquet")))
    image = table["image"][3].as_py()
    told = trace(TraceJob(image=file(tmp_path, image), samples=samples.url))
    assert (told["seed"], told["seeds_with_these_pixels"]) == (51, [51, 53])
    told = trace(TraceJob(image=file(tmp_path, stamped(image, {"seed": 53})), samples=samples.url))
    assert told["seed"] == 53 and "lineage: label None, not -1; checkpoint_digest None" in told["checked"]["carried"]


def test_what_is_gone_or_another_by_now_is_said(drawn: Drawn, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(drawn.root.path(), tmp_path / "copy"))
    checkpoint = copy / "run" / Folder(drawn.checkpoint).name
    asked = TraceJob(image=drawn.samples.path("part-000000.parquet"), seed=100, redraw=True, checkpoint=str(checkpoint))
    assert trace(asked)["checked"]["redraw"] == SAME
    content = json.loads((checkpoint / "manifest.json").read_text())
    (checkpoint / "manifest.json").write_text(json.dumps(content | {"git_revision": "h"}))
    told = trace(asked)["checked"]
    assert told["checkpoint"].startswith("another: what is at file:///") and told["redraw"].startswith("not drawn: the")
    (checkpoint / "manifest.json").write_text(json.dumps(content | {"format": 2}))
    assert trace(asked)["checked"]["checkpoint"].startswith("not known: ")
    (checkpoint / "manifest.json").write_text(json.dumps(content))
    (checkpoint / "__0_0.distcp").write_bytes(b"")
    assert trace(asked)["checked"]["checkpoint"].startswith("damaged: ")
    shutil.rmtree(copy / "run")
    told = trace(asked)["checked"]
    assert told["checkpoint"].startswith("gone: ") and told["redraw"].startswith("not drawn: the checkpoint: gone")
    manifest = Manifest.load(drawn.root / "data")
    replace(manifest, labels=[*manifest.labels, "ten"]).save(Folder(str(copy / "data")))
    lineage = {**drawn.lineage, "data_url": str(copy / "data"), "seed": 100}
    told = trace(TraceJob(image=file(tmp_path, stamped(drawn.image(100), lineage))))["checked"]
    assert told["data"].startswith(f"another: what is at file://{copy / 'data'} has the digest")


def test_mlflow_is_asked_for_the_run(drawn: Drawn, mlflow_on_sqlite: str, capsys: pytest.CaptureFixture[str]) -> None:
    from mlflow import MlflowClient

    client = MlflowClient(tracking_uri=mlflow_on_sqlite)
    flags = [drawn.samples.path("part-000003.parquet"), "--seed", "103", "--tracking.uri", mlflow_on_sqlite]
    assert main(flags) == 0
    assert " does not know it: " in json.loads(capsys.readouterr().out)["checked"]["mlflow_run"]
    run = client.create_run("0", tags={"brickyard.run": "traced"}, run_name="digits")
    client.set_terminated(run.info.run_id)
    assert main(flags) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["checked"]["mlflow_run"] == f"{mlflow_on_sqlite} knows it as {run.info.run_id}, digits, FINISHED"


Harm = Callable[[Drawn, Path], list[str]]


def harmed_shard(drawn: Drawn, tmp_path: Path) -> list[str]:
    shutil.copytree(drawn.samples.path(), tmp_path / "s")
    path = tmp_path / "s" / "part-000001.parquet"
    path.write_bytes(Path(drawn.samples.path("part-000002.parquet")).read_bytes())
    return [str(path), "--seed", "102"]


CASES: dict[str, tuple[int, str, Harm]] = {
    "no lineage": (
        2, "carries no lineage, and samples is not given: give --samples FOLDER", lambda d, t: [file(t, d.image(100))],
    ),
    "no PNG": (2, "is no PNG, so it carries no lineage", lambda d, t: [file(t, b"# words")]),
    "elsewhere": (
        3, "is none of the 20 samples",
        lambda d, t: [file(t, encode(np.zeros((8, 8, 1), np.uint8), "png")), "--samples", d.samples.url],
    ),
    "other size": (
        3, "9 x 8 pixels, is none of",
        lambda d, t: [file(t, encode(np.zeros((9, 8, 1), np.uint8), "png")), "--samples", d.samples.url],
    ),
    "cut off": (3, "the PNG is cut off", lambda d, t: [file(t, d.image(100)[:60])]),
    "no picture": (3, "is no picture", lambda d, t: [file(t, b"?"), "--samples", d.samples.url]),
    "missing": (3, "does not exist", lambda d, t: [str(t / "x.png")]),
    "no seed": (2, "holds many samples: say which by --seed", lambda d, t: [d.samples.path("part-000000.parquet")]),
    "seed of a picture": (2, "is for a shard", lambda d, t: [file(t, d.image(100)), "--seed", "1"]),
    "two sets": (2, "a set of its own", lambda d, t: ["x.parquet", "--seed", "1", "--samples", "y"]),
    "not in it": (
        3, "does not hold seed 7; it holds 100-100",
        lambda d, t: [d.samples.path("part-000000.parquet"), "--seed", "7"],
    ),
    "no shard": (3, "is no shard of samples", lambda d, t: [file(t, b"PAR1", "x.parquet"), "--seed", "1"]),
    "another shard": (3, "is not what was written", harmed_shard),
    "a seed in words": (
        3, "a lineage whose seed is 'one'", lambda d, t: [file(t, stamped(d.image(100), {"seed": "one"}))],
    ),
    "too much": (
        2, "no memory holds that",
        lambda d, t: [
            file(t, stamped(d.image(100), {**d.lineage, "seed": 1, "draw": {"batch_images": 1 << 40}})),
            "--redraw", "--checkpoint", d.checkpoint,
        ],
    ),
    "a sampler of tomorrow": (
        2, "draw of the lineage: colour is no field",
        lambda d, t: [
            file(t, stamped(d.image(100), {**d.lineage, "seed": 1, "draw": {"colour": 1}})),
            "--redraw", "--checkpoint", d.checkpoint,
        ],
    ),
}  # fmt: skip


@pytest.mark.parametrize(("code", "reason", "harm"), CASES.values(), ids=CASES)
def test_what_cannot_be_traced_is_told(
    code: int, reason: str, harm: Harm, drawn: Drawn, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(harm(drawn, tmp_path)) == code
    assert reason in json.loads(capsys.readouterr().out)["error"]


def test_a_dry_run_says_where_it_would_look(drawn: Drawn, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    image = file(tmp_path, drawn.image(100))
    assert main([image, "--samples", drawn.samples.url, "--dry-run"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert (told["shards_to_look_through"], told["image"]) == (20, f"file://{image}")
