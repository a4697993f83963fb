"""Joining a Ray cluster, or starting one on this machine."""

import contextlib
import gc
import logging
import os
import signal
import threading
import warnings
from collections.abc import Iterator

import ray
from ray.data import DataContext

from pipelines.errors import ConfigurationError
from pipelines.metrics import hushed

log = logging.getLogger("brickyard.cluster")

SPARE_CPUS = 2
"""Logical CPUs beyond those of the machine that a cluster of its own declares: on a small machine the tasks that read
must find room beside the workers that train."""


def node_labels(setting: str, said: tuple[str, ...]) -> dict[str, str]:
    """Return labels of nodes, each KEY=VALUE, by key.

    Raises:
        ConfigurationError: naming the setting, if one is not that.
    """
    for label in said:
        if not all(label.partition("=")):
            raise ConfigurationError(f"{setting} has {label!r}; each must be KEY=VALUE, such as role=data")
    return dict(label.split("=", 1) for label in said)


def check_node_labels(wanted: dict[str, str]) -> None:
    """Say so if no node has the labels that are asked for: tasks wait until one joins.

    Raises:
        ConfigurationError: on a cluster of our own, which no node will join.
    """
    nodes = [node["Labels"] for node in ray.nodes() if node["Alive"]]
    if not wanted or any(wanted.items() <= labels.items() for labels in nodes):
        return
    own = {name: value for labels in nodes for name, value in labels.items() if not name.startswith("ray.io/")}
    said = (
        f"node_labels is {' '.join(f'{name}={value}' for name, value in wanted.items())}; no node of the cluster "
        f"has that, they have {own or 'no labels of their own'}"
    )
    if not os.environ.get("RAY_ADDRESS"):
        raise ConfigurationError(f"{said}: drop it, or start a node with such labels and set RAY_ADDRESS")
    log.warning("%s: reading waits until one joins", said)


@contextlib.contextmanager
def cluster() -> Iterator[None]:
    """Run a block on the cluster at RAY_ADDRESS (as ``ray job submit`` sets it), or on one made here for it.

    Where Ray is running in this process already, that is used and left running. Ray's own progress bars and logs are
    turned down unless our log speaks at DEBUG.
    """
    if ray.is_initialized():
        yield
        return
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # nothing is sent anywhere unasked
    verbose = logging.getLogger("brickyard").isEnabledFor(logging.DEBUG)
    level = logging.INFO if verbose else logging.ERROR
    if not verbose:
        # What Ray says of its own future at every start; what it says of the present is kept.
        warnings.filterwarnings("ignore", category=FutureWarning, module=r"ray\.")
    if os.environ.get("RAY_ADDRESS"):
        ray.init(logging_level=level, log_to_driver=verbose)
    else:
        ray.init(
            address="local",
            num_cpus=(os.cpu_count() or 1) + SPARE_CPUS,
            include_dashboard=False,
            logging_level=level,
            log_to_driver=verbose,
        )
    if threading.current_thread() is threading.main_thread():
        # Ray has put a handler of its own before ours: it prints a stack and aborts us three seconds later.
        signal.signal(signal.SIGTERM, signal.getsignal(signal.SIGTERM))
    try:
        for name in ("ray", "ray.data", "ray.train"):
            logging.getLogger(name).setLevel(level)
        DataContext.get_current().enable_progress_bars = verbose
        DataContext.get_current().raise_original_map_exception = True  # our errors, not Ray's around them
        yield
    finally:
        # What the collector of cycles would free in another thread meanwhile may be Ray's, which then ends the process.
        gc.collect()
        gc.disable()
        try:
            with hushed():
                ray.shutdown()
        finally:
            gc.enable()
