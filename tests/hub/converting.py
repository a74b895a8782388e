"""Conversions from a stand-in hub in processes of their own, which may be killed.

They are forked from a server that has imported everything, so one starts in milliseconds.
"""

import json
import multiprocessing
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

REPO = "org/killed"


def start(url: str, cache: Path, out: Path, report: Path) -> BaseProcess:
    """A process that quantizes REPO to `out` and writes what came of it to `report`."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.hub.converting", "moecli.hub.streaming", "torch"])
    process = context.Process(target=_run, args=(url, str(cache), out, report))
    process.start()
    return process


def report_of(report: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(report.read_text())
    report.unlink()
    return content


def peak_rss() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith("VmHWM"))


def _run(url: str, cache: str, out: Path, report: Path) -> None:
    import torch
    from huggingface_hub import constants

    import moecli.hub.streaming
    from moecli.conversion import quantize_from_hub
    from moecli.hub.client import Caller
    from quant.quantize import quantize_measured
    from quant.scheme import QuantScheme

    torch.set_num_threads(1)
    constants.ENDPOINT, constants.HF_HUB_CACHE = url, cache
    constants.HUGGINGFACE_CO_URL_TEMPLATE = url + "/{repo_id}/resolve/{revision}/{filename}"
    moecli.hub.streaming._FIRST_NBYTES = 16384
    scheme = QuantScheme(4, 32)
    quantize_measured(torch.ones(64, 4096), scheme)  # what every conversion needs is not counted
    Path("/proc/self/clear_refs").write_text("5")
    before = peak_rss()
    result = quantize_from_hub(REPO, None, out, scheme, QuantScheme(8, 32), Caller(print))
    grown = peak_rss() - before
    said = {"done": result.units_done, "resumed": result.units_resumed, "grown": grown}
    report.write_text(json.dumps(said))
