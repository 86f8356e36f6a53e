"""A Hugging Face Hub on the loopback: the endpoints the real client calls, and ways to misbehave.

    with FakeHub() as hub:
        commit = hub.add("me/repo", {"adapter_config.json": b"{}"})
        subprocess.run(..., env={**os.environ, **hub.env(tmp_path)})
        hub.requests            # every request: method, path, headers, host ("hub" or "cdn")

Large files (`LFS_SUFFIXES`) are LFS objects and are served by a second server on another port,
reached by a redirect, as the Hub's CDN is: a token sent there has leaked. `hub.fault(...)` makes
chosen requests slow, cut short, of the wrong length, of wrong content or an error.
`hub.before(...)` runs a function before a request is answered.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit

LFS_SUFFIXES = (".safetensors", ".bin", ".pth", ".pt")
TOKEN = "hf_loopback"
USER = "tester"


@dataclass
class Request:
    """One request as it arrived."""

    host: str
    method: str
    path: str
    headers: dict[str, str]
    body: bytes


@dataclass
class Fault:
    """What to do to the next `times` requests whose "METHOD path" matches `pattern`."""

    pattern: str
    kind: str
    """slow | half | longer | shorter | content | status"""
    times: int = 1_000_000
    seconds: float = 0.0
    status: int = 500
    code: str = ""
    content: bytes = b""


@dataclass
class Repo:
    """Commits are whole trees: {path: bytes}. Refs name commits."""

    private: bool = False
    gated: bool = False
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    refs: dict[str, str] = field(default_factory=dict)
    messages: list[str] = field(default_factory=list)


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def blob_id(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


def is_lfs(path: str) -> bool:
    return path.endswith(LFS_SUFFIXES)


class FakeHub:
    """Two loopback servers: the Hub and its CDN."""

    def __init__(self) -> None:
        self.repos: dict[str, Repo] = {}
        self.objects: dict[str, bytes] = {}
        self.requests: list[Request] = []
        self.faults: list[Fault] = []
        self._before: list[tuple[str, Callable[[], object]]] = []
        self._lock = threading.RLock()
        self._servers = [self._serve(_HubHandler, "hub"), self._serve(_CdnHandler, "cdn")]
        self.url, self.cdn_url = (
            f"http://127.0.0.1:{server.server_address[1]}" for server in self._servers
        )

    def _serve(self, handler: type[_Handler], host: str) -> ThreadingHTTPServer:
        bound = type(handler.__name__, (handler,), {"hub": self, "host": host})
        server = ThreadingHTTPServer(("127.0.0.1", 0), bound)
        server.daemon_threads = True
        threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
        return server

    def __enter__(self) -> FakeHub:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def stop(self) -> None:
        """Close both ports: from now on every connection is refused."""
        for server in self._servers:
            server.shutdown()
            server.server_close()
        self._servers = []

    def env(self, home: Path, *, token: str | None = TOKEN) -> dict[str, str]:
        """Environment of a client process; huggingface_hub reads it when it is imported."""
        env = {
            "HF_ENDPOINT": self.url,
            "HF_HOME": str(home),
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            "HF_HUB_ETAG_TIMEOUT": "2",
            "HF_HUB_DOWNLOAD_TIMEOUT": "2",
            "NO_PROXY": "127.0.0.1",
        }
        return env if token is None else {**env, "HF_TOKEN": token}

    def add(
        self,
        repo_id: str,
        files: dict[str, bytes],
        *,
        revision: str = "main",
        private: bool = False,
        gated: bool = False,
    ) -> str:
        """Commit `files` on top of `revision` (made if missing); the commit's 40 hex digits."""
        with self._lock:
            repo = self.repos.setdefault(repo_id, Repo())
            repo.private |= private
            repo.gated |= gated
            parent = repo.refs.get(revision, repo.refs.get("main", ""))
            tree = {**repo.commits.get(parent, {}), **files}
            name = f"{repo_id} {revision} {parent} {len(repo.commits)}"
            commit = hashlib.sha1(name.encode()).hexdigest()
            repo.commits[commit] = tree
            repo.refs[revision] = commit
            repo.refs.setdefault("main", commit)
            for path, data in files.items():
                if is_lfs(path):
                    self.objects[sha256(data)] = data
            return commit

    def files(self, repo_id: str, revision: str = "main") -> dict[str, bytes]:
        repo = self.repos[repo_id]
        return repo.commits[repo.refs.get(revision, revision)]

    def fault(self, pattern: str, kind: str, **how: object) -> Fault:
        fault = Fault(pattern, kind, **how)  # type: ignore[arg-type]
        self.faults.append(fault)
        return fault

    def before(self, pattern: str, action: Callable[[], object]) -> None:
        """Run `action` once, before the next request whose "METHOD path" matches is answered."""
        self._before.append((pattern, action))

    def count(self, pattern: str) -> int:
        return sum(bool(re.search(pattern, f"{r.method} {r.path}")) for r in self.requests)

    def _arrived(self, request: Request) -> Fault | None:
        line = f"{request.method} {request.path}"
        with self._lock:
            self.requests.append(request)
            for entry in [entry for entry in self._before if re.search(entry[0], line)]:
                self._before.remove(entry)
                entry[1]()
            for fault in self.faults:
                if fault.times > 0 and re.search(fault.pattern, line):
                    fault.times -= 1
                    return fault
        return None


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: FakeHub
    host: str
    fault: Fault | None

    def log_message(self, *_: object) -> None:
        pass

    def read_body(self) -> bytes:
        if self.headers.get("Transfer-Encoding", "").lower() != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        body = b""
        while size := int(self.rfile.readline().split(b";")[0], 16):
            body += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return body

    def send(
        self,
        status: int,
        body: object = b"",
        headers: dict[str, str] | None = None,
        content_type: str = "application/json",
    ) -> None:
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        fault = self.fault
        if fault and fault.kind == "content":
            data = fault.content or bytes(len(data))
        length = len(data)
        if fault and fault.kind in ("longer", "shorter"):
            length += 7 if fault.kind == "longer" else -7
        self.send_response(status)
        every = {"Content-Type": content_type, "Content-Length": str(length), "X-Request-Id": "1"}
        for key, value in {**every, **(headers or {})}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command == "HEAD":
            return
        if fault and fault.kind == "half":
            data = data[: len(data) // 2]
        self.wfile.write(data[:length])
        if fault and fault.kind in ("half", "longer"):
            self.close_connection = True

    def send_file(self, data: bytes, headers: dict[str, str]) -> None:
        headers = {**headers, "Accept-Ranges": "bytes"}
        asked = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
        if asked and self.command == "GET":
            start = int(asked[1])
            headers["Content-Range"] = f"bytes {start}-{len(data) - 1}/{len(data)}"
            self.send(206, data[start:], headers, "application/octet-stream")
        else:
            self.send(200, data, headers, "application/octet-stream")

    def error(self, status: int, code: str, message: str, **headers: str) -> None:
        extra = {name.replace("_", "-"): value for name, value in headers.items()}
        if code:
            extra |= {"X-Error-Code": code}
        self.send(status, {"error": message}, {**extra, "X-Error-Message": message})

    def handle_any(self) -> None:
        body = self.read_body()
        request = Request(self.host, self.command, self.path, dict(self.headers.items()), body)
        self.fault = self.hub._arrived(request)
        if self.fault and self.fault.kind == "slow":
            time.sleep(self.fault.seconds)
        if self.fault and self.fault.kind == "status":
            status, code = self.fault.status, self.fault.code
            self.fault = None
            self.error(status, code, f"the loopback Hub was told to answer {status}")
            return
        try:
            self.answer(body)
        except (BrokenPipeError, ConnectionResetError):
            self.close_connection = True

    def answer(self, body: bytes) -> None:
        raise NotImplementedError

    do_GET = do_HEAD = do_POST = do_PUT = handle_any


class _CdnHandler(_Handler):
    def answer(self, body: bytes) -> None:
        data = self.hub.objects.get(self.path.rsplit("/", 1)[-1])
        if data is None:
            self.send(404, {"error": "no such object"})
        else:
            self.send_file(data, {"ETag": f'"{sha256(data)}"'})


class _HubHandler(_Handler):
    @property
    def signed_in(self) -> bool:
        return self.headers.get("Authorization") == f"Bearer {TOKEN}"

    def answer(self, body: bytes) -> None:
        url = urlsplit(self.path)
        parts = [unquote(part) for part in url.path.strip("/").split("/")]
        match (self.command, *parts):
            case ("GET", "api", "whoami-v2"):
                self.whoami()
            case ("POST", "api", "repos", "create"):
                self.create_repo(json.loads(body))
            case ("POST", "api", "validate-yaml"):
                self.validate_yaml(json.loads(body)["content"])
            case (_, "api", "models", owner, name, *rest):
                self.models(f"{owner}/{name}", rest, parse_qs(url.query), body)
            case ("POST", owner, name, "info", "lfs", "objects", "batch"):
                self.lfs_batch(json.loads(body))
            case ("PUT", "_lfs", oid):
                self.hub.objects[oid] = body
                self.send(200 if sha256(body) == oid else 400)
            case ("POST", "_lfs", oid, "verify"):
                self.send(200 if oid in self.hub.objects else 404, {})
            case ("HEAD" | "GET", owner, name, "resolve", revision, *path):
                self.resolve(f"{owner}/{name}", revision, "/".join(path))
            case _:
                self.send(404, {"error": f"unhandled {self.command} {self.path}"})

    def whoami(self) -> None:
        if not self.signed_in:
            self.error(401, "", "Invalid user token.")
            return
        token = {"type": "access_token", "accessToken": {"role": "write"}}
        self.send(200, {"type": "user", "name": USER, "orgs": [], "auth": token})

    def create_repo(self, wanted: dict[str, object]) -> None:
        if not self.signed_in:
            self.error(401, "", "Invalid username or password.")
            return
        repo_id = f"{wanted.get('organization') or USER}/{wanted['name']}"
        answer = {"url": f"{self.hub.url}/{repo_id}", "name": repo_id, "id": repo_id}
        with self.hub._lock:
            known = repo_id in self.hub.repos
            if not known:
                private = bool(wanted.get("private")) or wanted.get("visibility") == "private"
                self.hub.add(repo_id, {".gitattributes": b"*.safetensors filter=lfs\n"})
                self.hub.repos[repo_id].private = private
        self.send(409 if known else 200, answer)

    def validate_yaml(self, content: str) -> None:
        # the Hub refuses a card whose base_model is a path of the author's machine
        base = re.search(r"^base_model: *(.+?)\r?$", content, re.MULTILINE)
        if base and not re.fullmatch(r"[\w.-]+/[\w.-]+", base[1].strip("'\" ")):
            message = f'"base_model" with value "{base[1]}" is not valid. Use a model id.'
            self.send(400, {"errors": [{"message": message}], "warnings": []})
        else:
            self.send(200, {"errors": [], "warnings": []})

    def visible(self, repo_id: str) -> Repo | None:
        """The repository, or None after the error the Hub would answer."""
        repo = self.hub.repos.get(repo_id)
        if repo is None or (repo.private and not self.signed_in):
            # an unknown and a private repository look the same to a stranger
            self.error(404 if self.signed_in else 401, "RepoNotFound", "Repository not found")
            return None
        return repo

    def models(
        self, repo_id: str, rest: list[str], query: dict[str, list[str]], body: bytes
    ) -> None:
        repo = self.visible(repo_id)
        if repo is None:
            return
        verb, revision = (rest[0], "/".join(rest[1:]) or "main") if rest else ("revision", "main")
        if verb == "branch":
            start = json.loads(body or b"{}").get("startingPoint", "main")
            repo.refs[revision] = repo.refs.get(start, start)
            self.send(200, {})
            return
        if verb == "tree":
            revision = rest[1]
        commit = repo.refs.get(revision, revision)
        if commit not in repo.commits:
            self.error(404, "RevisionNotFound", f"Invalid rev id: {revision}")
            return
        tree = repo.commits[commit]
        match (self.command, verb):
            case ("GET", "revision"):
                self.send(200, self.info(repo_id, repo, commit, tree))
            case ("GET", "tree"):
                self.send(200, [entry(path, data) for path, data in tree.items()])
            case ("POST", "preupload"):
                self.preupload(json.loads(body)["files"], tree)
            case ("POST", "commit"):
                self.commit(repo_id, repo, revision, query, body)
            case _:
                self.send(404, {"error": f"unhandled {self.command} {self.path}"})

    def info(self, repo_id: str, repo: Repo, sha: str, tree: dict[str, bytes]) -> dict[str, object]:
        return {
            "_id": "1",
            "id": repo_id,
            "modelId": repo_id,
            "sha": sha,
            "private": repo.private,
            "gated": "manual" if repo.gated else False,
            "tags": [],
            "downloads": 0,
            "likes": 0,
            "siblings": [{"rfilename": path} for path in tree],
        }

    def preupload(self, files: list[dict[str, object]], tree: dict[str, bytes]) -> None:
        answers = []
        for file in files:
            path = str(file["path"])
            mode = "lfs" if is_lfs(path) else "regular"
            answer = {"path": path, "uploadMode": mode, "shouldIgnore": False}
            if path in tree:
                answer["oid"] = sha256(tree[path]) if is_lfs(path) else blob_id(tree[path])
            answers.append(answer)
        self.send(200, {"files": answers})

    def commit(
        self, repo_id: str, repo: Repo, revision: str, query: dict[str, list[str]], body: bytes
    ) -> None:
        if not self.signed_in:
            self.error(403, "", "Forbidden: you need write access.")
            return
        files: dict[str, bytes] = {}
        with self.hub._lock:
            for line in filter(None, body.splitlines()):
                item = json.loads(line)
                key, value = item["key"], item["value"]
                if key == "header":
                    parent = value.get("parentCommit")
                    if parent and parent != repo.refs[revision]:
                        self.error(412, "", "A commit has happened since.")
                        return
                    repo.messages.append(value["summary"])
                elif key == "file":
                    files[value["path"]] = base64.b64decode(value["content"])
                elif key == "lfsFile":
                    if value["oid"] not in self.hub.objects:
                        self.error(400, "", f"LFS object {value['oid']} was not uploaded")
                        return
                    files[value["path"]] = self.hub.objects[value["oid"]]
            pull_request = None
            if query.get("create_pr") == ["1"]:
                number = 1 + sum(ref.startswith("refs/pr/") for ref in repo.refs)
                revision = f"refs/pr/{number}"
                pull_request = f"{self.hub.url}/{repo_id}/discussions/{number}"
            commit = self.hub.add(repo_id, files, revision=revision)
        answer = {
            "success": True,
            "commitOid": commit,
            "commitUrl": f"{self.hub.url}/{repo_id}/commit/{commit}",
            "hookOutput": "",
        }
        if pull_request:
            answer["pullRequestUrl"] = pull_request
        self.send(200, answer)

    def lfs_batch(self, wanted: dict[str, list[dict[str, object]]]) -> None:
        answers = []
        for item in wanted["objects"]:
            answer: dict[str, object] = {"oid": item["oid"], "size": item["size"]}
            if item["oid"] not in self.hub.objects:
                upload = f"{self.hub.url}/_lfs/{item['oid']}"
                answer["actions"] = {
                    "upload": {"href": upload, "header": {}},
                    "verify": {"href": f"{upload}/verify", "header": {}},
                }
            answers.append(answer)
        content_type = "application/vnd.git-lfs+json"
        self.send(200, {"transfer": "basic", "objects": answers}, content_type=content_type)

    def resolve(self, repo_id: str, revision: str, path: str) -> None:
        repo = self.visible(repo_id)
        if repo is None:
            return
        if repo.gated and not self.signed_in:
            self.error(401, "GatedRepo", f"Access to model {repo_id} is restricted.")
            return
        commit = repo.refs.get(revision, revision)
        if commit not in repo.commits:
            self.error(404, "RevisionNotFound", f"Invalid rev id: {revision}")
            return
        if path not in repo.commits[commit]:
            self.error(404, "EntryNotFound", f"Entry not found: {path}", X_Repo_Commit=commit)
            return
        data = repo.commits[commit][path]
        if not is_lfs(path):
            self.send_file(data, {"X-Repo-Commit": commit, "ETag": f'"{blob_id(data)}"'})
            return
        headers = {
            "X-Repo-Commit": commit,
            "X-Linked-Etag": f'"{sha256(data)}"',
            "X-Linked-Size": str(len(data)),
            "Location": f"{self.hub.cdn_url}/{sha256(data)}",
        }
        self.send(302, b"", headers)


def entry(path: str, data: bytes) -> dict[str, object]:
    """A file of a repository as the tree endpoint lists it."""
    listed: dict[str, object] = {"type": "file", "path": path, "oid": blob_id(data)}
    listed["size"] = len(data)
    if is_lfs(path):
        listed["lfs"] = {"oid": sha256(data), "size": len(data), "pointerSize": 134}
    return listed
