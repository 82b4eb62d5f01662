"""Expert parallelism without processes: what one rank of several computes, all ranks in turn."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

Ways = Callable[[Tensor, Tensor, int, int], tuple[Tensor, Tensor]]


def by_where(scores: Tensor, ids: Tensor, experts: int, rank: int) -> tuple[Tensor, Tensor]:
    """Return scores and ids as ``AllReduceEP`` of transformers 5.23 does."""
    elsewhere = (ids // experts) != rank
    local = torch.where(elsewhere, experts, ids % experts)
    return scores.masked_fill(elsewhere, 0.0), local


def by_fmod(scores: Tensor, ids: Tensor, experts: int, rank: int) -> tuple[Tensor, Tensor]:
    """Return them as the router's own hook in transformers 5.8 to 5.18 does."""
    elsewhere = (ids // experts) != rank
    scores = scores.masked_fill(elsewhere, 0.0)
    ids = ids.masked_fill(elsewhere, -1)
    if experts > 1:
        ids = torch.fmod(ids, experts)
    else:
        ids = ids.masked_fill(ids > 0, 0).masked_fill(ids < 0, -1)
    return scores, ids.masked_fill(ids == -1, experts)


class OneRank(nn.Module):
    """What a rank computes of an MLP: [batch, tokens, hidden] -> its experts' part [T, hidden].

    The parts of all ranks add up to the MLP's result.
    """

    def __init__(self, module: Any, rank: int, ranks: int, way: Ways = by_where) -> None:
        super().__init__()
        self.router, self.experts = module.router, copy.deepcopy(module.experts)
        self.number = self.experts.num_experts // ranks
        self.rank, self.way = rank, way
        here = slice(rank * self.number, (rank + 1) * self.number)
        for name, parameter in list(self.experts.named_parameters()):
            part = nn.Parameter(parameter.detach()[here].clone(), requires_grad=False)
            self.experts.register_parameter(name, part)
        self.experts.num_experts = self.number
        self.experts._is_expert_parallel = True

    def forward(self, x: Tensor) -> Any:
        x = x.reshape(-1, x.shape[-1])
        _, scores, ids = self.router(x)
        scores, ids = self.way(scores, ids, self.number, self.rank)
        return self.experts(x, ids, scores)
