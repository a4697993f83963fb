"""The pictures that a run shows: contact sheets, and the strip of a picture torn down and one built up."""

import numpy as np
import torch
from torch import Tensor

from models.noise import normal
from models.objective import EpsTheta
from models.process import demolish
from models.samplers import Sampler, clip_x_0, sample_noise
from models.schedule import Schedule
from pipelines.fit import x_0_to_pixels
from pipelines.images import Pixels, grid

PIECES = 12
"""Pictures in a strip."""


def contact_sheet(pixels: Pixels) -> Pixels:
    """Lay pictures [n, H, W, C] out in a sheet as square as it can be, enlarged to be looked at: [H', W', C]."""
    columns = max(int(np.ceil(np.sqrt(len(pixels)))), 1)
    return grid(pixels, columns, scale=max(1, 768 // (columns * pixels.shape[2])))


def strip(
    x_0: Tensor, eps_theta: EpsTheta, schedule: Schedule, respaced: Schedule, sampler: Sampler, seed: int, clip: bool
) -> Pixels:
    """Lay out two rows: x_0 [1, C, H, W] torn down to x_T, and below it the sample of a seed built up from x_T.

    The sampler walks along ``respaced``.

    The lower row is in the order of the building, so the two read as a round trip: down along the first, and back
    along the second.
    """
    # Most of what an eye can follow happens near the picture: the steps get longer with the square.
    way_along = np.linspace(0, 1, PIECES) ** 2
    t = torch.tensor((way_along * schedule.steps).round().astype(int))
    # One ε for all of the row: the same bricks, more and more of them.
    eps = normal(0, "strip", torch.zeros(1, dtype=torch.long), tuple(x_0.shape[1:])).expand(PIECES, -1, -1, -1)
    torn_down = demolish(x_0.expand(PIECES, -1, -1, -1), t, eps, schedule)

    x_T, noise = sample_noise(torch.tensor([seed]), tuple(x_0.shape[1:]))
    with torch.no_grad():
        way = list(sampler(clip_x_0(eps_theta, schedule) if clip else eps_theta, x_T, respaced, noise))
    built_up = torch.cat([way[i] for i in ((1 - way_along[::-1]) * (len(way) - 1)).round().astype(int)])
    rows = x_0_to_pixels(torch.cat([torn_down, built_up])).numpy()
    return grid(rows, PIECES, scale=max(1, 1024 // (PIECES * rows.shape[2])))
