"""The KV cache alone: what a token may look at, what truncation keeps, how much memory it takes."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moecli.kv_cache import KvCache
from moecli.models.batch import Batch, SequenceSlice
from moecli.models.config import LayerSpec, ModelSpec
from tests.models.released import SCOUT

CHUNK = 8
SPEC = replace(
    ModelSpec.from_hf(SCOUT),
    layers=(LayerSpec("chunked", True, True), LayerSpec("full", False, True)),
    num_heads=2,
    num_kv_heads=2,
    head_dim=4,
    chunk_size=CHUNK,
)


def write(cache, positions, mark=0):
    """Store a run of tokens whose keys say where they are, and check what each may see."""
    start, count = positions[0], len(positions)
    cache.begin(start, count)
    numbers = torch.tensor(positions, dtype=torch.float32)
    keys = (numbers + mark)[:, None, None].expand(count, 2, 4)
    for layer in range(2):
        for first, last, seen, values in cache.append(layer, start, keys, -keys):
            position = start + last - 1
            begin = position - position % CHUNK if layer == 0 else 0
            begin_of_first = (start + first) - (start + first) % CHUNK if layer == 0 else 0
            assert begin == begin_of_first, "a piece across a chunk border"
            expected = torch.arange(begin, position + 1).float()
            assert torch.equal((seen - mark)[0, :, 0] % 1000, expected)
            assert torch.equal(values, -seen)
    cache.commit()


def test_memory_is_what_the_spec_predicts():
    for ctx in (1, 7, 8, 9, 100):
        for dtype in (torch.float32, torch.bfloat16):
            cache = KvCache(SPEC, ctx, dtype)
            assert cache.nbytes == SPEC.kv_nbytes(ctx, dtype.itemsize)
            assert cache.nbytes == 2 * 2 * 4 * dtype.itemsize * (ctx + min(ctx, CHUNK))


@pytest.mark.parametrize(
    ("length", "keep", "kept"),
    [
        (20, 20, 20),
        (20, 17, 17),  # in the chunk that the ring holds
        (20, 16, 16),  # at its start: nothing of the ring is needed
        (20, 15, 8),  # in the chunk before: down to its start
        (20, 8, 8),
        (20, 3, 0),
        (16, 15, 15),  # a full ring still is the chunk before the border
        (16, 8, 8),
        (16, 7, 0),
        (5, 2, 2),
        (0, 0, 0),
    ],
)
def test_truncate(length, keep, kept):
    cache = KvCache(SPEC, 32, torch.float32)
    if length:
        write(cache, range(length))
    assert cache.truncate(keep) == kept
    assert cache.length == kept


def test_truncating_twice_remembers_what_the_ring_holds():
    cache = KvCache(SPEC, 32, torch.float32)
    write(cache, range(20))
    assert cache.truncate(16) == 16
    assert cache.truncate(13) == 8
    write(cache, range(8, 11))
    assert cache.truncate(9) == 9


@settings(max_examples=150, deadline=None)
@given(st.lists(st.tuples(st.booleans(), st.integers(0, 40)), min_size=1, max_size=12))
def test_any_history_shows_every_token_its_own_chunk(history):
    """Random writes and truncations; `write` asserts what each token sees."""
    cache = KvCache(SPEC, 64, torch.float32)
    for forget, number in history:
        if forget:
            wanted = min(number, cache.length)
            kept = cache.truncate(wanted)
            assert kept in (wanted, wanted - wanted % CHUNK)
        elif count := min(number, 64 - cache.length):
            write(cache, range(cache.length, cache.length + count))


def test_a_sequence_without_chunked_layers_keeps_every_prefix():
    spec = replace(SPEC, layers=(LayerSpec("full", True, True),) * 2, chunk_size=None)
    cache = KvCache(spec, 32, torch.float32)
    cache.begin(0, 30)
    cache.commit()
    assert cache.truncate(13) == 13


def test_a_write_that_was_never_committed_is_forgotten():
    cache = KvCache(SPEC, 32, torch.float32)
    write(cache, range(5))
    cache.begin(5, 2)
    assert cache.length == 5, "the same chunk: what was there still is"
    cache.begin(5, 10)
    assert cache.length == 0, "the rings may have gone over to the next chunk"


def test_misuse_is_caught():
    cache = KvCache(SPEC, 10, torch.float32)
    with pytest.raises(AssertionError, match="11 tokens in a KV cache of 10"):
        cache.begin(0, 11)
    with pytest.raises(AssertionError, match="tokens at 3 after 0"):
        cache.begin(3, 1)
    with pytest.raises(AssertionError):
        cache.truncate(1)
    with pytest.raises(AssertionError, match="two slices"):
        Batch(torch.zeros(2), (SequenceSlice(cache, 0, 1), SequenceSlice(cache, 0, 1)))
    with pytest.raises(AssertionError, match="3 tokens, slices 1"):
        Batch(torch.zeros(3), (SequenceSlice(cache, 0, 1),))


WINDOW = 5
SLIDING = replace(SPEC, layers=(LayerSpec("sliding", True, True),), chunk_size=None, window=WINDOW)


def write_sliding(cache, positions, said=None):
    """Store a run of tokens and check what each may see.

    A key says where its token is, and of which of several histories; `said`: all keys so far.
    """
    start, count = positions[0], len(positions)
    said = list(range(start)) if said is None else said
    said[start:] = [position + 100.0 * (len(said) - start) for position in positions]
    cache.begin(start, count)
    keys = torch.tensor(said[start:])[:, None, None].expand(count, 2, 4)
    for first, last, seen, values in cache.append(0, start, keys, -keys):
        assert torch.equal(values, -seen)
        found, end = seen[0, :, 0].tolist(), start + last
        if last - first == 1:
            assert sorted(found) == sorted(said[max(0, end - WINDOW) : end])
        else:
            assert found == said[max(0, start + first - WINDOW + 1) : end]
    cache.commit()


@settings(max_examples=300, deadline=None)
@given(st.lists(st.tuples(st.sampled_from("wwfr"), st.integers(0, 40)), min_size=1, max_size=12))
def test_any_history_shows_every_token_its_own_window(history):
    """Random writes, truncations and memories; `write_sliding` asserts what each token sees."""
    cache, said, remembered = KvCache(SLIDING, 64, torch.float32), [], 0
    for what, number in history:
        if what == "f":
            wanted = min(number, cache.length)
            kept = cache.truncate(wanted)
            assert kept in (wanted, remembered, 0)
            assert kept >= min(wanted, remembered) or wanted < remembered - 1
        elif what == "w" and (count := min(number, 64 - cache.length)):
            remembered = remembered if cache.length >= remembered else 0
            write_sliding(cache, range(cache.length, cache.length + count), said)
        elif what == "r" and cache.length == len(said):
            cache.remember()
            remembered = cache.length


def test_one_can_come_back_to_the_end_of_a_prompt_from_any_answer():
    cache, said = KvCache(SLIDING, 64, torch.float32), []
    write_sliding(cache, range(20), said)
    cache.remember()
    for length, keep, kept in [(30, 22, 20), (45, 20, 20), (60, 19, 19), (60, 19, 0)]:
        write_sliding(cache, range(cache.length, length), said)
        assert cache.truncate(keep) == kept


@pytest.mark.parametrize(
    ("length", "keep", "kept"),
    [
        (20, 20, 20),
        (20, 19, 19),  # what the last token overwrote, the next one does not see
        (20, 18, 0),
        (5, 2, 2),  # nothing was overwritten yet
        (6, 5, 5),
        (6, 4, 0),
        (20, 0, 0),
    ],
)
def test_truncate_a_window(length, keep, kept):
    cache = KvCache(SLIDING, 32, torch.float32)
    write_sliding(cache, range(length))
    assert cache.truncate(keep) == kept
    write_sliding(cache, range(kept, kept + 7))


def test_a_window_that_was_remembered_goes_back_one_token_and_no_more():
    for keep, kept in ((20, 20), (19, 19), (18, 0)):
        cache = KvCache(SLIDING, 64, torch.float32)
        write_sliding(cache, range(20))
        cache.remember()
        write_sliding(cache, range(20, 30))
        assert cache.truncate(keep) == kept


def test_a_window_s_memory_does_not_grow_with_the_context():
    for ctx in (1, 4, 5, 6, 1000):
        cache = KvCache(SLIDING, ctx, torch.float32)
        copies = 2 if ctx > WINDOW else 1  # one that moves on is kept as it was after the prompt
        expected = copies * 2 * 2 * 4 * 4 * min(ctx, WINDOW)
        assert cache.nbytes == SLIDING.kv_nbytes(ctx, 4) == expected


def test_a_step_of_several_tokens_that_dies_costs_a_window():
    cache = KvCache(SLIDING, 32, torch.float32)
    write_sliding(cache, range(9))
    cache.begin(9, 1)
    assert cache.length == 9
    cache.begin(9, 2)
    assert cache.length == 0
