"""Compute the loss of each item and of each example, for the kinds of loss of ``transformers`` models.

A model returns one number; techniques that select, weight or reorder examples need one per example.  A `Head` splits
logits into `ExampleLosses`, and `weighted_mean` combines these again.  With all weights 1, it returns the model's own
loss.

    loss = 1/K sum_k  sum_i w_i l_ik / items_k          K = 1, but 2 for question answering (start and end)

A model's class (``MODEL_FOR_*_MAPPING_NAMES``) and its ``forward``, which calls ``self.loss_function``, tell its loss.
Unknown losses are refused; nothing is guessed.

Shape suffixes: ``B`` examples, ``R`` rows of the batch (fewer than examples if rows are packed), ``L`` positions, ``V``
classes, ``K`` terms of the loss.  ``BL`` are items: rows x positions, rows x outputs or rows x terms.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedConfig

from hf_accel.adapters import unwrapped

IGNORED = -100
"""Label of items that do not count, everywhere in ``transformers``."""

ExampleLossFunc = Callable[[Any, Mapping[str, Any]], "Tensor | tuple[Tensor, Tensor]"]
"""``(outputs, inputs) -> losses_B``, or ``losses_BL, mask_BL``."""


def widest(device: torch.device) -> torch.dtype:
    """Return the dtype of sums over many steps, or of cumulative sums: float64, which MPS does not have."""
    return torch.float32 if device.type == "mps" else torch.float64


class ExampleLosses(NamedTuple):
    """The losses of a micro-batch, item by item."""

    losses_BL: Tensor
    """Loss of each item, float32 or wider, with its graph; 0 if the item does not count."""
    mask_BL: Tensor
    """True for items that count."""
    example_BL: Tensor
    """Example of the micro-batch that an item belongs to, from 0; for a next token, the example of that token."""

    def per_example(self, num_examples: int) -> Tensor:
        """Return the mean over each example's counted items, (B,), 0 if it has none; detached, float32."""
        losses = self.losses_BL.detach().flatten()
        sums_B, counts_B = losses.new_zeros(num_examples), losses.new_zeros(num_examples)
        sums_B.index_add_(0, self.example_BL.flatten(), losses)
        counts_B.index_add_(0, self.example_BL.flatten(), self.mask_BL.flatten().to(losses.dtype))
        return (sums_B / counts_B.clamp(min=1)).float()

    def by_id(self, ids_B: Tensor) -> tuple[Tensor, Tensor]:
        """Ids of examples, each once, and their mean losses; an example may be cut into several rows."""
        own_ids, own_B = ids_B.unique(return_inverse=True)
        if len(own_ids) == len(ids_B):
            return ids_B, self.per_example(len(ids_B))
        example_BL = own_B.to(self.example_BL.device)[self.example_BL]
        return own_ids, self._replace(example_BL=example_BL).per_example(len(own_ids))


def weighted_mean(
    losses: ExampleLosses,
    items_K: Tensor,
    example_weights_B: Tensor | None = None,
    token_weights_BL: Tensor | None = None,
) -> Tensor:
    """Return the loss of a batch, or one micro-batch's share of it, from the losses of its items.

    Args:
        items_K: Divisor of each term, as `Head.count` returns it, summed over the whole batch.  If it is 0, no item
            counts, and the loss is 0.
        example_weights_B: Weight of each example; None: 1.
        token_weights_BL: Weight of each item, shaped as ``losses.losses_BL``; None: 1.
    """
    weighted_BL = losses.losses_BL
    if example_weights_B is not None:
        weighted_BL = weighted_BL * example_weights_B.to(weighted_BL)[losses.example_BL]
    if token_weights_BL is not None:  # items that do not count may have any weight, even nan
        weighted_BL = weighted_BL * token_weights_BL.to(weighted_BL).masked_fill(~losses.mask_BL, 0)
    items_K = items_K.to(weighted_BL).reshape(-1)
    sums_K = weighted_BL.sum(0) if len(items_K) > 1 else weighted_BL.sum().reshape(1)
    return (sums_K / items_K.where(items_K > 0, 1)).mean()


# Heads ----------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Head:
    """The kind of loss of a model; `head_of` or `head_from` make it once per run."""

    kind: str
    """Name for users, such as ``"causal LM"``."""

    terms: ClassVar[int] = 1
    """``K``, the number of means that the loss averages.  If there are several, an item's column is its term."""

    def count(self, inputs: Mapping[str, Any], num_examples: int | None = None) -> Tensor:
        """Return the number of items that the model's own loss averages over, (K,), from the labels alone."""
        raise NotImplementedError

    def without_labels(self, model: nn.Module, inputs: Mapping[str, Any]) -> dict[str, Any]:
        """Return the inputs of a forward pass that need not compute the model's own loss."""
        raise NotImplementedError

    def losses(
        self, outputs: Any, inputs: Mapping[str, Any], num_examples: int, label_smoothing: float = 0.0
    ) -> ExampleLosses:
        """Return the losses from the logits in ``outputs`` and the labels in ``inputs``.

        ``label_smoothing`` is the share, in [0, 1], of the target that is spread over all classes, as
        ``TrainingArguments.label_smoothing_factor`` defines it.
        """
        raise NotImplementedError


OTHER_DECODER_INPUTS = frozenset(["EncoderDecoderModel", "FSMTForConditionalGeneration"])
"""Classes that use their labels in another way than ``prepare_decoder_input_ids_from_labels``.

They make a decoder mask as well, or nothing.
"""

ADDED_TERMS = ("output_router_logits", "z_loss_coefficient")
"""Settings that add a term of no item to the loss of a language model (mixtures of experts, Bamba)."""


@dataclass(frozen=True)
class TokenHead(Head):
    """A class for each position: language models and token classification."""

    shift: bool
    """True if the logits at a position are for the next position's label."""

    def count(self, inputs: Mapping[str, Any], num_examples: int | None = None) -> Tensor:
        return self._targets(inputs).ne(IGNORED).sum().reshape(1)

    def without_labels(self, model: nn.Module, inputs: Mapping[str, Any]) -> dict[str, Any]:
        """Remove the labels.

        Encoder-decoders that make their ``decoder_input_ids`` from the labels get these.  If a model has no method for
        it, the labels stay, and the model computes its own loss in vain.
        """
        base = unwrapped(model)
        for setting in ADDED_TERMS:
            if inputs.get(setting, getattr(base.config, setting, False)):
                raise ValueError(
                    f"{type(base).__name__}({setting}={getattr(base.config, setting, True)}): its loss has a term "
                    f"without example, which weights would lose. Set config.{setting} to 0 or False."
                )
        bare = {name: value for name, value in inputs.items() if name not in ("labels", "shift_labels")}
        given = inputs.get("decoder_input_ids") is not None or inputs.get("decoder_inputs_embeds") is not None
        if base.config.is_encoder_decoder and self.kind != "token classification" and not given:
            prepare = getattr(base, "prepare_decoder_input_ids_from_labels", None)
            if prepare is None or class_names(base) & OTHER_DECODER_INPUTS:
                return dict(inputs)
            bare["decoder_input_ids"] = prepare(labels=_labels(inputs))
        return bare

    def losses(
        self, outputs: Any, inputs: Mapping[str, Any], num_examples: int, label_smoothing: float = 0.0
    ) -> ExampleLosses:
        logits_RLV = _logits(outputs, "logits")
        targets_RL = self._targets(inputs).to(logits_RLV.device)
        if logits_RLV.shape[:-1] != targets_RL.shape:
            raise ValueError(
                f"logits{tuple(logits_RLV.shape)} and labels{tuple(targets_RL.shape)} differ in positions. "
                "Turn off prompt tuning or sparse prediction, which drop or add positions."
            )
        losses_RL = F.cross_entropy(
            logits_RLV.flatten(0, -2), targets_RL.flatten(), reduction="none", label_smoothing=label_smoothing
        ).view_as(targets_RL)
        return ExampleLosses(
            losses_RL, targets_RL.ne(IGNORED), self._examples(inputs, num_examples).to(losses_RL.device)
        )

    def _targets(self, inputs: Mapping[str, Any]) -> Tensor:
        labels = _labels(inputs)
        if not self.shift:
            return labels
        if inputs.get("shift_labels") is not None:
            return inputs["shift_labels"]
        return F.pad(labels, (0, 1), value=IGNORED)[:, 1:]

    def _examples(self, inputs: Mapping[str, Any], num_examples: int) -> Tensor:
        example_RL = examples_of(inputs, num_examples)
        if self.shift and inputs.get("shift_labels") is None:
            return torch.cat([example_RL[:, 1:], example_RL[:, -1:]], dim=1)
        return example_RL


@dataclass(frozen=True)
class ClassHead(Head):
    """One answer for each example: a class, several classes, or numbers."""

    config: PreTrainedConfig
    problem: str | None = None
    """``problem_type`` that replaces the configuration's."""

    def count(self, inputs: Mapping[str, Any], num_examples: int | None = None) -> Tensor:
        labels = _labels(inputs)
        if self._problem(labels) == "single_label_classification":
            if labels.is_floating_point():  # shares of classes
                return torch.tensor([len(labels)])
            return labels.ne(IGNORED).sum().reshape(1)
        return torch.tensor([labels.numel()])

    def without_labels(self, model: nn.Module, inputs: Mapping[str, Any]) -> dict[str, Any]:
        return {name: value for name, value in inputs.items() if name != "labels"}

    def losses(
        self, outputs: Any, inputs: Mapping[str, Any], num_examples: int, label_smoothing: float = 0.0
    ) -> ExampleLosses:
        """Return the losses; labels may also be shares of all classes, (B, V), as mixed examples have them.

        Smoothing does not change several labels, as in ``Trainer``, and is refused for numbers.
        """
        logits_BV = _logits(outputs, "logits")
        labels = _labels(inputs).to(logits_BV.device)
        problem = self._problem(labels)
        _check_rows(logits_BV, num_examples)
        if problem == "single_label_classification" and labels.is_floating_point():
            losses_BL = F.cross_entropy(
                logits_BV, labels.to(logits_BV.dtype), reduction="none", label_smoothing=label_smoothing
            ).unsqueeze(1)
            mask_BL = torch.ones_like(losses_BL, dtype=torch.bool)
        elif problem == "single_label_classification":
            mask_BL = labels.reshape(-1, 1).ne(IGNORED)
            losses_BL = F.cross_entropy(
                logits_BV, labels.reshape(-1), reduction="none", label_smoothing=label_smoothing
            ).unsqueeze(1)
        else:
            if labels.numel() != logits_BV.numel():
                raise ValueError(
                    f"labels{tuple(labels.shape)}: {problem} needs one label per logit, and logits are "
                    f"{tuple(logits_BV.shape)}. Correct num_labels or problem_type in the model's config."
                )
            labels_BL = labels.reshape(logits_BV.shape).to(logits_BV.dtype)
            mask_BL = torch.ones_like(logits_BV, dtype=torch.bool)
            if problem == "multi_label_classification":
                losses_BL = F.binary_cross_entropy_with_logits(logits_BV, labels_BL, reduction="none")
            elif label_smoothing:
                raise ValueError(
                    f"label_smoothing_factor({label_smoothing}): numbers have no classes to smooth over. Set it to 0."
                )
            else:
                losses_BL = F.mse_loss(logits_BV, labels_BL, reduction="none")
        return ExampleLosses(losses_BL, mask_BL, row_numbers(losses_BL))

    def _problem(self, labels: Tensor) -> str:
        """Return the problem type.

        If the configuration leaves it open, the labels of the first batch set it there.  The model's own loss does the
        same (`transformers.loss.loss_utils.ForSequenceClassificationLoss`).
        """
        if self.problem is not None:
            return self.problem
        config = self.config
        if config.problem_type is None:
            if config.num_labels == 1:
                config.problem_type = "regression"
            elif labels.dtype in (torch.long, torch.int):
                config.problem_type = "single_label_classification"
            elif config.model_type in ("deberta", "deberta-v2"):  # these have another loss for it
                raise ValueError(
                    f"labels({labels.dtype}): the problem type of {config.model_type} is open. "
                    'Set config.problem_type, for example to "multi_label_classification".'
                )
            else:
                config.problem_type = "multi_label_classification"
        return config.problem_type


@dataclass(frozen=True)
class SpanHead(Head):
    """The start and the end of an answer; positions beyond the text do not count.

    Smoothing does not apply, as in ``Trainer``.
    """

    terms: ClassVar[int] = 2

    def count(self, inputs: Mapping[str, Any], num_examples: int | None = None) -> Tensor:
        text = inputs["input_ids"] if inputs.get("input_ids") is not None else inputs["inputs_embeds"]
        return self._targets(inputs, text.shape[1]).lt(text.shape[1]).sum(0)

    def without_labels(self, model: nn.Module, inputs: Mapping[str, Any]) -> dict[str, Any]:
        return {name: value for name, value in inputs.items() if name not in ("start_positions", "end_positions")}

    def losses(
        self, outputs: Any, inputs: Mapping[str, Any], num_examples: int, label_smoothing: float = 0.0
    ) -> ExampleLosses:
        logits_BLK = torch.stack([_logits(outputs, "start_logits"), _logits(outputs, "end_logits")], dim=-1)
        _check_rows(logits_BLK, num_examples)
        length = logits_BLK.shape[1]
        targets_BK = self._targets(inputs, length).to(logits_BLK.device)
        losses_BK = F.cross_entropy(logits_BLK, targets_BK, reduction="none", ignore_index=length)
        return ExampleLosses(losses_BK, targets_BK.lt(length), row_numbers(losses_BK))

    def _targets(self, inputs: Mapping[str, Any], length: int) -> Tensor:
        positions = [inputs[name].reshape(-1) for name in ("start_positions", "end_positions")]
        return torch.stack(positions, dim=-1).clamp(0, length)


def examples_of(inputs: Mapping[str, Any], num_examples: int) -> Tensor:
    """Return the example that each position of the labels belongs to, from 0, (R, L).

    A row is an example, unless there are fewer rows than examples.  Then ``position_ids`` separate packed examples:
    they rise within one and restart with the next.  Padding (where ``attention_mask`` is 0) starts none.
    """
    labels_RL = _labels(inputs)
    if len(labels_RL) == num_examples:
        return torch.arange(num_examples, device=labels_RL.device)[:, None].expand(labels_RL.shape)
    positions_RL = inputs.get("position_ids")
    if positions_RL is None or positions_RL.shape != labels_RL.shape:
        raise ValueError(
            f"labels{tuple(labels_RL.shape)} need position_ids of that shape to divide their rows into "
            f"{num_examples} examples. Use a collator that returns them."
        )
    starts_RL = torch.ones_like(labels_RL, dtype=torch.bool)
    starts_RL[:, 1:] = positions_RL[:, 1:] <= positions_RL[:, :-1]
    mask_RL = inputs.get("attention_mask")
    if mask_RL is not None and mask_RL.shape == labels_RL.shape:
        starts_RL &= mask_RL.bool()
    if (found := int(starts_RL.sum())) != num_examples:
        raise ValueError(
            f"position_ids{tuple(positions_RL.shape)} start {found} examples, and the batch has {num_examples}. "
            "Restart them with every example, and only there."
        )
    return starts_RL.flatten().cumsum(0).sub(1).clamp(min=0).view_as(labels_RL)


def _labels(inputs: Mapping[str, Any]) -> Tensor:
    if inputs.get("labels") is None:
        raise ValueError(f"inputs({', '.join(inputs)}): there are no labels. Use a collator that returns them.")
    return inputs["labels"]


def _logits(outputs: Any, name: str) -> Tensor:
    logits = outputs.get(name) if isinstance(outputs, Mapping) else getattr(outputs, name, None)
    if logits is None:
        raise ValueError(
            f"{type(outputs).__name__}({name}=None): losses of examples need {name}. "
            "Turn off fused losses that do not return them."
        )
    return logits.to(wide(logits.dtype))


def wide(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype in which losses are computed: float32 or wider."""
    return torch.promote_types(dtype, torch.float32)


def row_numbers(losses_BL: Tensor) -> Tensor:
    """Return the row number of each item."""
    return torch.arange(len(losses_BL), device=losses_BL.device)[:, None].expand(losses_BL.shape)


def _check_rows(logits: Tensor, num_examples: int) -> None:
    if len(logits) != num_examples:
        raise ValueError(
            f"logits{tuple(logits.shape)} must have a row for each of {num_examples} examples. "
            "Do not pack examples for this kind of model."
        )


def class_names(model: nn.Module) -> set[str]:
    """Return the names of a model's class and of its bases."""
    return {cls.__name__ for cls in type(model).__mro__}
