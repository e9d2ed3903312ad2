"""Training in rounds: each rank takes steps of its own, and every few steps all meet.

What every technique of this kind has to mind is here.  Between two meetings the ranks' weights differ, so evaluations
and checkpoints that fall due are moved to the next meeting, and the run ends with one.  Each rank's optimizer has a
state of its own, of which Trainer would keep that of the first rank only.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

import annotated_types as at
import torch.distributed as dist
from torch import Tensor

from hf_accel.technique import State, Technique
from hf_accel.weights import buffers, local_parameters

MOVED = ("should_evaluate", "should_save")
"""What Trainer asks for after a step, and what has to wait for a meeting."""


@dataclass(eq=False)
class Rounds(Technique):
    """Base of `LocalSGD` and `DiLoCo`."""

    every: Annotated[int, at.Gt(0)] = 20
    refused_backends: ClassVar = {
        "fsdp2": "no rank has weights of its own",
        "zero": "no rank has weights of its own",
    }

    probe_fields: ClassVar = {"every": 4}
    expected_failed_checks: ClassVar = {"two_ranks_equal_one[ddp]": "each rank takes steps of its own"}

    def meet(self, weights: Mapping[str, Tensor]) -> None:
        """Replace this rank's weights, in place, by what all agree on; every rank comes here at the same step."""
        raise NotImplementedError

    def on_train_begin(self, args, state, control, **kwargs):
        super().on_train_begin(args, state, control, **kwargs)
        run: Any = self.run_
        if run.is_deepspeed_enabled or run.is_fsdp_enabled:
            raise ValueError(f"{self!r}: under FSDP and DeepSpeed no rank has weights of its own. Use DDP.")
        if args.world_size > 1:
            for technique in run.techniques:
                if technique.decides_by_weights or technique.implemented_hooks() & {"accept_step", "averaging"}:
                    raise ValueError(
                        f"{self!r} does not support {technique!r}, which would decide differently on each rank, as "
                        "their weights differ between meetings. Remove one of the two."
                    )
        self.names_ = list(local_parameters(run.model))  # some may be frozen between two meetings
        self.steps_, self.meetings_, self.bytes_ = 0, 0, 0
        self.due_: set[str] = set()

    def synchronize(self) -> bool:
        """Never: gradients stay with their rank."""
        return False

    def on_step_end(self, args, state, control, **kwargs):
        run: Any = self.run_
        self.steps_ += 1
        if self.steps_ % self.every == 0 or self._ended(state, control):
            self.meetings_ += 1
            weights = local_parameters(run.model, trainable_only=False)
            self.meet({name: weights[name] for name in self.names_})
            saved = run.model.state_dict()
            for name, buffer in buffers(run.model).items():
                if name in saved and buffer.is_floating_point():  # statistics of batch normalization, not constants
                    buffer.copy_(self.mean(buffer))
            control.should_evaluate |= "should_evaluate" in self.due_
            control.should_save |= "should_save" in self.due_
            self.due_.clear()
        else:
            self._postpone(args, control)
        return control

    def on_epoch_end(self, args, state, control, **kwargs):
        if self.steps_ % self.every and not self._ended(state, control):
            self._postpone(args, control)
        return control

    def _ended(self, state: Any, control: Any) -> bool:
        """Whether this step is the run's last."""
        run: Any = self.run_
        return control.should_training_stop or state.global_step >= state.max_steps or run.clock.done

    def _postpone(self, args: Any, control: Any) -> None:
        if args.world_size == 1:
            return  # the weights are everybody's
        for flag in MOVED:
            if getattr(control, flag):
                self.due_.add(flag)
                setattr(control, flag, False)

    def mean(self, tensor: Tensor) -> Tensor:
        """The mean over ranks; what is sent is counted."""
        run: Any = self.run_
        if run.args.world_size == 1:
            return tensor
        total = tensor.detach().clone()
        dist.all_reduce(total)
        self.bytes_ += total.numel() * total.element_size()
        return total / run.args.world_size

    def state_dict(self, scope: Literal["global", "rank"]) -> State:
        run: Any = self.run_
        if scope == "global":
            return {
                "steps": self.steps_,
                "meetings": self.meetings_,
                "bytes": self.bytes_,
                "ranks": run.args.world_size,
            }
        if run.args.world_size == 1:
            return {}
        return {"optimizer": run.optimizer.state_dict()["state"]}

    def load_state_dict(self, scope: Literal["global", "rank"], state: State) -> None:
        run: Any = self.run_
        if scope == "global":
            if state["ranks"] != run.args.world_size:
                raise ValueError(
                    f"{self!r}: the checkpoint is of {state['ranks']} ranks, each with an optimizer of its own, and "
                    f"here are {run.args.world_size}. Resume on {state['ranks']}."
                )
            self.steps_, self.meetings_, self.bytes_ = state["steps"], state["meetings"], state["bytes"]
        elif state:
            own = {int(index): values for index, values in state["optimizer"].items()}
            groups = run.optimizer.state_dict()["param_groups"]
            run.optimizer.load_state_dict({"state": own, "param_groups": groups})

    def report(self) -> Mapping[str, Any]:
        """How often the ranks met, and the bytes that each rank gave to all others for it."""
        return {"meetings": self.meetings_, "bytes": self.bytes_}

    def took_effect(self, report: Mapping[str, Any]) -> bool:
        return 0 < report["meetings"] < self.steps_ or self.every == 1
