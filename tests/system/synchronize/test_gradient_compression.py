import warnings

import pytest
import torch
from accelerate import PartialState
from ranks import run_on_ranks

from hf_accel import GradientCompression
from hf_accel.system.synchronize.gradient_compression import is_smaller, low_rank
from hf_accel.testing import largest_difference, tiny_trainer, weights_of

EXACT = {"dropout": 0.0, "dtype": torch.float64}


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_a_matrix_of_that_rank_is_sent_exactly():
    matrix = random(8, 2) @ random(2, 12, seed=1)
    sent, _ = low_rank(matrix, random(12, 2, seed=2))
    assert (sent - matrix).abs().max() < 1e-12


def test_the_iteration_finds_the_largest_singular_values():
    matrix, query = random(10, 6), random(6, 2, seed=1)
    for _ in range(200):
        sent, query = low_rank(matrix, query)
    u, s, v = torch.linalg.svd(matrix)
    best = u[:, :2] @ torch.diag(s[:2]) @ v[:2]
    assert (sent - best).abs().max() < 1e-9


def test_ranks_send_an_approximation_of_their_mean():
    matrices, query = [random(8, 12, seed=seed) for seed in range(3)], random(12, 2, seed=9)
    mean = sum(matrices) / 3
    expected, _ = low_rank(mean, query)
    basis = torch.linalg.qr(sum(m @ query for m in matrices) / 3)[0]
    by_hand = basis @ (sum(m.T @ basis for m in matrices) / 3).T
    assert (by_hand - expected).abs().max() < 1e-12


@pytest.mark.parametrize(
    ("shape", "smaller"), [((64, 64), True), ((16, 8), False), ((64,), False), ((), False), ((32, 3, 8, 8), True)]
)
def test_what_is_worth_compressing(shape, smaller):
    assert is_smaller(torch.Size(shape), 4) is smaller


def gradients(technique, directory):
    """Of one step: the gradients that the optimizer sees, and the report."""
    techniques = [] if technique is None else [technique]
    trainer = tiny_trainer(
        techniques,
        directory,
        max_steps=2,
        per_device_train_batch_size=4,
        max_grad_norm=0.0,
        micro_batch_size=4,
        **EXACT,
    )
    found, norm = [], trainer._get_grad_norm

    def spy(model, grad_norm=None):
        found.append({n.removeprefix("module."): p.grad.clone() for n, p in model.named_parameters()})
        return norm(model, grad_norm)

    trainer._get_grad_norm = spy
    trainer.train()
    return found[0], trainer.receipt.techniques[0]["report"] if techniques else None


@pytest.mark.distributed
@pytest.mark.ci
def test_half_precision_rounds_and_halves(tmp_path):
    whole, half = (
        run_on_ranks(gradients, None, tmp_path),
        run_on_ranks(gradients, GradientCompression("fp16"), tmp_path),
    )
    (gradient, report), (other, _) = half
    assert largest_difference(gradient, other) == 0.0
    for name, exact in whole[0][0].items():
        assert (gradient[name] - exact).abs().max() <= 2e-3 * exact.abs().max() + 1e-7
    assert largest_difference(gradient, whole[0][0]) > 0
    assert report["share"] == 0.25  # of float64


@pytest.mark.distributed
@pytest.mark.ci
def test_what_was_not_sent_is_kept(tmp_path):
    def run():
        technique = GradientCompression("powersgd", rank=1, start=0.0)
        gradient, report = gradients(technique, tmp_path)
        trainer = tiny_trainer(
            [GradientCompression("powersgd", rank=1, start=0.0)],
            tmp_path,
            max_steps=1,
            per_device_train_batch_size=4,
            max_grad_norm=0.0,
            **EXACT,
        )
        trainer.train()
        return gradient, trainer.techniques[0].errors_, report["share"]

    whole, sent = run_on_ranks(gradients, None, tmp_path), run_on_ranks(run)
    assert sent[0][1] and sent[0][2] < 0.75
    for name, error in sent[0][1].items():
        mean_error = (error + sent[1][1][name]) / 2
        assert (sent[0][0][name] + mean_error - whole[0][0][name]).abs().max() < 1e-12


@pytest.mark.distributed
@pytest.mark.ci
def test_before_its_start_gradients_are_whole(tmp_path):
    whole, sent = (
        run_on_ranks(gradients, None, tmp_path),
        run_on_ranks(gradients, GradientCompression("powersgd", start=1.0), tmp_path),
    )
    assert largest_difference(whole[0][0], sent[0][0]) < 1e-15 and sent[0][1]["share"] == 1.0


@pytest.mark.distributed
@pytest.mark.ci
def test_resumed_errors_and_queries_go_on(tmp_path):
    def run(folder, resume=None, **args):
        technique = GradientCompression("powersgd", rank=1, start=0.0)
        trainer = tiny_trainer([technique], tmp_path / folder, max_steps=8, per_device_train_batch_size=4, **args)
        trainer.train(resume_from_checkpoint=resume)
        return weights_of(trainer)

    straight = run_on_ranks(run, "straight", save_strategy="steps", save_steps=3)
    resumed = run_on_ranks(run, "resumed", resume=str(tmp_path / "straight" / "checkpoint-3"))
    assert largest_difference(straight[0], resumed[0]) == 0.0


def exchanged(*gradients):
    """What one step after another makes of these gradients of a matrix, and what it keeps: error and query."""
    PartialState(cpu=True)
    technique = GradientCompression("powersgd", rank=1)
    technique.errors_, technique.queries_, technique.sent_ = {}, {}, 0
    sent = [gradient.clone() for gradient in gradients]
    for gradient in sent:
        technique._exchange_factors("weight", gradient)
    return sent, technique.errors_["weight"], technique.queries_["weight"]


@pytest.mark.distributed
@pytest.mark.ci
def test_what_is_not_finite_passes():
    def run():
        gradient = random(8, 12)
        infinite = gradient.clone()
        if PartialState(cpu=True).process_index == 1:
            infinite[2, 3] = torch.inf
        (_, sent, again), error, query = exchanged(gradient, infinite, gradient)
        assert not sent.isfinite().all(), "and all ranks know of it"
        assert again.isfinite().all() and error.isfinite().all() and query.isfinite().all()
        _, error, query = exchanged(gradient, infinite)
        first = exchanged(gradient)[2]
        return torch.equal(query, first), bool((error == 0).all())

    assert run_on_ranks(run) == [(True, True)] * 2


@pytest.mark.distributed
@pytest.mark.ci
def test_what_was_not_sent_is_sent_later():
    def run():
        gradients = [random(8, 12, seed=seed) for seed in range(6)]
        sent, error, _ = exchanged(*gradients)
        return sum(sent) + error, sum(gradients), error

    for found, expected, error in run_on_ranks(run):
        assert error.norm() > 0.1 * expected.norm()
        assert torch.allclose(found, expected, atol=1e-9)


@pytest.mark.distributed
@pytest.mark.ci
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_is_factorized_in_single(dtype):
    def run():
        gradient = random(8, 12).to(dtype)
        (sent,), error, _ = exchanged(gradient)
        (expected,), _, _ = exchanged(gradient.float())
        assert sent.dtype == dtype and error.dtype == torch.float32
        return torch.equal(sent, expected.to(dtype))

    assert run_on_ranks(run) == [True, True]


def test_powersgd_refuses_a_loss_scale(tmp_path):
    with pytest.raises(ValueError, match="does not follow the loss scale of fp16. Use bf16=True"):
        tiny_trainer([GradientCompression("powersgd")], tmp_path, fp16=True).train()


@pytest.mark.distributed
@pytest.mark.ci
@pytest.mark.parametrize("compiled", [False, True])
def test_a_second_training_compresses_as_well(compiled, tmp_path):
    def run():
        warnings.filterwarnings("ignore", "The .grad attribute")  # of dynamo
        args = {"torch_compile": True, "torch_compile_backend": "eager"} if compiled else {}
        trainer = tiny_trainer([GradientCompression()], tmp_path, max_steps=1, **args)
        shares = []
        for _ in range(2):
            trainer.train()
            shares.append(trainer.receipt.techniques[0]["report"]["share"])
        return shares

    assert run_on_ranks(run) == [[0.5, 0.5]] * 2


@pytest.mark.distributed
@pytest.mark.ci
def test_bfloat16_is_refused_where_it_cannot_be_sent(tmp_path):
    def run():
        with pytest.raises(ValueError, match="gloo does not send bfloat16. Use method='fp16'"):
            tiny_trainer([GradientCompression("bf16")], tmp_path).train()
        return True

    assert run_on_ranks(run) == [True, True]
