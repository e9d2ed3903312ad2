import pytest
import torch
from torch.optim.lr_scheduler import OneCycleLR
from transformers import TrainerCallback

from hf_accel.optim.learning_rate.one_cycle import OneCycle, cycled_momentum
from hf_accel.testing import tiny_trainer

STEPS = 101


@pytest.mark.parametrize("warmup", [0.1, 0.3, 0.5])
@pytest.mark.parametrize(("initial", "final"), [(0.04, 4e-6), (0.5, 0.1)])
def test_rate_and_momentum_are_those_of_torch(warmup, initial, final):
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=1.0, momentum=0.9)
    published = OneCycleLR(
        optimizer,
        max_lr=1.0,
        total_steps=STEPS,
        # Torch's peak is one step before its share, counted of one step more.
        pct_start=(warmup * (STEPS - 1) + 1) / STEPS,
        div_factor=1 / initial,
        final_div_factor=initial / final,
    )
    technique = OneCycle(warmup=warmup, initial=initial, final=final)
    for step in range(STEPS):
        progress, group = step / (STEPS - 1), optimizer.param_groups[0]
        assert technique.schedule(progress) == pytest.approx(group["lr"], abs=1e-12)
        assert cycled_momentum(progress, warmup=warmup) == pytest.approx(group["momentum"], abs=1e-12)
        optimizer.step()
        if step < STEPS - 1:
            published.step()


class Noting(TrainerCallback):
    """Rate and momentum of every update."""

    def on_train_begin(self, args, state, control, **kwargs):
        self.seen = []

    def on_pre_optimizer_step(self, args, state, control, optimizer=None, **kwargs):
        self.seen.append([(g["lr"], g["betas"] if "betas" in g else g["momentum"]) for g in optimizer.param_groups])


def trained(technique, directory, **args):
    noting = Noting()
    trainer = tiny_trainer([technique], directory, num_train_epochs=1, **args)
    trainer.add_callback(noting)
    trainer.train()
    return noting.seen


def test_every_update_has_the_rate_and_the_momentum_of_its_progress(tmp_path):
    technique = OneCycle(warmup=0.25)
    for optim in ("adamw_torch", "sgd"):
        seen = trained(technique, tmp_path, optim=optim)
        assert len(seen) == 8
        for step, groups in enumerate(seen):
            momentum = cycled_momentum(step / 8, warmup=0.25)
            for rate, found in groups:
                assert rate == pytest.approx(5e-3 * technique.schedule(step / 8))
                assert found == ((momentum, 0.999) if optim == "adamw_torch" else momentum)
    assert seen[0][0][1] == 0.95 and seen[2][0][1] == pytest.approx(0.85)


def test_momentum_can_be_left_alone(tmp_path):
    for groups in trained(OneCycle(cycle_momentum=False), tmp_path, adam_beta1=0.8):
        assert all(betas == (0.8, 0.999) for _, betas in groups)


def test_an_optimizer_without_momentum_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"OneCycle\(.*neither momentum nor betas. Set cycle_momentum=False"):
        trained(OneCycle(), tmp_path, optim="adagrad")
