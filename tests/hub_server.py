"""A Hugging Face Hub on 127.0.0.1, for the tests: repositories with commits over real HTTP, and faults to order.

`Hub` speaks as much of the protocol as `huggingface_hub` uses for models: repositories (private ones too), branches,
uploads by Git LFS, commits, and downloads of any revision, whole or from an offset. Of datasets it takes the reading.
What it holds is read in the process that started it; the client that is tested runs in another one, and orders faults
there:

    order(hub_url, "resolve", kind="truncate", times=1)

Tokens are made-up words: `TOKEN` may write and read everything, any other one nothing that is private.
"""

import base64
import collections
import hashlib
import json
import re
import socket
import struct
import threading
import urllib.parse
import urllib.request
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

TOKEN = "a-made-up-word"
USER = "tester"
# Larger files go by Git LFS, as do weights of any size.
LFS_BYTES = 200_000
# A dataset goes by `datasets/namespace/name`.
REPO = r"(?P<repo>(datasets/)?[^/]+/[^/]+)"
ROUTES = {
    "create": ("POST", r"/api/repos/create"),
    "validate_card": ("POST", r"/api/validate-yaml"),
    "whoami": ("GET", r"/api/whoami-v2"),
    "branch": ("POST", rf"/api/(models/)?{REPO}/branch/(?P<revision>[^/]+)"),
    "preupload": ("POST", rf"/api/(models/)?{REPO}/preupload/(?P<revision>[^/]+)"),
    "commit": ("POST", rf"/api/(models/)?{REPO}/commit/(?P<revision>[^/]+)"),
    "tree": ("GET", rf"/api/(models/)?{REPO}/tree/(?P<revision>[^/]+)(/(?P<path>.+))?"),
    "info": ("GET", rf"/api/(models/)?{REPO}(/revision/(?P<revision>[^/]+))?"),
    "lfs_batch": ("POST", r"/(?P<repo>[^/]+/[^/]+)\.git/info/lfs/objects/batch"),
    "lfs_upload": ("PUT", r"/lfs/(?P<oid>[0-9a-f]{64})"),
    "resolve": ("GET", rf"/{REPO}/resolve/(?P<revision>[^/]+)/(?P<path>.+)"),
    "order": ("POST", r"/test/order"),
    "counts": ("GET", r"/test/counts"),
}


class Refusal(Exception):
    """An answer that is not a success."""

    def __init__(self, status, message, code=None, headers=()):
        super().__init__(message)
        self.status, self.code, self.headers = status, code, dict(headers)


class Repository:
    """The commits of a repository, `{oid: (parent, message, {path: content})}`, and where its branches stand."""

    def __init__(self, private):
        self.private = private
        self.commits = {}
        self.branches = {}
        self.lfs_paths = set()
        self.add("main", None, "initial commit", {})

    def add(self, branch, parent, message, files):
        content = json.dumps([parent, message, sorted((p, hashlib.sha1(c).hexdigest()) for p, c in files.items())])
        oid = hashlib.sha1(content.encode()).hexdigest()
        self.commits[oid] = (parent, message, files)
        self.branches[branch] = oid
        return oid

    def oid(self, revision):
        oid = self.branches.get(revision, revision)
        if oid not in self.commits:
            raise Refusal(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return oid

    def files(self, revision="main"):
        return self.commits[self.oid(revision)][2]

    def history(self, branch="main"):
        """The messages of a branch's commits, the newest first."""
        messages, oid = [], self.branches[branch]
        while oid is not None:
            parent, message, _ = self.commits[oid]
            messages.append(message)
            oid = parent
        return messages


class Hub:
    """A running server. Use it as a context manager.

    Attributes:
        url: what `HF_ENDPOINT` has to be.
        repositories: `Repository` by `namespace/name`.
        counts: how many requests each route has seen, a `Counter`; `"head"` are the HEAD requests of `"resolve"`.
        unknown: requests that no route takes; a test asserts that there are none.
    """

    def __init__(self):
        self.repositories = {}
        self.objects = {}
        self.counts = collections.Counter()
        self.unknown = []
        self.faults = []
        self.lock = threading.Lock()
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.server.hub = self
        self.url = f"http://127.0.0.1:{self.server.server_port}"

    def __enter__(self):
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *exception):
        self.server.shutdown()
        self.server.server_close()

    def take_fault(self, route, command, path):
        """The next fault that was ordered for this request, or an empty one."""
        with self.lock:
            for fault in self.faults:
                wanted = fault.get("command", command), fault["route"]
                if wanted == (command, route) and path.endswith(fault.get("path", "")):
                    fault["times"] -= 1
                    if not fault["times"]:
                        self.faults.remove(fault)
                    return fault
        return {}


def order(url, route, kind="status", times=1, **settings):
    """Let the next `times` requests of `route` fail.

    Args:
        kind: `"status"`: answer with `status=` (and `retry_after=` seconds, `code=` for `X-Error-Code`). `"break"`:
            reset the connection after half of the request's body. `"truncate"`: send half of the answer's body after a
            `Content-Length` for all of it.
        times: how many; 0 takes back all faults that were ordered.
        settings: besides those, `command=` and `path=` for the requests of one method, or to paths with that end.
    """
    assert route in ROUTES and kind in ("status", "break", "truncate")
    body = json.dumps({"route": route, "kind": kind, "times": times, **settings}).encode()
    urllib.request.urlopen(urllib.request.Request(f"{url}/test/order", data=body, method="POST")).read()


def counts(url):
    """How many requests each route has seen."""
    return collections.Counter(json.loads(urllib.request.urlopen(f"{url}/test/counts").read()))


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *args):
        pass

    def do_GET(self):
        self.answer()

    do_HEAD = do_POST = do_PUT = do_GET

    @property
    def hub(self):
        return self.server.hub

    def answer(self):
        url = urllib.parse.urlsplit(self.path)
        method = "GET" if self.command == "HEAD" else self.command
        matches = {route: re.fullmatch(p, url.path) for route, (m, p) in ROUTES.items() if m == method}
        name, match = next(((route, match) for route, match in matches.items() if match), (None, None))
        if match is None:
            self.hub.unknown.append(f"{self.command} {url.path}")
            self.body()
            return self.send(501, b"not a part of this hub")
        with self.hub.lock:
            self.hub.counts["head" if self.command == "HEAD" else name] += 1
        values = {key: urllib.parse.unquote(value) for key, value in match.groupdict().items() if value}
        fault = self.hub.take_fault(name, self.command, url.path)
        if fault.get("kind") == "break":
            return self.reset()
        body = self.body()
        try:
            if fault.get("kind") == "status":
                headers = {"Retry-After": fault["retry_after"]} if "retry_after" in fault else {}
                raise Refusal(fault["status"], "a fault that the test ordered", fault.get("code"), headers)
            getattr(self, name)(body, truncate=fault.get("kind") == "truncate", **values)
        except Refusal as refusal:
            headers = {"X-Error-Message": str(refusal), **refusal.headers}
            if refusal.code:
                headers["X-Error-Code"] = refusal.code
            self.send(refusal.status, json.dumps({"error": str(refusal)}).encode(), headers)
        except ConnectionError:
            self.close_connection = True  # the client has left

    def body(self):
        if self.headers.get("Transfer-Encoding") == "chunked":
            parts = []
            while size := int(self.rfile.readline(), 16):
                parts.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(parts)
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def reset(self):
        """Read half of the body and reset the connection, as a router does that goes down; without a body, hang up."""
        length = int(self.headers.get("Content-Length") or 0)
        self.rfile.read(length // 2)
        if length:
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.close_connection = True

    def send(self, status, body=b"", headers=None, truncate=False):
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, str(value))
        self.send_header("Content-Length", str(len(body)))
        if truncate:
            self.send_header("Connection", "close")
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body[: len(body) // 2] if truncate else body)
        if truncate:
            self.close_connection = True

    def send_json(self, value, status=200):
        self.send(status, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def repository(self, repo, write=False):
        """The repository, if this client may see it."""
        is_user = self.headers.get("Authorization") == f"Bearer {TOKEN}"
        found = self.hub.repositories.get(repo)
        if found is None or (found.private and not is_user):
            # The Hub does not tell strangers which of the two it is.
            raise Refusal(404 if is_user else 401, "Repository not found", "RepoNotFound")
        if write:
            self.writer()
            if repo.split("/")[0] != USER:
                raise Refusal(403, f"You have no right to write to {repo}")
        return found

    def writer(self):
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            raise Refusal(401, "Invalid credentials in Authorization header")

    # One method per route, with the request's body and what the pattern has found.

    def order(self, body, **_):
        fault = json.loads(body)
        with self.hub.lock:
            if fault["times"]:
                self.hub.faults.append(fault)
            else:
                self.hub.faults.clear()
        self.send(200)

    def counts(self, body, **_):
        self.send_json(self.hub.counts)

    def create(self, body, **_):
        self.writer()
        wanted = json.loads(body)
        repo = f"{wanted.get('organization') or USER}/{wanted['name']}"
        if repo.split("/")[0] != USER:
            raise Refusal(403, f"You have no right to create a model under the namespace {repo.split('/')[0]!r}")
        with self.hub.lock:
            status = 409 if repo in self.hub.repositories else 200
            if status == 200:
                self.hub.repositories[repo] = Repository(wanted.get("visibility") == "private")
        self.send_json({"url": f"{self.hub.url}/{repo}", "name": repo, "id": repo}, status)

    def validate_card(self, body, **_):
        self.send_json({"errors": [], "warnings": []})

    def whoami(self, body, **_):
        self.writer()
        self.send_json({"type": "user", "name": USER, "fullname": USER, "orgs": [], "auth": {}})

    def branch(self, body, repo, revision, **_):
        found = self.repository(repo, write=True)
        with self.hub.lock:
            if revision in found.branches:
                raise Refusal(409, f"Reference already exists: {revision}")
            found.branches[revision] = found.oid(json.loads(body or b"{}").get("startingPoint", "main"))
        self.send_json({}, 201)

    def preupload(self, body, repo, revision, **_):
        self.repository(repo, write=True).oid(revision)
        modes = []
        for file in json.loads(body)["files"]:
            is_large = file["path"].endswith(".safetensors") or file["size"] > LFS_BYTES
            mode = "lfs" if is_large else "regular"
            modes.append({"path": file["path"], "uploadMode": mode, "shouldIgnore": False})
        self.send_json({"files": modes})

    def lfs_batch(self, body, repo, **_):
        self.repository(repo, write=True)
        objects = []
        for wanted in json.loads(body)["objects"]:
            entry = {"oid": wanted["oid"], "size": wanted["size"]}
            if wanted["oid"] not in self.hub.objects:
                entry["actions"] = {"upload": {"href": f"{self.hub.url}/lfs/{wanted['oid']}", "header": {}}}
            objects.append(entry)
        self.send_json({"transfer": "basic", "objects": objects})

    def lfs_upload(self, body, oid, **_):
        if hashlib.sha256(body).hexdigest() != oid:
            raise Refusal(400, "the content is not that of the object id")
        self.hub.objects[oid] = body
        self.send(200)

    def commit(self, body, repo, revision, **_):
        found = self.repository(repo, write=True)
        lines = [json.loads(line) for line in body.splitlines()]
        header, *changes = ((line["key"], line["value"]) for line in lines)
        with self.hub.lock:
            parent = found.oid(revision)
            if header[1].get("parentCommit", parent) != parent:
                raise Refusal(412, "A commit has happened since. Please refresh and try again.")
            files = dict(found.files(revision))
            for key, value in changes:
                if key == "file":
                    files[value["path"]] = base64.b64decode(value["content"])
                elif key == "lfsFile":
                    if value["oid"] not in self.hub.objects:
                        raise Refusal(400, f"the content of {value['path']} was never uploaded")
                    files[value["path"]] = self.hub.objects[value["oid"]]
                    found.lfs_paths.add(value["path"])
                elif key == "deletedFile":
                    del files[value["path"]]
                else:
                    raise Refusal(400, f"this hub does not know the operation {key!r}")
            oid = found.add(revision, parent, header[1]["summary"], files)
        self.send_json({"success": True, "commitOid": oid, "commitUrl": f"{self.hub.url}/{repo}/commit/{oid}"})

    def info(self, body, repo, revision="main", **_):
        found = self.repository(repo)
        about = {"id": repo, "sha": found.oid(revision), "private": found.private, "tags": []}
        self.send_json({**about, "siblings": [{"rfilename": path} for path in found.files(revision)]})

    def tree(self, body, repo, revision, path="", **_):
        found = self.repository(repo)
        entries = []
        for name, content in found.files(revision).items():
            if path and not name.startswith(f"{path}/"):
                continue
            entry = {"type": "file", "path": name, "size": len(content), "oid": blob_id(content)}
            if name in found.lfs_paths:
                oid = hashlib.sha256(content).hexdigest()
                entry["lfs"] = {"oid": oid, "size": len(content), "pointerSize": 130}
            entries.append(entry)
        if path and not entries:
            raise Refusal(404, f"{path} does not exist", "EntryNotFound")
        self.send_json(entries)

    def resolve(self, body, repo, revision, path, truncate, **_):
        found = self.repository(repo)
        oid = found.oid(revision)
        if path not in found.files(oid):
            raise Refusal(404, "Entry not found", "EntryNotFound", {"X-Repo-Commit": oid})
        content = found.files(oid)[path]
        etag = hashlib.sha256(content).hexdigest() if path in found.lfs_paths else blob_id(content)
        headers = {"X-Repo-Commit": oid, "ETag": f'"{etag}"', "Accept-Ranges": "bytes"}
        start = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range") or "")
        if start and self.command == "GET":
            first = int(start[1])
            headers["Content-Range"] = f"bytes {first}-{len(content) - 1}/{len(content)}"
            return self.send(206, content[first:], headers, truncate)
        self.send(200, content, headers, truncate)


def blob_id(content):
    """Git's name for a file of that content."""
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
