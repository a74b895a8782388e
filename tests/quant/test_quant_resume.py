"""A conversion that is killed, at any moment, loses nothing and ends with the same bytes."""

import os
import random
import signal
import zlib
from collections.abc import Callable
from pathlib import Path

import pytest
from quant_sources import make_job, random_weights, tree_bytes, write_source

from quant.checkpoint import Checkpoint, QuantizedCheckpoint
from quant.convert import convert
from quant.errors import QuantError
from quant.job import ConversionJob, ConversionResult
from quant.journal import Journal
from quant.manifest import MANIFEST_FILE
from quant.quantize import REVISION

# Every call that changes what is on disk, and so every border between two states of it.
STEPS = ("write", "fsync", "ftruncate", "rename", "replace", "unlink", "mkdir")


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    weights = random_weights(True, num_layers=2, num_experts=3)
    return write_source(tmp_path_factory.mktemp("resume") / "source", weights)


@pytest.fixture(scope="module")
def expected(source: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """Every byte of an undisturbed run."""
    result = convert(small_job(source, tmp_path_factory.mktemp("undisturbed") / "out"))
    return tree_bytes(result.out)


def small_job(source: Checkpoint, out: Path) -> ConversionJob:
    return make_job(source, out, True, shard_nbytes=50_000)  # three files


def in_child(action: Callable[[], object]) -> int:
    """Run in a forked process (torch is imported already); returns its wait status."""
    child = os.fork()
    if child == 0:
        status = 1
        try:
            action()
            status = 0
        finally:
            os._exit(status)
    return os.waitpid(child, 0)[1]


def kill_before_step(number: int, torn: bool) -> None:
    """Make the process kill itself at the n-th step that changes the disk; a write may be torn."""
    count = 0

    def wrap(name: str) -> None:
        original = getattr(os, name)

        def counted(*arguments, **keywords):  # type: ignore[no-untyped-def]
            nonlocal count
            count += 1
            if count == number:
                if name == "write" and torn:
                    descriptor, data = arguments
                    original(descriptor, bytes(data)[: len(data) // 2])
                os.kill(os.getpid(), signal.SIGKILL)
            return original(*arguments, **keywords)

        setattr(os, name, counted)

    for name in STEPS:
        wrap(name)


def count_steps(job: ConversionJob) -> int:
    """How many steps an undisturbed run takes, counted in a child."""
    reader, writer = os.pipe()

    def run() -> None:
        count = 0

        def wrap(name: str) -> None:
            original = getattr(os, name)

            def counted(*arguments, **keywords):  # type: ignore[no-untyped-def]
                nonlocal count
                count += 1
                return original(*arguments, **keywords)

            setattr(os, name, counted)

        raw_write = os.write
        for name in STEPS:
            wrap(name)
        convert(job)
        raw_write(writer, str(count).encode())

    assert in_child(run) == 0
    os.close(writer)
    count = int(os.read(reader, 100))
    os.close(reader)
    return count


def journaled_units(job: ConversionJob) -> int:
    """Units that a killed run has put on record."""
    journal = job.partial / "journal"
    if not journal.exists():
        return 0
    content = journal.read_bytes()
    lines = [line for line in content.splitlines() if b" " in line]
    intact = [b"%08x" % zlib.crc32(line[9:]) == line[:8] for line in lines]
    # A torn line may only be the last one: what follows it would be lost.
    assert all(intact[:-1]), "a damaged line was written over"
    return sum(intact) - bool(intact)  # without the line that names the job


def resume(job: ConversionJob) -> ConversionResult:
    """Finish what a killed run has begun, and check that nothing on record is done again."""
    finished = journaled_units(job)
    result = convert(job)
    assert result.units_resumed >= finished
    return result


def killed(status: int) -> bool:
    return os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL


def test_killed_at_every_kind_of_step(
    source: Checkpoint, expected: dict[str, bytes], tmp_path: Path
) -> None:
    steps = count_steps(small_job(source, tmp_path / "counted"))
    assert steps > 80
    # All steps of the beginning and of the end, where every one is of another kind, and some of
    # the many in between.
    inner = random.Random(0).sample(range(16, steps - 24), 12)
    for number in [*range(1, 16), *inner, *range(steps - 24, steps + 1)]:
        job = small_job(source, tmp_path / f"out{number}")
        status = in_child(lambda: (kill_before_step(number, number % 2 == 0), convert(job)))  # noqa: B023
        assert killed(status), f"step {number}: {status}"
        if job.out.exists():  # the kill came after the rename
            assert number >= steps - 1
        else:
            resume(job)
        assert tree_bytes(job.out) == expected, f"step {number}"
        assert not job.partial.exists()


def test_killed_at_random_moments(
    source: Checkpoint, expected: dict[str, bytes], tmp_path: Path
) -> None:
    moments = random.Random(1)
    for attempt in range(20):
        job = small_job(source, tmp_path / f"out{attempt}")
        kills = 0
        while not job.out.exists():
            before = journaled_units(job)
            child = os.fork()
            if child == 0:
                os._exit(0 if convert(job) else 1)
            if kills < 3:
                signal.sigtimedwait([signal.SIGCHLD], moments.uniform(0.0, 0.06))
                os.kill(child, signal.SIGKILL)
            status = os.waitpid(child, 0)[1]
            assert killed(status) or status == 0
            # The journal goes when the manifest is on disk, just before the directory's new name.
            whole = job.out.exists() or (job.partial / MANIFEST_FILE).exists()
            assert whole or journaled_units(job) >= before, "finished work was lost"
            kills += 1
        assert tree_bytes(job.out) == expected


def test_killed_again_and_again_while_resuming(
    source: Checkpoint, expected: dict[str, bytes], tmp_path: Path
) -> None:
    """Each run gets a few steps further than the last one."""
    job = small_job(source, tmp_path / "out")
    runs = 0
    while not job.out.exists():
        before = journaled_units(job)
        in_child(lambda: (kill_before_step(45, True), convert(job)))
        assert job.out.exists() or journaled_units(job) >= before
        runs += 1
        assert runs < 60, "no progress"
    assert runs > 2
    assert tree_bytes(job.out) == expected


def test_a_finished_part_that_has_changed_is_done_again(
    source: Checkpoint, expected: dict[str, bytes], tmp_path: Path
) -> None:
    """Power failed: the journal is on disk, some of what it records is not."""
    for damage in ("flip", "truncate", "remove"):
        job = small_job(source, tmp_path / damage)
        in_child(lambda: (kill_before_step(70, False), convert(job)))  # noqa: B023
        finished = journaled_units(job)
        shard = sorted(job.partial.glob("*.safetensors"))[0]
        content = bytearray(shard.read_bytes())
        if damage == "flip":
            content[len(content) // 2] ^= 1
        elif damage == "truncate":
            del content[len(content) // 2 :]
        shard.write_bytes(content)
        if damage == "remove":
            shard.unlink()
        result = convert(job)
        assert 0 < result.units_resumed < finished or damage == "remove"
        assert tree_bytes(job.out) == expected
        assert QuantizedCheckpoint.open(job.out).verify() is None


@pytest.mark.parametrize("damage", ["half a line", "a wrong checksum", "nothing at all"])
def test_a_damaged_journal_is_believed_up_to_the_damage(
    source: Checkpoint, expected: dict[str, bytes], tmp_path: Path, damage: str
) -> None:
    job = small_job(source, tmp_path / "out")
    in_child(lambda: (kill_before_step(60, False), convert(job)))
    journal = job.partial / "journal"
    lines = journal.read_bytes().splitlines(keepends=True)
    if damage == "half a line":
        lines[-1] = lines[-1][:30]
    elif damage == "a wrong checksum":
        lines[5] = lines[5].replace(b'"unit":', b'"unix":')
    else:
        lines = []
    journal.write_bytes(b"".join(lines))
    result = convert(job)
    assert result.units_resumed == {"half a line": len(lines) - 2, "a wrong checksum": 4}.get(
        damage, 0
    )
    assert tree_bytes(job.out) == expected


def test_a_partial_of_another_job_is_not_touched(source: Checkpoint, tmp_path: Path) -> None:
    from quant.scheme import QuantScheme

    job = small_job(source, tmp_path / "out")
    in_child(lambda: (kill_before_step(60, False), convert(job)))
    before = tree_bytes(job.partial)
    other = write_source(tmp_path / "source", random_weights(True, num_layers=3, num_experts=3))
    for stranger in (
        make_job(source, tmp_path / "out", True, QuantScheme(8, 32), shard_nbytes=50_000),
        make_job(source, tmp_path / "out", True, dense_scheme=None, shard_nbytes=50_000),
        make_job(source, tmp_path / "out", True, shard_nbytes=60_000),
        small_job(other, tmp_path / "out"),
    ):
        with pytest.raises(QuantError, match="another conversion") as caught:
            convert(stranger)
        assert str(job.partial) in (caught.value.hint or "")
        assert tree_bytes(job.partial) == before
    convert(job)


def test_what_another_quantizer_has_begun_is_not_taken_up(
    source: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = small_job(source, tmp_path / "out")
    in_child(lambda: (kill_before_step(60, False), convert(job)))
    monkeypatch.setattr("quant.job.REVISION", REVISION - 1)
    with pytest.raises(QuantError, match="another conversion"):
        convert(job)


def test_the_same_names_with_other_weights_are_another_job(tmp_path: Path) -> None:
    weights = random_weights(True)
    job = make_job(write_source(tmp_path / "a", weights), tmp_path / "out", True)
    in_child(lambda: (kill_before_step(40, False), convert(job)))
    tuned = {name: weight + 0.01 for name, weight in weights.items()}
    with pytest.raises(QuantError, match="another conversion"):
        convert(make_job(write_source(tmp_path / "b", tuned), tmp_path / "out", True))


def test_a_manifest_of_another_job_is_not_taken(source: Checkpoint, tmp_path: Path) -> None:
    job = small_job(source, tmp_path / "out")
    convert(job).out.rename(job.partial)
    with pytest.raises(QuantError, match="another conversion"):
        convert(make_job(source, job.out, True))
    assert convert(job).units_done == 0


def test_an_existing_output_is_never_overwritten(source: Checkpoint, tmp_path: Path) -> None:
    for name in ("directory", "file"):
        job = small_job(source, tmp_path / name)
        if name == "file":
            job.out.write_text("mine")
        else:
            job.out.mkdir()
            (job.out / "mine.txt").write_text("mine")
        with pytest.raises(QuantError, match="exists already"):
            convert(job)
        assert not job.partial.exists()
    assert (tmp_path / "directory" / "mine.txt").read_text() == "mine"


def test_a_directory_that_is_not_ours_is_refused(source: Checkpoint, tmp_path: Path) -> None:
    job = small_job(source, tmp_path / "out")
    job.partial.mkdir()
    (job.partial / "notes.txt").write_text("mine")
    with pytest.raises(QuantError, match="not an unfinished conversion"):
        convert(job)
    assert list(job.partial.iterdir()) == [job.partial / "notes.txt"]


def test_two_at_once_are_refused(source: Checkpoint, tmp_path: Path) -> None:
    job = small_job(source, tmp_path / "out")
    refused = []

    def try_another(_: object) -> None:
        if not refused:
            with pytest.raises(QuantError, match="another conversion is writing"):
                convert(job)
            refused.append(True)

    convert(job, try_another)
    assert refused


def test_an_interrupt_keeps_what_is_finished(
    source: Checkpoint, expected: dict[str, bytes], tmp_path: Path
) -> None:
    job = small_job(source, tmp_path / "out")
    seen = []

    def interrupt(progress: object) -> None:
        seen.append(progress)
        if len(seen) == 7:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert(job, interrupt)
    finished = journaled_units(job)
    assert resume(job).units_resumed == finished > 6
    assert tree_bytes(job.out) == expected


def test_journal_lines_after_a_failed_append(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    journal = Journal(tmp_path / "journal", "key")
    journal.append({"unit": 0})
    write = os.write

    def half(descriptor: int, data: memoryview) -> int:
        write(descriptor, bytes(data)[:5])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "write", half)
    with pytest.raises(OSError, match="No space"):
        journal.append({"unit": 1})
    monkeypatch.undo()
    journal.append({"unit": 2})
    journal.close()
    assert Journal(tmp_path / "journal", "key").records == [{"unit": 0}, {"unit": 2}]


def test_journal_lines_after_a_torn_one(tmp_path: Path) -> None:
    """A kill in the middle of a line must not spoil the next one."""
    path = tmp_path / "journal"
    journal = Journal(path, "key")
    journal.append({"unit": 0})
    journal.append({"unit": 1})
    journal.close()
    path.write_bytes(path.read_bytes()[:-4])
    journal = Journal(path, "key")
    assert journal.records == [{"unit": 0}]
    journal.append({"unit": 2})
    journal.close()
    assert Journal(path, "key").records == [{"unit": 0}, {"unit": 2}]
