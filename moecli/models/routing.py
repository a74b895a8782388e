"""Knows how a router's logits become a choice of experts, in families whose fused op does not.

Legend of the shapes: T tokens, E experts, k experts a token, G groups of experts.
"""

import torch
from torch import Tensor

from moecli.models.config import GroupedRouting

_LEAST_SUM = 1e-20  # weights that add up to nothing are not divided by it


def choose_grouped(
    logits: Tensor, correction: Tensor, top_k: int, routing: GroupedRouting, normalize: bool
) -> tuple[Tensor, Tensor]:
    """Experts by sigmoid and correction, of the best groups alone; weights by sigmoid alone.

    Shapes: logits fp32 [T, E], correction fp32 [E]; returns ids int64 [T, k] and weights fp32
    [T, k]. A group is as good as its two best experts together.
    """
    scores = logits.sigmoid()  # [T, E]
    wanted = scores + correction
    if routing.num_groups > 1:
        groups = wanted.unflatten(-1, (routing.num_groups, -1))  # [T, G, E / G]
        best = groups.topk(2, dim=-1).values.sum(-1).topk(routing.groups_per_token).indices
        taken = torch.zeros(groups.shape[:2], dtype=torch.bool, device=logits.device)
        taken.scatter_(1, best, True)  # [T, G]
        wanted = groups.masked_fill(~taken[..., None], -torch.inf).flatten(-2)
    ids = wanted.topk(top_k, dim=-1).indices
    weights = scores.gather(-1, ids)
    if normalize:
        weights = weights / (weights.sum(-1, keepdim=True) + _LEAST_SUM)
    return ids, weights * routing.scale
