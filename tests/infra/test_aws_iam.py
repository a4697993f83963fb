"""The roles for AWS are what IAM takes, permit no more than they must, and are for those who are meant."""

import copy
import json
import re
from collections.abc import Iterator
from fnmatch import fnmatchcase
from typing import Any

import pytest
from policy_sentry.querying.actions import get_action_data

from tests.infra.tools import AWS, CLUSTER, TYPES, overlay

POLICIES = {path.stem: json.loads(path.read_text()) for path in sorted((AWS / "iam").glob("*.json"))}
TRUSTS = {path.stem: json.loads(path.read_text()) for path in sorted((AWS / "iam/trust").glob("*.json"))}


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
    assert may("head", "ec2:TerminateInstances", INSTANCE, **of_ours)
    assert not may("head", "ec2:TerminateInstances", INSTANCE, **{"ec2:ResourceTag/ray-cluster-name": "another"})
    assert may("head", "ec2:CreateTags", INSTANCE, **{"ec2:CreateAction": "RunInstances"})
    role = "arn:aws:iam::111122223333:role/"
    assert may("head", "iam:PassRole", role + "brickyard-node", **{"iam:PassedToService": "ec2.amazonaws.com"})
    assert not may("head", "iam:PassRole", role + "admin", **{"iam:PassedToService": "ec2.amazonaws.com"})


@pytest.mark.parametrize("name", [name for name in POLICIES if name != "head"])
def test_what_is_missing_is_not_called_forbidden(name: str) -> None:
    """S3 says 403 for 404 to who may not list the bucket; asked for an object, it knows of no prefix."""
    assert may(name, LIST, "arn:aws:s3:::bucket")


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


def takers(trust: dict[str, Any]) -> list[str]:
    """Who may take a role, for a document that says so in one of the two forms that are meant here."""
    assert set(trust) == {"Version", "Statement"} and trust["Version"] == "2012-10-17"
    found = []
    for statement in trust["Statement"]:
        assert statement["Effect"] == "Allow" and re.fullmatch(r"\w+", statement["Sid"])
        ((kind, principal),) = statement["Principal"].items()
        service, _, action = statement["Action"].partition(":")
        assert get_action_data(service, action)
        rest = set(statement) - {"Sid", "Effect", "Principal", "Action"}
        if kind == "Service":
            assert action == "AssumeRole" and not rest
            found.append(principal)
            continue
        assert (kind, action, rest) == ("Federated", "AssumeRoleWithWebIdentity", {"Condition"})
        region, account = CLUSTER["provider"]["region"], "111122223333"
        arn = rf"arn:aws:iam::{account}:oidc-provider/(oidc\.eks\.{region}\.amazonaws\.com/id/[0-9A-F]{{32}})"
        (provider,) = re.findall(f"^{arn}$", principal)
        assert list(statement["Condition"]) == ["StringEquals"]
        equal = dict(statement["Condition"]["StringEquals"])
        found.append(equal.pop(f"{provider}:sub"))
        assert equal == {f"{provider}:aud": "sts.amazonaws.com"}
    return found


def test_instances_take_the_roles_of_instances() -> None:
    assert takers(TRUSTS["ec2"]) == ["ec2.amazonaws.com"]


def test_a_service_account_takes_its_role_on_eks_and_no_other() -> None:
    """None of the roles of instances: these hold other policies, and the head may hand them to instances."""
    expected = {}
    for one in overlay("eks"):
        if one["kind"] == "ServiceAccount":
            role = one["metadata"]["annotations"]["eks.amazonaws.com/role-arn"]
            account = f"system:serviceaccount:{one['metadata']['namespace']}:{one['metadata']['name']}"
            expected[role.removeprefix("arn:aws:iam::111122223333:role/")] = [account]
    assert len(expected) == 2
    assert expected == {name: takers(trust) for name, trust in TRUSTS.items() if name != "ec2"}
    assert not set(expected) & {node["node_config"]["IamInstanceProfile"]["Name"] for node in TYPES.values()}


@pytest.mark.parametrize(
    ("right", "typo"),
    [
        (":sub", ":subject"),
        (":aud", ":audience"),
        ("AssumeRoleWithWebIdentity", "AssumeRoleWithWebIdentities"),
        ("StringEquals", "StringLike"),
        ("Federated", "Service"),
        ("oidc-provider", "oidc-providers"),
        ("DEF:", "DEE:"),
        ('"Condition"', '"Conditions"'),
    ],
)
def test_a_typo_in_a_trust_is_caught(right: str, typo: str) -> None:
    text = json.dumps(TRUSTS["brickyard-eks"])
    assert right in text
    with pytest.raises((AssertionError, KeyError, ValueError)):
        takers(json.loads(text.replace(right, typo)))
