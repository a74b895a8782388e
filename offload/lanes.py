"""Knows how what VRAM lacks is divided between the link and the processor, and how long it takes.

Plain arithmetic: standard library only. The link brings an expert's bytes to the graphics card
(fetched into a slot, or read by a kernel where they lie); on the host lane the processor computes
the expert in main memory. The two work at the same time and share main memory's bandwidth.
"""

from dataclasses import dataclass
from math import comb, inf, nextafter

LINK, HOST = "link", "host"


@dataclass(frozen=True)
class LaneSpeeds:
    """Bytes of experts a second; 0: the lane is not used. `ram`: both together at most."""

    link: float
    host: float
    ram: float = inf

    def __post_init__(self) -> None:
        assert self.link >= 0 <= self.host, "a bandwidth below 0"
        assert self.link + self.host > 0, "no lane"
        assert self.ram > 0, "main memory that is never read"

    def seconds(self, link_nbytes: float, host_nbytes: float) -> float:
        """Until both are served."""
        together = (link_nbytes + host_nbytes) / self.ram
        return max(_seconds(link_nbytes, self.link), _seconds(host_nbytes, self.host), together)


def _seconds(nbytes: float, bandwidth: float) -> float:
    if not nbytes:
        return 0.0
    return nbytes / bandwidth if bandwidth else inf


def link_count(missing: int, speeds: LaneSpeeds) -> int:
    """Of `missing` experts, how many the link serves so that both lanes end soonest.

    An expert is served whole. Ties go to the link.
    """

    def ends(count: int) -> float:  # times both bandwidths
        return max(count * speeds.host, (missing - count) * speeds.link)

    return min(range(missing, -1, -1), key=ends)


def link_counts(speeds: LaneSpeeds, most: int) -> tuple[int, ...]:
    """For 0 to `most` missing experts of a layer, how many the link serves.

    Where only some of them are within its reach, it serves so many of those: no other division of
    them ends sooner, so none is slower than the better lane alone.
    """
    return tuple(link_count(missing, speeds) for missing in range(most + 1))


def link_idle(speeds: LaneSpeeds, most: int, choices: int, vram: float = inf) -> tuple[float, ...]:
    """For 0 to `most` missing experts of a layer, how many more the link brings meanwhile.

    While the processor computes its part, the link has time left, and main memory bandwidth: what
    is brought in these makes no step longer. Whoever reads `vram` bytes a second from VRAM has had
    the time for the other experts of `choices` by then. Always less than one expert: with time
    for one more, the division would have given it to the link.
    """
    idle: list[float] = []
    for missing in range(most + 1):
        count = link_count(missing, speeds)
        seconds = speeds.seconds(count, missing - count)
        in_vram = max(choices, missing) - missing + count
        by_link = (seconds - in_vram / vram) * speeds.link - count
        in_memory = seconds * speeds.ram - missing if speeds.ram < inf else inf
        most_idle = nextafter(1.0, 0.0)  # where rounding makes a tie a little more than one
        idle.append(max(0.0, min(by_link, in_memory, most_idle)))
    return tuple(idle)


def link_rows(rows: int, unit: int, speeds: LaneSpeeds) -> int:
    """Of `rows` of an expert, how many the link serves: a multiple of `unit`; ties to the link."""
    assert rows % unit == 0, f"{rows} rows in units of {unit}"
    return link_count(rows // unit, speeds) * unit


@dataclass(frozen=True)
class Misses:
    """What one layer asks of the lanes for one token, in experts, on the average."""

    link: float
    host: float
    seconds_per_byte: float  # of an expert's size


def expected_misses(choices: int, miss_rate: float, speeds: LaneSpeeds) -> Misses:
    """Each of `choices` experts is missing with probability `miss_rate`, whatever the others do."""
    link = host = seconds = 0.0
    for missing in range(1, choices + 1):
        hits = choices - missing
        probability = comb(choices, missing) * miss_rate**missing * (1 - miss_rate) ** hits
        count = link_count(missing, speeds)
        link += probability * count
        host += probability * (missing - count)
        seconds += probability * speeds.seconds(count, missing - count)
    return Misses(link, host, seconds)
