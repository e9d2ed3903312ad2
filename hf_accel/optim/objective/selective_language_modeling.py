"""Train only on the tokens of each text that are most worth learning, and read the others.

Many tokens are known already, and some never will be.  If n tokens of a text count, k = round(``keep`` * n) are
trained on, and at least one.  They are those with the highest

    excess loss_i = loss_i - reference loss_i

each with weight n / k, so the loss is a mean over the kept tokens.  The reference is a model that was trained on text
of the wanted kind.  Without one, the tokens of highest loss are kept.

Every token is still computed, and the reference adds a pass.  The receipt has the FLOPs and seconds of that pass.  On
an accelerator, the seconds end when the work is handed over.

Recommendation: Use SelectiveLanguageModeling if you continue pre-training on mixed web text and have a reference model
of the wanted kind.
When to use: Continued pre-training on mixed web text with a reference for the wanted kind; the authors report up to 30
points on mathematics.  It is mostly an adaptation to the reference's kind of text.
When not to use:
- To save time in a step, because every token is still computed and the reference's pass comes on top.
- Noisy text without a reference, because its noise has the highest loss.
- Without a comparison: we know of no independent replication.
Differences from the paper: The tokens of a text compete with each other instead of those of the whole batch.  So ranks
and micro-batches change nothing, and a text counts in proportion to its length.
Reference: Lin et al. (2024), Rho-1: Not All Tokens Are What You Need, https://arxiv.org/abs/2404.07965.
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
    """Return weights of items: n / k for the k of highest score of each example's n, and 0 for the others.

    Of equal scores, the first ones are chosen.

    Args:
        mask_BL: True for items that count.
        example_BL: Index from 0 of the example that an item belongs to.
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
    """Train on the share of each text's tokens with the largest loss above that of a reference model.

    Args:
        keep: Share of a text's tokens to train on, in (0, 1].
        reference: Folder or id of a model with the same vocabulary, or ``package.module:function`` that returns one.
            None keeps the tokens of highest loss.
    """

    keep: Annotated[float, at.Interval(gt=0, le=1)] = 0.6  # the paper's for 1B parameters; 0.7 for 7B
    reference: str | None = None
    neutral: ClassVar = {"keep": 1.0}
    expected_failed_checks: ClassVar = {
        "check_neutral_is_trainer": "the loss of a step is summed in another order than in the model, so logged losses "
        "differ in the last digit"
    }
    variations: ClassVar = {"reference": "hf_accel.testing:tiny_teacher"}
    rank_counters: ClassVar = ("kept", "items")

    def inspect_dataset(self, dataset: Any) -> None:
        """Load the reference, before the first step."""
        run: Any = self.run_
        if not isinstance(run.head, TokenHead):
            raise ValueError(
                f"{self!r} does not support {type(run.model).__name__} ({run.head.kind}) because it has no loss for "
                "each token. Remove SelectiveLanguageModeling."
            )
        self.reference_ = None if self.reference is None or self.keep == 1 else load_frozen(self, self.reference)
        self.kept_, self.items_ = torch.zeros((), dtype=torch.long), 0

    def loss_weights(self, losses: ExampleLosses, ids_B: Tensor) -> Tensor | None:
        """Return the weights of tokens, 0 for skipped ones."""
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
        """Return the reference's losses of the current micro-batch."""
        run: Any = self.run_
        assert self.reference_ is not None
        micro = run.micro_batch
        inputs = run.prepare_inputs(dict(micro.inputs))
        if len(inputs.get("attention_mask", micro.ids_B)) < len(micro.ids_B):
            del inputs["attention_mask"]  # packed rows, as the model sees them
        outputs = judge(self, self.reference_, inputs)
        head = TokenHead(run.head.kind, run.head.shift)  # of logits, even if the model's own head reads hidden states
        return head.losses(outputs, inputs, len(micro.ids_B), run.args.label_smoothing_factor).losses_BL

    def report(self) -> Mapping[str, Any]:
        """Report this rank's share of trained tokens."""
        return {"kept": int(self.kept_) / self.items_ if self.items_ else 1.0}

    def took_effect(self, report: Mapping[str, Any]) -> bool:
        return report["kept"] < 1
