"""The iteration against singular value decompositions, which it never makes."""

import pytest
import torch

from hf_accel.updates import newton_schulz
from hf_accel.updates.newton_schulz import orthogonalized

SHAPES = [(5, 16, 16), (3, 12, 40), (2, 40, 12), (4, 20, 30), (2, 30, 20), (1, 1, 7), (1, 64, 256)]
TOLERANCES = {torch.float64: 1e-9, torch.float32: 1e-4, torch.bfloat16: 6e-2}


def drawn(shape, seed=0, **options):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64, **options)


def by_singular_values(matrix):
    """The quintic on each singular value; the singular vectors stay."""
    left, values, right = torch.linalg.svd(matrix.double(), full_matrices=False)
    values = values / values.square().sum(-1, keepdim=True).sqrt()
    for _ in range(5):
        values = 3.4445 * values - 4.7750 * values**3 + 2.0315 * values**5
    return (left * values.unsqueeze(-2)) @ right


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_quintic_acts_on_singular_values_alone(shape, dtype, monkeypatch):
    monkeypatch.setattr(newton_schulz, "iteration_dtype", lambda tensor: dtype)
    matrices = drawn(shape)
    result = orthogonalized(matrices)
    assert (result.shape, result.dtype) == (matrices.shape, dtype)
    torch.testing.assert_close(result.double(), by_singular_values(matrices), rtol=0, atol=TOLERANCES[dtype])


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_it_is_near_the_nearest_orthogonal_matrix(shape):
    matrices = drawn(shape, seed=1).float()
    left, _, right = torch.linalg.svd(matrices.double(), full_matrices=False)
    core = left.mT @ orthogonalized(matrices).double() @ right.mT
    values = core.diagonal(dim1=-2, dim2=-1)
    assert values.min() > 0.6 and values.max() < 1.3
    assert (core - torch.diag_embed(values)).abs().max() < 1e-4


@pytest.mark.parametrize("shape", [(64, 64), (32, 96), (96, 32)], ids=str)
def test_it_agrees_with_torch(shape):
    matrix = drawn(shape, seed=2).float()
    weight = torch.nn.Parameter(torch.zeros(shape))
    weight.grad = matrix.clone()
    torch.optim.Muon([weight], lr=1.0, weight_decay=0.0, momentum=0.0, nesterov=False).step()
    ours = orthogonalized(matrix[None])[0] * max(1, shape[0] / shape[1]) ** 0.5
    torch.testing.assert_close(-weight.detach(), ours, rtol=0, atol=0.03)  # torch iterates in bfloat16


def test_directions_that_float32_hardly_holds_do_no_harm():
    left, right = (torch.linalg.qr(drawn((n, n), seed=n))[0] for n in (32, 96))
    spectrum = torch.logspace(0, -12, 32, dtype=torch.float64)
    matrix = (left * spectrum) @ right[:32]
    result = orthogonalized(matrix[None].float())[0]
    values = torch.linalg.svdvals(result.double())
    assert values.max() < 1.3
    torch.testing.assert_close(result.double(), by_singular_values(matrix), rtol=0, atol=1e-2)
    assert torch.equal(orthogonalized(torch.zeros(2, 4, 9)), torch.zeros(2, 4, 9))


def test_float64_is_kept_and_cpus_iterate_in_float32():
    kept = {torch.float64: torch.float64, torch.float32: torch.float32, torch.bfloat16: torch.float32}
    assert {dtype: orthogonalized(drawn((1, 3, 4)).to(dtype)).dtype for dtype in kept} == kept
