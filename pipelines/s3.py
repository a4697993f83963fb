"""The S3 client: s3fs, with the retries of this project in place of its own and botocore's.

They sit where one HTTP request is sent, below all of s3fs: under ranges and listings, the parts of an upload, and what
others (Ray, pyarrow) do with the same file system. A body is read to its end there, so half of one is never returned.
"""

import asyncio
import io
import os
from typing import Any
from urllib.parse import quote, urlsplit

import aiohttp
from aiobotocore.awsrequest import AioAWSResponse
from aiobotocore.httpsession import AIOHTTPSession
from botocore.auth import S3SigV4Auth
from botocore.awsrequest import AWSPreparedRequest, AWSRequest
from botocore.exceptions import ConnectionError as UnreachableError
from botocore.exceptions import HTTPClientError, SSLError
from s3fs import S3FileSystem

from pipelines.errors import CHANGED, DamagedError
from pipelines.retries import TransientError, answer_s, check, patient
from pipelines.stored import version_of

CONNECT_S = 5.0
SLOWEST = 100_000
"""Bytes per second of an upload that is still alive; the time-out of the client begins when all is sent."""
CONNECTIONS = 64
"""Open at once, per process."""


class PatientSession(AIOHTTPSession):  # type: ignore[misc]
    """Sends a request until it has an answer that means something.

    Raises:
        TryAgainError: if the patience is used up.
    """

    async def send(self, request: AWSPreparedRequest) -> AioAWSResponse:
        url = request.url.partition("?")[0]
        async for attempt in patient(f"{request.method} {url}", urlsplit(url).netloc):
            with attempt:
                response = await self._send_once(request, url)
        return response

    async def _get_session(self, proxy_url: str | None) -> aiohttp.ClientSession:
        session: aiohttp.ClientSession = await super()._get_session(proxy_url)
        session._retry_connection = False  # aiohttp would ask once again by itself, and count nothing
        return session

    async def _send_once(self, request: AWSPreparedRequest, url: str) -> AioAWSResponse:
        request.reset_stream()
        # To wait for leave to send a body would have no end where a server is silent; nobody signs this header.
        request.headers.pop("Expect", None)
        try:
            async with asyncio.timeout(answer_s() + int(request.headers.get("Content-Length", 0)) / SLOWEST):
                response = await super().send(request)
            async with asyncio.timeout(answer_s() + int(response.headers.get("Content-Length", 0)) / SLOWEST):
                body = await response.content
        except SSLError:
            raise  # a certificate does not get better
        except (HTTPClientError, UnreachableError, aiohttp.ClientError, TimeoutError) as error:
            reason = getattr(error, "kwargs", {}).get("error") or error  # of botocore's errors, which are of few kinds
            raise TransientError(f"does not answer as it should ({type(reason).__name__})") from error
        check(url, response.status_code, b"" if request.stream_output and response.status_code < 300 else body)
        response.raw = _Arrived(response.raw, body)
        return response


class _Arrived:
    """A body in memory, in the place of a stream that delivers it."""

    def __init__(self, raw: aiohttp.ClientResponse, body: bytes) -> None:
        self.url, self.content, self._body = raw.url, _Content(body), body

    async def read(self) -> bytes:
        return self._body

    def close(self) -> None:
        pass


class _Content(io.BytesIO):
    async def read(self, size: int = -1) -> bytes:  # type: ignore[override]
        return super().read(size)

    def at_eof(self) -> bool:
        return self.tell() == len(self.getbuffer())


class QuickS3(S3FileSystem):  # type: ignore[misc]
    """s3fs, but what is read most, an object or a range of one, costs half the CPU: a signature and a request."""

    compares_versions = True

    async def _cat_file(
        self, path: str, start: int | None = None, end: int | None = None, version: str = "", **others: Any
    ) -> bytes:
        """Fetch an object or a range of one; with a version, an ETag, only if it is still the one that it was."""
        client = await self.set_session()
        credentials = await self.session.get_credentials()
        whole = start is None and end is None
        if credentials and (whole or (start is not None and end is not None and 0 <= start < end)):
            bucket, key, _ = self.split_path(path)
            request = AWSRequest(
                method="GET",
                url=f"{client.meta.endpoint_url}/{bucket}/{quote(key)}",
                headers={} if whole or end is None else {"Range": f"bytes={start}-{end - 1}"},
            )
            if version:
                request.headers["If-Match"] = f'"{version}"'
            S3SigV4Auth(await credentials.get_frozen_credentials(), "s3", client.meta.region_name).add_auth(request)
            prepared = request.prepare()
            prepared.stream_output = True
            answer = await client._endpoint.http_session.send(prepared)
            if answer.status_code == (200 if whole else 206):
                return bytes(await answer.content)
            if answer.status_code == 412:
                raise DamagedError(f"{self.unstrip_protocol(path)} {CHANGED}")
        # Refused, missing, moved to another region: s3fs knows what to do, or what to raise.
        if version and version_of(await self._info(path)) != version:
            raise DamagedError(f"{self.unstrip_protocol(path)} {CHANGED}")
        return bytes(await super()._cat_file(path, start=start, end=end, **others))


def filesystem() -> Any:
    """Return the file system of this process for the endpoint that the environment names.

    Credentials and region it finds by itself, as every client of S3 does. A private endpoint gets path style: botocore
    does that for every endpoint it is given.
    """
    made = QuickS3(
        # Named here, though botocore would find it: file systems are kept by their options.
        endpoint_url=os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL") or None,
        # Other processes write here too: what was listed a moment ago is not what is there.
        use_listings_cache=False,
        max_concurrency=1,  # else a whole object takes two requests, the first to learn its size
        config_kwargs={
            "http_session_cls": PatientSession,
            "retries": {"mode": "standard", "total_max_attempts": 1},
            "connect_timeout": CONNECT_S,
            "read_timeout": answer_s(),
            "max_pool_connections": CONNECTIONS,
        },
    )
    made.retries = 1
    return made
