"""THE loop: images in, a trained ε_θ out. It knows neither Ray nor MLflow: batches come from an iterator, and what it
has to say goes to whoever listens.

Progress is counted in images. Everything drawn here is a function of (seed, position): t, ε and the flip.
"""

import math
import time
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any, NoReturn, Protocol

import torch
from torch import Tensor, nn

from models.ema import EMA
from models.network import EpsNetwork
from models.noise import normal, words
from models.objective import Network, ObjectiveConfig, as_eps, training_loss
from models.parallelize import parallelize
from models.samplers import dpm_solver, guided, sample
from models.schedule import Schedule
from models.timesteps import Timesteps
from pipelines.feed import Feed
from pipelines.fit_config import FitConfig
from pipelines.world import World

BANDS = 4
"""Parts of 1..T, from the almost clean to the almost noise, whose losses are told apart."""


@dataclass
class State:
    """All that a run is at a position."""

    model: EpsNetwork
    optimizer: torch.optim.Optimizer
    ema: EMA
    timesteps: Timesteps
    position: int = 0
    """Images seen."""


class Listener(Protocol):
    """Whoever the loop speaks to."""

    def report(self, metrics: dict[str, float], position: int) -> None:
        """Take metrics at a position. (rank 0)"""

    def picture(self, pixels: Tensor, position: int) -> None:
        """Take sample images, float [n, C, H, W] in [-1, 1], at a position. (rank 0)"""

    def checkpoint(self, state: State) -> None:
        """Commit the state. (all ranks)"""

    def notice(self) -> bool:
        """Whether the workers must leave before the end, asked once a step; the same on all ranks. (all ranks)"""

    def flush(self) -> None:
        """Wait until what was to be committed is. (all ranks)"""

    def leave(self, state: State) -> NoReturn:
        """End this worker; the run goes on elsewhere from the last checkpoint. (all ranks)"""


class DivergedError(Exception):
    """The gradient is not finite; the optimizer has not moved. The message names the positions of the batch."""


def new_state(model: EpsNetwork, config: FitConfig, schedule: Schedule) -> State:
    """Return the state at position 0 of a model on its device, whose first weights are in place."""
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=config.learning_rate, weight_decay=config.weight_decay, foreach=True
    )
    device = next(model.parameters()).device
    timesteps = Timesteps(config.timesteps, schedule, config.batch_images, device)
    return State(model, optimizer, EMA(model, config.ema), timesteps)


def fit(  # noqa: PLR0915  (the one long thing)
    config: FitConfig,
    state: State,
    schedule: Schedule,
    seed: int,
    batches: Iterator[Any],
    listener: Listener,
    world: World | None = None,
) -> None:
    """Train ``state`` in place from its position to ``config.images``. (all ranks)

    Args:
        config: how.
        state: the model on this worker's device and what goes with it, the same on all ranks.
        schedule: the whole schedule, of T steps.
        seed: the seed of the run.
        batches: this worker's micro-batches (:class:`pipelines.stream.Batch`), from the state's position on.
        listener: who takes reports, pictures and checkpoints.
        world: this worker's place; alone if not given.

    Raises:
        DivergedError: on all ranks at once, when a gradient is not finite.
    """
    world = world or World()
    model, optimizer, T = state.model, state.optimizer, schedule.steps
    tables = schedule.to(world.device)
    parallel = parallelize(model, "ddp" if world.size > 1 else "single", world.device)
    accumulation = config.batch_images // (config.micro_images * world.size)
    dtype = next(model.parameters()).dtype
    sums = torch.zeros(2, BANDS, dtype=dtype, device=world.device)  # loss and weight of each band since the last report
    feed = Feed(batches, world.device)
    since, reported = time.perf_counter(), state.position

    while state.position < config.images:
        # The step's learning rate: it rises, then stays.
        state.position += config.batch_images
        warm = min(state.position / max(config.warm_up_images, 1), 1.0)
        for group in optimizer.param_groups:
            group["lr"] = config.learning_rate * warm

        # Forward and backward, one micro-batch at a time; the gradient is the mean over the global batch.
        for last in (i == accumulation - 1 for i in range(accumulation)):
            position, label, pixels = next(feed)
            x_0 = pixels_to_x_0(pixels).to(dtype)
            if config.flip:
                x_0 = mirrored(x_0, seed, position)
            network = told_labels(parallel, label, seed, position, config) if model.classes else parallel
            t, weight = state.timesteps.draw(seed, position)
            noise = partial(noise_like, x_0, seed, position)
            with nullcontext() if last or world.size == 1 else parallel.no_sync():  # type: ignore[operator]
                losses = training_loss(config.objective, network, x_0, t, noise, tables)
                ((weight.to(dtype) * losses).mean() / accumulation).backward()  # type: ignore[no-untyped-call]
            state.timesteps.observe(t, losses)
            band = (t - 1) * BANDS // T
            sums.index_add_(1, band, torch.stack([weight * losses.detach(), weight]).to(dtype))

        # One step of the optimizer, agreed on by all ranks: after the reduction the gradient is the same on each.
        norm = nn.utils.clip_grad_norm_(model.parameters(), config.clip_norm)
        if not math.isfinite(float(norm)):
            raise DivergedError(
                f"the gradient of positions {state.position - config.batch_images}..{state.position - 1} is {norm}; "
                "lower fit.learning_rate or look at those images, then run again from the last checkpoint"
            )
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        state.ema.update(model, state.position, config.batch_images)
        state.timesteps.learn(world.sum)

        # Say how it goes.
        if state.position % config.log_images == 0 or state.position == config.images:
            loss, share = world.sum(sums).tolist()
            replaced, retried = world.sum(torch.tensor([feed.replaced, feed.retried], device=world.device)).tolist()
            seconds = time.perf_counter() - since
            metrics = {
                "loss": sum(loss) / sum(share),
                **{f"loss_band_{i + 1}_of_{BANDS}": loss[i] / share[i] for i in range(BANDS) if share[i]},
                "gradient_norm": float(norm),
                "learning_rate": optimizer.param_groups[0]["lr"],
                "images_per_s": (state.position - reported) / seconds,
                "data_wait_percent": 100 * feed.waited_s / seconds,
                "images_replaced": replaced,
                "storage_retries": retried,
            }
            if world.rank == 0:
                listener.report(metrics, state.position)
            sums.zero_()
            feed.reset()
            since, reported = time.perf_counter(), state.position
        if state.position % config.grid_images == 0 or state.position == config.images:
            grid = draw_grid(state, schedule, x_0.shape[1:], config.objective, world)
            if world.rank == 0:
                listener.picture(grid, state.position)
        leaving = listener.notice() and state.position < config.images
        if leaving or state.position % config.checkpoint_images == 0 or state.position == config.images:
            listener.checkpoint(state)
        if leaving:
            listener.flush()
            listener.leave(state)
    listener.flush()


def pixels_to_x_0(pixels: Tensor) -> Tensor:
    """Map uint8 [B, H, W, C] to float32 [B, C, H, W] in [-1, 1]; the memory stays as it lay, channels last."""
    return (pixels.float() / 127.5 - 1).permute(0, 3, 1, 2)


def x_0_to_pixels(x_0: Tensor) -> Tensor:
    """Map float [B, C, H, W] in [-1, 1] to uint8 [B, H, W, C]."""
    return ((x_0.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 1)


def mirrored(x_0: Tensor, seed: int, position: Tensor) -> Tensor:
    """Mirror the images whose position says so, about half of them."""
    mirror = words(seed, "flip", position, step=0, blocks=1)[0] & 1  # [B, 1]
    return torch.where(mirror[:, :, None, None] == 1, x_0.flip(3), x_0)


def noise_like(x_0: Tensor, seed: int, position: Tensor, stream: str) -> Tensor:
    """Return the standard normals of a stream at the positions, in the form of x_0 [B, C, H, W]."""
    return normal(seed, stream, position, tuple(x_0.shape[1:])).to(x_0.dtype, memory_format=torch.channels_last)


def told_labels(network: nn.Module, label: Tensor, seed: int, position: Tensor, config: FitConfig) -> Network:
    """Return the network with the labels of a batch (int64 [B]) in its ear, but for those that the position drops."""
    drawn = words(seed, "label dropout", position, step=0, blocks=1)[0][:, 0]
    kept = torch.where(drawn < int(config.label_dropout * 2.0**32), -1, label)
    return lambda x_t, t: network(x_t, t, kept)


def draw_grid(
    state: State, schedule: Schedule, shape: torch.Size, objective: ObjectiveConfig, world: World, n: int = 64
) -> Tensor:
    """Draw the samples of seeds 0..n-1 from the average of the weights, shared out over the workers. (all ranks)

    A network that knows labels is asked for one after the other.

    Returns:
        float [n, C, H, W] in [-1, 1], the same on every rank.
    """
    share = -(-n // world.size)
    seeds = torch.arange(world.rank * share, (world.rank + 1) * share, device=world.device)
    dtype = next(state.model.parameters()).dtype
    classes = state.model.classes
    network = guided(state.model, seeds % classes) if classes else state.model

    def in_its_dtype(x_t: Tensor, t: Tensor) -> Tensor:
        return network(x_t.to(dtype), t).to(x_t.dtype)

    eps_theta = as_eps(in_its_dtype, objective.target, schedule.to(world.device))
    with state.ema.applied_to(state.model):
        x_0 = sample(dpm_solver, eps_theta, schedule, seeds, tuple(shape), steps=min(20, schedule.steps))
    return world.gather(x_0)[:n]
