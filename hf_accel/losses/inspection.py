"""Reads off a model's class and source which loss it computes.

A loss that is not known is refused; nothing is guessed.
"""

from __future__ import annotations

import ast
import inspect
import textwrap
from collections.abc import Callable, Iterator
from typing import Any

from torch import nn
from transformers import PreTrainedModel
from transformers.loss.loss_utils import (
    ForCausalLMLoss,
    ForMaskedLMLoss,
    ForQuestionAnsweringLoss,
    ForSequenceClassificationLoss,
    ForTokenClassification,
)
from transformers.models.auto import modeling_auto as auto

from hf_accel.adapters import unwrapped
from hf_accel.losses.heads import ClassHead, Head, SpanHead, TokenHead, class_names

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


def head_of(model: nn.Module) -> Head:
    """The head of a model, or ValueError where its loss is not known."""
    base = unwrapped(model)
    kind = kind_of(base)
    calls = [call for call, _ in loss_calls(type(base))]
    if kind is None or class_names(base) & OTHER_LOSSES:
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


def honors_num_items(model: nn.Module) -> bool:
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
