"""A server on this machine that speaks as much of the Hugging Face Hub's API as an upload needs.

Models only: repositories, large files by git-lfs, commits, and what a download asks for. The real
client talks to it with HF_ENDPOINT; Xet, for which there is no server, has to be off.
"""

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

LARGE = re.compile(r".*\.(safetensors|bin)$")


@dataclass
class Repository:
    private: bool
    # Content by name.
    files: dict[str, bytes] = field(default_factory=dict)
    commits: int = 0

    @property
    def revision(self) -> str:
        return hashlib.sha1(str(self.commits).encode()).hexdigest()


@dataclass
class Hub:
    """What the server holds, and what it was asked for.

    token: the only one it takes. objects: large files by sha256. received: bytes of each upload of
    one. room: so many large files it takes; then it sets `is_full`, and others wait for `go_on`.
    """

    token: str
    repositories: dict[str, Repository] = field(default_factory=dict)
    objects: dict[str, bytes] = field(default_factory=dict)
    received: list[int] = field(default_factory=list)
    room: int | None = None
    is_full: threading.Event = field(default_factory=threading.Event)
    go_on: threading.Event = field(default_factory=threading.Event)
    endpoint: str = ""
    lock: threading.Lock = field(default_factory=threading.Lock)


@contextmanager
def serve(token: str) -> Iterator[Hub]:
    """A hub that answers until the end of the block."""
    hub = Hub(token)

    class Bound(Handler):
        state = hub

    with ThreadingHTTPServer(("127.0.0.1", 0), Bound) as server:
        hub.endpoint = f"http://127.0.0.1:{server.server_address[1]}"
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        try:
            yield hub
        finally:
            server.shutdown()
            thread.join()


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    state: Hub

    def log_message(self, *args: object) -> None:
        """Nothing on the terminal."""

    def do_GET(self) -> None:
        self._answer(b"")

    do_HEAD = do_GET  # noqa: N815

    def do_POST(self) -> None:
        self._answer(self._body())

    do_PUT = do_POST  # noqa: N815

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding", "").lower() != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        pieces = []
        while size := int(self.rfile.readline(), 16):
            pieces.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(pieces)

    def _answer(self, body: bytes) -> None:
        path = unquote(urlsplit(self.path).path)
        upload = re.fullmatch(r"/objects/(\w{64})", path)
        if upload:
            # As a store does, whose addresses are signed: without the Hub's token.
            return self._take_object(upload[1], body)
        if self.headers.get("Authorization") != f"Bearer {self.state.token}":
            return self._send(401, {"error": "Invalid credentials"})
        for pattern, method in ROUTES.items():
            match = re.fullmatch(pattern, path)
            if match:
                with self.state.lock:
                    return method(self, body, *match.groups())
        return self._send(404, {"error": f"no route {self.command} {path}"})

    def _send(self, status: int, content: Any, **headers: str) -> None:
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def _create(self, body: bytes) -> None:
        asked = json.loads(body)
        name = f"{asked.get('organization') or 'local'}/{asked['name']}"
        address = {"url": f"{self.state.endpoint}/{name}", "name": name}
        if name in self.state.repositories:
            return self._send(409, address | {"error": "You already created this model repo"})
        self.state.repositories[name] = Repository(asked["visibility"] == "private")
        return self._send(200, address)

    def _validate(self, body: bytes) -> None:
        self._send(200, {"errors": [], "warnings": []})

    def _info(self, body: bytes, name: str) -> None:
        repository = self._repository(name)
        if repository:
            files = [{"rfilename": file} for file in sorted(repository.files)]
            self._send(200, {"id": name, "sha": repository.revision, "siblings": files})

    def _tree(self, body: bytes, name: str) -> None:
        repository = self._repository(name)
        if repository:
            entries = [
                {"type": "file", "path": file, "size": len(data), "oid": _git_id(data)}
                for file, data in sorted(repository.files.items())
            ]
            self._send(200, entries)

    def _preupload(self, body: bytes, name: str) -> None:
        files = [
            {
                "path": file["path"],
                "uploadMode": "lfs" if LARGE.match(file["path"]) else "regular",
                "shouldIgnore": False,
            }
            for file in json.loads(body)["files"]
        ]
        self._send(200, {"files": files})

    def _batch(self, body: bytes, name: str) -> None:
        objects = []
        for each in json.loads(body)["objects"]:
            answer = {"oid": each["oid"], "size": each["size"]}
            if each["oid"] not in self.state.objects:
                address = f"{self.state.endpoint}/objects/{each['oid']}"
                answer["actions"] = {"upload": {"href": address, "header": {}}}
            objects.append(answer)
        self._send(200, {"transfer": "basic", "objects": objects})

    def _take_object(self, digest: str, body: bytes) -> None:
        hub = self.state
        with hub.lock:
            has_room = hub.room is None or len(hub.received) < hub.room
            if has_room:
                hub.received.append(len(body))
        if not has_room:
            hub.is_full.set()
            hub.go_on.wait()
            self.close_connection = True
            return None
        with hub.lock:
            if hashlib.sha256(body).hexdigest() != digest:
                return self._send(422, {"error": "another content"})
            hub.objects[digest] = body
        return self._send(200, {})

    def _commit(self, body: bytes, name: str) -> None:
        repository = self._repository(name)
        if repository is None:
            return None
        for line in body.splitlines():
            item = json.loads(line)
            value = item["value"]
            match item["key"]:
                case "file":
                    repository.files[value["path"]] = base64.b64decode(value["content"])
                case "lfsFile":
                    repository.files[value["path"]] = self.state.objects[value["oid"]]
                case "deletedFile":
                    del repository.files[value["path"]]
        repository.commits += 1
        address = f"{self.state.endpoint}/{name}/commit/{repository.revision}"
        return self._send(
            200, {"success": True, "commitOid": repository.revision, "commitUrl": address}
        )

    def _resolve(self, body: bytes, name: str, file: str) -> None:
        repository = self._repository(name)
        if repository is None:
            return None
        headers = {"X_Repo_Commit": repository.revision}
        if file not in repository.files:
            return self._send(
                404, {"error": "Entry not found"}, X_Error_Code="EntryNotFound", **headers
            )
        data = repository.files[file]
        return self._send(200, data, ETag=f'"{_git_id(data)}"', **headers)

    def _repository(self, name: str) -> Repository | None:
        if name not in self.state.repositories:
            self._send(404, {"error": "Repository not found"}, X_Error_Code="RepoNotFound")
        return self.state.repositories.get(name)


def _git_id(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


NAME = r"([^/]+/[^/]+?)"
ROUTES: dict[str, Any] = {
    r"/api/repos/create": Handler._create,
    r"/api/validate-yaml": Handler._validate,
    rf"/api/models/{NAME}": Handler._info,
    rf"/api/models/{NAME}/revision/\w+": Handler._info,
    rf"/api/models/{NAME}/tree/\w+": Handler._tree,
    rf"/api/models/{NAME}/preupload/main": Handler._preupload,
    rf"/api/models/{NAME}/commit/main": Handler._commit,
    rf"/{NAME}\.git/info/lfs/objects/batch": Handler._batch,
    rf"/{NAME}/resolve/\w+/(.+)": Handler._resolve,
}
