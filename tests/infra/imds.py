"""A metadata service as strict as AWS's, which says what a test has it say."""

import json
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

NOTICE, ADVICE = "/latest/meta-data/spot/instance-action", "/latest/meta-data/events/recommendations/rebalance"


class Imds(BaseHTTPRequestHandler):
    """IMDSv2: a token by PUT, nothing without one that it knows, 404 where there is nothing to say."""

    server: "Service"

    def do_PUT(self) -> None:
        seconds = self.headers.get("X-aws-ec2-metadata-token-ttl-seconds", "")
        if self.path != "/latest/api/token" or not 1 <= int(seconds or 0) <= 21_600:
            return self.say(400)
        self.server.tokens.append(f"token-{len(self.server.tokens)}")
        return self.say(200, self.server.tokens[-1])

    def do_GET(self) -> None:
        self.server.asked.append(self.path)
        if self.server.broken:
            return self.say(self.server.broken)
        if self.headers.get("X-aws-ec2-metadata-token") not in self.server.tokens[self.server.forgotten :]:
            return self.say(401)
        if self.path not in self.server.said:
            return self.say(404)
        return self.say(200, self.server.said[self.path])

    def say(self, code: int, text: str = "") -> None:
        self.send_response(code)
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text.encode())

    def log_message(self, *_: Any) -> None:
        pass


class Service(ThreadingHTTPServer):
    """What it says, and what it was asked."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Imds)
        self.tokens: list[str] = []
        self.asked: list[str] = []
        self.said: dict[str, str] = {}
        self.forgotten = 0
        self.broken = 0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def announce(self, seconds: int) -> None:
        end = datetime.now(UTC) + timedelta(seconds=seconds)
        self.said[NOTICE] = json.dumps({"action": "terminate", "time": f"{end:%Y-%m-%dT%H:%M:%SZ}"})
