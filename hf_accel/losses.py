"""The loss of each item and of each example, for the kinds of loss that ``transformers`` models have.

A model gives one number; techniques that select, weight or reorder examples need one for each.  A `Head` takes logits
apart into `ExampleLosses`, and `weighted_mean` puts these together again: with all weights 1, to the model's own loss.

    loss = 1/K sum_k  sum_i w_i l_ik / items_k          K = 1, but 2 for question answering (start and end)

What a model's loss is, is read off the model: its class (``MODEL_FOR_*_MAPPING_NAMES``), and how its ``forward`` calls
``self.loss_function``.  A loss that is not known is refused; nothing is guessed.

Shape suffixes: ``B`` examples, ``R`` rows of the batch (fewer than examples where rows are packed), ``L`` positions,
``V`` classes, ``K`` terms of the loss, ``BL`` items: rows x positions, rows x outputs or rows x terms.
"""

from __future__ import annotations

import ast
import inspect
import textwrap
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.loss.loss_utils import (
    ForCausalLMLoss,
    ForMaskedLMLoss,
    ForQuestionAnsweringLoss,
    ForSequenceClassificationLoss,
    ForTokenClassification,
)
from transformers.models.auto import modeling_auto as auto
from transformers.utils.import_utils import is_peft_available

IGNORED = -100
"""The label of what does not count, everywhere in ``transformers``."""

ExampleLossFunc = Callable[[Any, Mapping[str, Any]], "Tensor | tuple[Tensor, Tensor]"]
"""``(outputs, inputs) -> losses_B``, or ``losses_BL, mask_BL``."""


def widest(device: torch.device) -> torch.dtype:
    """Of what is summed over many steps, or cumulated: float64, which MPS does not have."""
    return torch.float32 if device.type == "mps" else torch.float64


class ExampleLosses(NamedTuple):
    """What a micro-batch's examples lose, item by item."""

    losses_BL: Tensor
    """Loss of each item, float32 or wider, with its graph; 0 where it does not count."""
    mask_BL: Tensor
    """Which items count."""
    example_BL: Tensor
    """Which example of the micro-batch an item belongs to, from 0; of a next token, the example of that token."""

    def per_example(self, num_examples: int) -> Tensor:
        """Mean over each example's counted items, (B,), 0 where it has none; detached, float32."""
        losses = self.losses_BL.detach().flatten()
        sums_B, counts_B = losses.new_zeros(num_examples), losses.new_zeros(num_examples)
        sums_B.index_add_(0, self.example_BL.flatten(), losses)
        counts_B.index_add_(0, self.example_BL.flatten(), self.mask_BL.flatten().to(losses.dtype))
        return (sums_B / counts_B.clamp(min=1)).float()


def weighted_mean(
    losses: ExampleLosses,
    items_K: Tensor,
    example_weights_B: Tensor | None = None,
    token_weights_BL: Tensor | None = None,
) -> Tensor:
    """The loss of a batch, or one micro-batch's share of it, from the losses of its items.

    Args:
        items_K: what each term is divided by, as `Head.count` gives it, summed over all that is to be one batch.
            Where it is 0, nothing counts, and the loss is 0.
        example_weights_B: how much each example counts; None: 1.
        token_weights_BL: how much each item counts, shaped as ``losses.losses_BL``; None: 1.
    """
    weighted_BL = losses.losses_BL
    if example_weights_B is not None:
        weighted_BL = weighted_BL * example_weights_B.to(weighted_BL)[losses.example_BL]
    if token_weights_BL is not None:  # what does not count may have any weight, even nan
        weighted_BL = weighted_BL * token_weights_BL.to(weighted_BL).masked_fill(~losses.mask_BL, 0)
    items_K = items_K.to(weighted_BL).reshape(-1)
    sums_K = weighted_BL.sum(0) if len(items_K) > 1 else weighted_BL.sum().reshape(1)
    return (sums_K / items_K.where(items_K > 0, 1)).mean()


# Heads ----------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Head:
    """What kind of loss a model has; made by `head_of` or `head_from`, once a run."""

    kind: str
    """What users call it, such as ``"causal LM"``."""

    terms: ClassVar[int] = 1
    """``K``, the means that the loss is a mean of.  Where there are several, an item's column is its term."""

    def count(self, inputs: Mapping[str, Any], num_examples: int | None = None) -> Tensor:
        """How many items the model's own loss averages over, (K,), from the labels alone."""
        raise NotImplementedError

    def without_labels(self, model: nn.Module, inputs: Mapping[str, Any]) -> dict[str, Any]:
        """Inputs for a forward pass that need not compute the model's own loss."""
        raise NotImplementedError

    def losses(
        self, outputs: Any, inputs: Mapping[str, Any], num_examples: int, label_smoothing: float = 0.0
    ) -> ExampleLosses:
        """Losses from the logits in ``outputs`` and the labels in ``inputs``.

        ``label_smoothing`` is the share, in [0, 1], of the target that is spread over all classes, as
        ``TrainingArguments.label_smoothing_factor`` defines it.
        """
        raise NotImplementedError


@dataclass(frozen=True)
class TokenHead(Head):
    """A class for each position: language models and token classification."""

    shift: bool
    """Whether the logits at a position are for the next position's label."""

    def count(self, inputs: Mapping[str, Any], num_examples: int | None = None) -> Tensor:
        return self._targets(inputs).ne(IGNORED).sum().reshape(1)

    def without_labels(self, model: nn.Module, inputs: Mapping[str, Any]) -> dict[str, Any]:
        """Without labels.  Encoder-decoders that make their ``decoder_input_ids`` of the labels get these; where a
        model has no method for it, the labels stay, and it computes its own loss in vain."""
        base = unwrapped(model)
        for setting in ADDED_TERMS:
            if inputs.get(setting, getattr(base.config, setting, False)):
                raise ValueError(
                    f"{type(base).__name__}({setting}={getattr(base.config, setting, True)}): its loss has a term that "
                    f"is no example's, which weights would lose. Set config.{setting} to 0 or False."
                )
        bare = {name: value for name, value in inputs.items() if name not in ("labels", "shift_labels")}
        given = inputs.get("decoder_input_ids") is not None or inputs.get("decoder_inputs_embeds") is not None
        if base.config.is_encoder_decoder and self.kind != "token classification" and not given:
            prepare = getattr(base, "prepare_decoder_input_ids_from_labels", None)
            if prepare is None or _names(base) & OTHER_DECODER_INPUTS:
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
                f"logits{tuple(logits_RLV.shape)}: each of the labels{tuple(targets_RL.shape)} needs its own. "
                "Turn off what drops or adds positions (prompt tuning, sparse prediction)."
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
    """The ``problem_type``, where it is not the configuration's."""

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
        """The label of one class may also be shares of all classes, (B, V), as mixed examples have them.  Smoothing
        leaves several labels alone, as ``Trainer`` does, and is refused for numbers."""
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
                    f"labels{tuple(labels.shape)}: a {problem} needs one for each of the logits"
                    f"{tuple(logits_BV.shape)}. Correct num_labels or problem_type in the model's config."
                )
            labels_BL = labels.reshape(logits_BV.shape).to(logits_BV.dtype)
            mask_BL = torch.ones_like(logits_BV, dtype=torch.bool)
            if problem == "multi_label_classification":
                losses_BL = F.binary_cross_entropy_with_logits(logits_BV, labels_BL, reduction="none")
            elif label_smoothing:
                raise ValueError(
                    f"label_smoothing_factor({label_smoothing}): numbers have no classes to smooth over. Leave it at 0."
                )
            else:
                losses_BL = F.mse_loss(logits_BV, labels_BL, reduction="none")
        return ExampleLosses(losses_BL, mask_BL, _row_numbers(losses_BL))

    def _problem(self, labels: Tensor) -> str:
        """The problem type; where the configuration leaves it open, the labels of the first batch settle it there, as
        they do in the model's own loss (`transformers.loss.loss_utils.ForSequenceClassificationLoss`)."""
        if self.problem is not None:
            return self.problem
        config = self.config
        if config.problem_type is None:
            if config.num_labels == 1:
                config.problem_type = "regression"
            elif labels.dtype in (torch.long, torch.int):
                config.problem_type = "single_label_classification"
            elif config.model_type in ("deberta", "deberta-v2"):  # these have a loss of their own for it
                raise ValueError(
                    f"labels({labels.dtype}): the problem type of {config.model_type} is open. "
                    'Set config.problem_type, to "multi_label_classification" for instance.'
                )
            else:
                config.problem_type = "multi_label_classification"
        return config.problem_type


@dataclass(frozen=True)
class SpanHead(Head):
    """The start and the end of an answer; what lies beyond the text does not count.  Smoothing leaves it alone, as
    ``Trainer`` does."""

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
        return ExampleLosses(losses_BK, targets_BK.lt(length), _row_numbers(losses_BK))

    def _targets(self, inputs: Mapping[str, Any], length: int) -> Tensor:
        positions = [inputs[name].reshape(-1) for name in ("start_positions", "end_positions")]
        return torch.stack(positions, dim=-1).clamp(0, length)


@dataclass(frozen=True)
class FunctionHead(Head):
    """A loss that the user gives.

    Every example counts as one item, since what else would count is not known before the forward pass; where the
    function gives items and a mask, an example's loss is the mean over its counted items.  The function may use
    anything, so labels stay in the inputs.  It smooths its labels itself, as ``Trainer``'s ``compute_loss_func`` does.
    """

    example_loss_func: ExampleLossFunc

    def count(self, inputs: Mapping[str, Any], num_examples: int | None = None) -> Tensor:
        assert num_examples is not None
        return torch.tensor([num_examples])

    def without_labels(self, model: nn.Module, inputs: Mapping[str, Any]) -> dict[str, Any]:
        return dict(inputs)

    def losses(
        self, outputs: Any, inputs: Mapping[str, Any], num_examples: int, label_smoothing: float = 0.0
    ) -> ExampleLosses:
        losses = self.example_loss_func(outputs, inputs)
        if isinstance(losses, tuple):
            losses_BL, mask_BL = losses
            mask_BL = mask_BL.bool()
            losses = losses_BL.masked_fill(~mask_BL, 0).sum(1) / mask_BL.sum(1).clamp(min=1)
            mask_B = mask_BL.any(1)
        else:
            mask_B = torch.ones_like(losses, dtype=torch.bool)
        if losses.shape != (num_examples,):
            raise ValueError(
                f"example_loss_func(...) of shape {tuple(losses.shape)}: it must give one loss for each of "
                f"{num_examples} examples. Return losses_B, or losses_BL and mask_BL."
            )
        losses_BL = losses.to(_wide(losses.dtype)).unsqueeze(1)
        return ExampleLosses(losses_BL, mask_B.unsqueeze(1), _row_numbers(losses_BL))


def head_from(example_loss_func: ExampleLossFunc | Head) -> Head:
    """The head of a loss that the user gives: as a function, see `FunctionHead`; or itself, as `head_of` gives it."""
    if isinstance(example_loss_func, Head):
        return example_loss_func
    return FunctionHead("example_loss_func", example_loss_func)


def examples_of(inputs: Mapping[str, Any], num_examples: int) -> Tensor:
    """Which example each position of the labels belongs to, from 0, (R, L).

    A row is an example, unless there are fewer rows than examples.  Then ``position_ids`` tell packed examples apart:
    they rise within one and start again with the next.  Padding (where ``attention_mask`` is 0) starts none.
    """
    labels_RL = _labels(inputs)
    if len(labels_RL) == num_examples:
        return torch.arange(num_examples, device=labels_RL.device)[:, None].expand(labels_RL.shape)
    positions_RL = inputs.get("position_ids")
    if positions_RL is None or positions_RL.shape != labels_RL.shape:
        raise ValueError(
            f"labels{tuple(labels_RL.shape)}: without position_ids of that shape, their rows cannot be divided into "
            f"{num_examples} examples. Use a collator that returns them."
        )
    starts_RL = torch.ones_like(labels_RL, dtype=torch.bool)
    starts_RL[:, 1:] = positions_RL[:, 1:] <= positions_RL[:, :-1]
    mask_RL = inputs.get("attention_mask")
    if mask_RL is not None and mask_RL.shape == labels_RL.shape:
        starts_RL &= mask_RL.bool()
    if (found := int(starts_RL.sum())) != num_examples:
        raise ValueError(
            f"position_ids{tuple(positions_RL.shape)}: they start {found} examples, and the batch has {num_examples}. "
            "Let them start again with every example, and only there."
        )
    return starts_RL.flatten().cumsum(0).sub(1).clamp(min=0).view_as(labels_RL)


def _labels(inputs: Mapping[str, Any]) -> Tensor:
    if inputs.get("labels") is None:
        raise ValueError(f"inputs({', '.join(inputs)}): there are no labels. Use a collator that returns them.")
    return inputs["labels"]


def _logits(outputs: Any, name: str) -> Tensor:
    logits = getattr(outputs, name, None)
    if logits is None:
        raise ValueError(
            f"{type(outputs).__name__}({name}=None): losses of examples are taken from {name}. "
            "Turn off fused losses that do not return them."
        )
    return logits.to(_wide(logits.dtype))


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def _row_numbers(losses_BL: Tensor) -> Tensor:
    return torch.arange(len(losses_BL), device=losses_BL.device)[:, None].expand(losses_BL.shape)


def _check_rows(logits: Tensor, num_examples: int) -> None:
    if len(logits) != num_examples:
        raise ValueError(
            f"logits{tuple(logits.shape)}: there must be a row for each of {num_examples} examples. "
            "Do not pack examples for this kind of model."
        )


# What a model's own loss is -------------------------------------------------------------------------------------------

MAPPINGS = {
    "seq2seq": ("SEQ_TO_SEQ_CAUSAL_LM", "SPEECH_SEQ_2_SEQ"),
    "causal LM": ("CAUSAL_LM", "IMAGE_TEXT_TO_TEXT"),
    "masked LM": ("MASKED_LM",),
    "classification": ("SEQUENCE_CLASSIFICATION", "IMAGE_CLASSIFICATION", "VIDEO_CLASSIFICATION"),
    "one of several": ("AUDIO_CLASSIFICATION", "MULTIPLE_CHOICE", "NEXT_SENTENCE_PREDICTION"),
    "token classification": ("TOKEN_CLASSIFICATION",),
    "question answering": ("QUESTION_ANSWERING",),
}
"""The auto classes of each kind.  Bart and its like appear in several; the first one holds."""

LOSS_FUNCTIONS = {
    "seq2seq": (ForCausalLMLoss, ForMaskedLMLoss),
    "causal LM": (ForCausalLMLoss, ForMaskedLMLoss),
    "masked LM": (ForCausalLMLoss, ForMaskedLMLoss),
    "classification": (ForSequenceClassificationLoss,),
    "one of several": (ForSequenceClassificationLoss,),
    "token classification": (ForTokenClassification,),
    "question answering": (ForQuestionAnsweringLoss,),
}
"""What ``self.loss_function`` may be for each kind.  A subclass whose name does not say its kind gets
`ForCausalLMLoss` from ``transformers``."""

OTHER_LOSSES = frozenset(
    "BrosForTokenClassification DeiTForImageClassificationWithTeacher DiaForConditionalGeneration GitForCausalLM "
    "LevitForImageClassificationWithTeacher LxmertForQuestionAnswering MusicgenForCausalLM MusicgenMelodyForCausalLM "
    "ShieldGemma2ForImageClassification VibeVoiceForConditionalGeneration".split()
)
"""Classes whose loss is not what their auto class says."""

OTHER_DECODER_INPUTS = frozenset(["EncoderDecoderModel", "FSMTForConditionalGeneration"])
"""Classes that make something else of their labels than ``prepare_decoder_input_ids_from_labels`` does: a decoder
mask as well, or nothing."""

ADDED_TERMS = ("output_router_logits", "z_loss_coefficient")
"""Settings with which a language model adds to its loss what is not of any item (mixtures of experts, Bamba)."""


def head_of(model: nn.Module) -> Head:
    """The head of a model, or ValueError where its loss is not known."""
    base = unwrapped(model)
    kind = kind_of(base)
    calls = [call for call, _ in loss_calls(type(base))]
    if kind is None or _names(base) & OTHER_LOSSES:
        known = False
    elif calls:
        known = base.loss_function in LOSS_FUNCTIONS[kind]
    elif kind in ("causal LM", "seq2seq"):  # a loss of its own is known where it takes the labels as they are
        source = "".join(map(_source, _forwards(type(base))))
        known = "CrossEntropyLoss(" in source and "shift_labels" not in source
    else:
        known = True
    if kind is None or not known:
        raise ValueError(
            f"{type(base).__name__}: its loss is not known; known are those of {', '.join(MAPPINGS)}. "
            "Give the loss of each example as example_loss_func=."
        )
    if kind == "classification" or (kind == "one of several" and calls):
        return ClassHead(kind, base.config)
    if kind == "one of several":
        return ClassHead(kind, base.config, problem="single_label_classification")
    if kind == "question answering":
        return SpanHead(kind)
    shifted_by_model = any(word.arg == "shift_labels" for call in calls for word in call.keywords)
    return TokenHead(kind, shift=bool(calls) and base.loss_function is ForCausalLMLoss and not shifted_by_model)


def honours_num_items(model: nn.Module) -> bool:
    """Whether the model's own loss is sum / ``num_items_in_batch`` where that is given.

    ``Trainer`` believes so of every ``forward`` with ``**kwargs``; hundreds of these ignore it.  False also where it
    would not be right: for question answering, whose two terms have a count each; for classes that say so
    (``accepts_loss_kwargs``); and while ``config.problem_type`` is open, since the losses of numbers and of several
    labels ignore it.
    """
    base = unwrapped(model)
    if not isinstance(base, PreTrainedModel) or not getattr(base, "accepts_loss_kwargs", True):
        return False
    calls = loss_calls(type(base))
    if not calls or not all(passes for _, passes in calls):
        return False
    if base.loss_function is ForSequenceClassificationLoss:
        return base.config.problem_type == "single_label_classification"
    return base.loss_function in (ForCausalLMLoss, ForMaskedLMLoss, ForTokenClassification)


def unwrapped(model: nn.Module) -> Any:
    """The model inside a ``peft`` model, or the model itself."""
    if is_peft_available():
        from peft import PeftModel

        if isinstance(model, PeftModel):
            return model.get_base_model()
    return model


def kind_of(model: nn.Module) -> str | None:
    """The kind of loss that the nearest class known to ``transformers`` has; None where there is none."""
    for cls in type(model).__mro__:
        for kind, mappings in MAPPINGS.items():
            for mapping in mappings:
                for names in getattr(auto, f"MODEL_FOR_{mapping}_MAPPING_NAMES").values():
                    if cls.__name__ == names or (isinstance(names, tuple | list) and cls.__name__ in names):
                        return kind
    return None


def loss_calls(cls: type) -> list[tuple[ast.Call, bool]]:
    """The calls of ``self.loss_function`` in a class's ``forward``, and whether each is given what ``forward`` is
    given as ``num_items_in_batch``."""
    given = True
    for forward in _forwards(cls):
        tree = ast.parse(_source(forward))
        calls = {"self.loss_function": [], "super().forward": []}
        for node in ast.walk(tree):
            if isinstance(node, ast.Call) and (name := ast.unparse(node.func)) in calls:
                calls[name].append(node)
        if calls["self.loss_function"]:
            return [(call, given and _passes_on(call, tree.body[0])) for call in calls["self.loss_function"]]
        given = given and all(_passes_on(call, tree.body[0]) for call in calls["super().forward"])
    return []


def _passes_on(call: ast.Call, function: Any) -> bool:
    """Whether a call inside a function is given the function's own ``num_items_in_batch`` or ``**kwargs``."""
    rest = function.args.kwarg and function.args.kwarg.arg
    for word in call.keywords:
        if word.arg == "num_items_in_batch" or (rest and word.arg is None and ast.unparse(word.value) == rest):
            return True
    return False


def _forwards(cls: type) -> Iterator[Callable]:
    """A class's ``forward`` and, as long as each calls ``super().forward``, those that it calls."""
    for owner in cls.__mro__:
        if "forward" in vars(owner):
            forward = inspect.unwrap(vars(owner)["forward"])
            yield forward
            if "super().forward(" not in _source(forward):
                return


def _source(function: Callable) -> str:
    """The source of a function, empty where it has none: then nothing is known of it."""
    try:
        return textwrap.dedent(inspect.getsource(function))
    except (OSError, TypeError):
        return ""


def _names(model: nn.Module) -> set[str]:
    return {cls.__name__ for cls in type(model).__mro__}
