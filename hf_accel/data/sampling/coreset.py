"""Train on examples that are spread over the whole data set, and drop those close to one of them.

Fewer examples make a shorter epoch.  Each example is a point: the mean of the model's last hidden states over its
positions, or a column of the training set.  The first center is the point closest to the mean of all.  Then,

    the next center  =  argmax_i  min_{c in centers} || x_i - x_c ||          until round(keep * N) are found

Any two centers are then at least as far apart as any point is from its nearest center.

Recommendation: Use Coreset if your data is redundant and your pretrained model tells examples apart.
When to use: Redundant data and a pretrained model with hidden states that tell examples apart; many runs on the same
choice.
When not to use:
- Models that have not learned anything yet.
- Noisy data, because outliers are chosen first.
- A tight budget: it costs a forward pass of the whole set and keep * N^2 distances, a minute or two for 100,000
  examples on a GPU.
Differences from the paper: None.
References: Sener and Savarese (2018), Active Learning for Convolutional Neural Networks: A Core-Set Approach,
https://arxiv.org/abs/1708.00489; the greedy choice, at most twice as far from its points as the best one: Gonzalez
(1985), https://doi.org/10.1016/0304-3975(85)90224-5.
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
from hf_accel.features.choices import folded
from hf_accel.features.columns import column
from hf_accel.features.scores import WHOLE_WEIGHTS, head_for, score_examples
from hf_accel.features.static_subset import StaticSubset
from hf_accel.losses import Head


def k_center(points_ND: Tensor, num_centers: int, quiet: bool = True) -> Tensor:
    """Choose points, each the farthest from those before; return their ids in the order of choice."""
    nearest_N = torch.full((len(points_ND),), torch.inf, dtype=points_ND.dtype, device=points_ND.device)
    center = (points_ND - points_ND.mean(0)).square().sum(1).argmin()
    centers = [center]
    for _ in trange(num_centers - 1, desc="Coreset", disable=quiet):
        nearest_N = nearest_N.minimum((points_ND - points_ND[center]).square().sum(1))
        nearest_N[center] = -1  # no point twice, even if others lie at the same place
        center = nearest_N.argmax()
        centers.append(center)
    return torch.stack(centers).cpu()


@dataclass(eq=False)
class Coreset(StaticSubset):
    """Train on the centers of a greedy k-center clustering.

    Args:
        keep: Share of the examples to train on, in (0, 1].
        column: Column of the training set with each example's point, a number or a list of numbers; None: the model's
            last hidden states.
    """

    keep: Annotated[float, at.Interval(gt=0, le=1)] = 0.5  # not taken from a paper
    column: str | None = None
    fidelity: ClassVar = "lossy"
    neutral: ClassVar = {"keep": 1.0}
    refused_backends: ClassVar = WHOLE_WEIGHTS
    variations: ClassVar = {"column": "score"}

    def choose(self, dataset: Any) -> Tensor:
        """Choose the centers."""
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
                    f"{self!r} does not support the column {self.column!r} because its values are not numbers or lists "
                    "of equally many numbers. Set column= to another one."
                ) from None
        if not_finite := int((~points_ND.isfinite()).any(1).sum()):
            raise ValueError(f"{self!r}: {not_finite} of {len(dataset)} points are not finite. Correct or remove them.")
        num_centers = max(round(self.keep * len(dataset)), 1)
        quiet = run.args.disable_tqdm or not run.is_world_process_zero()
        return k_center(points_ND.to(run.args.device), num_centers, quiet).sort().values

    def _embed(self, head: Head, inputs: Mapping[str, Tensor], num_examples: int) -> Tensor:
        """Average the last hidden states over each example's positions, (B, D)."""
        model: Any = unwrapped(self.run_.model)
        if not isinstance(model, PreTrainedModel):
            raise ValueError(
                f"{self!r} does not support {type(model).__name__} because it is not a transformers model. Set column=."
            )
        inputs = folded(inputs)
        outputs = model.base_model(**head.without_labels(model, inputs))
        states = outputs.get("encoder_last_hidden_state", outputs.get("last_hidden_state"))
        if states is None:
            raise ValueError(
                f"{self!r} does not support {type(model).__name__} because it has no last hidden state. Set column=."
            )
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
