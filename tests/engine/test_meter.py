import torch
from transformers import TrainerCallback

from hf_accel import Budget
from hf_accel.testing import tiny_trainer


def test_an_update_that_the_loss_scaler_skips_is_no_step(tmp_path):  # Lightning-AI/pytorch-lightning#18828
    trainer = tiny_trainer([Budget("4steps")], tmp_path, optim="sgd")  # a fused optimizer does not say that it skips
    trainer.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=3e38, backoff_factor=1e-36)  # as with fp16
    rates = []

    class Rates(TrainerCallback):
        def on_step_end(self, args, state, control, optimizer=None, **kwargs):
            rates.append(optimizer.param_groups[0]["lr"] / args.learning_rate)

    trainer.add_callback(Rates())
    trainer.train()
    assert (trainer.receipt.steps, trainer.receipt.skipped_steps, trainer.state.global_step) == (4, 1, 5)
    assert rates == [1.0, 0.75, 0.5, 0.25, 0.0]
