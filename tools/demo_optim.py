"""Knows the optimiser: Muon for hidden matrices, Adam for the rest, fp32 masters.

It does not know the schedule: the caller passes a factor of the base rates with each step.
"""

from dataclasses import dataclass

import torch

POLAR = (
    (8.2051, -22.9019, 16.4607),
    (4.0664, -2.8612, 0.5184),
    (3.9096, -2.8234, 0.5250),
    (3.2856, -2.4153, 0.4853),
    (2.2779, -1.6198, 0.3985),
)


def orthogonalise(matrices: torch.Tensor) -> torch.Tensor:
    """Nearest orthogonal matrices, roughly, by five odd polynomials. [B, m, n] -> same, bf16."""
    x = matrices.bfloat16()
    transpose = x.shape[-2] > x.shape[-1]
    if transpose:
        x = x.mT.contiguous()
    x = x / (x.float().norm(dim=(-2, -1), keepdim=True) * 1.01 + 1e-7).bfloat16()
    for a, b, c in POLAR:
        gram = x @ x.mT
        poly = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        x = torch.baddbmm(x, poly, x, beta=a)
    return x.mT if transpose else x


@dataclass(frozen=True)
class Rates:
    muon: float = 0.02
    muon_decay: float = 0.02
    embedding: float = 4e-3
    norm: float = 2e-3
    router: float = 6e-3
    momentum: float = 0.95


# How a stored parameter falls apart into the matrices that are orthogonalised: (axis, sizes).
SPLITS = {
    "qkv": (0, (256, 128, 128)),
    "gate_up": (2, (128, 128)),
    "shared_gate_up": (0, (128, 128)),
}


class Optimiser:
    def __init__(self, named_params, rates: Rates):
        self.rates = rates
        self.num_steps = 0
        self.params = dict(named_params)
        self.master = {n: p.detach().float().clone() for n, p in self.params.items()}
        self.first = {n: torch.zeros_like(m) for n, m in self.master.items()}
        self.second = {n: torch.zeros_like(m) for n, m in self.master.items() if self._adam(n)}

    def _adam(self, name: str) -> bool:
        return self.params[name].dim() == 1 or name.rsplit(".", 1)[-1] in ("embedding", "router")

    def state(self) -> dict:
        return {
            "steps": self.num_steps,
            "master": self.master,
            "first": self.first,
            "second": self.second,
        }

    def load(self, state: dict) -> None:
        self.num_steps = state["steps"]
        for mine, theirs in (
            (self.master, state["master"]),
            (self.first, state["first"]),
            (self.second, state["second"]),
        ):
            for name, tensor in mine.items():
                tensor.copy_(theirs[name])
        self._publish()

    @torch.no_grad()
    def _publish(self) -> None:
        for name, param in self.params.items():
            param.copy_(self.master[name])

    @torch.no_grad()
    def step(self, factor: float) -> None:
        self.num_steps += 1
        groups: dict[tuple[int, int], list] = {}
        for name, param in self.params.items():
            grad = param.grad.float()
            if self._adam(name):
                self._adam_step(name, grad, factor)
                continue
            momentum = self.first[name]
            momentum.lerp_(grad, 1 - self.rates.momentum)
            update = grad.lerp_(momentum, self.rates.momentum)
            self.master[name].mul_(1 - factor * self.rates.muon * self.rates.muon_decay)
            axis, sizes = SPLITS.get(name.rsplit(".", 1)[-1], (0, None))
            pairs = [(update, self.master[name])]
            if sizes:
                pairs = list(
                    zip(
                        update.split(sizes, axis), self.master[name].split(sizes, axis), strict=True
                    )
                )
            for piece, target in pairs:
                piece = piece if piece.dim() == 3 else piece[None]
                target = target if target.dim() == 3 else target[None]
                flip = piece.shape[1] > piece.shape[2]
                wide = (piece.mT, target.mT) if flip else (piece, target)
                scale = self._scale(name, piece.shape)
                groups.setdefault(tuple(wide[0].shape[1:]), []).append((*wide, scale))
        for members in groups.values():
            self._muon_step(members, factor)
        self._publish()

    @staticmethod
    def _scale(name: str, shape) -> float:
        """Updates of equal spectral gain: sqrt(out / in), not below 1."""
        stored_in_out = name.rsplit(".", 1)[-1] in ("gate_up", "down")
        fan_in, fan_out = (shape[1], shape[2]) if stored_in_out else (shape[2], shape[1])
        return max(1.0, fan_out / fan_in) ** 0.5

    def _muon_step(self, members: list, factor: float) -> None:
        update = orthogonalise(torch.cat([m[0] for m in members]).bfloat16())
        start = 0
        for piece, target, scale in members:
            span = update[start : start + len(piece)].float()
            target.sub_(span, alpha=factor * self.rates.muon * scale)
            start += len(piece)

    def _adam_step(self, name: str, grad: torch.Tensor, factor: float) -> None:
        leaf = name.rsplit(".", 1)[-1]
        rate = {"embedding": self.rates.embedding, "router": self.rates.router}.get(
            leaf, self.rates.norm
        )
        first, second, n = self.first[name], self.second[name], self.num_steps
        beta1, beta2 = 0.9, 0.97
        first.lerp_(grad, 1 - beta1)
        second.lerp_(grad.square(), 1 - beta2)
        scale = (second / (1 - beta2**n)).sqrt_().add_(1e-10)
        self.master[name].addcdiv_(first, scale, value=-factor * rate / (1 - beta1**n))
