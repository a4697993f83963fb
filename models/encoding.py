"""What a network is told beside the picture: t as sines and cosines, and the label."""

import math

import torch
from torch import Tensor, nn


def sinusoidal(number: Tensor, size: int, slowest: int) -> Tensor:
    """sin(ω_i n), cos(ω_i n), ω_i = 10⁻⁴ to the power of i/slowest, i < size/2: int64 [N] to float32 [N, size].

    The DDPM paper's code has ω reach 10⁻⁴ at the last i, ``slowest`` = size/2 - 1; transformers stop one before it.
    """
    omega = torch.exp(-math.log(10_000) / slowest * torch.arange(size // 2, device=number.device))
    angle = number[:, None].float() * omega
    return torch.cat([angle.sin(), angle.cos()], dim=1)


def with_label(code: Tensor, embedding: nn.Embedding | None, t: Tensor, label: Tensor | None) -> Tensor:
    """Add the code of each label (int64 [B], -1 or None for none, which is the last row) to that of t, [B, size].

    Raises:
        ValueError: for labels where the network has no place for them.
    """
    if embedding is None:
        if label is not None:
            raise ValueError("label is given to a network without classes: pass none, or make it with classes")
        return code
    label = torch.full_like(t, -1) if label is None else label
    return code + embedding(torch.where(label < 0, embedding.num_embeddings - 1, label))  # type: ignore[no-any-return]
