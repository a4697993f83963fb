"""ε_θ and its schedule as `diffusers` writes them: a ``UNet2DModel`` and a ``DDPMScheduler`` in a ``DDPMPipeline``.

Contents go in and out, never files. Names and layouts differ, no number does: a network that goes there and comes back
has the same weights to the last bit. Times differ by one, ours in 1..T and theirs in 0..T-1, which needs no care here,
because the network encodes t - 1.
"""

import re
from typing import Any

import torch
from torch import Tensor

from models.schedule import Schedule
from models.unet import UNet, UNetConfig

VERSION = "0.42.0"
"""Of `diffusers`, whose form this is."""
FORM: dict[str, Any] = {
    "_class_name": "UNet2DModel",
    "act_fn": "silu",
    "add_attention": True,
    "center_input_sample": False,
    "class_embed_type": None,
    "downsample_padding": 0,
    "downsample_type": "conv",
    "flip_sin_to_cos": False,
    "freq_shift": 1,
    "mid_block_scale_factor": 1,
    "mid_block_type": "UNetMidBlock2D",
    "norm_eps": 1e-6,
    "resnet_time_scale_shift": "default",
    "time_embedding_type": "positional",
    "upsample_type": "conv",
}
"""What makes a UNet2DModel the U-Net of the DDPM paper."""
ABSENT: dict[str, Any] = FORM | {
    "attention_head_dim": 8,
    "attn_norm_num_groups": None,
    "downsample_padding": 1,
    "dropout": 0.0,
    "flip_sin_to_cos": True,
    "freq_shift": 0,
    "in_channels": 3,
    "layers_per_block": 2,
    "norm_eps": 1e-5,
    "norm_num_groups": 32,
    "num_class_embeds": None,
    "num_train_timesteps": None,
    "out_channels": 3,
    "time_embedding_dim": None,
}
"""What it means when a config.json does not have a field."""
REQUIRED = ("block_out_channels", "down_block_types", "sample_size", "up_block_types")
"""Fields that it must have."""
SCHEDULERS = (
    "DDIMScheduler",
    "DDPMScheduler",
    "DPMSolverMultistepScheduler",
    "EulerAncestralDiscreteScheduler",
    "EulerDiscreteScheduler",
    "HeunDiscreteScheduler",
    "PNDMScheduler",
    "UniPCMultistepScheduler",
)
"""Those whose betas mean what a DDPMScheduler's do; how they walk is not taken over."""
PREDICTION_TYPES = {"eps": "epsilon", "x_0": "sample", "v": "v_prediction"}
"""Our targets of a network, in a DDPMScheduler's words. It has none for the article's."""

RENAMED = (
    (r"^(down|up)\.(\d+)\.(\d+)\.residual\.", r"\1_blocks.\2.resnets.\3."),
    (r"^(down|up)\.(\d+)\.(\d+)\.attention\.", r"\1_blocks.\2.attentions.\3."),
    (r"^(down|up)sample\.(\d+)\.", r"\1_blocks.\2.\1samplers.0."),
    (r"^middle\.residual_in\.", "mid_block.resnets.0."),
    (r"^middle\.residual_out\.", "mid_block.resnets.1."),
    (r"^middle\.attention\.", "mid_block.attentions.0."),
    (r"^time\.0\.", "time_embedding.linear_1."),
    (r"^time\.2\.", "time_embedding.linear_2."),
    (r"^label\.", "class_embedding."),
    (r"^norm_out\.", "conv_norm_out."),
    (r"\.time\.", ".time_emb_proj."),
    (r"\.skip\.", ".conv_shortcut."),
    (r"\.(norm|conv)_([12])\.", r".\1\2."),
    (r"\.norm\.", ".group_norm."),
    (r"\.out\.", ".to_out.0."),
)
"""From our names of the weights to theirs, one rule after the other."""
FORMER = {".query.": ".to_q.", ".key.": ".to_k.", ".value.": ".to_v.", ".proj_attn.": ".to_out.0."}
"""From the names of before 2023, which the published DDPM checkpoints have, to today's."""


def to_diffusers(
    config: UNetConfig, image_channels: int, side: int, classes: int, weights: dict[str, Tensor]
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return the config.json and the weights of the UNet2DModel that predicts what a UNet with these weights does.

    A label there is ours, 0..classes-1; "no label" is the label ``classes``.
    """
    attends = [side >> level in config.attention for level in range(len(config.multipliers))]
    written = FORM | {
        "_diffusers_version": VERSION,
        "attention_head_dim": config.head_channels or None,
        "block_out_channels": config.widths,
        "down_block_types": ["AttnDownBlock2D" if yes else "DownBlock2D" for yes in attends],
        "dropout": 0.0,
        "in_channels": image_channels,
        "layers_per_block": config.blocks,
        "norm_num_groups": config.groups,
        "num_class_embeds": classes + 1 if classes else None,
        "out_channels": image_channels,
        "sample_size": side,
        "up_block_types": ["AttnUpBlock2D" if yes else "UpBlock2D" for yes in reversed(attends)],
    }
    theirs: dict[str, Tensor] = {}
    for ours in _shapes(config, image_channels, side, classes):
        names = _names(ours)
        # Copies, in rows: a file holds no views into one another and no channels-last.
        parts = [part.clone(memory_format=torch.contiguous_format) for part in weights[ours].chunk(len(names))]
        theirs.update(zip(names, parts, strict=True))
    return written, theirs


def from_diffusers(
    config: dict[str, Any], weights: dict[str, Tensor]
) -> tuple[UNetConfig, int, int, int, dict[str, Tensor]]:
    """Return the configuration, image channels, side, classes and weights of the UNet that predicts the same.

    The last of its labels, if it takes any, becomes "no label". Dropout is not looked at: no prediction depends on it.

    Raises:
        ValueError: for a UNet2DModel that is not of the DDPM paper's form, and for weights that are not of this config.
    """
    read = ABSENT | config
    _check_form(read)
    widths, side, image_channels = read["block_out_channels"], read["sample_size"], read["in_channels"]
    attends = [name == "AttnDownBlock2D" for name in read["down_block_types"]]
    ours = UNetConfig(
        channels=widths[0],
        multipliers=tuple(width // widths[0] for width in widths),
        blocks=read["layers_per_block"],
        attention=tuple(side >> level for level, yes in enumerate(attends) if yes),
        head_channels=read["attention_head_dim"] or 0,
        groups=read["norm_num_groups"],
    )
    classes = read["num_class_embeds"] - 1 if read["num_class_embeds"] else 0
    shapes = _shapes(ours, image_channels, side, classes)
    return ours, image_channels, side, classes, _gathered(shapes, weights)


def _shapes(config: UNetConfig, image_channels: int, side: int, classes: int) -> dict[str, torch.Size]:
    """Return the shape of each of our weights."""
    with torch.device("meta"):
        weights = UNet(config, image_channels, side, classes).state_dict()
    return {name: weight.shape for name, weight in weights.items()}


def _names(ours: str) -> list[str]:
    """Return the names there of the weights that one of ours is made of, top to bottom."""
    name = ours
    for pattern, replacement in RENAMED:
        name = re.sub(pattern, replacement, name)
    return [name.replace(".qkv.", f".to_{each}.") for each in "qkv"] if ".qkv." in name else [name]


def _gathered(shapes: dict[str, torch.Size], theirs: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return our weights, of these shapes, put together from theirs."""
    for former, today in FORMER.items():
        theirs = {name.replace(former, today): weight for name, weight in theirs.items()}
    wanted = {name for ours in shapes for name in _names(ours)}
    if wanted != set(theirs):
        raise ValueError(
            f"the weights lack {sorted(wanted - set(theirs))[:3]} and have {sorted(set(theirs) - wanted)[:3]}, which "
            "this config.json has no place for; they must be those of its model"
        )
    weights = {ours: torch.cat([theirs[name] for name in _names(ours)]) for ours in shapes}
    for ours, weight in weights.items():
        if weight.shape != shapes[ours]:
            raise ValueError(
                f"the weights {', '.join(_names(ours))} make {list(weight.shape)}; by this config.json they must make "
                f"{list(shapes[ours])}"
            )
    return weights


def _check_form(read: dict[str, Any]) -> None:
    """Raise ValueError unless the fields of a config.json describe the U-Net of the DDPM paper."""
    for name in REQUIRED:
        if name not in read:
            raise ValueError(f"{name} is missing; the config.json of a UNet2DModel must say it")
    down, up, widths = read["down_block_types"], read["up_block_types"], read["block_out_channels"]
    mirrored = [name.replace("Down", "Up") for name in reversed(down)]
    groups, time_size = read["norm_num_groups"], 4 * widths[0]
    rules: dict[str, tuple[bool, str]] = {name: (read[name] == value, f"be {value!r}") for name, value in FORM.items()}
    rules |= {
        "attn_norm_num_groups": (
            read["attn_norm_num_groups"] in (None, groups), f"be None or norm_num_groups, which is {groups}"
        ),
        "block_out_channels": (
            all(width % widths[0] == 0 for width in widths), f"be multiples of the first, {widths[0]}"
        ),
        "down_block_types": (
            set(down) <= {"DownBlock2D", "AttnDownBlock2D"}, "consist of DownBlock2D and AttnDownBlock2D"
        ),
        "num_class_embeds": (
            read["num_class_embeds"] is None or read["num_class_embeds"] > 1, "be None or at least 2"
        ),
        "out_channels": (read["out_channels"] == read["in_channels"], f"be in_channels, {read['in_channels']}"),
        "sample_size": (isinstance(read["sample_size"], int), "be one number, the side of a square"),
        "time_embedding_dim": (read["time_embedding_dim"] in (None, time_size), f"be None or {time_size}"),
        "up_block_types": (list(up) == mirrored, f"mirror down_block_types: {mirrored}"),
    }  # fmt: skip
    for name in read.keys() - ABSENT.keys() - set(REQUIRED):
        if not name.startswith("_"):
            raise ValueError(f"{name} is {read[name]!r}; it is no field of a UNet2DModel of version {VERSION}")
    for name, (holds, rule) in rules.items():
        if not holds:
            raise ValueError(f"{name} is {read[name]!r}; it must {rule}, as in the U-Net of the DDPM paper")


def scheduler_config(schedule: Schedule, prediction_type: str) -> dict[str, Any]:
    """Return the scheduler_config.json of a DDPMScheduler that walks this schedule as our posterior sampler does.

    Its tables are float32, in which 1 - ᾱ² loses digits near t = 1: steps agree to 1e-6 at t >= 50, to 1e-3 at t = 2.

    Args:
        schedule: the whole one; its own strides are the scheduler's business.
        prediction_type: what the network puts out, one of the values of :data:`PREDICTION_TYPES`.
    """
    _check_prediction(prediction_type)
    if not torch.equal(schedule.time, torch.arange(schedule.steps + 1)):
        raise ValueError(f"schedule has {schedule.steps} strides out of more; it must be the whole one")
    return {
        "_class_name": "DDPMScheduler",
        "_diffusers_version": VERSION,
        "clip_sample": True,
        "clip_sample_range": 1.0,
        "num_train_timesteps": schedule.steps,
        "prediction_type": prediction_type,
        "trained_betas": schedule.beta[1:].square().tolist(),  # the paper's β is our β²
        "variance_type": "fixed_small",
    }


def from_scheduler_config(config: dict[str, Any]) -> tuple[tuple[float, ...], str]:
    """Return the paper's β_1..β_T, our β_t², and the prediction type of a DDPMScheduler.

    Raises:
        ValueError: unless its betas are given one by one or in a line, and mean the same.
    """
    if config.get("_class_name", "DDPMScheduler") not in SCHEDULERS:
        raise ValueError(f"_class_name is {config['_class_name']!r}; it must be one of {', '.join(SCHEDULERS)}")
    prediction_type = config.get("prediction_type", "epsilon")
    _check_prediction(prediction_type)
    if config.get("rescale_betas_zero_snr"):
        raise ValueError("rescale_betas_zero_snr is True; it must be False: write the betas that come of it down")
    steps, betas = config.get("num_train_timesteps", 1000), config.get("trained_betas")
    if betas is None:
        kind = config.get("beta_schedule", "linear")
        if kind != "linear":
            raise ValueError(f"beta_schedule is {kind!r}; it must be 'linear', or trained_betas must be given")
        first, last = config.get("beta_start", 0.0001), config.get("beta_end", 0.02)
        betas = torch.linspace(first, last, steps, dtype=torch.float64).tolist()
    if len(betas) != steps:
        raise ValueError(f"trained_betas has {len(betas)} values; there must be num_train_timesteps, {steps}")
    return tuple(betas), prediction_type


def _check_prediction(prediction_type: str) -> None:
    if prediction_type not in PREDICTION_TYPES.values():
        known = ", ".join(PREDICTION_TYPES.values())
        raise ValueError(f"prediction_type is {prediction_type!r}; it must be one of {known}")


def pipeline_index() -> dict[str, Any]:
    """Return the model_index.json of a DDPMPipeline whose parts lie in the folders unet and scheduler."""
    return {
        "_class_name": "DDPMPipeline",
        "_diffusers_version": VERSION,
        "scheduler": ["diffusers", "DDPMScheduler"],
        "unet": ["diffusers", "UNet2DModel"],
    }
