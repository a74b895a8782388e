"""Knows how wide a quantized weight is and how many share a scale; knows no tensors."""

from dataclasses import dataclass

from quant.errors import QuantError

BITS = (4, 8)
GROUP_SIZES = (32, 64, 128)
_DEFAULT_GROUP_SIZE = {4: 32, 8: 128}
WORD_BITS = 32
SCALE_NBYTES = 2


@dataclass(frozen=True)
class QuantScheme:
    """Symmetric integers of `bits` bits; every `group_size` of a row share one bf16 scale."""

    bits: int = 4
    group_size: int = 32

    def __post_init__(self) -> None:
        if self.bits not in BITS:
            raise QuantError(f"no scheme has {self.bits} bits", "use `int4` or `int8`")
        if self.group_size not in GROUP_SIZES:
            raise QuantError(
                f"no scheme has groups of {self.group_size}", "use `--group-size` 32, 64 or 128"
            )

    @classmethod
    def parse(cls, name: str, group_size: int | None = None) -> "QuantScheme":
        """`int4`, `int8`, `int4-g64`, ...; `group_size` overrides what the name does not say."""
        base, _, suffix = name.lower().partition("-g")
        if base not in ("int4", "int8") or (suffix and not suffix.isdigit()):
            raise QuantError(
                f"unknown scheme `{name}`", "use `int4`, `int8`, or with a group such as `int4-g64`"
            )
        bits = int(base[3:])
        if suffix and group_size is not None and int(suffix) != group_size:
            raise QuantError(
                f"`{name}` and a group size of {group_size} contradict each other", "give one"
            )
        return cls(bits, int(suffix) if suffix else group_size or _DEFAULT_GROUP_SIZE[bits])

    @property
    def name(self) -> str:
        return f"int{self.bits}-g{self.group_size}"

    @property
    def bpw(self) -> float:
        """Stored bits per weight, scales included."""
        return self.bits + 8 * SCALE_NBYTES / self.group_size

    @property
    def zero_point(self) -> int:
        """What is added to a signed value before it is packed: u = q + 2^(bits-1)."""
        return 1 << (self.bits - 1)

    def check_shape(self, name: str, out_features: int, in_features: int) -> None:
        """Raise QuantError, naming the tensor, unless groups divide its rows."""
        if out_features < 1 or in_features < 1 or in_features % self.group_size:
            hint = (
                "use smaller groups: `--group-size 32` for experts, `--dense int8-g32` for the rest"
            )
            if in_features % min(GROUP_SIZES):
                hint = (
                    "no group of moecli's divides it; outside experts `--dense none` keeps 16 bits"
                )
            raise QuantError(
                f"`{name}` of shape [{out_features}, {in_features}] does not divide into groups "
                f"of {self.group_size}",
                hint,
            )

    def packed_shape(self, out_features: int, in_features: int) -> tuple[int, int]:
        return out_features, in_features * self.bits // WORD_BITS

    def scale_shape(self, out_features: int, in_features: int) -> tuple[int, int]:
        return out_features, in_features // self.group_size

    def packed_nbytes(self, out_features: int, in_features: int) -> int:
        return out_features * in_features * self.bits // 8

    def scale_nbytes(self, out_features: int, in_features: int) -> int:
        return out_features * (in_features // self.group_size) * SCALE_NBYTES
