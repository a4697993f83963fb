"""The law at the door of the layer, asked of a fresh interpreter."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
MODULES = sorted(f"models.{path.stem}" for path in (ROOT / "models").glob("*.py") if path.stem != "__init__")
FORBIDDEN = {"ray", "mlflow", "pyarrow", "fsspec", "s3fs", "PIL", "tyro", "pydantic", "yaml", "sklearn"}

# torch is imported first: what torch itself brings or sets up is not the layer's doing.
PROGRAM = f"""
import hashlib, importlib, json, os, random, sys, threading
import numpy, torch

def outside():
    return {{
        "environment": dict(os.environ),
        "working directory": os.getcwd(),
        "python's generator": hashlib.sha256(repr(random.getstate()).encode()).hexdigest(),
        "numpy's generator": hashlib.sha256(repr(numpy.random.get_state()[1].tolist()).encode()).hexdigest(),
        "torch's generator": hashlib.sha256(torch.get_rng_state().numpy().tobytes()).hexdigest(),
        "default dtype": str(torch.get_default_dtype()),
        "threads of torch": torch.get_num_threads(),
        "threads": threading.active_count(),
        "gradients": torch.is_grad_enabled(),
        "cuda": torch.cuda.is_initialized(),
    }}

before, modules_before = outside(), set(sys.modules)
for name in {MODULES!r}:
    importlib.import_module(name)
print(json.dumps({{"before": before, "after": outside(), "all": sorted(sys.modules),
                  "new": sorted(set(sys.modules) - modules_before)}}))
"""


@pytest.fixture(scope="module")
def import_of_all():
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", PROGRAM], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stderr == ""
    [line] = done.stdout.splitlines()  # an import that prints would add another
    return json.loads(line)


def test_every_module_of_the_layer_was_imported(import_of_all):
    assert len(MODULES) >= 10
    assert set(MODULES) <= set(import_of_all["all"])


def test_the_layer_imports_torch_and_nothing_that_flows(import_of_all):
    assert {name.partition(".")[0] for name in import_of_all["all"]} & FORBIDDEN == set()


def test_the_layer_imports_none_of_the_layers_above(import_of_all):
    assert {name.partition(".")[0] for name in import_of_all["new"]} & {"pipelines", "jobs"} == set()


def test_importing_the_layer_changes_nothing_outside_it(import_of_all):
    assert import_of_all["after"] == import_of_all["before"]
