"""A proxy in front of an S3 server that makes trouble on request.

    with S3Faults(server) as faults:
        faults.trouble = Trouble(status=503, share=0.5)
        run_command(env={**os.environ, **faults.environment})

Requests pass unchanged, signature and all, so the server behind does what it always does.
"""

from __future__ import annotations

import http.client
import random
import threading
import time
from collections import Counter
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType

from tests.s3_server import S3Server

TIMEOUT_S = 30.0


@dataclass(frozen=True)
class Trouble:
    """What goes wrong.

    Attributes:
        status: Answer this instead of asking the server; 0 for not at all.
        share: Probability that a request meets it.
        delay_s: Wait so long before the server is asked.
        lose_answer: Ask the server, then close the connection without an answer.
    """

    status: int = 0
    share: float = 1.0
    delay_s: float = 0.0
    lose_answer: bool = False


class S3Faults(ThreadingHTTPServer):
    """The proxy. ``trouble`` is what happens now; ``requests`` are method and path of what came.

    Attributes:
        num_troubled: Requests that met trouble so far.
        sent_bytes: Bytes of the bodies that came back, by path without query.
    """

    daemon_threads = True

    def __init__(self, server: S3Server, seed: int = 0) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.behind = server.endpoint.removeprefix("http://")
        self.environment = server.environment | {"AWS_ENDPOINT_URL_S3": f"http://127.0.0.1:{self.server_port}"}
        self.trouble: Trouble | None = None
        self.requests: list[tuple[str, str]] = []
        self.num_troubled = 0
        self.sent_bytes: Counter[str] = Counter()
        self._random = random.Random(seed)
        self._lock = threading.Lock()
        self._thread = threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.02})

    def __enter__(self) -> S3Faults:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.shutdown()
        self._thread.join()
        self.server_close()

    def meet(self, method: str, path: str) -> Trouble | None:
        """Record a request, and return the trouble that it meets."""
        with self._lock:
            self.requests.append((method, path))
            trouble = self.trouble
            if trouble is None or self._random.random() >= trouble.share:
                return None
            self.num_troubled += 1
            return trouble


class _Handler(BaseHTTPRequestHandler):
    server: S3Faults
    protocol_version = "HTTP/1.1"

    def _pass_on(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        trouble = self.server.meet(self.command, self.path)
        if trouble is not None:
            time.sleep(trouble.delay_s)
            if trouble.status:
                text = b"<?xml version='1.0'?><Error><Code>Trouble</Code><Message>as the test asked</Message></Error>"
                return self._reply(trouble.status, {"Content-Type": "application/xml"}, text)
        connection = http.client.HTTPConnection(self.server.behind, timeout=TIMEOUT_S)
        try:
            # The Host header is part of the signature, so it names the proxy here too.
            headers = {name: value for name, value in self.headers.items() if name.lower() != "expect"}
            connection.request(self.command, self.path, body or None, headers)
            answer = connection.getresponse()
            data = answer.read()
        finally:
            connection.close()
        if trouble is not None and trouble.lose_answer:
            self.close_connection = True
            return None
        hop = {"transfer-encoding", "connection", "content-length", "server", "date"}
        kept = {name: value for name, value in answer.getheaders() if name.lower() not in hop}
        length = answer.getheader("Content-Length") if self.command == "HEAD" else None
        return self._reply(answer.status, kept | ({"Content-Length": length} if length else {}), data)

    def _reply(self, status: int, headers: dict[str, str], body: bytes) -> None:
        self.send_response(status)
        for name, value in ({"Content-Length": str(len(body))} | headers).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.server.sent_bytes[self.path.partition("?")[0]] += len(body)
            self.wfile.write(body)

    do_GET = do_PUT = do_POST = do_HEAD = do_DELETE = _pass_on

    def log_message(self, *_: object) -> None:
        """Say nothing."""
