"""Knows the counters of a cache of experts, and what they mean; counts nothing itself."""

from dataclasses import asdict, dataclass, fields


@dataclass(frozen=True)
class CacheStats:
    """Counters since the manager was made; `later - earlier` gives those of the time between.

    A request is one expert in one `ensure`. A hit found it in the top tier or on its way there.
    With a device, `host_hits` and `host_misses` divide the misses of the top tier by whether main
    memory had the bytes; without one they are 0. `leased_hits` and `leased_misses` count what was
    held in main memory by `lease_host`, which makes no request. `fetched`, `linked` and `hosted`
    divide the misses of decode steps on a device by what served them; `sliced` requests, of which
    a part is always in VRAM and the lanes do the rest, are neither hits nor misses.
    """

    hits: int = 0
    misses: int = 0
    host_hits: int = 0
    host_misses: int = 0
    evictions: int = 0  # from the top tier
    host_evictions: int = 0  # from main memory, where that is not the top tier
    disk_nbytes: int = 0  # read from disk, read-ahead included
    ahead_nbytes: int = 0  # of these, read ahead
    device_nbytes: int = 0  # that went over the link, copied or read in place
    fetched: int = 0  # over the link into a slot
    linked: int = 0  # over the link, read where it lies
    hosted: int = 0  # computed by the processor
    sliced: int = 0
    prefetch_reads: int = 0  # experts read ahead
    prefetch_hits: int = 0  # of these, asked for, or copied ahead, while they were still here
    prefetch_wasted: int = 0  # of these, evicted before anybody asked
    prefetch_dropped: int = 0  # guesses that were never read: no room, overtaken, cancelled
    prefetch_failed: int = 0  # read-aheads and copies ahead that ended in an error
    leased_hits: int = 0  # experts held in main memory, which had them
    leased_misses: int = 0  # and those that it had to read first
    copied_ahead: int = 0  # experts copied to the device on a guess
    copied_hits: int = 0  # of these, asked for while they were still there
    copied_wasted: int = 0  # of these, evicted before anybody asked

    @property
    def requests(self) -> int:
        return self.hits + self.misses

    @property
    def hit_rate(self) -> float | None:
        """Share of requests met by the top tier; None when there were none."""
        return self.hits / self.requests if self.requests else None

    def __sub__(self, earlier: "CacheStats") -> "CacheStats":
        names = [field.name for field in fields(self)]
        return CacheStats(**{name: getattr(self, name) - getattr(earlier, name) for name in names})

    def to_dict(self) -> dict[str, int | float | None]:
        return {**asdict(self), "hit_rate": self.hit_rate}


@dataclass
class Counts:
    """What is counted where it happens; the tables count the rest. Names as in CacheStats."""

    hits: int = 0
    misses: int = 0
    host_hits: int = 0
    host_misses: int = 0
    disk_nbytes: int = 0
    ahead_nbytes: int = 0
    device_nbytes: int = 0
    prefetch_reads: int = 0
    prefetch_dropped: int = 0
    prefetch_failed: int = 0
    leased_hits: int = 0
    leased_misses: int = 0
    copied_ahead: int = 0
