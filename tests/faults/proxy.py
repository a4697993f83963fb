"""An HTTP proxy before a real server that does what a server does on a bad day, to the requests that its rules name.

with FaultProxy("http://127.0.0.1:9000") as proxy:
    proxy.rules = [Rule("503", method="GET", every=3), Rule("reset", path=r"\\.parquet", first=2)]
    ...  # clients speak to proxy.url; which request meets which fault depends on counts alone
proxy.injected  # Counter({"503": 12, "reset": 2})
"""

import asyncio
import re
import socket
import struct
import threading
from collections import Counter
from dataclasses import dataclass, field
from typing import Literal

import aiohttp
from aiohttp import web
from yarl import URL

Fault = Literal["500", "503", "429", "slow", "hung", "dripping", "reset", "truncated", "dropped", "expired", "moved"]
"""An answer of that status; one after :attr:`Rule.slow_s`; none at all; one of which a byte comes now and
then, for as long; none, but a reset of the connection; half of the body under the length of the whole; done, then a
reset instead of the answer; word that the credentials have expired; and that it is to be had elsewhere."""
CODES = {"500": "InternalError", "503": "SlowDown", "429": "TooManyRequests", "expired": "ExpiredToken",
         "moved": "PermanentRedirect"}  # fmt: skip
DROP_S = 0.05
"""Between two bytes of an answer that is dripping."""


@dataclass(kw_only=True)
class Rule:
    """Which requests meet a fault: all that match, or each n-th of them, or the first k for each object."""

    fault: Fault = field(kw_only=False)
    method: str = ""
    """Like GET; empty: any."""
    path: str = ""
    """A regular expression, searched for in path and query as they were sent."""
    every: int = 1
    after: int = 0
    """How many that match are let through before."""
    first: int = 0
    """Of each method and path; 0: no end to it."""
    status: int = 400
    """That word of expired credentials comes with: 400 as AWS does, or 403 as others do."""
    slow_s: float = 5.0
    _seen: Counter[str] = field(default_factory=Counter, init=False)

    def meets(self, method: str, path: str) -> bool:
        if self.method not in ("", method) or not re.search(self.path, path):
            return False
        self._seen["all"] += 1
        self._seen[f"{method} {path}"] += 1
        if self._seen["all"] <= self.after:
            return False
        return self._seen["all"] % self.every == 0 and (not self.first or self._seen[f"{method} {path}"] <= self.first)


class FaultProxy:
    """A context in which :attr:`url` stands for the server, served by a thread of its own."""

    def __init__(self, upstream: str, port: int = 0) -> None:
        self.rules: list[Rule] = []
        """The first that meets a request is the one that counts."""
        self.injected: Counter[str] = Counter()
        """By fault."""
        self.requests: list[tuple[str, str]] = []
        """Method and path with query of all that came."""
        self.read_bytes = 0
        """Of all bodies that the server answered with."""
        self.url = ""
        self._upstream, self._port = upstream, port
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)

    def __enter__(self) -> "FaultProxy":
        self._thread.start()
        asyncio.run_coroutine_threadsafe(self._start(), self._loop).result()
        return self

    def __exit__(self, *_: object) -> None:
        asyncio.run_coroutine_threadsafe(self._stop(), self._loop).result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    async def _start(self) -> None:
        self._over = asyncio.Event()
        self._client = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0),
            auto_decompress=False,
            skip_auto_headers=("Accept", "Accept-Encoding", "Content-Type", "User-Agent"),
        )
        self._runner = web.ServerRunner(web.Server(self._serve), shutdown_timeout=0)
        await self._runner.setup()
        await web.TCPSite(self._runner, "127.0.0.1", self._port).start()
        self.url = f"http://127.0.0.1:{self._runner.addresses[0][1]}"

    async def _stop(self) -> None:
        self._over.set()
        await self._runner.cleanup()
        await self._client.close()

    async def _serve(self, request: web.BaseRequest) -> web.StreamResponse:
        if request.headers.get("Expect", "").lower() == "100-continue":
            assert request.transport is not None
            request.transport.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        sent = await request.content.read()
        self.requests.append((request.method, request.raw_path))
        rule = next((rule for rule in self.rules if rule.meets(request.method, request.raw_path)), None)
        fault = rule.fault if rule else ""
        if rule:
            self.injected[fault] += 1
        if rule and fault in CODES:
            body = f"<?xml version='1.0'?><Error><Code>{CODES[fault]}</Code><Message>injected</Message></Error>"
            status = {"expired": rule.status, "moved": 301}.get(fault) or int(fault)
            return web.Response(status=status, text=body, content_type="application/xml")
        if rule and fault == "slow":
            await asyncio.sleep(rule.slow_s)
        if fault == "hung":
            await self._over.wait()
            return _reset(request)
        if fault == "reset":
            return _reset(request)
        status, headers, body = await self._forward(request, sent)
        if fault == "dropped":
            return _reset(request)
        answer = web.StreamResponse(status=status, headers=headers)
        if request.transport is None or request.transport.is_closing():
            return answer  # the client had no patience
        await answer.prepare(request)
        if fault == "truncated":
            await answer.write(body[: len(body) // 2])
            assert request.transport is not None
            request.transport.close()  # after what is written is sent
            return answer
        if rule and fault == "dripping":
            drops = min(len(body), int(rule.slow_s / DROP_S))
            for i in range(drops):
                await answer.write(body[i : i + 1])
                await asyncio.sleep(DROP_S)
            body = body[drops:]
        if request.method != "HEAD":
            await answer.write(body)
        await answer.write_eof()
        return answer

    async def _forward(self, request: web.BaseRequest, body: bytes) -> tuple[int, list[tuple[str, str]], bytes]:
        """The request as it came, with its Host, which is part of what was signed."""
        headers = [(key, value) for key, value in request.headers.items() if key.lower() not in _OF_ONE_HOP]
        url = URL(self._upstream + request.raw_path, encoded=True)
        async with self._client.request(request.method, url, headers=headers, data=body or None) as answer:
            read = await answer.read()
            self.read_bytes += len(read)
            kept = [(key, value) for key, value in answer.headers.items() if key.lower() not in _OF_ONE_HOP]
            if request.method != "HEAD" and answer.status not in (204, 304):
                kept = [(key, value) for key, value in kept if key.lower() != "content-length"]
                kept.append(("Content-Length", str(len(read))))
            return answer.status, kept, read


_OF_ONE_HOP = {"connection", "keep-alive", "transfer-encoding", "expect"}


def _reset(request: web.BaseRequest) -> web.StreamResponse:
    assert request.transport is not None
    opened: socket.socket = request.transport.get_extra_info("socket")
    opened.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    request.transport.abort()
    return web.Response()
