"""Knows which model a plan is asked for by which name, in which schemes; plans nothing."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moecli import known, store
from moecli.commands.show import Readable
from moecli.errors import MoecliError
from moecli.hub.client import is_hub_id
from moecli.known import Known
from quant.scheme import QuantScheme

if TYPE_CHECKING:
    from moecli.models.outline import Counted
    from moecli.plan_report import Subject
    from moecli.schemes import Schemes


@dataclass(frozen=True)
class PlanSource:
    """Where the config of a plan's model comes from: a directory, or what is built in."""

    name: str
    path: Path | None  # None: built in
    known: Known | None
    repo_id: str | None

    @classmethod
    def find(cls, name: str) -> "PlanSource":
        """Directories, the store and the hub go before what is built in."""
        spec, on_hub = known.find(name), is_hub_id(name)
        stored = store.is_model(store.models_dir() / name)
        if spec is not None and not (on_hub or stored or Path(name).exists()):
            return cls(spec.name, None, spec, spec.repo_id)
        try:
            readable = Readable.find(name)
        except MoecliError as error:
            hint = _hint(name, spec, error.hint)
            raise MoecliError(error.message, hint, error.exit_code) from error
        repo_id = name if on_hub and not Path(name).exists() else None
        return cls(readable.name, readable.path, None, repo_id)

    def config(self) -> dict[str, Any]:
        if self.path is not None:
            return store.config(self.path)
        assert self.known is not None, "a model from nowhere"
        return self.known.config()

    def subject(self, spec: "Counted", scheme: QuantScheme) -> "Subject":
        from moecli.plan_report import Subject, runs

        title = self.name if self.known is None else f"{self.known.label}, a built-in spec"
        guessed = None if self.known is None else self.known.guessed
        source = self.repo_id
        if self.path is not None and source is None:
            source = store.DEMO if self.path == store.demo_source() else str(self.path)
        quantized = None
        if self.path is not None and store.is_model(self.path):
            source, quantized = None, str(self.path)
        elif source is not None and runs(spec):
            quantized = _short(store.default_output(source.rpartition("/")[2], scheme))
        return Subject(self.name, title, spec, source, quantized, guessed)

    def schemes(self, spec: "Counted", scheme_name: str) -> "Schemes":
        """Of the experts and of the rest: what the manifest says, else what is asked for.

        Where no group is asked for it is narrowed as `quantize` does it.
        """
        from moecli.schemes import AskedScheme

        if self.path is None or not store.is_model(self.path):
            scheme = AskedScheme.parse(scheme_name).of(spec, experts=True)
            return scheme, AskedScheme(store.DEFAULT_DENSE_SCHEME).of(spec, experts=False)
        manifest = store.manifest(self.path)
        dense = manifest.get("dense_scheme")
        return (
            QuantScheme.parse(str(manifest.get("scheme"))),
            None if dense is None else QuantScheme.parse(str(dense)),
        )


def _short(path: Path) -> str:
    """With `~`, as a shell reads it."""
    home = Path.home()
    return f"~/{path.relative_to(home)}" if path.is_relative_to(home) else str(path)


def _hint(name: str, spec: Known | None, hint: str | None) -> str | None:
    """What else may be planned where a model is not to be had."""
    if spec is not None:
        return f"`moecli plan {spec.name}` needs no hub; or {hint}"
    close = known.close_to(name)
    if close and not is_hub_id(name) and not name.startswith((".", "/", "~")):
        return f"did you mean {' or '.join(f'`{each}`' for each in close)}?"
    return hint
