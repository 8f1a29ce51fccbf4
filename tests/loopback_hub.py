"""A Hugging Face Hub on 127.0.0.1, in memory: as much of its protocol as pushing and pulling a model takes."""

import base64
import hashlib
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit


LARGEST_UPLOAD = 32 * 2**20


class LoopbackHub:
    """Serves from `with LoopbackHub() as hub` on; `hub.url` is its HF_ENDPOINT and `hub.token` may write.

    Attributes:
        commits: The files of every commit, by repository and commit id, oldest first.
        refused: Requests it does not know or allow, as (status, method, path).
    """

    user = "loopback"
    token = "hf_loopback"

    def __init__(self):
        self.commits: dict[str, dict[str, dict[str, bytes]]] = {}
        self.refused: list[tuple[int, str, str]] = []
        self._lock = threading.Lock()
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": self}))
        self._server.daemon_threads = True
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self):
        self._thread.start()
        return self

    def __exit__(self, *error):
        self._server.shutdown()
        self._server.server_close()
        self._thread.join(timeout=10)

    def files(self, repo):
        """The latest files of `repo`, by name."""
        return self.commits[repo][self.head(repo)]

    def head(self, repo):
        return next(reversed(self.commits[repo]))

    def create(self, repo):
        with self._lock:
            if repo in self.commits:
                return False
            self.commits[repo] = {}
            self._add_commit(repo, {})
            return True

    def commit(self, repo, lines):
        """Applies the lines of a commit request; returns the new commit's id."""
        with self._lock:
            files = dict(self.files(repo))
            for line in lines:
                value = line["value"]
                if line["key"] == "file":
                    files[value["path"]] = base64.b64decode(value["content"])
                elif line["key"] == "deletedFile":
                    del files[value["path"]]
                elif line["key"] != "header":
                    raise ValueError(f"unknown operation {line['key']!r}")
            return self._add_commit(repo, files)

    def _add_commit(self, repo, files):
        number = len(self.commits[repo])
        commit = hashlib.sha1(f"{repo} {number}".encode()).hexdigest()
        self.commits[repo][commit] = files
        return commit


class _Handler(BaseHTTPRequestHandler):
    """Finds the route of a request: a method of this class by its pattern."""

    hub: LoopbackHub
    timeout = 30

    def do_GET(self):
        self._route({r"api/models/([^/]+/[^/]+)(?:/revision/([^/]+))?": self._info,
                     r"api/models/([^/]+/[^/]+)/tree/([^/]+)(?:/(.+))?": self._tree,
                     r"([^/]+/[^/]+)/resolve/([^/]+)/(.+)": self._resolve})  # fmt: skip

    do_HEAD = do_GET  # noqa: N815, the standard library's name

    def do_POST(self):
        length = int(self.headers.get("Content-Length", 0))
        if length > LARGEST_UPLOAD:
            self.close_connection = True
            return self._refuse(413, "TooLarge")
        self.body = self.rfile.read(length)
        path = urlsplit(self.path).path
        if path != "/api/validate-yaml" and self.headers.get("Authorization") != f"Bearer {self.hub.token}":
            return self._refuse(401, "Unauthorized")
        self._route({r"api/validate-yaml": lambda: self._answer({"errors": [], "warnings": []}),
                     r"api/repos/create": self._create,
                     r"api/models/([^/]+/[^/]+)/preupload/main": self._preupload,
                     r"api/models/([^/]+/[^/]+)/commit/main": self._commit})  # fmt: skip

    def _route(self, routes):
        path = unquote(urlsplit(self.path).path).lstrip("/")
        for pattern, answer in routes.items():
            if match := re.fullmatch(pattern, path):
                return answer(*match.groups())
        self._refuse(501, "NotImplemented")

    def _create(self):
        request = json.loads(self.body)
        repo = f"{request.get('organization') or self.hub.user}/{request['name']}"
        created = self.hub.create(repo)
        self._answer({"url": f"{self.hub.url}/{repo}", "name": repo}, status=200 if created else 409)

    def _preupload(self, repo):
        # "regular" sends the content along with the commit: neither LFS nor Xet is needed.
        names = [file["path"] for file in json.loads(self.body)["files"]]
        self._answer({"files": [{"path": name, "uploadMode": "regular", "shouldIgnore": False} for name in names]})

    def _commit(self, repo):
        if repo not in self.hub.commits:
            return self._refuse(404, "RepoNotFound")
        commit = self.hub.commit(repo, [json.loads(line) for line in self.body.splitlines()])
        self._answer({"success": True, "commitOid": commit, "commitUrl": f"{self.hub.url}/{repo}/commit/{commit}"})

    def _find(self, repo, revision):
        """The commit's id and files; None after having answered that there is no such thing."""
        if repo not in self.hub.commits:
            return self._refuse(404, "RepoNotFound")
        commit = self.hub.head(repo) if revision in (None, "main") else revision
        if commit not in self.hub.commits[repo]:
            return self._refuse(404, "RevisionNotFound")
        return commit, self.hub.commits[repo][commit]

    def _info(self, repo, revision):
        if snapshot := self._find(repo, revision):
            commit, files = snapshot
            siblings = [{"rfilename": name} for name in files]
            self._answer({"_id": repo, "id": repo, "sha": commit, "private": False, "tags": [], "siblings": siblings})

    def _tree(self, repo, revision, folder):
        if snapshot := self._find(repo, revision):
            prefix = f"{folder}/" if folder else ""
            inside = {name: content for name, content in snapshot[1].items() if name.startswith(prefix)}
            if folder and not inside:
                return self._refuse(404, "EntryNotFound")
            self._answer(
                [{"type": "file", "path": name, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}
                 for name, content in inside.items()]
            )  # fmt: skip

    def _resolve(self, repo, revision, name):
        if snapshot := self._find(repo, revision):
            commit, files = snapshot
            if name not in files:
                return self._refuse(404, "EntryNotFound", {"X-Repo-Commit": commit})
            content = files[name]
            etag = f'"{hashlib.sha1(content).hexdigest()}"'
            self._answer(content, headers={"X-Repo-Commit": commit, "ETag": etag})

    def _refuse(self, status, code, headers=None):
        self.hub.refused.append((status, self.command, self.path))
        self._answer({"error": code}, status, {"X-Error-Code": code, "X-Error-Message": code, **(headers or {})})

    def _answer(self, content, status=200, headers=None):
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, *args):
        """Keeps quiet: `LoopbackHub.refused` tells what went wrong."""
