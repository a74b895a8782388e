"""A hub of two local servers: serves directories as huggingface.co serves repositories.

What it answers is what huggingface_hub asks: the listing of a repository with sizes and checksums,
its tree, and files by HEAD and GET. Large files (LFS) are redirected to a second server on another
port, as to a CDN; small ones to a path of the same server. Faults are injected by script.
"""

import hashlib
import json
import re
import socket
import struct
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, quote, unquote, urlsplit

_LARGE = (".safetensors", ".bin", ".pth", ".gguf", "tokenizer.json")
_CHUNK_NBYTES = 1 << 16


@dataclass
class Fault:
    """What goes wrong with requests whose path contains `match`, the next `times` times.

    With a `status` the request is refused; with `after` bytes of the body the connection is
    `reset`, the body is `cut` (a clean end, too early), `stalled`, or the next byte is `flipped`.
    """

    match: str
    times: int = 1
    status: int | None = None
    headers: dict[str, str] = field(default_factory=dict)
    after: int | None = None
    action: str = "reset"
    method: str | None = "GET"
    range: str | None = None  # only of requests for exactly this range


@dataclass(frozen=True)
class Asked:
    """One request, as it arrived."""

    server: str  # hub, cdn
    method: str
    path: str
    range: str | None
    token: str | None


@dataclass
class Repo:
    """A directory that is served; `token` is what opens it where it is private or gated."""

    path: Path
    private: bool = False
    gated: bool = False
    token: str | None = None
    branches: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.branches.setdefault("main", self.commit)

    @property
    def commit(self) -> str:
        digest = hashlib.sha1()
        for name in self.names:
            digest.update(name.encode() + (self.path / name).read_bytes())
        return digest.hexdigest()

    @property
    def names(self) -> list[str]:
        files = (file for file in self.path.rglob("*") if file.is_file())
        return sorted(str(file.relative_to(self.path)) for file in files)

    def description(self, name: str) -> dict[str, Any]:
        """As a listing gives a file."""
        content = (self.path / name).read_bytes()
        blob_id = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
        said: dict[str, Any] = {"size": len(content), "blobId": blob_id}
        if name.endswith(_LARGE):
            sha256 = hashlib.sha256(content).hexdigest()
            said["lfs"] = {"sha256": sha256, "size": len(content), "pointerSize": 135}
        return said


class StandInHub:
    """Two servers on 127.0.0.1; `asked` is the log of all requests."""

    def __init__(self) -> None:
        self.repos: dict[str, Repo] = {}
        self.faults: list[Fault] = []
        self.asked: list[Asked] = []
        self.rate: float | None = None  # bytes a second of each connection
        self.ignores_ranges = False
        self.wants_token: str | None = None  # any other is refused as invalid
        self._descriptions: dict[tuple[Path, float], dict[str, Any]] = {}
        self._lock = threading.Lock()
        self._servers = {name: self._start(name) for name in ("hub", "cdn")}

    @property
    def url(self) -> str:
        return self.address("hub")

    def address(self, server: str) -> str:
        return f"http://127.0.0.1:{self._servers[server].server_address[1]}"

    def close(self) -> None:
        for server in self._servers.values():
            server.shutdown()
            server.server_close()

    def bodies(self, part: str = "") -> list[Asked]:
        """What was asked of the CDN."""
        return [a for a in self.asked if a.server == "cdn" and part in a.path]

    def described(self, repo: Repo, name: str) -> dict[str, Any]:
        path = repo.path / name
        key = (path, path.stat().st_mtime)
        if key not in self._descriptions:
            self._descriptions[key] = repo.description(name)
        return self._descriptions[key]

    def take_fault(self, asked: Asked) -> Fault | None:
        with self._lock:
            for fault in self.faults:
                fits = fault.match in asked.path and fault.method in (None, asked.method)
                if fault.times > 0 and fits and fault.range in (None, asked.range):
                    fault.times -= 1
                    return fault
        return None

    def _start(self, name: str) -> ThreadingHTTPServer:
        handler = type("Handler", (_Handler,), {"hub": self, "name": name})
        server = _QuietServer(("127.0.0.1", 0), handler)
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        return server


class _QuietServer(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request: object, client_address: object) -> None:
        """Clients are killed here; that is no news."""


@contextmanager
def stand_in() -> Iterator[StandInHub]:
    hub = StandInHub()
    try:
        yield hub
    finally:
        hub.close()


class _Refused(Exception):
    def __init__(self, status: int, code: str | None = None, message: str = "") -> None:
        self.status, self.code, self.message = status, code, message


class _Handler(BaseHTTPRequestHandler):
    hub: StandInHub
    name: str
    protocol_version = "HTTP/1.1"
    fault: Fault | None = None

    def log_message(self, *_: object) -> None:
        """Nothing on the terminal."""

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def _answer(self) -> None:
        token = (self.headers.get("Authorization") or "").removeprefix("Bearer ") or None
        asked = Asked(self.name, self.command, self.path, self.headers.get("Range"), token)
        self.hub.asked.append(asked)
        self.fault = self.hub.take_fault(asked)
        try:
            if self.fault is not None and self.fault.status is not None:
                raise _Refused(self.fault.status, None, "injected")
            url = urlsplit(self.path)
            parts = [unquote(part) for part in url.path.strip("/").split("/")]
            if self.name == "cdn":
                self._send_file(Path(parse_qs(url.query)["file"][0]), {})
            elif parts[:2] == ["api", "models"]:
                self._api(parts[2:], token, "blobs" in parse_qs(url.query))
            elif parts[:2] == ["api", "resolve-cache"]:
                repo = self.hub.repos["/".join(parts[3:5])]
                self._send_small(repo, parts[5], "/".join(parts[6:]))
            elif len(parts) > 4 and parts[2] == "resolve":
                self._resolve("/".join(parts[:2]), parts[3], "/".join(parts[4:]), token)
            else:
                raise _Refused(404)
        except _Refused as refusal:
            self._refuse(refusal)
        except (BrokenPipeError, ConnectionResetError):
            self.close_connection = True

    def _api(self, parts: list[str], token: str | None, blobs: bool) -> None:
        repo_id, rest = "/".join(parts[:2]), parts[2:]
        repo = self._repo(repo_id, token)
        commit = self._commit(repo, rest[1] if rest else "main")
        if rest[:1] == ["tree"]:
            self._send_json([self._tree_entry(repo, name) for name in repo.names])
            return
        siblings = [
            {"rfilename": name, **(self.hub.described(repo, name) if blobs else {})}
            for name in repo.names
        ]
        gated = "manual" if repo.gated else False
        said = {"id": repo_id, "modelId": repo_id, "private": repo.private, "gated": gated}
        self._send_json({**said, "sha": commit, "siblings": siblings, "tags": []})

    def _tree_entry(self, repo: Repo, name: str) -> dict[str, Any]:
        said = self.hub.described(repo, name)
        entry = {"type": "file", "path": name, "size": said["size"], "oid": said["blobId"]}
        return (
            {**entry, "lfs": {**said["lfs"], "oid": said["lfs"]["sha256"]}}
            if "lfs" in said
            else entry
        )

    def _resolve(self, repo_id: str, revision: str, name: str, token: str | None) -> None:
        repo = self._repo(repo_id, token)
        commit = self._commit(repo, revision)
        if repo.gated and token != repo.token:
            raise _Refused(
                401 if token is None else 403, "GatedRepo", f"Access to {repo_id} is restricted."
            )
        path = repo.path / name
        if not path.is_file():
            raise _Refused(404, "EntryNotFound")
        said = self.hub.described(repo, name)
        if "lfs" not in said:
            where = f"/api/resolve-cache/models/{repo_id}/{commit}/{quote(name)}"
            self._send(307, {"Location": where, "X-Repo-Commit": commit})
            return
        sha256 = said["lfs"]["sha256"]
        headers = {
            "Location": f"{self.hub.address('cdn')}/{sha256}?file={quote(str(path))}&Signature=s",
            "X-Repo-Commit": commit,
            "X-Linked-Etag": f'"{sha256}"',
            "X-Linked-Size": str(said["size"]),
            "ETag": f'"{sha256[::-1]}"',
            # As of files that may be had by Xet too.
            "X-Xet-Hash": sha256,
            "Link": f'<{self.hub.url}/api/models/{repo_id}/xet-read-token/x>; rel="xet-auth"',
        }
        self._send(302, headers)

    def _send_small(self, repo: Repo, commit: str, name: str) -> None:
        etag = self.hub.described(repo, name)["blobId"]
        self._send_file(repo.path / name, {"ETag": f'"{etag}"', "X-Repo-Commit": commit})

    def _repo(self, repo_id: str, token: str | None) -> Repo:
        if self.hub.wants_token and token not in (None, self.hub.wants_token):
            raise _Refused(401, None, "Invalid credentials in Authorization header")
        repo = self.hub.repos.get(repo_id)
        if repo is None or (repo.private and token != repo.token):
            raise _Refused(404 if token else 401, "RepoNotFound", "Repository not found")
        return repo

    def _commit(self, repo: Repo, revision: str) -> str:
        if revision in repo.branches.values():
            return revision
        if revision not in repo.branches:
            raise _Refused(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return repo.branches[revision]

    def _send_file(self, path: Path, headers: dict[str, str]) -> None:
        size = path.stat().st_size
        start, stop, status = 0, size, 200
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if asked and not self.hub.ignores_ranges:
            start = int(asked[1])
            stop = min(size, int(asked[2]) + 1) if asked[2] else size
            if start >= size:
                raise _Refused(416)
            status = 206
            headers = {**headers, "Content-Range": f"bytes {start}-{stop - 1}/{size}"}
        self._send(status, headers, stop - start)
        if self.command == "GET":
            self._send_body(path, start, stop)

    def _send_body(self, path: Path, start: int, stop: int) -> None:
        fault, sent, began = self.fault, 0, time.monotonic()
        with path.open("rb") as file:
            file.seek(start)
            while sent < stop - start:
                size = min(_CHUNK_NBYTES, stop - start - sent)
                if fault and fault.after is not None and sent <= fault.after < sent + size:
                    size = fault.after - sent
                    self.wfile.write(file.read(size))
                    self._break(fault, file.read(1))
                    sent += size + 1
                    continue
                self.wfile.write(file.read(size))
                sent += size
                if self.hub.rate:
                    time.sleep(max(0.0, began + sent / self.hub.rate - time.monotonic()))

    def _break(self, fault: Fault, byte: bytes) -> None:
        """Do what the script says in the middle of a body."""
        self.wfile.flush()
        if fault.action == "flipped":
            self.wfile.write(bytes([byte[0] ^ 0x10]))
            return
        if fault.action == "stalled":
            time.sleep(3.0)
        if fault.action == "reset":
            linger = struct.pack("ii", 1, 0)
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
        self.connection.shutdown(
            socket.SHUT_WR
        ) if fault.action == "cut" else self.connection.close()
        raise BrokenPipeError

    def _refuse(self, refusal: _Refused) -> None:
        headers = {"X-Error-Message": refusal.message} if refusal.message else {}
        if refusal.code:
            headers["X-Error-Code"] = refusal.code
        if self.fault is not None:
            headers |= self.fault.headers
        self._send(refusal.status, headers, 0)

    def _send_json(self, content: Any) -> None:
        body = json.dumps(content).encode()
        self._send(200, {"Content-Type": "application/json"}, len(body))
        if self.command == "GET":
            self.wfile.write(body)

    def _send(self, status: int, headers: dict[str, str], nbytes: int = 0) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(nbytes))
        self.end_headers()
