"""What a service needs to start: a bound port, its URL, log events, the ready file. Standard library only.

Failure modes: a port in use that is noticed only after the model is loaded; a ready file that is half written.
"""

import contextlib
import json
import os
import socket
from collections.abc import Generator
from pathlib import Path

from plaudit import atomic


class StartError(Exception):
    """The program can't start, or can't run the command. The message is one line and says what to do."""


@contextlib.contextmanager
def bound_socket(host: str, port: int) -> Generator[socket.socket, None, None]:
    """A socket that is bound now, so that a port in use is noticed early, and listens when the server starts.

    Raises `StartError`.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, kind, protocol)
    except OSError as error:
        raise StartError(f"--host {host} is not an address of this machine: {error.strerror}") from None
    with listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind(address)
        except OSError as error:
            raise StartError(f"can't listen on {host}:{port}: {error.strerror}; choose another --port") from None
        yield listener


def url_of(host: str, port: int) -> str:
    """The URL of the service as seen from this machine."""
    reachable = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}.get(host, f"[{host}]" if ":" in host else host)
    return f"http://{reachable}:{port}"


def log_event(event: str, **details: object) -> None:
    """Write one JSON line to stdout."""
    # A reader of the log that has exited must not end the service.
    with contextlib.suppress(BrokenPipeError):
        print(json.dumps({"event": event, **details}), flush=True)


def write_ready_file(path: Path, url: str) -> None:
    """Write {"url", "pid"} as JSON, atomically. Raises `OSError`."""
    atomic.write_file(path, json.dumps({"url": url, "pid": os.getpid()}))
