"""The workers that train, as a user says it."""

from dataclasses import dataclass

from pipelines.errors import ConfigurationError


@dataclass(frozen=True, kw_only=True)
class ScalingConfig:
    """The workers that train."""

    workers: int = 1
    """W; the same run comes out for any of them."""
    use_gpu: bool = False
    """One GPU for each worker, and NCCL between them; otherwise the CPU and gloo."""
    cpus_per_worker: float = 0.5
    """CPUs that Ray sets aside for each worker; leave some for the tasks that read."""
    threads_per_worker: int = 1
    """Threads that torch computes with in each worker."""
    validate_on_gpu: bool = False
    """Measure the loss of data.held_out on a GPU, one beside those of the workers; otherwise on one core."""
    max_failures: int = 3
    """Crashes of workers that are answered by going on from the last checkpoint, within one run of the command."""

    def __post_init__(self) -> None:
        for name in ("workers", "threads_per_worker"):
            if getattr(self, name) < 1:
                raise ConfigurationError(f"scaling.{name} is {getattr(self, name)}; it must be at least 1")
        if not self.cpus_per_worker > 0:
            raise ConfigurationError(f"scaling.cpus_per_worker is {self.cpus_per_worker}; it must be positive")
