"""Programs that the test extra brings, and walks through what is written in YAML."""

import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from tests.processes import CODE

INFRA = CODE / "infra"
KUBERNETES = INFRA / "kubernetes"
AWS = INFRA / "aws"
CLUSTER = yaml.safe_load((AWS / "cluster.yaml").read_text())
TYPES = CLUSTER["available_node_types"]
BIN = Path(sys.executable).parent
OVERLAYS = sorted(path.parent.name for path in KUBERNETES.glob("overlays/*/kustomization.yaml"))


def run(*command: str | Path) -> subprocess.CompletedProcess[str]:
    """Run a program of the virtual environment in the project's folder."""
    return subprocess.run(
        [BIN / command[0], *command[1:]], cwd=CODE, capture_output=True, text=True, check=False
    )  # fmt: skip


@cache
def _built(name: str) -> str:
    done = run("kubectl", "kustomize", KUBERNETES / "overlays" / name)
    assert done.returncode == 0, done.stderr
    return done.stdout


def overlay(name: str) -> list[dict[str, Any]]:
    """What kustomize makes of an overlay; it is the caller's to change."""
    return list(yaml.safe_load_all(_built(name)))


def find(resources: list[dict[str, Any]], kind: str, name: str = "brickyard") -> dict[str, Any]:
    (found,) = [one for one in resources if (one["kind"], one["metadata"]["name"]) == (kind, name)]
    return found


Place = tuple[str | int, ...]


def mappings(tree: Any, place: Place = ()) -> Iterator[tuple[Place, dict[str, Any]]]:
    """Yield every mapping within, and where it is."""
    if isinstance(tree, dict):
        yield place, tree
    for key, value in tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ():
        yield from mappings(value, (*place, key))


def pods(resources: list[dict[str, Any]]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield every specification of a pod, and where it is."""
    for one in resources:
        for place, mapping in mappings(one):
            if "containers" in mapping:
                yield "/".join(map(str, (one["kind"], one["metadata"]["name"], *place))), mapping
