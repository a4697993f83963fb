"""How t is drawn: one t per image, a function of (seed, position), the same on any number of workers."""

import torch
from torch import Tensor

from models.noise import words


def stratified(seed: int, position: Tensor, batch_images: int, T: int) -> Tensor:
    """Return t in 1..T for each position (int64 [B]), so that every global batch covers 1..T evenly.

    The ``batch_images`` slots of global batch s are dealt the strata 0..batch_images-1 by a permutation drawn for s;
    within its stratum t is uniform. A worker computes the slots that it was given, without asking anyone. Integers
    throughout, so t is the same on every device; ``batch_images`` and ``T`` are below 2**31.
    """
    uniform = words(seed, "t", position, step=0, blocks=1)[0][:, 0]  # [B], 32 bits
    batch, slot = position // batch_images, position % batch_images
    stratum = torch.empty_like(slot)
    for s in torch.unique(batch):
        here = batch == s
        stratum[here] = _strata(seed, s.view(1), batch_images)[slot[here]]
    # 1 + ⌊(stratum + u) T/B⌋ for a u of 32 bits in [0, 1).
    return 1 + (stratum * T + (uniform * T >> 32)) // batch_images


def _strata(seed: int, batch: Tensor, batch_images: int) -> Tensor:
    """Return the stratum of each slot of a global batch (int64 [1]): the order of random words, int64 [B]."""
    drawn = words(seed, "strata", batch, step=0, blocks=-(-batch_images // 4))  # four of [1, blocks]
    return torch.stack(drawn, dim=-1).flatten()[:batch_images].argsort(stable=True)
