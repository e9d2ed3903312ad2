"""Compile a model's repeated blocks once for all of them.

Nearly all of the time goes into the L blocks, which share their code.  A compiler that gets one block at a time
compiles it once and uses the result L times.  Compiling the whole model would make L copies.  With C the seconds of
compilation, and t, t_c those of a step before and after, compiling pays beyond

    steps > C / (t - t_c)

C is known only afterward, so runs of fewer steps than ``min_steps`` stay uncompiled, and the report says why.  The
receipt charges the seconds of all compilations to the technique.

Recommendation: Use RegionalCompile if you train for hours on an accelerator with few different shapes.
When to use: Long runs on accelerators, with few shapes: fixed lengths, ``pad_to_multiple_of``, `Packing`.  Others
report 1.2 to 1.3 times the throughput.
When not to use:
- Runs of minutes, also those limited by time alone, which gives no number of steps.
- FSDP2 and ZeRO.
- Beside techniques that change the blocks' computation from step to step (frozen blocks, dropped tokens).  Each change
  compiles again, and after 8 changes a block's code runs uncompiled.
- Exact comparisons: compiled kernels round differently from PyTorch's own.
Defaults: ``backend`` is PyTorch's own.  ``shapes`` fits batches of any length.  Others report that shorter runs than
``min_steps`` lose.
Differences from the paper: None.
References: https://docs.pytorch.org/tutorials/recipes/regional_compilation.html; Ansel et al. (2024), PyTorch 2,
https://doi.org/10.1145/3620665.3640366.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

import annotated_types as at
import torch
from torch._dynamo.callback import callback_handler
from torch.distributed.fsdp import FSDPModule
from transformers.utils import logging

from hf_accel.adapters import unwrapped
from hf_accel.surgery.blocks import block_lists
from hf_accel.technique import Technique

logger = logging.get_logger(__name__)


@dataclass(eq=False)
class RegionalCompile(Technique):
    """Compile the blocks of a model; needs no more than a plain Trainer.

    Args:
        backend: Backend of ``torch.compile``.
        shapes: One code for all shapes (``"dynamic"``), or a faster one for each shape (``"static"``).
        min_steps: Smallest number of steps of a compiled run, at least 0.
    """

    backend: str = "inductor"
    shapes: Literal["dynamic", "static"] = "dynamic"
    min_steps: Annotated[int, at.Ge(0)] = 200
    fidelity: ClassVar = "exact"
    neutral: ClassVar = {"min_steps": 10**12}
    variations: ClassVar = {"backend": "aot_eager"}
    refused_backends: ClassVar = {
        "fsdp2": "it gathers and reduces inside the compiled blocks",
        "zero": "it gathers and reduces inside the compiled blocks",
    }

    def on_train_begin(self, args, state, control, model: Any = None, **kwargs):
        super().on_train_begin(args, state, control, **kwargs)
        if args.deepspeed_plugin is not None:
            raise ValueError(f"{self!r} does not support ZeRO because {self.refused_backends['zero']}. Use DDP.")
        if args.torch_compile:
            raise ValueError(
                f"{self!r} does not support torch_compile because that compiles the whole model. Set "
                "torch_compile=False."
            )
        if self.backend not in torch.compiler.list_backends(exclude_tags=()):
            known = ", ".join(torch.compiler.list_backends())
            raise ValueError(f"{self!r}: the backend is unknown. Use one of {known}.")
        try:
            lists = block_lists(unwrapped(model))
        except ValueError as error:
            raise ValueError(f"{self!r}: {error}") from None
        if any(isinstance(module, FSDPModule) for module in model.modules()):
            raise ValueError(f"{self!r} does not support FSDP2 because {self.refused_backends['fsdp2']}. Use DDP.")
        self.compilations_ = 0
        self.compiling_ = contextlib.ExitStack()
        steps = state.max_steps if self.run_ is None or not self.run_.paced else self.run_.nominal_steps
        self.short_ = steps is not None and steps < self.min_steps
        self.blocks_ = [] if self.short_ else [block for blocks in lists.values() for block in blocks]
        if self.short_:
            logger.warning(
                f"{self!r}: a run of {steps} steps is too short to pay for its compilation, and stays uncompiled."
            )
            return
        torch.compiler.reset()  # a process compiles a code at most 8 times, those of earlier runs included
        callback_handler.register_start_callback(self._begin)
        callback_handler.register_end_callback(self._end)
        for block in self.blocks_:
            block.compile(backend=self.backend, dynamic=self.shapes == "dynamic")

    def _begin(self, compilation: Any) -> None:
        self.compilations_ += 1
        if self.run_ is not None:
            self.compiling_.enter_context(self.run_.charge(self))

    def _end(self, compilation: Any) -> None:
        self.compiling_.close()

    def on_train_end(self, args, state, control, **kwargs):
        if not self.blocks_:
            return
        callback_handler.remove_start_callback(self._begin)
        callback_handler.remove_end_callback(self._end)
        for block in self.blocks_:
            block._compiled_call_impl = None

    def report(self) -> Mapping[str, Any]:
        """Report the compiled blocks, and the number of compilations since training started or resumed."""
        why = {"why": f"fewer than {self.min_steps} steps"} if self.short_ else {}
        code = f"{self.shapes}, {self.backend}"
        return {"blocks": len(self.blocks_), "compilations": self.compilations_, "code": code, **why}

    def took_effect(self, report: Mapping[str, Any]) -> bool:
        return report["compilations"] > 0 or "why" in report
