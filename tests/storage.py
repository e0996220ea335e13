"""Servers of object storage on loopback, and faults in front of a store."""

import logging
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.request import Request, urlopen

BUCKET = "bucket"


@contextmanager
def s3_server() -> Iterator[str]:
    """Run moto's server -> its address; the bucket ``BUCKET`` is there."""
    from moto.server import ThreadedMotoServer

    logging.getLogger("werkzeug").setLevel(logging.ERROR)  # a line a request
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    try:
        host, port = server.get_host_and_port()
        urlopen(Request(f"http://{host}:{port}/{BUCKET}", method="PUT")).close()
        yield f"http://{host}:{port}"
    finally:
        server.stop()


@contextmanager
def gcs_server() -> Iterator[str]:
    """Run an emulator of Google's storage -> ``host:port``; the bucket ``BUCKET`` is there.

    Raises:
        ImportError: It is not installed.
    """
    from gcp_storage_emulator.server import create_server

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    logging.getLogger("gcp_storage_emulator").setLevel(logging.ERROR)
    with create_server("127.0.0.1", port, in_memory=True, default_bucket=BUCKET):
        yield f"127.0.0.1:{port}"


def gcs_address(server: str, folder: str) -> str:
    """Return the address of a folder in the bucket of ``gcs_server``."""
    return f"gs://{BUCKET}/{folder}?anonymous=true&endpoint_override={server}&scheme=http"


def environment(endpoint: str) -> dict[str, str]:
    """Return what lets a process find the server, and no other."""
    return {
        "AWS_ENDPOINT_URL": endpoint,
        "AWS_ACCESS_KEY_ID": "testing",
        "AWS_SECRET_ACCESS_KEY": "testing",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true",
    }


@contextmanager
def refusing_server(status: int, code: str) -> Iterator[tuple[str, list[str]]]:
    """Run a server that answers each request of S3 with a fault -> ``host:port``, and the requests that came."""
    requests: list[str] = []

    class Refuse(BaseHTTPRequestHandler):
        def answer(self) -> None:
            requests.append(self.command)
            self.rfile.read(int(self.headers.get("content-length") or 0))
            body = f"<Error><Code>{code}</Code><Message>no</Message></Error>".encode()
            self.send_response(status)
            self.send_header("content-type", "application/xml")
            self.send_header("content-length", str(len(body)))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)

        do_GET = do_PUT = do_POST = do_HEAD = do_DELETE = answer  # http.server's names

        def log_message(self, *arguments: Any) -> None:
            """Say nothing."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Refuse)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"127.0.0.1:{server.server_port}", requests
    finally:
        server.shutdown()
        server.server_close()


class Faulty:
    """A file system whose calls can be made to fail.

    Args:
        system: The real one.
    """

    def __init__(self, system: Any) -> None:
        self._system = system
        self.fault: Callable[[str, str], None] = lambda call, path: None
        """Called before each call with its name and path; what it raises, the call raises."""
        self.calls: list[tuple[str, str]] = []
        self._lock = threading.Lock()

    def __getattr__(self, name: str) -> Any:
        action = getattr(self._system, name)

        def call(where: Any, *arguments: Any, **options: Any) -> Any:
            with self._lock:
                self.calls.append((name, str(getattr(where, "base_dir", where))))
            self.fault(name, str(getattr(where, "base_dir", where)))
            return action(where, *arguments, **options)

        return call
