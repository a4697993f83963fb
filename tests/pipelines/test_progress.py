import logging
from types import SimpleNamespace

import pytest

from pipelines import progress
from pipelines.progress import IngestProgress


def test_an_ingest_says_how_far_it_is_now_and_then_and_at_its_end(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    clock = SimpleNamespace(now=100.0)
    monkeypatch.setattr(progress, "time", SimpleNamespace(monotonic=lambda: clock.now))
    said = IngestProgress({0: 100, 1: 300, 2: 580, 3: 20})
    with caplog.at_level(logging.INFO, "brickyard.ingest"):
        clock.now = 102.0
        said.update(1, images=30, bad=1)
        assert caplog.messages == [], "too early"
        clock.now = 120.0
        said.update(part=0, images=10, bad=0)
        # 40 images in 20 s; 400 of 1,000 bytes, so the other 600 take 30 s.
        assert caplog.messages == ["40 images · 2 images/s · 1 quarantined · 40 % of the bytes · 0.5 min left"]
        clock.now = 121.0
        said.update(part=3, images=0, bad=5)
        assert len(caplog.messages) == 1
        clock.now = 122.0
        said.update(part=2, images=1960, bad=1)
    assert caplog.messages[1:] == ["2,000 images · 91 images/s · 7 quarantined · 100 % of the bytes · 0.0 min left"]


def test_parts_without_bytes_are_no_trouble(caplog: pytest.LogCaptureFixture) -> None:
    said = IngestProgress({0: 0})
    with caplog.at_level(logging.INFO, "brickyard.ingest"):
        said.update(0, images=0, bad=0)
    assert len(caplog.messages) == 1 and "100 % of the bytes" in caplog.text
