"""Standard normal noise as a function of (seed, stream, position, step).

It is the same bit for bit on every device, in every batch and on every worker. The integers behind it are so by
themselves; logarithm, sine and cosine are the device's own, but of double precision, and what they differ in is rounded
away, except for about one normal in 10⁸ that lies where float32 rounds up or down.
"""

import math

import torch
from torch import Tensor

from models.philox import MASK, philox_4x32, stream_key


def words(
    seed: int, stream: str, position: Tensor, step: int | Tensor, blocks: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return ``4 * blocks`` random 32-bit words for each position, as four int64 tensors of shape [B, blocks].

    Args:
        seed: any integer; the seed of the run.
        stream: what the words are for; streams are independent of each other.
        position: int64 [B], the position of each image in the run, or the seed of each sample.
        step: 0 <= step < 2**32, the place within a chain that draws more than once for one image; or int64 [B, 1].
        blocks: how many Philox blocks of four words.
    """
    block = torch.arange(blocks, device=position.device)  # [blocks]
    low, high = (position & MASK)[:, None], ((position >> 32) & MASK)[:, None]  # [B, 1]
    return philox_4x32((block, low, high, step), stream_key(seed, stream))


def normal(seed: int, stream: str, position: Tensor, shape: tuple[int, ...], step: int | Tensor = 0) -> Tensor:
    """Return float32 standard normals of shape [B, *shape] on the device of ``position`` (int64 [B]).

    Box-Muller: two uniform words make two normals, √(-2 ln u) (cos 2πv, sin 2πv). The largest is √(2 ln 2³³) = 6.8.
    """
    size = math.prod(shape)
    pairs = []
    u, v, w, x = words(seed, stream, position, step, blocks=-(-size // 4))
    for radial, angular in ((u, v), (w, x)):
        # The half keeps the logarithm finite at the word 0.
        radius = ((radial.double() + 0.5) * 2.0**-32).log_().mul_(-2).sqrt_()
        angle = angular.double().mul_(2 * math.pi * 2.0**-32)
        pairs += [(radius * angle.cos()).float(), (radius * angle.sin()).float()]
    return torch.stack(pairs, dim=-1).flatten(1)[:, :size].reshape(-1, *shape)
