"""Knows what moecli notes down about a directory it has written; knows no tensors.

The manifest is written last: where it is, everything else is complete.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quant.errors import QuantError
from quant.layout import SLOT_ALIGNMENT, ExpertLayout
from quant.scheme import QuantScheme

MANIFEST_FILE = "moecli.json"
FORMAT_VERSION = 1


@dataclass(frozen=True)
class FileRecord:
    """What a file must be, byte for byte."""

    nbytes: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """Schemes, files, and where experts lie: experts[layer][expert] = (file name, offset)."""

    job: str  # hash of all that decided the bytes
    source: str  # fingerprint of the source
    layout: ExpertLayout
    dense_scheme: QuantScheme | None
    squared_errors: Mapping[str, tuple[float, float]]  # by kind: of differences, of weights
    files: Mapping[str, FileRecord]
    experts: Mapping[int, tuple[tuple[str, int], ...]]

    def encode(self) -> bytes:
        shards = sorted({file for table in self.experts.values() for file, _ in table})
        numbers = {name: number for number, name in enumerate(shards)}
        content = {
            "format": FORMAT_VERSION,
            "job": self.job,
            "source": self.source,
            "scheme": self.layout.scheme.name,
            "dense_scheme": self.dense_scheme and self.dense_scheme.name,
            "hidden_size": self.layout.hidden_size,
            "intermediate_size": self.layout.intermediate_size,
            "squared_errors": {kind: list(sums) for kind, sums in self.squared_errors.items()},
            "files": {
                name: {"nbytes": record.nbytes, "sha256": record.sha256}
                for name, record in self.files.items()
            },
            "shards": shards,
            "experts": {
                str(layer): [[numbers[file], offset] for file, offset in table]
                for layer, table in self.experts.items()
            },
        }
        return (json.dumps(content, indent=1) + "\n").encode()

    @classmethod
    def decode(cls, path: Path, content: Mapping[str, Any]) -> "Manifest":
        """Raises QuantError when it is of another version, or not what `encode` writes."""
        if content.get("format") != FORMAT_VERSION:
            raise QuantError(
                f"`{path}` has format {content.get('format')!r:.20}; this moecli reads "
                f"{FORMAT_VERSION}",
                "quantize the model again, or use the moecli that wrote it",
            )
        try:
            manifest = cls._from_fields(content)
            manifest._check()
        except (KeyError, TypeError, ValueError, AttributeError, IndexError, QuantError) as error:
            raise QuantError(
                f"`{path}` is damaged: {type(error).__name__}: {error}",
                "quantize the model again",
            ) from error
        return manifest

    @classmethod
    def _from_fields(cls, content: Mapping[str, Any]) -> "Manifest":
        shards, dense = content["shards"], content["dense_scheme"]
        layout = ExpertLayout(
            content["hidden_size"],
            content["intermediate_size"],
            QuantScheme.parse(content["scheme"]),
        )
        return cls(
            job=content["job"],
            source=content["source"],
            layout=layout,
            dense_scheme=None if dense is None else QuantScheme.parse(dense),
            squared_errors={
                kind: (float(error), float(total))
                for kind, (error, total) in content["squared_errors"].items()
            },
            files={
                name: FileRecord(int(record["nbytes"]), str(record["sha256"]))
                for name, record in content["files"].items()
            },
            experts={
                int(layer): tuple((shards[number], int(offset)) for number, offset in table)
                for layer, table in content["experts"].items()
            },
        )

    def _check(self) -> None:
        """Raises ValueError unless every expert lies inside a file of the list."""
        for name in self.files:
            if Path(name).name != name:
                raise ValueError(f"impossible file name {name!r:.80}")
        for layer, table in self.experts.items():
            for expert, (file, offset) in enumerate(table):
                record = self.files.get(file)
                end = offset + self.layout.nbytes
                if record is None or offset < 0 or offset % SLOT_ALIGNMENT or end > record.nbytes:
                    raise ValueError(f"expert {expert} of layer {layer} lies nowhere")
