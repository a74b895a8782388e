"""Knows what attention over latents costs, in either of its forms; no tensors.

Legend: T new tokens, L tokens looked at.
"""

from moecli.models.config import LatentSpec

_EXPANDED_NUMEL = 16 << 20  # of keys and values expanded at once, unless those of a head are more


def most_absorbed(latent: LatentSpec, length: int) -> int:
    """Up to how many of `length` tokens are cheaper to compute in the latents' space.

    There nothing is expanded, which costs as much for one token as for many; but each score takes
    as many products as a latent has numbers, and not those of a head. Compared are multiplications
    of one head: T L 2 kept + T matrix, against T L 2 padded + L matrix.
    """
    matrix = latent.rank * (latent.nope_size + latent.value_size)
    dearer = 2 * (latent.kept_size - latent.padded_size) * length + matrix  # for each token
    return length if dearer <= 0 else min(length, length * matrix // dearer)


def heads_at_once(latent: LatentSpec, num_heads: int, length: int) -> int:
    """How many heads' keys and values of `length` tokens are expanded at the same time."""
    return max(1, min(num_heads, _EXPANDED_NUMEL // (_expanded_numel(latent) * length)))


def workspace_numel(latent: LatentSpec, num_heads: int, count: int, context: int) -> int:
    """Most numbers alive at once while `count` tokens attend to `context`, themselves the last.

    Queries before and after they are turned, and what the heads have seen. Besides, in the latents'
    space, queries of that size twice and results; else latents, and keys and values of some heads.
    """
    in_both = count * num_heads * (2 * latent.head_size + latent.value_size)
    few = min(count, most_absorbed(latent, context))
    absorbed = 3 * num_heads * latent.kept_size * few
    heads = heads_at_once(latent, num_heads, context)
    expanded = (latent.kept_size + heads * _expanded_numel(latent)) * context
    return in_both + max(absorbed, expanded + 2 * count * heads * latent.padded_size)


def _expanded_numel(latent: LatentSpec) -> int:
    """Numbers a token that one head's key and value take: as they come, and padded."""
    return latent.nope_size + latent.value_size + 2 * latent.padded_size
