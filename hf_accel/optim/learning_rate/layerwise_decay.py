"""Lower the learning rate of each block by its distance from the head.

Early layers of a pretrained model hold what most tasks have in common, and need small changes; the head is new.  In a
stack of L blocks, with d the distance of a parameter from the head,

    lr = peak * decay^d       d = 0 for the head, 1 for the last block, L for the first, L + 1 for the embeddings

Blocks are modules in lists that the model declares in ``_no_split_modules``; of nested lists, the inner ones count.
Lists inside one outer list (the stages of a ConvNeXt) are one stack, and layers between its blocks belong to the next
block.  Each other list is a stack of its own, counted from its own end: encoder and decoder, text and image tower.

Outside the stacks, embeddings are all parameters that the model registers before its first block or calls "embed".
They have d = L + 1 of the deepest stack.  The rest is the head, final norms and poolers included.  A head that shares
its weights with the embeddings has their rate.

Recommendation: Use LayerwiseDecay if you fine-tune a pretrained encoder for text or images on little data.
When to use: Full fine-tuning of pretrained encoders for text or images on little data; for images, 0.65 to 0.75 is
usual.
When not to use:
- Training from scratch.
- Adapters such as LoRA.
- Heads tied to the embeddings, which then hardly learn.
Differences from the paper: Distances are counted as in BEiT; in ELECTRA, the last block has d = 2.
References: Clark et al. (2020), ELECTRA, https://arxiv.org/abs/2003.10555, with decay 0.8 for Base and 0.9 for Large;
Bao et al. (2022), BEiT, https://arxiv.org/abs/2106.08254.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import annotated_types as at
from torch import nn

from hf_accel.surgery.blocks import stacks_of
from hf_accel.technique import Technique


def distances_from_head(model: Any) -> dict[str, int]:
    """Count the blocks between the head and each parameter, by name, its own block included."""
    stacks = stacks_of(model)
    head = model.get_output_embeddings()
    of_head = set() if head is None else {id(p) for p in head.parameters()}
    embeddings = max(map(len, stacks.values())) + 1
    distances, begun, last = {}, False, embeddings
    for name, parameter in model.named_parameters():
        stack = next((path for path in stacks if name.startswith(f"{path}.")), None)
        if stack is not None:
            last = distances[name] = _distance_within(stack, stacks[stack], name, last)
            begun = True
        elif begun and ("embed" not in name or id(parameter) in of_head):
            distances[name] = 0
        else:
            distances[name] = embeddings
    return distances


def _distance_within(stack: str, blocks: list[str], name: str, last: int) -> int:
    """Return the distance of a parameter; ``last``, that of the one before, if it has no block beside it."""
    item = name[: name.index(".", len(stack) + 1) + 1]
    inside = [i for i, block in enumerate(blocks) if name.startswith(f"{block}.")]
    beside = [i for i, block in enumerate(blocks) if f"{block}.".startswith(item)]
    return len(blocks) - (inside or beside)[0] if inside or beside else last


@dataclass(eq=False)
class LayerwiseDecay(Technique):
    """Multiply the learning rate of each parameter by ``decay`` to the power of its distance from the head.

    Args:
        decay: Learning rate of a block as a share of that of the next one, in (0, 1].
    """

    decay: Annotated[float, at.Interval(gt=0, le=1)] = 0.8  # ELECTRA-Base
    neutral: ClassVar = {"decay": 1.0}
    distances_ = None

    def parameter_rules(self, name: str, parameter: nn.Parameter) -> Mapping[str, Any]:
        """Return the factor of a parameter."""
        assert self.run_ is not None
        if self.distances_ is None:
            try:
                self.distances_ = distances_from_head(self.run_.model)
            except ValueError as error:
                raise ValueError(f"{self!r}: {error}") from None
        return {"lr": self.decay ** self.distances_[name]}

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        super().on_train_begin(args, state, control, **kwargs)
        self.furthest_ = max(distances_from_head(model).values())
        self.distances_ = None  # the next run may train another model

    def report(self) -> Mapping[str, Any]:
        """Report the rate of the embeddings, as a share of the peak learning rate."""
        return {"lowest_rate": self.decay**self.furthest_}

    def took_effect(self, report: Mapping[str, Any]) -> bool:
        return report["lowest_rate"] < 1
