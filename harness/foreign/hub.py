"""A stand-in for the Hugging Face hub: the requests that huggingface_hub makes to create, fill, list and read a model.

Regular files come in the commit's body; larger ones by LFS, as one part or as several (`multipart_from`), at an address
of their own, like on the hub; or by hf_xet into a directory (`xet`), whose chunks only hf_xet can read. `Hub.fail`
answers the next requests to a path as it says, or drops their connections.
"""

import base64
import hashlib
import json
import re
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import uvicorn
import yaml
from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse
from starlette.types import Receive, Scope, Send

TOKEN = "hf_write"
READER = "hf_read"
REPO_NAME = re.compile(r"^[\w.-]+(/[\w.-]+)?$")
LFS_NAMES = (".safetensors", ".bin")
Files = dict[str, bytes]


@dataclass
class Failure:
    """What the next `times` requests whose path contains `path` get: a status with a message, or no answer at all."""

    path: str
    status: int | None
    message: str
    times: int


@dataclass
class Hub:
    """What the hub holds, and what it was asked."""

    multipart_from: int = 2**30
    """Bytes from which on a file is uploaded in parts of this size."""
    xet: Path | None = None
    """Where hf_xet stores what is uploaded; the hub then keeps only the SHA-256 of these files, in place of them."""
    repos: dict[str, Files] = field(default_factory=dict)
    private: dict[str, bool] = field(default_factory=dict)
    commits: list[tuple[str, str, list[str]]] = field(default_factory=list)
    """Repository, message, and what was done to which file."""
    stored: Files = field(default_factory=dict)
    """LFS objects by their SHA-256."""
    parts: dict[tuple[str, int], bytes] = field(default_factory=dict)
    requests: list[str] = field(default_factory=list)
    failures: list[Failure] = field(default_factory=list)
    url: str = ""

    def fail(self, path: str, status: int | None = None, message: str = "", times: int = 1) -> None:
        """Answer the next requests to this path with an error; without a status, drop their connections."""
        self.failures.append(Failure(path, status, message, times))


def _refusal(status: int, message: str) -> JSONResponse:
    # The hub says the same in a header and in the body.
    return JSONResponse({"error": message}, status, {"X-Error-Message": message})


def create_app(hub: Hub) -> FastAPI:
    app = FastAPI()

    @app.middleware("http")
    async def check(request: Request, call_next: Any) -> Any:
        path = request.url.path
        hub.requests.append(f"{request.method} {path}")
        for failure in hub.failures:
            if failure.path in path and failure.times > 0:
                failure.times -= 1
                if failure.status is None:
                    await request.body()
                    return CutOff()
                return _refusal(failure.status, failure.message)
        if path.startswith("/storage"):
            if "authorization" in request.headers:
                return _refusal(400, "Only one auth mechanism allowed")  # S3's addresses are signed
        elif path.startswith("/api/whoami") or request.method in ("POST", "PUT"):
            token = request.headers.get("authorization", "").removeprefix("Bearer ")
            if token not in (TOKEN, READER):
                return _refusal(401, "Invalid username or password.")
            if token == READER and "validate-yaml" not in path:
                return _refusal(403, "Forbidden: you must use a write token to upload to a repository.")
        return await call_next(request)

    @app.post("/api/repos/create")
    async def create(body: dict[str, Any]) -> Any:
        name = f"{body['organization'] or 'me'}/{body['name']}"
        address = {"url": f"{hub.url}/{name}", "name": name, "id": name}
        if name in hub.repos:
            return JSONResponse({**address, "error": "You already created this model repo"}, 409)
        hub.repos[name], hub.private[name] = {".gitattributes": b""}, body.get("visibility") == "private"
        return address

    @app.post("/api/validate-yaml")
    async def validate(body: dict[str, Any]) -> Any:
        card = re.match(r"---\n(.*?)\n---\n", body["content"], re.DOTALL)
        metadata = yaml.safe_load(card[1]) if card else {}
        base = metadata.get("base_model")
        if base is not None and not REPO_NAME.match(base):
            message = f'"base_model" with value "{base}" is not valid. Use a model id from https://hf.co/models.'
            return JSONResponse({"errors": [{"message": message}], "warnings": []}, 400)
        return {"errors": [], "warnings": []}

    @app.get("/api/models/{owner}/{name}/tree/{revision}")
    async def tree(owner: str, name: str, revision: str) -> Any:
        if f"{owner}/{name}" not in hub.repos:
            return JSONResponse({"error": "Repository not found"}, 404, {"X-Error-Code": "RepoNotFound"})
        files = hub.repos[f"{owner}/{name}"].items()
        return [{"type": "file", "path": path, "size": len(data), "oid": _blob(data)} for path, data in files]

    @app.get("/api/models/{owner}/{name}")
    @app.get("/api/models/{owner}/{name}/revision/{revision}")
    async def info(owner: str, name: str, revision: str = "main") -> Any:
        repo = f"{owner}/{name}"
        if repo not in hub.repos:
            return JSONResponse({"error": "Repository not found"}, 404, {"X-Error-Code": "RepoNotFound"})
        return {"id": repo, "sha": _revision(hub), "private": hub.private[repo], "siblings": []}

    @app.post("/api/models/{owner}/{name}/preupload/{revision}")
    async def preupload(owner: str, name: str, revision: str, body: dict[str, Any]) -> Any:
        files = hub.repos[f"{owner}/{name}"]
        return {
            "files": [
                {
                    "path": entry["path"],
                    "uploadMode": "lfs" if entry["path"].endswith(LFS_NAMES) else "regular",
                    "shouldIgnore": False,
                    "oid": _name_of(entry["path"], files[entry["path"]]) if entry["path"] in files else None,
                }
                for entry in body["files"]
            ]
        }

    @app.post("/{owner}/{name}.git/info/lfs/objects/batch")
    async def batch(owner: str, name: str, body: dict[str, Any]) -> Any:
        assert (body["operation"], body["hash_algo"]) == ("upload", "sha256")
        objects: list[dict[str, Any]] = []
        for entry in body["objects"]:
            oid, size = entry["oid"], entry["size"]
            objects.append({"oid": oid, "size": size, "authenticated": True})
            if oid in hub.stored:
                continue
            upload: dict[str, Any] = {"href": f"{hub.url}/storage/{oid}"}
            if size >= hub.multipart_from:
                numbers = range(1, -(-size // hub.multipart_from) + 1)
                parts = {str(i): f"{hub.url}/storage/{oid}/{i}" for i in numbers}
                upload = {
                    "href": f"{hub.url}/storage/{oid}/complete",
                    "header": {"chunk_size": str(hub.multipart_from), **parts},
                }
            objects[-1]["actions"] = {"upload": upload, "verify": {"href": f"{hub.url}/api/verify"}}
        return {"transfer": "multipart", "objects": objects}

    @app.put("/storage/{oid}")
    async def store(oid: str, request: Request) -> Any:
        hub.stored[oid] = await request.body()
        return Response()

    @app.put("/storage/{oid}/{part}")
    async def store_part(oid: str, part: int, request: Request) -> Any:
        hub.parts[oid, part] = await request.body()
        return Response(headers={"ETag": f'"{oid}-{part}"'})

    @app.post("/storage/{oid}/complete")
    async def complete(oid: str, body: dict[str, Any]) -> Any:
        assert all(part["etag"] == f'"{oid}-{part["partNumber"]}"' for part in body["parts"])
        hub.stored[oid] = b"".join(hub.parts[oid, part["partNumber"]] for part in body["parts"])
        return {}

    @app.post("/api/verify")
    async def verify(body: dict[str, Any]) -> Any:
        data = hub.stored.get(body["oid"], b"")
        whole = (hashlib.sha256(data).hexdigest(), len(data)) == (body["oid"], body["size"])
        return {} if whole else _refusal(422, "the stored object is another one")

    @app.get("/api/models/{owner}/{name}/xet-write-token/{revision}")
    async def xet_token(owner: str, name: str, revision: str) -> Any:
        assert hub.xet is not None
        return {"casUrl": f"local://{hub.xet}", "accessToken": "cas", "exp": int(time.time()) + 3600}

    @app.post("/api/models/{owner}/{name}/commit/{revision}")
    async def commit(owner: str, name: str, revision: str, request: Request) -> Any:
        files = dict(hub.repos[f"{owner}/{name}"])
        message, done = "", []
        for line in (await request.body()).splitlines():
            entry = json.loads(line)
            key, value = entry["key"], entry["value"]
            if key == "header":
                message = value["summary"]
                continue
            path = value["path"]
            done.append(f"{key} {path}")
            if key == "file":
                files[path] = base64.b64decode(value["content"])
            elif key == "lfsFile":
                if hub.xet is not None:
                    files[path] = value["oid"].encode()
                    continue
                if value["oid"] not in hub.stored:
                    return _refusal(400, f"LFS pointer of {path} points to a file that does not exist")
                files[path] = hub.stored[value["oid"]]
            elif key == "deletedFile":
                del files[path]
            else:
                return _refusal(400, f"no such operation: {key}")
        hub.repos[f"{owner}/{name}"] = files
        hub.commits.append((f"{owner}/{name}", message, done))
        return {
            "success": True,
            "commitOid": _revision(hub),
            "commitUrl": f"{hub.url}/{owner}/{name}/commit/{_revision(hub)}",
            "hookOutput": "",
        }

    @app.api_route("/{owner}/{name}/resolve/{revision}/{path:path}", methods=["GET", "HEAD"])
    async def resolve(owner: str, name: str, revision: str, path: str) -> Any:
        data = hub.repos.get(f"{owner}/{name}", {}).get(path)
        if data is None:
            headers = {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": _revision(hub)}
            return JSONResponse({"error": "Entry not found"}, 404, headers)
        headers = {"ETag": f'"{_blob(data)}"', "X-Repo-Commit": _revision(hub)}
        return Response(data, media_type="application/octet-stream", headers=headers)

    return app


class CutOff(Response):
    """Announces an answer and ends before it is sent, at which the server closes the connection."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"100")]})


def _name_of(path: str, data: bytes) -> str:
    return hashlib.sha256(data).hexdigest() if path.endswith(LFS_NAMES) else _blob(data)


def _blob(data: bytes) -> str:
    """Git's name for a file's content."""
    return hashlib.sha1(b"blob %d\0" % len(data) + data, usedforsecurity=False).hexdigest()


def _revision(hub: Hub) -> str:
    return f"{len(hub.commits):040x}"


@contextmanager
def serving(hub: Hub) -> Iterator[Hub]:
    """Serves it at `hub.url` in a thread."""
    listener = socket.create_server(("127.0.0.1", 0))
    hub.url = f"http://127.0.0.1:{listener.getsockname()[1]}"
    server = uvicorn.Server(uvicorn.Config(create_app(hub), log_level="critical", lifespan="off"))
    thread = threading.Thread(target=server.run, args=([listener],))
    thread.start()
    try:
        yield hub
    finally:
        server.should_exit = True
        thread.join()
