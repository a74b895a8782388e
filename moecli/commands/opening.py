"""Knows how a command gets from the name of a model to an open engine, and what is said on the way.

The embedded model is quantized when it is first asked for.
"""

from pathlib import Path
from typing import TYPE_CHECKING

from moecli import store, ui
from moecli.config import EngineConfig
from moecli.terminal import say

if TYPE_CHECKING:
    from moecli.engine import Engine


def model_directory(name: str) -> Path:
    """Where the model lies; the embedded one is quantized first if need be."""
    path = store.resolve(name)
    if name == store.DEMO and not store.is_model(path):
        _quantize_demo(path)
    return path


def open_engine(path: Path, config: EngineConfig, keep_usage: bool = True) -> "Engine":
    """Raises MoecliError where a graphics card is asked for and there is none, among others.

    `keep_usage` False: which experts this run asks for says nothing about those to come.
    """
    from moecli.engine import Engine

    with ui.counting_line("loading the model", "experts") as line:
        return Engine.open(
            path,
            config,
            notify=ui.show_note,
            progress=line.update,
            usage_file=store.usage_file(path) if keep_usage else None,
        )


def _quantize_demo(out: Path) -> None:
    from moecli.conversion import quantize_model

    say("quantizing the embedded model to int4, once")
    out.parent.mkdir(parents=True, exist_ok=True)
    with ui.conversion_progress() as progress:
        quantize_model(
            store.demo_source(),
            out,
            store.DEFAULT_SCHEME,
            store.DEFAULT_DENSE_SCHEME,
            progress.update,
        )
