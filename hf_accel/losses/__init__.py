"""Compute the loss of each item and of each example, for the kinds of loss of ``transformers`` models."""

from hf_accel.losses.given import FunctionHead, head_from
from hf_accel.losses.heads import (
    ADDED_TERMS,
    IGNORED,
    OTHER_DECODER_INPUTS,
    ClassHead,
    ExampleLosses,
    ExampleLossFunc,
    Head,
    SpanHead,
    TokenHead,
    examples_of,
    weighted_mean,
    widest,
)
from hf_accel.losses.inspection import (
    LOSS_FUNCTIONS,
    MAPPINGS,
    OTHER_LOSSES,
    head_of,
    honors_num_items,
    kind_of,
    loss_calls,
)
from hf_accel.losses.proof import compare_losses, error_of_mean, is_divided_by, sizes_of_mean

__all__ = [
    "ADDED_TERMS",
    "IGNORED",
    "LOSS_FUNCTIONS",
    "MAPPINGS",
    "OTHER_DECODER_INPUTS",
    "OTHER_LOSSES",
    "ClassHead",
    "ExampleLossFunc",
    "ExampleLosses",
    "FunctionHead",
    "Head",
    "SpanHead",
    "TokenHead",
    "compare_losses",
    "error_of_mean",
    "examples_of",
    "head_from",
    "head_of",
    "honors_num_items",
    "is_divided_by",
    "kind_of",
    "loss_calls",
    "sizes_of_mean",
    "weighted_mean",
    "widest",
]
