"""What kustomize makes of infra/kubernetes is what Kubernetes and KubeRay take, and nobody may do more than he must."""

import re
import shlex
import subprocess
import sys
from functools import cache
from ipaddress import ip_address, ip_network
from pathlib import Path
from typing import Any

import pytest
import yaml
from ray._private.label_utils import validate_node_label_syntax, validate_node_labels
from ray.scripts.scripts import start

from jobs.cli import parse
from jobs.presets import PRESETS
from pipelines.config import TrainJob
from tests.conftest import free_ports
from tests.infra.kuberay import check
from tests.infra.tools import INFRA, KUBERNETES, OVERLAYS, find, mappings, overlay, pods, run
from tests.processes import kill

README = (INFRA / "README.md").read_text()
TRAINING = [name for name in OVERLAYS if name.endswith("-train")]
ALONE = KUBERNETES / "sample-raycronjob.yaml"
FREE = {"labels", "data", "matchLabels", "selector", "annotations", "nodeSelector", "clusterSelector"}
FREE |= {"limits", "requests", "rayStartParams"}  # which have tests of their own below
"""Mappings whose keys are anybody's."""


@pytest.mark.parametrize("name", OVERLAYS)
def test_an_overlay_is_what_the_schemas_say(name: str) -> None:
    assert [found for one in overlay(name) for found in check(one)] == []


def test_the_raycronjob_is_what_the_schemas_say() -> None:
    assert list(check(yaml.safe_load(ALONE.read_text()))) == []


@pytest.mark.parametrize("name", TRAINING)
def test_a_typo_anywhere_is_caught(name: str) -> None:
    """Every key of every mapping, once for each place that has it."""
    tried: set[tuple[Any, ...]] = set()
    for one in [*overlay(name), yaml.safe_load(ALONE.read_text())]:
        for place, mapping in mappings(one):
            for key in list(mapping):
                names = (one["kind"], *(part for part in place if isinstance(part, str)), key)
                if names in tried or set(names[:-1]) & FREE or names[1:] in {("kind",), ("apiVersion",), ("metadata",)}:
                    continue
                tried.add(names)
                mapping[f"{key}x"] = mapping.pop(key)
                assert any(True for _ in check(one)), f"nobody minds {key}x at {place} of {one['kind']}"
                mapping[key] = mapping.pop(f"{key}x")
    assert len(tried) > 400


@pytest.mark.parametrize(
    ("kind", "place", "value"),
    [
        ("RayCluster", "authOptions.mode", "tokens"),
        ("RayCluster", "rayVersion", 2.6),
        ("RayCluster", "workerGroupSpecs.0.minReplicas", "1"),
        ("RayCluster", "headGroupSpec.rayStartParams.num-cpus", 0),
        ("RayCluster", "headGroupSpec.template.spec.containers", {}),
        ("RayJob", "submissionMode", "HTTP"),
        ("RayJob", "backoffLimit", -1),
        ("RayJob", "submitterPodTemplate.spec.volumes", [{"nam": "x"}]),
        ("CronJob", "startingDeadlineSeconds", "6h"),  # Kubernetes' schema lists no values of its fields
    ],
)
def test_a_wrong_value_is_caught(kind: str, place: str, value: Any) -> None:
    (one,) = [one for one in overlay("eks-train") if one["kind"] == kind]
    *parents, last = place.split(".")
    spot = one["spec"]
    for part in parents:
        spot = spot[int(part) if part.isdigit() else part]
    spot[last] = value
    assert list(check(one))


def test_every_file_is_part_of_something() -> None:
    named = {ALONE}
    for folder in (path.parent for path in KUBERNETES.rglob("kustomization.yaml")):
        said = yaml.safe_load((folder / "kustomization.yaml").read_text())
        named |= {(folder / each).resolve() for each in said.get("resources", []) + said.get("components", [])}
    for path in KUBERNETES.rglob("*.yaml"):
        alone = path.name == "kustomization.yaml" and path.parent.parent.name == "overlays"
        assert alone or path in named or path.parent in named, f"nothing uses {path}"


def test_kustomize_refuses_what_is_not_there() -> None:
    assert run("kubectl", "kustomize", KUBERNETES / "overlays" / "nowhere").returncode != 0


@pytest.mark.parametrize("name", OVERLAYS)
def test_a_pod_is_an_ordinary_process_with_bounds(name: str) -> None:
    found = dict(pods(overlay(name)))
    assert len(found) >= 5
    for where, pod in found.items():
        assert pod["securityContext"]["runAsNonRoot"] and pod["securityContext"]["runAsUser"] > 0, where
        assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}, where
        assert pod["automountServiceAccountToken"] is False, f"{where}: it would be in each container"
        assert pod["enableServiceLinks"] is False, where
        for one in pod["containers"]:
            assert one["securityContext"]["allowPrivilegeEscalation"] is False, where
            assert one["securityContext"]["capabilities"] == {"drop": ["ALL"]}, where
            for bounds in (one["resources"]["requests"], one["resources"]["limits"]):
                assert {"cpu", "memory"} <= set(bounds) <= {"cpu", "memory", "ephemeral-storage", "nvidia.com/gpu"}
            _, _, tag = one["image"].partition(":")
            assert re.match(r"\d+\.\d+|local$", tag), f"{where}: {one['image']} has no version"
        mounted = {mount["name"] for one in pod["containers"] for mount in one.get("volumeMounts", [])}
        claimed = {"data"} if "StatefulSet" in where else set()
        autoscaler = {"kubernetes"} if "headGroupSpec" in where else set()  # whose container KubeRay adds
        assert mounted | autoscaler == {volume["name"] for volume in pod.get("volumes", [])} | claimed, where


@pytest.mark.parametrize("name", OVERLAYS)
def test_groups_of_nodes(name: str) -> None:
    """Drivers on the head, reading where there are no GPUs, training where it is cheap."""
    known = {option.lstrip("-") for parameter in start.params for option in parameter.opts}
    spec = find(overlay(name), "RayCluster")["spec"]
    assert spec["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"
    for group in [spec["headGroupSpec"], *spec["workerGroupSpecs"]]:
        assert set(group["rayStartParams"]) <= known
    groups = {group["groupName"]: group for group in spec["workerGroupSpecs"]}
    assert set(groups) == ({"data"} if name.startswith("laptop") else {"data", "train", "train-spot"})
    for group in groups.values():
        validate_node_labels(group["labels"])
        validate_node_label_syntax(group["labels"])
        pod = group["template"]["spec"]
        (ray,) = pod["containers"]
        gpus = "nvidia.com/gpu" in ray["resources"]["limits"]
        assert gpus == (group["groupName"] != "data") == ray["image"].endswith("-gpu")
        program, flag, seconds = ray["lifecycle"]["preStop"]["exec"]["command"]
        assert (program, flag) == ("brickyard-drain", "--seconds")
        (again,) = [one["value"] for one in ray["env"] if one["name"] == "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S"]
        drains = int(seconds) + float(again)  # by us, and once more by Ray, at SIGTERM
        assert 0 < drains <= pod["terminationGracePeriodSeconds"] - 20, "Ray has time to end what it started"
        assert group["minReplicas"] <= group["maxReplicas"]
    if "train-spot" in groups:
        assert groups["train-spot"]["template"]["spec"]["nodeSelector"] == {"karpenter.sh/capacity-type": "spot"}
        assert groups["train-spot"]["labels"]["market"] == "spot"
        assert groups["train-spot"]["priority"] > groups["train"].get("priority", 0)


@pytest.mark.parametrize("name", TRAINING)
def test_training_is_tried_again_on_a_cluster_like_the_other(name: str) -> None:
    job, cluster = find(overlay(name), "RayJob", "brickyard-train")["spec"], find(overlay(name), "RayCluster")["spec"]
    assert job["rayClusterSpec"] == cluster
    assert job["backoffLimit"] > 0 and "clusterSelector" not in job and job["shutdownAfterJobFinishes"]
    (stays,) = re.findall(r"`ttlSecondsAfterFinished: (\d+)`", README)
    assert job["ttlSecondsAfterFinished"] == int(stays), "as long as its last word needs, and no longer: GPUs cost"
    words = shlex.split(job["entrypoint"])
    assert words[:2] == ["python", "jobs/train.py"]
    asked = parse(TrainJob, PRESETS, words[2:]).job
    assert asked.root.startswith("s3://"), "what is gone on from must outlive the cluster"
    labels = [group["labels"].items() for group in cluster["workerGroupSpecs"]]
    assert any(asked.data.wanted_labels.items() <= each for each in labels)
    gpus = sum(group["maxReplicas"] for group in cluster["workerGroupSpecs"] if group["labels"]["role"] == "train")
    assert not asked.scaling.use_gpu or asked.scaling.workers <= gpus


def test_the_recipe_brings_what_the_pods_on_a_laptop_need() -> None:
    """No registry has these images, and nobody else fills that bucket: both are said before the job is begun."""
    recipe = README.split("## On Kubernetes")[1].split("overlays/laptop-train ")[0]
    resources = overlay("laptop-train")
    images = {one["image"] for _, pod in pods(resources) for one in pod["containers"]}
    ours = {image for image in images if image.endswith(":local")}
    (loaded,) = re.findall(r"kind load docker-image (.+?)  ", recipe)
    assert ours == set(loaded.split()) == set(re.findall(r"docker build .* -t (\S+) \.", recipe))
    (port,) = find(resources, "Service", "s3")["spec"]["ports"]
    assert f"port-forward service/s3 {port['port']} &" in recipe and f"http://127.0.0.1:{port['port']}" in recipe
    runtime = yaml.safe_load(find(resources, "RayJob", "brickyard-train")["spec"]["runtimeEnvYAML"])
    assert f"s3 cp brickyard.zip {runtime['working_dir']}" in recipe


def test_the_recipe_copies_through_a_door_that_is_open_and_closes_it(tmp_path: Path) -> None:
    """As the README has it, with a forwarding that listens a moment late, and a copy that tries once."""
    (recipe,) = re.findall(r"^    (kubectl .*rollout (?:.|\n)+?)^    kubectl apply", README, re.MULTILINE)
    port = free_ports(1)
    late = f"sleep 1; exec {sys.executable} -m http.server -b 127.0.0.1 {port}"
    shell = f"""git() {{ :; }}; P=
    kubectl() {{ if [ "$3" = port-forward ]; then {late}; fi; }}
    aws() {{ curl -sSf -o /dev/null "$2"; }}
    """
    process = subprocess.Popen(
        ["/bin/bash", "-e", "-c", shell + recipe.replace(":8333", f":{port}") + "\nwait"],
        cwd=tmp_path, start_new_session=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    try:
        assert process.wait(timeout=60) == 0
    finally:
        kill(process)


# Who may speak to whom, by the rules of NetworkPolicy: what policies select may do what one of them allows, no more.
RAY = {"app.kubernetes.io/name": "brickyard", "app.kubernetes.io/component": "ray"}
SAMPLES, SUBMITTER = (RAY | {"app.kubernetes.io/component": name} for name in ("samples", "submitter"))
MLFLOW = {"app.kubernetes.io/name": "mlflow", "app.kubernetes.io/component": "mlflow"}
POSTGRES, S3, STRANGER = ({"app.kubernetes.io/name": name} for name in ("postgres", "s3", "stranger"))
Peer = dict[str, str] | str
"""The labels of a pod, the name of another namespace, or an address."""


def _selects(selector: dict[str, Any], labels: dict[str, str]) -> bool:
    wanted = [one["operator"] == "In" and labels.get(one["key"]) in one["values"] for one in _expressions(selector)]
    return selector.get("matchLabels", {}).items() <= labels.items() and all(wanted)


def _expressions(selector: dict[str, Any]) -> list[dict[str, Any]]:
    return list(selector.get("matchExpressions", []))


def _is(rule: dict[str, Any], peer: Peer) -> bool:
    if "ipBlock" in rule:
        inside = isinstance(peer, str) and peer[0].isdigit() and ip_address(peer) in ip_network(rule["ipBlock"]["cidr"])
        return inside and not any(ip_address(str(peer)) in ip_network(out) for out in rule["ipBlock"].get("except", []))
    if "namespaceSelector" in rule:
        return isinstance(peer, str) and _selects(rule["namespaceSelector"], {"kubernetes.io/metadata.name": peer})
    return isinstance(peer, dict) and _selects(rule["podSelector"], peer)


def _permitted(policies: list[dict[str, Any]], way: str, whose: Peer, other: Peer, port: int) -> bool:
    if isinstance(whose, str):
        return True  # not a pod of this namespace
    mine = [one for one in policies if way in one["policyTypes"] and _selects(one["podSelector"], whose)]
    rules = [rule for one in mine for rule in one.get(way.lower(), [])]
    side = "to" if way == "Egress" else "from"
    return not mine or any(
        any(_is(peer, other) for peer in rule[side])
        and ("ports" not in rule or port in {one["port"] for one in rule["ports"]})
        for rule in rules
    )


@cache
def _policies(name: str) -> list[dict[str, Any]]:
    return [one["spec"] for one in overlay(name) if one["kind"] == "NetworkPolicy"]


@pytest.mark.parametrize("name", OVERLAYS)
@pytest.mark.parametrize(
    ("one", "other", "port", "may"),
    [
        (RAY, RAY, 6379, True),
        (RAY, RAY, 40_001, True),
        (RAY, MLFLOW, 5000, True),
        (RAY, MLFLOW, 22, False),
        (RAY, POSTGRES, 5432, False),
        (MLFLOW, POSTGRES, 5432, True),
        (MLFLOW, RAY, 8265, False),
        (POSTGRES, "1.2.3.4", 443, False),
        (SAMPLES, RAY, 8265, True),
        (SAMPLES, RAY, 6379, False),
        (SUBMITTER, RAY, 8265, True),
        (SUBMITTER, MLFLOW, 5000, False),
        (SUBMITTER, "1.2.3.4", 443, False),
        (STRANGER, RAY, 8265, False),
        (STRANGER, MLFLOW, 5000, False),
        ("kuberay-operator", RAY, 8265, True),
        ("kuberay-operator", RAY, 6379, False),
        ("monitoring", RAY, 8080, True),
        ("monitoring", RAY, 8265, False),
        ("default", RAY, 8265, False),
        ("default", MLFLOW, 5000, False),
        (RAY, "1.2.3.4", 443, True),
        (RAY, "192.168.49.2", 8443, True),  # minikube's API
        (RAY, "1.2.3.4", 80, False),
        (RAY, "169.254.169.254", 443, False),
        (RAY, "kube-system", 53, True),
        (STRANGER, "1.2.3.4", 443, False),
        ("default", STRANGER, 80, False),
    ],
)
def test_who_may_speak_to_whom(name: str, one: Peer, other: Peer, port: int, may: bool) -> None:
    policies = _policies(name)
    both = _permitted(policies, "Egress", one, other, port) and _permitted(policies, "Ingress", other, one, port)
    assert both == may


def test_on_a_laptop_there_is_an_s3_server_for_those_who_keep_something_there() -> None:
    policies = _policies("laptop")
    for who, may in ((RAY, True), (MLFLOW, True), (SAMPLES, False), (STRANGER, False)):
        both = _permitted(policies, "Egress", who, S3, 8333) and _permitted(policies, "Ingress", S3, who, 8333)
        assert both == may


@pytest.mark.parametrize("name", OVERLAYS)
def test_policies_speak_of_pods_that_there_are(name: str) -> None:
    """The table above means nothing unless pods have those labels."""
    found = []
    for _, mapping in mappings(overlay(name)):
        if "containers" in mapping.get("spec", {}) and "labels" in mapping.get("metadata", {}):
            found.append(mapping["metadata"]["labels"])
    wanted = [RAY, MLFLOW, SAMPLES, POSTGRES] + ([SUBMITTER] if name in TRAINING else [])
    for labels in wanted + ([S3] if name.startswith("laptop") else []):
        assert labels in found
