"""docs/faults.md promises nothing that no test shows."""

import re

from tests.processes import CODE

WANTED = (
    "a worker dies",
    "the driver dies",
    "a node is about to be taken away",
    "fewer workers, and more",
    "another number of workers",
    "storage fails while images are read",
    "killed while a checkpoint is uploaded",
    "a checkpoint that is damaged",
    "storage fails while a checkpoint is written",
    "MLflow is away",
    "the disk is full",
    "a worker stands still",
    "a gradient that is not finite",
    "fewer images than a batch",
    "SIGTERM",
    "the controller of Ray Train dies",
)
"""What a run is to survive: none of these may be struck from the table."""


def lines() -> list[str]:
    text = (CODE / "docs" / "faults.md").read_text()
    table = [line for line in text.splitlines() if line.startswith("|")]
    assert table[0].startswith("| fault | injected |")
    return table[2:]


def shown_by(line: str) -> list[tuple[str, str]]:
    return re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", line)


def test_each_line_of_the_table_has_its_tests() -> None:
    assert lines()
    for line in lines():
        assert shown_by(line), f"no test: {line}"
        for path, test in shown_by(line):
            assert f"def {test}(" in (CODE / path).read_text(), f"{path}::{test}"


def test_the_table_has_all_faults() -> None:
    told = [line.split("|")[1].strip() for line in lines()]
    assert len(set(told)) == len(told)
    for fault in WANTED:
        assert any(line.startswith(fault) for line in told), fault


def test_make_test_faults_runs_all_that_the_table_names() -> None:
    makefile = (CODE / "Makefile").read_text().replace("\\\n", " ")
    (recipe,) = re.findall(r"^test-faults:.*\n\t(.*)$", makefile, re.MULTILINE)
    command, *words = recipe.split("pytest")[1].split()
    run = {command, *words}
    assert all(word.startswith("tests/") for word in run), "nothing deselects any"
    for line in lines():
        for path, _ in shown_by(line):
            assert any(path == word or path.startswith(f"{word}/") for word in run), f"{path} is not run: {line}"
