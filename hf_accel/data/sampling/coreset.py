"""Coreset: train on examples that lie spread over the whole data set, and leave out those close to one of them.

Fewer examples make a shorter epoch.  Each example is a point: the mean of the model's last hidden states over its
positions, or a column of the training set.  The first center is the point closest to the mean of all; then, one by one,

    the next center  =  argmax_i  min_{c in centers} || x_i - x_c ||          until round(keep * N) are found

Any two of the centers are then at least as far apart as any point is from the nearest center.

Reference: Sener and Savarese (2018), Active Learning for Convolutional Neural Networks: A Core-Set Approach,
https://arxiv.org/abs/1708.00489; the greedy choice is that of Gonzalez (1985),
https://doi.org/10.1016/0304-3975(85)90224-5, at most twice as far from its points as the best one.

When to use: pretrained models, whose hidden states tell examples apart; redundant data; the same choice for many runs.
When not to use: models that have learned nothing; noisy data, whose outliers are the first to be chosen.  It costs a
forward pass of the whole set and keep * N^2 distances, a minute or two for 100,000 examples on a GPU.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import annotated_types as at
import torch
from torch import Tensor
from tqdm.auto import trange
from transformers import PreTrainedModel

from hf_accel.adapters import unwrapped
from hf_accel.data.sampling.static_subset import StaticSubset
from hf_accel.features.choices import folded
from hf_accel.features.columns import column
from hf_accel.features.scores import WHOLE_WEIGHTS, head_for, score_examples
from hf_accel.losses import Head


def k_center(points_ND: Tensor, num_centers: int, quiet: bool = True) -> Tensor:
    """Ids, in the order of choice, of points of which each is the farthest from those before."""
    nearest_N = torch.full((len(points_ND),), torch.inf, dtype=points_ND.dtype, device=points_ND.device)
    center = (points_ND - points_ND.mean(0)).square().sum(1).argmin()
    centers = [center]
    for _ in trange(num_centers - 1, desc="Coreset", disable=quiet):
        nearest_N = nearest_N.minimum((points_ND - points_ND[center]).square().sum(1))
        nearest_N[center] = -1  # not once more, although others may lie at the same place
        center = nearest_N.argmax()
        centers.append(center)
    return torch.stack(centers).cpu()


@dataclass(eq=False)
class Coreset(StaticSubset):
    """Trains on the centers of a greedy k-center clustering.

    Args:
        keep: Share of the examples that is trained on, in (0, 1].
        column: The column of the training set with each example's point, a list of numbers or one; None: the model's
            last hidden states.
    """

    keep: Annotated[float, at.Interval(gt=0, le=1)] = 0.5
    column: str | None = None
    fidelity: ClassVar = "lossy"
    neutral: ClassVar = {"keep": 1.0}
    refused_backends: ClassVar = WHOLE_WEIGHTS
    variations: ClassVar = {"column": "score"}

    def choose(self, dataset: Any) -> Tensor:
        """The centers."""
        run: Any = self.run_
        if self.keep == 1:
            return torch.arange(len(dataset))
        if self.column is None:
            points_ND = score_examples(self, dataset, functools.partial(self._embed, head_for(self)))
        else:
            points = column(dataset, self.column, self)
            try:
                points_ND = torch.tensor(points, dtype=torch.float32).reshape(len(dataset), -1)
            except (TypeError, ValueError):
                raise ValueError(
                    f"{self!r}: the column {self.column!r} holds no points, numbers or lists of so many numbers. "
                    "Name one that does."
                ) from None
        if not_finite := int((~points_ND.isfinite()).any(1).sum()):
            raise ValueError(f"{self!r}: {not_finite} of {len(dataset)} points are not finite. Give numbers.")
        num_centers = max(round(self.keep * len(dataset)), 1)
        quiet = run.args.disable_tqdm or not run.is_world_process_zero()
        return k_center(points_ND.to(run.args.device), num_centers, quiet).sort().values

    def _embed(self, head: Head, inputs: Mapping[str, Tensor], num_examples: int) -> Tensor:
        """The mean of the last hidden states over an example's positions, (B, D)."""
        model: Any = unwrapped(self.run_.model)
        if not isinstance(model, PreTrainedModel):
            raise ValueError(f"{self!r}: {type(model).__name__} is not a model of transformers. Give column=.")
        inputs = folded(inputs)
        outputs = model.base_model(**head.without_labels(model, inputs))
        states = outputs.get("encoder_last_hidden_state", outputs.get("last_hidden_state"))
        if states is None:
            raise ValueError(f"{self!r}: {type(model).__name__} gives no last hidden state. Give a column of points.")
        if states.dim() == 4:  # feature maps
            return states.float().mean((2, 3))
        mask_BL = inputs.get("attention_mask")
        if mask_BL is None or mask_BL.shape != states.shape[:2]:
            means_RD = states.float().mean(1)
        else:
            weights_BL = mask_BL.float()
            sums_RD = torch.einsum("bld,bl->bd", states.float(), weights_BL)
            means_RD = sums_RD / weights_BL.sum(1, keepdim=True).clamp(min=1)
        return means_RD.unflatten(0, (num_examples, -1)).mean(1)
