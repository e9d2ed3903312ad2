"""FLOPs of a rank under each backend: communication is free, and sharding computes nothing again."""

import pytest
from ranks import assert_backend, backend_args, run_on_ranks

from hf_accel.meters.flops import FlopMeter
from hf_accel.testing import tiny_trainer

pytestmark = [pytest.mark.distributed, pytest.mark.ci]


def counted_steps(directory, backend=None):
    distributed = {} if backend is None else backend_args(backend)
    trainer = tiny_trainer([], directory, **distributed, max_steps=2, per_device_train_batch_size=4)
    meter, counted, training_step = FlopMeter(), [], trainer.training_step

    def measured(model, inputs, num_items):
        loss, flops = meter.measure(model, inputs, lambda: training_step(model, inputs, num_items))
        counted.append((tuple(inputs["input_ids"].shape), flops))
        return loss

    trainer.training_step = measured
    trainer.train()
    if backend is not None:
        assert_backend(trainer, backend)
    return counted


@pytest.mark.parametrize("backend", ["ddp", "fsdp2", "zero2", "zero3"])
def test_a_rank_takes_what_one_process_takes_for_its_share(backend, tmp_path):
    ranks = run_on_ranks(counted_steps, tmp_path / "two", backend, backend=backend)
    alone = dict(counted_steps(tmp_path / "one"))
    shared = [(shape, flops) for rank in ranks for shape, flops in rank]
    assert len(shared) == 4 and all(flops.executed > 0 for _, flops in shared)
    assert all(flops == alone[shape] for shape, flops in shared if shape in alone)
    assert any(shape in alone for shape, _ in shared)
