import dataclasses

import pytest
import torch
import torch.nn.functional as F
from ranks import run_on_ranks

from hf_accel import Budget, DiLoCo, ExponentialMovingAverage, GradientSpikeGuard, LayerFreezing, LocalSGD
from hf_accel.contrib import PlasticityFreezing
from hf_accel.testing import largest_difference, tiny_llama, tiny_trainer, weights_of

EXACT = {"dropout": 0.0, "dtype": torch.float64}
STEPS, EVERY, LR = 6, 3, 0.1


@dataclasses.dataclass(eq=False)
class Watched(LocalSGD):
    """Keeps what a rank had before each meeting."""

    def meet(self, weights):
        self.before_ = [*getattr(self, "before_", []), {name: w.clone() for name, w in weights.items()}]
        super().meet(weights)
        self.after_ = [*getattr(self, "after_", []), {name: w.clone() for name, w in weights.items()}]


def run_of_a_rank(directory):
    """What a rank saw, and its weights around the meetings."""
    technique = Watched(every=EVERY)
    args = {"per_device_train_batch_size": 4, "max_steps": STEPS, "learning_rate": LR, "optim": "sgd"}
    args |= {"lr_scheduler_type": "constant", "max_grad_norm": 0.0}
    trainer = tiny_trainer([technique], directory, **EXACT, **args)
    seen = []
    trainer.model.register_forward_pre_hook(
        lambda module, args, inputs: seen.append(
            {n: v.clone() for n, v in inputs.items() if isinstance(v, torch.Tensor)}
        ),
        with_kwargs=True,
    )
    trainer.train()
    return seen, technique.before_, technique.after_, weights_of(trainer), technique.report()


def weights(model):
    return {name: parameter.detach() for name, parameter in model.named_parameters()}


@pytest.mark.distributed
@pytest.mark.ci
def test_ranks_train_apart_and_meet_at_their_mean(tmp_path):
    ranks = run_on_ranks(run_of_a_rank, tmp_path)
    models = [tiny_llama(0.0, torch.float64) for _ in ranks]
    for step in range(STEPS):
        inputs = [seen[step] for seen, *_ in ranks]
        items = sum((one["labels"][:, 1:] != -100).sum() for one in inputs)
        for model, one in zip(models, inputs, strict=True):
            logits = model(one["input_ids"], attention_mask=one["attention_mask"]).logits
            loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), one["labels"][:, 1:].flatten(), reduction="sum")
            grads = torch.autograd.grad(2 * loss / items, list(model.parameters()))
            with torch.no_grad():
                for parameter, grad in zip(model.parameters(), grads, strict=True):
                    parameter -= LR * grad
        if (step + 1) % EVERY == 0:
            meeting = step // EVERY
            for model, (_, before, *_) in zip(models, ranks, strict=True):
                assert (
                    largest_difference(weights(model), before[meeting]) < 1e-8
                )  # the model computes its loss in float32
            assert largest_difference(ranks[0][1][meeting], ranks[1][1][meeting]) > 1e-6
            with torch.no_grad():
                for ours in zip(*(model.parameters() for model in models), strict=True):
                    mean = sum(ours) / len(ours)
                    for parameter in ours:
                        parameter.copy_(mean)
            for _, _, after, *_ in ranks:
                assert (
                    largest_difference(weights(models[0]), after[meeting]) < 1e-8
                )  # the model computes its loss in float32
    assert largest_difference(ranks[0][3], ranks[1][3]) == 0.0
    size = sum(p.numel() * p.element_size() for p in models[0].parameters())
    assert ranks[0][4] == {"meetings": STEPS // EVERY, "bytes": size * STEPS // EVERY}


@pytest.mark.distributed
@pytest.mark.ci
def test_evaluations_and_checkpoints_wait_for_a_meeting(tmp_path):
    def run():
        args = {"max_steps": 7, "per_device_train_batch_size": 4, "eval_strategy": "steps", "eval_steps": 2}
        trainer = tiny_trainer([LocalSGD(every=3)], tmp_path, save_strategy="steps", save_steps=4, **args)
        trainer.train()
        evaluated = [entry["step"] for entry in trainer.state.log_history if "eval_loss" in entry]
        return evaluated, sorted(path.name for path in tmp_path.glob("checkpoint-*"))

    for evaluated, saved in run_on_ranks(run):
        assert evaluated == [3, 6, 7]
        assert saved == ["checkpoint-6", "checkpoint-7"]


@pytest.mark.distributed
@pytest.mark.ci
@pytest.mark.parametrize("other", [GradientSpikeGuard(), ExponentialMovingAverage()], ids=lambda t: type(t).__name__)
def test_what_would_decide_differently_on_each_rank_is_refused(other, tmp_path):
    def run():
        with pytest.raises(ValueError, match="the ranks' weights differ between meetings"):
            tiny_trainer([LocalSGD(), other], tmp_path).train()
        return True

    assert run_on_ranks(run) == [True, True]


@pytest.mark.distributed
@pytest.mark.ci
def test_another_number_of_ranks_is_refused(tmp_path):
    def save():
        tiny_trainer([Budget("8steps"), LocalSGD(every=4)], tmp_path, save_strategy="steps", save_steps=4).train()

    run_on_ranks(save)
    with pytest.raises(ValueError, match="Resume on 2"):
        tiny_trainer([Budget("8steps"), LocalSGD(every=4)], tmp_path).train(str(tmp_path / "checkpoint-4"))


@pytest.mark.distributed
@pytest.mark.ci
@pytest.mark.parametrize("technique", [LocalSGD(every=3), DiLoCo(every=3)], ids=lambda t: type(t).__name__)
def test_blocks_that_freeze_between_two_meetings_meet_all_the_same(technique, tmp_path):
    def run():
        freezing = LayerFreezing(start=0.4, max_fraction=0.75)
        args = {"max_steps": 10, "per_device_train_batch_size": 4}
        trainer = tiny_trainer([dataclasses.replace(technique), freezing], tmp_path, **args)
        trainer.train()
        return weights_of(trainer), freezing.report()["frozen_blocks"]

    (first, frozen), (second, _) = run_on_ranks(run)
    assert frozen == 3 and largest_difference(first, second) == 0.0


@pytest.mark.distributed
@pytest.mark.ci
def test_blocks_that_each_rank_would_freeze_by_itself_are_refused(tmp_path):
    def run():
        with pytest.raises(ValueError, match=r"does not support PlasticityFreezing\(.*which would decide differently"):
            tiny_trainer([LocalSGD(), PlasticityFreezing()], tmp_path).train()
        return True

    assert run_on_ranks(run) == [True, True]
