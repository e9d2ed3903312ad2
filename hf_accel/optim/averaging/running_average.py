"""What techniques share that keep one average of the weights beside them and move it as training goes on."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from hf_accel.technique import Technique
from hf_accel.weights import gather, local_parameters, scatter

Tensors = Mapping[str, Tensor]


def at_least_float32(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Copies; in float32 where they are in fp16 or bf16, whose 8 to 11 bits are too few for small changes."""
    return {
        name: tensor.to(torch.promote_types(tensor.dtype, torch.float32), copy=True) for name, tensor in tensors.items()
    }


def move(update: Callable[..., None], averages: Tensors, weights: Tensors, updates: int | None = None) -> None:
    """Call ``update(averages, weights, updates)`` on lists, for all tensors at once where the dtypes are the same, and
    one by one where each weight is converted first."""
    alike = [name for name, average in averages.items() if weights[name].dtype == average.dtype]
    if alike:
        update([averages[name] for name in alike], [weights[name] for name in alike], updates)
    for name in averages.keys() - set(alike):
        update([averages[name]], [weights[name].to(averages[name].dtype)], updates)


@dataclass(eq=False)
class RunningAverage(Technique):
    """Evaluates, saves and returns ``averages_``, of the parameters that are trainable when training starts.

    A subclass fills them and moves them, and counts this in ``updates_``.
    """

    fidelity: ClassVar = "lossy"

    averages_ = dict[str, Tensor]()

    def on_train_begin(self, args, state, control, **kwargs):
        super().on_train_begin(args, state, control, **kwargs)
        self.model_, self.updates_, self.averages_ = kwargs["model"], 0, {}
        self.names_ = list(local_parameters(self.model_))

    def weights(self) -> dict[str, Tensor]:
        """The weights as they are now: also those that were frozen since the start."""
        weights = local_parameters(self.model_, trainable_only=False)
        return {name: weights[name] for name in self.names_}

    def averaging(self) -> dict[str, Tensor] | None:
        """The averages themselves, or copies of them where the weights have another dtype."""
        if not self.averages_:
            return None
        weights = self.weights()
        return {name: average.to(weights[name].dtype) for name, average in self.averages_.items()}

    def state_dict(self, scope):
        """``global``: full averages, of which ranks other than 0 have none, and how often they were moved."""
        if scope == "rank":
            return {}
        return {"averages": gather(self.model_, self.averages_), "updates": self.updates_}

    def load_state_dict(self, scope, state):
        if scope == "global":
            self.averages_ = scatter(self.model_, state["averages"])
            self.names_ = list(self.averages_) or self.names_
            self.updates_ = state["updates"]

    def report(self):
        return {"updates": self.updates_}

    def took_effect(self, report):
        return report["updates"] > 0
