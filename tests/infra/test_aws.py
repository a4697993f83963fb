"""The files for AWS are what Ray, EC2 and S3 take. Its roles are in test_aws_iam.py."""

import copy
import json
import os
import re
import shlex
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import botocore.session
import pytest
from botocore.model import Shape
from botocore.validate import ParamValidator
from ray._private.label_utils import validate_node_label_syntax, validate_node_labels
from ray.autoscaler._private.aws.config import _configure_security_group
from ray.autoscaler._private.util import prepare_config, validate_config
from ray.scripts.scripts import start

from jobs.cli import parse
from jobs.presets import PRESETS
from pipelines.config import TrainJob
from pipelines.mlflow_door import check_trusted
from pipelines.storage import Folder
from pipelines.tracking import resolve_uri
from tests.infra.tools import AWS, CLUSTER, TYPES

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
        ("auth.ssh_use", "x"),
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


def test_ray_makes_no_security_group() -> None:
    """It makes one for nodes that name none, and opens SSH to it from everywhere. Here it has nothing to ask EC2."""
    groups = [said["node_config"]["SecurityGroupIds"] for said in TYPES.values()]
    assert all(group == groups[0] and len(group) == 1 for group in groups), "else they do not reach each other"
    assert _configure_security_group(copy.deepcopy(CLUSTER)) == CLUSTER


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
