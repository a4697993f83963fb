"""Networks that leave for diffusers, and come from there."""

import json
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from diffusers import DDPMPipeline

from jobs.presets import DIGITS
from models.network import NetworkConfig
from models.noise import normal
from models.objective import ObjectiveConfig
from models.schedule import ScheduleConfig
from pipelines import checkpoints, exchange
from pipelines.config import TrainJob
from pipelines.errors import ConfigurationError, DataError
from pipelines.lineage import Imported, Trained
from pipelines.plain import to_dict
from pipelines.sample_config import SampleJob
from pipelines.sample_plan import identity, plan_samples
from pipelines.storage import Folder
from pipelines.training import export
from pipelines.world import World
from tests.pipelines.states import ABOUT, TINY, VARIANTS, tiny_state

X, T = normal(0, "x", torch.arange(5), (1, 8, 8)), torch.tensor([1, 2, 300, 999, 1000])


def trained(root: Path, **fit: Any) -> tuple[TrainJob, Trained]:
    """A run with one checkpoint, of a network that is not trivial."""
    classes = fit.pop("classes", 0)
    job = replace(DIGITS, root=str(root), network=NetworkConfig(unet=TINY, labels=classes > 0),
                  fit=replace(DIGITS.fit, **fit), schedule=ScheduleConfig(kind="linear"))  # fmt: skip
    state = tiny_state(job.fit, variant=VARIANTS["plain"]._replace(classes=classes))
    drawn = torch.Generator().manual_seed(0)
    for shadow in state.ema.shadow.values():
        shadow.copy_(0.1 * torch.randn(shadow.shape, generator=drawn))
    state.position = 128
    about = replace(ABOUT, config=to_dict(job), labels=[f"label {i}" for i in range(classes)])
    checkpoints.commit(job.run, state, about, World())
    return job, Trained.find(job.run.url)


def as_theirs(url: str) -> str:
    """An export as diffusers would have written it: without our own files."""
    for name in ("config.json", "model.safetensors", "ema.safetensors"):
        Path(Folder(url).path(name)).unlink()
    return url


def pipeline_of(job: TrainJob, ours: Trained) -> str:
    return as_theirs(export(job, ours))


@pytest.mark.parametrize(("target", "theirs"), [("eps", "epsilon"), ("v", "v_prediction"), ("x_0", "sample")])
def test_an_export_is_a_pipeline_and_comes_back_as_it_was(target: str, theirs: str, tmp_path: Path) -> None:
    job, ours = trained(tmp_path, objective=ObjectiveConfig(target=target))  # type: ignore[arg-type]
    url = export(job, ours)
    pipeline = DDPMPipeline.from_pretrained(Folder(url).path())
    assert pipeline.scheduler.config.prediction_type == theirs
    with torch.no_grad():
        expected = ours.network(averaged=True)(X, T)
        torch.testing.assert_close(pipeline.unet(X, T - 1).sample, expected, rtol=1e-5, atol=1e-5)

    back = Trained.find(as_theirs(url))
    assert isinstance(back, Imported)
    assert torch.equal(back.network(averaged=True)(X, T), expected)
    assert back.target == target
    torch.testing.assert_close(back.schedule().log_alpha_bar, ours.schedule().log_alpha_bar, rtol=1e-12, atol=0)
    assert expected.std() > 0.01


def test_the_plain_files_of_an_export_hold_both_sets_of_weights(tmp_path: Path) -> None:
    job, ours = trained(tmp_path)
    folder = Folder(export(job, ours))
    about = json.loads(folder.get("config.json"))
    assert (about["target"], about["position"], about["schedule"]["kind"]) == ("eps", 128, "linear")
    for name, averaged in (("model", False), ("ema", True)):
        written = safetensors.torch.load(folder.get(f"{name}.safetensors"))
        weights = ours.network(averaged).state_dict()
        assert written.keys() == weights.keys()
        assert all(torch.equal(written[key], weights[key]) for key in weights)


def test_a_network_with_labels_comes_back_with_them(tmp_path: Path) -> None:
    job, ours = trained(tmp_path, classes=3)
    url = export(job, ours)
    back = Trained.find(url)
    assert back.labels == ["label 0", "label 1", "label 2"]
    label = torch.tensor([0, 1, 2, -1, 0])
    with torch.no_grad():
        assert torch.equal(back.network(True)(X, T, label), ours.network(True)(X, T, label))
        assert not torch.equal(back.network(True)(X, T, label), back.network(True)(X, T))
        theirs = Trained.find(as_theirs(url))
        assert theirs.labels == ["0", "1", "2"]
        assert torch.equal(theirs.network(True)(X, T, label), ours.network(True)(X, T, label))


def test_an_export_is_drawn_from_as_the_checkpoint_that_it_is_of(tmp_path: Path) -> None:
    """Both sets of weights, under the checkpoint's own digest: a folder of samples may be finished from either."""
    job, ours = trained(tmp_path)
    job_of = partial(SampleJob, out=str(tmp_path / "out"))
    url = export(job, ours)
    back = Trained.find(url)
    for averaged in (True, False):
        expected, found = ours.network(averaged).state_dict(), back.network(averaged).state_dict()
        assert all(torch.equal(found[name], value) for name, value in expected.items())
    plans = [plan_samples(job_of(checkpoint=checkpoint)) for checkpoint in (job.run.url, url)]
    assert identity(plans[0]) == identity(plans[1])
    assert plans[1].lineage["data_digest"] == ours.checkpoint.data_digest
    assert back.view == ours.view
    said, kept = ours.checkpoint.config, back.checkpoint.config
    assert kept["data"] == {name: said["data"][name] for name in ("zoom", "crop", "held_out")}
    assert kept["fit"]["flip"] == said["fit"]["flip"]

    average_alone = Folder(str(tmp_path / "from MLflow"))
    for name in ("config.json", "ema.safetensors"):
        average_alone.put(name, Folder(url).get(name))
    with pytest.raises(DataError, match=r"holds the average of the weights alone; take --draw\.weights ema"):
        Trained.find(average_alone.url).network(averaged=False)
    weights = bytearray(average_alone.get("ema.safetensors"))
    weights[-1] ^= 1
    average_alone.put("ema.safetensors", bytes(weights))
    with pytest.raises(DataError, match=r"ema\.safetensors is not what was exported: its sha256 differs"):
        Trained.find(average_alone.url).network(averaged=True)
    average_alone.put("config.json", b'{"checkpoint_digest": "d"}')
    with pytest.raises(DataError, match="does not say what the export is"):
        Trained.find(average_alone.url)


def test_what_diffusers_has_no_word_for_is_exported_without_it(tmp_path: Path) -> None:
    job, ours = trained(tmp_path, objective=ObjectiveConfig(target="article"))
    folder = Folder(export(job, ours))
    assert folder.exists("ema.safetensors") and not folder.exists(exchange.INDEX)


def test_a_pipeline_is_drawn_from_as_from_a_run(tmp_path: Path) -> None:
    """The lineage of its samples names the files; what a run alone has is refused, and so is what is unknown."""
    job, ours = trained(tmp_path)
    url = pipeline_of(job, ours)
    plan = plan_samples(SampleJob(checkpoint=url, out=str(tmp_path / "out")))
    assert plan.lineage["checkpoint_digest"] == Trained.find(url).checkpoint.digest
    assert plan.lineage["position"] == 0 and plan.lineage["tracking_run"] == ""
    with pytest.raises(ConfigurationError, match=r"draw\.ema_std is 0\.1; .* came without snapshots"):
        plan.trained.network(averaged=True, std=0.1)


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (lambda config: config.update(act_fn="relu"), "act_fn"),
        (lambda config: config.pop("block_out_channels"), "block_out_channels is missing"),
    ],
)
def test_a_pipeline_of_another_form_is_refused(harm: Any, message: str, tmp_path: Path) -> None:
    job, ours = trained(tmp_path)
    folder = Folder(pipeline_of(job, ours))
    config = json.loads(folder.get(exchange.UNET))
    harm(config)
    folder.put(exchange.UNET, json.dumps(config).encode())
    with pytest.raises(DataError, match=f"cannot be taken over: .*{message}"):
        Trained.find(folder.url)


def test_pickled_weights_are_no_weights(tmp_path: Path) -> None:
    job, ours = trained(tmp_path)
    folder = Folder(pipeline_of(job, ours))
    weights = Path(folder.path(exchange.UNET_WEIGHTS))
    weights.rename(weights.with_suffix(".bin"))
    with pytest.raises(DataError, match=r"is missing; only safetensors are read: .* safe_serialization=True"):
        Trained.find(folder.url)


@pytest.mark.parametrize(
    ("file", "harm"),
    [
        (exchange.UNET, {"block_out_channels": 8}),
        (exchange.UNET, {"down_block_types": None}),
        (exchange.UNET, {"layers_per_block": [1, 1]}),
        (exchange.SCHEDULER, {"trained_betas": 0.1}),
        (exchange.SCHEDULER, {"_class_name": "FlowMatchEulerDiscreteScheduler"}),
    ],
)
def test_nonsense_is_damaged_data_and_no_traceback(file: str, harm: dict[str, Any], tmp_path: Path) -> None:
    job, ours = trained(tmp_path)
    folder = Folder(pipeline_of(job, ours))
    folder.put(file, json.dumps(json.loads(folder.get(file)) | harm).encode())
    with pytest.raises(DataError, match="cannot be taken over"):
        Trained.find(folder.url)


def test_weights_that_are_no_safetensors_are_refused(tmp_path: Path) -> None:
    job, ours = trained(tmp_path)
    folder = Folder(pipeline_of(job, ours))
    folder.put(exchange.UNET_WEIGHTS, b"pickle")
    with pytest.raises(DataError, match="cannot be taken over"):
        Trained.find(folder.url)


def test_weights_that_change_under_way_are_noticed(tmp_path: Path) -> None:
    job, ours = trained(tmp_path)
    found = Trained.find(pipeline_of(job, ours))
    weights = safetensors.torch.load(found.folder.get(exchange.UNET_WEIGHTS))
    weights["conv_in.bias"] += 1
    found.folder.put(exchange.UNET_WEIGHTS, safetensors.torch.save(weights))
    with pytest.raises(DataError, match="has changed since the job began"):
        found.network(averaged=True)
