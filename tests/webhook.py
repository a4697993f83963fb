"""A real HTTP server that takes alerts, or does not."""

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


class Webhook:
    """A context in which :attr:`url`, which has a secret in it, takes what is posted."""

    def __init__(self) -> None:
        self.answers: list[int] = []
        """The status of each answer in turn; 204 when there is none left, no answer at all for 0."""
        self.got: list[dict[str, Any]] = []
        """What was posted, whatever the answer was."""
        hook = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                assert self.path == "/hook/s3cret?token=s3cret"
                assert self.headers["Content-Type"] == "application/json"
                hook.got.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
                status = hook.answers.pop(0) if hook.answers else 204
                if not status:
                    hook.over.wait()
                    return
                self.send_response(status)
                self.send_header("Content-Length", "0")
                self.end_headers()

            def log_message(self, *_: object) -> None:
                pass

        self.over = threading.Event()
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}/hook/s3cret?token=s3cret"

    def __enter__(self) -> "Webhook":
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.over.set()
        self._server.shutdown()
        self._server.server_close()
