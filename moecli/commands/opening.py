"""Knows how a command gets from the name of a model to an open engine, and what is said on the way.

The embedded model is quantized when it is first asked for.
"""

from dataclasses import replace
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


def open_engine(path: Path, config: EngineConfig) -> "Engine":
    from moecli.engine import Engine

    if config.vram_nbytes is not None:
        ui.show_note("this version computes on the processor; the VRAM budget is not used")
        config = replace(config, vram_nbytes=None)
    return Engine.open(path, config, notify=ui.show_note)


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
            progress,
        )
