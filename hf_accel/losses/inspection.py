"""Find the loss that a model computes from its class and source.

Unknown losses are refused; nothing is guessed.
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

# Kinds of loss --------------------------------------------------------------------------------------------------------

MAPPINGS = {
    "seq2seq": ("SEQ_TO_SEQ_CAUSAL_LM", "SPEECH_SEQ_2_SEQ"),
    "causal LM": ("CAUSAL_LM", "IMAGE_TEXT_TO_TEXT"),
    "masked LM": ("MASKED_LM",),
    "classification": ("SEQUENCE_CLASSIFICATION", "IMAGE_CLASSIFICATION", "VIDEO_CLASSIFICATION"),
    "one of several": ("AUDIO_CLASSIFICATION", "MULTIPLE_CHOICE", "NEXT_SENTENCE_PREDICTION"),
    "token classification": ("TOKEN_CLASSIFICATION",),
    "question answering": ("QUESTION_ANSWERING",),
}
"""Auto classes of each kind.  Bart and similar models appear in several; the first one counts."""

LOSS_FUNCTIONS = {
    "seq2seq": (ForCausalLMLoss, ForMaskedLMLoss),
    "causal LM": (ForCausalLMLoss, ForMaskedLMLoss),
    "masked LM": (ForCausalLMLoss, ForMaskedLMLoss),
    "classification": (ForSequenceClassificationLoss,),
    "one of several": (ForSequenceClassificationLoss,),
    "token classification": (ForTokenClassification,),
    "question answering": (ForQuestionAnsweringLoss,),
}
"""Functions that ``self.loss_function`` may be for each kind.

A subclass with a name that does not tell its kind gets `ForCausalLMLoss` from ``transformers``.
"""

OTHER_LOSSES = frozenset(
    "BrosForTokenClassification DeiTForImageClassificationWithTeacher DiaForConditionalGeneration GitForCausalLM "
    "LevitForImageClassificationWithTeacher LxmertForQuestionAnswering MusicgenForCausalLM MusicgenMelodyForCausalLM "
    "ShieldGemma2ForImageClassification VibeVoiceForConditionalGeneration".split()
)
"""Classes with another loss than their auto class tells."""


def head_of(model: nn.Module) -> Head:
    """Return the head of a model; raise ValueError if its loss is unknown."""
    base = unwrapped(model)
    kind = kind_of(base)
    calls = [call for call, _ in loss_calls(type(base))]
    if kind is None or class_names(base) & OTHER_LOSSES:
        known = False
    elif calls:
        known = base.loss_function in LOSS_FUNCTIONS[kind]
    elif kind in ("causal LM", "seq2seq"):  # a custom loss is known if it takes the labels unchanged
        source = "".join(map(_source, _forwards(type(base))))
        known = "CrossEntropyLoss(" in source and "shift_labels" not in source
    else:
        known = True
    if kind is None or not known:
        raise ValueError(
            f"{type(base).__name__}: its loss is unknown; known are those of {', '.join(MAPPINGS)}. "
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
    """Return whether the model's own loss is sum / ``num_items_in_batch`` if that is given.

    ``Trainer`` assumes so for every ``forward`` with ``**kwargs``, but hundreds of these ignore it.  Return False also
    in three cases in which it would be wrong.

    - Question answering has a count for each of its two terms.
    - Some classes decline it (``accepts_loss_kwargs``).
    - While ``config.problem_type`` is open, the labels may be numbers or several per example, whose losses ignore it.
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
    """Return the kind of loss of the nearest class that ``transformers`` knows, or None."""
    for cls in type(model).__mro__:
        for kind, mappings in MAPPINGS.items():
            for mapping in mappings:
                for names in getattr(auto, f"MODEL_FOR_{mapping}_MAPPING_NAMES").values():
                    if cls.__name__ == names or (isinstance(names, tuple | list) and cls.__name__ in names):
                        return kind
    return None


def loss_calls(cls: type) -> list[tuple[ast.Call, bool]]:
    """Return the calls of ``self.loss_function`` in ``forward``, and whether each gets ``num_items_in_batch``."""
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
    """Return whether a call inside a function gets the function's own ``num_items_in_batch`` or ``**kwargs``."""
    rest = function.args.kwarg and function.args.kwarg.arg
    for word in call.keywords:
        if word.arg == "num_items_in_batch" or (rest and word.arg is None and ast.unparse(word.value) == rest):
            return True
    return False


def _forwards(cls: type) -> Iterator[Callable]:
    """Yield a class's ``forward`` and, as long as each calls ``super().forward``, the called ones."""
    for owner in cls.__mro__:
        if "forward" in vars(owner):
            forward = inspect.unwrap(vars(owner)["forward"])
            yield forward
            if "super().forward(" not in _source(forward):
                return


def _source(function: Callable) -> str:
    """Return the source of a function, or an empty string if it has none."""
    try:
        return textwrap.dedent(inspect.getsource(function))
    except (OSError, TypeError):
        return ""
