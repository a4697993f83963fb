"""docs/faults.md promises nothing that no test shows."""

import re

from tests.processes import CODE

WANTED = {*range(1, 6), *range(7, 11), 13, 15, 22, 23, 24, 26, 27}
"""Of the faults that a run is to survive, those of training and of its record."""


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


def test_the_table_has_all_faults_and_no_others() -> None:
    found: set[int] = set()
    for line in lines():
        numbers = re.match(r"\| (\d+(?:, \d+)*) [^|\d]", line)
        assert numbers, f"no number: {line}"
        found |= {int(number) for number in numbers[1].split(", ")}
    assert found >= WANTED
    assert found <= set(range(1, 28)), "there are 27"


def test_make_test_faults_runs_all_that_the_table_names() -> None:
    makefile = (CODE / "Makefile").read_text().replace("\\\n", " ")
    (recipe,) = re.findall(r"^test-faults:.*\n\t(.*)$", makefile, re.MULTILINE)
    command, *words = recipe.split("pytest")[1].split()
    run = {command, *words}
    assert all(word.startswith("tests/") for word in run), "nothing deselects any"
    for line in lines():
        for path, _ in shown_by(line):
            assert any(path == word or path.startswith(f"{word}/") for word in run), f"{path} is not run: {line}"
