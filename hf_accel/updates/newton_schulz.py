"""Compute a matrix with the same singular vectors and all singular values near 1, by Newton-Schulz iteration.

With X = M / |M| and the coefficients (a, b, c) of a quintic that is steep at zero, five times

    X = a X + b (X X^T) X + c (X X^T)^2 X

takes each singular value s of X to p(p(p(p(p(s))))), p(s) = a s + b s^3 + c s^5.  A value of at least 0.002 ends
between 0.68 and 1.21.  A wide matrix is iterated through its small Gram matrix A = X X^T alone,

    Q = a I + b A + c A^2        P = Q P        A = Q A Q

with the result P X.  This takes fewer operations if there are at least twice as many columns as rows.  In bfloat16, its
rounding errors would grow.

Reference: Jordan et al. (2024), https://kellerjordan.github.io/posts/muon/.

Shape suffixes: ``K`` matrices of one shape, ``O`` their rows (outputs), ``I`` their columns (inputs).
"""

from __future__ import annotations

import torch
from torch import Tensor

COEFFICIENTS = 3.4445, -4.7750, 2.0315
STEPS = 5


def iteration_dtype(tensor: Tensor) -> torch.dtype:
    """Return float64 for float64, bfloat16 if the device computes in it natively, and else float32, which is faster."""
    if tensor.dtype == torch.float64:
        return torch.float64
    native = tensor.device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.bfloat16 if native else torch.float32


def orthogonalized(matrices_KOI: Tensor) -> Tensor:
    """Return approximations of the nearest orthogonal matrices of a stack, in the dtype of the iteration."""
    x = matrices_KOI.to(iteration_dtype(matrices_KOI))
    x = x / x.norm(dim=(-2, -1), keepdim=True).clamp(min=1e-7)
    if x.size(-2) > x.size(-1):
        return _iterated(x.mT).mT
    return _iterated(x)


def _iterated(x: Tensor) -> Tensor:
    rows, columns = x.shape[-2:]
    return _through_gram(x) if columns >= 2 * rows and x.dtype != torch.bfloat16 else _directly(x)


def _directly(x: Tensor) -> Tensor:
    a, b, c = COEFFICIENTS
    for _ in range(STEPS):
        gram = torch.bmm(x, x.mT)
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x


def _through_gram(x: Tensor) -> Tensor:
    a, b, c = COEFFICIENTS
    gram = torch.bmm(x, x.mT)
    product = None
    for step in range(STEPS):
        factor = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        factor.diagonal(dim1=-2, dim2=-1).add_(a)
        product = factor if product is None else torch.bmm(factor, product)
        if step < STEPS - 1:
            gram = torch.bmm(torch.bmm(factor, gram), factor)
    assert product is not None
    return torch.bmm(product, x)
