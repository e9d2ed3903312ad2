"""A technique of one's own: a class, its hyperparameters, and the contract that says whether it is one.

python examples/own_technique.py

Needs: pip install -c constraints.txt -e .
"""

import tempfile
from dataclasses import dataclass

from transformers import TrainingArguments

from hf_accel import AccelTrainer, Technique
from hf_accel.technique import Positive
from hf_accel.testing import CountingText, check_technique, collate_padded, tiny_llama


@dataclass(eq=False)
class FocusOnHard(Technique):
    """Gives tokens that are known already, by the loss that they have now, no weight.

    Args:
        floor: Least loss, in nats, of a token that counts.
    """

    floor: Positive = 0.1
    rank_counters = ("seen", "ignored")

    def on_train_begin(self, args, state, control, **kwargs):
        self.seen_, self.ignored_ = 0, 0

    def loss_weights(self, losses, ids_B):
        known_BL = losses.mask_BL & (losses.losses_BL.detach() < self.floor)
        self.seen_ += int(losses.mask_BL.sum())
        self.ignored_ += int(known_BL.sum())
        return (~known_BL).to(losses.losses_BL.dtype)

    def report(self):
        return {"ignored": self.ignored_ / max(self.seen_, 1)}


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        check_technique(FocusOnHard(floor=3.0), folder)
    trainer = AccelTrainer(
        model=tiny_llama(),
        args=TrainingArguments(
            "accel_own", num_train_epochs=12, learning_rate=1e-2, save_strategy="no", report_to="none"
        ),
        train_dataset=CountingText(64),
        eval_dataset=CountingText(32, seed=1),
        data_collator=collate_padded,
        techniques=[FocusOnHard()],
    )
    trainer.train()
    print(trainer.receipt.techniques)
    print(trainer.evaluate())
