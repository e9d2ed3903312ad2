"""Train each epoch on another random part of the data, until all of it was seen.

An epoch over fewer examples costs less.  A round is one shuffle of all examples.  Each epoch takes the next
k = round(keep * N) examples of the rounds:

    round 0                round 1
    [epoch 0][epoch 1][epoch 2  ][epoch 3][epoch 4] ...        e.g. keep = 0.4

Each round holds every example once, so none is seen twice before all were seen once.  An epoch may end one round and
begin the next.  The new round then begins with examples that the epoch has not had.

Recommendation: Use RandomSubset if you train for several epochs with a learning rate that decays to zero within the
shorter run.
When to use: Runs of several epochs, with a learning rate that decays to zero within the shorter run.  The authors find
it faster to equal accuracy than 32 methods that score examples, at 5 to 30 % of the data per epoch.
When not to use: A single epoch.  It equals a shorter run, so it is also the placebo that any method of choosing
examples has to beat.
Differences from the paper: No example comes twice within an epoch.
References: Okanovic et al. (2024), Repeated Random Sampling for Minimizing the Time-to-Accuracy of Learning (RS2),
https://arxiv.org/abs/2305.18424; the variant without replacement.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import annotated_types as at
import torch
from torch import Tensor

from hf_accel.technique import Technique


def subset_of_epoch(epoch: int, num_examples: int, size: int, seed: int) -> Tensor:
    """Return the ids, ascending, of the ``size`` examples of an epoch.

    This draws two permutations at most, because a round ends like its own permutation, however it begins.
    """
    if size == num_examples:
        return torch.arange(size)
    if 2 * size > num_examples:  # the left-out examples follow rounds
        left_out_K = _part_of_rounds(epoch, num_examples, num_examples - size, seed)
        return torch.ones(num_examples).index_fill(0, left_out_K, 0).nonzero().squeeze(1)
    return _part_of_rounds(epoch, num_examples, size, seed).sort().values


def _part_of_rounds(epoch: int, num_examples: int, size: int, seed: int) -> Tensor:
    """Return the ids of an epoch's part of the rounds; ``size`` is at most half of the examples."""
    number, start = divmod(epoch * size, num_examples)
    beyond = start + size - num_examples
    if beyond > 0:  # the epoch ends this round and begins the next one
        tail_K = _permutation(number, num_examples, seed)[start:]
        return torch.cat([tail_K, _round(number + 1, tail_K, num_examples, size, seed)[:beyond]])
    shared = -number * num_examples % size
    before_N = _permutation(number - 1, num_examples, seed) if shared else torch.empty(0, dtype=torch.int64)
    return _round(number, before_N[shared - size :], num_examples, size, seed)[start : start + size]


def _round(number: int, tail_K: Tensor, num_examples: int, size: int, seed: int) -> Tensor:
    """Return the ids of a round in order; the epoch that begins it has had ``tail_K`` from the round before."""
    shuffled_N = _permutation(number, num_examples, seed)
    if len(tail_K) == 0:
        return shuffled_N
    end = num_examples - (number + 1) * num_examples % size
    body_K = shuffled_N[:end]
    head_K = body_K[~torch.isin(body_K, tail_K)][: size - len(tail_K)]
    return torch.cat([head_K, body_K[~torch.isin(body_K, head_K)], shuffled_N[end:]])


def _permutation(number: int, num_examples: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed((seed * 1_000_003 + number) * 2 + 1)
    return torch.randperm(num_examples, generator=generator)


@dataclass(eq=False)
class RandomSubset(Technique):
    """Train each epoch on the next share of a shuffled data set, with equal weights.

    Args:
        keep: Share of the examples that an epoch trains on, in (0, 1].
    """

    keep: Annotated[float, at.Interval(gt=0, le=1)] = 0.5  # not taken from a paper
    fidelity: ClassVar = "unbiased"
    neutral: ClassVar = {"keep": 1.0}
    counters: ClassVar = ("kept",)

    def on_train_begin(self, args, state, control, **kwargs):
        super().on_train_begin(args, state, control, **kwargs)
        self.kept_ = 1.0

    def select(self, epoch: int, num_examples: int, generator: torch.Generator) -> tuple[Tensor, Tensor | None]:
        """Choose the epoch's part of its round."""
        assert self.run_ is not None
        size = max(round(self.keep * num_examples), 1)
        self.kept_ = size / num_examples
        return subset_of_epoch(epoch, num_examples, size, self.run_.stream.seed), None

    def report(self) -> Mapping[str, Any]:
        """Report the share of the examples that an epoch trains on."""
        return {"kept": self.kept_}

    def took_effect(self, report: Mapping[str, Any]) -> bool:
        return report["kept"] < 1
