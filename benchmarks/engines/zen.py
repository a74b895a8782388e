"""Tells vLLM that it runs on an AMD processor, where it takes the kernels of zentorch.

It runs in vLLM's own environment, as a plugin of vLLM. zentorch needs AVX512, which processors of
others have too; vLLM offers it on AMD's only, and has no kernels for 4-bit experts of its own
except where there is AMX.
"""


def platform() -> str:
    """The class that vLLM takes on such a processor."""
    import zentorch  # type: ignore[import-not-found]  # noqa: F401  # registers its operations

    return "vllm.platforms.zen_cpu.ZenCpuPlatform"
