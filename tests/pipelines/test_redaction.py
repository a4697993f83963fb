"""No secret in what is said, and all else as it was."""

import io
import json
import logging
import os
import re
import sys
from contextlib import redirect_stderr, redirect_stdout

import pytest

from pipelines.firing import RECORD, fire
from pipelines.firing_config import FiringConfig
from pipelines.redaction import LEAST, before_secret, guarded, redacted, redacted_in
from pipelines.slots import folder_name, instant
from pipelines.storage import Folder
from tests.webhook import Webhook


@pytest.fixture(autouse=True)
def nothing_in_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever is in that of this machine."""
    monkeypatch.setattr(os, "environ", {})


@pytest.mark.parametrize(
    ("said", "harmless"),
    [
        ("http://me:s3cret@host:5000/x", "http://***@host:5000/x"),
        ("http://me:12345678@host:5000/x", "http://***@host:5000/x"),
        ("postgresql+psycopg://u:s3cr@et@h/db", "postgresql+psycopg://***@h/db"),
        ("s3://AKIA:s3/cr+et@bucket/folder is", "s3://***@bucket/folder is"),
        ("https://s3cret@host/x", "https://***@host/x"),
        ("https://:s3cret@host/x", "https://***@host/x"),
        ("of 'ftp://u:s3cret@h/x'; http://h:1/a@b", "of 'ftp://***@h/x'; http://h:1/a@b"),
        ("https://b/k?X-Amz-Algorithm=A&X-Amz-Credential=s3cret%2F2026&X-Amz-Expires=9&X-Amz-Signature=s3cret",
         "https://b/k?X-Amz-Algorithm=A&X-Amz-Credential=***&X-Amz-Expires=9&X-Amz-Signature=***"),
        ("https://b/k?x-amz-security-token=s3cret%3D&y=1", "https://b/k?x-amz-security-token=***&y=1"),
        ("https://b/k?AWSAccessKeyId=s3cret&Signature=s3%2Bcret&Expires=1", "https://b/k?AWSAccessKeyId=***&Signature=***&Expires=1"),
        ("https://b/k?X-Goog-Signature=s3cret", "https://b/k?X-Goog-Signature=***"),
        ("https://a/k?sv=2026&sig=s3cret%3D&se=1", "https://a/k?sv=2026&sig=***&se=1"),
        ("https://h/x?token=s3cret#y", "https://h/x?token=***"),
        ("host=h password=s3cret dbname=x", "host=h password=*** dbname=x"),
        ("MLFLOW_TRACKING_PASSWORD=s3cret AWS_SECRET_ACCESS_KEY=s3/cret",
         "MLFLOW_TRACKING_PASSWORD=*** AWS_SECRET_ACCESS_KEY=***"),
        ("{'Authorization': 'Basic czNjcmV0', 'Host': 'h'}", "{'Authorization': 'Basic ***', 'Host': 'h'}"),
        ('{"authorization": "Bearer s3cret"}', '{"authorization": "Bearer ***"}'),
        ("Authorization: Bearer s3cret\r\nHost: h", "Authorization: Bearer ***\r\nHost: h"),
        ("b'Authorization': b'AWS4-HMAC-SHA256 Credential=s3cret/us/s3, SignedHeaders=host, Signature=s3cret'",
         "b'Authorization': b'AWS4-HMAC-SHA256 Credential=***, SignedHeaders=host, Signature=***'"),
        ("'x-amz-security-token': 's3cret//=='", "'x-amz-security-token': '***'"),
        ("X-Amz-Security-Token: s3cret", "X-Amz-Security-Token: ***"),
        ("[('X-Amz-Security-Token', 's3cret')]", "[('X-Amz-Security-Token', '***')]"),
        ("SignedHeaders=host;x-amz-security-token, Signature=s3cret",
         "SignedHeaders=host;x-amz-security-token, Signature=***"),
        (r'{\"X-Amz-Security-Token\": \"s3cret\"}', r'{\"X-Amz-Security-Token\": \"***\"}'),
        ("sent Basic YnJpY2t5YXJkOnMzY3JldA== there", "sent Basic *** there"),
        ("PGPASSWORD=s3cret psql", "PGPASSWORD=*** psql"),
    ],
)  # fmt: skip
def test_a_secret_is_known_by_its_form(said: str, harmless: str) -> None:
    assert redacted(said) == redacted(redacted(said)) == harmless
    assert before_secret(said)


@pytest.mark.parametrize(
    ("said", "harmless"),
    [
        ("password: s3cret", "password: ***"),
        ("{'password': 's3cret', 'user': 'me'}", "{'password': '***', 'user': 'me'}"),
        ('{"aws_secret_access_key": "s3/cret+"}', '{"aws_secret_access_key": "***"}'),
        ("[default]\naws_secret_access_key = s3cret\nregion = x", "[default]\naws_secret_access_key = ***\nregion = x"),
        ("'auth_token': b's3cret'", "'auth_token': b'***'"),
    ],
)
def test_a_secret_is_known_by_the_word_before_it(said: str, harmless: str) -> None:
    """Where it is said; a setting may have such words in its text."""
    assert redacted(said) == redacted(redacted(said)) == harmless
    assert not before_secret(said)


def test_words_about_secrets_stay() -> None:
    for said in ("the password is wrong", "a user or a password, and configurations are kept", "secret key, as token"):
        assert redacted(said) == said


@pytest.mark.parametrize(
    "said",
    [
        "http://127.0.0.1:5000/#/models/digits@champion", "models:/digits@champion", "http://[::1]:5000/a@b",
        "abfs://container@account.dfs.core.windows.net/x", "postgresql+psycopg://mlflow@127.0.0.1:5001/mlflow",
        "sqlite:////home/me@work/mlflow.db", "file:///a:b@c", "s3://bucket/t=3/signature/x?versionId=8",
        "Basic understanding of bearers-of-long-names", "tokens=3 and a token: set it", "authorization: denied to me",
        "http://host:5000, or mail to me@example.org", "Unrecognized options: --fit.learning-rat",
    ],
)  # fmt: skip
def test_what_is_no_secret_is_left_as_it_is(said: str) -> None:
    assert redacted(said) == said
    assert not before_secret(said)


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("AWS_SECRET_ACCESS_KEY", "wJalr/XUt+nFEMI", "it is wJalr/XUt+nFEMI"),
        ("AWS_SECRET_ACCESS_KEY", "wJalr/XUt+nFEMI", "?key=wJalr%2FXUt%2BnFEMI"),
        ("AWS_SESSION_TOKEN", "FwoGZXIvYXdzEB", "for FwoGZXIvYXdzEB."),
        ("MLFLOW_TRACKING_PASSWORD", 'quo"ted\\pass', json.dumps({"a": 'with quo"ted\\pass'})),
        ("MLFLOW_TRACKING_PASSWORD", "größer-als", repr("größer-als".encode().decode("latin-1")) + "größer-als"),
        ("MLFLOW_TRACKING_TOKEN", "0123456789abcdef", "token 0123456789abcdef"),
        ("RAY_AUTH_TOKEN", "0123456789abcdef", "x0123456789abcdefx"),
        ("BRICKYARD_ALERT_URL", "https://hooks.example.org/T0/B0/abcdefgh", "no https://hooks.example.org/T0/B0/abcdefgh"),
        ("BRICKYARD_ALERT_URL", "https://hooks.example.org/T0/B0/abcdefgh", "url: /T0/B0/abcdefgh"),
        ("MLFLOW_TRACKING_URI", "postgresql://me:pass%2Fword@h/db", "the user's pass%2Fword"),
        ("HTTPS_PROXY", "http://me:pass%2Fword@proxy:3128", "the user's pass/word"),
    ],
)  # fmt: skip
def test_a_secret_of_the_environment_is_known_by_its_value(
    name: str, value: str, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert redacted(said) == said
    monkeypatch.setitem(os.environ, name, value)
    assert "***" in redacted(said)
    for form in (value, json.dumps(value)[1:-1], "wJalr", "FEMI", "abcdefgh", "pass", "ßer-als"):
        assert form not in redacted(said)


def test_short_values_and_places_are_words_like_others(monkeypatch: pytest.MonkeyPatch) -> None:
    """A log in which each `test` is hidden says nothing; in an address a short password is hidden all the same."""
    for name, value in {
        "MLFLOW_TRACKING_PASSWORD": "s" * (LEAST - 1), "RAY_AUTH_TOKEN_PATH": "/run/secrets/ray-token",
        "AWS_ACCESS_KEY_ID": "brickyard-id", "TOKENIZERS_PARALLELISM": "false", "A_TOKEN": "",
    }.items():  # fmt: skip
        monkeypatch.setitem(os.environ, name, value)
    said = "sssssss is false at /run/secrets/ray-token of brickyard-id"
    assert redacted(said) == said
    assert redacted("http://me:sssssss@h") == "http://***@h"


def test_plain_content_keeps_its_form() -> None:
    content = {"a": [1, 2.5, None, True, "x"], "token=s3cret": {"see": ("http://u:s3cret@h", "y")}}
    assert redacted_in(content) == {
        "a": [1, 2.5, None, True, "x"], "token=***": {"see": ["http://***@h", "y"]},
    }  # fmt: skip


def test_a_long_line_takes_no_time_to_speak_of() -> None:
    """Each of these would take minutes if the forms were looked for in all the ways that they could be there."""
    for evil in (
        "http://a:b" * 5_000,
        "http://" + "a:" * 50_000,
        "Basic " + "a" * 100_000,
        "x-amz-signature: " * 10_000,
    ):
        assert len(redacted(evil)) > 1000


def test_whoever_speaks_is_guarded_and_only_as_long(monkeypatch: pytest.MonkeyPatch) -> None:
    """Handlers that are older than the guard, those that are made within, print, and tracebacks."""
    out, err = io.StringIO(), io.StringIO()
    log = logging.getLogger("tests.redaction")
    monkeypatch.setattr(log, "propagate", False)
    with redirect_stdout(out), redirect_stderr(err):
        older = logging.StreamHandler()
        monkeypatch.setattr(log, "handlers", [older])
        with guarded():
            log.handlers.append(logging.StreamHandler())
            try:
                raise ValueError("http://u:s3cret@h")
            except ValueError:
                log.exception("so: %s", "http://u:s3cret@h")
            print("http://u:s3cret@h")  # noqa: T201
            print("http://u:s3cret@h", file=sys.stderr)  # noqa: T201
            sys.stderr.writelines(["http://u:s3", "cret@h"])
            assert sys.stderr.isatty() is False
        assert "s3cret" not in out.getvalue() + err.getvalue()
        assert len(re.findall(r"http://\*\*\*@h", out.getvalue())) == 1
        assert len(re.findall(r"http://\*\*\*@h", err.getvalue())) == 8, "three times by each handler, twice by hand"
        assert older.stream is sys.stderr is err and sys.stdout is out


def test_a_firing_keeps_and_sends_no_secret(folder: Folder, monkeypatch: pytest.MonkeyPatch) -> None:
    slot = "2026-11-26T03:00Z"

    def work(_: object) -> dict[str, object]:
        raise RuntimeError("http://u:s3cret@h does not answer")

    with Webhook() as hook:
        monkeypatch.setitem(os.environ, "BRICKYARD_ALERT_URL", hook.url)
        with pytest.raises(RuntimeError):
            fire(FiringConfig(slot=slot), folder, work, instant(slot))
    ((told,), kept) = hook.got, folder.get(f"{folder_name(instant(slot))}/{RECORD}").decode()
    assert "RuntimeError: http://***@h does not answer" == told["error"] == json.loads(kept)["error"]
