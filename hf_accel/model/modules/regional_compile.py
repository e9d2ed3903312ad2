"""Regional compilation: a model's repeated blocks are compiled, once for all of them.

Nearly all of the time is spent in the L blocks, which have one code.  A compiler that is given a block at a time
compiles it once and uses the result L times, where the whole model would be compiled as L copies.  With C the seconds
of compilation, and t, t_c those of a step before and after, compiling pays from

    steps > C / (t - t_c)

on.  What C is shows only afterwards, so runs of fewer steps than ``min_steps`` are left as they are, and the report
says so.  The seconds of all compilations are charged to the technique in the receipt.

Reference: https://docs.pytorch.org/tutorials/recipes/regional_compilation.html; Ansel et al. (2024), PyTorch 2,
https://doi.org/10.1145/3620665.3640366.

When to use: long runs on accelerators, with few shapes: fixed lengths, ``pad_to_multiple_of``, `Packing`; others report
1.2 to 1.3 times the throughput.
When not to use: runs of minutes, also where only their time is limited, which tells no number of steps; beside
techniques that change what blocks compute from step to step (frozen blocks, dropped tokens), for each change is
compiled again, and after 8 a block's code runs as it is.  Compiled kernels round otherwise than PyTorch's own.
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
    """Compiles the blocks of a model; needs no more than a plain Trainer.

    Args:
        backend: As ``torch.compile`` takes it.
        shapes: Whether one code serves all shapes (``"dynamic"``) or each shape has a faster one (``"static"``).
        min_steps: Runs of fewer steps are not compiled; at least 0.
    """

    backend: str = "inductor"  # PyTorch's own
    shapes: Literal["dynamic", "static"] = "dynamic"  # batches are of any length
    min_steps: Annotated[int, at.Ge(0)] = 200  # others: shorter runs lose
    fidelity: ClassVar = "exact"
    neutral: ClassVar = {"min_steps": 10**12}
    variations: ClassVar = {"backend": "aot_eager"}
    refused_backends: ClassVar = {
        "fsdp2": "it gathers and reduces inside of what would be compiled",
        "zero": "it gathers and reduces inside of what would be compiled",
    }

    def on_train_begin(self, args, state, control, model: Any = None, **kwargs):
        super().on_train_begin(args, state, control, **kwargs)
        if args.deepspeed_plugin is not None:
            raise ValueError(f"{self!r}: under ZeRO, {self.refused_backends['zero']}. Use DDP, or leave it out.")
        if args.torch_compile:
            raise ValueError(f"{self!r}: torch_compile compiles the whole model. Leave one of them out.")
        if self.backend not in torch.compiler.list_backends(exclude_tags=()):
            known = ", ".join(torch.compiler.list_backends())
            raise ValueError(f"{self!r}: the backend is not known. Use one of {known}.")
        try:
            lists = block_lists(unwrapped(model))
        except ValueError as error:
            raise ValueError(f"{self!r}: {error}") from None
        if any(isinstance(module, FSDPModule) for module in model.modules()):
            raise ValueError(f"{self!r}: under FSDP2, {self.refused_backends['fsdp2']}. Use DDP, or leave it out.")
        self.compilations_ = 0
        self.compiling_ = contextlib.ExitStack()
        steps = state.max_steps if self.run_ is None or not self.run_.paced else self.run_.nominal_steps
        self.short_ = steps is not None and steps < self.min_steps
        self.blocks_ = [] if self.short_ else [block for blocks in lists.values() for block in blocks]
        if self.short_:
            logger.warning(
                f"{self!r}: a run of {steps} steps would not earn its compilation back, and is not compiled."
            )
            return
        torch.compiler.reset()  # a process compiles a code 8 times at most; what earlier runs compiled counts as well
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
        """Compiled blocks, and how often something was compiled since training began or went on."""
        why = {"why": f"fewer than {self.min_steps} steps"} if self.short_ else {}
        code = f"{self.shapes}, {self.backend}"
        return {"blocks": len(self.blocks_), "compilations": self.compilations_, "code": code, **why}

    def took_effect(self, report: Mapping[str, Any]) -> bool:
        return report["compilations"] > 0 or "why" in report
