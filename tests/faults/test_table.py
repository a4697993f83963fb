"""docs/faults.md promises nothing that no test shows."""

import re

from tests.processes import CODE


def test_each_line_of_the_table_has_its_tests() -> None:
    text = (CODE / "docs" / "faults.md").read_text()
    lines = [line for line in text.splitlines() if re.match(r"\| \d", line)]
    assert lines
    for line in lines:
        named = re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", line)
        assert named, f"no test: {line}"
        for path, test in named:
            assert f"def {test}(" in (CODE / path).read_text(), f"{path}::{test}"
