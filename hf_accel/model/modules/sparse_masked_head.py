"""Project a masked language model's hidden states to the vocabulary at masked positions only.

Only masked positions have a label, about 15 % of them, but the model makes the last transform and the projection to the
vocabulary everywhere.  With h_i the encoder's output at position i, y_i its label and M the positions with a label,

    loss = 1/|M| sum over i in M of CE(head(h_i), y_i)         head: transform, norm, projection

so only the rows of M need to leave the encoder.  Losses and gradients are the same.  Evaluation is unchanged.

Recommendation: Use SparseMaskedHead if you pretrain a masked language model of small or medium width.
When to use: Masked language models of small or medium width, where the vocabulary is a large share of the computation.
When not to use:
- ``torch.compile`` of the whole model, because the number of masked positions differs from batch to batch.
- Logits that do not fit even so: `ChunkedCrossEntropy` also projects masked positions only, but in chunks.
Differences from the paper: It works for any masked language model with a head that treats each position separately,
which a trial before training confirms.
References: Geiping & Goldstein (2022), Cramming, https://arxiv.org/abs/2212.14034 (sparse prediction); Warner et al.
(2024), ModernBERT, https://arxiv.org/abs/2412.13663.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.utils import ModelOutput

from hf_accel.adapters import unwrapped
from hf_accel.losses import IGNORED, ExampleLosses, Head, TokenHead
from hf_accel.preserve import evaluation_mode
from hf_accel.surgery.partial_projection import PartialProjection


def rows_at(output: ModelOutput, chosen_BL: Tensor) -> ModelOutput:
    """Return an encoder's output with ``last_hidden_state`` at the chosen positions of all examples, (1, N, H)."""
    rows_1NH = output["last_hidden_state"][chosen_BL][None]
    return type(output)(**{**output, "last_hidden_state": rows_1NH})


@dataclass(frozen=True)
class SparseTokenHead(TokenHead):
    """Loss of a masked language model that returns logits at labeled positions, (1, N, V), while it trains."""

    def without_labels(self, model: nn.Module, inputs: Mapping[str, Any]) -> dict[str, Any]:
        """Keep the labels, which name the positions; the technique removes them before the model's forward."""
        return super().without_labels(model, inputs) | {"labels": inputs["labels"]}

    def losses(
        self, outputs: Any, inputs: Mapping[str, Any], num_examples: int, label_smoothing: float = 0.0
    ) -> ExampleLosses:
        targets_BL = self._targets(inputs)
        mask_BL = targets_BL.ne(IGNORED)
        logits_NV = outputs["logits"][0]
        if outputs["logits"].shape[:2] == targets_BL.shape:  # of a model in evaluation, or of another model
            logits_NV = outputs["logits"][mask_BL]
        logits_NV = logits_NV.to(torch.promote_types(logits_NV.dtype, torch.float32))
        losses_N = F.cross_entropy(logits_NV, targets_BL[mask_BL], reduction="none", label_smoothing=label_smoothing)
        losses_BL = losses_N.new_zeros(targets_BL.shape).masked_scatter(mask_BL, losses_N)
        return ExampleLosses(losses_BL, mask_BL, self._examples(inputs, num_examples).to(losses_BL.device))


@dataclass(eq=False)
class SparseMaskedHead(PartialProjection):
    """Project a masked language model's hidden states to the vocabulary at masked positions only."""

    modality: ClassVar = "masked text"

    def loss_head(self, head: Head) -> Head:
        """Return the model's own head, from logits at labeled positions."""
        run: Any = self.run_
        model = unwrapped(run.model)
        if not isinstance(head, TokenHead) or head.kind != "masked LM":
            raise ValueError(
                f"{self!r} needs a masked language model; {type(model).__name__} is none ({head.kind}). "
                "Remove SparseMaskedHead."
            )
        for hook in ("loss_head", "extra_loss"):
            if others := [technique for technique in run.with_hook(hook) if technique is not self]:
                raise ValueError(
                    f"{self!r} does not support {others[0]!r} because both read the outputs. Remove one of the two."
                )
        if any(hasattr(parameter, "ds_id") for parameter in model.parameters()):
            raise ValueError(
                f"{self!r} cannot try the head because ZeRO-3 has partitioned the model's weights. Make the model "
                "before TrainingArguments."
            )
        if not _is_by_position(model):
            raise ValueError(
                f"{self!r} does not support {type(model).__name__} because its head mixes positions. "
                "Remove SparseMaskedHead."
            )
        return SparseTokenHead(head.kind, head.shift)

    def on_train_begin(self, args, state, control, model: Any = None, **kwargs):
        super().on_train_begin(args, state, control, **kwargs)
        self.labels_: Tensor | None = None
        self.hooks_ = [
            # Not methods: copies of the model would copy the technique as well.
            model.register_forward_pre_hook(
                lambda module, args, inputs: self._take(module, args, inputs), with_kwargs=True
            ),
            unwrapped(model).base_model.register_forward_hook(lambda module, args, output: self._choose(output)),
        ]

    def on_train_end(self, args, state, control, **kwargs):
        for hook in self.hooks_:
            hook.remove()

    def _take(self, model: nn.Module, args: tuple, inputs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        if not model.training:
            return args, inputs
        self.labels_ = inputs["labels"]
        return args, {name: value for name, value in inputs.items() if name != "labels"}

    def _choose(self, output: ModelOutput) -> ModelOutput:
        labels_BL, self.labels_ = self.labels_, None
        return output if labels_BL is None else rows_at(output, labels_BL != IGNORED)


@torch.no_grad()
def _is_by_position(model: Any) -> bool:
    """Return whether a trial at some positions gives the same logits as at all positions."""
    device = next(model.parameters()).device
    ids_BL = torch.arange(8, device=device).view(2, 4) % model.config.vocab_size
    chosen_BL = torch.tensor([[False, True, True, False], [True, False, False, False]], device=device)
    with evaluation_mode(model):
        every_BLV = model(input_ids=ids_BL).logits
        hook = model.base_model.register_forward_hook(lambda module, args, output: rows_at(output, chosen_BL))
        try:
            some_1NV = model(input_ids=ids_BL).logits
        finally:
            hook.remove()
    expected_1NV = every_BLV[chosen_BL][None]
    return some_1NV.shape == expected_1NV.shape and torch.allclose(some_1NV, expected_1NV, rtol=1e-2, atol=1e-3)
