"""SelectiveLanguageModeling (Rho-1): of each text, learn the tokens that are worth it, and read the others only.

Many tokens are known already, and some never will be.  Of the n tokens of a text that count, the share ``keep`` is
trained on, k = round(``keep`` * n) and at least one, whose

    excess loss_i = loss_i - reference loss_i

is highest, each with weight n / k; so the loss is a mean over the tokens that are kept.  The reference is a model that
was trained on text of the wanted kind; without one, the tokens of highest loss are kept.

Reference: Lin et al. (2024), Rho-1: Not All Tokens Are What You Need, https://arxiv.org/abs/2404.07965.  Departure:
the tokens of a text compete with each other, and not with those of the whole batch, so that neither ranks nor
micro-batches change anything; a text counts in proportion to its length.

When to use: continued pre-training on mixed web text with a reference for what is wanted (the authors report up to 30
points on mathematics); it is mostly an adaptation to the reference's kind of text.
When not to use: to save time in a step, for every token is still computed and the reference's pass comes on top (its
operations are in the receipt, and its seconds, on an accelerator those until the work was handed over); noisy text
without a reference, whose noise has the highest loss.  We know of no independent replication.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

import annotated_types as at
import torch
from torch import Tensor

from hf_accel.losses import TokenHead
from hf_accel.surgery.frozen_model import judge, load_frozen
from hf_accel.technique import Technique

if TYPE_CHECKING:
    from hf_accel.losses import ExampleLosses


def select_tokens(scores_BL: Tensor, mask_BL: Tensor, example_BL: Tensor, keep: float) -> Tensor:
    """Weights of items: of each example's n, the k of highest score have n / k, the others 0; of equal ones, the first.

    Args:
        mask_BL: which items count.
        example_BL: which example an item belongs to, from 0.
    """
    items_N = mask_BL.flatten().nonzero().squeeze(1)
    example_N = example_BL.flatten()[items_N]
    ranked_N = scores_BL.flatten()[items_N].argsort(descending=True, stable=True)
    ranked_N = ranked_N[example_N[ranked_N].argsort(stable=True)]  # example by example, from the highest down
    example_N = example_N[ranked_N]
    counts_B = torch.bincount(example_N)
    kept_B = (keep * counts_B.cpu().double()).round().clamp(min=1).long().to(counts_B.device)
    rank_N = torch.arange(len(items_N), device=items_N.device) - (counts_B.cumsum(0) - counts_B)[example_N]
    weights_N = (counts_B.to(scores_BL.dtype) / kept_B)[example_N] * (rank_N < kept_B[example_N])
    weights_BL = torch.zeros_like(scores_BL)
    weights_BL.view(-1)[items_N[ranked_N]] = weights_N.to(scores_BL.dtype)
    return weights_BL


@dataclass(eq=False)
class SelectiveLanguageModeling(Technique):
    """Trains on the share of each text's tokens whose loss exceeds most what a reference model reaches.

    Args:
        keep: Share of a text's tokens that is trained on, in (0, 1].
        reference: Folder or id of a model with the same vocabulary, or ``package.module:function`` that gives one;
            None: no reference, the tokens of highest loss are kept.
    """

    keep: Annotated[float, at.Interval(gt=0, le=1)] = 0.6  # the paper's for 1B parameters; 0.7 for 7B
    reference: str | None = None
    neutral: ClassVar = {"keep": 1.0}
    expected_failed_checks: ClassVar = {
        "check_neutral_is_trainer": "the loss of a step is summed in another order than the model sums it: the "
        "losses that are logged differ in the last digit"
    }
    variations: ClassVar = {"reference": "hf_accel.testing:tiny_teacher"}
    rank_counters: ClassVar = ("kept", "items")

    def inspect_dataset(self, dataset: Any) -> None:
        """Load the reference, before the first step."""
        run: Any = self.run_
        if not isinstance(run.head, TokenHead):
            raise ValueError(
                f"{self!r}: {type(run.model).__name__} ({run.head.kind}) has no loss for each token. Leave it out."
            )
        self.reference_ = None if self.reference is None or self.keep == 1 else load_frozen(self, self.reference)
        self.kept_, self.items_ = torch.zeros((), dtype=torch.long), 0

    def token_weights(self, losses: ExampleLosses, ids_B: Tensor) -> Tensor | None:
        """0 for tokens that are passed over."""
        if self.keep == 1 or ids_B[0] < 0:
            return None
        scores_BL = losses.losses_BL.detach()
        if self.reference_ is not None:
            scores_BL = scores_BL - self._reference_losses()
        weights_BL = select_tokens(scores_BL, losses.mask_BL, losses.example_BL, self.keep)
        self.items_ += int(losses.mask_BL.sum())
        self.kept_ = self.kept_.to(weights_BL.device) + weights_BL.count_nonzero()
        return weights_BL

    def _reference_losses(self) -> Tensor:
        """The reference's losses of the micro-batch that the trainer is at."""
        run: Any = self.run_
        assert self.reference_ is not None
        micro = run.micro_batch
        inputs = run.prepare_inputs(dict(micro.inputs))
        if len(inputs.get("attention_mask", micro.ids_B)) < len(micro.ids_B):
            del inputs["attention_mask"]  # packed rows, as the model sees them
        outputs = judge(self, self.reference_, inputs)
        head = TokenHead(run.head.kind, run.head.shift)  # of logits, whatever the model's own head reads
        return head.losses(outputs, inputs, len(micro.ids_B), run.args.label_smoothing_factor).losses_BL

    def report(self) -> Mapping[str, Any]:
        """The share of the tokens that was trained on, on this rank."""
        return {"kept": int(self.kept_) / self.items_ if self.items_ else 1.0}

    def took_effect(self, report: Mapping[str, Any]) -> bool:
        return report["kept"] < 1
