"""infra/audit.py against a real registry and a real advisory service, as small as they can be: each finding turns it
red, and a service that has no advisories is not taken for a clean bill."""

import hashlib
import io
import json
import os
import subprocess
import sys
import threading
import zipfile
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from tests.infra.tools import INFRA

CLEAN = "beam==1.0\nslab==2.0\n"


def wheel(name: str, version: str) -> bytes:
    """The smallest package that pip takes; each time the same bytes, since the page says their digest beforehand."""
    buffer, about = io.BytesIO(), f"{name}-{version}.dist-info"
    parts = {
        "METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n",
        "WHEEL": "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        "RECORD": "",
    }
    with zipfile.ZipFile(buffer, "w") as file:
        for part, text in parts.items():
            file.writestr(zipfile.ZipInfo(f"{about}/{part}"), text)  # dated 1980, where a bare name is dated now
    return buffer.getvalue()


class Registry(ThreadingHTTPServer):
    """A package registry that speaks the Simple API, and a service of advisories that speaks OSV's."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Answers)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.yanked: dict[str, bool | str] = {}
        self.versions = {"beam": ["1.0"], "slab": ["2.0"], "held": []}
        """A project in quarantine is there, and has no files."""
        self.advisories = {("pillow", "9.0.0"): "CVE-2022-22817"}


class Answers(BaseHTTPRequestHandler):
    server: Registry

    def do_GET(self) -> None:
        kind, _, name = self.path.strip("/").partition("/")
        if kind == "simple" and name in self.server.versions:
            page = {"meta": {"api-version": "1.4"}, "name": name, "files": [*self.files(name)]}
            self.answer(json.dumps(page).encode(), "application/vnd.pypi.simple.v1+json")
        elif kind == "files":
            self.answer(wheel(*name.split("-")[:2]), "application/octet-stream")
        else:
            self.send_error(404)

    def files(self, name: str) -> Iterator[dict[str, object]]:
        for version in self.server.versions[name]:
            file = f"{name}-{version}-py3-none-any.whl"
            digest = hashlib.sha256(wheel(name, version)).hexdigest()
            yanked = self.server.yanked.get(f"{name}=={version}", False)
            yield {"filename": file, "url": f"/files/{file}", "hashes": {"sha256": digest}, "yanked": yanked}

    def do_POST(self) -> None:
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        name = asked["package"]["name"]
        found = self.server.advisories.get((name, asked["version"]))
        events = [{"introduced": "0"}, {"fixed": "99"}]
        affected = {"package": asked["package"], "ranges": [{"type": "ECOSYSTEM", "events": events}]}
        answer = {"vulns": [{"id": found, "summary": "bad", "affected": [affected]}]} if found else {}
        self.answer(json.dumps(answer).encode(), "application/json")

    def answer(self, body: bytes, kind: str) -> None:
        self.send_response(200)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def registry() -> Iterator[Registry]:
    registry = Registry()
    thread = threading.Thread(target=registry.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    yield registry
    registry.shutdown()
    registry.server_close()
    thread.join()


def audit(registry: Registry, folder: Path, pins: str = CLEAN, service: str = "") -> tuple[int, str]:
    (folder / "pins.txt").write_text(pins)
    others = {name: value for name, value in os.environ.items() if not name.startswith("PIP_")}
    flags = ["--vulnerability-service", "osv", "--osv-url", service or f"{registry.url}/v1/query"]
    done = subprocess.run(
        [sys.executable, INFRA / "audit.py", folder / "pins.txt", *flags],
        env=others | {"PIP_INDEX_URL": f"{registry.url}/simple", "PIP_CONFIG_FILE": os.devnull},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert not done.stderr
    return done.returncode, done.stdout


def test_what_is_good_passes_and_says_what_was_asked(registry: Registry, tmp_path: Path) -> None:
    code, said = audit(registry, tmp_path)
    assert code == 0, said
    assert "audited for known vulnerabilities: 2 pins, by --vulnerability-service osv" in said
    assert "asked for at the registry: 2 pins; 0 lie on this machine" in said


def test_a_vulnerable_pin_fails(registry: Registry, tmp_path: Path) -> None:
    registry.advisories["slab", "2.0"] = "CVE-2026-1"
    code, said = audit(registry, tmp_path)
    assert code == 1 and "WRONG: slab 2.0: CVE-2026-1, mended in 99" in said


@pytest.mark.parametrize("service", ["empty", "away"])
def test_who_knows_of_nothing_is_not_believed(service: str, registry: Registry, tmp_path: Path) -> None:
    """Not even where it calls all pins clean; the rest is looked at all the same."""
    registry.advisories.clear()
    registry.yanked["slab==2.0"] = True
    code, said = audit(registry, tmp_path, service="http://127.0.0.1:1/v1/query" if service == "away" else "")
    assert "NOT AUDITED for known vulnerabilities" in said and "audited for known vulnerabilities: " not in said
    assert ("it calls that one clean" if service == "empty" else "refused") in said.splitlines()[0]
    assert code == 1 and "slab 2.0 was yanked" in said


def test_without_pip_audit_it_fails(tmp_path: Path) -> None:
    """By a Python that knows of no packages."""
    (tmp_path / "pins.txt").write_text(CLEAN)
    command = [sys.executable, "-S", INFRA / "audit.py", tmp_path / "pins.txt"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 1 and "WRONG: pip-audit is not here" in done.stdout


@pytest.mark.parametrize("reason", [True, "it eats files"])
def test_a_yanked_pin_fails(reason: bool | str, registry: Registry, tmp_path: Path) -> None:
    registry.yanked["slab==2.0"] = reason
    code, said = audit(registry, tmp_path)
    assert code == 1 and "WRONG: slab 2.0 was yanked: " in said
    assert "beam" not in said and (reason is True or reason in said)


@pytest.mark.parametrize("pin", ["held==1.0", "beam==1.1", "crane==1.0"])
def test_a_pin_that_is_not_there_fails(pin: str, registry: Registry, tmp_path: Path) -> None:
    """Not as a version, not at all, or not any more: a project in quarantine."""
    code, said = audit(registry, tmp_path, CLEAN.replace("beam==1.0", pin))
    assert code == 1 and f"WRONG: ERROR: No matching distribution found for {pin}" in said
