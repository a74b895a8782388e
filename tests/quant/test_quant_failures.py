"""What goes wrong while converting: bad weights, full disks, places that cannot be written."""

import errno
import os
import random
import resource
import shutil
import signal
from pathlib import Path

import pytest
import torch
from quant_sources import HIDDEN, make_job, random_weights, tree_bytes, write_source
from torch import Tensor

from quant.checkpoint import Checkpoint
from quant.convert import convert
from quant.errors import QuantError
from quant.job import ConversionJob
from quant.scheme import QuantScheme


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return write_source(tmp_path_factory.mktemp("failures") / "source", random_weights(True))


@pytest.fixture(scope="module")
def expected(source: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    return tree_bytes(convert(small_job(source, tmp_path_factory.mktemp("good") / "out")).out)


def small_job(source: Checkpoint, out: Path) -> ConversionJob:
    return make_job(source, out, True, shard_nbytes=60_000)


def units_on_record(job: ConversionJob) -> int:
    return (job.partial / "journal").read_bytes().count(b'"unit"')


def failing_write(number: int, code: int, torn: bool):  # type: ignore[no-untyped-def]
    """An os.write that fails from the n-th call on; the first failure may leave half behind."""
    write, count = os.write, 0

    def replacement(descriptor: int, data: bytes) -> int:
        nonlocal count
        count += 1
        if count < number:
            return write(descriptor, data)
        if count == number and torn:
            return write(descriptor, bytes(data)[: len(data) // 2])
        raise OSError(code, os.strerror(code))

    return replacement


@pytest.mark.parametrize("torn", [False, True])
@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EIO])
def test_a_disk_that_fills_up_loses_nothing(
    source: Checkpoint, expected: dict[str, bytes], tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, code: int, torn: bool,
) -> None:  # fmt: skip
    """Wherever it happens, the same command goes on from there."""
    for number in (1, 2, 3, *random.Random(code).sample(range(4, 70), 4)):
        job = small_job(source, tmp_path / f"out{number}")
        monkeypatch.setattr(os, "write", failing_write(number, code, torn))
        with pytest.raises(QuantError, match=r"cannot write `.*out") as caught:
            convert(job)
        monkeypatch.undo()
        assert os.strerror(code) in caught.value.message
        assert "continues" in (caught.value.hint or "")
        finished = units_on_record(job)
        assert convert(job).units_resumed >= finished
        assert tree_bytes(job.out) == expected


@pytest.mark.parametrize("name", ["fsync", "rename", "replace", "ftruncate"])
def test_every_other_failure_of_the_disk_is_told(
    source: Checkpoint, expected: dict[str, bytes], tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, name: str,
) -> None:  # fmt: skip
    def fail(*_: object, **__: object) -> None:
        raise OSError(errno.EIO, "Input/output error")

    job = small_job(source, tmp_path / "out")
    monkeypatch.setattr(os, name, fail)
    with pytest.raises(QuantError, match="cannot write"):
        convert(job)
    monkeypatch.undo()
    convert(job)
    assert tree_bytes(job.out) == expected


def test_a_real_limit_on_file_sizes(
    source: Checkpoint, expected: dict[str, bytes], tmp_path: Path
) -> None:
    """The system itself refuses to let a file grow, in the middle of a write."""
    job = small_job(source, tmp_path / "out")
    child = os.fork()
    if child == 0:
        status = 1
        try:
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (30_001, 30_001))
            convert(job)
        except QuantError as error:
            status = 42 if "File too large" in error.message and error.hint else 2
        finally:
            os._exit(status)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 42
    finished = units_on_record(job)
    assert finished > 1
    assert convert(job).units_resumed == finished
    assert tree_bytes(job.out) == expected


def test_free_space_is_checked_first(
    source: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=10_000))
    job = small_job(source, tmp_path / "out")
    with pytest.raises(QuantError, match=r"still to be written") as caught:
        convert(job)
    assert "make room" in (caught.value.hint or "")
    assert list(job.partial.glob("*.safetensors")) == []
    monkeypatch.undo()
    convert(job)


def test_outputs_that_cannot_be_written(source: Checkpoint, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for out in (tmp_path / "file" / "out", Path("/proc/nothing/out"), Path("/proc/out")):
        with pytest.raises(QuantError, match="cannot write") as caught:
            convert(small_job(source, out))
        assert "another place" in (caught.value.hint or "")


def test_a_read_only_file_system(
    source: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(path: Path, *_: object, **__: object) -> None:
        raise OSError(errno.EROFS, "Read-only file system", str(path))

    monkeypatch.setattr(Path, "mkdir", refuse)
    with pytest.raises(QuantError, match="Read-only file system") as caught:
        convert(small_job(source, tmp_path / "out"))
    assert "another place" in (caught.value.hint or "")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize(
    "name",
    [
        "layers.1.experts.gate_up_proj",
        "layers.0.experts.down_proj",
        "layers.1.q_proj.weight",
        "embed.weight",
        "norm.weight",
    ],
)
def test_weights_that_are_no_numbers(tmp_path: Path, name: str, value: float) -> None:
    weights = random_weights(True)
    weights[name].view(-1)[-1] = value
    job = small_job(write_source(tmp_path / "source", weights), tmp_path / "out")
    with pytest.raises(QuantError, match=f"`{name}`.*NaN") as caught:
        convert(job)
    assert caught.value.hint
    assert not job.out.exists()


def test_fp32_values_beyond_bf16_are_not_kept_as_infinity(tmp_path: Path) -> None:
    weights = random_weights(True, dtype=torch.float32)
    weights["norm.weight"][3] = 3.4e38
    job = small_job(write_source(tmp_path / "source", weights), tmp_path / "out")
    with pytest.raises(QuantError, match=r"`norm\.weight`"):
        convert(job)


WRONG_SHAPES = {
    "an expert too few": ("layers.0.experts.down_proj", lambda w: w[:3]),
    "another width": ("layers.1.experts.gate_up_proj", lambda w: w[:, :, :-32]),
    "another hidden size": ("layers.1.experts.down_proj", lambda w: w[:, :, :32]),
    "not fused": ("layers.0.experts.gate_up_proj", lambda w: w[0]),
    "a vector for a Linear": ("layers.0.q_proj.weight", lambda w: w[0]),
    "integers": ("layers.0.experts.down_proj", lambda w: w.to(torch.int8)),
    "a Linear of integers": ("layers.0.q_proj.weight", lambda w: w.to(torch.int32)),
    "missing": ("layers.0.experts.down_proj", None),
}


@pytest.mark.parametrize("case", WRONG_SHAPES)
def test_tensors_of_wrong_shape_are_named(source: Checkpoint, tmp_path: Path, case: str) -> None:
    name, change = WRONG_SHAPES[case]
    weights = random_weights(True)
    if change is None:
        del weights[name]
    else:
        weights[name] = change(weights[name]).contiguous()
    bad = write_source(tmp_path / "source", weights)
    good = small_job(source, tmp_path / "out")
    job = ConversionJob(**{**vars(good), "source": bad})
    with pytest.raises(QuantError, match=f"`{name}`"):
        convert(job)
    assert not job.partial.exists()


def test_groups_that_do_not_divide(source: Checkpoint, tmp_path: Path) -> None:
    for scheme, dense, name in (
        (QuantScheme(4, 128), None, "layers.0.experts.gate_up_proj"),
        (QuantScheme(4, 64), None, "layers.0.experts.down_proj"),
        (QuantScheme(4, 32), QuantScheme(8, 128), "layers.0.q_proj.weight"),
    ):
        with pytest.raises(QuantError, match=f"`{name}`.*does not divide") as caught:
            convert(make_job(source, tmp_path / "out", True, scheme, dense))
        assert "group-size" in (caught.value.hint or "")


def test_an_extra_file_that_is_missing(source: Checkpoint, tmp_path: Path) -> None:
    job = small_job(source, tmp_path / "out")
    with pytest.raises(QuantError, match=r"no `chat\.jinja`"):
        convert(ConversionJob(**{**vars(job), "extra_files": ("chat.jinja",)}))


def test_a_shard_that_is_cut_short_while_it_is_read(tmp_path: Path) -> None:
    bad = write_source(tmp_path / "source", random_weights(True))
    job = small_job(bad, tmp_path / "out")
    path = bad.path / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-2000])
    with pytest.raises(QuantError, match=r"ends inside|model\.safetensors"):
        convert(job)
    assert not job.out.exists()


def random_bytes(*shape: int) -> Tensor:
    """Finite bf16 values, quickly: the exponent's upper bits are kept small."""
    bits = torch.randint(0, 0x3F00, shape, dtype=torch.int16)
    return bits.view(torch.bfloat16)


@pytest.mark.parametrize("kind", ["fused", "embedding"])
def test_memory_is_bounded_by_one_slice(tmp_path: Path, kind: str) -> None:
    """A checkpoint ten times larger than what a conversion may hold at once."""
    from quant.items import DenseItem, ExpertItem, TensorSlice

    num_experts, intermediate, hidden = (24, 2048, 512) if kind == "fused" else (1, 64, HIDDEN)
    vocab = 64 if kind == "fused" else 1_600_000 // 2
    weights = {
        "experts.gate_up_proj": random_bytes(num_experts, hidden, 2 * intermediate),
        "experts.down_proj": random_bytes(num_experts, intermediate, hidden),
        "embed.weight": random_bytes(vocab, hidden),
    }
    source_nbytes = sum(weight.nbytes for weight in weights.values())
    source = write_source(tmp_path / "source", weights)
    del weights
    experts = tuple(
        ExpertItem(
            0, e, f"experts.{e}",
            TensorSlice("experts.gate_up_proj", e, True, (0, intermediate)),
            TensorSlice("experts.gate_up_proj", e, True, (intermediate, 2 * intermediate)),
            TensorSlice("experts.down_proj", e, True),
        )
        for e in range(num_experts)
    )  # fmt: skip
    dense = (DenseItem("embed.weight", TensorSlice("embed.weight"), None),)
    job = ConversionJob(source, tmp_path / "out", QuantScheme(), None, experts, dense, {})
    warm_up = small_job(
        write_source(tmp_path / "tiny", random_weights(True)), tmp_path / "tiny-out"
    )
    limit = (2 * hidden * intermediate * 2 if kind == "fused" else 0) + (48 << 20)
    assert source_nbytes > 95 * 10**6
    child = os.fork()
    if child == 0:
        status = 255
        try:
            convert(warm_up)  # what every conversion needs is not counted
            reset_peak()
            before = peak_rss()
            convert(job)
            status = min(254, (peak_rss() - before) >> 20)
        finally:
            os._exit(status)
    grown = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) << 20
    assert grown < limit, f"{grown >> 20} MiB, allowed are {limit >> 20}"


def reset_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")


def peak_rss() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith("VmHWM"))
