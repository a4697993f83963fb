"""The image, the compose file and the scripts: linted, held against schemas, run as far as that goes without Docker."""

import re
import subprocess
import sys
import tomllib
import warnings
from pathlib import Path
from typing import Any

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from ray.scripts.scripts import start

from tests.infra.tools import CODE, INFRA, KUBERNETES, run

DOCKERFILE = INFRA / "image" / "Dockerfile"
COMPOSE = INFRA / "compose.yaml"
STACK: dict[str, Any] = yaml.safe_load(COMPOSE.read_text())
SCRIPTS = sorted(
    path for path in INFRA.rglob("*")
    if path.is_file() and (path.suffix == ".sh" or re.match(rb"#!.*\b(ba|da)?sh\b", path.read_bytes()[:64]))
)  # fmt: skip


def lint(text: str, tmp_path: Path) -> subprocess.CompletedProcess[str]:
    (tmp_path / "Dockerfile").write_text(text)
    return run("hadolint", tmp_path / "Dockerfile")


def test_the_dockerfile_is_clean(tmp_path: Path) -> None:
    done = lint(DOCKERFILE.read_text(), tmp_path)
    assert done.returncode == 0, done.stdout
    assert lint(DOCKERFILE.read_text().replace("USER 1000:100", "USRE 1000:100"), tmp_path).returncode != 0


def test_images_have_versions_and_are_not_root() -> None:
    text = DOCKERFILE.read_text()
    assert [line for line in text.splitlines() if line.startswith("FROM")] == [
        "FROM python:3.11.14-slim-bookworm AS requirements",
        "FROM rayproject/ray:2.60.0-py311-${DEVICE} AS ray",
        "FROM python:3.11.14-slim-bookworm AS mlflow",
    ]
    assert "ray==2.60.0\n" in (CODE / "constraints.txt").read_text(), "that of the image"
    for stage in text.split("FROM ")[2:]:
        assert re.search(r"^USER [1-9]\d*:\d+$", stage, re.MULTILINE)


def test_what_the_images_install_is_what_the_project_needs_and_pinned(tmp_path: Path) -> None:
    """The command of the Dockerfile, run: each line that it writes has its version in constraints.txt."""
    (command,) = re.findall(r'^RUN (python -c "(?:.|\n)*?")$', DOCKERFILE.read_text(), re.MULTILINE)
    (tmp_path / "pyproject.toml").write_bytes((CODE / "pyproject.toml").read_bytes())
    script = command.replace("python -c", f"{sys.executable} -c", 1)
    subprocess.run(["/bin/sh", "-c", script], cwd=tmp_path, check=True)
    project = tomllib.loads((CODE / "pyproject.toml").read_text())["project"]
    pins = dict(line.split("==") for line in (CODE / "constraints.txt").read_text().splitlines() if "==" in line)
    pins = {canonicalize_name(name): version for name, version in pins.items()}
    said = {name: (tmp_path / name).read_text().splitlines() for name in ("ray.txt", "mlflow.txt")}
    assert said["ray.txt"] == [*project["dependencies"], "boto3"]
    assert said["mlflow.txt"] == project["optional-dependencies"]["server"]
    for line in said["ray.txt"] + said["mlflow.txt"]:
        wanted = Requirement(line)
        assert wanted.specifier.contains(pins[canonicalize_name(wanted.name)]), line


def test_nothing_but_what_is_copied_goes_to_docker() -> None:
    """No secret, no data, no code: an image that is pushed holds none."""
    lines = [line for line in (CODE / ".dockerignore").read_text().splitlines() if line and not line.startswith("#")]
    copied = re.findall(r"^COPY (?:--\S+ )*(.+) \S+$", DOCKERFILE.read_text(), re.MULTILINE)
    assert lines[0] == "*"
    assert {line.removeprefix("!") for line in lines[1:]} == {name for names in copied for name in names.split()}
    assert all((CODE / line.removeprefix("!")).exists() for line in lines[1:])


def test_there_are_scripts() -> None:
    names = {"up", "down", "stack.sh", "s3.sh", "mlflow.sh", "common.sh", "promtool.sh"}
    assert {path.name for path in SCRIPTS} >= names


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_a_script_is_clean(path: Path) -> None:
    done = run("shellcheck", path)
    assert done.returncode == 0, done.stdout


def test_shellcheck_looks(tmp_path: Path) -> None:
    (tmp_path / "bad.sh").write_text("#!/bin/sh\nrm -rf $1/*\n")
    assert run("shellcheck", tmp_path / "bad.sh").returncode != 0


def compose(text: str, tmp_path: Path) -> subprocess.CompletedProcess[str]:
    (tmp_path / "compose.yaml").write_text(text)
    return run("check-jsonschema", "--builtin-schema", "vendor.compose-spec", tmp_path / "compose.yaml")


def test_the_compose_file_is_what_the_schema_says(tmp_path: Path) -> None:
    done = compose(COMPOSE.read_text(), tmp_path)
    assert done.returncode == 0, done.stdout
    for right, typo in (("depends_on", "depend_on"), ("healthcheck", "healthchecks"), ("shm_size", "shmsize")):
        assert compose(COMPOSE.read_text().replace(right, typo), tmp_path).returncode != 0


def test_only_loopback_is_published_and_nothing_starts_without_secrets() -> None:
    for service in STACK["services"].values():
        assert all(port.startswith("127.0.0.1:") for port in service.get("ports", []))
    used = set(re.findall(r"\$\{(\w+):\?", COMPOSE.read_text()))
    used |= {secret["environment"] for secret in STACK["secrets"].values()}
    (recipe,) = re.findall(r"for name in ([A-Z0-9_ ]+);", COMPOSE.read_text())
    assert set(recipe.split()) == used, "the head of the file makes what the file needs"
    assert not re.search(r"\$\{\w+\}|\$\{\w+:-", COMPOSE.read_text()), "a secret that is not there is not an empty one"
    assert "infra/.env" in (CODE / ".gitignore").read_text()


def test_the_recipe_for_secrets_makes_them(tmp_path: Path) -> None:
    head = [line.removeprefix("#   ") for line in COMPOSE.read_text().splitlines()[2:4]]
    (tmp_path / "infra").mkdir()
    subprocess.run(["/bin/sh", "-c", "\n".join(head)], cwd=tmp_path, check=True)
    made = dict(line.split("=") for line in (tmp_path / "infra/.env").read_text().splitlines())
    assert len(made) == len(set(made.values())) == 5
    assert all(re.fullmatch("[0-9a-f]{64}", value) for value in made.values())
    assert (tmp_path / "infra/.env").stat().st_mode & 0o077 == 0


def test_ray_asks_for_a_token_and_takes_the_flags() -> None:
    for name in ("head", "worker"):
        service = STACK["services"][name]
        assert service["command"][:2] == ["ray", "start"]
        start.make_context("start", list(service["command"][2:]))
        assert service["environment"]["RAY_AUTH_MODE"] == "token"
        assert service["environment"]["RAY_AUTH_TOKEN_PATH"].rsplit("/", 1)[-1] in service["secrets"]


def settings() -> dict[str, dict[str, str]]:
    """Of the MLflow server, where it is started."""
    base = yaml.safe_load((KUBERNETES / "base/kustomization.yaml").read_text())
    (literals,) = [one["literals"] for one in base["configMapGenerator"] if one["name"] == "mlflow-settings"]
    return {
        "compose": STACK["services"]["mlflow"]["environment"],
        "kubernetes": dict(literal.split("=", 1) for literal in literals),
    }


@pytest.mark.parametrize("where", ["compose", "kubernetes"])
def test_mlflow_takes_its_settings(where: str) -> None:
    """Those that its command line reads, those that its users' page reads, and none that it would not notice."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of a future of its own, while it is imported
        from mlflow.cli import cli
    server = cli.commands["server"]
    (command,) = re.findall(r'^CMD \["mlflow", "server", (.+)\]$', DOCKERFILE.read_text(), re.MULTILINE)
    server.make_context("server", [word.strip(' "') for word in command.split(",")])
    known = {parameter.envvar for parameter in server.params}
    known |= {"MLFLOW_AUTH_CONFIG_PATH", "MLFLOW_FLASK_SERVER_SECRET_KEY"}
    said = settings()[where]
    assert {name for name in said if name.startswith("MLFLOW_")} <= known
    assert "basic-auth" in command and said["MLFLOW_AUTH_CONFIG_PATH"] and said["MLFLOW_SERVER_ALLOWED_HOSTS"]
    assert "*" not in said["MLFLOW_SERVER_ALLOWED_HOSTS"], "names, not whoever comes"
    assert said["MLFLOW_BACKEND_STORE_URI"] == "postgresql+psycopg://mlflow@postgres/mlflow", "and no password in it"


def test_the_same_servers_everywhere() -> None:
    """One version of each image that is not ours."""
    found: dict[str, set[str]] = {}
    for path in [COMPOSE, *KUBERNETES.rglob("*.yaml")]:
        for name, tag in re.findall(r"image: (chrislusf/seaweedfs|postgres):([\w.-]+)", path.read_text()):
            found.setdefault(name, set()).add(tag)
    assert {name: len(tags) for name, tags in found.items()} == {"chrislusf/seaweedfs": 1, "postgres": 1}
