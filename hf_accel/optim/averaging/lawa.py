"""Latest weight averaging (LAWA): evaluate, save and return the mean of the latest few snapshots of the weights.

At each share ``every`` of the budget the weights are copied; of the copies, the latest ``num_snapshots`` are kept:

    e = (w_t + w_(t-1) + ... + w_(t-k+1)) / k        k = num_snapshots, or fewer while there are fewer

Training itself never sees e.  The mean has a window with an end where an exponential moving average has a tail, so
that weights of the distant past, when the loss was much higher, are out of it altogether.

At a learning rate that still makes progress, the mean is where the weights would come to if the rate were decayed now.
So a target is reached earlier, by about 12 % of GPU hours over the workloads of AlgoPerf (1).

The snapshots lie in the memory of the run, sharded as the weights are, in their dtype; the accelerator needs no memory
for them, except for the mean while it is evaluated or saved.  Checkpoints hold all of them.

Reference: (1) Ajroldi, Orvieto, Geiping (2025), When, Where and Why to Average Weights?,
https://arxiv.org/abs/2502.06761; (2) Kaddour (2022), Stop Wasting My Time! Saving Days of ImageNet and BERT Training
with Latest Weight Averaging, https://arxiv.org/abs/2209.14981.  Departures: snapshots are taken at shares of the
budget, where (2) takes one an epoch.  Statistics of batch normalization are computed anew for the mean, from up to
1,024 training examples before each evaluation and checkpoint (``batch norm`` in the receipt).

When to use: a learning rate that stays high, or a run that may be stopped at any time; evaluations that choose a
checkpoint or end a run; an accelerator without room for another copy of the weights.
When not to use: a learning rate that decays to zero, which leaves little to gain; host memory or disks that have no
room for ``num_snapshots`` copies of the weights (`ExponentialMovingAverage` needs one).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar

import annotated_types as at
import torch
from torch import Tensor

from hf_accel.clock import passes
from hf_accel.technique import Technique
from hf_accel.weights import gather, local_parameters, scatter


def mean(tensors: list[Tensor]) -> Tensor:
    """The mean of tensors of one dtype, in this dtype; computed in at least float32."""
    dtype = torch.promote_types(tensors[0].dtype, torch.float32)
    return torch.stack([tensor.to(dtype) for tensor in tensors]).mean(0).to(tensors[0].dtype)


@dataclass(eq=False)
class LatestWeightAveraging(Technique):
    """Evaluates, saves and returns the mean of the latest snapshots of the weights.

    It covers the parameters that are trainable when training starts.

    Args:
        num_snapshots: Snapshots that are averaged, above 0; (2) takes 6.
        every: Share of the budget between two snapshots, in (0, 1]; with ``num_snapshots``, a window of 1 % of the
            run, which is best over the workloads of AlgoPerf (1).
    """

    num_snapshots: Annotated[int, at.Gt(0)] = 5
    every: Annotated[float, at.Interval(gt=0, le=1)] = 0.002

    fidelity: ClassVar = "lossy"

    neutral: ClassVar = {"num_snapshots": 1, "every": 1e-9}
    """The mean of the weights of the last step alone."""

    variations: ClassVar = {"every": 0.1}
    claims: ClassVar = frozenset({"early_weights"})

    snapshots_ = list[dict[str, Tensor]]()

    def on_train_begin(self, args, state, control, **kwargs):
        super().on_train_begin(args, state, control, **kwargs)
        self.model_, self.taken_, self.snapshots_ = kwargs["model"], 0, []
        self.names_, self.progress_ = list(local_parameters(self.model_)), self.progress(state)

    def on_step_end(self, args, state, control, **kwargs):
        before, self.progress_ = self.progress_, self.progress(state)
        if not passes(before, self.progress_, self.every):
            return
        # All parameters: what was frozen after the start is still averaged.
        weights = local_parameters(self.model_, trainable_only=False)
        self.snapshots_.append({name: weights[name].to("cpu", copy=True) for name in self.names_})
        del self.snapshots_[: -self.num_snapshots]
        self.taken_ += 1

    def averaging(self) -> dict[str, Tensor] | None:
        """The mean, on the device of the weights."""
        if not self.snapshots_:
            return None
        weights = local_parameters(self.model_, trainable_only=False)
        return {
            name: mean([snapshot[name] for snapshot in self.snapshots_]).to(weights[name].device)
            for name in self.snapshots_[0]
        }

    def state_dict(self, scope):
        """``global``: full snapshots, of which ranks other than 0 have none, and how many were taken."""
        if scope == "rank":
            return {}
        return {"snapshots": [gather(self.model_, snapshot) for snapshot in self.snapshots_], "taken": self.taken_}

    def load_state_dict(self, scope, state):
        if scope == "global":
            parts = [scatter(self.model_, snapshot) for snapshot in state["snapshots"]]
            self.snapshots_ = [{name: part.cpu() for name, part in snapshot.items()} for snapshot in parts]
            self.names_ = list(self.snapshots_[0]) if self.snapshots_ else self.names_
            self.taken_ = state["taken"]

    def report(self):
        """How many snapshots were taken, and how many the mean is of."""
        return {"snapshots": self.taken_, "averaged": len(self.snapshots_)}

    def took_effect(self, report):
        return report["averaged"] > 0
