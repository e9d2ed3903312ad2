"""What techniques that give a model its first values have in common."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import nn

from hf_accel.technique import Technique


@dataclass(eq=False)
class WeightInit(Technique):
    """Writes weights before training; alone, and into a model that is whole and that nobody has trained."""

    claims: ClassVar = frozenset({"initial_weights"})

    def prepare_model(self, model: nn.Module) -> nn.Module:
        """The model with its first values; resumed runs load theirs afterwards."""
        if name := getattr(model, "name_or_path", ""):
            raise ValueError(
                f"{self!r}: the model comes from {name!r}, and its weights would be lost. Make it from a "
                "configuration, or leave the technique out."
            )
        if any(hasattr(parameter, "ds_id") for parameter in model.parameters()):
            raise ValueError(
                f"{self!r}: ZeRO-3 has cut the model's weights already. Make the model before TrainingArguments."
            )
        try:
            self.write(model)
        except ValueError as error:
            raise ValueError(f"{self!r}: {error}") from None
        return model

    def write(self, model: Any) -> None:
        """Give the model its first values, in place; ValueError where this cannot be done."""
        raise NotImplementedError


def refuse_adapters(technique: Technique, model: Any) -> None:
    """Raise ValueError where adapters were put on top of the first values, which are then neither trained nor saved."""
    if hasattr(model, "peft_config"):
        raise ValueError(
            f"{technique!r}: adapters are trained and saved without the model under them, whose values are new. Leave "
            "one of the two out."
        )
