"""A Hugging Face hub on loopback: what `create_repo`, `upload_folder` and `snapshot_download` ask of one, in memory."""

import base64
import contextlib
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class FakeHub(ThreadingHTTPServer):
    def __init__(self):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.repositories: dict[str, dict[str, bytes]] = {}
        self.objects: dict[str, bytes] = {}  # large files by sha256
        self.created: list[dict] = []
        self.downloads: list[str] = []

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class _Handler(BaseHTTPRequestHandler):
    server: FakeHub

    def log_message(self, *args):
        pass

    def _handle(self):
        body, path = self._read(), self.path.partition("?")[0]
        for pattern, answer in _ROUTES.items():
            if match := re.fullmatch(pattern, path):
                return answer(self, body, *match.groups())
        return self._answer({})

    do_GET = do_HEAD = do_POST = do_PUT = _handle

    def _read(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        content = b""
        while size := int(self.rfile.readline(), 16):
            content += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return content

    def _answer(self, content, status=200, **headers):
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in ({"Content-Length": str(len(data))} | headers).items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def create(self, body):
        asked = json.loads(body)
        self.server.created.append(asked)
        name = f"{asked['organization']}/{asked['name']}"
        self.server.repositories.setdefault(name, {})
        self._answer({"url": f"{self.server.address}/{name}", "name": name, "id": "1"})

    def preupload(self, body, name):
        def mode(path):
            return "lfs" if path.endswith(".safetensors") else "regular"

        files = [file["path"] for file in json.loads(body)["files"]]
        self._answer({"files": [{"path": path, "uploadMode": mode(path), "shouldIgnore": False} for path in files]})

    def batch(self, body, name):
        def upload(oid):
            return {"actions": {"upload": {"href": f"{self.server.address}/lfs/{oid}"}}}

        objects = [{"oid": o["oid"], "size": o["size"], **upload(o["oid"])} for o in json.loads(body)["objects"]]
        self._answer({"transfer": "basic", "objects": objects})

    def store(self, body, oid):
        assert hashlib.sha256(body).hexdigest() == oid
        self.server.objects[oid] = body
        self._answer({})

    def commit(self, body, name):
        repository = self.server.repositories[name]
        for line in map(json.loads, body.splitlines()):
            value = line["value"]
            if line["key"] == "file":
                repository[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                repository[value["path"]] = self.server.objects[value["oid"]]
        address = f"{self.server.address}/{name}/commit/{COMMIT}"
        self._answer({"commitUrl": address, "commitOid": COMMIT, "success": True})

    def describe(self, body, name):
        if name not in self.server.repositories:
            return self._answer({"error": "Repository not found"}, 404, X_Error_Code="RepoNotFound")
        siblings = [{"rfilename": path} for path in self.server.repositories[name]]
        return self._answer({"id": name, "modelId": name, "sha": COMMIT, "siblings": siblings})

    def tree(self, body, name):
        if name not in self.server.repositories:
            return self._answer({"error": "Repository not found"}, 404, X_Error_Code="RepoNotFound")
        files = self.server.repositories[name].items()
        self._answer([{"type": "file", "path": path, "size": len(data), "oid": "0" * 40} for path, data in files])

    def resolve(self, body, name, path):
        content = self.server.repositories[name][path]
        if self.command == "GET":
            self.server.downloads.append(path)
        etag = hashlib.sha256(content).hexdigest()
        self._answer(content, ETag=f'"{etag}"', X_Repo_Commit=COMMIT, Accept_Ranges="bytes")


COMMIT = "a" * 40
_NAME = r"([\w.-]+/[\w.-]+)"
_ROUTES = {
    r"/api/repos/create": _Handler.create,
    rf"/api/models/{_NAME}/preupload/main": _Handler.preupload,
    rf"/{_NAME}\.git/info/lfs/objects/batch": _Handler.batch,
    r"/lfs/(\w+)": _Handler.store,
    rf"/api/models/{_NAME}/commit/main": _Handler.commit,
    rf"/api/(?:models|datasets)/{_NAME}/revision/[\w%]+": _Handler.describe,
    rf"/api/(?:models|datasets)/{_NAME}/tree/[\w%]+": _Handler.tree,
    rf"/(?:datasets/)?{_NAME}/resolve/[\w%]+/(.+)": _Handler.resolve,
}


@contextlib.contextmanager
def fake_hub() -> Iterator[FakeHub]:
    hub = FakeHub()
    threading.Thread(target=hub.serve_forever, daemon=True).start()
    try:
        yield hub
    finally:
        hub.shutdown()
        hub.server_close()
