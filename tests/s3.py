"""A server that speaks S3, and a proxy in front of it that breaks requests as networks and busy services do.

``python -m tests.s3`` is the server (moto's); it prints its port.
"""

from __future__ import annotations

import http.client
import io
import os
import random
import socket
import struct
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pyarrow as pa
import pyarrow.dataset as ds
import pyarrow.fs
import pyarrow.parquet as pq

ROOT = Path(__file__).parents[1]
ERRORS = {"403": "AccessDenied", "500": "InternalError", "503": "SlowDown"}
FAULTS = ("500", "503", "slow", "reset", "lost", "cut")
HASTE = {  # settings of batchinfer.data.bucket for tests
    "PATIENCE": 5.0,
    "PAUSES": (0.005, 0.05),
    "CLIENT": {"connect_timeout": "1s", "timeout": "0.7s"},  # which a "slow" answer exceeds
}


def start_server() -> tuple[subprocess.Popen, int]:
    command = [sys.executable, "-m", "tests.s3"]
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    return process, int(process.stdout.readline())


class Proxy(ThreadingHTTPServer):
    """Passes requests on, each unless ``fault`` has something else in mind for it.

    403, 500, 503 answered so, and not passed on
    slow          not answered before the client's patience ends, and not passed on
    reset         the connection breaks before the request is passed on
    lost          the connection breaks after the server has done what was asked
    cut           the connection breaks in the middle of the server's answer
    """

    daemon_threads = True

    def __init__(self, port: int) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.server = port
        self.fault: Callable[[str, str], str | None] = lambda method, path: None
        self.requests: Counter[str] = Counter()  # by method
        self.sent = 0  # bytes of answers
        self.deaf = False  # to the conditions of requests, as some stores are
        self.faults: Counter[str] = Counter()
        threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()

    def handle_error(self, *_: object) -> None:
        """Clients that were killed leave broken pipes."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def _pass_on(self) -> None:
        proxy: Proxy = self.server
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        proxy.requests[self.command] += 1
        fault = proxy.fault(self.command, self.path)
        if fault is not None:
            proxy.faults[fault] += 1
        if fault in ERRORS:
            code = ERRORS[fault]
            return self._answer(int(fault), {}, f"<Error><Code>{code}</Code></Error>".encode())
        if fault in ("slow", "reset"):
            time.sleep(1.5 if fault == "slow" else 0)
            return self._break()
        server = http.client.HTTPConnection("127.0.0.1", proxy.server, timeout=30)
        told = {n: v for n, v in self.headers.items() if not (proxy.deaf and n.lower().startswith("if-"))}
        server.request(self.command, self.path, body, told)
        answer = server.getresponse()
        data, headers = answer.read(), dict(answer.getheaders())
        server.close()
        proxy.sent += len(data)
        if fault == "lost":
            return self._break()
        self._answer(answer.status, headers, data, cut=fault == "cut")

    def _answer(self, status: int, headers: dict[str, str], data: bytes, cut: bool = False) -> None:
        self.send_response_only(status)
        for name, value in headers.items():
            if name.lower() not in ("connection", "transfer-encoding", "content-length"):
                self.send_header(name, value)
        self.send_header("Content-Length", headers.get("Content-Length", str(len(data))))
        self.end_headers()
        self.wfile.write(data[: len(data) // 2] if cut else data)
        if cut:
            self._break()

    def _break(self) -> None:
        """End the connection with a reset."""
        self.close_connection = True
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        os.close(self.connection.detach())

    do_GET = do_PUT = do_POST = do_HEAD = do_DELETE = _pass_on

    def log_message(self, *_: object) -> None:
        """Nothing."""


def at_random(seed: int, share: float, kinds: tuple[str, ...] = FAULTS) -> Callable[[str, str], str | None]:
    chance = random.Random(seed)
    return lambda method, path: chance.choice(kinds) if chance.random() < share else None


class Bucket:
    """A bucket on the server, seen past the proxy as others see it."""

    def __init__(self, name: str, server: int, proxy: Proxy) -> None:
        self.name, self.proxy, self._server = name, proxy, server
        self.url = f"s3://{name}"
        self.fs = pyarrow.fs.S3FileSystem(
            access_key="key",
            secret_key="secret",
            endpoint_override=f"http://127.0.0.1:{server}",
            region="us-east-1",
            allow_bucket_creation=True,
        )
        self.fs.create_dir(name)

    @property
    def environment(self) -> dict[str, str]:
        return {
            "AWS_ENDPOINT_URL": f"http://127.0.0.1:{self.proxy.server_port}",
            "AWS_ACCESS_KEY_ID": "key",
            "AWS_SECRET_ACCESS_KEY": "secret",
            "AWS_REGION": "us-east-1",
        }

    def put(self, key: str, data: bytes | pa.Table, **options: object) -> str:
        """Write an object, a table as Parquet. Returns its URL."""
        if isinstance(data, pa.Table):
            buffer = io.BytesIO()
            pq.write_table(data, buffer, **options)
            data = buffer.getvalue()
        with self.fs.open_output_stream(f"{self.name}/{key}") as file:
            file.write(data)
        return f"{self.url}/{key}"

    def get(self, key: str) -> bytes:
        with self.fs.open_input_file(f"{self.name}/{key}") as file:
            return file.read()

    def delete(self, key: str) -> None:
        self.fs.delete_file(f"{self.name}/{key}")

    def names(self, folder: str = "") -> list[str]:
        selector = pyarrow.fs.FileSelector(f"{self.name}/{folder}", recursive=True, allow_not_found=True)
        found = self.fs.get_file_info(selector)
        return sorted(f.path.removeprefix(f"{self.name}/") for f in found if f.type == pyarrow.fs.FileType.File)

    def read(self, folder: str = "out") -> pa.Table:
        """What a plain reader sees of a folder, in the parts' order; everything in it must be Parquet."""
        if not self.names(folder):
            return pa.table({})
        found = ds.dataset(f"{self.name}/{folder}", filesystem=self.fs, format="parquet", exclude_invalid_files=False)
        return found.to_table()


def main() -> None:
    import logging

    from moto.server import ThreadedMotoServer

    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    print(server.get_host_and_port()[1], flush=True)
    sys.stdin.read()  # until whoever started it ends
    os._exit(0)


if __name__ == "__main__":
    main()
