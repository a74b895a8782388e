"""Knows how a model comes into the shared cache: what it needs, what is there, what is missing."""

import json
import shutil
from collections.abc import Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from moecli.errors import MoecliError
from moecli.hub.cache import CachedRepository
from moecli.hub.client import (
    Caller,
    RemoteFile,
    Repository,
    Stopped,
    Unreachable,
    cache_directory,
    describe,
    is_offline,
)
from moecli.hub.fetch import Progress, fetch, partial_path
from moecli.hub.selection import (
    CONFIG,
    INDEX,
    SINGLE,
    check_names,
    head_files,
    small_files,
    weight_files,
)
from moecli.units import format_nbytes

_AT_ONCE = 4  # files; one connection seldom fills a line


@dataclass(frozen=True)
class Pull:
    """What a model needs of a repository; sizes in bytes."""

    repository: Repository
    files: tuple[RemoteFile, ...]
    missing: tuple[RemoteFile, ...]
    missing_nbytes: int  # less what an interrupted download has left

    @property
    def nbytes(self) -> int:
        return sum(file.nbytes for file in self.files)

    @property
    def snapshot(self) -> Path:
        cached = CachedRepository.of(self.repository.repo_id)
        return cached.snapshot(self.repository.commit)


class PullProgress(Protocol):
    """What is told of a download; `update` comes from several threads."""

    def begin(self, wanted: Pull) -> None:
        """Before the first byte."""

    def update(self, file: RemoteFile, nbytes: int) -> None:
        """So many bytes of a file are here."""


def cached_model(repo_id: str, revision: str | None = None) -> Path | None:
    """The snapshot in the cache, where it is whole; asks nobody."""
    path = CachedRepository.of(repo_id).snapshot_of(revision or "main")
    if path is None or not (path / CONFIG).is_file():
        return None
    if (path / INDEX).is_file():
        names = weight_files(repo_id, _read_json(path / INDEX))
    else:
        names = [SINGLE]
    return path if all((path / name).is_file() for name in names) else None


def plan_pull(repo_id: str, revision: str | None, caller: Caller) -> Pull:
    """Ask the hub what a model needs; config.json and the index come at once, they say the rest.

    Raises MoecliError where the repository is not to be had or holds no model in safetensors.
    """
    repository = describe(repo_id, revision, caller)
    snapshot = _snapshot_with(repository, head_files(repository.files), caller)
    weights = weights_of(repository, snapshot)
    return _pull_of(repository, [*small_files(repository.files), *weights])


def weights_of(repository: Repository, snapshot: Path) -> list[str]:
    """The files with weights, by the index in the snapshot; all are in the repository."""
    index = snapshot / INDEX
    names = weight_files(repository.repo_id, _read_json(index) if index.is_file() else None)
    for name in names:
        if name not in repository.files:
            raise MoecliError(
                f"`{repository.repo_id}` lacks `{name}`, which its index names",
                "the repository is incomplete; take another revision",
            )
    return names


def small_snapshot(repository: Repository, caller: Caller) -> Path:
    """The snapshot with all that is no weights in it, downloaded where it is missing."""
    return _snapshot_with(repository, small_files(repository.files), caller)


def _snapshot_with(repository: Repository, names: Sequence[str], caller: Caller) -> Path:
    check_names(repository.repo_id, repository.files)
    download(_pull_of(repository, names), _silent, caller)
    cached = CachedRepository.of(repository.repo_id)
    if cached.snapshot_of(repository.revision) is None:  # else it may be of an older, whole one
        cached.remember(repository)
    return cached.snapshot(repository.commit)


def look_at(repo_id: str, caller: Caller, revision: str | None = None) -> tuple[Path, int]:
    """A directory with config.json, and the bytes of all that a model needs; no weights come.

    Where the hub cannot be asked, what is in the cache is looked at.
    """
    try:
        wanted = plan_pull(repo_id, revision, caller)
    except Unreachable:
        path = CachedRepository.of(repo_id).snapshot_of(revision or "main")
        if path is None or not (path / CONFIG).is_file():
            raise
        return path, _stated_nbytes(path)
    return wanted.snapshot, wanted.nbytes


def pull(repo_id: str, revision: str | None, progress: PullProgress, caller: Caller) -> Path:
    """The snapshot of a model in the cache, with what is missing downloaded.

    Where the hub cannot be asked, a whole snapshot is taken as it is. Raises MoecliError for what
    the hub refuses, and where the disk is too small.
    """
    try:
        wanted = plan_pull(repo_id, revision, caller)
    except Unreachable as error:
        cached = cached_model(repo_id, revision)
        if cached is None:
            raise
        if not is_offline():
            caller.notify(f"{error.message}; taking what is in the cache")
        return cached
    check_space(wanted)
    progress.begin(wanted)
    download(wanted, progress.update, caller)
    CachedRepository.of(repo_id).remember(wanted.repository)
    return wanted.snapshot


def check_space(wanted: Pull) -> None:
    """Raise MoecliError unless what is missing fits the disk of the cache."""
    root = cache_directory()
    while not root.exists():
        root = root.parent
    free = shutil.disk_usage(root).free
    if wanted.missing_nbytes > free:
        raise MoecliError(
            f"`{wanted.repository.repo_id}` needs {format_nbytes(wanted.missing_nbytes)} more; "
            f"`{cache_directory()}` has {format_nbytes(free)} free",
            f"`moecli quantize {wanted.repository.repo_id}` needs room for the result and one "
            "file; HF_HOME moves the cache",
        )


def download(wanted: Pull, progress: Progress, caller: Caller) -> None:
    """Bring what is missing, several files at once; one failure ends all."""
    repository, cached = wanted.repository, CachedRepository.of(wanted.repository.repo_id)
    team = Caller(caller.notify)

    def bring(file: RemoteFile) -> None:
        blob = cached.blob(file)
        if not blob.exists():
            fetch(repository, file, blob, progress, team)
        cached.link(repository, file)

    with ThreadPoolExecutor(_AT_ONCE) as pool:
        tasks = [pool.submit(bring, file) for file in wanted.missing]
        try:
            wait(tasks, return_when=FIRST_EXCEPTION)
        finally:
            team.stop.set()
            pool.shutdown(cancel_futures=True)
    failures = [task.exception() for task in tasks if not task.cancelled()]
    for failure in failures:
        if failure is not None and not isinstance(failure, Stopped):
            raise failure


def _pull_of(repository: Repository, names: Sequence[str]) -> Pull:
    cached = CachedRepository.of(repository.repo_id)
    files = tuple(repository.files[name] for name in names)
    missing = tuple(file for file in files if not cached.has(repository, file))
    return Pull(repository, files, missing, sum(_missing_nbytes(cached, f) for f in missing))


def _missing_nbytes(cached: CachedRepository, file: RemoteFile) -> int:
    blob = cached.blob(file)
    if blob.exists():
        return 0
    partial = partial_path(blob)
    return file.nbytes - (partial.stat().st_size if partial.exists() else 0)


def _stated_nbytes(snapshot: Path) -> int:
    """Of the weights, as the index says; without one, of what is here."""
    if (snapshot / INDEX).is_file():
        metadata = _read_json(snapshot / INDEX).get("metadata")
        if isinstance(metadata, dict) and isinstance(metadata.get("total_size"), int):
            return int(metadata["total_size"])
    return sum(file.stat().st_size for file in snapshot.iterdir())


def _read_json(path: Path) -> Mapping[str, Any]:
    try:
        content = json.loads(path.read_bytes())
    except ValueError as error:
        raise MoecliError(f"`{path}` is not JSON: {error}", "take another revision") from error
    if not isinstance(content, dict):
        raise MoecliError(f"`{path}` is not a JSON object", "take another revision")
    return content


def _silent(file: RemoteFile, nbytes: int) -> None:
    """Small files are not worth a bar."""
