"""THE loop: images in, a trained ε_θ out. It knows neither Ray nor MLflow: batches come from an iterator, and what it
has to say goes to whoever listens.

Progress is counted in images. Everything drawn here is a function of (seed, position): t, ε and the flip.
"""

import logging
import math
import resource
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from models.ema import EMA
from models.network import EpsNetwork
from models.noise import normal, words
from models.objective import Network, ObjectiveConfig, as_eps, training_loss
from models.parallelize import accumulating, clip_gradient
from models.samplers import dpm_solver, guided, sample
from models.schedule import Schedule
from models.timesteps import Timesteps
from pipelines.errors import BrickyardError
from pipelines.feed import Feed
from pipelines.fit_config import FitConfig
from pipelines.world import World

GRID = 64
"""Samples that the loop shows, of seeds 0..63."""
BANDS = 4
"""Parts of 1..T, from the almost clean to the almost noise, whose losses are told apart."""
MAX_SKIPPED_IN_A_ROW = 10

log = logging.getLogger("brickyard.fit")


@dataclass
class State:
    """All that a run is at a position."""

    model: EpsNetwork
    optimizer: torch.optim.Optimizer
    ema: EMA
    timesteps: Timesteps
    losses: Tensor
    """Loss and weight of each band of t since the last report, [2, BANDS]: the sum over all workers is what counts, so
    when it is written and read the first worker has all of it."""
    parallel: nn.Module
    """What is trained through: the model, or what spreads it over the workers."""
    position: int = 0
    """Images seen."""


class Listener:
    """Whoever the loop speaks to. This one does not listen."""

    def report(self, metrics: dict[str, float], position: int) -> None:
        """Take metrics at a position. (rank 0)"""

    def picture(self, pixels: Tensor, position: int) -> None:
        """Take sample images, float [n, C, H, W] in [-1, 1], at a position. (rank 0)"""

    def checkpoint(self, state: State) -> None:
        """Commit the state, now or in the background. (all ranks)"""

    def flush(self) -> None:
        """Come back when all that was to be committed is. (all ranks)"""

    def notice(self) -> bool:
        """Return whether a worker will soon be taken away, the same on all of them. Asked once a step. (all ranks)"""
        return False

    def leave(self, state: State) -> None:
        """Make way after such a notice, as soon as the state is committed. (all ranks)"""

    def warn(self, text: str, position: int) -> None:
        """Take a sentence that the user should read. (rank 0)"""
        log.warning("%s", text)

    def at_work(self) -> None:
        """What takes longer than a step goes on. (all ranks)"""


class DivergedError(BrickyardError):
    """The gradient is not finite; the optimizer has not moved. The message names the positions of the batch."""


def new_state(model: EpsNetwork, config: FitConfig, schedule: Schedule, parallel: nn.Module | None = None) -> State:
    """Return the state at position 0 of a model on its device, whose first weights are in place.

    Args:
        model: sharded already, if it is to be.
        config: how it is trained.
        schedule: the whole schedule, of T steps.
        parallel: what it is trained through, if that is not the model itself.
    """
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=config.learning_rate, weight_decay=config.weight_decay, fused=True
    )
    first = next(model.parameters())
    timesteps = Timesteps(config.timesteps, schedule, config.batch_images, first.device)
    losses = torch.zeros(2, BANDS, dtype=first.dtype, device=first.device)
    return State(model, optimizer, EMA(model, config.ema), timesteps, losses, parallel or model)


def fit(  # noqa: PLR0912, PLR0915  (the one long story)
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
        DivergedError: on all ranks at once, when a gradient is not finite, or ten in a row are not.
    """
    world = world or World()
    model, optimizer, T = state.model, state.optimizer, schedule.steps
    tables = schedule.to(world.device)
    rounds = -(-config.micro_batches // world.size)
    dtype = next(model.parameters()).dtype
    if world.rank > 0:
        state.losses.zero_()
    skipped = skipped_in_a_row = 0
    feed = Feed(batches, world.device)
    since, reported = time.perf_counter(), state.position

    while state.position < config.images:
        # The step's learning rate: it rises, then stays or falls.
        state.position += config.batch_images
        for group in optimizer.param_groups:
            group["lr"] = config.learning_rate_at(state.position)

        # Forward and backward, one micro-batch at a time; the gradient is the mean over the global batch. The workers'
        # gradients are averaged, so what each has of its B/b micro-batches is multiplied by W.
        losses_of_step = torch.zeros_like(state.losses)
        for last in (i == rounds - 1 for i in range(rounds)):
            position, label, pixels, counted = next(feed)
            x_0 = pixels_to_x_0(pixels).to(dtype)
            if config.flip:
                x_0 = mirrored(x_0, seed, position)
            network = told_labels(state.parallel, label, seed, position, config) if model.classes else state.parallel
            t, weight = state.timesteps.draw(seed, position)
            noise = partial(noise_like, x_0, seed, position)
            with accumulating(state.parallel, last):
                losses = training_loss(config.objective, network, x_0, t, noise, tables)
                share = world.size / config.micro_batches if counted else 0.0
                ((weight.to(dtype) * losses).mean() * share).backward()  # type: ignore[no-untyped-call]
            if counted:
                state.timesteps.observe(t, losses)
                losses_of_step.index_add_(1, band_of(t, T), torch.stack([weight * losses.detach(), weight]).to(dtype))

        # One step of the optimizer, agreed on by all ranks: after the reduction the norm is the same on each.
        norm = float(clip_gradient(model, config.clip_norm))
        if math.isfinite(norm):
            optimizer.step()
            state.losses += losses_of_step
            state.timesteps.learn(world.sum)
            skipped_in_a_row = 0
        else:
            skipped, skipped_in_a_row = skipped + 1, skipped_in_a_row + 1
            said = f"the gradient of positions {state.position - config.batch_images}..{state.position - 1} is {norm}"
            if config.not_finite == "stop" or skipped_in_a_row == MAX_SKIPPED_IN_A_ROW:
                raise DivergedError(
                    f"{said}; look at those images: go on without them by --fit.not-finite skip, or lower "
                    "fit.learning_rate under another --name"
                )
            if world.rank == 0:
                listener.warn(f"{said}: skipped", state.position)
            state.timesteps.forget()
        optimizer.zero_grad(set_to_none=True)
        state.ema.update(model, state.position, config.batch_images)

        # Say how it goes.
        if state.position % config.log_images == 0 or state.position == config.images:
            mine = torch.tensor([feed.replaced, feed.retried, peak_memory_mb(world.device)], device=world.device)
            replaced, retried, memory_mb = world.sum(mine).tolist()
            seconds = time.perf_counter() - since
            metrics = {
                **by_band(world.sum(state.losses)),
                "gradient_norm": norm,
                "learning_rate": optimizer.param_groups[0]["lr"],
                "ema_distance": state.ema.distance(model),
                "images_per_s": (state.position - reported) / seconds,
                "images_per_s_per_worker": (state.position - reported) / seconds / world.size,
                "memory_mb_per_worker": memory_mb / world.size,
                "data_wait_percent": 100 * feed.waited_s / seconds,
                "images_replaced": replaced,
                "storage_retries": retried,
                "steps_skipped": skipped,
            }
            if world.rank == 0:
                listener.report(metrics, state.position)
            state.losses.zero_()
            feed.reset()
            since, reported, skipped = time.perf_counter(), state.position, 0
        if state.position % config.grid_images == 0 or state.position == config.images:
            grid = draw_grid(state, schedule, x_0.shape[1:], config.objective, world, listener.at_work)
            if world.rank == 0:
                listener.picture(grid, state.position)

        # Commit, in its rhythm or because a worker is about to be taken away.
        leaving = listener.notice() and state.position < config.images
        if leaving or state.position % config.checkpoint_images == 0 or state.position == config.images:
            world.sum(state.losses)  # whichever rank writes them
            listener.checkpoint(state)
            if world.rank > 0:
                state.losses.zero_()
        if leaving:
            return listener.leave(state)
    return listener.flush()


def peak_memory_mb(device: torch.device) -> int:
    """Return the most memory that this process has held so far, in MB (10⁶ bytes): of the GPU if it has one."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) // 10**6
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 // 10**6


def band_of(t: Tensor, T: int) -> Tensor:
    """Return the band of each t of 1..T, 0..BANDS-1."""
    return (t - 1) * BANDS // T


def by_band(losses: Tensor, name: str = "loss") -> dict[str, float]:
    """Return the mean loss, and that of each band of t, of losses and weights summed by band, [2, BANDS]."""
    loss, weight = losses.tolist()
    means = {f"{name}_band_{i + 1}_of_{BANDS}": loss[i] / weight[i] for i in range(BANDS) if weight[i]}
    return {name: sum(loss) / sum(weight) if any(weight) else math.nan, **means}


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
    state: State,
    schedule: Schedule,
    shape: torch.Size,
    objective: ObjectiveConfig,
    world: World,
    at_work: Callable[[], None],
    n: int = GRID,
) -> Tensor:
    """Draw the samples of seeds 0..n-1 from the average of the weights, shared out over the workers. (all ranks)

    A network that knows labels is asked for one after the other. ``at_work`` is called at each evaluation.

    Returns:
        float [n, C, H, W] in [-1, 1], the same on every rank.
    """
    share = -(-n // world.size)
    seeds = torch.arange(world.rank * share, (world.rank + 1) * share, device=world.device)
    dtype = next(state.model.parameters()).dtype
    classes = state.model.classes
    network = guided(state.model, seeds % classes) if classes else state.model

    def in_its_dtype(x_t: Tensor, t: Tensor) -> Tensor:
        at_work()
        return network(x_t.to(dtype), t).to(x_t.dtype)

    eps_theta = as_eps(in_its_dtype, objective.target, schedule.to(world.device))
    with state.ema.applied_to(state.model):
        x_0 = sample(dpm_solver, eps_theta, schedule, seeds, tuple(shape), steps=min(20, schedule.steps))
    return world.gather(x_0)[:n]
