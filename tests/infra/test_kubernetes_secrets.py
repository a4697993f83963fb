"""On Kubernetes, who gets which secret: of storage, of Ray, of Kubernetes itself; and the recipe that makes them."""

import base64
import json
import os
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from ray.autoscaler._private.kuberay.node_provider import IN_CLUSTER_CA_CERT_PATH, IN_CLUSTER_TOKEN_PATH

from tests.infra.tools import BIN, INFRA, OVERLAYS, find, mappings, overlay, pods

README = (INFRA / "README.md").read_text()


def clusters(name: str) -> list[dict[str, Any]]:
    """Of an overlay: the one that runs on, and those that jobs bring along."""
    found = [one["spec"] for one in overlay(name) if one["kind"] == "RayCluster"]
    return found + [one["spec"]["rayClusterSpec"] for one in overlay(name) if one["kind"] == "RayJob"]


@pytest.mark.parametrize("name", OVERLAYS)
def test_secrets_are_mounted_and_none_is_written_down(name: str) -> None:
    resources = overlay(name)
    assert not [one for one in resources if one["kind"] == "Secret"]
    for where, pod in pods(resources):
        for one in (variable for container in pod["containers"] for variable in container.get("env", [])):
            secret = re.search("PASSWORD|SECRET|TOKEN|KEY|_URL$", one["name"]) and not one["name"].endswith(
                ("_FILE", "_PATH")
            )
            assert not secret or "secretKeyRef" in one["valueFrom"], f"{where}: {one['name']}"
    for one in resources:
        if one["kind"] == "ConfigMap":
            assert not re.search(r"password|://[^/]*:[^/]*@", str(one["data"]), re.IGNORECASE)
    for _, mapping in mappings(resources):
        if "runtimeEnvYAML" in mapping:
            said = yaml.safe_load(mapping["runtimeEnvYAML"])
            assert set(said) <= {"working_dir", "env_vars"}
            assert set(said.get("env_vars", {})) <= {"BRICKYARD_GIT_REVISION"}


def _secrets(resources: list[dict[str, Any]]) -> Iterator[tuple[str, str]]:
    """Yield the name of each secret that is needed, and a key in it or nothing."""
    for _, mapping in mappings(resources):
        if "secretName" in mapping:
            yield mapping["secretName"], ""
            yield from ((mapping["secretName"], item["key"]) for item in mapping.get("items", []))
        if "secretKeyRef" in mapping:
            yield mapping["secretKeyRef"]["name"], mapping["secretKeyRef"]["key"]
        if "secretRef" in mapping:
            yield mapping["secretRef"]["name"], ""


def test_the_readme_says_how_each_secret_is_made() -> None:
    """By a `kubectl create secret` with all the keys that are asked for, and no other secret."""
    made = {
        match[1]: set(re.findall(r"--from-(?:literal|file)=([\w.-]+)=", match[0]))
        for match in re.finditer(r"create secret generic ([\w-]+)(?:[^\n]*\\\n)*[^\n]*", README)
    }
    needed = [secret for name in OVERLAYS for secret in _secrets(overlay(name))]
    assert {name for name, _ in needed} == set(made)
    assert [(name, key) for name, key in needed if key and key not in made[name]] == []
    assert "auth_token" in made["brickyard-ray-token"], "the key that KubeRay reads"


@pytest.mark.parametrize("name", OVERLAYS)
def test_ray_asks_for_a_token(name: str) -> None:
    for cluster in clusters(name):
        assert cluster["authOptions"] == {"mode": "token", "secretName": "brickyard-ray-token"}
        assert cluster["headGroupSpec"]["serviceType"] == "ClusterIP" and cluster["rayVersion"] == "2.60.0"
    submits = find(overlay(name), "CronJob", "brickyard-samples")
    assert ("brickyard-ray-token", "auth_token") in set(_secrets([submits]))


@pytest.mark.parametrize("name", OVERLAYS)
def test_kubernetes_own_token_is_the_autoscalers_alone(name: str) -> None:
    """Drivers run in the head's other container: whoever submits must not have the Role that KubeRay made."""
    for cluster in clusters(name):
        head = cluster["headGroupSpec"]["template"]["spec"]
        (token,) = [volume for volume in head["volumes"] if "serviceAccountToken" in str(volume)]
        (mount,) = cluster["autoscalerOptions"]["volumeMounts"]
        assert mount["name"] == token["name"] and mount["readOnly"]
        inside = [source for _, source in mappings(token) if "path" in source]
        files = {f"{mount['mountPath']}/{one['path']}" for one in inside}
        assert files >= {IN_CLUSTER_TOKEN_PATH, IN_CLUSTER_CA_CERT_PATH}, "where Ray's autoscaler looks"
    for where, pod in pods(overlay(name)):
        tokens = {one["name"] for one in pod.get("volumes", []) if "serviceAccountToken" in str(one)}
        assert not tokens or "headGroupSpec" in where, where
        assert pod["automountServiceAccountToken"] is False, f"{where}: it would be in each container"
        for one in pod["containers"] + pod.get("initContainers", []):
            assert not tokens & {mount["name"] for mount in one.get("volumeMounts", [])}, f"{where}: {one['name']}"


def test_the_recipe_makes_them_and_tells_nobody(tmp_path: Path) -> None:
    """As the README has it, with kubectl that asks no cluster: `ps` shows no secret, and no file of one stays."""
    (recipe,) = re.findall(r"^    (secret\(\) (?:.|\n)+?)^    kubectl apply", README, re.MULTILINE)
    hook = "https://hooks.example.org/services/T0/B0/x"
    shell = """kubectl() {
        printf '%s\\n' "$@" >> "$SAID"
        "$KUBECTL" "$@" --dry-run=client -o json | tr -d '\\n' >> "$MADE" && echo >> "$MADE"
    }
    """
    said, made = tmp_path / "said", tmp_path / "made"
    here = {"KUBECTL": str(BIN / "kubectl"), "SAID": str(said), "MADE": str(made), "HOME": str(tmp_path)}
    (tmp_path / "in").mkdir()
    (tmp_path / "in/hook").write_text(f"{hook}\n")
    done = subprocess.run(
        ["/bin/bash", "-e", "-c", shell + recipe], cwd=tmp_path / "in", env={"PATH": os.environ["PATH"], **here},
        text=True, check=False, capture_output=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    values = {
        f"{secret['metadata']['name']}/{key}": base64.b64decode(value).decode()
        for secret in map(json.loads, made.read_text().splitlines())
        for key, value in secret["data"].items()
    }
    drawn = {name: value for name, value in values.items() if re.fullmatch("[0-9a-f]{64}", value)}
    assert set(drawn) == {
        "brickyard-ray-token/auth_token", "brickyard-postgres/password", "brickyard-mlflow-server/secret",
        "brickyard-storage-server/AWS_SECRET_ACCESS_KEY",
    } and len(set(drawn.values())) == 4  # fmt: skip
    assert values["brickyard-alert/url"] == hook, "and no end of a line"
    assert drawn["brickyard-storage-server/AWS_SECRET_ACCESS_KEY"] in values["brickyard-storage/credentials"]
    (password,) = re.findall(r"admin_password = (\S+)", values["brickyard-mlflow-server/users.ini"])
    assert f"tracking_password = {password}\n" in values["brickyard-mlflow-client/credentials"]
    secrets = {*drawn.values(), password, hook}
    assert not [secret for secret in secrets if secret in said.read_text() + done.stdout + done.stderr]
    assert [path.name for path in (tmp_path / "in").iterdir()] == ["hook"], "which is the user's own"
