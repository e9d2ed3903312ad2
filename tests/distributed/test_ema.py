"""`ExponentialMovingAverage` on two ranks, under the events of a plain Trainer."""

from __future__ import annotations

import pytest
import torch
from ranks import assert_backend, backend_args, run_on_ranks
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainerCallback, TrainerState, TrainingArguments

from hf_accel.optim import ExponentialMovingAverage
from hf_accel.weights import gather, local_parameters

pytestmark = [pytest.mark.distributed, pytest.mark.ci]

HALF_LIFE = 2.0


class Host:
    """Stands for AccelTrainer, which alone can ask for averages."""

    clock = None


class Recording(TrainerCallback):
    """Gathers all iterates."""

    def __init__(self):
        self.iterates = []

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        self.iterates.append(gather(model, local_parameters(model)))

    def on_step_end(self, args, state, control, model=None, **kwargs):
        self.iterates.append(gather(model, local_parameters(model)))


def tiny_llama() -> nn.Module:
    torch.manual_seed(0)
    sizes = dict(vocab_size=61, hidden_size=33, head_dim=8, intermediate_size=63)
    return LlamaForCausalLM(
        LlamaConfig(**sizes, num_hidden_layers=2, num_attention_heads=3, num_key_value_heads=3, pad_token_id=0)
    )


@pytest.mark.parametrize("backend", ["ddp", "fsdp2", "zero3"])
def test_average_over_ranks_is_the_weighted_mean_and_resumes_anywhere(backend, tmp_path):
    ids_NL = torch.randint(3, 61, (24, 8), generator=torch.Generator().manual_seed(1))
    data = [{"input_ids": ids_L, "labels": ids_L} for ids_L in ids_NL]

    def rank():
        technique, recording = ExponentialMovingAverage(HALF_LIFE), Recording()
        technique.run_ = Host()
        args = TrainingArguments(
            output_dir=str(tmp_path),
            max_steps=3,
            learning_rate=1e-2,
            per_device_train_batch_size=4,
            dataloader_pin_memory=False,
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
            **backend_args(backend),
        )
        trainer = Trainer(tiny_llama(), args, train_dataset=data, callbacks=[technique, recording])
        trainer.train()
        assert_backend(trainer, backend)
        return recording.iterates, technique.state_dict("global"), technique.report()

    (iterates, state, report), (_, nothing, _) = run_on_ranks(rank, backend=backend)
    assert report == {"half_life": HALF_LIFE, "updates": 3}
    assert nothing["averages"] == {}
    r = 0.5 ** (1 / HALF_LIFE)
    assert state["averages"].keys() == iterates[0].keys() == dict(tiny_llama().named_parameters()).keys()
    for name, average in state["averages"].items():
        start, *after = (iterate[name].double() for iterate in iterates)
        expected = r**3 * start + (1 - r) * sum(r ** (2 - i) * weight for i, weight in enumerate(after))
        torch.testing.assert_close(average.double(), expected, rtol=1e-5, atol=1e-6)
        assert not torch.equal(average, iterates[-1][name])

    alone = ExponentialMovingAverage(HALF_LIFE)
    alone.run_ = Host()
    alone.on_train_begin(None, TrainerState(global_step=3), None, model=tiny_llama())
    alone.load_state_dict("global", state)
    assert all(torch.equal(average, state["averages"][name]) for name, average in alone.averaging().items())
    assert alone.report() == report
