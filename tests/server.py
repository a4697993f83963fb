"""A real MLflow server, as its users meet it: what tests of it and the pictures of its pages share."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager

from playwright.sync_api import Page, sync_playwright

from pipelines.environment import environment
from pipelines.replay import ReplayJob, replay
from pipelines.storage import Folder

PATIENCE_MS = 120_000
QUIET = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
         "--disable-component-update", "--disable-sync"]  # fmt: skip
"""No sandbox of its own where it runs as root, and no word to anyone."""


def deliver(home: Folder, uri: str) -> None:
    """Deliver what the server was too busy to take of a run."""
    with environment({"MLFLOW_TRACKING_URI": uri}):
        replay(ReplayJob(runs=(home.url,), patience_s=120))


def chromium() -> str | None:
    """Return where the browser is."""
    return shutil.which("chromium") or shutil.which("google-chrome")


@contextmanager
def browser(uri: str, height: int) -> Iterator[Page]:
    """A page of a browser that knows the server's password, 1600 pixels wide."""
    with sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=chromium(), args=QUIET)
        name, password = os.environ["MLFLOW_TRACKING_USERNAME"], os.environ["MLFLOW_TRACKING_PASSWORD"]
        context = started.new_context(
            base_url=uri, http_credentials={"username": name, "password": password},
            viewport={"width": 1600, "height": height},
        )  # fmt: skip
        context.set_default_timeout(PATIENCE_MS)
        yield context.new_page()
        started.close()
