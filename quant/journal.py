"""Knows how to remember, across kills, which units of a conversion are finished; no tensors.

One line a record, each with its own checksum: a line that a kill cut short is not taken for one,
and nothing after it is believed.
"""

import json
import os
import zlib
from pathlib import Path
from typing import Any

from quant.errors import QuantError
from quant.safetensors_file import write_fully


class Journal:
    """Records of finished work; the first line says of which job."""

    def __init__(self, path: Path, job_key: str) -> None:
        """Open or begin the journal; raises QuantError when it belongs to another job."""
        self.path = path
        self._descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
        records, self._nbytes = _valid_records(path.read_bytes())
        os.ftruncate(self._descriptor, self._nbytes)
        if not records:
            self.append({"job": job_key})
        elif records[0] != {"job": job_key}:
            self.close()
            raise other_job(path.parent)
        self.records = records[1:]

    def append(self, record: dict[str, Any]) -> None:
        """Add a record; it survives a kill at once, a power failure after `sync`."""
        line = _encode(record)
        try:
            write_fully(self._descriptor, line)
        except OSError:
            # A disk that was full for a moment must leave no half line before the next one.
            os.ftruncate(self._descriptor, self._nbytes)
            raise
        self._nbytes += len(line)

    def sync(self) -> None:
        os.fsync(self._descriptor)

    def close(self) -> None:
        os.close(self._descriptor)


def other_job(partial: Path) -> QuantError:
    return QuantError(
        f"`{partial}` holds the unfinished result of another conversion",
        f"remove `{partial}`, or choose another output",
    )


def _encode(record: dict[str, Any]) -> bytes:
    text = json.dumps(record, separators=(",", ":"))
    return f"{zlib.crc32(text.encode()):08x} {text}\n".encode()


def _valid_records(content: bytes) -> tuple[list[dict[str, Any]], int]:
    """The records up to the first damaged line, and how many bytes they take."""
    records: list[dict[str, Any]] = []
    end = 0
    for line in content.splitlines(keepends=True):
        checksum, _, text = line.rstrip(b"\n").partition(b" ")
        if not line.endswith(b"\n") or checksum != b"%08x" % zlib.crc32(text):
            break
        records.append(json.loads(text))
        end += len(line)
    return records, end
