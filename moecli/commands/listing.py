"""Knows how `moecli list` shows what is in the store."""

import json
from dataclasses import asdict

from moecli import options, store, ui
from moecli.terminal import say
from moecli.units import format_nbytes

HELP = """List the models in the store, and what is unfinished there.

Piped, it prints tab-separated lines: name, scheme, bytes, time, path."""
EXAMPLES = """
moecli list
moecli list --json
moecli list | cut -f1
"""


def list_models(as_json: options.Json = False) -> None:
    models = store.models()
    if as_json:
        print(json.dumps([asdict(model) for model in models], indent=2))
    elif models:
        ui.show_table(
            ("NAME", "SCHEME", "SIZE", "MODIFIED", "PATH"),
            [
                [
                    (model.name, model.name),
                    (model.scheme, model.scheme),
                    (format_nbytes(model.nbytes), str(model.nbytes)),
                    (model.modified[:16].replace("T", " "), model.modified),
                    (model.path, model.path),
                ]
                for model in models
            ],
        )
    else:
        say(f"no models in `{store.models_dir()}`; `moecli quantize demo` makes the first")
    for path in store.unfinished():
        name = path.name.removesuffix(store.PARTIAL_SUFFIX)
        say(
            f"unfinished: `{name}` ({format_nbytes(store.disk_nbytes(path))}); the same "
            f"`moecli quantize` command goes on, `moecli rm {path.name}` drops it"
        )
