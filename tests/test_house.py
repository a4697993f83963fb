"""The rules of the house that a machine can keep."""

import ast
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from jobs.cli import parse
from jobs.presets import PRESETS
from pipelines.config import TrainJob
from pipelines.sample_config import SampleJob

ROOT = Path(__file__).parents[1]
JOBS = sorted(path for path in (ROOT / "jobs").glob("*.py") if path.name not in ("__init__.py", "cli.py", "presets.py"))
SOURCES = sorted(path for layer in ("models", "pipelines", "jobs") for path in (ROOT / layer).glob("*.py"))


def imports(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module or ""


@pytest.mark.parametrize("path", JOBS, ids=lambda path: path.name)
def test_an_entry_point_is_thin(path: Path) -> None:
    """What an entry script defines is pickled by value and becomes a second class: it defines only main."""
    tree = ast.parse(path.read_text())
    assert not [node for node in ast.walk(tree) if isinstance(node, ast.ClassDef | ast.For | ast.While)]
    assert [node.name for node in tree.body if isinstance(node, ast.FunctionDef)] == ["main"]
    assert path.stat().st_mode & 0o111, "the executable bit, for ray job submit -- jobs/…"
    assert path.read_text().startswith("#!/usr/bin/env python3\n")


def test_four_files_import_mlflow() -> None:
    assert [path.name for path in SOURCES if any(name.split(".")[0] == "mlflow" for name in imports(path))] == [
        "mlflow_find.py",
        "mlflow_models.py",
        "mlflow_registry.py",
        "mlflow_run.py",
    ]


def test_the_loop_imports_neither_ray_nor_mlflow() -> None:
    code = "import sys, pipelines.fit; print({'ray', 'mlflow', 'pyarrow', 'tyro'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


@pytest.mark.parametrize("module", ["stream", "read_back"])
def test_a_read_task_needs_no_torch(module: str) -> None:
    code = f"import sys, pipelines.{module}; print({{'torch', 'mlflow', 'tyro', 'sklearn'}} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


def test_no_global_generator_is_drawn_from() -> None:
    """In torch, numpy and random: whatever is drawn goes through models.noise."""
    drawing = {"rand", "randn", "randint", "randperm", "manual_seed", "seed", "shuffle", "normal_", "uniform_"}
    drawing |= {"rand_like", "randn_like", "default_rng", "choice"}
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
                assert node.func.attr not in drawing, f"{path}:{node.lineno}"
        assert "random" not in {name.split(".")[0] for name in imports(path)}, path


def test_no_pickle_is_read() -> None:
    """But for what a job hands to its own tasks, and the index of a checkpoint, from which only an index can come."""
    unpicklers, programs = {"pickle", "cloudpickle", "dill", "joblib", "shelve", "marshal"}, set()
    assert {path.name for path in SOURCES if unpicklers & set(imports(path))} == {"parts.py", "dcp_files.py"}
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call):
                called = ast.unparse(node.func)
                assert called not in ("torch.load", "np.load") or "allow_pickle=False" in ast.unparse(node), path
                assert called not in ("eval", "exec", "yaml.load", "yaml.unsafe_load"), path
                programs |= {path.name} if called in ("torch.jit.load", "torch.export.load") else set()
    assert programs == {"file_features.py"}, "which runs a file that was named by its sha256"


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_a_file_is_one_room(path: Path) -> None:
    assert len(path.read_text().splitlines()) <= 320


@pytest.mark.parametrize("path", JOBS, ids=lambda path: path.name)
def test_help_says_every_setting_and_the_exit_codes(path: Path) -> None:
    done = subprocess.run(
        [sys.executable, path, "--help"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
        env={"PATH": "", "COLUMNS": "200", "HOME": "/nonexistent"},
    )
    assert "75 try again" in done.stdout
    assert "--config" in done.stdout and "--dry-run" in done.stdout
    assert done.stderr == ""
    if path.name == "train.py":
        assert all(preset in done.stdout for preset in PRESETS)
        assert "--fit.learning-rate" in done.stdout and "Of AdamW, after the warm-up." in done.stdout


DOCUMENTS = [
    ROOT / "README.md",
    ROOT / "infra" / "README.md",
    ROOT / "benchmarks" / "README.md",
    *(ROOT / "docs").glob("*.md"),
]
PARSERS: dict[str, tuple[Any, Any]] = {"train": (TrainJob, PRESETS), "sample": (SampleJob, {})}


def commands() -> Iterator[tuple[str, list[str]]]:
    """The commands of the documents for these jobs, and their words; those with something left out are none."""
    for document in DOCUMENTS:
        for line in re.findall(r"^    (?:[^\n]*\\\n)*[^\n]*$", document.read_text(), re.MULTILINE):
            found = re.search(r"\bjobs[/.](\w+)(?:\.py)? ([^|;)]*)", line.replace("\\\n", " "))
            if found and found[1] in PARSERS and "…" not in found[2]:
                yield found[1], shlex.split(found[2], comments=True)


def test_the_commands_of_the_documents_are_ones() -> None:
    """By the jobs' own parsers: unknown flags, and settings that do not go together, are refused."""
    found = list(commands())
    for job, words in found:
        parse(*PARSERS[job], [word for word in words if word != "--dry-run"])
    assert {job for job, _ in found} == {*PARSERS} and len(found) > 10


def test_what_the_documents_link_to_is_there() -> None:
    """Files, and headings in them by GitHub's way of naming them."""
    for document in DOCUMENTS:
        links = re.findall(r"\]\((?!https://)([^)#]*)#?([^)]*)\)", document.read_text())
        assert links or document.parent != ROOT
        for path, heading in links:
            target = document.parent / path if path else document
            assert target.exists(), f"{document.name}: {path}"
            headings = re.findall(r"(?m)^#+ (.*)$", target.read_text()) if heading else []
            names = [re.sub(r"[^\w -]", "", words.lower()).replace(" ", "-") for words in headings]
            assert not heading or heading in names, f"{document.name}: {path}#{heading}"
