"""docs/security.md promises nothing that no test shows, and points at nothing that is not there."""

import re

from tests.processes import CODE

TEXT = (CODE / "docs" / "security.md").read_text()


def test_what_stands_against_each_attempt_is_there_and_shown() -> None:
    table = [line for line in TEXT.splitlines() if line.startswith("|")]
    assert table[0].startswith("| attempt |") and len(table) > 12
    for row in table[2:]:
        *_, where, shown, _ = row.split("|")
        tests = re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", shown)
        assert tests, f"no test: {row}"
        for path, test in tests:
            assert f"def {test}(" in (CODE / path).read_text(), f"{path}::{test}"
        for path in re.findall(r"`((?:infra|pipelines|jobs)/[\w/.*-]+)`", where):
            assert list(CODE.glob(path)), path
