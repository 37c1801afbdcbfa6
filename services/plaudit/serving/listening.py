"""How a service starts: its port, its address, its log lines, the file that says it is ready. Standard library only.

What would be wrong here: a port in use that shows only after a model was loaded, or a ready file that is half written.
"""

import contextlib
import json
import os
import socket
from collections.abc import Generator
from pathlib import Path


class StartError(Exception):
    """The program can't start or do as asked. The message is one line and says what to do."""


@contextlib.contextmanager
def bound_socket(host: str, port: int) -> Generator[socket.socket, None, None]:
    """Bound at once, so that a port in use shows before anything is loaded; it listens only when all is ready.

    Raises `StartError`.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, kind, protocol)
    except OSError as error:
        raise StartError(f"--host {host} is no address of this machine: {error.strerror}") from None
    with listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind(address)
        except OSError as error:
            raise StartError(f"can't listen on {host}:{port}: {error.strerror}; choose another --port") from None
        yield listener


def url_of(host: str, port: int) -> str:
    """The URL that the service can be asked at from this machine."""
    reachable = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}.get(host, f"[{host}]" if ":" in host else host)
    return f"http://{reachable}:{port}"


def log_event(event: str, **details: object) -> None:
    """One JSON line on stdout."""
    # Whoever read the log may be gone; that is no reason to end otherwise.
    with contextlib.suppress(BrokenPipeError):
        print(json.dumps({"event": event, **details}), flush=True)


def write_ready_file(path: Path, url: str) -> None:
    """{"url", "pid"}, whole or not at all. Raises `OSError`."""
    part = path.with_name(f"{path.name}.part")
    part.unlink(missing_ok=True)  # the name may be a link to somebody's file
    with part.open("x", encoding="utf-8") as file:
        file.write(json.dumps({"url": url, "pid": os.getpid()}))
    part.replace(path)
