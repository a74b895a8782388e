"""Knows how one program decides where a layer's experts are read from, and who makes room.

Legend: N choices, C = N rounded up to a power of two, E experts a layer, S slots. It is launched
once a layer and token, so what counts is the chain of loads that wait for each other: two where
all experts are resident; where some are to be fetched, one sweep over the stamps for all of them,
and one short load for each. Beside them one more comes piece by piece, over many launches: the
first of the host's, when none is on its way.

Threads of a program see each other's writes to memory only across a barrier. So every table is
read before the barrier after which it is written, and stamps of hits are written before it.
"""

# mypy: allow-untyped-defs

import triton
import triton.language as tl
from torch import Tensor

from offload.device_ops import COMING, COUNT, DONE, INTO, PIECE_NBYTES

COMING_, INTO_, DONE_, COUNT_ = (tl.constexpr(n) for n in (COMING, INTO, DONE, COUNT))
MAX_COLUMNS = 4096  # of a sweep: 16 stamps a thread
NUM_WARPS = 8
NEVER = tl.constexpr(2**63 - 1)
PIECE = tl.constexpr(PIECE_NBYTES)


@triton.jit
def _is_first(choice, expert, num_choices):
    """Whether no earlier choice names the same expert -> bool [C]"""
    same = expert[:, None] == expert[None, :]  # [C, C]
    repeats = (same & (choice[None, :] < choice[:, None])).to(tl.int32)
    return (choice < num_choices) & (tl.max(repeats, axis=1) == 0)


@triton.jit
def _ages(stamp, slot, num_slots, SLOTS: tl.constexpr):
    """Stamp and slot in one number, so that the smallest is the oldest, and tells where it is."""
    here = slot < num_slots
    stamps = tl.load(stamp + slot, mask=here, other=0)
    return tl.where(here, stamps * SLOTS + slot, NEVER)


@triton.jit
def _take_oldest(
    slot, taken, rank, stamp, num_slots, COLUMNS: tl.constexpr, ROWS: tl.constexpr
):  # slot int32 [C], taken bool [C], rank int32 [C]
    """`slot`, where `taken` choices have the oldest slots, in the order of their rank.

    The stamps are seen as ROWS x COLUMNS. One sweep finds the oldest slot of every column; when
    it is taken, only its own column is searched for the next. Nothing is written meanwhile: what
    is taken already is whatever is not younger than the last one.
    """
    SLOTS: tl.constexpr = ROWS * COLUMNS
    column = tl.arange(0, COLUMNS)
    row = tl.arange(0, ROWS)
    oldest = _ages(stamp, column, num_slots, SLOTS)  # [COLUMNS]
    for block in tl.static_range(1, ROWS):
        oldest = tl.minimum(oldest, _ages(stamp, column + block * COLUMNS, num_slots, SLOTS))
    num_taken = tl.sum(taken.to(tl.int32))
    turn = 0
    while turn < num_taken:
        age = tl.min(oldest)
        victim = (age % SLOTS).to(tl.int32)
        slot = tl.where(taken & (rank == turn), victim, slot)
        ages = _ages(stamp, victim % COLUMNS + row * COLUMNS, num_slots, SLOTS)  # [ROWS]
        follower = tl.min(tl.where(ages > age, ages, NEVER))
        oldest = tl.where(column == victim % COLUMNS, follower, oldest)
        turn += 1
    return slot


@triton.jit
def _admit(
    slot_of,
    owner,
    stamp,
    key,  # int32 [C]
    slot,  # int32 [C]
    admitted,  # bool [C]
    fetched,  # bool [C]; one more may be admitted: the slot is its own, but it is not there yet
    rank,  # int32 [C]
    stamp_of_choice,  # int64 [C]
    num_slots,
    COLUMNS: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Make the fetched experts residents in place of the oldest ones -> slots, int32 [C]."""
    slot = _take_oldest(slot, admitted, rank, stamp, num_slots, COLUMNS, ROWS)
    evicted = tl.load(owner + slot, mask=admitted, other=-1)  # -1: nobody had the slot
    tl.debug_barrier()
    tl.store(slot_of + evicted, tl.full(slot.shape, -1, tl.int32), mask=admitted & (evicted >= 0))
    tl.store(slot_of + key, slot, mask=fetched)
    tl.store(owner + slot, key, mask=fetched)
    tl.store(stamp + slot, stamp_of_choice, mask=admitted)
    return slot


@triton.jit
def _any(here):
    return tl.max(here.to(tl.int32), axis=0) != 0


@triton.jit
def _one(here, values):
    """The value where `here` is true, which is in one place at most; else 0"""
    return tl.sum(tl.where(here, values, 0), axis=0)


@triton.jit
def _clear(step_addresses, host_mask, num_experts, EXPERTS: tl.constexpr):
    every = tl.arange(0, EXPERTS)
    here = every < num_experts
    tl.store(step_addresses + every, tl.zeros([EXPERTS], tl.int64), mask=here)
    tl.store(host_mask + every, tl.zeros([EXPERTS], tl.int32), mask=here)


@triton.jit
def _count(first, hit, fetched, linked):
    """How many experts are hits, fetched, read over the link, left to the host -> int64 [4]"""
    num_hits = tl.sum(hit.to(tl.int64))
    num_fetched = tl.sum(fetched.to(tl.int64))
    num_linked = tl.sum(linked.to(tl.int64))
    num_host = tl.sum(first.to(tl.int64)) - num_hits - num_linked
    lane = tl.arange(0, 4)
    link = tl.where(lane == 1, num_fetched, num_linked - num_fetched)
    return tl.where(lane == 0, num_hits, tl.where(lane == 3, num_host, link))


@triton.jit(do_not_specialize=["layer_index", "num_choices"])
def resolve_kernel(
    topk_ids,  # int64 [N]
    layer_index,
    slot_of,  # int32 [L, E]
    owner,  # int32 [S]
    stamp,  # int64 [S]
    clock,  # int64 [1]
    counters,  # int64 [L, 4]
    requests,  # int64 [L, E]
    host_addresses,  # int64 [L, E]
    link_counts,  # int32 [> N]
    link_idle,  # int32 [> N]
    slots_address,
    slot_nbytes,
    num_pieces,
    step_addresses,  # int64 [E]
    host_mask,  # int32 [E]
    fetch_src,  # int64 [> N]
    fetch_dst,  # int64 [> N]
    fetch_count,  # int32 [2]
    arrival,  # int64 [4]
    num_choices,
    num_experts,
    num_slots,
    ADMIT: tl.constexpr,
    CHOICES: tl.constexpr,  # C
    EXPERTS: tl.constexpr,  # E, rounded up to a power of two
    COLUMNS: tl.constexpr,
    ROWS: tl.constexpr,
):
    choice = tl.arange(0, CHOICES)
    expert = tl.load(topk_ids + choice, mask=choice < num_choices, other=0)
    # All of them, beside the choices: picking one by its index would wait for two loads more.
    limits = tl.load(link_counts + 1 + choice, mask=choice < num_choices, other=0)
    first = _is_first(choice, expert, num_choices)
    key = (layer_index * num_experts + expert).to(tl.int32)
    slot = tl.load(slot_of + key, mask=first, other=-1)
    source = tl.load(host_addresses + key, mask=first, other=0)
    hit = first & (slot >= 0)
    miss = first & (slot < 0)
    num_misses = tl.sum(miss.to(tl.int32))
    reachable = (miss & (source != 0)).to(tl.int32)
    rank = tl.cumsum(reachable) - reachable  # among the reachable, in the order asked
    limit = _one(choice + 1 == num_misses, limits)
    linked = (reachable != 0) & (rank < limit)
    lanes = counters + layer_index * 4 + tl.arange(0, 4)
    counted = tl.load(lanes)
    asked_before = tl.load(requests + key, mask=first, other=0)
    _clear(step_addresses, host_mask, num_experts, EXPERTS)
    fetched = linked & (choice < 0)  # none
    if ADMIT:
        now = tl.load(clock)
        idles = tl.load(link_idle + 1 + choice, mask=choice < num_choices, other=0)
        coming, into = tl.load(arrival + COMING_), tl.load(arrival + INTO_)
        done, count = tl.load(arrival + DONE_), tl.load(arrival + COUNT_)
        home = tl.load(host_addresses + coming, mask=coming >= 0, other=0)
        idle = _one(choice + 1 == num_misses, idles)
        lost = (coming >= 0) & ((home == 0) | _any(linked & (key == coming)))
        tl.store(stamp + into, 0, mask=lost)  # free, so the first to be taken
        tl.store(stamp + slot, now + choice, mask=hit)
        coming = tl.where(lost, -1, coming)
        begins = ((coming < 0) & (idle > 0)).to(tl.int32)
        room = num_slots - tl.sum(hit.to(tl.int32))
        admitted = (reachable != 0) & (rank < tl.minimum(limit + begins, room))
        fetched = linked & admitted
    tl.debug_barrier()
    num_fetched = tl.sum(fetched.to(tl.int32))
    if ADMIT:
        tl.store(clock, now + 2 * num_choices)
        if _any(admitted):
            stamps = now + num_choices + choice
            slot = _admit(
                *(slot_of, owner, stamp, key, slot, admitted, fetched, rank, stamps),
                *(num_slots, COLUMNS, ROWS),
            )
        coming = tl.where(_any(admitted & (slot == into)), -1, coming)
        begun = admitted & ~linked
        if _any(begun):
            coming, into = _one(begun, key).to(tl.int64), _one(begun, slot).to(tl.int64)
            home, done = _one(begun, source), tl.zeros_like(done)
        pieces = tl.where(coming >= 0, tl.minimum(idle, num_pieces - done), 0)
        tl.store(fetch_src + num_fetched, home + done * PIECE, mask=pieces > 0)
        place = slots_address + into * slot_nbytes
        tl.store(fetch_dst + num_fetched, place + done * PIECE, mask=pieces > 0)
        tl.store(fetch_count + 1, pieces.to(tl.int32))
        done += pieces
        arrived = (coming >= 0) & (done == num_pieces)
        tl.store(owner + into, tl.where(arrived, coming, -1).to(tl.int32), mask=coming >= 0)
        tl.store(slot_of + coming, into.to(tl.int32), mask=arrived)
        tl.store(arrival + COMING_, tl.where(arrived, -1, coming))
        tl.store(arrival + INTO_, into)
        tl.store(arrival + DONE_, done)
        tl.store(arrival + COUNT_, count + arrived.to(tl.int64))
    place = slots_address + slot.to(tl.int64) * slot_nbytes
    tl.store(fetch_src + rank, source, mask=fetched)
    tl.store(fetch_dst + rank, place, mask=fetched)
    tl.store(fetch_count, num_fetched)
    address = tl.where(hit | fetched, place, source)
    tl.store(step_addresses + expert, address, mask=hit | linked)
    tl.store(host_mask + expert, tl.full([CHOICES], 1, tl.int32), mask=miss & ~linked)
    tl.store(lanes, counted + _count(first, hit, fetched, linked))
    tl.store(requests + key, asked_before + 1, mask=first)


def resolve(
    topk_ids: Tensor,
    layer_index: int,
    slot_of: Tensor,
    owner: Tensor,
    stamp: Tensor,
    clock: Tensor,
    counters: Tensor,
    requests: Tensor,
    host_addresses: Tensor,
    link_counts: Tensor,
    link_idle: Tensor,
    slots: Tensor,
    slot_nbytes: int,
    num_pieces: int,
    admit: bool,
    step_addresses: Tensor,
    host_mask: Tensor,
    fetch_src: Tensor,
    fetch_dst: Tensor,
    fetch_count: Tensor,
    arrival: Tensor,
) -> None:
    """One launch of one program; see `device_ops.resolve`."""
    num_experts, num_slots = slot_of.shape[1], owner.numel()
    columns = min(MAX_COLUMNS, triton.next_power_of_2(max(1, num_slots)))
    resolve_kernel[(1,)](
        topk_ids,
        layer_index,
        slot_of,
        owner,
        stamp,
        clock,
        counters,
        requests,
        host_addresses,
        link_counts,
        link_idle,
        slots.data_ptr(),
        slot_nbytes,
        num_pieces,
        step_addresses,
        host_mask,
        fetch_src,
        fetch_dst,
        fetch_count,
        arrival,
        topk_ids.numel(),
        num_experts,
        num_slots,
        ADMIT=admit,
        CHOICES=triton.next_power_of_2(topk_ids.numel()),
        EXPERTS=triton.next_power_of_2(num_experts),
        COLUMNS=columns,
        ROWS=triton.next_power_of_2(triton.cdiv(max(1, num_slots), columns)),
        num_warps=NUM_WARPS,
    )
