"""The workers that train, as a user says it."""

from dataclasses import dataclass

from pipelines.errors import ConfigurationError


@dataclass(frozen=True, kw_only=True)
class ScalingConfig:
    """The workers that train."""

    workers: int = 1
    """W; the same run comes out for any of them."""
    min_workers: int = 0
    """Train with as few as these while nodes are missing, and with more again when they come; 0: always with W."""
    resize_s: float = 60.0
    """Seconds between two looks at whether there is room for more workers; only with min_workers. A change costs a
    start of the workers."""
    use_gpu: bool = False
    """One GPU for each worker, and NCCL between them; otherwise the CPU and gloo."""
    cpus_per_worker: float = 0.5
    """CPUs that Ray sets aside for each worker; leave some for the tasks that read."""
    threads_per_worker: int = 1
    """Threads that torch computes with in each worker."""
    validate_on_gpu: bool = False
    """Measure the loss of data.held_out on a GPU, one beside those of the workers; otherwise on one core."""
    max_failures: int = 3
    """Crashes of workers in a row, with no new checkpoint between them, that are answered by going on from the last."""
    hang_s: float = 600.0
    """Seconds that a step may take, after the first; then the workers say where they stand and are started again from
    the last checkpoint."""

    def __post_init__(self) -> None:
        for name in ("workers", "threads_per_worker"):
            if getattr(self, name) < 1:
                raise ConfigurationError(f"scaling.{name} is {getattr(self, name)}; it must be at least 1")
        for name in ("cpus_per_worker", "resize_s", "hang_s"):
            if not getattr(self, name) > 0:
                raise ConfigurationError(f"scaling.{name} is {getattr(self, name)}; it must be positive")
        if not 0 <= self.min_workers <= self.workers:
            raise ConfigurationError(
                f"scaling.min_workers is {self.min_workers}; it must lie in 0..scaling.workers, which is "
                f"{self.workers}: try 1, or 0 for a fixed number"
            )
        if self.max_failures < 0:
            raise ConfigurationError(f"scaling.max_failures is {self.max_failures}; it must not be negative: try 3")
