"""The first weights, each a function of (seed, the parameter's name), whatever the order or the layout of the model."""

import math
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from models.noise import normal, words

M = TypeVar("M", bound=nn.Module)


def empty(make: Callable[[], M]) -> M:
    """Make a module whose parameters have memory but no values yet, and draw nothing while making it."""
    with torch.device("meta"):
        model = make()
    return model.to_empty(device="cpu")


def zero(layer: nn.Module) -> nn.Module:
    """Mark a layer to start at zero, so that its block starts as the identity."""
    layer.starts_at_zero = True  # type: ignore[assignment]
    return layer


@torch.no_grad()
def initialize(model: nn.Module, seed: int) -> None:
    """Fill every parameter of a model in place.

    Convolutions and linear layers: uniform in ±1/√fan_in, torch's own default. Normalisations: scale 1, shift 0.
    Embeddings: N(0, 0.02²). A layer can ask for something else: ``starts_at_zero`` for zero, ``first_weights`` for
    ``xavier``, uniform in ±√(6/(fan_in + fan_out)), or ``normal``, N(0, 0.02²), both with a bias of zero.
    Names are part of the key: this comes before any wrapper that changes them. Of a sharded parameter the whole is
    drawn, one at a time, and this worker keeps its part of it; nothing is sent.

    Raises:
        TypeError: for a module with parameters of its own of a kind that is not listed above.
    """
    for name, module in model.named_modules():
        for leaf, parameter in module.named_parameters(recurse=False):
            whole = _first(_rule(module, name), module, leaf, seed, f"{name}.{leaf}")
            if isinstance(parameter, DTensor):
                whole = whole.to(parameter.device)
                whole = distribute_tensor(whole, parameter.device_mesh, parameter.placements, src_data_rank=None)
            parameter.copy_(whole)


def _rule(module: nn.Module, name: str) -> str:
    if getattr(module, "starts_at_zero", False):
        return "zero"
    if isinstance(module, nn.GroupNorm | nn.LayerNorm):
        return "identity"
    if isinstance(module, nn.Embedding):
        return "normal"
    if isinstance(module, nn.Conv2d | nn.Linear):
        return str(getattr(module, "first_weights", "torch"))
    raise TypeError(f"no rule for the first weights of {name}, a {type(module).__name__}")


def _first(rule: str, module: Any, leaf: str, seed: int, name: str) -> Tensor:
    shape, weight = getattr(module, leaf).shape, module.weight.shape
    fan_in = weight[1:].numel()
    if rule == "torch":
        return _uniform(seed, name, shape, 1 / math.sqrt(fan_in))
    if rule == "zero" or leaf == "bias":
        return torch.zeros(shape)
    if rule == "identity":
        return torch.ones(shape)
    if rule == "normal":
        return normal(seed, f"init {name}", torch.zeros(1, dtype=torch.long), tuple(shape))[0].mul_(0.02)
    assert rule == "xavier", rule
    return _uniform(seed, name, shape, math.sqrt(6 / (fan_in + weight[0] * weight[2:].numel())))


def _uniform(seed: int, name: str, shape: torch.Size, bound: float) -> Tensor:
    drawn = words(seed, f"init {name}", torch.zeros(1, dtype=torch.long), step=0, blocks=-(-shape.numel() // 4))
    unit = torch.stack(drawn, dim=-1).flatten()[: shape.numel()].float().mul_(2.0**-32).view(shape)
    return unit.mul_(2 * bound).sub_(bound)
