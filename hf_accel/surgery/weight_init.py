"""Base classes of techniques that give a model its first values."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import nn

from hf_accel.surgery.dimensions import Sizes, axes_of, sizes_of
from hf_accel.surgery.source_checkpoint import check_alike, load_donor
from hf_accel.technique import Technique


@dataclass(eq=False)
class WeightInit(Technique):
    """Write weights before training, into a whole model that was not loaded from anywhere."""

    claims: ClassVar = frozenset({"initial_weights"})

    def prepare_model(self, model: nn.Module) -> nn.Module:
        """Write the first values; resumed runs load theirs afterward."""
        if name := getattr(model, "name_or_path", ""):
            raise ValueError(
                f"{self!r}: the weights of the model from {name!r} would be lost. Make the model from a configuration, "
                f"or remove {type(self).__name__}."
            )
        if any(hasattr(parameter, "ds_id") for parameter in model.parameters()):
            raise ValueError(
                f"{self!r}: ZeRO-3 has partitioned the model's weights already. Make the model before "
                "TrainingArguments."
            )
        try:
            self.write(model)
        except ValueError as error:
            raise ValueError(f"{self!r}: {error}") from None
        return model

    def write(self, model: Any) -> None:
        """Give the model its first values, in place, or raise ValueError."""
        raise NotImplementedError


@dataclass(eq=False)
class CheckpointInit(WeightInit):
    """Write weights from a checkpoint of another size; the base class of techniques that resize models."""

    checkpoint: str | None = None
    expected_failed_checks: ClassVar = {
        "check_tied_head": "refused: the checkpoint must be tied where the model is, and that of the contract is not"
    }
    variations: ClassVar = {"checkpoint": "hf_accel.testing:tiny_teacher"}
    claims: ClassVar = frozenset({"initial_blocks", "initial_weights", "pretrained_weights"})

    def compared(self, model: Any, *, grows: bool) -> tuple[Any, Collection[str], Sizes, Sizes, tuple[int, int]]:
        """Return the checkpoint's model, what it lacks, and sizes and depths of both; raise if it has a wrong size."""
        self.written_ = 0
        axes_of(model)
        donor, lacking = load_donor(self, self.checkpoint, model)
        check_alike(model, donor)
        old, new = sizes_of(donor.config), sizes_of(model.config)
        depths = donor.config.num_hidden_layers, model.config.num_hidden_layers
        for name, before, after in [*zip(Sizes._fields, old, new, strict=True), ("number of blocks", *depths)]:
            if (after < before) if grows else (after > before):
                size, other = ("smaller", "ShrinkFrom") if grows else ("larger", "ExpandFrom")
                raise ValueError(
                    f"its {name} is {after}, and the checkpoint's {before}. Set a {size} checkpoint, or use {other}."
                )
        return donor, lacking, old, new, depths

    def report(self) -> Mapping[str, Any]:
        """Report the number of written parameters."""
        return {"parameters": self.written_}

    def took_effect(self, report: Mapping[str, Any]) -> bool:
        return report["parameters"] > 0
