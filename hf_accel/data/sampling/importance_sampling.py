"""Train on few examples of each drawn step: those with a large gradient more often, and with less weight.

Every step is drawn as usual, B examples, and a forward pass computes their losses.  If it pays, only
b = round(keep * B) of them are trained on, drawn with replacement:

    score  s_i = 1 - exp(-loss_i)          (the probability that the model does not give to the target)
    p_i    = s_i / sum_j s_j
    weight w_i = 1 / (B * p_i)             so that the expected sum  1/b sum w_i grad_i  is  1/B sum_i grad_i

For the cross-entropy of one label, take the norm of the gradient of the loss with respect to the logits.  It lies
between s_i and sqrt(2) * s_i times a constant near 1, and for two classes is exactly sqrt(2) * s_i.  Sampling pays if
the variance falls more than the extra forward pass costs,

    tau = sqrt(B * sum_i p_i^2)  >  (B + 3 b) / (3 b)          (a backward pass costs about two forward passes)

with tau averaged over steps.  Until then all examples of a step are trained on, and only every ``check_every``-th step
gets the extra forward pass.

Recommendation: Use ImportanceSampling if you train a vision model for many epochs and it has learned most examples.
When to use: Vision models in late epochs, after most examples are learned.  The authors reach a lower test error in
equal time late in training.
When not to use:
- Early training and fine-tuning of few epochs.
- Adam-like optimizers, which gain less from a lower variance.
- Batch normalization, because the chosen examples shift its statistics.
Differences from the paper:
- The score is computed from the loss; the authors take the norm at the last layer's inputs.
- If sampling does not pay, the whole drawn step is trained on; the authors train on b of it.
- tau is then measured every ``check_every`` steps; the authors have it from every step.
- A step of examples with several items (tokens) is divided by the drawn items, which is unbiased only for rows of equal
  length.
References: Katharopoulos and Fleuret (2018), Not All Samples Are Created Equal: Deep Learning with Importance Sampling,
https://arxiv.org/abs/1803.00942.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import annotated_types as at
import torch
from torch import Tensor

from hf_accel.technique import Technique


def importances(losses_B: Tensor) -> Tensor:
    """Return probabilities in proportion to the bound of the gradient's norm; (B,), float64."""
    scores_B = (-torch.expm1(-losses_B.double())).clamp(min=1e-6)
    return scores_B / scores_B.sum()


def draw_by_importance(p_B: Tensor, num_draws: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Draw positions independently (ascending, with repeats), with the weights that make them unbiased."""
    positions = torch.multinomial(p_B, num_draws, replacement=True, generator=generator).sort().values
    return positions, (1 / (len(p_B) * p_B[positions])).float()


@dataclass(eq=False)
class ImportanceSampling(Technique):
    """Train on a share of each drawn step, chosen by a bound of the gradient's norm, while that lowers the variance.

    The batch size is the size of the drawn step.  Multiply it by 1 / keep to train on as many examples as before.

    Args:
        keep: Share of a drawn step to train on, in (0, 1]; the paper's b / B.
        threshold: Value of tau above which it samples; None: (B + 3 b) / (3 b), where it begins to pay.
        check_every: Steps between measurements of tau while it does not sample, at least 1.
    """

    keep: Annotated[float, at.Interval(gt=0, le=1)] = 0.33  # not taken from a paper
    threshold: Annotated[float, at.Ge(0)] | None = None
    check_every: Annotated[int, at.Ge(1)] = 10  # not taken from a paper
    fidelity: ClassVar = "unbiased"
    variations: ClassVar = {"threshold": 0.0}
    counters: ClassVar = ("tau", "judged", "sampled")

    def on_train_begin(self, args, state, control, **kwargs):
        super().on_train_begin(args, state, control, **kwargs)
        self.tau_ = 0.0
        self.judged_, self.sampled_ = 0, 0

    @property
    def _samples(self) -> bool:
        return self.tau_ > self._threshold

    @property
    def _threshold(self) -> float:
        return (1 / self.keep + 3) / 3 if self.threshold is None else self.threshold

    def needs_step_losses(self) -> bool:
        assert self.run_ is not None
        return self._samples or self.run_.state.global_step % self.check_every == 0

    def step_select(self, ids_B: Tensor, losses_B: Tensor) -> tuple[Tensor, Tensor | None]:
        """Draw a share of the step by importance, or keep all of it if that does not pay."""
        run: Any = self.run_
        p_B = importances(losses_B)
        tau = math.sqrt(len(p_B) * float(p_B.square().sum()))
        self.tau_ = 0.9 * self.tau_ + 0.1 * tau if self.judged_ else tau
        self.judged_ += 1
        if not self._samples:
            return torch.arange(len(ids_B)), None
        self.sampled_ += 1
        generator = torch.Generator().manual_seed((run.stream.seed * 1_000_003 + run.state.global_step) * 2)
        return draw_by_importance(p_B, max(round(self.keep * len(ids_B)), 1), generator)

    def report(self) -> Mapping[str, Any]:
        """Report the steps with an extra forward pass, the sampled ones among them, tau and its threshold."""
        counts = {"judged": self.judged_, "sampled": self.sampled_}
        return {**counts, "tau": self.tau_, "threshold": self._threshold}

    def took_effect(self, report: Mapping[str, Any]) -> bool:
        return report["judged"] > 0
