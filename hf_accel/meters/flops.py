"""Count the floating-point operations of training steps while they run, once for each kind of step.

A step is counted at the level of kernels, which shows everything that changes its cost.  Examples are blocks without a
backward pass, adapters, dropped tokens, skipped blocks, and rows with examples that attend one by one.  There are two
numbers:

    executed    every operation that ran, with the recomputation of activation checkpointing
    model       without recomputation: the operations that the step needs, for the utilization of a device

The count includes operations that grow faster than the memory they touch: products of matrices, convolutions,
attention, transforms.  A multiplication and an addition are two operations.  Everything else (element by element, sums,
copies, look-ups, norms, communication) is free.  Attention counts its whole square, causal or not, as is usual.  A
kernel that computes and has no formula ends the count with its name, because zero would be wrong.

Shape suffixes of attention: ``B`` rows, ``H`` heads, ``Q`` and ``K`` positions, ``D`` sizes of a head.
"""

from __future__ import annotations

import hashlib
import math
import re
import time
from collections.abc import Callable, Hashable, Mapping, Sequence
from math import prod
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count

from hf_accel.batch import named_tensors

Result = TypeVar("Result")


class Flops(NamedTuple):
    """Operations of a step: those that ran, and those that the model needs."""

    executed: float = 0.0
    model: float = 0.0


class FlopMeter:
    """Count each kind of step once, and remember its count.

    Steps of one kind have the same shapes of inputs, the same trained parameters and the same mode.  Rows that hold
    several examples differ in the sum of the squared lengths.  Attention is linear in this sum, so two of its values
    are counted.
    """

    def __init__(self) -> None:
        self._known: dict[str, dict[float, Flops]] = {}

    def measure(
        self, model: nn.Module, inputs: Any, run: Callable[[], Result], varied: Hashable = None
    ) -> tuple[Result, Flops]:
        """Return the result of ``run``, a forward and backward pass of ``model`` over ``inputs``, and its operations.

        Args:
            varied: Other values that the cost of the step depends on, such as the number of dropped tokens.
        """
        kind = hashlib.sha256(repr((_kind_of(model, inputs), varied)).encode()).hexdigest()[:16]
        squares = _sum_of_squares(inputs)
        known = self._known.setdefault(kind, {})
        if (flops := _read_off(known, squares)) is not None:
            return run(), flops
        result, known[squares] = self.count(run)
        return result, known[squares]

    def count(self, run: Callable[[], Result]) -> tuple[Result, Flops]:
        """Return the result of ``run`` and its operations, counted while it runs."""
        with Counting() as counting:
            result = run()
        return result, counting.flops

    def state_dict(self) -> dict[str, list[list[float]]]:
        """Return the known counts.

        A counted step has the same loss as another one, but the last bits of its gradients differ.  So a resumed run
        must not count again.
        """
        return {kind: [[at, *flops] for at, flops in known.items()] for kind, known in self._known.items()}

    def load_state_dict(self, state: Mapping[str, Sequence[Sequence[float]]]) -> None:
        """Restore the counts that `state_dict` returned."""
        self._known = {kind: {at: Flops(*flops) for at, *flops in known} for kind, known in state.items()}


def _kind_of(model: nn.Module, inputs: Any) -> Hashable:
    tensors = [(tensor.shape, tensor.dtype) for _, tensor in named_tensors(inputs)]
    trained = [parameter.requires_grad for parameter in model.parameters()]
    return tuple(tensors), tuple(trained), model.training, torch.is_grad_enabled()


def _sum_of_squares(inputs: Any) -> float:
    """Sum the squared lengths of examples in rows that hold several, where ``position_ids`` restart; else return 0."""
    batches = inputs if isinstance(inputs, list | tuple) else [inputs]
    total = 0.0
    for batch in batches:
        ids_BL = batch.get("position_ids") if hasattr(batch, "get") else None
        if ids_BL is None or ids_BL.dim() != 2:
            continue
        starts_BL = torch.ones_like(ids_BL, dtype=torch.bool)
        starts_BL[:, 1:] = ids_BL[:, 1:] <= ids_BL[:, :-1]
        borders = starts_BL.flatten().nonzero().flatten()
        lengths = torch.diff(borders, append=borders.new_tensor([starts_BL.numel()]))
        total += lengths.double().square().sum().item()
    return total


def _read_off(known: dict[float, Flops], squares: float) -> Flops | None:
    """Return the count at a sum of squares, from the line through two known ones."""
    if squares in known or len(known) < 2:
        return known.get(squares)
    (first, at_first), (second, at_second) = list(known.items())[:2]
    share = (squares - first) / (second - first)
    return Flops(*(a + share * (b - a) for a, b in zip(at_first, at_second, strict=True)))


class Counting(TorchDispatchMode):
    """Count the operations that run inside, in ``flops``."""

    supports_higher_order_operators = True

    def __init__(self) -> None:
        super().__init__()
        self.executed = self.recomputed = 0.0

    @property
    def flops(self) -> Flops:
        """Return the counts so far."""
        return Flops(self.executed, self.executed - self.recomputed)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if not all(issubclass(kind, _PLAIN) or kind is Tensor for kind in types):
            return NotImplemented  # a subclass consists of plain tensors, which come here next
        formula = formula_of(func)
        if formula is None:
            if isinstance(func, torch._ops.OpOverload):
                with self:  # composite operations, in inference mode
                    if (result := func.decompose(*args, **kwargs)) is not NotImplemented:
                        return result
            if is_compute(func):
                raise ValueError(
                    f"{func}: there is no formula for its FLOPs. "
                    "Give one to torch.utils.flop_counter.register_flop_formula, or set another budget."
                )
            return func(*args, **kwargs)
        result = func(*args, **kwargs)
        flops = formula(*args, **kwargs, out_val=result)
        self.executed += flops
        if _is_recomputing():
            self.recomputed += flops
        elif _ATTENTION_BACKWARD.search(str(func)):
            self.recomputed += flops * _share_of_scores(*args[1:4])
        return result


_PLAIN = (nn.Parameter, nn.Buffer, FakeTensor)


def _is_recomputing() -> bool:
    """Return whether a backward pass runs operations that keep a graph, which means recomputation."""
    return torch._C._current_graph_task_id() != -1 and torch.is_grad_enabled()


def _share_of_scores(query_BHQD: Tensor, key_BHKD: Tensor, value_BHKD: Tensor) -> float:
    """Return the share of the recomputed scores in the backward pass of fused attention."""
    return query_BHQD.shape[-1] / (3 * query_BHQD.shape[-1] + 2 * value_BHKD.shape[-1])


# Operators -----------------------------------------------------------------------------------------------------------

_ATTENTION_BACKWARD = re.compile(r"attention\w*_backward|flex_attention_backward|flash_attn\w*backward")

_WORDS = re.compile(
    r"\w*mm|(add)?mv|matmul|v?dot|conv(olution)?(\dd)?|attention|attn|rnn|lstm|gru|fft|linear|(bi|tri)linear|einsum"
    r"|[cp]dist|ger|outer|kron|cholesky|geqrf|orgqr|ormqr|qr|svd|lobpcg|lstsq|solve|inverse|det|slogdet"
)
_FREE = re.compile(
    r"linalg_(vector_norm|_powsum|cross|diagonal|vecdot|check_errors)|slice_inverse|_pack_gemm_matrix|flatten_weight"
    r"|_?(de)?quantize|choose_qparams|fft_(fft|rfft)(freq|shift)|_cufft"
)
_FREE_NAMESPACES = frozenset(
    "c10d _c10d_functional _c10d_functional_autograd _dtensor fsdp symm_mem prim profiler torchvision".split()
)


def is_compute(func: Any) -> bool:
    """Return whether an operator counts, by its name.

    An operator of another library counts unless it only quantizes.
    """
    if not isinstance(func, torch._ops.OpOverload):
        return True
    namespace, _, name = func._schema.name.partition("::")
    if namespace in _FREE_NAMESPACES or _FREE.search(name):
        return False
    if namespace != "aten":
        return True
    return "linalg_" in name or any(_WORDS.fullmatch(word) for word in name.strip("_").split("_"))


def formula_of(func: Any) -> Callable[..., float] | None:
    """Return the formula of an operator's FLOPs, ours or else torch's.

    It takes the operator's arguments and, as ``out_val``, the result.
    """
    packet = getattr(func, "overloadpacket", func)
    if packet in flop_registry:
        return flop_registry[packet]
    if not isinstance(func, torch._ops.OpOverload):
        return None
    name = func._schema.name
    if name in FORMULAS:
        return FORMULAS[name]
    in_place = name.removesuffix("_")
    if in_place in FORMULAS:
        return FORMULAS[in_place]
    namespace, _, member = in_place.partition("::")
    return flop_registry.get(getattr(torch.ops.aten, member, None)) if namespace == "aten" else None


def _attention(query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> float:
    return sdpa_flop_count(query.shape, key.shape, value.shape)


def _attention_backward(grad: Tensor, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> float:
    return sdpa_backward_flop_count(grad.shape, query.shape, key.shape, value.shape)


def _flash_attn(q: Tensor, k: Tensor, v: Tensor, *args: Any, **kwargs: Any) -> float:
    """Return the FLOPs for the layout (B, Q, H, D)."""
    return sdpa_flop_count(*(tensor.transpose(1, 2).shape for tensor in (q, k, v)))


def _flash_attn_backward(dout: Tensor, q: Tensor, k: Tensor, v: Tensor, *args: Any, **kwargs: Any) -> float:
    return sdpa_backward_flop_count(*(tensor.transpose(1, 2).shape for tensor in (dout, q, k, v)))


def _pairs(borders_of_queries: Tensor, borders_of_keys: Tensor) -> float:
    """Count the pairs of positions that may see each other, over concatenated examples."""
    return (borders_of_queries.diff().double() * borders_of_keys.diff()).sum().item()


def _flash_attn_varlen(q, k, v, cu_seqlens_q, cu_seqlens_k, *args: Any, **kwargs: Any) -> float:
    heads, size = q.shape[-2:]
    return 2 * heads * (size + v.shape[-1]) * _pairs(cu_seqlens_q, cu_seqlens_k)


def _flash_attn_varlen_backward(
    dout, q, k, v, out, softmax_lse, dq, dk, dv, cu_seqlens_q, cu_seqlens_k, *args: Any, **kwargs: Any
) -> float:
    heads, size = q.shape[-2:]
    return 2 * heads * (3 * size + 2 * v.shape[-1]) * _pairs(cu_seqlens_q, cu_seqlens_k)


def _grouped_mm(a: Tensor, b: Tensor, *args: Any, **kwargs: Any) -> float:
    """Each row (or each inner position) belongs to one group."""
    groups = a.shape[0] if a.dim() == b.dim() == 3 else 1
    return 2.0 * groups * a.shape[-2] * a.shape[-1] * b.shape[-1]


def _matrix_vector(matrix: Tensor, vector: Tensor, *args: Any, **kwargs: Any) -> float:
    return 2.0 * matrix.numel()


def _add_matrix_vector(added: Tensor, matrix: Tensor, vector: Tensor, *args: Any, **kwargs: Any) -> float:
    return 2.0 * matrix.numel()


def _add_batches(added: Tensor, a: Tensor, b: Tensor, *args: Any, **kwargs: Any) -> float:
    return 2.0 * a.numel() * b.shape[-1]


def _matrices(a: Tensor, b: Tensor, *args: Any, **kwargs: Any) -> float:
    return 2.0 * a.numel() * b.shape[-1]


def _linear(inputs: Tensor, weight: Tensor, *args: Any, **kwargs: Any) -> float:
    return 2.0 * inputs.numel() * weight.shape[0]


def _fourier(inputs: Tensor, dims: list[int], *args: Any, out_val: Tensor, **kwargs: Any) -> float:
    """Return 5 n log2(n) for n complex numbers, half of it for real ones."""
    size = prod(max(inputs.shape[dim], out_val.shape[dim]) for dim in dims)
    whole = max(inputs.numel(), out_val.numel())
    both_complex = inputs.is_complex() and out_val.is_complex()
    return (5.0 if both_complex else 2.5) * whole * math.log2(max(size, 1))


FORMULAS: dict[str, Callable[..., float]] = {
    "aten::_scaled_dot_product_flash_attention_for_cpu": _attention,
    "aten::_scaled_dot_product_flash_attention_for_cpu_backward": _attention_backward,
    "aten::_scaled_dot_product_fused_attention_overrideable": _attention,
    "aten::_scaled_dot_product_fused_attention_overrideable_backward": _attention_backward,
    "flash_attn::_flash_attn_forward": _flash_attn,
    "flash_attn::_flash_attn_backward": _flash_attn_backward,
    "flash_attn::_flash_attn_varlen_forward": _flash_attn_varlen,
    "flash_attn::_flash_attn_varlen_backward": _flash_attn_varlen_backward,
    "aten::_grouped_mm": _grouped_mm,
    "aten::_scaled_grouped_mm": _grouped_mm,
    "aten::mv": _matrix_vector,
    "aten::addmv": _add_matrix_vector,
    "aten::dot": _matrix_vector,
    "aten::vdot": _matrix_vector,
    "aten::addbmm": _add_batches,
    "aten::_addmm_activation": _add_batches,
    "aten::_int_mm": _matrices,
    "aten::mkldnn_linear": _linear,
    "mkldnn::_linear_pointwise": _linear,
    "aten::_fft_c2c": _fourier,
    "aten::_fft_r2c": _fourier,
    "aten::_fft_c2r": _fourier,
}
"""Formulas of kernels for which torch has none."""


# Peak of a device ----------------------------------------------------------------------------------------------------


def peak_flops(device: torch.device, dtype: torch.dtype, *, size: int | None = None, seconds: float = 0.3) -> float:
    """Measure the operations per second of products of square matrices, the best that a device really reaches.

    Args:
        size: Rows of the matrices; None: 8192 on an accelerator, 1024 on a CPU.
        seconds: Duration of the trial; the fastest product counts.
    """
    size = size or (1024 if device.type == "cpu" else 8192)
    a, b = (torch.ones(size, size, device=device, dtype=dtype) for _ in range(2))
    best, began = math.inf, time.perf_counter()
    torch.mm(a, b)  # the first call has other costs, too
    while time.perf_counter() - began < seconds or best is math.inf:
        _finish(device)
        at = time.perf_counter()
        torch.mm(a, b)
        _finish(device)
        best = min(best, time.perf_counter() - at)
    return 2.0 * size**3 / best


def _finish(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
