"""Drop the examples that teach least by a score, for the whole run.

Fewer examples make a shorter epoch.  Each example is scored once, before training.  The run trains on the share
``keep`` with the highest scores (``prefer="hard"``) or the lowest (``"easy"``).  With ``balance``, it trains on that
share of each class.

    el2n        || softmax(logits) - onehot(label) ||            mean over the example's items
    grand       || gradient of the example's loss with respect to all trainable parameters ||
    loss        the example's mean loss
    perplexity  exp(loss): the same ranks as loss
    column:NAME, file:PATH    existing numbers: a column, or a .npy file or a text file with one number a line

The first four cost a forward pass of the whole set.  ``grand`` costs a backward pass as well, one example at a time.
They use the model before training.

Recommendation: Use ScorePruning if you run several times on one data set with scores from a trained model.
When to use: Several runs on one data set, with scores that a trained model computed once, given as a column or a file.
Keep the hard examples if you have much data for the budget, and the easy ones if you have little.
When not to use: Models that have not learned anything yet, because their scores are noise.  In a single run, scoring
costs more than it saves.  A random subset per epoch is reported to be better at equal time
(https://arxiv.org/abs/2305.18424).
Differences from the paper: One model scores, where Paul et al. average about ten.
References: Paul et al. (2021), Deep Learning on a Data Diet: Finding Important Examples Early in Training (EL2N,
GraNd), https://arxiv.org/abs/2107.07075; Marion et al. (2023), When Less is More: Investigating Data Pruning for
Pretraining LLMs at Scale, https://arxiv.org/abs/2309.04564 (perplexity).
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import annotated_types as at
import numpy as np
import torch
from torch import Tensor

from hf_accel.features.columns import column, numbers
from hf_accel.features.scores import (
    WHOLE_WEIGHTS,
    check_scores,
    head_for,
    keep_by_score,
    losses_and_outputs,
    mean_losses,
    refuse_lost_classes,
    score_examples,
)
from hf_accel.features.static_subset import StaticSubset
from hf_accel.losses import ClassHead, ExampleLosses, Head, TokenHead, weighted_mean

PASSES = ("el2n", "grand", "loss", "perplexity")


def error_norms(logits: Tensor, losses: ExampleLosses) -> ExampleLosses:
    """Replace the items' losses by || p - onehot ||, from sum p^2 - 2 p_label + 1 and p_label = exp(-loss)."""
    squares = logits.float().softmax(-1).square().sum(-1).reshape(losses.losses_BL.shape)
    norms_BL = (squares - 2 * (-losses.losses_BL).exp() + 1).clamp(min=0).sqrt()
    return losses._replace(losses_BL=norms_BL.masked_fill(~losses.mask_BL, 0))


@dataclass(eq=False)
class ScorePruning(StaticSubset):
    """Train on the share of the examples with the highest or the lowest scores.

    Args:
        score: ``"el2n"``, ``"grand"``, ``"loss"``, ``"perplexity"``, ``"column:NAME"`` or ``"file:PATH"``.
        keep: Share of the examples to train on, in (0, 1].
        prefer: Whether high scores are kept (``"hard"``) or low ones (``"easy"``).
        balance: Column with classes, to keep the same share of each; None: classes do not matter.
    """

    score: str = "el2n"  # from Paul et al.
    keep: Annotated[float, at.Interval(gt=0, le=1)] = 0.7  # not taken from a paper
    prefer: Literal["hard", "easy"] = "hard"  # as in Paul et al.
    balance: str | None = None
    fidelity: ClassVar = "lossy"
    neutral: ClassVar = {"keep": 1.0}
    refused_backends: ClassVar = WHOLE_WEIGHTS
    variations: ClassVar = {"score": "column:score", "balance": "label"}
    counters: ClassVar = (*StaticSubset.counters, "edge")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.score not in PASSES and not self.score.startswith(("column:", "file:")):
            raise ValueError(
                f"ScorePruning(score={self.score!r}): score must be one of {', '.join(PASSES)}, column:NAME, file:PATH."
            )

    def choose(self, dataset: Any) -> Tensor:
        """Choose by the scores."""
        self.edge_ = 0.0
        if self.keep == 1:
            return torch.arange(len(dataset))
        scores_N = self._scores(dataset)
        check_scores(scores_N, len(dataset), self)
        run: Any = self.run_
        classes = None if self.balance is None else column(dataset, self.balance, self)
        generator = torch.Generator().manual_seed(run.args.seed)
        ids_K = keep_by_score(scores_N, self.keep, self.prefer, generator, classes, self)
        refuse_lost_classes(dataset, ids_K, self)
        kept_K = scores_N[ids_K]
        self.edge_ = float(kept_K.min() if self.prefer == "hard" else kept_K.max())
        return ids_K

    def _scores(self, dataset: Any) -> Tensor:
        kind, _, source = self.score.partition(":")
        if kind == "column":
            return numbers(dataset, source, self)
        if kind == "file":
            path = Path(source)
            if not path.is_file():
                raise ValueError(f"{self!r}: the file {source!r} does not exist. Correct the path.")
            return torch.from_numpy(np.atleast_1d(np.load(path) if path.suffix == ".npy" else np.loadtxt(path)))
        score = functools.partial(getattr(self, f"_{kind}"), head_for(self))
        return score_examples(self, dataset, score, batch_size=1 if kind == "grand" else None)

    def _loss(self, head: Head, inputs: Mapping[str, Tensor], num_examples: int) -> Tensor:
        return mean_losses(head, self.run_.model, inputs, num_examples)

    def _perplexity(self, head: Head, inputs: Mapping[str, Tensor], num_examples: int) -> Tensor:
        return self._loss(head, inputs, num_examples).exp()

    def _el2n(self, head: Head, inputs: Mapping[str, Tensor], num_examples: int) -> Tensor:
        losses, outputs = losses_and_outputs(head, self.run_.model, inputs, num_examples)
        one_label = (
            isinstance(head, ClassHead) and (head.problem or head.config.problem_type) == "single_label_classification"
        )
        if not (one_label or isinstance(head, TokenHead)):
            raise ValueError(
                f"{self!r} does not support {head.kind} because el2n needs one class per item. Set score='loss'."
            )
        return error_norms(outputs["logits"], losses).per_example(num_examples)

    def _grand(self, head: Head, inputs: Mapping[str, Tensor], num_examples: int) -> Tensor:
        model = self.run_.model
        parameters = [p for p in model.parameters() if p.requires_grad]
        with torch.enable_grad():
            losses, _ = losses_and_outputs(head, model, inputs, num_examples)
            loss = weighted_mean(losses, head.count(inputs, num_examples))
            gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
        return torch.stack([g.float().square().sum() for g in gradients if g is not None]).sum().sqrt()[None]

    def report(self) -> Mapping[str, Any]:
        """Report the kept share of the examples, and the score at its edge."""
        return {**super().report(), "edge": self.edge_}
