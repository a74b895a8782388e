"""Knows the settings of a run and their built-in values; knows no files and no flags."""

from dataclasses import dataclass

from moecli.errors import MoecliError

SIMULATED = "simulated"  # a device made of main memory: for tests, and offered to nobody
DEVICES = ("auto", "cpu", "cuda", SIMULATED)
PLACEMENTS = ("auto", "lru", "slice", "pinned")
LANES = ("auto", "link", "cpu", "both")
KERNELS = ("auto", "reference", "torch", "cpu", "triton")
KV_DTYPES = ("auto", "bf16", "int8")
RUN_SCHEMES = ("stored", "nf4", "llm-int8")  # of the dense weights while they are run


@dataclass(frozen=True)
class EngineConfig:
    """How a model is placed and run. Sizes in bytes; None means: take what the machine has."""

    ctx: int | None = None  # tokens of context; None: the smaller of the model's own and 8192
    ram_nbytes: int | None = None  # budget of weights, KV cache, workspace and resident experts
    vram_nbytes: int | None = None  # budget of all that this process takes of the graphics card
    device: str = "auto"  # what computes; auto: a CUDA device where there is one
    placement: str = "auto"  # of experts in VRAM; see offload.plan
    lane: str = "auto"  # how experts that VRAM lacks are served: link, cpu, both
    dense_scheme: str = "stored"  # stored: as in the checkpoint; else converted when opened
    kv_dtype: str = "auto"  # of keys and values; auto: bf16
    threads: int | None = None  # None: one a physical core
    prefill_chunk: int = 512  # prompt tokens that go through the model at once
    keep_experts: bool = True  # False: every expert is read from disk each time it is chosen
    kernels: str = "auto"  # backend of quant.ops
    pictures: bool = True  # whether a model that sees has room to look at them

    def __post_init__(self) -> None:
        for name in ("ctx", "threads", "prefill_chunk"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise MoecliError(f"`{name}` must be at least 1, not {value}")
        for name, known in (
            ("device", DEVICES),
            ("placement", PLACEMENTS),
            ("lane", LANES),
            ("kernels", KERNELS),
            ("dense_scheme", RUN_SCHEMES),
            ("kv_dtype", KV_DTYPES),
        ):
            value = getattr(self, name)
            assert value in known, f"{name} `{value}` is none of {known}"


@dataclass(frozen=True)
class SamplingConfig:
    """How the next token is drawn; temperature 0 takes the likeliest."""

    temperature: float = 0.7
    top_p: float = 1.0
    top_k: int = 0  # 0: all
    min_p: float = 0.0
    seed: int | None = None  # None: a fresh one each time
    max_tokens: int | None = None  # None: until the context is full
    stop: tuple[str, ...] = ()
    ignore_eos: bool = False  # go on where the model would end: for measuring

    def __post_init__(self) -> None:
        if self.temperature < 0:
            raise MoecliError(f"`--temp` must be 0 or more, not {self.temperature}")
        if not 0 < self.top_p <= 1:
            raise MoecliError(f"`--top-p` must lie in (0, 1], not {self.top_p}")
        if self.top_k < 0:
            raise MoecliError(f"`--top-k` must be 0 or more, not {self.top_k}")
        if not 0 <= self.min_p <= 1:
            raise MoecliError(f"`--min-p` must lie in [0, 1], not {self.min_p}")
        if self.max_tokens is not None and self.max_tokens < 1:
            raise MoecliError(f"`--max-tokens` must be at least 1, not {self.max_tokens}")
