"""Knows how one file comes from the hub to the disk: taken up after a kill, and checked."""

import fcntl
import hashlib
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from moecli.errors import MoecliError
from moecli.hub.client import Caller, RemoteFile, Repository, read_range

Progress = Callable[[RemoteFile, int], None]  # bytes of the file that are here
PARTIAL_SUFFIX = ".moecli-incomplete"
_HASH_NBYTES = 1 << 20
_SHA256_DIGITS = 64
_TRIES = 2  # of a file whose checksum is wrong


def partial_path(target: Path) -> Path:
    """Where a file grows until it is whole."""
    return target.with_name(target.name + PARTIAL_SUFFIX)


def fetch(
    repository: Repository,
    file: RemoteFile,
    target: Path,
    progress: Progress,
    caller: Caller,
) -> None:
    """Download a file to `target`, or take up what an earlier try has left; nothing where it is.

    `target` appears when all bytes are on disk and their checksum is the hub's. Raises MoecliError
    where the hub does not give it or it cannot be written; what has arrived stays.
    """
    try:
        _fetch(repository, file, target, progress, caller)
    except OSError as error:
        raise MoecliError(
            f"cannot write `{target.parent}`: {error.strerror or error}",
            "make room or choose another place; the same command goes on where this one stopped",
        ) from error


def _fetch(
    repository: Repository, file: RemoteFile, target: Path, progress: Progress, caller: Caller
) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = partial_path(target)
    with _exclusive(partial) as descriptor:
        if target.exists():  # another process was faster
            partial.unlink(missing_ok=True)
            return
        for _ in range(_TRIES):
            digest = _Digest(file)
            _take_up(descriptor, file, digest)
            _append(repository, file, descriptor, digest, progress, caller)
            if digest.hexdigest() == file.digest:
                os.fsync(descriptor)
                os.rename(partial, target)
                return
            caller.notify(f"`{file.name}` arrived damaged; downloading it again")
            os.ftruncate(descriptor, 0)
    raise MoecliError(
        f"`{file.name}` of `{repository.repo_id}` arrives with a wrong checksum",
        "something on the way changes it (a proxy, bad memory); try another network",
    )


def _append(
    repository: Repository,
    file: RemoteFile,
    descriptor: int,
    digest: "_Digest",
    progress: Progress,
    caller: Caller,
) -> None:
    def sink(chunk: bytes) -> None:
        view = memoryview(chunk)
        while view:
            view = view[os.write(descriptor, view) :]
        digest.update(chunk)
        progress(file, digest.nbytes)

    progress(file, digest.nbytes)
    if digest.nbytes < file.nbytes:
        read_range(repository, file, digest.nbytes, file.nbytes, sink, caller)


def _take_up(descriptor: int, file: RemoteFile, digest: "_Digest") -> None:
    """Hash what is there of a file and go to its end."""
    os.lseek(descriptor, 0, os.SEEK_SET)
    while block := os.read(descriptor, _HASH_NBYTES):
        digest.update(block)
    if digest.nbytes > file.nbytes:
        os.ftruncate(descriptor, 0)
        os.lseek(descriptor, 0, os.SEEK_SET)
        digest.begin()


class _Digest:
    """The hub's checksum of a file, and how many bytes have gone into it."""

    def __init__(self, file: RemoteFile) -> None:
        self._file = file
        self.begin()

    def begin(self) -> None:
        self.nbytes = 0
        if len(self._file.digest) == _SHA256_DIGITS:
            self._hash = hashlib.sha256()
        else:  # git's own, of a blob
            self._hash = hashlib.sha1(b"blob %d\0" % self._file.nbytes)

    def update(self, data: bytes) -> None:
        self._hash.update(data)
        self.nbytes += len(data)

    def hexdigest(self) -> str:
        return self._hash.hexdigest()


@contextmanager
def _exclusive(path: Path) -> Iterator[int]:
    """A descriptor of `path` that no other process has; waits for one that does."""
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            if _is_at(descriptor, path):
                yield descriptor
                return
        finally:
            os.close(descriptor)


def _is_at(descriptor: int, path: Path) -> bool:
    """Whether the open file still has its name: whoever held it may have finished it."""
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(path))
    except FileNotFoundError:
        return False
