"""What is kept back for an evaluation is measured on the trainer's own evaluation."""

import pytest
import torch
from torch.utils.data import DataLoader
from transformers import (
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
    T5Config,
    T5ForConditionalGeneration,
    TrainingArguments,
)

from hf_accel import AccelTrainer, accelerated
from hf_accel.engine.reserve import probe_evaluation
from hf_accel.testing import CountingText, collate_padded, tiny_llama

ARGS = dict(report_to=[], use_cpu=True, disable_tqdm=True, save_strategy="no", per_device_eval_batch_size=4)


class Passes:
    """A clock that counts the forward passes of a module."""

    def __init__(self, module):
        self.number = 0
        module.register_forward_pre_hook(lambda *given: setattr(self, "number", self.number + 1))

    def __call__(self):
        return float(self.number)


def test_the_loader_is_the_trainers_own(tmp_path):
    class OwnLoader(AccelTrainer):
        def get_eval_dataloader(self, eval_dataset=None):
            return DataLoader(CountingText(16), batch_size=2, collate_fn=collate_padded)

    def collate(rows):
        assert isinstance(rows[0], dict), "rows of training only"
        return collate_padded(rows)

    model = tiny_llama()
    args = TrainingArguments(str(tmp_path), **ARGS)
    trainer = OwnLoader(model, args, train_dataset=CountingText(16), eval_dataset=["a"] * 16, data_collator=collate)
    model.train()
    state = torch.random.get_rng_state()
    assert probe_evaluation(trainer.accel.host, Passes(model)) == 8  # batches of 2
    assert model.training and torch.equal(torch.random.get_rng_state(), state)


@pytest.mark.parametrize("generates", [False, True])
def test_generation_is_a_part_of_an_evaluation_that_generates(generates, tmp_path):
    torch.manual_seed(0)
    sizes = dict(d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=2, vocab_size=48, decoder_start_token_id=0)
    model = T5ForConditionalGeneration(T5Config(**sizes, eos_token_id=None, pad_token_id=0))
    model.generation_config.eos_token_id = None  # every answer has the greatest length
    data = [{"input_ids": [3, 4, 5], "labels": [4, 5]} for _ in range(8)]
    args = Seq2SeqTrainingArguments(
        str(tmp_path), predict_with_generate=generates, generation_max_length=7, generation_num_beams=2, **ARGS
    )
    trainer = accelerated(Seq2SeqTrainer)(
        model=model,
        args=args,
        train_dataset=data,
        eval_dataset=data,
        data_collator=lambda rows: {k: torch.tensor([r[k] for r in rows]) for k in rows[0]},
        compute_metrics=lambda found: {},
    )
    clock = Passes(model.decoder)
    probed = probe_evaluation(trainer.accel.host, clock)
    clock.number = 0
    trainer.evaluate()
    assert probed == clock.number == (2 * 7 if generates else 2)  # 6 tokens and a loss, of 2 batches
