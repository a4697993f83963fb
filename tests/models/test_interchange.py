"""What `diffusers` makes of our files, and what we make of its own: the same predictions, and the same step."""

import json
from dataclasses import replace

import pytest
import torch
from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel
from safetensors.torch import load_file, save_file

from models.interchange import (
    FORMER,
    from_diffusers,
    from_scheduler_config,
    pipeline_index,
    scheduler_config,
    to_diffusers,
)
from models.noise import normal
from models.samplers import clip_x_0, posterior
from models.schedule import article, linear
from models.unet import UNet, UNetConfig

TINY = UNetConfig(channels=8, multipliers=(1, 2), blocks=1, attention=(4,), groups=4)
NETWORKS = [  # configuration, image channels, side
    (TINY, 1, 8),
    (UNetConfig(channels=8, multipliers=(1, 2, 2), blocks=2, attention=(12, 3), head_channels=4, groups=2), 3, 12),
    (UNetConfig(channels=16, multipliers=(1, 3, 1), blocks=1, attention=(), head_channels=8, groups=8), 3, 8),
    (UNetConfig(channels=4, multipliers=(1,), blocks=3, attention=(5,), groups=1), 2, 5),
]
LINEAR = {"beta_schedule": "linear", "beta_start": 0.0001, "beta_end": 0.02, "num_train_timesteps": 1000}


def fill(module):
    """Give every parameter a value away from zero, as after some training."""
    parameters = list(module.parameters())
    drawn = normal(2, "weights", torch.tensor([0]), (sum(p.numel() for p in parameters),))[0]
    with torch.no_grad():
        for parameter, values in zip(parameters, drawn.split([p.numel() for p in parameters]), strict=True):
            noise = values.view(parameter.shape)
            parameter.copy_(noise / max(1, parameter[0].numel()) ** 0.5 + 0.5 * (parameter.dim() == 1))
    return module.eval()


def pictures(image_channels, side, n=3):
    return normal(0, "x", torch.arange(n), (image_channels, side, side))


def written(folder, network, image_channels, side, schedule):
    """Write a pipeline as our export does and return its folder."""
    config, weights = to_diffusers(network.config, image_channels, side, 0, network.state_dict())
    files = {
        "model_index.json": pipeline_index(),
        "unet/config.json": config,
        "scheduler/scheduler_config.json": scheduler_config(schedule, "epsilon"),
    }
    for name, content in files.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(json.dumps(content))
    save_file(weights, folder / "unet" / "diffusion_pytorch_model.safetensors")
    return folder


def loaded(folder, caplog):
    """Load a pipeline, and see that nothing in it was unknown, unused or missing."""
    with caplog.at_level("INFO", logger="diffusers"):
        pipeline = DDPMPipeline.from_pretrained(folder, use_safetensors=True)
    assert "All model checkpoint weights were used" in caplog.text
    assert "All the weights of UNet2DModel were initialized" in caplog.text
    warnings = [record.message for record in caplog.records if record.levelname != "INFO"]
    assert [message for message in warnings if "`accelerate` was not found" not in message] == []
    return pipeline


def peers(config, **changes):
    """A UNet2DModel of the paper's form, small, and its configuration as its file has it."""
    peer = fill(UNet2DModel.from_config(config | changes))
    return peer, json.loads(peer.to_json_string())


def assert_same_predictions(network, peer, image_channels, side, labels=(None, None)):
    x, t = pictures(image_channels, side), torch.tensor([1, 400, 1000])
    with torch.no_grad():
        ours, theirs = network(x, t, labels[0]), peer(x, t - 1, class_labels=labels[1]).sample
    assert ours.std() > 0.1
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("config", "image_channels", "side"), NETWORKS)
def test_a_pipeline_loads_what_we_write_and_predicts_the_same(config, image_channels, side, tmp_path, caplog):
    network = fill(UNet(config, image_channels, side)).to(memory_format=torch.channels_last)
    pipeline = loaded(written(tmp_path, network, image_channels, side, article()), caplog)
    assert_same_predictions(network, pipeline.unet, image_channels, side)


@pytest.mark.parametrize("make", [article, linear])
@pytest.mark.parametrize("tables", ["its own", "in float64"])
@pytest.mark.parametrize("t", [1000, 500, 50, 2])
def test_its_step_is_ours(make, tables, t, tmp_path, caplog):
    schedule, network = make(), fill(UNet(TINY, 1, 8))
    pipeline = loaded(written(tmp_path, network, 1, 8, schedule), caplog)
    x = pictures(1, 8)
    noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(3))
    walk = posterior(clip_x_0(network, schedule), x, until(schedule, t), lambda step: noise)
    next(walk)
    with torch.no_grad():
        ours, prediction = next(walk), pipeline.unet(x, t - 1).sample
    if tables == "in float64":
        betas = torch.tensor(pipeline.scheduler.config.trained_betas, dtype=torch.float64)
        pipeline.scheduler.alphas_cumprod = (1 - betas).cumprod(0)
    generator = torch.Generator().manual_seed(3)
    theirs = pipeline.scheduler.step(prediction, t - 1, x, generator=generator).prev_sample
    # Its own tables are float32, where 1 - ᾱ² has lost half of its digits near t = 1.
    tolerance = 1e-3 if tables == "its own" and t == 2 else 1e-5
    torch.testing.assert_close(ours, theirs.float(), rtol=tolerance, atol=tolerance)


def until(schedule, t):
    """The schedule of the first t steps."""
    names = ("alpha", "beta", "alpha_bar", "beta_bar", "log_alpha_bar", "time")
    return replace(schedule, **{name: getattr(schedule, name)[: t + 1] for name in names})


def test_labels_are_theirs_and_no_label_is_the_last_of_them():
    network = fill(UNet(TINY, 1, 8, classes=3))
    config, weights = to_diffusers(TINY, 1, 8, 3, network.state_dict())
    assert config["num_class_embeds"] == 4
    peer = UNet2DModel.from_config(config)
    peer.load_state_dict(weights)
    assert_same_predictions(network, peer, 1, 8, (torch.tensor([2, -1, 0]), torch.tensor([2, 3, 0])))
    assert_same_predictions(network, peer, 1, 8, (None, torch.tensor([3, 3, 3])))


@pytest.mark.parametrize(("config", "image_channels", "side"), NETWORKS)
@pytest.mark.parametrize("classes", [0, 3])
def test_there_and_back_nothing_changes(config, image_channels, side, classes):
    network = fill(UNet(config, image_channels, side, classes)).to(memory_format=torch.channels_last)
    there = to_diffusers(config, image_channels, side, classes, network.state_dict())
    through_a_file = json.loads(json.dumps(there[0]))
    *described, weights = from_diffusers(through_a_file, there[1])
    assert described == [config, image_channels, side, classes]
    assert list(weights) == list(network.state_dict())
    assert all(torch.equal(weights[name], weight) for name, weight in network.state_dict().items())


def test_what_we_give_shares_no_memory_and_lies_in_rows():
    network = UNet(TINY, 3, 8).to(memory_format=torch.channels_last)
    _, weights = to_diffusers(TINY, 3, 8, 0, network.state_dict())
    assert all(weight.is_contiguous() for weight in weights.values())
    storages = [w.untyped_storage().data_ptr() for w in (*weights.values(), *network.state_dict().values())]
    assert len(set(storages)) == len(storages)


CIFAR = {  # the config.json of google/ddpm-cifar10-32, word for word but for its four sizes
    "_class_name": "UNet2DModel",
    "act_fn": "silu",
    "attention_head_dim": None,
    "block_out_channels": [8, 16, 16, 16],
    "center_input_sample": False,
    "down_block_types": ["DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"],
    "downsample_padding": 0,
    "flip_sin_to_cos": False,
    "freq_shift": 1,
    "in_channels": 3,
    "layers_per_block": 2,
    "mid_block_scale_factor": 1,
    "norm_eps": 1e-06,
    "norm_num_groups": 4,
    "out_channels": 3,
    "sample_size": 16,
    "time_embedding_type": "positional",
    "up_block_types": ["UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"],
}


@pytest.mark.parametrize("former_names", [False, True])
def test_a_published_network_predicts_the_same_here(former_names, tmp_path):
    peer, _ = peers(CIFAR)
    peer.save_pretrained(tmp_path)
    weights = load_file(tmp_path / "diffusion_pytorch_model.safetensors")
    if former_names:
        for former, today in FORMER.items():
            weights = {name.replace(today, former): weight for name, weight in weights.items()}
        assert not any("to_q" in name for name in weights)
    for config in (CIFAR, json.loads((tmp_path / "config.json").read_text())):
        *described, ours = from_diffusers(config, weights)
        shape = UNetConfig(channels=8, multipliers=(1, 2, 2, 2), blocks=2, attention=(8,), groups=4)
        assert described == [shape, 3, 16, 0]
        network = UNet(*described).eval()
        network.load_state_dict(ours)
        assert_same_predictions(network, peer, 3, 16)


def test_the_published_networks_whole_form_is_the_papers():
    sizes = {"block_out_channels": [128, 256, 256, 256], "norm_num_groups": 32, "sample_size": 32}
    with torch.device("meta"):
        peer = UNet2DModel.from_config(CIFAR | sizes)
    paper = UNetConfig(channels=128, multipliers=(1, 2, 2, 2), blocks=2, attention=(16,), groups=32)
    assert from_diffusers(CIFAR | sizes, peer.state_dict())[:4] == (paper, 3, 32, 0)
    assert sum(p.numel() for p in peer.parameters()) == 35_746_307


@pytest.mark.parametrize(
    ("field", "value", "rule"),
    [
        ("_class_name", "UNet2DConditionModel", "be 'UNet2DModel'"),
        ("act_fn", "gelu", "be 'silu'"),
        ("add_attention", False, "be True"),
        ("attn_norm_num_groups", 2, "be None or norm_num_groups, which is 4"),
        ("block_out_channels", [8, 16, 16, 20], "be multiples of the first, 8"),
        ("center_input_sample", True, "be False"),
        ("class_embed_type", "timestep", "be None"),
        (
            "down_block_types",
            ["DownBlock2D", "SkipDownBlock2D", "DownBlock2D", "DownBlock2D"],
            "consist of DownBlock2D",
        ),
        ("downsample_padding", 1, "be 0"),
        ("downsample_type", "resnet", "be 'conv'"),
        ("flip_sin_to_cos", True, "be False"),
        ("freq_shift", 0, "be 1"),
        ("mid_block_scale_factor", 1.4, "be 1"),
        ("mid_block_type", None, "be 'UNetMidBlock2D'"),
        ("norm_eps", 1e-5, "be 1e-06"),
        ("num_class_embeds", 1, "be None or at least 2"),
        ("out_channels", 6, "be in_channels, 3"),
        ("resnet_time_scale_shift", "scale_shift", "be 'default'"),
        ("sample_size", [16, 24], "be one number"),
        ("time_embedding_dim", 64, "be None or 32"),
        ("time_embedding_type", "fourier", "be 'positional'"),
        ("up_block_types", ["UpBlock2D"] * 4, "mirror down_block_types"),
        ("upsample_type", "resnet", "be 'conv'"),
    ],
)
def test_another_form_is_refused_by_its_field_its_value_and_the_rule(field, value, rule):
    with pytest.raises(ValueError, match="it must") as caught:
        from_diffusers(CIFAR | {field: value}, {})
    assert str(caught.value).startswith(f"{field} is {value!r}; it must {rule}")


@pytest.mark.parametrize("field", ["downsample_padding", "flip_sin_to_cos", "freq_shift", "norm_eps"])
def test_a_field_that_is_not_written_means_the_peers_default_not_ours(field):
    with pytest.raises(ValueError, match=f"{field} is .*; it must be"):
        from_diffusers({name: value for name, value in CIFAR.items() if name != field}, {})


def test_fields_and_weights_that_are_missing_unknown_or_of_another_shape_are_named():
    weights = to_diffusers(TINY, 1, 8, 0, fill(UNet(TINY, 1, 8)).state_dict())[1]
    config = to_diffusers(TINY, 1, 8, 0, UNet(TINY, 1, 8).state_dict())[0]
    with pytest.raises(ValueError, match="sample_size is missing"):
        from_diffusers({name: value for name, value in config.items() if name != "sample_size"}, weights)
    with pytest.raises(ValueError, match="addition_embed_type is 'text'; it is no field"):
        from_diffusers(config | {"addition_embed_type": "text"}, weights)
    with pytest.raises(ValueError, match=r"lack \['conv_in.bias'\] and have \['conv_on.bias'\]"):
        from_diffusers(config, {name.replace("conv_in.b", "conv_on.b"): w for name, w in weights.items()})
    with pytest.raises(ValueError, match=r"lack \[\] and have \['more'\]"):
        from_diffusers(config, weights | {"more": torch.zeros(1)})
    with pytest.raises(ValueError, match=r"conv_in.bias make \[9\]; by this config.json they must make \[8\]"):
        from_diffusers(config, weights | {"conv_in.bias": torch.zeros(9)})


@pytest.mark.parametrize("prediction_type", ["epsilon", "sample", "v_prediction"])
@pytest.mark.parametrize("make", [article, linear])
def test_a_schedule_comes_back_as_it_went(make, prediction_type):
    schedule = make()
    config = scheduler_config(schedule, prediction_type)
    scheduler = DDPMScheduler.from_config(config)
    torch.testing.assert_close(scheduler.alphas_cumprod.double(), schedule.alpha_bar[1:].square(), rtol=1e-5, atol=0)
    assert (scheduler.config.prediction_type, scheduler.config.variance_type) == (prediction_type, "fixed_small")
    assert scheduler.config.clip_sample is True
    betas, kind = from_scheduler_config(json.loads(json.dumps(config)))
    assert kind == prediction_type
    assert betas == tuple(schedule.beta[1:].square().tolist())


def test_a_line_of_betas_is_the_papers_schedule():
    for config in (LINEAR, {}):
        betas, kind = from_scheduler_config(config)
        assert kind == "epsilon"
        theirs = DDPMScheduler.from_config(config).betas.double()
        torch.testing.assert_close(torch.tensor(betas, dtype=torch.float64), theirs, rtol=1e-5, atol=0)
        assert betas == pytest.approx(linear().beta[1:].square().tolist(), rel=1e-12)


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        ({"beta_schedule": "squaredcos_cap_v2"}, "beta_schedule is 'squaredcos_cap_v2'; it must be 'linear'"),
        ({"prediction_type": "flow"}, "prediction_type is 'flow'; it must be one of epsilon, sample"),
        ({"rescale_betas_zero_snr": True}, "rescale_betas_zero_snr is True; it must be False"),
        ({"trained_betas": [0.1, 0.2], "num_train_timesteps": 3}, "trained_betas has 2 values; there must be .* 3"),
    ],
)
def test_another_schedule_is_refused(config, reason):
    with pytest.raises(ValueError, match=reason):
        from_scheduler_config(config)


def test_a_schedule_in_strides_or_another_prediction_is_not_written():
    with pytest.raises(ValueError, match="10 strides out of more; it must be the whole one"):
        scheduler_config(article().respaced(10), "epsilon")
    with pytest.raises(ValueError, match="prediction_type is 'eps'"):
        scheduler_config(article(), "eps")
