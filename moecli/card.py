"""Knows whether a run computes on a graphics card, and refuses one that is not there."""

from moecli.config import SIMULATED, EngineConfig
from moecli.errors import MoecliError


def takes_card(config: EngineConfig) -> bool:
    """Whether these settings, on this machine, compute on a CUDA device.

    Raises MoecliError where they ask for one and there is none.
    """
    from offload import hardware

    if config.device in ("cpu", SIMULATED):
        return False
    if hardware.detect(gpu=True).gpu_name is not None:
        return config.vram_nbytes != 0
    if config.device != "cuda" and not config.vram_nbytes:
        return False
    asked = "`--device cuda`" if config.device == "cuda" else "`--vram`"
    raise MoecliError(
        f"{asked} asks for a graphics card, but torch finds no CUDA device here",
        "`moecli doctor` shows what is found; `--device cpu` runs on the processor",
    )
