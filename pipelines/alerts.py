"""Word to whoever is on duty: a line in the log, and a JSON object to a webhook."""

import asyncio
import json
import logging
from typing import Any
from urllib.parse import urlsplit

import aiohttp

TRIES, PATIENCE_S = 3, 10.0
"""With a server that does not take it; seconds for each."""
PAUSE_S = 1.0
"""Between them, and twice as long each time."""

log = logging.getLogger("brickyard.alert")


def alert(url: str, about: dict[str, Any]) -> bool:
    """Say it in one line of the log, and to the webhook if there is one. Nothing is raised.

    Args:
        url: of the webhook; empty: none. Of it only the host is ever said: the rest may be a secret.
        about: what there is to say, as JSON has it.

    Returns:
        Whether the webhook took it.
    """
    text = json.dumps(about)
    log.error("ALERT %s", text)
    if not url:
        return False
    try:
        return asyncio.run(_post(url, text))
    except Exception as error:  # whatever it is, the job ends as it would have; its words may hold the URL
        log.warning("the webhook at %s was not told: %s", _host(url), type(error).__name__)
        return False


async def _post(url: str, text: str) -> bool:
    said = ""
    async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=PATIENCE_S), trust_env=True) as session:
        for attempt in range(TRIES):
            if attempt:
                await asyncio.sleep(PAUSE_S * 2 ** (attempt - 1))
            try:
                headers = {"Content-Type": "application/json"}
                async with session.post(url, data=text, headers=headers, allow_redirects=False) as answer:
                    if answer.status < 300:
                        return True
                    said = f"it answers {answer.status}"
                    if answer.status < 500 and answer.status not in (408, 429):
                        break
            except (aiohttp.ClientConnectionError, TimeoutError) as error:
                said = type(error).__name__
    log.warning("the webhook at %s was not told: %s", _host(url), said)
    return False


def _host(url: str) -> str:
    try:
        return urlsplit(url).hostname or "an address that is none"
    except ValueError:
        return "an address that is none"
