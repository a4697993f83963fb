import io
import json
import shutil
import tarfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from jobs.cli import BAD_DATA, _judge
from jobs.presets import DIGITS
from models.init import initialize
from models.network import NetworkConfig
from models.schedule import article
from models.unet import UNet
from pipelines import checkpoints, tracking
from pipelines.checkpoint_manifest import Checkpoint
from pipelines.digits import write_digits
from pipelines.draw_config import DrawConfig
from pipelines.draw_shard import DrawShard
from pipelines.errors import ConfigurationError, DataError
from pipelines.features import pixel_features
from pipelines.fit import new_state
from pipelines.images import decode, encode
from pipelines.ingest import ingest
from pipelines.ingest_plan import IngestConfig, IngestPlan
from pipelines.moments import Moments, frechet_distance
from pipelines.pictures import contact_sheet
from pipelines.plain import to_dict
from pipelines.read_back import verify
from pipelines.replay import ReplayJob
from pipelines.replay import dry_run as waits_for
from pipelines.sample_config import SampleJob
from pipelines.sample_plan import plan_samples
from pipelines.sampling import draw_samples, dry_run, sample_job
from pipelines.score_config import ScoreJob
from pipelines.scoring import score_job
from pipelines.stamp import stamp_of
from pipelines.storage import Folder
from pipelines.tracking_config import TrackingConfig
from pipelines.world import World
from tests.pipelines.states import FIT, TINY

pytestmark = pytest.mark.ray
DRAW = DrawConfig(steps=4, shard_images=10, batch_images=4, actors=2)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, ray_cluster: None) -> Folder:
    """A run with two checkpoints of an untrained, but not trivial, network."""
    root = Folder(str(tmp_path_factory.mktemp("root")))
    write_digits(root / "raw")
    manifest = ingest(IngestPlan.make(root / "raw", root / "data", IngestConfig(side=8, channels=1, shard_rows=600)))
    model = UNet(TINY, 1, 8)
    initialize(model, 0)
    torch.nn.init.normal_(model.conv_out.weight, generator=torch.Generator().manual_seed(0))
    config = to_dict(replace(DIGITS, network=NetworkConfig(unet=TINY)))
    about = Checkpoint(
        position=0, files={}, config=config, data_digest=manifest.digest, data_url=(root / "data").url,
        shape=(1, 8, 8), labels=manifest.labels, tracking_uri="none", tracking_run="r", git_revision="g",
    )  # fmt: skip
    state = new_state(model, FIT, article())
    for state.position in (128, 256):
        checkpoints.commit(root / "run", state, about, World())
        state.ema.shadow["conv_out.bias"] += 0.1
    return root / "run"


def job(run: Folder, out: Folder, **draw: object) -> SampleJob:
    return SampleJob(checkpoint=run.url, out=out.url, seeds="100-124", draw=replace(DRAW, **draw))  # type: ignore[arg-type]


def pictures(out: Folder) -> dict[int, bytes]:
    found = {}
    for name in out.names():
        if name.startswith("part-"):
            table = pq.read_table(io.BytesIO(out.get(name)))
            for seed, image in zip(table["seed"].to_pylist(), table["image"].to_pylist(), strict=True):
                assert seed not in found
                found[seed] = image
    return found


@pytest.fixture(scope="module")
def drawn(run: Folder) -> Folder:
    out = Folder(run.url.replace("/run", "/samples"))
    result = draw_samples(plan_samples(job(run, out)))
    assert result["images"] == result["drawn_now"] == 25
    return out


@pytest.fixture
def samples(drawn: Folder, folder: Folder) -> Folder:
    """A finished set of samples, to be harmed."""
    shutil.copytree(drawn.path(), folder.path())
    return folder


def test_each_seed_is_there_once_and_the_folder_verifies(run: Folder, samples: Folder) -> None:
    folder = samples
    found = pictures(folder)
    assert sorted(found) == list(range(100, 125))
    assert len(set(found.values())) == 25
    every = decode([found[seed] for seed in sorted(found)], "png", (8, 8, 1))
    assert every.std() > 10
    of_several_shards = folder.get("contact-sheet.png") == encode(contact_sheet(every), "png")
    assert of_several_shards  # pytest would take minutes to tell two PNGs apart
    assert verify(folder) == {"samples": folder.url, "verified": 25}
    assert {"contact-sheet.png", "strip.png", "manifest.json", "_SUCCESS"} <= set(folder.names())
    lineage = json.loads(pq.read_schema(io.BytesIO(folder.get("part-000000.parquet"))).metadata[b"brickyard"])
    newest = checkpoints.newest(run)
    assert newest is not None
    assert lineage["checkpoint_digest"] == newest[1].digest and lineage["draw"]["sampler"] == "dpm-solver"


def test_fired_again_it_writes_nothing(run: Folder, samples: Folder) -> None:
    folder = samples
    before = {path: path.stat().st_mtime_ns for path in Path(folder.path()).iterdir()}
    assert draw_samples(plan_samples(job(run, folder)))["drawn_now"] == 0
    assert {path: path.stat().st_mtime_ns for path in Path(folder.path()).iterdir()} == before


def test_what_is_missing_is_drawn_again_to_the_byte(run: Folder, samples: Folder) -> None:
    folder = samples
    before = pictures(folder)
    for name in ("part-000001.parquet", "_SUCCESS", "manifest.json"):
        Path(folder.path(name)).unlink()
    assert dry_run(job(run, folder))["shards_to_draw"] == 1
    assert draw_samples(plan_samples(job(run, folder)))["drawn_now"] == 10
    assert pictures(folder) == before
    assert verify(folder)["verified"] == 25


def test_a_shard_that_is_damaged_before_the_end_is_drawn_again(
    run: Folder, samples: Folder, caplog: pytest.LogCaptureFixture
) -> None:
    before = pictures(samples)
    for name in ("_SUCCESS", "manifest.json"):
        Path(samples.path(name)).unlink()
    samples.put("part-000001.parquet", b"PAR1")
    other = pq.read_table(io.BytesIO(samples.get("part-000000.parquet")))
    pq.write_table(other.slice(0, 5), samples.path("part-000002.parquet"))
    assert draw_samples(plan_samples(job(run, samples)))["drawn_now"] == 15
    assert pictures(samples) == before and verify(samples)["verified"] == 25
    assert "part-000001.parquet is damaged" in caplog.text and "does not hold the seeds that it must" in caplog.text


def test_a_tracker_that_is_away_costs_the_record_alone_and_that_waits(
    run: Folder, folder: Folder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tracking, "SERVER_PATIENCE_S", 0.5)
    away = replace(job(run, folder), tracking=TrackingConfig(uri="http://127.0.0.1:9", experiment="samples"))
    assert sample_job(away)["drawn_now"] == 25
    assert verify(folder)["verified"] == 25
    assert waits_for(ReplayJob(runs=(folder.url,)))["waiting"] > 5


def test_tars_and_single_pictures_hold_the_same(run: Folder, folder: Folder) -> None:
    """As WebDataset's own reader has them."""
    draw_samples(plan_samples(replace(job(run, folder), also=("tar", "png"))))
    expected = pictures(folder)
    single = {int(path.stem): path.read_bytes() for path in Path(folder.path("png")).rglob("*.png")}
    assert single.keys() == expected.keys()
    for seed, image in single.items():
        assert np.array_equal(decode([image], "png", (8, 8, 1)), decode([expected[seed]], "png", (8, 8, 1)))
    assert all(stamp_of(image)["seed"] == seed for seed, image in single.items()), "each says where it comes from"
    tarred = {}
    for path in sorted(Path(folder.path("tar")).iterdir()):
        with tarfile.open(path) as tar:
            files = {member.name: tar.extractfile(member).read() for member in tar}  # type: ignore[union-attr]
        keys = sorted({name.partition(".")[0] for name in files})
        assert all(json.loads(files[f"{key}.json"]) == {"seed": int(key)} for key in keys)
        tarred |= {int(key): files[f"{key}.png"] for key in keys}
    assert tarred == single

    assert verify(folder)["verified"] == 25
    next(Path(folder.path("png")).rglob("*101.png")).unlink()
    with pytest.raises(DataError, match=r"png/part-000000/000000000101\.png"):
        verify(folder)
    for name in ("_SUCCESS", "part-000000.parquet"):
        Path(folder.path(name)).unlink()
    assert draw_samples(plan_samples(replace(job(run, folder), also=("tar", "png"))))["drawn_now"] == 10
    assert verify(folder)["verified"] == 25
    first = folder / "tar"
    first.put("part-000001.tar", first.get("part-000000.tar"))
    with pytest.raises(DataError, match=r"part-000001\.tar does not hold what part-000001\.parquet does"):
        verify(folder)


@pytest.mark.parametrize("sampler", ["random"])
def test_the_pixels_of_a_seed_depend_on_no_shard_and_no_actor(sampler: str, run: Folder, folder: Folder) -> None:
    for out, shard_images in ((folder / "a", 10), (folder / "b", 25)):
        draw_samples(plan_samples(job(run, out, sampler=sampler, shard_images=shard_images, actors=1)))
    assert pictures(folder / "a") == pictures(folder / "b")


def test_other_samples_in_the_folder_are_not_mixed_with(run: Folder, samples: Folder) -> None:
    folder = samples
    for other in (
        job(run, folder, steps=5),
        replace(job(run, folder), seeds="100-130"),
        replace(job(run, folder), checkpoint=(run / "checkpoint-000000000128").url),
    ):
        with pytest.raises(ConfigurationError, match=r"holds other samples: their .* this job's is") as refused:
            draw_samples(plan_samples(other))
        if other.draw.steps == 5:  # of the ten settings of a drawing that which differs
            assert "their draw is {'steps': 4}, this job's is {'steps': 5}" in str(refused.value)


def test_verify_sees_what_is_wrong(run: Folder, samples: Folder) -> None:
    folder = samples
    with pytest.raises(DataError, match="is not finished"):
        verify(run)
    data = bytearray(folder.get("part-000001.parquet"))
    data[len(data) // 2] ^= 1
    folder.put("part-000001.parquet", bytes(data))
    with pytest.raises(DataError, match=r"part-000001\.parquet is not what was written"):
        verify(folder)


def test_a_folder_without_a_checkpoint_is_named(run: Folder, folder: Folder) -> None:
    with pytest.raises(DataError, match="holds no valid checkpoint; give the folder of a run"):
        plan_samples(job(folder, folder))


def test_more_steps_than_the_checkpoint_knows_are_refused(run: Folder, folder: Folder) -> None:
    with pytest.raises(ConfigurationError, match=r"draw\.steps is 1001; it must be at most the T"):
        plan_samples(job(run, folder, steps=1001))


def test_weights_that_go_bad_under_way_fail_fast_and_are_named(run: Folder, folder: Folder, tmp_path: Path) -> None:
    copy = Folder(str(tmp_path / "copy"))
    shutil.copytree(run.path(), copy.path())
    plan = plan_samples(job(copy, folder))
    (Path(plan.trained.folder.path()) / "__0_0.distcp").write_bytes(b"")
    with pytest.raises(Exception, match=r"checkpoint-000000000256/__0_0\.distcp has 0 bytes") as caught:
        draw_samples(plan)
    assert _judge(caught.value)[0] == BAD_DATA


def test_without_the_training_data_only_the_strip_is_missing(run: Folder, samples: Folder, tmp_path: Path) -> None:
    plan = plan_samples(job(run, samples))
    moved = replace(plan.trained, checkpoint=replace(plan.trained.checkpoint, data_url=(samples / "gone").url))
    (Path(samples.path()) / "_SUCCESS").unlink()
    (Path(samples.path()) / "strip.png").unlink()
    draw_samples(replace(plan, asked=replace(plan.asked, trained=moved)))
    assert verify(samples)["verified"] == 25
    assert not samples.exists("strip.png")


def test_the_score_is_that_of_numpy(samples: Folder, digits: tuple[np.ndarray, np.ndarray]) -> None:
    result = score_job(ScoreJob(samples=samples.url))
    drawn = decode(list(pictures(samples).values()), "png", (8, 8, 1))
    expected = frechet_distance(Moments.of(pixel_features(drawn)), Moments.of(pixel_features(digits[0])))
    assert result["frechet_distance"] == pytest.approx(expected, rel=1e-6)
    assert (result["samples_n"], result["reference_n"]) == (25, 1797)
    assert result["same_data_as_trained_on"] and not result["recorded"]


def test_unfinished_samples_are_not_scored(folder: Folder) -> None:
    with pytest.raises(DataError, match="is no finished set of samples"):
        score_job(ScoreJob(samples=folder.url))


@pytest.mark.filterwarnings("ignore:TF32 acceleration")  # torch says it of a GPU that is not there
def test_arithmetic_of_another_kind_moves_no_pixel_by_more_than_a_level(run: Folder, folder: Folder) -> None:
    """Other convolutions add up in another order, as those of another device do."""
    draw = DrawShard(plan_samples(job(run, folder, steps=20, batch_images=64)))
    several = draw._draw(range(64)).astype(int)
    with torch.backends.mkldnn.flags(enabled=False):
        other = draw._draw(range(64)).astype(int)
    assert np.abs(several - other).max() <= 1
    assert several.std() > 10
