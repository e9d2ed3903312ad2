"""Hold everything that depends on transformers: its signatures, its arguments, and the refused settings."""

from hf_accel.host.arguments import (
    REFUSED,
    REINTERPRETED,
    accelerator_differs,
    arguments_kind,
    nominal_steps,
    non_default_arguments,
    recorded_arguments,
    replace_arguments,
    treatment,
    with_accumulation_steps,
)
from hf_accel.host.model_card import extend_model_card
from hf_accel.host.refusals import (
    NEEDS_EXAMPLE_LOSSES,
    refuse_absolute_warmup,
    refuse_overrides,
    refuse_own_losses,
    refuse_quantized,
    refuse_schedules,
    refuse_stream_arguments,
    refuse_stream_hosts,
    refuse_two_budgets,
    refuse_two_optimizers,
    refuse_uncounted,
    refuse_unknown_epochs,
)
from hf_accel.host.signatures import RELIED_ON, TESTED, check_signatures

__all__ = [
    "NEEDS_EXAMPLE_LOSSES",
    "REFUSED",
    "REINTERPRETED",
    "RELIED_ON",
    "TESTED",
    "accelerator_differs",
    "arguments_kind",
    "check_signatures",
    "extend_model_card",
    "nominal_steps",
    "non_default_arguments",
    "recorded_arguments",
    "refuse_absolute_warmup",
    "refuse_overrides",
    "refuse_own_losses",
    "refuse_quantized",
    "refuse_schedules",
    "refuse_stream_arguments",
    "refuse_stream_hosts",
    "refuse_two_budgets",
    "refuse_two_optimizers",
    "refuse_uncounted",
    "refuse_unknown_epochs",
    "replace_arguments",
    "treatment",
    "with_accumulation_steps",
]
