"""Knows on what a model is to be computed, and how a device that was chosen is opened."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch

from moecli.backends import use_kernels
from moecli.card import takes_card
from moecli.config import SIMULATED, EngineConfig
from moecli.dense import DenseWeight, bnb_linears
from moecli.device import DeviceParts, DeviceSettings
from moecli.device_tiers import DeviceTiers, Progress
from moecli.device_weights import DeviceWeights
from moecli.errors import MoecliError
from moecli.favourites import Favourites
from moecli.graphs import captured, eager
from moecli.measuring import largest_file, with_compute
from moecli.models.config import ModelSpec
from moecli.models.facts import LibraryFacts
from moecli.processor import KV_DTYPE
from moecli.selfcheck import FastPaths, fast_paths
from offload.disk import DiskTier
from offload.hardware import Machine, detect
from offload.pinning import CudaPinner, SimulatedPinner
from offload.plan import MemoryPlan
from quant.bnb import parse_scheme
from quant.layout import ExpertLayout
from quant.tensor import QuantizedWeight

Notify = Callable[[str], None]
StoredWeights = Callable[[str], QuantizedWeight | torch.Tensor]
GIB = 2**30


def compute_device(config: EngineConfig) -> torch.device | None:
    """The device that is to compute; None: the processor.

    Raises MoecliError where a device is asked for and there is none.
    """
    simulated = config.device == SIMULATED
    if not simulated and not takes_card(config):
        return None
    return torch.device("cpu" if simulated else "cuda")


def device_settings(
    device: torch.device, config: EngineConfig, ctx: int, notify: Notify
) -> DeviceSettings:
    """How the device is used, from what was asked for and what works on it."""
    if config.device == SIMULATED:
        use_kernels(config.kernels, device)
        return DeviceSettings(device, torch.float32, KV_DTYPE, ctx, eager, SimulatedPinner())
    paths = fast_paths(notify)
    slow = config.kernels == "auto" and not paths.kernels
    kernels = "torch" if slow else config.kernels
    use_kernels(kernels, device)
    capture = captured if paths.graph and kernels in ("auto", "triton") else eager
    dtype = torch.bfloat16
    return DeviceSettings(device, dtype, dtype, ctx, capture, CudaPinner(device), paths)


def device_machine(
    path: Path, spec: ModelSpec, layout: ExpertLayout, config: EngineConfig
) -> Machine:
    """What the machine has, and how fast it is: measured once, then remembered."""
    if config.device == SIMULATED:
        return detect(path)
    machine = detect(path, gpu=True)
    return with_compute(machine, layout, spec.experts_per_token, disk=largest_file(path))


def within_library(
    config: EngineConfig, spec: LibraryFacts, ctx: int, notify: Notify
) -> EngineConfig:
    """The settings of a model that the library computes: on the processor, as stored, in fp32.

    Raises MoecliError for what was asked for and is not to be had.
    """
    reason = f"`{spec.architecture}` is computed by transformers, "
    if config.device == "cuda" or config.vram_nbytes:
        raise MoecliError(
            reason + "which moecli runs on the processor alone",
            "leave out `--device` and `--vram`",
        )
    if config.kv_dtype != "auto":
        raise MoecliError(reason + "whose KV cache is in fp32 here", "leave out `--kv-dtype`")
    if config.dense_scheme != "stored":
        raise MoecliError(
            reason + "and its dense weights stay as they are stored", "leave out `--dense-scheme`"
        )
    if takes_card(config):
        notify(reason + "which moecli runs on the processor: the graphics card is not used")
    chunk = spec.chunk_size(ctx, config.prefill_chunk)
    return replace(config, device="cpu", prefill_chunk=chunk)


def within_paths(config: EngineConfig, paths: FastPaths) -> EngineConfig:
    """The settings without what does not work on this card; what is asked for stays asked for."""
    if not paths.fetch and config.placement == "auto":
        config = replace(config, placement="pinned")  # slots that nothing has to be copied into
    if not paths.doorbell and config.lane == "auto":
        config = replace(config, lane="link")
    return config


def dense_weights(
    spec: ModelSpec, weights: StoredWeights, scheme: str, device: torch.device
) -> Callable[[str], DenseWeight]:
    """Dense weights as they are stored, or requantized on the device by bitsandbytes."""
    if scheme == "stored":
        return weights
    return bnb_linears(spec, weights, parse_scheme(scheme), device)


def open_device(
    spec: ModelSpec,
    layout: ExpertLayout,
    plan: MemoryPlan,
    weights: Callable[[str], DenseWeight],
    disk: DiskTier,
    settings: DeviceSettings,
    notify: Notify,
    favourites: Favourites,
    progress: Progress = lambda done, total: None,
) -> DeviceParts:
    """The model on a device, as planned. `notify` hears of every way in which it is less."""
    tiers = DeviceTiers(
        *(spec, layout, plan, disk, settings.device, settings.pinner),
        *(favourites.keys, progress, settings.make_arena, settings.paths.parts),
    )
    if tiers.needs_host and not settings.paths.doorbell:
        tiers.close()
        raise MoecliError(
            "some experts lie where this card cannot read them, and it cannot ask the processor",
            "give more `--ram` or `--vram`, or compute on the processor with `--device cpu`",
        )
    if tiers.pinned_nbytes < tiers.arena_nbytes:
        notify(
            f"the system pins {tiers.pinned_nbytes / GIB:.1f} of {tiers.arena_nbytes / GIB:.1f} "
            "GiB of memory for experts; the processor computes those in the rest"
        )
    dense = DeviceWeights(spec, weights, settings.device, settings.pinner, plan.embedding_on_device)
    in_vram = plan.embedding_on_device or spec.tie_word_embeddings
    if not in_vram and not dense.embedding_address and settings.capture is not eager:
        notify("the system does not pin the input embedding: each step is launched by the host")
        settings = replace(settings, capture=eager)
    return DeviceParts(spec, dense, tiers, settings, favourites.usage)
