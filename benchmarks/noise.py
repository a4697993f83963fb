"""What share of a training step goes into making the noise?

    python benchmarks/noise.py

One process, one thread, the network of the preset `digits`, micro-batches of 64 images of 8 × 8 pixels. A *step* is
half of an optimizer's step with two micro-batches: forward and backward of the reduced loss, and half of what clipping,
AdamW and the average of the weights take. Compared with it are

- ``normal``: ``models.noise.normal``, ε of the micro-batch, from Philox;
- ``t``: ``models.timesteps.stratified``, t of the micro-batch;
- ``randn``: ``torch.randn`` of the same shape; ``randint``: ``torch.randint`` of the same number of t.

In each round of 20 steps all five take turns step by step, so whatever else the machine does meets them alike; what is
counted is the CPU time of the process. The share is that of a whole step, its noise and its t included. Target: ε at
most 2 %.
"""

import time
from collections import defaultdict
from collections.abc import Callable
from statistics import median

import torch

from benchmarks.common import digits, spread
from jobs.presets import DIGITS
from models.init import initialize
from models.network import build
from models.noise import normal
from models.objective import reduced_loss
from models.schedule import article
from models.timesteps import stratified
from pipelines.fit import new_state, pixels_to_x_0

ROUNDS, STEPS = 15, 20
MICRO, BATCH = DIGITS.fit.micro_images, DIGITS.fit.batch_images


def training() -> Callable[[int], None]:
    """Return what does the i-th micro-batch of a training, with noise that is there already."""
    model = build(DIGITS.network, image_channels=1, side=8)
    initialize(model, 0)
    state = new_state(model.to(memory_format=torch.channels_last), DIGITS.fit, article())
    schedule, x_0 = article(), pixels_to_x_0(torch.tensor(digits()[:MICRO]))
    eps, t = torch.randn_like(x_0), torch.randint(1, 1001, (MICRO,))

    def step(i: int) -> None:
        (reduced_loss(state.model, x_0, t, eps, schedule).mean() * MICRO / BATCH).backward()
        if (i + 1) % (BATCH // MICRO) == 0:
            torch.nn.utils.clip_grad_norm_(state.model.parameters(), DIGITS.fit.clip_norm)
            state.optimizer.step()
            state.optimizer.zero_grad(set_to_none=True)
            state.ema.update(state.model, (i + 1) * MICRO, BATCH)

    return step


def main() -> None:
    torch.set_num_threads(1)
    position = torch.arange(MICRO)
    parts: dict[str, Callable[[int], object]] = {
        "step": training(),
        "normal": lambda i: normal(0, "eps", position + i * MICRO, (1, 8, 8)),
        "t": lambda i: stratified(0, position + i * MICRO, BATCH, 1000),
        "randn": lambda i: torch.randn(MICRO, 1, 8, 8),
        "randint": lambda i: torch.randint(1, 1001, (MICRO,)),
    }
    ms: dict[str, list[float]] = defaultdict(list)
    shares: dict[str, list[float]] = defaultdict(list)
    for r in range(-1, ROUNDS):  # round -1 warms up
        spent: dict[str, float] = defaultdict(float)
        for i in range(STEPS):
            for name, part in parts.items():
                began = time.process_time()
                part(i)
                spent[name] += time.process_time() - began
        if r < 0:
            continue
        whole = spent["step"] + spent["normal"] + spent["t"]
        for name, seconds in spent.items():
            ms[name].append(1000 * seconds / STEPS)
            shares[name].append(100 * seconds / whole)

    print(f"{'':8}{'ms a micro-batch':>28}{'% of a step':>28}   (min / median / max of {ROUNDS} rounds)")
    for name in parts:
        print(f"{name:8}{spread(ms[name]):>28}{spread(shares[name], 2):>28}")
    print(f"target: normal at most 2 %; it takes {median(shares['normal']):.2f} %")


if __name__ == "__main__":
    main()
