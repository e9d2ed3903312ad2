"""Scale initial values and learning rates so that a rate tuned on a narrow model fits a wide one (muP).

With one rate for all parameters, Adam's steps change the output of wider layers more.  So the best rate falls with the
width.  For a model that is m = width / ``base_width`` times as wide as the tuned one,

    parameter                            initial values    learning rate
    matrices within the width            x m^(-1/2)        x 1/m
    head, with its own matrix            x 1/m             x 1/m
    norm before a head that is tied      x 1/m             x 1/m
    embeddings, biases, other norms      x 1               x 1

the change of a step has the same size in every layer at any width.  Weight decay is multiplied if the rate is divided,
because AdamW multiplies the two.  A head that shares its matrix with the embeddings needs a factor 1/m on the logits.
The scale (and shift) of the norm before it is that factor.  No multiplier exists beside the weights, so the checkpoint
is an ordinary one.

Recommendation: Use MuParametrization if you tuned the learning rate on a narrower model of the same shape.
When to use: Pre-training of Llama, Mistral, Qwen, GPT-2, BERT or RoBERTa from random weights, with the best learning
rate of a narrow model.  Both need the same depth, head size, batch and length of training, and the same proportions of
heads and MLP to the width.
When not to use: Pretrained models.  Optimizers unlike Adam, such as SGD, `Muon`, `LAMB` and `LARS`, because their steps
follow the width by other rules.  Carrying over anything except the learning rate, or to another depth.
Defaults: ``base_width`` is the width of the model that tuned GPT-3 6.7B in Tensor Programs V.
Differences from the paper: Attention keeps the factor of the architecture.  That is right if the size of heads stays
and their number grows.
References: Yang et al. (2022), Tensor Programs V, https://arxiv.org/abs/2203.03466, table 3 (table 8 for a tied head,
with its multiplier in the norm); weight decay as in its code, https://github.com/microsoft/mup.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, NamedTuple

import annotated_types as at
import torch
from torch import nn
from transformers.training_args import OptimizerNames
from transformers.utils import logging

from hf_accel.surgery.dimensions import Axis, axes_of
from hf_accel.surgery.weight_init import WeightInit

logger = logging.get_logger(__name__)

LIKE_ADAM = ("adam", "ademamix", "lion")
"""Parts of the names of optimizers with steps of the size of the learning rate in every element."""


class Factors(NamedTuple):
    """Factors on a parameter's initial values and on its learning rate."""

    values: float = 1.0
    lr: float = 1.0


def factors_of(axes: tuple[Axis, ...], m: float) -> Factors:
    """Return the factors of a parameter in a model that is ``m`` times as wide."""
    if not any(axis.reads for axis in axes):
        return Factors()
    within = len(axes) == 2 and all(axis.dimension is not None for axis in axes)
    return Factors(m**-0.5 if within else 1 / m, 1 / m)


@dataclass(eq=False)
class MuParametrization(WeightInit):
    """Start and train so that the learning rate of a narrower model fits.

    Args:
        base_width: Width of the residual stream, at least 1, of the model used to tune the learning rate.
    """

    base_width: Annotated[int, at.Ge(1)] = 256
    probe_fields: ClassVar = {"base_width": 4}
    claims: ClassVar = frozenset({"initial_weights", "pretrained_weights"})

    def write(self, model: Any) -> None:
        assert self.run_ is not None
        optim = OptimizerNames(self.run_.args.optim).value
        if not any(part in optim for part in LIKE_ADAM):
            raise ValueError(f"its rates need an optimizer like Adam, not optim={optim!r}. Set optim='adamw_torch'.")
        axes_by_name = axes_of(model)
        self.width_ = model.config.hidden_size
        m = self.width_ / self.base_width
        self.factors_ = {name: factors_of(axes, m) for name, axes in axes_by_name.items()}
        with torch.no_grad():
            for name, factors in self.factors_.items():
                model.get_parameter(name).mul_(factors.values)

    def parameter_rules(self, name: str, parameter: nn.Parameter) -> Mapping[str, Any]:
        """Return the factor on the learning rate, and its inverse for the weight decay.

        Parameters beside a layer's weight that are not part of its state have those of the weight.
        """
        weight = f"{name.rpartition('.')[0]}.weight"
        lr = self.factors_.get(name, self.factors_.get(weight, Factors())).lr
        return {"lr": lr, "weight_decay": 1 / lr}

    def on_train_begin(self, args, state, control, **kwargs):
        super().on_train_begin(args, state, control, **kwargs)
        assert self.run_ is not None
        if (owner := self.run_.owner("optimizer")) is not None:
            logger.warning(f"{self!r}: its rates need an optimizer like Adam. Check that {owner!r} is one.")

    def report(self) -> Mapping[str, Any]:
        """Report the relative width, and the number of parameters with another learning rate."""
        changed = sum(factors.lr != 1 for factors in self.factors_.values())
        return {"width": self.width_ / self.base_width, "parameters": changed}

    def took_effect(self, report: Mapping[str, Any]) -> bool:
        return report["parameters"] > 0
