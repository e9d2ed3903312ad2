"""Maximal update parametrization (muP): a learning rate that was tuned on a narrow model fits a wide one.

With one rate for all parameters, Adam's steps change what a layer gives the more, the wider it is, and the best rate
falls with the width.  For a model that is m = width / ``base_width`` times as wide as the one that was tuned,

    parameter                            initial values    learning rate
    matrices within the width            x m^(-1/2)        x 1/m
    head, with its own matrix            x 1/m             x 1/m
    norm before a head that is tied      x 1/m             x 1/m
    embeddings, biases, other norms      x 1               x 1

so that in every layer the change of a step is of the same size at any width.  Matrices whose rate is divided have their
weight decay multiplied, for AdamW multiplies the one by the other.  A head that shares its matrix with the embeddings
needs a factor 1/m on the logits: the scale (and shift) of the norm before it is that factor.  There is no multiplier
beside the weights, and what is saved is an ordinary checkpoint.

Reference: Yang et al. (2022), Tensor Programs V, https://arxiv.org/abs/2203.03466, table 3 (table 8 where the head is
tied, with its multiplier in the norm); weight decay as in its code, https://github.com/microsoft/mup.  Departure:
attention keeps the factor of the architecture, which is right where the size of heads is kept and their number grows.

When to use: pre-training of Llama, Mistral, Qwen, GPT-2, BERT or RoBERTa from random weights, with the learning rate
that was best for a narrow model of the same depth, size of heads, batch and length of training, whose heads and MLP are
in the same proportion to its width.
When not to use: pretrained models; optimizers other than Adam and its kin, such as SGD, `Muon`, `LAMB` and `LARS`,
whose steps follow the width by other rules; to carry anything but the learning rate over, or it to another depth.
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

from hf_accel.model.initialization.weight_init import WeightInit, refuse_adapters
from hf_accel.surgery.dimensions import Axis, axes_of

logger = logging.get_logger(__name__)

LIKE_ADAM = ("adam", "ademamix", "lion")
"""Parts of the names of optimizers whose steps have the size of the learning rate in every element."""


class Factors(NamedTuple):
    """What a parameter's first values and its learning rate are multiplied by."""

    values: float = 1.0
    lr: float = 1.0


def factors_of(axes: tuple[Axis, ...], m: float) -> Factors:
    """Those of a parameter in a model that is ``m`` times as wide."""
    if not any(axis.reads for axis in axes):
        return Factors()
    within = len(axes) == 2 and all(axis.dimension is not None for axis in axes)
    return Factors(m**-0.5 if within else 1 / m, 1 / m)


@dataclass(eq=False)
class MuParametrization(WeightInit):
    """Starts and trains so that the learning rate of a narrower model fits.

    Args:
        base_width: Width, of the residual stream, of the model that the learning rate was tuned on.
    """

    base_width: Annotated[int, at.Ge(1)] = 256  # Tensor Programs V: of what tuned GPT-3 6.7B
    probe_fields: ClassVar = {"base_width": 4}
    claims: ClassVar = frozenset({"initial_weights", "pretrained_weights"})

    def write(self, model: Any) -> None:
        assert self.run_ is not None
        optim = OptimizerNames(self.run_.args.optim).value
        if not any(part in optim for part in LIKE_ADAM):
            raise ValueError(f"args.optim={optim!r} is not like Adam, which the rates are for. Set 'adamw_torch'.")
        axes_by_name = axes_of(model)
        self.width_ = model.config.hidden_size
        m = self.width_ / self.base_width
        self.factors_ = {name: factors_of(axes, m) for name, axes in axes_by_name.items()}
        with torch.no_grad():
            for name, factors in self.factors_.items():
                model.get_parameter(name).mul_(factors.values)

    def parameter_rules(self, name: str, parameter: nn.Parameter) -> Mapping[str, Any]:
        """The factor of the learning rate, and its inverse for the weight decay; of what lies beside a layer's weight
        and is no part of its state, as the weight has them."""
        weight = f"{name.rpartition('.')[0]}.weight"
        lr = self.factors_.get(name, self.factors_.get(weight, Factors())).lr
        return {"lr": lr, "weight_decay": 1 / lr}

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        super().on_train_begin(args, state, control, **kwargs)
        refuse_adapters(self, model)
        assert self.run_ is not None
        if (owner := self.run_.owner("optimizer")) is not None:
            logger.warning(f"{self!r}: its rates are for optimizers like Adam. See that {owner!r} is one.")

    def report(self) -> Mapping[str, Any]:
        """How many times as wide the model is, and how many of its parameters have another learning rate."""
        changed = sum(factors.lr != 1 for factors in self.factors_.values())
        return {"width": self.width_ / self.base_width, "parameters": changed}

    def took_effect(self, report: Mapping[str, Any]) -> bool:
        return report["parameters"] > 0
