"""Against a real S3 server with a proxy before it that does what storage does on a bad day."""

import logging
import socket
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest

from pipelines.errors import DamagedError, TryAgainError
from pipelines.images import encode
from pipelines.ingest import IngestJob, ingest_job
from pipelines.ingest_plan import IngestConfig, IngestPlan
from pipelines.parts import DigestPart, WritePart, as_row
from pipelines.retries import retries
from pipelines.storage import Folder
from tests.faults.proxy import Fault, FaultProxy, Rule

BODY = np.random.default_rng(0).bytes(50_000)
PASSING: tuple[Fault, ...] = ("500", "503", "429", "slow", "reset", "truncated", "dropped")


@pytest.fixture(scope="module")
def proxy(s3_server: str) -> Iterator[FaultProxy]:
    with FaultProxy(s3_server) as proxy, pytest.MonkeyPatch.context() as context:
        context.setenv("AWS_ENDPOINT_URL", proxy.url)
        yield proxy


@pytest.fixture
def folder(s3: Folder, proxy: FaultProxy, monkeypatch: pytest.MonkeyPatch) -> Iterator[Folder]:
    """A folder behind the proxy, with two objects in it."""
    monkeypatch.setattr("pipelines.retries.FIRST_WAIT_S", 0.01)
    s3.put("a", BODY)
    s3.put("sub/b", BODY[::-1])
    proxy.injected.clear()
    proxy.requests.clear()
    yield s3
    proxy.rules = []


def read_ranges(folder: Folder) -> bytes:
    with folder.open("a") as file:
        file.seek(40_000)
        end = file.read(10_000)
        file.seek(0)
        return file.read(40_000) + end


def pieces(folder: Folder) -> bytes:
    return b"".join(folder.pieces("a", len(BODY)))


def put(folder: Folder) -> list[tuple[str, int]]:
    folder.put("a", BODY[:999])
    folder.put("c", BODY[:10])
    assert folder.get("a") == BODY[:999]
    return [found[:2] for found in folder.find()]


def create(folder: Folder) -> tuple[bool, bool, bytes, list[str]]:
    return folder.create("lock", b"mine"), folder.create("lock", b"another's"), folder.get("lock"), folder.names()


def delete(folder: Folder) -> list[str]:
    (folder / "sub").delete()
    return [found.name for found in folder.find()]


ACTIONS: dict[str, tuple[Callable[[Folder], Any], Any]] = {
    "get": (lambda folder: folder.get("a"), BODY),
    "get_range": (lambda folder: folder.get_range("a", 100, 40_000), BODY[100:40_000]),
    "get_ranges": (lambda folder: folder.get_ranges("a", [(9, 99), (0, 9)]), [BODY[9:99], BODY[:9]]),
    "get_many": (lambda folder: folder.get_many(["a", "sub/b", "a"]), [BODY, BODY[::-1], BODY]),
    "open": (read_ranges, BODY),
    "pieces": (pieces, BODY),
    "put": (put, [("a", 999), ("c", 10), ("sub/b", 50_000)]),
    "create": (create, (True, False, b"mine", ["a", "lock", "sub"])),
    "names": (lambda folder: folder.names(), ["a", "sub"]),
    "find": (lambda folder: [found[:2] for found in folder.find()], [("a", 50_000), ("sub/b", 50_000)]),
    "exists": (lambda folder: (folder.exists("a"), folder.exists("c")), (True, False)),
    "delete": (delete, ["a"]),
}


@pytest.mark.parametrize("fault", PASSING)
@pytest.mark.parametrize("name", ACTIONS)
def test_what_passes_is_waited_for(
    name: str, fault: Fault, folder: Folder, proxy: FaultProxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each request meets the fault at its first try; what comes out is what would have, and each try is counted."""
    if fault == "slow":
        monkeypatch.setenv("BRICKYARD_ANSWER_S", "0.3")
    action, result = ACTIONS[name]
    before = retries()
    proxy.rules = [Rule(fault, first=1, slow_s=0.6)]
    assert action(Folder(folder.url)) == result
    assert set(proxy.injected) == {fault}
    asked = len(set(proxy.requests))
    if fault == "slow":  # the server's own slowness may cost more
        assert retries() - before >= asked
    elif fault == "truncated":  # half of no body is no body: what was not read costs nothing
        assert len({path for method, path in proxy.requests if method == "GET"}) <= retries() - before <= asked
    else:
        assert retries() - before == asked == proxy.injected[fault]


@pytest.mark.parametrize("name", ACTIONS)
def test_when_patience_ends_it_is_told(
    name: str, folder: Folder, proxy: FaultProxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BRICKYARD_RETRY_S", "2")
    proxy.rules = [Rule("503")]
    with pytest.raises(TryAgainError, match=rf"{proxy.url}/yard.* answers 503.*also when asked \d+ times within 2 s"):
        ACTIONS[name][0](folder)
    assert proxy.injected["503"] > 1


@pytest.mark.parametrize("status", [400, 403])
@pytest.mark.parametrize("name", ACTIONS)
def test_expired_credentials_are_told_at_once(
    name: str, status: int, folder: Folder, proxy: FaultProxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = retries()
    proxy.rules = [Rule("expired", status=status)]
    with pytest.raises(TryAgainError, match=r"credentials have expired \(ExpiredToken\): renew them and run the same"):
        ACTIONS[name][0](folder)
    assert retries() == before


def test_expired_credentials_are_told_in_the_middle_of_a_file(folder: Folder, proxy: FaultProxy) -> None:
    with folder.open("a") as file:
        assert file.read(10) == BODY[:10]
        proxy.rules = [Rule("expired", method="GET")]
        with pytest.raises(TryAgainError, match="credentials have expired"):
            file.read(10)


def test_what_stays_is_not_asked_again(folder: Folder, proxy: FaultProxy) -> None:
    before = retries()
    for action in (lambda: folder.get("nothing"), lambda: Folder("s3://no-such-bucket/x").get("a")):
        proxy.requests.clear()
        with pytest.raises(Exception, match=r"does not exist|no such bucket"):
            action()
        assert len(proxy.requests) <= 2  # the quick way, and the way that knows what to raise
    assert retries() == before


def test_a_create_whose_answer_is_lost_knows_its_own(folder: Folder, proxy: FaultProxy) -> None:
    proxy.rules = [Rule("dropped", method="PUT", first=2)]
    assert folder.create("lock", b"same")
    assert proxy.injected["dropped"] == 2
    assert not folder.create("lock", b"same")


def test_a_create_that_was_overtaken_is_told_even_by_the_same_bytes(
    folder: Folder, proxy: FaultProxy, s3_server: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = Folder(folder.url)
    with monkeypatch.context() as context:
        context.setenv("AWS_ENDPOINT_URL", s3_server)
        assert not other.exists("lock")

    class Overtaken(Rule):
        """Between the first attempt, which never arrives, and the second there comes another writer."""

        def meets(self, method: str, path: str) -> bool:
            return super().meets(method, path) and other.create("lock", b"same")

    proxy.rules = [Overtaken("reset", method="PUT", first=1)]
    assert not folder.create("lock", b"same")
    assert proxy.injected["reset"] == 1


def test_an_upload_in_parts_survives_its_parts(folder: Folder, proxy: FaultProxy) -> None:
    data = BODY * 2100  # 105 MB: three parts
    for fault in ("dropped", "503"):
        proxy.rules = [Rule(fault, method="PUT", first=1), Rule(fault, method="POST", first=1)]
        folder.put("large", data)
        assert folder.get("large") == data
    assert [found[:2] for found in folder.find() if found.name == "large"] == [("large", len(data))]


def test_a_listing_goes_on_at_the_page_that_failed(folder: Folder, proxy: FaultProxy) -> None:
    names = [f"many/{i:04d}" for i in range(1010)]  # a page holds 1,000
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda name: folder.put(name, b""), names))
    proxy.requests.clear()
    proxy.rules = [Rule("truncated", path="list-type", every=2), Rule("503", path="list-type", first=1)]
    assert [found.name for found in (folder / "many").find()] == [name.removeprefix("many/") for name in names]
    assert len(set(proxy.requests)) == 2


def test_what_is_waited_for_is_said_once(
    folder: Folder, proxy: FaultProxy, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipelines.retries._said", {})
    proxy.rules = [Rule("503", first=3)]
    with caplog.at_level(logging.WARNING, "brickyard.storage"):
        assert folder.get_many(["a", "sub/b"]) == [BODY, BODY[::-1]]
    assert len(caplog.messages) == 1
    assert "answers 503 SlowDown; asking again for up to 120 s" in caplog.text


def test_a_server_that_is_away_is_waited_for(folder: Folder, s3_server: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with FaultProxy(s3_server) as gone:
        pass
    monkeypatch.setenv("AWS_ENDPOINT_URL", gone.url)
    monkeypatch.setenv("BRICKYARD_RETRY_S", "2")
    before = retries()
    with pytest.raises(TryAgainError, match=r"does not answer as it should \(ClientConnectorError\), also when asked"):
        Folder(folder.url).get("a")
    assert retries() > before


def test_a_server_that_stops_reading_is_not_waited_for_without_end(monkeypatch: pytest.MonkeyPatch) -> None:
    """An upload that nobody takes in: the time-outs of HTTP clients begin when all of it is sent."""
    with socket.create_server(("127.0.0.1", 0)) as silent:
        for name, value in {"ACCESS_KEY_ID": "a", "SECRET_ACCESS_KEY": "b", "DEFAULT_REGION": "us-east-1"}.items():
            monkeypatch.setenv(f"AWS_{name}", value)
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{silent.getsockname()[1]}")
        monkeypatch.setenv("BRICKYARD_ANSWER_S", "0.2")
        monkeypatch.setenv("BRICKYARD_RETRY_S", "0.1")
        monkeypatch.setattr("pipelines.s3.SLOWEST", 1 << 30)
        with pytest.raises(TryAgainError, match=r"PUT .*does not answer as it should \(TimeoutError\)"):
            Folder("s3://bucket").put("a", bytes(30 << 20))


def test_an_answer_that_never_stops_coming_has_an_end(
    folder: Folder, proxy: FaultProxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A byte now and then is no silence, which the time-outs of HTTP clients are about."""
    monkeypatch.setenv("BRICKYARD_ANSWER_S", "2")
    before = retries()
    proxy.rules = [Rule("dripping", method="GET", first=1)]
    assert folder.get("a") == BODY
    assert retries() - before == proxy.injected["dripping"] == 1
    monkeypatch.setenv("BRICKYARD_RETRY_S", "0.1")
    proxy.rules = [Rule("dripping", method="GET")]
    with pytest.raises(TryAgainError, match=r"/a does not answer as it should \(TimeoutError\)"):
        folder.get("a")


def test_what_has_moved_is_still_compared_with_what_was_listed(folder: Folder, proxy: FaultProxy) -> None:
    """A bucket of another region sends one there; the condition of the first request is not in the second."""
    versions = {found.name: found.version for found in folder.find()}
    names = ["a", "sub/b"]
    asked = [versions[name] for name in names]
    proxy.rules = [Rule("moved", method="GET", first=1)]
    assert folder.get_unchanged(names, asked) == [BODY, BODY[::-1]]
    assert proxy.injected == {"moved": 2}
    folder.put("sub/b", BODY)
    proxy.rules = [Rule("moved", method="GET", first=1)]
    with pytest.raises(DamagedError, match=r"sub/b is not the object that was listed: it has changed since"):
        folder.get_unchanged(names, asked)


def test_an_ingest_reports_what_was_asked_again(
    folder: Folder, proxy: FaultProxy, alone: None, caplog: pytest.LogCaptureFixture
) -> None:
    for i in range(20):
        folder.put(f"raw/{i}.png", encode(np.full((4, 4, 1), i, np.uint8), "png"))
    source, config = folder / "raw", IngestConfig(side=4, channels=1, shard_rows=8, drop_duplicates=True)
    plan = IngestPlan.make(source, folder / "part", config)
    for task in (WritePart(plan.source, plan.out, plan.form), DigestPart(plan.source, plan.out)):
        proxy.rules, before = [Rule("503", first=1)], proxy.injected.total()
        assert task(as_row([plan.part(0)]))["retries"] == proxy.injected.total() - before > 0
        assert task(as_row([plan.part(0)]))["retries"] == 0

    proxy.rules, before = [Rule("503", first=1)], proxy.injected.total()
    with caplog.at_level(logging.INFO, "brickyard.ingest"):
        said = ingest_job(IngestJob(source=source.url, out=(folder / "out").url, ingest=config))
    assert said["images"] == 20
    assert said["storage_retries"] == proxy.injected.total() - before > 0
    assert f"storage was asked again {retries()} times" in caplog.text
    proxy.rules = []
    caplog.clear()
    assert ingest_job(IngestJob(source=source.url, out=(folder / "out").url, ingest=config))["storage_retries"] == 0
    assert "asked again" not in caplog.text
