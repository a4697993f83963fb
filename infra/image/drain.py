#!/usr/bin/env python3
"""Tell Ray that this node will be taken away, so that training writes a checkpoint and goes on without it.

``brickyard-drain --seconds 90`` tells it now, and stays until those have passed or Ray has left: Kubernetes runs it
before it ends a pod. Where no cluster says within 30 s where it is, its head may have gone first: SIGALRM ends this.
``brickyard-drain --watch`` runs beside a node on AWS and waits until the metadata of the instance (IMDSv2) have a
notice that this spot instance is interrupted, two minutes ahead; with ``--rebalance 600`` also for the recommendation
to leave, which may come earlier or without an interruption, and drains with so many seconds.

It needs nothing but Ray and the standard library, and is part of the image, not of the code that travels.
"""

import argparse
import contextlib
import http.client
import json
import logging
import math
import os
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

IMDS = "http://169.254.169.254"
NOTICE, ADVICE = "spot/instance-action", "events/recommendations/rebalance"
SHORTEST_S, TOKEN_S, PATIENCE_S = 1, 21_600, 30
"""The least that a node is given; for how long a token of the metadata service is asked for; and how long a cluster may
take to say where it is before a pod ends."""

log = logging.getLogger("brickyard.drain")


class Metadata:
    """What the metadata service of this instance says, asked with a token as IMDSv2 wants it."""

    def __init__(self, endpoint: str) -> None:
        self._endpoint, self._token = endpoint.rstrip("/"), ""

    def get(self, name: str) -> dict[str, str] | None:
        """Return an item that is JSON; None where there is none, or the service does not answer."""
        try:
            for _ in range(2):  # a token may have run out
                try:
                    self._token = self._token or self._ask("PUT", "api/token").decode()
                    return dict(json.loads(self._ask("GET", f"meta-data/{name}")))
                except urllib.error.HTTPError as error:
                    if error.code != 401:
                        raise
                    self._token = ""
        except urllib.error.HTTPError as error:
            if error.code != 404:  # which says that nobody will take this node away
                log.warning("the metadata service answers %s for %s", error.code, name)
        except (OSError, http.client.HTTPException, TypeError, ValueError) as error:
            log.warning("the metadata service says nothing of use about %s: %s", name, error)
        return None

    def _ask(self, method: str, path: str) -> bytes:
        header = ("X-aws-ec2-metadata-token-ttl-seconds", str(TOKEN_S)) if method == "PUT" else (
            "X-aws-ec2-metadata-token", self._token
        )  # fmt: skip
        request = urllib.request.Request(f"{self._endpoint}/latest/{path}", method=method, headers=dict([header]))
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # it is on this machine's own link
        with opener.open(request, timeout=3) as answer:
            return bytes(answer.read())


def seconds_left(metadata: Metadata, rebalance_s: int, now: datetime) -> tuple[int, str] | None:
    """Return in how many seconds this node will go and why, or None if nobody has said (intelligibly) that it will."""
    if notice := metadata.get(NOTICE):
        try:
            left = (datetime.fromisoformat(notice["time"]) - now).total_seconds()
            return max(SHORTEST_S, int(left)), f"spot {notice.get('action')} at {notice['time']}"
        except (KeyError, TypeError, ValueError) as error:
            log.warning("the notice %s has no time to go by, and is asked for again: %r", notice, error)
    if rebalance_s and (advice := metadata.get(ADVICE)):
        return rebalance_s, f"rebalance recommendation of {advice.get('noticeTime')}"
    return None


def this_node() -> tuple[str, str]:
    """Return the address of the cluster that runs on this machine, and the id of the node that this machine is."""
    import ray

    ray.init(address="auto", logging_level="ERROR", log_to_driver=False)
    try:
        context = ray.get_runtime_context()
        return context.gcs_address, context.get_node_id()
    finally:
        ray.shutdown()


def drain(address: str, node: str, seconds: int, why: str, patience_s: int) -> bool:
    """Ask the cluster to drain the node; return whether it said in time that it will."""
    log.warning("draining %s for %d s: %s", node, seconds, why)
    command = ["ray", "drain-node", f"--address={address}", f"--node-id={node}"]
    command += ["--reason=DRAIN_NODE_REASON_PREEMPTION", f"--reason-message={why}"]
    command += [f"--deadline-remaining-seconds={seconds}"]
    try:
        return subprocess.run(command, check=False, timeout=patience_s).returncode == 0
    except subprocess.TimeoutExpired:
        log.warning("no answer to that in %d s", patience_s)
        return False
    except OSError as error:
        log.warning("the command `ray` cannot be run: %s", error)
        return False


def watch(metadata: Metadata, every_s: float, rebalance_s: int, drain_in: Callable[[int, str], bool]) -> None:
    """Wait for a notice, and have the node drained; where the cluster does not take that, ask again."""
    while not ((said := seconds_left(metadata, rebalance_s, datetime.now(UTC))) and drain_in(*said)):
        time.sleep(every_s)


def raylet_runs() -> bool:
    """Whether a raylet runs in this machine, or this container."""
    for process in Path("/proc").glob("[0-9]*/comm"):
        with contextlib.suppress(OSError):  # one that has just ended
            if process.read_text() == "raylet\n":
                return True
    return False


def main() -> int:
    """Read the command line; return 0 when the node is drained."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    when = parser.add_mutually_exclusive_group(required=True)
    when.add_argument("--watch", action="store_true", help="until the metadata of this instance have a notice")
    when.add_argument("--seconds", type=int, help="now; the node will be gone in so many seconds")
    parser.add_argument("--rebalance", type=int, default=0, help="seconds, after a recommendation to leave; 0: stay")
    parser.add_argument("--every", type=float, default=5.0, help="seconds between two looks")
    parser.add_argument("--address", default="", help="of the cluster; otherwise that which runs here")
    parser.add_argument("--node-id", default="", help="of the node; otherwise this one")
    said = parser.parse_args()
    logging.basicConfig(format="%(asctime)s %(message)s", datefmt="%H:%M:%S")

    def drain_in(seconds: int, why: str) -> bool:
        end = time.monotonic() + seconds
        try:
            address, node = (said.address, said.node_id) if said.address and said.node_id else this_node()
        except Exception as error:  # Ray's own errors have no kind in common, and a busy cluster is to be asked again
            log.warning("no node of a cluster answers here: %r", error)
            return False
        signal.alarm(0)  # the cluster is there, and may be slow
        left = max(SHORTEST_S, math.ceil(end - time.monotonic()))
        patience = max(left, PATIENCE_S) if said.watch else left
        return drain(said.address or address, said.node_id or node, left, why, patience)

    if said.watch:
        metadata = Metadata(os.environ.get("AWS_EC2_METADATA_SERVICE_ENDPOINT") or IMDS)
        watch(metadata, said.every, said.rebalance, drain_in)
        return 0
    end = time.monotonic() + said.seconds
    # For a quarter of an hour Ray looks for a head that has gone, in C++: only a signal that nobody handles ends it.
    patience = max(1, min(said.seconds, PATIENCE_S))
    log.warning("looking for this node's cluster; if it does not answer, SIGALRM ends this in %d s", patience)
    signal.alarm(patience)
    if not drain_in(said.seconds, f"this node ends in {said.seconds} s"):
        return 1
    while raylet_runs() and time.monotonic() < end:
        time.sleep(1)
    return 0


if __name__ == "__main__":
    sys.exit(main())
