"""A Hugging Face hub on this machine: an HTTP server with what uploads and downloads use of the hub's interface.

It makes models, says how each file is to be sent, stores large ones by their SHA-256 (git LFS), and takes commits, as
``huggingface_hub`` asks for them (without Xet). It can be told to fail.
"""

import base64
import hashlib
import http.server
import json
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from urllib.parse import unquote, urlsplit

TOKEN, READER = "hf_writer", "hf_reader"  # of the user "me"; the second may only read


class Model:
    """What the hub has of one model."""

    def __init__(self, private: bool) -> None:
        self.private = private
        self.files: dict[str, bytes] = {".gitattributes": b"*.safetensors filter=lfs\n"}
        self.large: set[str] = set()
        self.commits = 0

    @property
    def sha(self) -> str:
        return hashlib.sha1(f"{self.commits}".encode()).hexdigest()


class Hub(http.server.ThreadingHTTPServer):
    """The server and its state: models by name, large files by hash, and every request that came."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Request)
        self.models: dict[str, Model] = {}
        self.stored: dict[str, bytes] = {}
        self.asked: list[str] = []  # "METHOD path"
        self.fail: Callable[[str], int | None] = lambda request: None  # a status, or 0: close the connection

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class _Request(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Hub

    def log_message(self, *_: Any) -> None:
        pass

    def answer(self, status: int, body: Any = None, headers: dict[str, str] | None = None) -> None:
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        for key, value in ({"Content-Type": "application/json"} | (headers or {})).items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def refuse(self, status: int, message: str, code: str = "") -> None:
        self.answer(status, {"error": message}, {"X-Error-Message": message, "X-Error-Code": code})

    def handle_any(self) -> None:
        path = unquote(urlsplit(self.path).path)
        request = f"{self.command} {path}"
        self.server.asked.append(request)
        if "chunked" in self.headers.get("Transfer-Encoding", ""):
            body = b""
            while size := int(self.rfile.readline(), 16):
                body += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
        else:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if (status := self.server.fail(request)) is not None:
            if not status:
                self.close_connection = True
                return
            self.refuse(status, "as the test wishes")
            return
        token = self.headers.get("Authorization", "").removeprefix("Bearer ")
        for pattern, method in ROUTES.items():
            if found := re.fullmatch(pattern, request):
                if token and token not in (TOKEN, READER):
                    self.refuse(401, "Invalid credentials in Authorization header")
                elif self.command != "GET" and self.command != "HEAD" and method != "store" and not token:
                    self.refuse(401, "Authentication is needed")
                else:
                    getattr(self, method)(token, body, *found.groups())
                return
        self.refuse(404, f"no such page: {request}")

    do_GET = do_HEAD = do_POST = do_PUT = handle_any

    # --- writing

    def create(self, token: str, body: bytes) -> None:
        wanted = json.loads(body)
        name = f"{wanted['organization'] or 'me'}/{wanted['name']}"
        if token != TOKEN or not name.startswith("me/"):
            self.refuse(403, "You don't have the rights to create a model under this namespace")
        elif name in self.server.models:
            self.refuse(409, "You already created this model repo")
        else:
            private = wanted.get("private", False) or wanted.get("visibility") == "private"
            self.server.models[name] = Model(private)
            self.answer(200, {"url": f"{self.server.url}/{name}", "name": name, "id": "1"})

    def validate(self, token: str, body: bytes) -> None:
        ok = json.loads(body)["content"].startswith("---\n")
        self.answer(200 if ok else 400, {"errors": [] if ok else [{"message": "no metadata"}], "warnings": []})

    def preupload(self, token: str, body: bytes, name: str) -> None:
        model = self.server.models.get(name)
        if model is None or token != TOKEN:
            self.refuse(404 if model is None else 403, "no such model" if model is None else "no write access")
            return
        files = [
            {
                "path": file["path"],
                "uploadMode": "lfs" if file["path"].endswith((".safetensors", ".png", ".flac")) else "regular",
                "shouldIgnore": False,
                "oid": _oid(model, file["path"]),
            }
            for file in json.loads(body)["files"]
        ]
        self.answer(200, {"files": files})

    def batch(self, token: str, body: bytes, name: str) -> None:
        objects = []
        for one in json.loads(body)["objects"]:
            place = {"href": f"{self.server.url}/lfs/{one['oid']}"}
            objects.append(one if one["oid"] in self.server.stored else one | {"actions": {"upload": place}})
        self.answer(200, {"transfer": "basic", "objects": objects}, {"Content-Type": "application/vnd.git-lfs+json"})

    def store(self, token: str, body: bytes, oid: str) -> None:
        assert hashlib.sha256(body).hexdigest() == oid
        self.server.stored[oid] = body
        self.answer(200, {})

    def commit(self, token: str, body: bytes, name: str) -> None:
        model = self.server.models[name]
        for line in body.decode().splitlines():
            one = json.loads(line)
            match one["key"]:
                case "file":
                    model.files[one["value"]["path"]] = base64.b64decode(one["value"]["content"])
                case "lfsFile":
                    model.files[one["value"]["path"]] = self.server.stored[one["value"]["oid"]]
                    model.large.add(one["value"]["path"])
        model.commits += 1
        url = f"{self.server.url}/{name}/commit/{model.sha}"
        self.answer(200, {"success": True, "commitOid": model.sha, "commitUrl": url, "hookOutput": ""})

    # --- reading

    def visible(self, token: str, name: str) -> Model | None:
        model = self.server.models.get(name)
        if model is None or (model.private and not token):
            self.refuse(404, "Repository Not Found", "RepoNotFound")
            return None
        return model

    def about(self, token: str, body: bytes, name: str) -> None:
        if (model := self.visible(token, name)) is None:
            return
        siblings = []
        for path, data in model.files.items():
            sibling: dict[str, Any] = {"rfilename": path, "size": len(data), "blobId": _oid(model, path)}
            if path in model.large:
                sibling["lfs"] = {"sha256": hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 130}
            siblings.append(sibling)
        self.answer(200, {"id": name, "sha": model.sha, "private": model.private, "siblings": siblings})

    def resolve(self, token: str, body: bytes, name: str, revision: str, path: str) -> None:
        if (model := self.visible(token, name)) is None:
            return
        if path not in model.files:
            self.refuse(404, "Entry not found", "EntryNotFound")
            return
        data = model.files[path]
        headers = {"ETag": f'"{hashlib.sha256(data).hexdigest()}"', "X-Repo-Commit": model.sha}
        self.answer(200, data, headers | {"Content-Type": "application/octet-stream"})


NAME = r"([\w.-]+/[\w.-]+)"
ROUTES = {
    r"POST /api/repos/create": "create",
    r"POST /api/validate-yaml": "validate",
    rf"POST /api/models/{NAME}/preupload/main": "preupload",
    rf"POST /{NAME}\.git/info/lfs/objects/batch": "batch",
    r"PUT /lfs/(\w+)": "store",
    rf"POST /api/models/{NAME}/commit/main": "commit",
    rf"GET /api/models/{NAME}(?:/revision/main)?": "about",
    rf"(?:GET|HEAD) /{NAME}/resolve/(\w+)/(.+)": "resolve",
}


def _oid(model: Model, path: str) -> str | None:
    """What the hub calls a file by: the SHA-256 of a large one, the blob of git of another."""
    if path not in model.files:
        return None
    data = model.files[path]
    return (
        hashlib.sha256(data).hexdigest()
        if path in model.large
        else hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
    )


@contextmanager
def serve() -> Iterator[Hub]:
    """A hub that answers until the end of the ``with``."""
    with Hub() as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
        thread.start()
        yield server
        server.shutdown()
        thread.join()
