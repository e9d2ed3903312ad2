"""Memory that does not suffice: the micro-batch halves, and nothing else differs from a run that began at that size."""

import functools
from dataclasses import dataclass
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from hf_accel import BatchSizeRamp, ExponentialMovingAverage, InfoBatch, PaddingFree, SequenceLengthWarmup, Technique
from hf_accel.engine.memory import NotEnoughMemory, first_micro_batch_size, moments
from hf_accel.testing import largest_difference, losses_of, tiny_llama, tiny_trainer, weights_of

OUT_OF_MEMORY = "CUDA out of memory. Tried to allocate 2.00 GiB."


@dataclass(eq=False)
class Watch(Technique):
    """Notes how often each example was observed, and the rows of each step."""

    def on_train_begin(self, args, state, control, **kwargs):
        self.seen_, self.rows_ = [], {}

    def observe(self, ids_B, losses_B):
        self.seen_ += ids_B.tolist()

    def transform_batch(self, batch):
        self.rows_[self.run_.state.global_step] = [len(micro.ids_B) for micro in batch.micro_batches]
        return batch


class Scarce:
    """Memory for some rows only: in the forward pass, before a block; or in the backward pass, after one."""

    def __init__(self, model, rows, place="forward"):
        self.rows, self.times = rows, 0
        module = model.model.layers[2]
        if place == "forward":
            module.register_forward_pre_hook(self.before)
        else:
            module.register_full_backward_hook(self.backward)
        model.register_forward_pre_hook(self.enter, with_kwargs=True)

    def enter(self, module, args, inputs):
        flat = len(inputs["input_ids"]) == 1 and "position_ids" in inputs
        self.here = int((inputs["position_ids"] == 0).sum()) if flat else len(inputs["input_ids"])

    def before(self, module, args):
        if module.training:
            self.fail()

    def backward(self, module, gradients, outputs):
        self.fail()

    def fail(self):
        if self.here > self.rows:
            self.times += 1
            raise torch.OutOfMemoryError(OUT_OF_MEMORY)


class Counting(nn.Module):
    """Noise that grows with the number of passes, which it keeps in a buffer: what is done twice shows."""

    def __init__(self, block):
        super().__init__()
        self.block = block
        self.register_buffer("passes", torch.zeros(()))

    def forward(self, hidden, *args, **kwargs):
        if self.training:
            self.passes += 1
        return self.block(hidden * (1 + 0.01 * self.passes), *args, **kwargs)

    def __getattr__(self, name):
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.block, name)


def with_buffer():
    model = tiny_llama()
    model.model.layers[0] = Counting(model.model.layers[0])
    return model


def train(techniques, directory, size, rows=None, place="forward", model=None, resume=None, **args):
    trainer = tiny_trainer(techniques, directory, micro_batch_size=size, model=model, **args)
    scarce = None if rows is None else Scarce(trainer.model, rows, place)
    trainer.train(resume_from_checkpoint=resume)
    return trainer, scarce


def assert_same_run(found, expected):
    assert losses_of(found) == losses_of(expected)
    assert largest_difference(weights_of(found), weights_of(expected)) == 0.0
    for name in ("steps", "skipped_steps", "samples", "tokens", "flops", "progress", "final_learning_rate"):
        assert getattr(found.receipt, name) == getattr(expected.receipt, name), name
    assert [t["report"] for t in found.receipt.techniques] == [t["report"] for t in expected.receipt.techniques]
    assert found.state.epoch == expected.state.epoch


@pytest.mark.parametrize(
    "model", [tiny_llama, pytest.param(with_buffer, marks=pytest.mark.ci)], ids=["dropout", "buffer"]
)
@pytest.mark.parametrize("place", ["forward", "backward"])
@pytest.mark.parametrize("rows, size, failures", [(5, 4, 1), (3, 2, 2), (1, 1, 3)])
def test_the_run_is_the_one_that_began_at_the_size_that_fits(rows, size, failures, place, model, tmp_path):
    watches = [Watch(), Watch()]
    auto, scarce = train([watches[0]], tmp_path, "auto", rows, place, model(), num_train_epochs=1)
    small, _ = train([watches[1]], tmp_path, size, model=model(), num_train_epochs=1)
    assert auto.micro_batch_size == size and scarce.times == failures
    assert_same_run(auto, small)
    assert auto.state.global_step == 8 and auto.receipt.samples == 64
    assert watches[0].seen_ == watches[1].seen_ and sorted(watches[0].seen_) == list(range(64))
    assert watches[0].rows_ == watches[1].rows_


def test_memory_that_suffices_changes_nothing(tmp_path):
    auto, scarce = train([Watch()], tmp_path, "auto", 8)
    plain, _ = train([Watch()], tmp_path, None)
    assert auto.micro_batch_size == 8 and scarce.times == 0
    assert_same_run(auto, plain)


def test_it_begins_with_all_examples_of_an_update(tmp_path):
    args = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 6}
    auto, scarce = train([Watch()], tmp_path, "auto", 4, **args)
    small, _ = train([Watch()], tmp_path, 3, **args)
    assert auto.micro_batch_size == 3 and scarce.times == 2  # 12, 6, 3
    assert_same_run(auto, small)


def test_only_some_steps_run_out(tmp_path):
    """The steps before are as the larger size gives them, those after as the smaller one."""

    class Late(Scarce):
        def fail(self):
            if auto.state.global_step >= 9:
                super().fail()

    watch = Watch()
    auto = tiny_trainer([watch], tmp_path, micro_batch_size="auto")
    Late(auto.model, 4)
    auto.train()
    assert [watch.rows_[step] for step in (0, 8, 9, 23)] == [[8], [8], [4, 4], [4, 4]]
    assert auto.state.global_step == 24 and auto.receipt.samples == 192


RAMP = functools.partial(BatchSizeRamp, start=0.5)  # 4 examples: already the first step does not fit
TECHNIQUES = {
    "ramp": lambda: [RAMP()],
    "pruned": lambda: [InfoBatch()],
    "together": lambda: [SequenceLengthWarmup(), InfoBatch(), RAMP(), ExponentialMovingAverage(half_life=5)],
    "flat": lambda: [PaddingFree(), InfoBatch(), RAMP()],
}


@pytest.mark.parametrize("build", TECHNIQUES.values(), ids=TECHNIQUES)
def test_techniques_count_what_was_trained(build, tmp_path):
    auto, scarce = train(build(), tmp_path, "auto", 3)
    small, _ = train(build(), tmp_path, 2)
    assert auto.micro_batch_size == 2 and 1 <= scarce.times <= 2  # the ramp begins below 8
    assert_same_run(auto, small)


def test_a_ramp_grows_until_memory_runs_out(tmp_path):
    """Its first steps fit whole: the same run up to rounding, dropout apart."""
    exact = {"dropout": 0.0, "dtype": torch.float64}
    auto, scarce = train([BatchSizeRamp()], tmp_path, "auto", 3, **exact)
    small, _ = train([BatchSizeRamp()], tmp_path, 2, **exact)
    assert scarce.times == 1  # 4 rows, where 8 are allowed: 2 without a trial of 4
    assert largest_difference(weights_of(auto), weights_of(small)) < 1e-9
    assert auto.receipt.techniques[0]["report"] == small.receipt.techniques[0]["report"]
    assert (auto.receipt.samples, auto.receipt.tokens) == (small.receipt.samples, small.receipt.tokens)


def test_workers_that_read_ahead(tmp_path):
    args = {"dataloader_num_workers": 1, "dataloader_prefetch_factor": 4, "num_train_epochs": 1}
    auto, _ = train([RAMP()], tmp_path, "auto", 3, **args)
    small, _ = train([RAMP()], tmp_path, 2, **args)
    assert_same_run(auto, small)


@pytest.mark.parametrize("step", [1, 5, 17])
def test_a_resume_keeps_the_size(step, tmp_path):
    straight, scarce = train([InfoBatch()], tmp_path / "a", "auto", 3, save_strategy="steps", save_steps=1)
    resumed, again = train([InfoBatch()], tmp_path / "b", "auto", 3, resume=str(tmp_path / f"a/checkpoint-{step}"))
    assert (scarce.times, again.times, resumed.micro_batch_size) == (2, 0, 2)
    assert_same_run(resumed, straight)


def test_one_example_that_does_not_fit(tmp_path):
    with pytest.raises(NotEnoughMemory) as caught:
        train([Watch()], tmp_path, "auto", 0)
    assert str(caught.value) == "One example does not fit into memory. Shorten the examples or shard the model."


def test_a_given_size_is_kept(tmp_path):
    with pytest.raises(torch.OutOfMemoryError):
        train([Watch()], tmp_path, 8, 5)


def test_other_errors_are_not_caught(tmp_path):
    trainer = tiny_trainer([Watch()], tmp_path, micro_batch_size="auto")

    def fail(*_):
        raise RuntimeError("a shape does not match")

    trainer.model.register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="a shape does not match"):
        trainer.train()


@pytest.mark.parametrize("size", [0, -3, "all", 2.0, True])
def test_bad_sizes(size, tmp_path):
    with pytest.raises(ValueError, match=r"micro_batch_size\(.*\): must be 'auto' or a number above zero"):
        tiny_trainer([Watch()], tmp_path, micro_batch_size=size)


@pytest.mark.parametrize("kind", ["is_deepspeed_enabled", "is_fsdp_enabled"])
def test_backends_that_need_a_number(kind):
    trainer = SimpleNamespace(
        **{"is_deepspeed_enabled": False, "is_fsdp_enabled": False, kind: True},
        accelerator=SimpleNamespace(is_fsdp2=False),
    )
    with pytest.raises(ValueError, match="micro_batch_size='auto' does not support .* a number"):
        first_micro_batch_size(trainer, "auto", 1)


@dataclass(eq=False)
class Hardest(Technique):
    """Trains on the half of each step's examples with the higher losses."""

    def step_select(self, ids_B, losses_B):
        return losses_B.topk(max(len(losses_B) // 2, 1)).indices.sort().values, None


def test_scoring_halves_as_well(tmp_path):
    auto, scarce = train([Hardest()], tmp_path, "auto", 3)
    small, _ = train([Hardest()], tmp_path, 2)
    assert auto.micro_batch_size == 2 and scarce.times == 2
    assert_same_run(auto, small)


@dataclass(eq=False)
class Twice(Technique):
    """The gradient at a point uphill, as sharpness-aware objectives ask for it."""

    def objective(self, model, backward):
        loss = backward()
        steps = [(p, 1e-2 * p.grad.clone()) for p in model.parameters()]
        model.zero_grad()
        with torch.no_grad():
            for p, step in steps:
                p += step
        backward()
        with torch.no_grad():
            for p, step in steps:
                p -= step
        return loss


@pytest.mark.ci
@pytest.mark.parametrize("counted", [True, False], ids=["Trainer counts", "Trainer counts nothing"])
def test_objectives_that_ask_twice(counted, tmp_path):
    def model():
        llama = tiny_llama()
        llama.accepts_loss_kwargs = counted
        return llama

    auto, _ = train([Twice()], tmp_path, "auto", 3, model=model())
    small, _ = train([Twice()], tmp_path, 2, model=model())
    assert_same_run(auto, small)


@pytest.mark.parametrize("rows, size", [(12, 4), (7, 2)])
def test_examples_that_are_cut_into_pieces(rows, size, tmp_path):
    def cut():
        return [SequenceLengthWarmup(cut="rechunk", start=0.25, multiple=1, end=1.0)]

    auto, scarce = train(cut(), tmp_path, "auto", rows, num_train_epochs=1)
    small, _ = train(cut(), tmp_path, size, num_train_epochs=1)
    assert auto.micro_batch_size == size and scarce.times > 0
    assert_same_run(auto, small)


def test_an_example_in_pieces_that_does_not_fit(tmp_path):
    with pytest.raises(NotEnoughMemory, match="One example"):
        train([SequenceLengthWarmup(cut="rechunk", end=1.0)], tmp_path, "auto", 1)


def test_the_trial_leaves_room_for_the_moments(tmp_path):
    trainer = tiny_trainer([], tmp_path, micro_batch_size=4, max_steps=1)
    trainer.model.model.embed_tokens.weight.requires_grad_(False)
    trainer.create_optimizer()
    trained = sum(p.numel() for p in trainer.model.parameters() if p.requires_grad)
    assert sum(tensor.numel() for tensor in moments(trainer.model, trainer.optimizer)) == 2 * trained
    trainer.train()
    assert moments(trainer.model, trainer.optimizer) == []
    held = trainer.optimizer.state.values()
    assert sum(value.numel() for state in held for value in state.values() if value.dim()) == 2 * trained
