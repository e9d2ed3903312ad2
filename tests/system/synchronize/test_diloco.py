import pytest
import torch
from ranks import run_on_ranks

from hf_accel import DiLoCo, LocalSGD
from hf_accel.system.synchronize.diloco import nesterov
from hf_accel.testing import largest_difference, tiny_trainer, weights_of

EXACT = {"dropout": 0.0, "dtype": torch.float64}


def test_the_outer_step_is_nesterovs():
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(5, generator=generator, dtype=torch.float64)
    arrivals = torch.randn(4, 5, generator=generator, dtype=torch.float64)
    parameter = torch.nn.Parameter(start.clone())
    optimizer = torch.optim.SGD([parameter], lr=0.7, momentum=0.9, nesterov=True)
    anchor, velocity = start.clone(), torch.zeros_like(start)
    for mean in arrivals:
        parameter.grad = parameter.detach() - mean
        optimizer.step()
        nesterov(anchor, velocity, mean, lr=0.7, momentum=0.9)
        assert (anchor - parameter.detach()).abs().max() < 1e-14


@pytest.mark.distributed
@pytest.mark.ci
def test_without_momentum_and_at_a_rate_of_one_ranks_meet_at_their_mean(tmp_path):
    def run(technique):
        trainer = tiny_trainer([technique], tmp_path, max_steps=6, per_device_train_batch_size=4, **EXACT)
        trainer.train()
        return weights_of(trainer)

    plain = run_on_ranks(run, LocalSGD(every=2))
    outer = run_on_ranks(run, DiLoCo(every=2, outer_lr=1.0, outer_momentum=0.0))
    momentum = run_on_ranks(run, DiLoCo(every=2, outer_lr=1.0, outer_momentum=0.5))
    assert largest_difference(plain[0], outer[0]) < 1e-12 < largest_difference(plain[0], momentum[0])
    assert largest_difference(momentum[0], momentum[1]) == 0.0


@pytest.mark.distributed
@pytest.mark.ci
def test_a_twentieth_is_sent(tmp_path):
    def run():
        trainer = tiny_trainer([DiLoCo(every=20)], tmp_path, max_steps=40, per_device_train_batch_size=4)
        trainer.train()
        return trainer.receipt.techniques[0]["report"], sum(p.numel() * 4 for p in trainer.model.parameters())

    (report, size), _ = run_on_ranks(run)
    assert report == {"meetings": 2, "bytes": 2 * size}
