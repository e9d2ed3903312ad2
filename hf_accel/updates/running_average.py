"""Keep one average of the weights beside them, and update it during training."""

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
    """Copy tensors; fp16 and bf16 become float32, because 8 to 11 bits are too few for small changes."""
    return {
        name: tensor.to(torch.promote_types(tensor.dtype, torch.float32), copy=True) for name, tensor in tensors.items()
    }


def move(update: Callable[..., None], averages: Tensors, weights: Tensors, updates: int | None = None) -> None:
    """Call ``update(averages, weights, updates)`` on lists of tensors.

    One call updates all averages that have the dtype of their weight.  Others are updated one by one, so that only one
    converted weight exists at a time.
    """
    alike = [name for name, average in averages.items() if weights[name].dtype == average.dtype]
    if alike:
        update([averages[name] for name in alike], [weights[name] for name in alike], updates)
    for name in averages.keys() - set(alike):
        update([averages[name]], [weights[name].to(averages[name].dtype)], updates)


@dataclass(eq=False)
class RunningAverage(Technique):
    """Evaluate, save and return ``averages_``, which cover the parameters that are trainable when training starts.

    A subclass creates and updates them, and counts the updates in ``updates_``.
    """

    fidelity: ClassVar = "lossy"

    averages_ = dict[str, Tensor]()

    def on_train_begin(self, args, state, control, **kwargs):
        super().on_train_begin(args, state, control, **kwargs)
        self.model_, self.updates_, self.averages_ = kwargs["model"], 0, {}
        self.names_ = list(local_parameters(self.model_))

    def weights(self) -> dict[str, Tensor]:
        """Return the current weights, including those frozen since the start."""
        weights = local_parameters(self.model_, trainable_only=False)
        return {name: weights[name] for name in self.names_}

    def averaging(self) -> dict[str, Tensor] | None:
        """Return the averages, converted to the dtype of the weights, or None before there are any."""
        if not self.averages_:
            return None
        weights = self.weights()
        return {name: average.to(weights[name].dtype) for name, average in self.averages_.items()}

    def state_dict(self, scope):
        """Save the full averages (on rank 0 only) and the number of updates, both with scope ``global``."""
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
