"""Knows how a checkpoint of the hub is converted while it comes: headers first, then its files, one
after the other, each gone when it is not needed any more; knows nothing of what becomes of them.
"""

import json
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor

from moecli.errors import MoecliError
from moecli.hub.cache import CachedRepository
from moecli.hub.client import (
    Caller,
    RemoteFile,
    Repository,
    describe,
    read_bytes,
    read_range,
)
from moecli.hub.fetch import fetch, partial_path
from moecli.hub.pulling import small_snapshot, weights_of
from quant.checkpoint import Checkpoint, sampled_ranges
from quant.safetensors_file import (
    LENGTH_NBYTES,
    SafetensorsFile,
    header_nbytes,
    parse_header,
)
from quant.supply import FileTurn

T = TypeVar("T")

_AT_ONCE = 8  # files whose headers are asked for
_FIRST_NBYTES = 1 << 18  # holds the header of most files
_RATE_NBYTES = 16 << 20  # enough for a connection to come to its speed
_PIN_FILE = "repository.json"


@dataclass(frozen=True)
class RemoteSafetensors(SafetensorsFile):
    """A file of which header and samples are known; the rest is at `path` when it is brought."""

    samples: Mapping[tuple[int, int], bytes]

    ask: Callable[[int, int, Caller], bytes]  # for bytes of it that are not at `path` yet

    def read_bytes(self, start: int, stop: int) -> bytes:
        return self.samples[start, stop]

    def read_ahead(self, name: str, caller: Caller) -> Tensor:
        """A small tensor, before the file is there."""
        entry = self.entries[name]
        content = self.ask(entry.offset, entry.offset + entry.nbytes, caller)
        return torch.frombuffer(bytearray(content), dtype=entry.dtype).view(entry.shape)


@dataclass(frozen=True)
class RemoteCheckpoint(Checkpoint):
    """A checkpoint of a repository. Tensors can be read when their files are brought; a few bytes
    of them before.
    """

    caller: Caller

    def read_small(self, names: Sequence[str]) -> dict[str, Tensor]:
        def read(name: str, caller: Caller) -> Tensor:
            file = self.files[self.info(name).file.name]
            assert isinstance(file, RemoteSafetensors), "all files are of the repository"
            return file.read_ahead(name, caller)

        return _of_each(names, read, self.caller)


def pinned(repo_id: str, revision: str | None, directory: Path, caller: Caller) -> Repository:
    """The repository, at the commit that an interrupted conversion has begun with.

    A branch may have moved on since; an explicit revision is taken as it is.
    """
    try:
        pin = json.loads((directory / _PIN_FILE).read_bytes())
    except (FileNotFoundError, ValueError):
        pin = {}
    if revision is None and pin.get("repo_id") == repo_id:
        revision = str(pin.get("commit"))
    return describe(repo_id, revision, caller)


def open_remote(repository: Repository, directory: Path, caller: Caller) -> Checkpoint:
    """The checkpoint of a repository: small files are in the cache, headers and samples are read.

    Tensors can be read when a HubSupply has brought their files to `directory`.
    """
    snapshot = small_snapshot(repository, caller)
    names = weights_of(repository, snapshot)
    files = _of_each(names, partial(_remote_file, repository, directory, len(names)), caller)
    known = Checkpoint.assemble(snapshot, files.__getitem__)
    return RemoteCheckpoint(known.path, known.config, known.files, known.tensors, caller)


def _of_each(names: Sequence[str], ask: Callable[[str, Caller], T], caller: Caller) -> dict[str, T]:
    """ask(name, caller) of each name, some at a time; none goes on when one has failed."""
    team = Caller(caller.notify)
    with ThreadPoolExecutor(_AT_ONCE) as pool:
        try:
            found = pool.map(lambda name: ask(name, team), names)
            return dict(zip(names, found, strict=True))
        finally:
            team.stop.set()
            pool.shutdown(cancel_futures=True)


def _remote_file(
    repository: Repository, directory: Path, num_files: int, name: str, caller: Caller
) -> RemoteSafetensors:
    file, path = repository.files[name], directory / name
    first = read_bytes(repository, file, 0, min(_FIRST_NBYTES, file.nbytes), caller)
    end = LENGTH_NBYTES + header_nbytes(path, first[:LENGTH_NBYTES], file.nbytes)
    if end > len(first):
        first += read_bytes(repository, file, len(first), end, caller)
    header = first[LENGTH_NBYTES:end]

    def sample(start: int, stop: int) -> bytes:
        if stop <= len(first):
            return first[start:stop]
        return read_bytes(repository, file, start, stop, caller)

    samples = {span: sample(*span) for span in sampled_ranges(file.nbytes, num_files)}
    entries = parse_header(path, header, file.nbytes)
    ask = partial(read_bytes, repository, file)
    return RemoteSafetensors(path, file.nbytes, header, entries, samples, ask)


class HubSupply:
    """Brings files of a repository to `directory`, the next one while one is used.

    So much of it that what is there, and what is written of the result, never take more of the
    disk than the whole result and the largest file; or the largest that are needed together, where
    parts of a weight lie in several.
    """

    takes_away = True

    def __init__(
        self,
        repository: Repository,
        names: Sequence[str],
        directory: Path,
        caller: Caller,
        arrived: Callable[[int], None],
    ) -> None:
        """`arrived` is told how many bytes are here that were not when this run began."""
        self._repository, self._directory = repository, directory
        self._caller = Caller(caller.notify)
        self._arrived = arrived
        self._files = [repository.files[name] for name in names]
        self._changed = threading.Condition()
        self._here: dict[str, int] = {}  # bytes of each file on this disk
        self._whole: set[str] = set()
        self._new_nbytes = 0
        self._room = 0  # for files of the source, whatever is written
        self._turns: Mapping[str, FileTurn] = {}
        self._failure: BaseException | None = None
        self._thread: threading.Thread | None = None

    def room_nbytes(self, turns: Sequence[FileTurn]) -> int:
        return max(0, self._most(turns) - sum(map(self._there, self._files)))

    def download_nbytes(self) -> int:
        cached = CachedRepository.of(self._repository.repo_id)
        missing = (file for file in self._files if not cached.blob(file).exists())
        return sum(file.nbytes - self._there(file) for file in missing)

    def measure_rate(self) -> float:
        file = max(self._files, key=lambda file: file.nbytes)
        nbytes = min(file.nbytes, _RATE_NBYTES)
        started = time.perf_counter()
        read_range(self._repository, file, 0, nbytes, lambda chunk: None, self._caller)
        return nbytes / (time.perf_counter() - started)

    def begin(self, turns: Sequence[FileTurn]) -> None:
        try:
            self._prepare([turn.name for turn in turns])
        except OSError as error:
            raise _unwritable(self._directory, error) from error
        self._room = self._most(turns)
        self._turns = {turn.name: turn for turn in turns}
        files = [self._repository.files[turn.name] for turn in turns]
        self._thread = threading.Thread(target=self._bring_all, args=(files,), daemon=True)
        self._thread.start()

    def take(self, name: str) -> None:
        with self._changed:
            self._changed.wait_for(lambda: name in self._whole or self._failure is not None)
            if name not in self._whole:
                assert self._failure is not None, "a file is there, or it cannot be had"
                raise self._failure

    def release(self, name: str) -> None:
        try:
            (self._directory / name).unlink()
        except OSError as error:
            raise _unwritable(self._directory, error) from error
        with self._changed:
            self._here.pop(name, None)
            self._changed.notify_all()

    def close(self) -> None:
        self._caller.stop.set()
        with self._changed:
            self._changed.notify_all()
        if self._thread is not None:
            self._thread.join()

    def _most(self, turns: Sequence[FileTurn]) -> int:
        """Bytes of the files that must be there together: as a rule, of the largest."""
        files = self._repository.files
        together = ([turn.name, *turn.held] for turn in turns)
        return max((sum(files[name].nbytes for name in names) for names in together), default=0)

    def _there(self, file: RemoteFile) -> int:
        """Bytes of a file that an earlier run has brought."""
        target = self._directory / file.name
        found = (path for path in (target, partial_path(target)) if path.exists())
        return sum(path.lstat().st_size for path in found)

    def _prepare(self, names: Sequence[str]) -> None:
        """Note the commit; keep what the first files need, drop what else an earlier run has left.

        Behind a file that is not whole nothing is kept: it might take the room that this one needs.
        """
        self._directory.mkdir(exist_ok=True)
        pin = {"repo_id": self._repository.repo_id, "commit": self._repository.commit}
        (self._directory / _PIN_FILE).write_text(json.dumps(pin))
        keep = {self._directory / _PIN_FILE}
        for name in names:
            target = self._directory / name
            found = target if target.exists() else partial_path(target)
            if found.exists():
                keep.add(found)
                self._here[name] = found.lstat().st_size
            if found != target:
                break
        for path in self._directory.iterdir():
            if path not in keep:
                path.unlink()

    def _bring_all(self, files: Sequence[RemoteFile]) -> None:
        try:
            for file in files:
                self._bring(file)
        except BaseException as failure:  # noqa: BLE001 raised again by `take`
            with self._changed:
                self._failure = failure
                self._changed.notify_all()

    def _bring(self, file: RemoteFile) -> None:
        target = self._directory / file.name
        blob = CachedRepository.of(self._repository.repo_id).blob(file)
        if blob.exists() and not target.exists():
            target.symlink_to(blob)
        else:
            fetch(self._repository, file, target, self._progress, self._caller)
        with self._changed:
            self._whole.add(file.name)
            self._changed.notify_all()

    def _progress(self, file: RemoteFile, nbytes: int) -> None:
        """Count what has come, and wait where more would need more room than was promised."""
        with self._changed:
            self._new_nbytes += max(0, nbytes - self._here.get(file.name, 0))
            self._here[file.name] = nbytes
            self._changed.wait_for(lambda: self._may_go_on(file))
        self._caller.check()
        self._arrived(self._new_nbytes)

    def _may_go_on(self, file: RemoteFile) -> bool:
        """Whether there is room for the files here and for all of the result that comes of them."""
        room = self._room + self._turns[file.name].later_nbytes
        return sum(self._here.values()) <= room or self._caller.stop.is_set()


def _unwritable(directory: Path, error: OSError) -> MoecliError:
    return MoecliError(
        f"cannot write `{directory}`: {error.strerror}",
        "the same command goes on where this one stopped",
    )
