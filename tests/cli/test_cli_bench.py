"""`moecli bench`: what is asked for and how numbers are written; the measuring is canned."""

import json
import signal
from pathlib import Path

import pytest

from moecli import bench_tests
from moecli.bench_result import BenchResult, BenchRow, Run
from moecli.roofline import Traffic
from offload.hardware import Machine
from offload.plan import make_plan
from tests.cli.fakes import FOOTPRINT, PEAK_RSS

PLAN = make_plan(FOOTPRINT, Machine(ram_available=32 << 20, ram_bw=1e9, disk_bw=1e8), 14 << 20)
PROMPT = (Run(400.0, 0.5, 2048.0, 1.25), Run(500.0, 0.5, 2048.0, 1.0))
READ = Traffic(float(3 << 20), 0.0, 0.0, 1024.0)
ANSWER = tuple(Run(rate, 0.75, 1024.0, None, 3 << 20, 100.0, READ) for rate in (50.0, 60.0, 90.0))
RESULT = BenchResult(
    model="tiny",
    device="cpu",
    threads=2,
    kernels="auto",
    ram_bw=30e9,
    disk_bw=2e9,
    link_bw=None,
    vram_bw=None,
    peak_rss_nbytes=PEAK_RSS,
    peak_vram_nbytes=None,
    grown_rss_nbytes=PEAK_RSS // 5,
    page_cache_dropped=True,
    rows=(BenchRow("pp512", "cold", PROMPT), BenchRow("tg128", "warm", ANSWER)),
    plan=PLAN,
)


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list:
    """What was to be measured: (subject, config)."""
    from moecli import benchmarking

    found: list = []

    def run_bench(subject, config, cancelled, progress) -> BenchResult:
        found.append((subject, config))
        progress(1, 2)
        return RESULT

    monkeypatch.setattr(benchmarking, "run_bench", run_bench)
    return found


def test_piped_it_is_tabs_and_full_values(cli, model, asked) -> None:
    outcome = cli("bench", model)
    assert (outcome.code, outcome.err) == (0, "")
    lines = outcome.out.splitlines()
    assert lines[0].split("\t") == [
        *("pp512", "cold", "450.0", "400.0", "500.0", "1.125", "0.5", "2048.0", "", ""),
    ]
    assert lines[1].split("\t") == [
        *("tg128", "warm", "60.0", "50.0", "90.0", "", "0.75", "1024.0", "3145728", "0.6"),
    ]
    assert lines[2] == f"predicted\t{PLAN.predicted_tok_s}"
    assert lines[3] == "a token\t3145728.0\t8708608\t1024.0\t195000\t0.75\t0.390625"
    assert lines[4] == f"experts\t{PLAN.host_slots}\t64"
    assert lines[5:] == [
        "bandwidth\t30000000000.0\t2000000000.0",
        f"memory\t{PEAK_RSS}\t",
        "computed by\tcpu\tauto\t2",
    ]


def test_markdown(cli, model, asked) -> None:
    out = cli("bench", model, "--md").out.splitlines()
    assert out[:4] == [
        "| test | experts | tok/s | from - to | TTFT | hits | moved/token | read/token "
        "| of roofline |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
        "| pp512 | cold | 450.0 | 400.0 - 500.0 | 1.12 s | 50.0% | 2.0 KiB |  |  |",
        "| tg128 | warm | 60.0 | 50.0 - 90.0 |  | 75.0% | 1.0 KiB | 3.0 MiB | 60% |",
    ]
    assert out[5] == (
        f"- predicted: at most {PLAN.predicted_tok_s:.1f}, limited by RAM bandwidth, measured 60.0"
    )
    assert out[6] == (
        "- a token: 3.0 MiB from RAM (8.3 MiB planned), 1.0 KiB from disk (190 KiB planned), "
        "75.0% of experts hit (39.1% planned)"
    )
    assert "- bandwidth: RAM 30.0 GB/s, disk 2.0 GB/s" in out
    assert (
        "- memory: peak 100 MiB, 20.0 MiB of RAM since the model was opened; "
        "the plan takes 14.0 MiB of 14.0 MiB" in out
    )


def test_json_is_the_same_object(cli, model, asked) -> None:
    outcome = cli("bench", model, "--json")
    content = json.loads(outcome.out)
    assert content == json.loads(json.dumps(RESULT.to_dict()))
    assert content["rows"][1]["runs"][2]["tok_s"] == 90.0
    assert content["plan"]["predicted_tok_s"] == PLAN.predicted_tok_s


def test_flags_arrive(cli, model, models: Path, asked) -> None:
    flags = ["--pp", "1k", "--tg", "64", "--repeats", "3", "--cold", "0", "--sequences", "1,2, 8"]
    assert cli("bench", model, *flags, "--ram", "20MiB", "--ctx", "2k", "--temp").code == 2
    assert cli("bench", model, *flags, "--ram", "20MiB", "--ctx", "2k").code == 0
    subject, config = asked[0]
    assert config == bench_tests.BenchConfig(1024, 64, 3, 0, (1, 2, 8))
    assert subject.path == models / model
    assert (subject.engine_config.ram_nbytes, subject.engine_config.ctx) == (20 << 20, 2048)
    with subject.open() as engine:
        assert subject.sampling(engine).temperature == 0.7


def test_environment_and_defaults(cli, model, asked, monkeypatch) -> None:
    monkeypatch.setenv("MOECLI_REPEATS", "2")
    monkeypatch.setenv("MOECLI_MODEL", model)
    assert cli("bench").code == 0
    assert asked[0][1] == bench_tests.BenchConfig(512, 128, 2, 1, ())


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--json", "--md"], "`--json` and `--md` exclude each other"),
        (["--pp", "0"], "`--pp`: `0` is no count of tokens"),
        (["--tg", "many"], "`--tg`: `many` is no count of tokens"),
        (["--repeats", "0"], "`--repeats` must be at least 1, not 0"),
        (["--repeats", "1.5"], "`--repeats`: `1.5` is no whole number"),
        (["--cold", "-1"], "`--cold` must be at least 0, not -1"),
        (["--sequences", "1,x"], "`--sequences`: `x` is no whole number"),
        (["--sequences", "2,0"], "`--sequences` must be at least 1, not 0"),
    ],
)
def test_what_cannot_be_asked_for(cli, model, asked, flags, message) -> None:
    outcome = cli("bench", model, *flags)
    assert (outcome.code, outcome.out) == (2, "")
    assert outcome.err.startswith(f"error: {message}")
    assert not asked


def test_ctrl_c_is_130_and_prints_nothing(cli, model, monkeypatch) -> None:
    from moecli import benchmarking

    def interrupted(subject, config, cancelled, progress) -> BenchResult:
        assert not cancelled()
        signal.raise_signal(signal.SIGINT)
        assert cancelled(), "Ctrl-C did not raise the flag"
        raise KeyboardInterrupt

    monkeypatch.setattr(benchmarking, "run_bench", interrupted)
    outcome = cli("bench", model)
    assert (outcome.code, outcome.out, outcome.err) == (130, "", "")
