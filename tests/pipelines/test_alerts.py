"""Alerts reach a real server, and one that takes none changes nothing and learns no more of a secret than it has."""

import json
import logging

import pytest

from pipelines.alerts import alert
from tests.webhook import Webhook

ABOUT = {"slot": "2026-11-26T03:00Z", "state": "failed", "error": "two\nlines, äöü", "links": {"folder": "s3://a/b"}}


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipelines.alerts.PAUSE_S", 0.01)


def test_it_is_posted_once_and_logged_in_one_line(caplog: pytest.LogCaptureFixture) -> None:
    with Webhook() as hook:
        assert alert(hook.url, ABOUT)
    assert hook.got == [ABOUT]
    (record,) = [record for record in caplog.records if record.name == "brickyard.alert"]
    assert record.levelno == logging.ERROR and record.getMessage() == f"ALERT {json.dumps(ABOUT)}"
    assert "\n" not in record.getMessage()


def test_without_a_webhook_it_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    assert not alert("", ABOUT)
    assert "ALERT" in caplog.text


@pytest.mark.parametrize(
    ("answers", "asked", "taken"),
    [
        ([500, 503], 3, True), ([429], 2, True), ([500, 500, 500], 3, False), ([404], 1, False), ([302], 1, False),
        ([0, 0, 0], 3, False), ([0], 2, True),
    ],
)  # fmt: skip
def test_a_server_that_does_not_take_it(
    answers: list[int], asked: int, taken: bool, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    if 0 in answers:  # an answer that never comes
        monkeypatch.setattr("pipelines.alerts.PATIENCE_S", 3.0)
    with Webhook() as hook:
        hook.answers = answers
        assert alert(hook.url, ABOUT) == taken
        assert hook.got == [ABOUT] * asked
    assert ("the webhook at 127.0.0.1 was not told" in caplog.text) != taken
    assert "s3cret" not in caplog.text


@pytest.mark.parametrize(
    "url",
    ["http://127.0.0.1:1/s3cret", "http://[s3cret", "s3cret", "ftp://127.0.0.1/s3cret", "http://u:s3cret@127.0.0.1:1/",
     "http://127.0.0.1:99999/s3cret", "https://127.0.0.1:1/s3cret?s3cret"],
)  # fmt: skip
def test_an_address_where_nobody_is(url: str, caplog: pytest.LogCaptureFixture) -> None:
    assert not alert(url, ABOUT)
    assert "was not told" in caplog.text and "s3cret" not in caplog.text
