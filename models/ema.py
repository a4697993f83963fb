"""The average of the weights along the run: what samples are drawn from."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass(frozen=True, kw_only=True)
class EMAConfig:
    """An exponential average whose length is counted in images, so that it does not change with the batch."""

    half_life_images: float = 50_000
    """Images after which a weight's share in the average has halved."""
    warm_up: float = 0.1
    """The half-life is never longer than this share of the images seen, so that early weights are forgotten."""

    def __post_init__(self) -> None:
        if not self.half_life_images > 0:
            raise ValueError(f"ema.half_life_images is {self.half_life_images}; it must be positive: try 50000")
        if not self.warm_up > 0:
            raise ValueError(f"ema.warm_up is {self.warm_up}; it must be positive: try 0.1")


class EMA:
    """The average of a model's parameters. Buffers are not averaged: the networks here have none.

    The shadow of each parameter keeps its shape, dtype, device and sharding.
    """

    def __init__(self, model: nn.Module, config: EMAConfig) -> None:
        self.config = config
        self.shadow: dict[str, Tensor] = {name: p.detach().clone() for name, p in model.named_parameters()}

    @torch.no_grad()
    def update(self, model: nn.Module, images_seen: int, batch_images: int) -> None:
        """Move the average after an optimizer step that took the run to ``images_seen``, which is 1 at least."""
        half_life = min(self.config.half_life_images, self.config.warm_up * images_seen)
        keep = 0.5 ** (batch_images / half_life)
        torch._foreach_lerp_(list(self.shadow.values()), [p.detach() for p in model.parameters()], 1 - keep)

    @contextmanager
    def applied_to(self, model: nn.Module) -> Iterator[None]:
        """Within this context the model's weights are the average; afterwards they are its own again."""
        own = {name: p.detach().clone() for name, p in model.named_parameters()}
        _fill(model, self.shadow)
        try:
            yield
        finally:
            _fill(model, own)


@torch.no_grad()
def _fill(model: nn.Module, values: dict[str, Tensor]) -> None:
    for name, p in model.named_parameters():
        p.copy_(values[name])
