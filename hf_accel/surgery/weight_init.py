"""Base class of techniques that give a model its first values."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import nn

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
