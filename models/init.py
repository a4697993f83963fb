"""The first weights, each a function of (seed, the parameter's name), whatever the order or the layout of the model."""

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from models.noise import words


def empty(make: Callable[[], nn.Module]) -> nn.Module:
    """Make a module whose parameters have memory but no values yet, and draw nothing while making it."""
    with torch.device("meta"):
        model = make()
    return model.to_empty(device="cpu")


@torch.no_grad()
def initialize(model: nn.Module, seed: int) -> None:
    """Fill every parameter of a model in place.

    Convolutions and linear layers: uniform in ±1/√fan_in, torch's own default. Normalisations: scale 1, shift 0.
    Layers that carry ``starts_at_zero``: zero. Names are part of the key: this comes before any wrapper.

    Raises:
        TypeError: for a module with parameters of its own of a kind that is not listed above.
    """
    for name, module in model.named_modules():
        own = dict(module.named_parameters(recurse=False))
        if not own:
            continue
        if getattr(module, "starts_at_zero", False):
            for parameter in own.values():
                parameter.zero_()
        elif isinstance(module, nn.GroupNorm):
            module.weight.fill_(1.0)
            module.bias.zero_()
        elif isinstance(module, nn.Conv2d | nn.Linear):
            bound = 1 / math.sqrt(module.weight[0].numel())
            for leaf, parameter in own.items():
                parameter.copy_(_uniform(seed, f"{name}.{leaf}", parameter.shape).mul_(2 * bound).sub_(bound))
        else:
            raise TypeError(f"no rule for the first weights of {name}, a {type(module).__name__}")


def _uniform(seed: int, name: str, shape: torch.Size) -> Tensor:
    drawn = words(seed, f"init {name}", torch.zeros(1, dtype=torch.long), step=0, blocks=-(-shape.numel() // 4))
    return torch.stack(drawn, dim=-1).flatten()[: shape.numel()].float().mul_(2.0**-32).view(shape)
