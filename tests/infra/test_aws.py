"""The files for AWS are what Ray, EC2, IAM and S3 take, and permit no more than they must."""

import copy
import json
import os
import re
import shlex
from collections.abc import Iterator
from fnmatch import fnmatchcase
from itertools import pairwise
from pathlib import Path
from typing import Any

import botocore.session
import pytest
import yaml
from botocore.model import Shape
from botocore.validate import ParamValidator
from policy_sentry.querying.actions import get_action_data
from ray._private.label_utils import validate_node_label_syntax, validate_node_labels
from ray.autoscaler._private.util import prepare_config, validate_config
from ray.scripts.scripts import start

from jobs.cli import parse
from jobs.presets import PRESETS
from pipelines.config import TrainJob
from pipelines.mlflow_door import check_trusted
from pipelines.storage import Folder
from pipelines.tracking import resolve_uri
from tests.infra.tools import INFRA

AWS = INFRA / "aws"
CLUSTER = yaml.safe_load((AWS / "cluster.yaml").read_text())
TYPES = CLUSTER["available_node_types"]
POLICIES = {path.stem: json.loads(path.read_text()) for path in sorted((AWS / "iam").glob("*.json"))}
LIFECYCLE = json.loads((AWS / "lifecycle.json").read_text())


def asked_of(service: str, operation: str) -> Shape:
    return botocore.session.get_session().get_service_model(service).operation_model(operation).input_shape


def wrong(given: Any, shape: Shape, place: str = "") -> Iterator[str]:
    """What AWS's client would refuse, and values that its model does not list, which it sends as they are."""
    if not place:
        report = ParamValidator().validate(given, shape)
        yield from [report.generate_report()] if report.has_errors() else []
    if isinstance(given, dict):
        for name, value in given.items():
            if name in getattr(shape, "members", {}):
                yield from wrong(value, shape.members[name], f"{place}/{name}")
    elif isinstance(given, list):
        for value in given:
            yield from wrong(value, shape.member, f"{place}/[]")
    elif getattr(shape, "enum", []) and given not in shape.enum:
        yield f"{place}: {given} is none of {shape.enum[:5]}"


def launched(node: dict[str, Any]) -> list[str]:
    return list(wrong({"MinCount": 1, "MaxCount": 1, **node}, asked_of("ec2", "RunInstances")))


def test_ray_up_takes_the_cluster() -> None:
    validate_config(prepare_config(copy.deepcopy(CLUSTER)))
    assert TYPES[CLUSTER["head_node_type"]]["resources"] == {"CPU": 0}


@pytest.mark.parametrize(
    ("place", "value"),
    [
        ("max_worker", 3),
        ("docker.imag", "x"),
        ("provider.security_group.GroupNam", "x"),
        ("available_node_types.data.min_worker", 0),
        ("available_node_types.data.min_workers", "none"),
        ("available_node_types.gpu-spot.docker.image", "x"),
        ("head_start_ray_commands", "ray start"),
    ],
)
def test_a_typo_in_the_cluster_is_caught(place: str, value: Any) -> None:
    config = copy.deepcopy(CLUSTER)
    *parents, last = place.split(".")
    spot = config
    for part in parents:
        spot = spot[part]
    spot[last] = value
    with pytest.raises(Exception, match=re.escape(last) + "|validat|not valid|is not of type"):
        validate_config(prepare_config(config))


@pytest.mark.parametrize("name", TYPES)
def test_ec2_takes_a_node(name: str) -> None:
    assert launched(TYPES[name]["node_config"]) == []


@pytest.mark.parametrize(
    "change",
    [
        {"InstanceTyp": "m7i.xlarge"},
        {"InstanceType": "m7i.enormous"},
        {"IamInstanceProfile": {"Nam": "x"}},
        {"MetadataOptions": {"HttpTokens": "demanded"}},
        {"InstanceMarketOptions": {"MarketType": "spot", "SpotOptions": {"InstanceInterruptionBehaviour": "stop"}}},
        {"BlockDeviceMappings": [{"Ebs": {"VolumeSize": "big"}}]},
    ],
    ids=str,
)
def test_a_typo_in_a_node_is_caught(change: dict[str, Any]) -> None:
    assert launched(TYPES["data"]["node_config"] | change)


def test_what_may_be_taken_away_is_what_trains() -> None:
    spot = [name for name, said in TYPES.items() if "InstanceMarketOptions" in said["node_config"]]
    assert spot == ["gpu-spot"] and set(TYPES) == {"head", "data", "gpu-spot"}
    for name, said in TYPES.items():
        validate_node_labels(said.get("labels"))
        validate_node_label_syntax(said.get("labels"))
        assert said["node_config"]["MetadataOptions"]["HttpTokens"] == "required", "else anybody has its keys"
        assert ("--gpus all" in said.get("docker", {}).get("worker_run_options", [])) == (name == "gpu-spot")
    assert TYPES["data"]["labels"] == {"role": "data"}


def test_every_node_asks_for_the_token_and_looks_out_for_the_notice() -> None:
    commands = CLUSTER["head_start_ray_commands"] + CLUSTER["worker_start_ray_commands"]
    starts = [shlex.split(command) for command in commands if "ray start" in command]
    assert len(starts) == 2
    for words in starts:
        assert words[0] == "RAY_AUTH_MODE=token" and words[1:3] == ["ray", "start"]
        start.make_context("start", words[3:])  # Ray's own parser takes these flags
    assert "--dashboard-host=127.0.0.1" in starts[0]
    assert CLUSTER["file_mounts"]["/home/ray/.ray/auth_token"] == "~/.ray/auth_token", "where Ray looks for it"
    (watcher,) = [command for command in commands if "brickyard-drain" in command]
    assert watcher in CLUSTER["worker_start_ray_commands"] and "--watch" in watcher and watcher.endswith("&")


def test_the_command_at_the_head_of_the_file_is_recorded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As the job reads it, in the environment of a node: the server is known, and may be sent the password there."""
    (command,) = re.findall(r"#  +(python jobs/train\.py (?:.*\\\n)*.*)", (AWS / "cluster.yaml").read_text())
    job = parse(TrainJob, PRESETS, shlex.split(re.sub(r"\\\n#", "", command))[2:]).job
    options = shlex.split(" ".join(CLUSTER["docker"]["run_options"]))
    given = dict(word.split("=", 1) for option, word in pairwise(options) if option == "-e")
    assert all("run_options" not in node.get("docker", {}) for node in TYPES.values()), "they would replace these"
    for name in [name for name in os.environ if name.startswith("MLFLOW_")]:
        monkeypatch.delenv(name)
    for name, value in ({"HOME": str(tmp_path)} | given).items():
        monkeypatch.setenv(name, value)
    (file,) = [path for path in CLUSTER["file_mounts"] if path.endswith("/.mlflow/credentials")]
    (tmp_path / ".mlflow").mkdir()
    (tmp_path / ".mlflow" / Path(file).name).touch()
    uri = resolve_uri(job.tracking, Folder(job.root))
    assert uri.startswith("http")
    check_trusted(uri)


def actions(statement: dict[str, Any]) -> list[str]:
    return [statement["Action"]] if isinstance(statement["Action"], str) else statement["Action"]


def resources(statement: dict[str, Any]) -> list[str]:
    return [statement["Resource"]] if isinstance(statement["Resource"], str) else statement["Resource"]


def form(pattern: str) -> str:
    """The regular expression of an ARN, from AWS's form of it."""
    special = {"${ObjectName}": ".+", "${ParameterNameWithoutLeadingSlash}": ".+", "${Account}": "[0-9]*"}
    parts = re.split(r"(\$\{\w+\})", pattern)
    return "".join(special.get(part, "[^/]+") if part.startswith("${") else re.escape(part) for part in parts)


def ill(policy: dict[str, Any]) -> Iterator[str]:
    """What is wrong with a policy by AWS's own list of actions, of what each acts on and of what it may depend on."""
    if set(policy) != {"Version", "Statement"} or policy["Version"] != "2012-10-17":
        yield "a policy is a version and statements"
    for statement in policy["Statement"]:
        if unknown := set(statement) - {"Sid", "Effect", "Action", "Resource", "Condition"}:
            yield f"{statement.get('Sid')} has {unknown}"
        for action in actions(statement):
            service, _, name = action.partition(":")
            known = (get_action_data(service, name) or {}).get(service, [])
            if not known:
                yield f"{action} is no action"
            keys = set()
            for resource in resources(statement):
                kinds = [one for one in known if re.fullmatch(form(one["resource_arn_format"]), resource)]
                if not kinds:
                    yield f"{action} does not act on {resource}"
                keys |= {key.replace("${TagKey}", "") for one in kinds for key in one["condition_keys"]}
            for condition in statement.get("Condition", {}).values():
                for key in condition:
                    if not any(key == one or (one.endswith("/") and key.startswith(one)) for one in keys):
                        yield f"{action} does not depend on {key}"


@pytest.mark.parametrize("name", POLICIES)
def test_a_policy_is_of_actions_that_there_are(name: str) -> None:
    assert list(ill(POLICIES[name])) == []


@pytest.mark.parametrize(
    "change",
    [
        {"Action": "s3:GetObjekt"},
        {"Action": "s3:HeadObject"},
        {"Action": "s3:ListBucket"},
        {"Ressource": "arn:aws:s3:::bucket/images/*"},
        {"Resource": "arn:aws:s3:::bucket"},
        {"Condition": {"StringEquals": {"s3:prefix": "images/"}}},
    ],
    ids=str,
)
def test_a_typo_in_a_policy_is_caught(change: dict[str, Any]) -> None:
    policy = copy.deepcopy(POLICIES["train"])
    policy["Statement"][1] |= change
    assert list(ill(policy))


def may(policy: str, action: str, resource: str, **context: str) -> bool:
    """Whether IAM would permit it: some statement does, and all its conditions hold. Nothing here denies."""
    for statement in POLICIES[policy]["Statement"]:
        wanted = [pair for condition in statement.get("Condition", {}).values() for pair in condition.items()]
        holds = all(
            any(fnmatchcase(context.get(key, ""), each) for each in ([value] if isinstance(value, str) else value))
            for key, value in wanted
        )
        if holds and action in actions(statement) and any(fnmatchcase(resource, each) for each in resources(statement)):
            return True
    return False


OBJECT = "arn:aws:s3:::bucket/"
INSTANCE = "arn:aws:ec2:us-east-1:111122223333:instance/i-1"
READ, WRITE, DELETE, LIST = "s3:GetObject", "s3:PutObject", "s3:DeleteObject", "s3:ListBucket"


@pytest.mark.parametrize(
    ("policy", "action", "resource", "permitted"),
    [
        ("train", LIST, "arn:aws:s3:::bucket", True),
        ("train", READ, OBJECT + "images/a.png", True),
        ("train", WRITE, OBJECT + "images/a.png", False),
        ("train", DELETE, OBJECT + "images/a.png", False),
        ("train", READ, OBJECT + "code/brickyard.zip", True),
        ("train", WRITE, OBJECT + "code/brickyard.zip", False),
        ("train", WRITE, OBJECT + "yard/runs/cifar10/checkpoint-000000000128/manifest.json", True),
        ("train", DELETE, OBJECT + "yard/runs/cifar10/checkpoint-000000000128/manifest.json", True),
        ("train", WRITE, OBJECT + "samples/nightly/x/part-000000.parquet", False),
        ("train", READ, OBJECT + "mlflow/1/model", False),
        ("train", READ, "arn:aws:s3:::another/yard/a", False),
        ("sample", READ, OBJECT + "yard/runs/cifar10/export/ema.safetensors", True),
        ("sample", WRITE, OBJECT + "yard/runs/cifar10/export/ema.safetensors", False),
        ("sample", DELETE, OBJECT + "yard/runs/cifar10/run.json", False),
        ("sample", WRITE, OBJECT + "samples/nightly/2026-11-26T00-00Z/part-000000.parquet", True),
        ("sample", DELETE, OBJECT + "samples/nightly/2026-11-26T00-00Z/part-000000.parquet", False),
        ("sample", DELETE, OBJECT + "samples/nightly/lease/lease-3.json", True),
        ("sample", READ, OBJECT + "images/a.png", False),
        ("mlflow", WRITE, OBJECT + "mlflow/1/model", True),
        ("mlflow", READ, OBJECT + "yard/runs/cifar10/run.json", False),
        ("mlflow", LIST, "arn:aws:s3:::bucket", False),
        ("head", "ec2:RunInstances", INSTANCE, False),
        ("head", "ec2:TerminateInstances", INSTANCE, False),
        ("head", "ec2:CreateTags", INSTANCE, False),
        ("head", "iam:PassRole", "arn:aws:iam::111122223333:role/brickyard-node", False),
        ("head", READ, OBJECT + "images/a.png", False),
    ],
)
def test_who_may_do_what(policy: str, action: str, resource: str, permitted: bool) -> None:
    assert may(policy, action, resource) == permitted


def test_what_depends_on_more_than_the_name() -> None:
    of_ours = {"ec2:ResourceTag/ray-cluster-name": "brickyard"}
    assert may("mlflow", LIST, "arn:aws:s3:::bucket", **{"s3:prefix": "mlflow/1/"})
    assert may("head", "ec2:TerminateInstances", INSTANCE, **of_ours)
    assert not may("head", "ec2:TerminateInstances", INSTANCE, **{"ec2:ResourceTag/ray-cluster-name": "another"})
    assert may("head", "ec2:CreateTags", INSTANCE, **{"ec2:CreateAction": "RunInstances"})
    role = "arn:aws:iam::111122223333:role/"
    assert may("head", "iam:PassRole", role + "brickyard-node", **{"iam:PassedToService": "ec2.amazonaws.com"})
    assert not may("head", "iam:PassRole", role + "admin", **{"iam:PassedToService": "ec2.amazonaws.com"})


@pytest.mark.parametrize("name", [name for name in TYPES if name != CLUSTER["head_node_type"]])
def test_the_head_may_start_its_workers(name: str) -> None:
    """Each kind, in the region of the cluster and under its name; no other kind."""
    started = {"aws:RequestTag/ray-cluster-name": CLUSTER["cluster_name"]}
    kind = {"ec2:InstanceType": TYPES[name]["node_config"]["InstanceType"]}
    instance = f"arn:aws:ec2:{CLUSTER['provider']['region']}:111122223333:instance/*"
    assert may("head", "ec2:RunInstances", instance, **started, **kind)
    assert not may("head", "ec2:RunInstances", instance, **started, **{"ec2:InstanceType": "p5.48xlarge"})
    assert TYPES[name]["node_config"]["IamInstanceProfile"] == {"Name": "brickyard-node"}
    image = TYPES[name]["node_config"]["ImageId"].removeprefix("resolve:ssm:")
    assert may("head", "ssm:GetParameters", f"arn:aws:ssm:{CLUSTER['provider']['region']}::parameter{image}")


def test_the_lifecycle_is_what_s3_takes() -> None:
    shape = asked_of("s3", "PutBucketLifecycleConfiguration")
    assert list(wrong({"Bucket": "b", "LifecycleConfiguration": LIFECYCLE}, shape)) == []
    typo = copy.deepcopy(LIFECYCLE)
    typo["Rules"][0]["AbortIncompleteMultipartUploads"] = typo["Rules"][0].pop("AbortIncompleteMultipartUpload")
    assert list(wrong({"Bucket": "b", "LifecycleConfiguration": typo}, shape))


def test_the_lifecycle_takes_nothing_that_lives() -> None:
    """No object that is the newest of its name ever goes by its age: a run may stand still for a year and go on."""
    for rule in LIFECYCLE["Rules"]:
        assert set(rule.get("Expiration", {})) <= {"ExpiredObjectDeleteMarker"}
        assert not set(rule) & {"Transitions", "NoncurrentVersionTransitions"}
        assert rule.get("AbortIncompleteMultipartUpload", {}).get("DaysAfterInitiation", 99) >= 2, "minutes"
        assert rule.get("NoncurrentVersionExpiration", {}).get("NoncurrentDays", 99) >= 7


def test_a_real_s3_server_takes_the_lifecycle(s3_server: str) -> None:
    import boto3

    client = boto3.client("s3", endpoint_url=s3_server)
    client.create_bucket(Bucket="lifecycle")
    client.put_bucket_lifecycle_configuration(Bucket="lifecycle", LifecycleConfiguration=LIFECYCLE)
    kept = client.get_bucket_lifecycle_configuration(Bucket="lifecycle")["Rules"]
    for rule in LIFECYCLE["Rules"]:
        (same,) = [one for one in kept if one["ID"] == rule["ID"]]
        for name in ("Status", "AbortIncompleteMultipartUpload", "NoncurrentVersionExpiration", "Expiration"):
            assert same.get(name) == rule.get(name)
