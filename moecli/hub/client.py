"""Knows how a hub is asked and what its refusals mean; the only module that uses huggingface_hub.

Knows nothing of models or of files on disk. Bytes come over plain HTTP, by ranges: so they can be
taken up where a kill left them, which huggingface_hub's own downloads (by Xet or not) cannot.
"""

import re
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from math import inf
from pathlib import Path
from typing import Any, TypeVar

from moecli.errors import MoecliError

T = TypeVar("T")

# Seconds between attempts; one more after the last. Any byte that arrives begins them anew.
PAUSES_S = (1.0, 2.0, 4.0, 8.0, 16.0)
# Whoever has not reached the hub yet, and has nothing to lose, learns so soon.
FIRST_PATIENCE_S = 5.0
_CONNECT_S = 4.0
# A hub that asks for more patience than this is not waited for.
LONGEST_WAIT_S = 330.0
_SLOW_DOWN = 429
_TRANSIENT = (408, _SLOW_DOWN, 500, 502, 503, 504)
_AGAIN = "the same command goes on where this one stopped"


@dataclass(frozen=True)
class RemoteFile:
    """`digest` is what the hub knows the content by, and the cache: SHA-256 of a large file, git's
    SHA-1 of a small one.
    """

    name: str
    nbytes: int
    digest: str


@dataclass(frozen=True)
class Repository:
    """One commit of a repository and its files, by name."""

    repo_id: str
    revision: str  # as it was asked for
    commit: str
    files: Mapping[str, RemoteFile]


@dataclass(frozen=True)
class Caller:
    """Who hears of trouble on the way, and may end what goes on in other threads."""

    notify: Callable[[str], None]
    stop: threading.Event = field(default_factory=threading.Event)

    def check(self) -> None:
        if self.stop.is_set():
            raise Stopped

    def pause(self, seconds: float) -> None:
        if self.stop.wait(seconds):
            raise Stopped


class Stopped(Exception):
    """Somebody else has failed or was interrupted: this ends where it is."""


class Unreachable(MoecliError):
    """The hub does not answer, or must not be asked."""


def is_hub_id(name: str) -> bool:
    """Whether `name` is written as `org/name` is."""
    return re.fullmatch(r"[A-Za-z0-9_][\w.-]*/[A-Za-z0-9_][\w.-]*", name) is not None


def cache_directory() -> Path:
    """Where all tools of the hub keep what they download."""
    from huggingface_hub import constants

    return Path(constants.HF_HUB_CACHE)


def is_offline() -> bool:
    """Whether the user has forbidden to ask the hub."""
    from huggingface_hub import constants

    return constants.is_offline_mode()


def describe(repo_id: str, revision: str | None, caller: Caller) -> Repository:
    """What a repository holds; raises MoecliError where it is not to be had.

    A hub that cannot be reached is given up after some seconds.
    """
    from huggingface_hub import HfApi, constants

    api = HfApi(endpoint=constants.ENDPOINT, library_name="moecli")
    patience = constants.HF_HUB_ETAG_TIMEOUT
    timeout: Any = (_CONNECT_S, patience, patience, patience)  # to connect, read, write, queue
    found = _patiently(
        lambda: api.model_info(repo_id, revision=revision, files_metadata=True, timeout=timeout),
        *(repo_id, revision, caller),
        patience_s=FIRST_PATIENCE_S,
    )
    files = {s.rfilename: _remote_file(s) for s in found.siblings or []}
    assert found.sha is not None, "a listing names its commit"
    return Repository(repo_id, revision or "main", found.sha, files)


def _remote_file(sibling: Any) -> RemoteFile:
    if sibling.lfs is not None:
        return RemoteFile(sibling.rfilename, sibling.lfs.size, sibling.lfs.sha256)
    return RemoteFile(sibling.rfilename, sibling.size, sibling.blob_id)


def read_range(
    repository: Repository,
    file: RemoteFile,
    start: int,
    stop: int,
    sink: Callable[[bytes], None],
    caller: Caller,
) -> None:
    """Give bytes [start, stop) to `sink`, in order, however often the connection breaks."""
    position = start

    def attempt() -> None:
        nonlocal position
        with _body(repository, file, position, stop) as chunks:
            for chunk in chunks:
                caller.check()
                # A hub that sends too much is not believed.
                chunk = chunk[: stop - position]
                sink(chunk)
                position += len(chunk)
        if position < stop:
            raise _Cut(f"`{file.name}` ended {stop - position} bytes too early")

    _patiently(attempt, repository.repo_id, repository.revision, caller, progress=lambda: position)


def read_bytes(
    repository: Repository, file: RemoteFile, start: int, stop: int, caller: Caller
) -> bytes:
    """Bytes [start, stop) of a file, for what is small."""
    parts: list[bytes] = []
    read_range(repository, file, start, stop, parts.append, caller)
    return b"".join(parts)


class _Cut(Exception):
    """A body that ended too early."""


@contextmanager
def _body(
    repository: Repository, file: RemoteFile, start: int, stop: int
) -> Iterator[Iterator[bytes]]:
    from huggingface_hub import constants, hf_hub_url
    from huggingface_hub.utils import build_hf_headers, get_session, hf_raise_for_status

    url = hf_hub_url(
        repository.repo_id,
        file.name,
        revision=repository.commit,
        endpoint=constants.ENDPOINT,
    )
    headers = build_hf_headers(library_name="moecli")
    headers |= {"Range": f"bytes={start}-{stop - 1}", "Accept-Encoding": "identity"}
    # The client leaves the token behind when it is redirected to another host.
    timeout = constants.HF_HUB_DOWNLOAD_TIMEOUT
    with get_session().stream(
        "GET", url, headers=headers, timeout=timeout, follow_redirects=True
    ) as response:
        hf_raise_for_status(response)
        chunks = response.iter_bytes()  # as they arrive: what is buffered is lost in a kill
        partial = response.status_code == 206
        yield chunks if partial else _skipping(chunks, start)


def _skipping(chunks: Iterator[bytes], count: int) -> Iterator[bytes]:
    """What comes after `count` bytes: some servers send the whole where a range is asked for."""
    for chunk in chunks:
        skipped = min(count, len(chunk))
        count -= skipped
        if skipped < len(chunk):
            yield chunk[skipped:]


def _patiently(
    attempt: Callable[[], T],
    repo_id: str,
    revision: str | None,
    caller: Caller,
    progress: Callable[[], int] = lambda: 0,
    patience_s: float = inf,
) -> T:
    """Try again while that may help; raises what the last failure means to a user.

    `patience_s`: how long a connection that fails is tried again at all.
    """
    from huggingface_hub import errors

    failures, reached, began = 0, progress(), time.monotonic()
    transport: type[Exception] = errors.HTTPError
    while True:
        try:
            return attempt()
        except (transport, errors.OfflineModeIsEnabled, errors.HFValidationError, _Cut) as error:
            if progress() > reached:
                failures, reached = 0, progress()
            pause = _pause(error, failures)
            unreached = getattr(error, "response", None) is None
            late = unreached and time.monotonic() - began + (pause or 0.0) > patience_s
            if pause is None or late:
                raise _explain(error, repo_id, revision) from error
            failures += 1
            caller.notify(f"{_what_happened(error)}; trying again in {pause:.0f} s")
            caller.pause(pause)


def _pause(error: Exception, failures: int) -> float | None:
    """Seconds to wait before the next attempt; None where none would help."""
    from huggingface_hub import errors

    if isinstance(error, (errors.HFValidationError, errors.OfflineModeIsEnabled)):
        return None
    if failures >= len(PAUSES_S):
        return None
    pause = PAUSES_S[failures]
    response = getattr(error, "response", None)
    if response is None:
        return pause  # the connection
    if response.status_code not in _TRANSIENT:
        return None
    asked = _asked_wait(response.headers)
    if asked is None:
        return pause
    return asked if asked <= LONGEST_WAIT_S else None


def _asked_wait(headers: Mapping[str, str]) -> float | None:
    """Seconds that the hub asks to wait: `Retry-After: 5`, or `RateLimit: "api";r=0;t=55`."""
    if headers.get("Retry-After", "").isdigit():
        return float(headers["Retry-After"])
    limit = re.search(r"r=0;\s*t=(\d+)", headers.get("RateLimit", ""))
    return float(limit[1]) if limit else None


def _what_happened(error: Exception) -> str:
    response = getattr(error, "response", None)
    if response is None:
        return f"the connection failed ({_reason(error)})"
    if response.status_code == _SLOW_DOWN:
        return "the hub limits how often it is asked (429)"
    return f"the hub is unwell ({response.status_code})"


def _reason(error: Exception) -> str:
    return str(error).partition("\n")[0] or type(error).__name__


def _explain(error: Exception, repo_id: str, revision: str | None) -> MoecliError:
    """What a failure means to a user, and what to try next."""
    from huggingface_hub import constants, errors, get_token

    response = getattr(error, "response", None)
    status = None if response is None else response.status_code
    match error:
        case errors.OfflineModeIsEnabled():
            return Unreachable(
                f"`{repo_id}` is not whole in the cache, and HF_HUB_OFFLINE forbids to ask the hub",
                "unset HF_HUB_OFFLINE, or give a directory",
            )
        case errors.GatedRepoError():
            return _gated(repo_id, f"{constants.ENDPOINT}/{repo_id}", bool(get_token()))
        case errors.RepositoryNotFoundError():
            return MoecliError(
                f"{constants.ENDPOINT} has no `{repo_id}`, or it is private",
                "check the name; for a private one, `hf auth login` or set HF_TOKEN",
            )
        case errors.RevisionNotFoundError():
            return MoecliError(
                f"`{repo_id}` has no revision `{revision}`",
                "`--revision` takes a branch, a tag or a commit; without it, `main`",
            )
        case errors.EntryNotFoundError():
            return MoecliError(f"`{repo_id}` lacks a file: {_reason(error)}")
        case errors.HFValidationError():
            return MoecliError(f"`{repo_id}` is no name of a repository", "it is `org/name`")
    if status is None:
        return Unreachable(
            f"cannot reach {constants.ENDPOINT}: {_reason(error)}",
            f"check the connection; {_AGAIN}",
        )
    if status == 401:
        return MoecliError("the hub does not know your token", "`hf auth login`, or set HF_TOKEN")
    if status == _SLOW_DOWN:
        return MoecliError(
            "the hub limits how often it is asked, and asks for a longer pause (429)",
            f"wait some minutes; {_AGAIN}; `hf auth login` raises the limit",
        )
    said = getattr(error, "server_message", None) or _reason(error)
    return MoecliError(f"the hub refuses `{repo_id}` ({status}): {said}", f"later, {_AGAIN}")


def _gated(repo_id: str, page: str, has_token: bool) -> MoecliError:
    if has_token:
        return MoecliError(
            f"`{repo_id}` is gated, and your token has no access to it",
            f"ask for access at {page}; `hf auth login` changes the token",
        )
    return MoecliError(
        f"`{repo_id}` is gated: its owners want to know who takes it",
        f"accept its terms at {page}, then `hf auth login`",
    )
