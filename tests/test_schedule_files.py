"""The files that fire a job do what they say: a shell runs their commands, with a `ray` that notes what it is asked,
and what it was asked is read by the job's own parser."""

import json
import os
import re
import shlex
import subprocess
from dataclasses import fields
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
import yaml

from jobs.cli import parse
from pipelines.firing_config import FiringConfig
from pipelines.sample_config import SampleJob
from tests.processes import CODE

CRONTAB = CODE / "infra/schedule/crontab"
CRONJOB = CODE / "infra/kubernetes/base/sample-cronjob.yaml"
RAYCRONJOB = CODE / "infra/kubernetes/sample-raycronjob.yaml"


def crontab() -> tuple[dict[str, str], str, str]:
    """The environment, the times and the command of a crontab, read as cron reads it."""
    lines = [line.strip() for line in CRONTAB.read_text().splitlines()]
    kept = [line for line in lines if line and not line.startswith("#")]
    environment = dict(line.split("=", 1) for line in kept[:-1])
    *times, command = kept[-1].split(None, 5)
    assert not re.search(r"(?<!\\)%", command), "cron ends a command at a bare %, and feeds it the rest"
    return environment, " ".join(times), command.replace(r"\%", "%")


def container() -> dict[str, Any]:
    (only,) = yaml.safe_load(CRONJOB.read_text())["spec"]["jobTemplate"]["spec"]["template"]["spec"]["containers"]
    return dict(only)


def asked(command: list[str], environment: dict[str, str], fake: Path) -> list[str]:
    """Run it; return where `ray` was started and what it was asked."""
    environment = environment | {"PATH": f"{fake}{os.pathsep}{environment.get('PATH', '/usr/bin:/bin')}"}
    subprocess.run(command, env=environment, cwd=fake, check=True)
    (line,) = (fake.parent / "asked").read_text().splitlines()
    (fake.parent / "asked").unlink()
    return list(json.loads(line))


def as_cron(fake: Path, checkout: Path) -> list[str]:
    environment, _, command = crontab()
    return asked([environment["SHELL"], "-c", command], environment | {"BRICKYARD": str(checkout)}, fake)


def as_a_pod(fake: Path) -> list[str]:
    said = container()
    return asked(said["command"], {one["name"]: one["value"] for one in said["env"]}, fake)


def job_of(words: list[str]) -> SampleJob:
    """What a job makes of its command line."""
    assert words[:3] == ["python", "-m", "jobs.sample"]
    return parse(SampleJob, {}, words[3:]).job


def test_cron_and_kubernetes_run_one_command_and_the_job_knows_its_flags(ray_that_notes: Path, tmp_path: Path) -> None:
    checkout = tmp_path / "a checkout"
    checkout.mkdir()
    day = datetime.now(UTC)
    by_cron, by_pod = as_cron(ray_that_notes, checkout), as_a_pod(ray_that_notes)
    same_day = datetime.now(UTC).date() == day.date()
    assert by_cron[0] == str(checkout)
    assert by_cron[6:] == by_pod[6:] or not same_day
    assert by_cron[1:6] == ["job", "submit", "--working-dir", ".", "--"]
    assert by_pod[1:6] == ["job", "submit", "--working-dir", "s3://bucket/code/brickyard.zip", "--"]
    job = job_of(by_cron[6:])
    assert (job.out, job.checkpoint, job.seeds) == ("s3://bucket/samples/nightly", "models:/digits@champion", "0-49999")
    assert job.firing.slot == f"{day:%Y-%m-%d}T00:00Z" or not same_day
    assert job.firing.due(datetime.now(UTC)).hour == 0, "it is due"


def test_the_slot_of_the_shell_is_that_of_now(ray_that_notes: Path, tmp_path: Path) -> None:
    """So the three files, and whoever fires by hand with `now`, mean the same slots."""
    entrypoint = yaml.safe_load(RAYCRONJOB.read_text())["spec"]["jobTemplate"]["entrypoint"]
    now = datetime.now(UTC)
    by_shell, by_now = job_of(as_a_pod(ray_that_notes)[6:]), job_of(shlex.split(entrypoint))
    assert by_now.firing.slot == "now"
    assert by_shell.firing.due(now) == by_now.firing.due(now)
    set_alike = [one.name for one in fields(FiringConfig) if one.name != "slot"]
    assert [getattr(by_shell.firing, name) for name in set_alike] == [
        getattr(by_now.firing, name) for name in set_alike
    ]
    assert (by_shell.out, by_shell.seeds) == (by_now.out, by_now.seeds)


@pytest.mark.parametrize("zone", ["EAST-14", "WEST+12"])
def test_the_zone_of_the_machine_does_not_matter(zone: str, ray_that_notes: Path) -> None:
    """At any hour it is another day in one of them."""
    said = container()
    environment = {one["name"]: one["value"] for one in said["env"]} | {"TZ": zone}
    days = {f"{datetime.now(UTC):%Y-%m-%d}"}
    words = asked(said["command"], environment, ray_that_notes)
    days.add(f"{datetime.now(UTC):%Y-%m-%d}")
    assert words[words.index("--firing.slot") + 1].removesuffix("T00:00Z") in days


def test_the_three_fire_at_the_same_time() -> None:
    spec = yaml.safe_load(CRONJOB.read_text())["spec"]
    assert crontab()[1] == spec["schedule"] == yaml.safe_load(RAYCRONJOB.read_text())["spec"]["schedule"]
    assert spec["timeZone"] == "Etc/UTC"


def test_kubernetes_ends_nothing_before_the_job_ends_itself() -> None:
    """To end the pod, or the RayJob, before would leave a job behind that nobody follows."""
    grace_s = 60
    job = yaml.safe_load(CRONJOB.read_text())["spec"]["jobTemplate"]["spec"]
    by_ray = yaml.safe_load(RAYCRONJOB.read_text())["spec"]["jobTemplate"]
    deadline_s = job_of(shlex.split(by_ray["entrypoint"])).firing.deadline_s
    assert 0 < deadline_s + grace_s < min(job["activeDeadlineSeconds"], by_ray["activeDeadlineSeconds"])
    assert max(job["activeDeadlineSeconds"], by_ray["activeDeadlineSeconds"]) < 24 * 3600, "before the next firing"


def test_the_pod_may_do_nothing_but_submit() -> None:
    spec = yaml.safe_load(CRONJOB.read_text())["spec"]
    pod, said = spec["jobTemplate"]["spec"]["template"]["spec"], container()
    assert spec["concurrencyPolicy"] == "Forbid" and spec["startingDeadlineSeconds"] > 0
    assert spec["jobTemplate"]["spec"]["backoffLimit"] == 0, "another pod would submit another job"
    assert pod["restartPolicy"] == "Never"
    assert pod["securityContext"]["runAsNonRoot"] and pod["securityContext"]["runAsUser"] > 0
    assert not pod["automountServiceAccountToken"]
    assert said["securityContext"] == {
        "allowPrivilegeEscalation": False, "readOnlyRootFilesystem": True, "capabilities": {"drop": ["ALL"]},
    }  # fmt: skip
    assert set(said["resources"]["limits"]) == set(said["resources"]["requests"]) >= {"cpu", "memory"}
    environment = {one["name"]: one for one in said["env"]}
    token = environment["RAY_AUTH_TOKEN_PATH"]["value"]
    (mount,) = [one for one in said["volumeMounts"] if token.startswith(f"{one['mountPath']}/")]
    (volume,) = [one for one in pod["volumes"] if one["name"] == mount["name"]]
    assert mount["readOnly"] and volume["secret"]["secretName"] and volume["secret"]["defaultMode"] == 0o440
    assert {one["mountPath"] for one in said["volumeMounts"]} >= {environment["HOME"]["value"]}, "Ray writes there"


def test_a_raycronjob_selects_a_cluster_and_so_has_no_backoff() -> None:
    """KubeRay refuses both together, and a name that with a suffix would be too long."""
    said = yaml.safe_load(RAYCRONJOB.read_text())
    assert set(said["spec"]) <= {"schedule", "jobTemplate", "suspend", "timeZone"}
    assert said["spec"]["jobTemplate"]["clusterSelector"]["ray.io/cluster"]
    assert not said["spec"]["jobTemplate"].get("backoffLimit") and len(said["metadata"]["name"]) <= 30


def test_what_the_page_on_the_schedule_promises_has_tests() -> None:
    text = (CODE / "docs/schedule.md").read_text()
    table = text.split("## What happens when")[1].split("##")[0]
    rows = [line for line in table.splitlines() if line.startswith("|")][2:]
    assert rows
    for row in rows:
        shown = re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", row)
        assert shown, f"no test: {row}"
        for path, test in shown:
            assert f"def {test}(" in (CODE / path).read_text(), f"{path}::{test}"
