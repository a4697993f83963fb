#!/usr/bin/env python3
"""Are the versions that are pinned still good ones? By those who know of vulnerabilities, and by the registry itself.

    infra/audit.py constraints.txt
    infra/audit.py constraints.txt --vulnerability-service osv --osv-url https://osv.example.org/v1/query

pip-audit asks a service for advisories. One that has none calls everything clean, so each is first asked about a
version that everybody knows to be vulnerable. Where no service knows that, nothing is audited for vulnerabilities, and
that is said. Then pip asks the registries that it is set up with for each pin, as for an installation: one that is not
there (a project in quarantine offers nothing) or that was yanked fails. What is wrong is told, and the exit code is 1.
"""

import importlib.util
import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

KNOWN = "pillow==9.0.0"
"""Has a dozen advisories (CVE-2022-22817 is one)."""
SERVICES = (["--vulnerability-service", "pypi"], ["--vulnerability-service", "osv"])
YANKED = re.compile(r"yanked version: '(\S+)' candidate \(version (\S+) .*\nReason for being yanked: (.*)")
"""As pip warns of it; its report says so too, since 23.3."""


def advisories(file: Path, service: list[str]) -> tuple[dict[str, Any] | None, str]:
    """Ask a service about the pins of a file.

    Returns:
        What pip-audit reports, or None if it came to no end; and what it said besides.
    """
    flags = ["--no-deps", "--disable-pip", "--progress-spinner", "off", "--format", "json"]
    command = [sys.executable, "-m", "pip_audit", "--requirement", file, *flags, *service]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    try:
        return dict(json.loads(done.stdout)), done.stderr
    except ValueError:
        return None, done.stderr


def knows(service: list[str]) -> bool:
    """Whether a service has advisories at all; why not is printed."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "known.txt"
        file.write_text(f"{KNOWN}\n")
        report, words = advisories(file, service)
    known = bool(report and any(one.get("vulns") for one in report["dependencies"]))
    if not known:
        said = "it calls that one clean" if report else (words.strip().splitlines() or ["nothing"])[-1]
        print(f"of no use: {' '.join(service)}: {said}")
    return known


def vulnerable(file: Path, services: list[list[str]]) -> list[str]:
    """Return what is wrong with the pins of a file by the first service that knows anything."""
    if importlib.util.find_spec("pip_audit") is None:
        return ["pip-audit is not here, so nothing was audited: pip install -e '.[test]'"]
    service = next((one for one in services if knows(one)), None)
    if service is None:
        print(
            f"NOT AUDITED for known vulnerabilities: no advisory service can be reached that knows of those of {KNOWN} "
            f"(asked: {', '.join(' '.join(one) for one in services)})"
        )
        return []
    report, words = advisories(file, service)
    if report is None:
        return [f"pip-audit came to no end: {words.strip()[-2000:]}"]
    pins = report["dependencies"]
    print(f"audited for known vulnerabilities: {len(pins)} pins, by {' '.join(service)}")
    return [f"{pin['name']}: not audited: {pin['skip_reason']}" for pin in pins if "vulns" not in pin] + [
        f"{pin['name']} {pin['version']}: {' '.join([found['id'], *found['aliases']])}, "
        f"mended in {', '.join(found['fix_versions']) or 'no version'}"
        for pin in pins
        for found in pin.get("vulns", [])
    ]


def gone(file: Path) -> list[str]:
    """Return what is wrong with the pins of a file by the registries: it is not there, or was taken back."""
    command = [sys.executable, "-m", "pip", "install", "--dry-run", "--ignore-installed", "--no-deps", "--quiet"]
    done = subprocess.run(
        [*command, "--report", "-", "--requirement", file], capture_output=True, text=True, check=False
    )
    if done.returncode:
        errors = [line for line in done.stderr.splitlines() if line.startswith("ERROR:")]
        return errors or [f"pip came to no end: {done.stderr.strip()[-2000:]}"]
    found = json.loads(done.stdout)["install"]
    own = [one["metadata"]["name"] for one in found if one["download_info"]["url"].startswith("file:")]
    print(f"asked for at the registry: {len(found) - len(own)} pins; {len(own)} lie on this machine, and were not")
    return [f"{name} {version} was yanked: {reason}" for name, version, reason in YANKED.findall(done.stderr)]


def main(argv: list[str]) -> int:
    """Audit a file of pins; return the exit code."""
    file, service = Path(argv[0] if argv else "constraints.txt"), argv[1:]
    wrong = vulnerable(file, [service] if service else [*SERVICES]) + gone(file)
    for line in wrong:
        print(f"WRONG: {line}")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
