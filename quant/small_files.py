"""Knows what a conversion writes beside the tensors, and how a file is put safely on the disk."""

import hashlib
import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

from quant.checkpoint import CONFIG_FILE, INDEX_FILE
from quant.job import ConversionJob
from quant.manifest import MANIFEST_FILE, FileRecord, Manifest
from quant.safetensors_file import write_fully
from quant.shard_writer import writing
from quant.shards import OutputPlan


def write_small_files(job: ConversionJob, plan: OutputPlan, manifest: Manifest) -> None:
    """What is no tensor; the manifest last, under its name only when all else is on disk.

    `manifest.files` has the files with tensors; the others are added.
    """
    contents = {CONFIG_FILE: _json_bytes(job.config)}
    if len(plan.shards) > 1:
        contents[INDEX_FILE] = _json_bytes(_index(plan))
    for name in job.extra_files:
        contents[name] = (job.source.path / name).read_bytes()
    files = dict(manifest.files)
    for name, content in contents.items():
        files[name] = FileRecord(len(content), hashlib.sha256(content).hexdigest())
        _write_file(job.partial / name, content)
    temporary = job.partial / f"{MANIFEST_FILE}.tmp"
    _write_file(temporary, replace(manifest, files=files).encode())
    with writing(job.partial):
        sync_directory(job.partial)
        os.replace(temporary, job.partial / MANIFEST_FILE)
        sync_directory(job.partial)


def _index(plan: OutputPlan) -> dict[str, Any]:
    weight_map = {name: shard.name for shard in plan.shards for name in shard.entries}
    total = sum(entry.nbytes for shard in plan.shards for entry in shard.entries.values())
    return {"metadata": {"total_size": total}, "weight_map": weight_map}


def _json_bytes(content: dict[str, Any]) -> bytes:
    return (json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode()


def _write_file(path: Path, content: bytes) -> None:
    with writing(path):
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
        try:
            write_fully(descriptor, content)
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def sync_directory(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
