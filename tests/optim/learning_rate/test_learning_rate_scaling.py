import math
from dataclasses import dataclass

import pytest
import torch
from accelerate.utils import ParallelismConfig
from ranks import run_on_ranks

from hf_accel import AccelTrainer, Muon, NamedOptimizer, Technique
from hf_accel.optim.learning_rate.learning_rate_scaling import LearningRateScaling, rate_factor, sde_settings
from hf_accel.testing import largest_difference, tiny_trainer, weights_of

ADAM = {"learning_rate": 1e-3, "adam_beta1": 0.9, "adam_beta2": 0.99, "adam_epsilon": 1e-6}


def test_the_rules_are_their_equations():
    assert rate_factor(4, "linear") == 4 and rate_factor(4, "sqrt") == rate_factor(4, "sde") == 2
    beta1, beta2, epsilon = sde_settings(4, 0.9, 0.99, 1e-6)
    assert (beta1, beta2, epsilon) == (pytest.approx(0.6), pytest.approx(0.96), pytest.approx(5e-7))
    small = sde_settings(0.25, beta1, beta2, epsilon)
    assert small == (pytest.approx(0.775 + 0.125), pytest.approx(0.99), pytest.approx(1e-6))


def spread_of_adam(batch, steps, lr, beta1, beta2, epsilon, walkers=1000):
    """Mean square of parameters that begin at 0, in the float64 of a loop by hand: loss x^2 / 200, gradients with noise
    of variance 1 / batch, so that noise outweighs the slope."""
    generator = torch.Generator().manual_seed(batch)
    x = torch.zeros(walkers, dtype=torch.float64)
    m, v, spreads = torch.zeros_like(x), torch.zeros_like(x), []
    for step in range(1, steps + 1):
        gradient = x / 100 + torch.randn(walkers, generator=generator, dtype=torch.float64) / math.sqrt(batch)
        m = beta1 * m + (1 - beta1) * gradient
        v = beta2 * v + (1 - beta2) * gradient**2
        x = x - lr * (m / (1 - beta1**step)) / ((v / (1 - beta2**step)).sqrt() + epsilon)
        spreads.append(float((x**2).mean()))
    return spreads[steps // 4 - 1], spreads[-1]


def test_under_the_sde_rule_adam_keeps_to_its_path_per_example():
    beta1, beta2, epsilon, lr = 0.975, 0.9975, 1e-3, 0.01
    small = spread_of_adam(64, 3200, lr, beta1, beta2, epsilon)
    settings = sde_settings(8, beta1, beta2, epsilon)
    large = spread_of_adam(512, 400, lr * rate_factor(8, "sde"), *settings)
    assert large == (pytest.approx(small[0], rel=0.1), pytest.approx(small[1], rel=0.1))
    linear = spread_of_adam(512, 400, lr * rate_factor(8, "linear"), *settings)
    assert linear[1] > 2 * small[1]
    unscaled = spread_of_adam(512, 400, lr, *settings)
    assert unscaled[1] < small[1] / 2


def rates_of(trainer):
    return sorted({group["initial_lr"] for group in trainer.optimizer.param_groups})


@pytest.mark.parametrize(
    ("rule", "techniques"), [("linear", ()), ("sqrt", ()), ("sde", ()), ("linear", (Muon(),)), ("sqrt", (Muon(),))]
)
def test_every_group_has_the_rate_of_the_whole_step(rule, techniques, tmp_path):
    batch = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 4, "max_steps": 1}
    scaling = LearningRateScaling(rule, reference_batch=4)
    trainer = tiny_trainer([*techniques, scaling], tmp_path, **batch, **ADAM)
    trainer.train()
    plain = tiny_trainer(techniques, tmp_path, **batch, **ADAM)
    plain.train()
    factor = 4 if rule == "linear" else 2
    assert rates_of(trainer) == pytest.approx([factor * rate for rate in rates_of(plain)])
    report = trainer.receipt.techniques[-1]["report"]
    assert report["batch"] == 16 and report["lr_factor"] == factor
    if rule == "sde":
        assert all(group["betas"] == pytest.approx((0.6, 0.96)) for group in trainer.optimizer.param_groups)
        assert all(group["eps"] == pytest.approx(5e-7) for group in trainer.optimizer.param_groups)
        assert [report[name] for name in ("beta1", "beta2", "epsilon")] == pytest.approx([0.6, 0.96, 5e-7])


def test_at_the_reference_batch_it_is_no_technique(tmp_path):
    plain = tiny_trainer([], tmp_path, max_steps=3)
    plain.train()
    for rule in ("linear", "sde"):
        scaled = tiny_trainer([LearningRateScaling(rule, reference_batch=8)], tmp_path, max_steps=3)
        scaled.train()
        assert largest_difference(weights_of(plain), weights_of(scaled)) == 0.0


@dataclass(eq=False)
class Watch(Technique):
    def observe(self, ids_B, losses_B):
        pass


def report_on_a_rank(techniques, directory, accumulation):
    args = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": accumulation, "max_steps": 1}
    trainer = tiny_trainer(techniques, directory, **args)
    trainer.train()
    return trainer.receipt.techniques[0]["report"]["batch"], rates_of(trainer)


@pytest.mark.distributed
@pytest.mark.ci
@pytest.mark.parametrize("others", [[], [Watch()]], ids=["plain", "streamed"])
def test_ranks_and_accumulation_count(others, tmp_path):
    scaling = LearningRateScaling("linear", reference_batch=4)
    one = report_on_a_rank([scaling, *others], tmp_path, 8)
    two = run_on_ranks(report_on_a_rank, [scaling, *others], tmp_path, 4)
    assert one == (16, [pytest.approx(4 * 5e-3)])
    assert two[0] == two[1] == one


def test_the_log_says_what_is_changed_and_warns_above_the_critical_batch(tmp_path, caplog):
    tiny_trainer([LearningRateScaling("sde", reference_batch=2, critical_batch=8)], tmp_path, **ADAM)
    (said,) = caplog.messages
    assert "a step takes 8 examples, 4 times the reference batch" in said
    assert "learning_rate: 0.001 -> 0.002; adam_beta1: 0.9 -> 0.6; adam_beta2: 0.99 -> 0.96" in said
    assert said.endswith("adam_epsilon: 1e-06 -> 5e-07")
    caplog.clear()
    tiny_trainer([LearningRateScaling(reference_batch=2, critical_batch=7)], tmp_path)
    assert "learning_rate: 0.005 -> 0.01" in caplog.messages[0] and "adam" not in caplog.messages[0]
    assert "8 examples are more than the critical batch" in caplog.messages[1]


def test_the_arguments_that_were_given_stay(tmp_path):
    trainer = tiny_trainer([], tmp_path, **ADAM)
    given = trainer.args
    scaling = LearningRateScaling("sde", reference_batch=2)
    hosted = AccelTrainer(trainer.model, given, train_dataset=trainer.train_dataset, techniques=[scaling])
    assert given.adam_beta1 == 0.9 and hosted.args.adam_beta1 == pytest.approx(0.6)
    assert given.learning_rate == hosted.args.learning_rate == 1e-3


@pytest.mark.parametrize(
    ("fields", "others", "args", "sentence"),
    [
        ({"rule": "sde"}, [], {"optim": "sgd"}, "support optim='sgd' because this rule holds for Adam"),
        ({"rule": "sde"}, [], {"optim": "adafactor"}, "optim='adafactor' because .* Use rule='sqrt'"),
        ({"rule": "sde"}, [NamedOptimizer("SGD")], {}, r"support NamedOptimizer\(name='SGD'.*\) because this rule"),
        (
            {"rule": "sde", "reference_batch": 1},
            [],
            {"adam_beta1": 0.8},
            "adam_beta1=0.8 would become -0.6. Use",
        ),
        (
            {"rule": "sde", "reference_batch": 1},
            [],
            {"adam_beta2": 0.8},
            "adam_beta2=0.8 would become -0.6. Use",
        ),
        ({}, [], {"auto_find_batch_size": True}, "Set micro_batch_size='auto' of the trainer instead"),
        ({}, [], {"accelerator_config": {"split_batches": True}}, "split_batches=True because it changes"),
        ({}, [], {"parallelism_config": ParallelismConfig()}, "parallelism_config because ranks share examples"),
    ],
)
def test_what_it_cannot_do_is_refused(fields, others, args, sentence, tmp_path):
    with pytest.raises(ValueError, match=rf"LearningRateScaling\(rule=.*\) does not .*{sentence}"):
        tiny_trainer([LearningRateScaling(**fields), *others], tmp_path, **args)


def test_betas_that_are_set_elsewhere_are_refused(tmp_path):
    trainer = tiny_trainer([LearningRateScaling("sde")], tmp_path)
    trainer.optimizer_cls_and_kwargs = torch.optim.AdamW, {"betas": (0.8, 0.9)}
    with pytest.raises(ValueError, match=r"Scaling\(rule='sde'.*optimizer_cls_and_kwargs because it .* Adam's betas"):
        trainer.train()


def test_with_micro_batches_of_its_own_the_step_stays(tmp_path):
    trainer = tiny_trainer([LearningRateScaling(), Watch()], tmp_path, auto_find_batch_size=True)
    assert trainer.accel.options.micro_batch_size == "auto" and trainer.accel.nominal_batch_size == 8


def test_a_bad_value_names_itself():
    with pytest.raises(ValueError, match=r"LearningRateScaling\(critical_batch=0\): .* must be >= 1, or None"):
        LearningRateScaling(critical_batch=0)
