"""Knows where models lie and what they are called; opens none of them."""

import difflib
import hashlib
import json
import os
import shutil
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from moecli import known
from moecli.errors import MoecliError
from moecli.hub.client import is_hub_id
from quant.scheme import QuantScheme

DEMO = "demo"
MANIFEST = "moecli.json"
CONFIG = "config.json"
PARTIAL_SUFFIX = ".partial"
_REMOVING_PREFIX = ".removing-"
DEFAULT_SCHEME = QuantScheme.parse("int4")
DEFAULT_DENSE_SCHEME = QuantScheme.parse("int8")


@dataclass(frozen=True)
class StoredModel:
    """A finished model of the store; sizes in bytes, schemes by name."""

    name: str
    path: str
    scheme: str
    nbytes: int
    modified: str  # ISO 8601, UTC


def data_home() -> Path:
    base = os.environ.get("XDG_DATA_HOME") or Path.home() / ".local" / "share"
    return Path(base) / "moecli"


def state_home() -> Path:
    """Where history and counts of wanted experts lie."""
    base = os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state"
    return Path(base) / "moecli"


def usage_file(path: Path) -> Path | None:
    """Where it is kept which experts of the model in `path` are wanted; None where none is.

    One file for all schemes that a checkpoint was quantized to.
    """
    if not is_model(path):
        return None
    source = str(manifest(path).get("source", path.resolve()))
    return state_home() / "usage" / f"{hashlib.sha256(source.encode()).hexdigest()[:32]}.json"


def models_dir() -> Path:
    home = os.environ.get("MOECLI_HOME")
    return (Path(home).expanduser() if home else data_home()) / "models"


def demo_source() -> Path:
    """The embedded checkpoint, as it was trained."""
    return Path(__file__).parent / "demo"


def model_name(path: Path) -> str:
    """What the model in a directory is called; of a snapshot in the hub's cache, the repository."""
    if path == demo_source():
        return DEMO
    resolved = path.resolve()
    if resolved.parent.name == "snapshots":
        return resolved.parents[1].name.rpartition("--")[2]
    return resolved.name


def default_output(name: str, scheme: QuantScheme) -> Path:
    """Where `quantize` writes a model of this name unless told."""
    return models_dir() / f"{name}-{scheme.name}"


def demo_path() -> Path:
    """Where the quantized embedded model lies, or will lie."""
    return default_output(DEMO, DEFAULT_SCHEME)


def resolve(name: str) -> Path:
    """The directory of a model: an existing path, `demo`, or a name of the store.

    `demo` may not exist yet. Raises MoecliError, naming what comes close.
    """
    if not name:
        raise MoecliError("the name of the model is empty", "`moecli list` shows what is here")
    if name == DEMO:
        return demo_path()
    path = Path(name).expanduser()
    if path.is_dir():
        return path
    if path.exists():
        raise MoecliError(f"`{name}` is a file", "give the directory of a model")
    stored = models_dir() / name
    if _is_name(name) and is_model(stored):
        return stored
    raise _unknown(name)


def resolve_source(name: str) -> Path:
    """The directory of a checkpoint to quantize: an existing path, or `demo`."""
    if name == DEMO:
        return demo_source()
    path = Path(name).expanduser()
    if path.is_dir():
        return path
    if path.exists():
        raise MoecliError(f"`{name}` is a file", "give the directory of a checkpoint")
    raise _unknown(name)


def is_model(path: Path) -> bool:
    """Whether `path` is a finished model that moecli has written."""
    return (path / MANIFEST).is_file() and not path.name.endswith(PARTIAL_SUFFIX)


def models() -> list[StoredModel]:
    """Finished models of the store, by name."""
    return [_stored(path) for path in _entries() if is_model(path)]


def unfinished() -> list[Path]:
    """Directories that an interrupted `quantize` has left in the store."""
    return [path for path in _entries() if path.name.endswith(PARTIAL_SUFFIX)]


def manifest(path: Path) -> dict[str, Any]:
    """What moecli wrote about a model. Raises MoecliError when that is damaged."""
    return _read_json(path / MANIFEST, "quantize the model again")


def config(path: Path) -> dict[str, Any]:
    """A checkpoint's config.json. Raises MoecliError when there is none."""
    if not (path / CONFIG).is_file():
        raise MoecliError(f"`{path}` has no `{CONFIG}`", "give the directory of a model")
    return _read_json(path / CONFIG, "download it again")


def _read_json(path: Path, hint: str) -> dict[str, Any]:
    try:
        content = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise MoecliError(f"`{path}` is damaged: {error}", hint) from error
    if not isinstance(content, dict):
        raise MoecliError(f"`{path}` is damaged: no JSON object", hint)
    return content


def disk_nbytes(path: Path) -> int:
    """Bytes of all files in a directory."""
    return sum(file.stat().st_size for file in path.rglob("*") if file.is_file())


def removable(name: str) -> Path:
    """The directory of the store that `name` means, unfinished ones included.

    Raises MoecliError for whatever lies elsewhere: only models of the store are removed.
    """
    if name == DEMO:
        name = demo_path().name
    path = Path(name).expanduser()
    if _is_name(name):
        path = models_dir() / name
    if path in _entries():
        return path
    if path.is_dir():
        raise MoecliError(
            f"`{name}` is not in the store `{models_dir()}`",
            "only models of the store are removed; remove other directories yourself",
        )
    raise _unknown(name)


def remove(path: Path) -> int:
    """Delete a directory of the store; returns how many bytes that freed.

    It is renamed first, so that a half-deleted one is never taken for a model.
    """
    assert path.parent == models_dir(), "only inside the store"
    nbytes = 0 if path.is_symlink() else disk_nbytes(path)
    for left_over in models_dir().glob(f"{_REMOVING_PREFIX}*"):
        shutil.rmtree(left_over)
    if path.is_symlink():
        path.unlink()
        return nbytes
    doomed = path.with_name(_REMOVING_PREFIX + path.name)
    path.rename(doomed)
    shutil.rmtree(doomed)
    return nbytes


def _is_name(name: str) -> bool:
    return Path(name).name == name and name not in (".", "..")


def _entries() -> list[Path]:
    try:
        entries = sorted(models_dir().iterdir())
    except FileNotFoundError:
        return []
    return [path for path in entries if path.is_dir() and not path.name.startswith(".")]


def _stored(path: Path) -> StoredModel:
    modified = datetime.fromtimestamp((path / MANIFEST).stat().st_mtime, UTC)
    return StoredModel(
        name=path.name,
        path=str(path),
        scheme=str(manifest(path).get("scheme", "?")),
        nbytes=disk_nbytes(path),
        modified=modified.isoformat(timespec="seconds"),
    )


def _unknown(name: str) -> MoecliError:
    partial = models_dir() / (name + PARTIAL_SUFFIX)
    if _is_name(name) and partial.is_dir():
        return MoecliError(
            f"`{name}` is not finished", "the same `moecli quantize` command resumes it"
        )
    if name.startswith((".", "/", "~")):
        return MoecliError(f"there is no directory `{name}`", "`moecli list` shows what is here")
    if is_hub_id(name):
        return _not_quantized(name)
    spec = known.find(name)
    if spec is not None:
        weights = f"its weights are `{spec.repo_id}`" if spec.repo_id else "none were released"
        return MoecliError(
            f"`{name}` is a spec for `moecli plan`, without weights",
            f"`moecli plan {spec.name}` says whether it fits; {weights}",
        )
    names = [DEMO, *(path.name for path in _entries() if is_model(path))]
    close = difflib.get_close_matches(name, names, 3, 0.5)
    if close:
        meant = " or ".join(f"`{match}`" for match in close)
        return MoecliError(f"no model is called `{name}`", f"did you mean {meant}?")
    return MoecliError(
        f"no model is called `{name}`",
        "`moecli list` shows what is here; `moecli quantize DIR` makes one",
    )


def _not_quantized(repo_id: str) -> MoecliError:
    """Where a repository of the hub is to be run, which would be hundreds of gigabytes unasked."""
    name = repo_id.partition("/")[2]
    made = [path.name for path in _entries() if path.name.startswith(f"{name}-int")]
    ready = [name for name in made if is_model(models_dir() / name)]
    if ready:
        return MoecliError(
            f"`{repo_id}` is a repository of the hub", f"quantized, it is called `{ready[0]}` here"
        )
    return MoecliError(
        f"`{repo_id}` is not quantized yet",
        f"`moecli quantize {repo_id}` does it while it downloads; `moecli plan {repo_id}` says "
        "before whether it fits",
    )
