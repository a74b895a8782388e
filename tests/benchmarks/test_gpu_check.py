"""The script that measures a graphics card: all of it in tiny sizes, and what may go wrong."""

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from benchmarks import gpu_check
from benchmarks.gpu import build, exactness, peer
from benchmarks.gpu.model import KeptArena
from benchmarks.gpu.random_experts import RandomExperts
from benchmarks.gpu.report import Section, plain, read_json, write_json
from benchmarks.gpu.roofline import Bandwidths, StepBytes, bound
from benchmarks.gpu.sizes import REAL, TINY, spec_of
from benchmarks.gpu.trace_router import Clock, Trace, TraceRouter, make_trace
from moecli.footprint import expert_layout
from offload.pinning import SimulatedPinner
from quant import ops
from tests.triton_compile import compiling, run_python

ROOT = Path(__file__).parents[2]
ON_CARD = torch.cuda.is_available()
NOT_TRIED = {
    "processor_kernels",
    *(f"transformers, bitsandbytes 4 bits, offloaded, {arm.name}" for arm in TINY.models),
}


def script(*args: str | Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "benchmarks/gpu_check.py", *map(str, args)]
    environment = {**os.environ, "PYTHONPATH": ".", "TRITON_INTERPRET": "1"}
    return subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )


@pytest.mark.skipif(ON_CARD, reason="the trial run is for machines without a card")
def test_the_whole_script_in_tiny_sizes(tmp_path: Path) -> None:
    path = tmp_path / "out" / "report.json"
    done = script("--tiny", "--json", path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == str(path)
    report = json.loads(path.read_text())
    assert {"format", "tiny", "begun", "commit", "budget_s", "sections"} == set(report)
    assert list(report["sections"]) == list(gpu_check.SECTIONS)
    parts = {}
    for name, section in report["sections"].items():
        assert section["status"] == "ok", (name, section)
        kept = {key: part for key, part in section["parts"].items() if key not in NOT_TRIED}
        bad = {key: part for key, part in kept.items() if part["status"] != "ok"}
        assert not bad, json.dumps(bad, indent=1)
        parts[name] = {key: part["result"] for key, part in kept.items()}
    check_machine(parts["machine"])
    check_exactness(parts["exactness"])
    check_kernels(parts["kernels"])
    check_decode(parts["decode"])
    check_peer(parts["peer"])
    assert os.listdir(path.parent) == ["report.json"]


def check_machine(parts: dict) -> None:
    for name in ("vram_copy", "link_copy", "link_kernel", "vram_kernel", "ram_read"):
        assert parts[name]["bytes_per_s"] > 0
    assert set(parts["host_experts"]) == {
        f"{shape.name} {scheme.name}" for shape in TINY.experts for scheme in TINY.schemes
    }
    assert parts["versions"]["torch"] == torch.__version__


def check_exactness(parts: dict) -> None:
    check, tests = parts["self_check"], parts["tests"]
    assert check["cases"] == check["right"] == len(exactness._TINY_CASES)
    assert tests["tests"] > 0
    assert tests["failed"] == 0
    assert tests["incomplete"] == []


def check_kernels(parts: dict) -> None:
    for shape in TINY.experts:
        for scheme in TINY.schemes:
            what = f"{shape.name} {scheme.name}"
            for place in ("decode", "decode over the link"):
                rows = parts[f"{place}, {what}"]["tokens"]
                assert set(rows) == {str(n) for n in TINY.decode_tokens}
                assert all(row["share"] > 0 for row in rows.values())
            for count in TINY.grouped_tokens:
                assert parts[f"prefill, {what}, {count} tokens"]["tflops"] > 0
    assert set(parts["dense, tiny"]) == {"int4-g32", "int8-g32", "torch"}
    assert set(parts["attention, tiny"]) == {str(n) for n in TINY.positions}


def check_decode(parts: dict) -> None:
    placed = [result for result in parts.values() if "decode" in result]
    assert {(r["plan"]["placement"], tuple(r["plan"]["lanes"])) for r in placed} >= {
        *(("lru", ("link",)), ("slice", ("link", "host")), ("pinned", ("link", "host"))),
        *(("slice", ("host",)), ("pinned", ("host",)), ("pinned", ())),
    }
    for result in placed:
        assert set(result["decode"]) == {"uniform", "zipf"}
        assert set(result["prefill"]) == {str(n) for n in TINY.prompts}
        for row in result["decode"].values():
            assert row["steps"] == TINY.steps
            assert row["tok_s"] > 0
            assert row["host"]["launch_wall_s"] > 0
            assert row["host"]["besides_busy_s"] >= 0
            assert row["share_of_bound"] > 0
            assert sum(row["served"].values()) > 0 or result["plan"]["slice_size"]


def check_peer(parts: dict) -> None:
    for arm in TINY.models:
        for way in peer.WAYS:
            row = parts.get(f"{way.name}, {arm.name}")
            if row is None:
                assert (way.bits, way.offloaded) == (4, True), f"{way.name} is missing"
                continue
            assert row["layer_s"] > 0
            assert ("uint8" if way.bits == 4 else "int8") in row["nbytes_by_dtype"] or way.bits > 8
            assert not row["routed_experts_quantized"], "what docs/gpu.md says is over"
            assert bool(row["modules_by_place"]) == way.offloaded
        assert len(parts[f"ours, {arm.name}"]) > 0


# What may go wrong


def test_parts_that_fail_or_come_too_late_are_recorded() -> None:
    saved: list[dict] = []
    section = Section(100.0, saved.append)

    def broken() -> None:
        raise ValueError("no such thing")

    assert section.part("good", lambda: {"x": 1.23456789}) == {"x": 1.23457}
    assert section.part("bad", broken) is None
    assert section.part("late", lambda: 1, needs_s=1000.0) is None
    section.skip("absent", "not installed")
    parts = saved[-1]["parts"]
    assert [parts[name]["status"] for name in parts] == ["ok", "failed", "skipped", "skipped"]
    assert parts["bad"]["error"] == "ValueError: no such thing"
    assert any("broken" in line for line in parts["bad"]["trace"])
    assert parts["late"]["reason"].endswith("1000 s needed")
    assert len(saved) == 4, "saved after every part"
    spent = Section(0.0, saved.append)
    assert spent.part("any", lambda: 1) is None


def leave(path: Path, data: dict, then: str) -> list[str]:
    """A section that writes its JSON and ends in some way."""
    write_json(path, data)
    return [sys.executable, "-c", then]


def test_a_section_that_dies_keeps_what_it_measured(tmp_path: Path) -> None:
    path, parts = tmp_path / "part.json", {"a": {"status": "ok"}}
    running = {"status": "running", "parts": parts}
    dies = "import sys; print('CUDA error', file=sys.stderr); sys.exit(7)"
    found = gpu_check.run_apart(leave(path, running, dies), 30.0, path)
    assert (found["status"], found["parts"]) == ("failed", parts)
    assert "ended with 7" in found["error"]
    assert "CUDA error" in found["error"]
    found = gpu_check.run_apart(leave(path, running, "pass"), 30.0, path)
    assert found["error"] == "it left without a word"
    begin = time.monotonic()
    found = gpu_check.run_apart(leave(path, running, "import time; time.sleep(60)"), 1.0, path)
    assert (found["status"], found["parts"]) == ("failed", parts)
    assert time.monotonic() - begin < 20
    spawns = "import subprocess, sys; subprocess.Popen([sys.executable, '-c', sys.argv[1]]);"
    lasting = "import time; time.sleep(2); open('{}', 'w')".format(tmp_path / "alive")
    gpu_check.run_apart(
        [*leave(path, running, spawns + "import time; time.sleep(60)"), lasting], 1.0, path
    )
    time.sleep(2)
    assert not (tmp_path / "alive").exists(), "what a section started has outlived it"
    path.unlink()
    found = gpu_check.run_apart([sys.executable, "-c", "pass"], 30.0, path)
    assert (found["status"], found["parts"]) == ("failed", {})


def test_a_section_that_fails_as_a_whole_is_recorded(tmp_path: Path, monkeypatch) -> None:
    def fails(section: Section, options: gpu_check.Options) -> None:
        section.part("first", lambda: 1)
        raise RuntimeError("no device")

    monkeypatch.setitem(gpu_check.SECTIONS, "machine", (fails, 0.5))
    monkeypatch.setitem(gpu_check.SECTIONS, "peer", (lambda *_: None, 0.5))
    path = tmp_path / "report.json"
    code = gpu_check.main(
        ["--tiny", "--in-process", "--only", "machine", "peer", "--json", str(path)]
    )
    sections = read_json(path)["sections"]
    assert code == 1
    assert sections["machine"]["error"] == "RuntimeError: no device"
    assert sections["machine"]["parts"]["first"]["result"] == 1
    assert sections["peer"]["status"] == "ok"
    summary = gpu_check.summary(read_json(path))
    assert summary == ["machine: failed, 1 of 1 parts", "  RuntimeError: no device", *summary[2:]]


def test_what_cannot_be_built_says_why(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(build, "ROOT", tmp_path)
    (tmp_path / "works.py").write_text("print('built')")
    (tmp_path / "fails.py").write_text("raise SystemExit('no compiler')")
    section = Section(60.0, lambda _: None)
    section.part("works", lambda: build.build("works", section.left_s))
    section.part("fails", lambda: build.build("fails", section.left_s))
    build.measure(section, tiny=False)
    parts = section.to_dict()["parts"]
    assert [parts[name]["status"] for name in parts] == ["ok", "failed", "skipped"]
    assert "no compiler" in parts["fails"]["error"]


def test_no_section_may_run_past_the_end(tmp_path: Path) -> None:
    path = str(tmp_path / "out.json")
    args = gpu_check.parser().parse_args(["--only", "peer", "--budget", "15", "--json", path])
    assert gpu_check.run(args)["sections"]["peer"]["status"] == "skipped", "the grace is gone"


def test_time_left_over_goes_to_the_sections_that_follow() -> None:
    names = list(gpu_check.SECTIONS)
    assert sum(share for _, share in gpu_check.SECTIONS.values()) == pytest.approx(1.0)
    assert gpu_check._budget(names, 480.0) == pytest.approx(480 * gpu_check.SECTIONS[names[0]][1])
    assert gpu_check._budget(names[-1:], 300.0) == 300.0
    assert gpu_check._budget(names[-2:], 100.0) + gpu_check._budget(names[-1:], 100.0) > 100.0


FILE = """
import pytest
@pytest.mark.parametrize("n", range(3))
def test_it(n):
    assert n != 1, "one is wrong"
def test_other():
    pytest.skip("not here")
"""


def test_counts_of_a_test_file(tmp_path: Path, monkeypatch) -> None:
    file = tmp_path / "test_it.py"
    file.write_text(FILE)
    end = time.monotonic() + 60
    counts = exactness.run_file(str(file), tmp_path / "a.xml", end)
    assert (counts.tests, counts.failed, counts.skipped, counts.error) == (4, 1, 1, None)
    assert "one is wrong" in counts.failures[0]
    file.write_text("import time\ndef test_it(): time.sleep(60)")
    monkeypatch.setattr(exactness, "_LEAVE_S", 1.0)
    counts = exactness.run_file(str(file), tmp_path / "b.xml", time.monotonic() + 2)
    assert counts.error == "took longer than was left"
    interrupts = "import os, signal\ndef test_it(): os.kill(os.getpid(), signal.SIGINT)"
    file.write_text("def test_first(): pass\n" + interrupts)
    counts = exactness.run_file(str(file), tmp_path / "e.xml", time.monotonic() + 60)
    assert counts.tests == 1, "what an interrupted file has shown is lost"
    assert counts.error.startswith("ended with 2")
    assert exactness.run_file(str(file), tmp_path / "c.xml", 0.0).error == "no time left"
    counts = exactness.run_file(str(tmp_path / "none.py"), tmp_path / "d.xml", end + 60)
    assert counts.error or counts.tests == 0


def test_files_that_run_on_the_device_are_found() -> None:
    kernels = ("quant/test_quant_triton_experts", "quant/test_quant_triton_matrix")
    kernels += ("models/test_models_fused", "offload/test_offload_lane", "moecli/test_checks")
    kernels += ("offload/test_offload_device_kernels",)
    assert {f"tests/{name}.py" for name in kernels} <= set(exactness.files_on_device())


def test_plain_values() -> None:
    assert plain({1: (1.0, [None, "x"]), "b": True}) == {"1": [1.0, [None, "x"]], "b": True}


# Arithmetic and traces


def test_bound_is_the_slowest_lane_or_all_of_them_in_turn() -> None:
    rates = Bandwidths(vram=1000.0, link=50.0, link_kernel=40.0, ram=100.0, host_experts=20.0)
    found = bound(StepBytes(vram=100.0, fetched=5.0, linked=4.0, host=3.0), rates)
    assert found.seconds == pytest.approx({"vram": 0.105, "link": 0.2, "host": 0.15, "ram": 0.12})
    assert found.bottleneck == "link"
    assert found.overlapped_tok_s == pytest.approx(1 / 0.2)
    assert found.serial_tok_s == pytest.approx(1 / 0.455)
    assert bound(StepBytes(100.0, 0, 0, 0), rates).bottleneck == "vram"


@pytest.mark.parametrize("skew", ["uniform", "zipf"])
def test_traces_are_repeatable_and_choose_distinct_experts(skew) -> None:
    trace = make_trace(skew, 50, 3, 16, 4)
    assert trace.shape == (50, 3, 4)
    assert torch.equal(trace, make_trace(skew, 50, 3, 16, 4))
    assert all(len(set(row)) == 4 for row in trace.view(-1, 4).tolist())
    assert set(trace.flatten().tolist()) == set(range(16))


def test_a_skewed_trace_has_favourites_and_stays_with_them() -> None:
    def facts(skew) -> tuple[float, float]:
        trace = make_trace(skew, 400, 1, 16, 1)[:, 0, 0]
        most = trace.bincount(minlength=16).max().item() / len(trace)
        stays = (trace[1:] == trace[:-1]).double().mean().item()
        return most, stays

    (most, stays), (even, rarely) = facts("zipf"), facts("uniform")
    assert even < 0.15 < 0.2 < most
    assert rarely < 0.15 < 0.3 < stays


class FirstTwo:
    weight = torch.zeros(8, 6)

    def __call__(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return torch.zeros(len(x), 2, dtype=torch.int64), x[:, :2]


def test_trace_router_reads_positions_from_the_device() -> None:
    choices = make_trace("uniform", 5, 2, 8, 2)
    trace, clock = Trace(choices, torch.device("cpu")), Clock(torch.device("cpu"))
    routers = [TraceRouter(FirstTwo(), trace, clock, layer) for layer in range(2)]
    for position, count in ((0, 3), (3, 4), (7, 1)):  # the trace begins anew after five
        for layer, router in enumerate(routers):
            ids, weights = router(torch.ones(count, 6))
            expected = choices[[(position + i) % 5 for i in range(count)], layer]
            assert torch.equal(ids, expected)
            assert weights.shape == (count, 2)
    other = make_trace("zipf", 5, 2, 8, 2)
    trace.become(other)
    assert torch.equal(routers[0](torch.ones(1, 6))[0], other[3:4, 0])
    clock.restart()
    assert torch.equal(routers[0](torch.ones(1, 6))[0], other[0:1, 0])


def test_random_experts_compute_numbers_of_sane_size() -> None:
    arm = TINY.models[0]
    spec = spec_of(arm)
    layout = expert_layout(spec, arm.scheme)
    source = RandomExperts(layout, [(0, e) for e in range(4)], torch.device("cpu"))
    assert (0, 3) in source
    assert (1, 0) not in source
    assert (source.max_nbytes, source.nbytes_of((0, 0))) == (layout.nbytes, layout.nbytes)
    memory = bytearray(layout.slot_nbytes)
    assert source.read_into((0, 1), memoryview(memory)) == layout.nbytes
    blob = torch.frombuffer(memory, dtype=torch.uint8)
    table = torch.tensor([0, blob.data_ptr(), 0, 0])
    out, x = torch.zeros(1, spec.hidden_size), torch.randn(1, spec.hidden_size)
    ops.add_routed_experts(out, x, torch.tensor([[1]]), torch.ones(1, 1), table, layout)
    assert 0.01 < out.std() < 10
    memory[layout.nbytes // 2] ^= 0xFF
    before = bytes(memory)
    source.read_into((0, 2), memoryview(memory))
    assert bytes(memory) == before, "what is an expert already is not written again"
    memory[0] ^= 0xFF
    source.read_into((0, 1), memoryview(memory))
    assert torch.equal(blob[: layout.nbytes], source._templates[1])


def test_kept_arena_outlives_those_it_was_lent_to() -> None:
    pinner = SimulatedPinner()
    kept = KeptArena(8 * 4096, 4096, pinner)
    for count in (8, 3):
        lent = kept.lend(count * 4096, 4096)
        assert lent.pin(pinner) == lent.num_slots == count
        lent.buffer(0)[0] = count
        assert lent.device_address(2) == lent.address(2)
        lent.close()
    assert kept.lend(4096, 4096).buffer(0)[0] == 3
    kept.close()
    assert pinner.pieces == {}


def test_real_sizes_are_those_of_the_models() -> None:
    for arm, shape in zip(REAL.models, REAL.experts, strict=True):
        spec = spec_of(arm)
        assert (spec.hidden_size, spec.expert_intermediate_size) == (
            shape.hidden_size,
            shape.intermediate_size,
        )
        assert (spec.num_experts, spec.experts_per_token) == (shape.num_experts, shape.top_k)
        assert spec.weight_on_input == shape.weight_on_input
        assert max(REAL.prompts) + REAL.steps < arm.ctx


def compile_read() -> dict[str, str]:
    """The kernel that reads memory, for an old card and a new one."""
    from benchmarks.gpu import read_kernel

    found = {}
    block, sums = torch.zeros(1, dtype=torch.int64), torch.zeros(16, dtype=torch.int64)
    for capability in (75, 90):
        with compiling(capability) as programs:
            read_kernel.read(block, 1 << 30, sums)
        found[str(capability)] = programs["_read"]
    return found


@pytest.mark.skipif(ON_CARD, reason="a card compiles it itself")
def test_the_reading_kernel_compiles_to_wide_loads(tmp_path: Path) -> None:
    for program in run_python(compile_read, tmp_path, interpret=False).values():
        loads = re.findall(r"ld\.global\S*b32", program)
        assert loads
        assert all(".v4." in load for load in loads), loads
