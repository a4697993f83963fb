from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from jobs.cli import parse
from jobs.presets import CIFAR10, PRESETS
from models.parallelize import ParallelConfig
from pipelines.config import DataConfig, TrainJob
from pipelines.draw_config import DrawConfig
from pipelines.errors import ConfigurationError
from pipelines.fit_config import FitConfig
from pipelines.plain import file_as_flags, flatten, from_dict, to_dict, to_yaml
from pipelines.sample_config import SampleJob
from pipelines.scaling import ScalingConfig
from pipelines.score_config import ScoreJob
from pipelines.tracking_config import TrackingConfig


@pytest.mark.parametrize("preset", PRESETS)
def test_a_configuration_survives_the_file(preset: str, tmp_path: Path) -> None:
    job = PRESETS[preset][1]
    (tmp_path / "config.yaml").write_text(to_yaml(job))
    assert parse(TrainJob, {}, ["--config", str(tmp_path / "config.yaml")]).job == job


def test_preset_then_file_then_flags(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "c.yaml").write_text(
        "seed: 7\nfit: {learning_rate: 0.001, flip: true}\nnetwork: {unet: {attention: [4, 8]}}"
    )
    monkeypatch.chdir(tmp_path)
    job = PRESETS["digits"][1]
    found = parse(TrainJob, PRESETS, ["digits", "--seed", "8", "--config=c.yaml", "--network.unet.groups", "4"]).job
    assert found == replace(
        job,
        seed=8,
        fit=replace(job.fit, learning_rate=0.001, flip=True),
        network=replace(job.network, unet=replace(job.network.unet, attention=(4, 8), groups=4)),
    )


def test_a_file_and_flags_complete_each_other(tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text("draw: {steps: 7, clip: false}\nseeds: 0-9")
    found = parse(SampleJob, {}, ["--config", str(tmp_path / "c.yaml"), "--out", "o", "--checkpoint", "c"]).job
    assert found == SampleJob(out="o", checkpoint="c", seeds="0-9", draw=DrawConfig(steps=7, clip=False))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("fit:\n  learning_rat: 1", r"fit\.learning_rat is no field; did you mean fit\.learning_rate\?"),
        ("zzz: 1", "zzz is no field; it has name, root, seed"),
        ("- 1", "must be a mapping"),
        ("a: [", "while parsing"),
    ],
)
def test_a_bad_file_says_where_and_what(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text(text)
    with pytest.raises(ConfigurationError, match=message) as caught:
        file_as_flags(TrainJob, str(tmp_path / "c.yaml"))
    assert "c.yaml" in str(caught.value)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"nothing\.yaml does not exist"):
        file_as_flags(TrainJob, str(tmp_path / "nothing.yaml"))


def test_what_a_checkpoint_kept_is_checked_when_it_is_read() -> None:
    for content, message in (
        ({"images": "many"}, r"images is 'many'; Input should be a valid integer"),
        ({"batch_images": 192}, r"fit\.images is 204800; it must be a multiple of fit\.batch_images"),
    ):
        with pytest.raises(ConfigurationError, match=message):
            from_dict(FitConfig, content, "here")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"name": "a b"}, "name is 'a b'"),
        ({"name": "../x"}, "name is '../x'"),
        ({"evaluate_images": 1}, "evaluate_images is 1"),
        ({"keep_checkpoints": 0}, "keep_checkpoints is 0"),
    ],
)
def test_a_bad_training_job_is_refused(change: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        replace(PRESETS["digits"][1], **change)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"min_workers": 3, "workers": 2},
            r"scaling\.min_workers is 3; it must lie in 0\.\.scaling\.workers, which is 2",
        ),
        ({"min_workers": -1}, r"scaling\.min_workers is -1"),
        ({"hang_s": 0}, r"scaling\.hang_s is 0; it must be positive"),
        ({"resize_s": -1}, r"scaling\.resize_s is -1; it must be positive"),
        ({"max_failures": -1}, r"scaling\.max_failures is -1"),
    ],
)
def test_bad_scaling_is_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        ScalingConfig(**change)


def test_a_relative_root_is_that_of_the_command_for_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray gives each worker a working directory of its own."""
    monkeypatch.chdir(tmp_path)
    job = TrainJob(root="yard", data=DataConfig(url="raw/images"))
    monkeypatch.chdir("/")
    assert job.root == f"file://{tmp_path}/yard" and job.data.url == f"file://{tmp_path}/raw/images"
    assert replace(job, seed=1).run.url == f"file://{tmp_path}/yard/runs/run"
    for kept in ("s3://bucket/yard", "/yard", "~/yard", "file:/yard"):
        assert replace(job, root=kept).root == kept


def test_a_model_that_mlflow_could_not_name_is_refused() -> None:
    with pytest.raises(ConfigurationError, match=r"tracking\.register is 'a/b'; .* no '/'"):
        TrackingConfig(register="a/b")
    with pytest.raises(ConfigurationError, match=r"promote is 'models:/a'"):
        ScoreJob(samples="samples", promote="models:/a")


def test_more_steps_than_the_schedule_has_are_refused() -> None:
    job = PRESETS["digits"][1]
    with pytest.raises(ConfigurationError, match=r"draw\.steps is 20; it must be at most schedule\.T, which is 10"):
        replace(job, schedule=replace(job.schedule, T=10, rate=0.95))


@pytest.mark.parametrize("seeds", ["", "5", "9-3", "a-b", "-1-4"])
def test_bad_seeds_are_refused(seeds: str) -> None:
    why = "; the last comes before the first" if seeds == "9-3" else ""
    with pytest.raises(ConfigurationError, match=f"seeds is .*; it must be FIRST-LAST, such as 0-49999{why}$"):
        SampleJob(checkpoint="c", out="o", seeds=seeds)


def test_a_flat_view_has_every_setting() -> None:
    flat = flatten(to_dict(PRESETS["digits"][1]))
    assert flat["fit.ema.half_life_images"] == 50_000
    assert flat["network.unet.multipliers"] == [1, 2]
    assert from_dict(TrainJob, to_dict(PRESETS["digits"][1]), "x") == PRESETS["digits"][1]


@pytest.mark.parametrize(
    ("scaling", "parallel", "message"),
    [
        (
            {"workers": 3},
            {"strategy": "hybrid", "shards": 2},
            r"shards is 2; scaling\.workers = 3 is not a multiple",
        ),
        (
            {"workers": 4, "min_workers": 2},
            {"strategy": "hybrid", "shards": 2},
            r"min_workers is 2 and .* hybrid",
        ),
        ({"workers": 9}, {}, r"scaling\.workers is 9; .* take 8 workers at most"),
    ],
)
def test_workers_that_cannot_share_the_work_are_refused(
    scaling: dict[str, int], parallel: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigurationError, match=message):
        replace(CIFAR10, scaling=ScalingConfig(**scaling), parallel=ParallelConfig(**parallel))
