"""Send less than whole gradients between ranks.

``fp16`` and ``bf16`` halve the bytes sent.  ``powersgd`` sends a low-rank factorization of each matrix of the gradient
instead.  It takes one step of a power iteration, which starts from the last one.  With gradient G of shape (n, m),

    M = G + E                                        the unsent part from before is not lost
    P = orthogonal(mean over ranks of M Q)           (n, rank)
    Q = mean over ranks of M^T P                     (m, rank)
    gradient = P Q^T,    E = M - P Q^T

which is (n + m) rank numbers for n m.  Vectors, and matrices that it would not make smaller, are sent whole.  While
progress is below ``start``, gradients change fast, and everything is sent whole.

Recommendation: Use GradientCompression if you train with DDP over a slow network and most of a step waits for
gradients.
When to use: DDP over a slow network, if waiting for gradients takes most of a step.  Try a half precision first.
When not to use:
- A fast interconnect, because compressing takes longer than sending.
- One process, which sends nothing.
Differences from the paper: E and Q are kept by parameter instead of DDP's bucket, because a resumed run forms new
buckets.
Reference: Vogels, Karimireddy, Jaggi (2019), PowerSGD: Practical low-rank gradient compression for distributed
optimization, https://arxiv.org/abs/1905.13727.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

import annotated_types as at
import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel
from transformers.utils import logging

from hf_accel.technique import Fraction, State, Technique

logger = logging.get_logger(__name__)


def low_rank(matrix_NM: Tensor, query_MR: Tensor, mean: Any = lambda tensor: tensor) -> tuple[Tensor, Tensor]:
    """Return an approximation P Q^T of the mean of the ranks' matrices, and Q, the query of the next step.

    ``mean`` averages a tensor over the ranks.
    """
    basis_NR = torch.linalg.qr(mean(matrix_NM @ query_MR))[0]
    query_MR = mean(matrix_NM.T @ basis_NR)
    return basis_NR @ query_MR.T, query_MR


def is_smaller(shape: torch.Size, rank: int) -> bool:
    """Return whether factors of a rank are at most half as large as a matrix with its rows in the first dimension."""
    rows, columns = shape[0] if len(shape) else 1, math.prod(shape[1:])
    return len(shape) > 1 and 2 * (rows + columns) * rank <= rows * columns


@dataclass(eq=False)
class GradientCompression(Technique):
    """Compress the gradients that DistributedDataParallel sends.

    Args:
        method: Format of the gradients that are sent.
        rank: Rank of PowerSGD's factors, above 0.
        start: Progress, in [0, 1], from which PowerSGD compresses.
    """

    method: Literal["fp16", "bf16", "powersgd"] = "fp16"  # not taken from a paper
    rank: Annotated[int, at.Gt(0)] = 4  # table 3 of the paper: ranks of 2 and 4 keep the quality
    start: Fraction = 0.1  # torch's own waits for 1,000 steps
    refused_backends: ClassVar = {
        "fsdp2": "it scatters gradients itself",
        "zero": "it reduces gradients itself",
    }
    expected_failed_checks: ClassVar = {
        "check_every_option_matters": "the one process of that check sends nothing",
        "two_ranks_equal_one[ddp]": "gradients are rounded before they are sent",
    }
    claims: ClassVar = frozenset({"synchronization"})

    def on_train_begin(self, args, state, control, **kwargs):
        super().on_train_begin(args, state, control, **kwargs)
        run: Any = self.run_
        if run.is_deepspeed_enabled or run.is_fsdp_enabled:
            raise ValueError(
                f"{self!r} does not support FSDP or DeepSpeed because they exchange gradients themselves. Use DDP, or "
                "remove GradientCompression."
            )
        if self.method == "powersgd" and args.fp16:  # the unsent part would keep the loss scale of its step
            raise ValueError(f"{self!r}: PowerSGD does not follow the loss scale of fp16. Use bf16=True.")
        self.errors_: dict[str, Tensor] = {}
        self.queries_: dict[str, Tensor] = {}
        self.sent_, self.whole_ = 0, 0
        wrapped = getattr(run.model_wrapped, "_orig_mod", run.model_wrapped)  # torch_compile wraps DDP
        if not isinstance(wrapped, DistributedDataParallel):
            logger.warning(f"{self!r}: one process sends no gradients, so nothing is compressed.")
            return
        if self.method == "bf16" and dist.get_backend() == "gloo":
            raise ValueError(f"{self!r}: gloo does not send bfloat16. Use method='fp16'.")
        self.names_ = {parameter: name for name, parameter in wrapped.module.named_parameters()}
        if getattr(self, "hooked_", None) is not wrapped:  # a second train() keeps the hook
            wrapped.register_comm_hook(None, lambda _, bucket: self._exchange(bucket))
            self.hooked_ = wrapped

    def synchronize(self) -> bool:
        """Return True: ranks exchange gradients at every step."""
        return True

    def _exchange(self, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
        """Average the gradients of one bucket, as DDP's hook."""
        run: Any = self.run_
        self.whole_ += bucket.buffer().numel() * bucket.buffer().element_size()
        if self.method != "powersgd":
            return self._exchange_as(torch.float16 if self.method == "fp16" else torch.bfloat16, bucket.buffer())
        if run.clock.progress < self.start:
            return self._exchange_as(bucket.buffer().dtype, bucket.buffer())
        for parameter, gradient in zip(bucket.parameters(), bucket.gradients(), strict=True):
            self._exchange_factors(self.names_[parameter], gradient)
        done: torch.futures.Future[Tensor] = torch.futures.Future()
        done.set_result(bucket.buffer())
        return done

    def _exchange_as(self, dtype: torch.dtype, buffer: Tensor) -> torch.futures.Future[Tensor]:
        """Average a buffer, sent in a dtype during the backward pass."""
        total = buffer.to(dtype) / dist.get_world_size()
        self.sent_ += total.numel() * total.element_size()
        work: Any = dist.all_reduce(total, async_op=True)
        return work.get_future().then(lambda sent: buffer.copy_(sent.value()[0]))

    def _exchange_factors(self, name: str, gradient: Tensor) -> None:
        if not is_smaller(gradient.shape, self.rank):
            gradient.copy_(self._mean(gradient))
            return
        matrix_NM = gradient.reshape(len(gradient), -1)
        matrix_NM = matrix_NM.to(torch.promote_types(matrix_NM.dtype, torch.float32))  # QR has no half precision
        if name not in self.queries_:
            generator = torch.Generator().manual_seed(len(self.queries_))
            query_MR = torch.randn(matrix_NM.shape[1], self.rank, generator=generator, dtype=torch.float64)
            self.queries_[name] = query_MR.to(matrix_NM)
            self.errors_[name] = torch.zeros_like(matrix_NM)
        matrix_NM = matrix_NM + self.errors_[name]
        sent_NM, query_MR = low_rank(matrix_NM, self.queries_[name], self._mean)
        finite = query_MR.isfinite().all()  # on all ranks or on none
        self.queries_[name] = torch.where(finite, query_MR, self.queries_[name])
        self.errors_[name] = torch.where(finite, matrix_NM - sent_NM, 0.0)
        gradient.copy_(sent_NM.view_as(gradient))

    def _mean(self, tensor: Tensor) -> Tensor:
        total = tensor / dist.get_world_size()  # before the sum, which may overflow in half precision
        dist.all_reduce(total)
        self.sent_ += total.numel() * total.element_size()
        return total

    def state_dict(self, scope: Literal["global", "rank"]) -> State:
        if scope == "global":
            return {"queries": self.queries_, "sent": self.sent_, "whole": self.whole_}
        return {"errors": self.errors_} if self.errors_ else {}

    def load_state_dict(self, scope: Literal["global", "rank"], state: State) -> None:
        device = self.run_.args.device  # type: ignore[union-attr]
        if scope == "global":
            self.queries_ = {name: query.to(device) for name, query in state["queries"].items()}
            self.sent_, self.whole_ = state["sent"], state["whole"]
        else:
            self.errors_ = {name: error.to(device) for name, error in state.get("errors", {}).items()}

    def report(self) -> Mapping[str, Any]:
        """Report the bytes that each rank sent, and their share of the whole gradients."""
        return {"bytes": self.sent_, "share": self.sent_ / self.whole_ if self.whole_ else 1.0}
