"""What a node is used for, by one process that looks at it now and then."""

import logging
import socket
import time

import psutil
import torch

log = logging.getLogger("brickyard.train")


class Usage:
    """The processors, the memory, the network and the GPUs of this node, as means since the last look.

    psutil counts what the node does, its other tenants included; a GPU's driver is asked where there is one.
    """

    def __init__(self) -> None:
        self.node = socket.gethostname()
        self._gpus = torch.cuda.device_count() if _driver_answers() else 0
        psutil.cpu_percent()  # from here on
        self._seen, self._at = _network(), time.monotonic()

    def look(self) -> dict[str, float]:
        """Return the usage by name, as MLflow's UI groups it: ``system/<node>/…``; nothing if it cannot be had."""
        try:
            return self._look()
        except Exception as error:  # no reason to stop
            log.warning("what %s is used for cannot be said: %s", self.node, error)
            return {}

    def _look(self) -> dict[str, float]:
        seen, now = _network(), time.monotonic()
        seconds = max(now - self._at, 1e-3)
        memory = psutil.virtual_memory()
        found = {
            "cpu_percent": psutil.cpu_percent(),
            "memory_percent": memory.percent,
            "memory_gb": memory.used / 1e9,
            "network_received_mb_per_s": (seen[0] - self._seen[0]) / 1e6 / seconds,
            "network_sent_mb_per_s": (seen[1] - self._seen[1]) / 1e6 / seconds,
        }
        for gpu in range(self._gpus):
            # Of the driver's own library: to ask CUDA itself would take memory of every GPU of the node.
            found[f"gpu_{gpu}_percent"] = float(torch.cuda.utilization(gpu))
            found[f"gpu_{gpu}_memory_gb"] = torch.cuda.device_memory_used(gpu) / 1e9
        self._seen, self._at = seen, now
        return {f"system/{self.node}/{name}": value for name, value in found.items()}


def _network() -> tuple[int, int]:
    """Bytes received and sent since the node was started."""
    counted = psutil.net_io_counters()
    return (counted.bytes_recv, counted.bytes_sent) if counted else (0, 0)


def _driver_answers() -> bool:
    """Whether GPUs say how busy they are: it takes the bindings of NVIDIA's library, which not every node has."""
    try:
        torch.cuda.utilization()
    except Exception:  # no GPU, no bindings, or one that does not say: a part of a GPU, such as MIG's
        return False
    return True
