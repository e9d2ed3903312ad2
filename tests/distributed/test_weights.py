"""`hf_accel.weights` on two ranks, driven by a plain Trainer."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from ranks import BACKENDS, assert_backend, backend_args, run_on_ranks
from safetensors.torch import load_file, save_file
from torch.utils.data import Dataset
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

from hf_accel.weights import gather, local_parameters, scatter, swap

pytestmark = [pytest.mark.distributed, pytest.mark.ci]

VOCAB = 61


def tiny_llama() -> LlamaForCausalLM:
    """Sizes are odd, so that shards are of unequal size and ZeRO-3 has to pad."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=33,
        head_dim=8,
        intermediate_size=63,
        num_hidden_layers=2,
        num_attention_heads=3,
        num_key_value_heads=3,
        attention_dropout=0.1,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    return LlamaForCausalLM(config)


class Sentences(Dataset):
    def __init__(self, num_examples: int, seed: int):
        generator = torch.Generator().manual_seed(seed)
        self.ids_NL = torch.randint(3, VOCAB, (num_examples, 12), generator=generator)

    def __len__(self):
        return len(self.ids_NL)

    def __getitem__(self, i):
        return {"input_ids": self.ids_NL[i], "labels": self.ids_NL[i]}


class TwiceEvaluating(Trainer):
    """Evaluates twice, each of which leaves whole weights behind under FSDP2 and ZeRO-3 (and draws random numbers)."""

    def evaluate(self, *args, **kwargs):
        super().evaluate(*args, **kwargs)
        return super().evaluate(*args, **kwargs)


class Swapping(Trainer):
    """Evaluates other weights the second time, and records whether the weights came back."""

    def train(self, *args, **kwargs):
        self.swapped_losses, self.came_back = [], []
        return super().train(*args, **kwargs)

    def evaluate(self, *args, **kwargs):
        super().evaluate(*args, **kwargs)
        live = copies(local_parameters(self.model))
        self.other = {name: 3 * weight + 0.1 for name, weight in live.items()}
        given = copies(self.other)
        swap(self.model, given)
        metrics = super().evaluate(*args, **kwargs)
        self.came_back.append(equal(given, live) and equal(local_parameters(self.model), self.other))
        swap(self.model, given)
        self.came_back.append(equal(given, self.other) and equal(local_parameters(self.model), live))
        self.swapped_losses.append(metrics["eval_loss"])
        return metrics


def copies(tensors):
    return {name: tensor.clone() for name, tensor in tensors.items()}


def equal(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def trainer(cls, folder, **args) -> Trainer:
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=4,
        eval_strategy="steps",
        eval_steps=2,
        save_strategy="no",
        learning_rate=1e-2,
        lr_scheduler_type="constant",
        per_device_train_batch_size=4,
        per_device_eval_batch_size=4,
        dataloader_pin_memory=False,
        report_to=[],
        disable_tqdm=True,
        **args,
    )
    return cls(tiny_llama(), arguments, train_dataset=Sentences(32, seed=1), eval_dataset=Sentences(8, seed=2))


SETTINGS = {backend: (backend, {}, {}) for backend in BACKENDS} | {
    "zero3 without persistent parameters": ("zero3", {"stage3_param_persistence_threshold": 0}, {}),
    "zero3 hierarchical": ("zero3", {"stage3_param_persistence_threshold": 0, "zero_hpz_partition_size": 2}, {}),
    "zero2 bf16": ("zero2", {}, {"bf16": True}),
    "zero3 bf16": ("zero3", {}, {"bf16": True}),
}


@pytest.mark.parametrize("setting", SETTINGS)
def test_swaps_leave_training_alone_and_evaluate_what_was_given(setting, tmp_path):
    backend, zero_optimization, args = SETTINGS[setting]
    args = backend_args(backend, **zero_optimization) | args

    def rank():
        plain = trainer(TwiceEvaluating, tmp_path, **args)
        plain.train()
        assert_backend(plain, backend)

        swapping = trainer(Swapping, tmp_path, **args)
        swapping.train()
        final = local_parameters(swapping.model)
        return {
            "unperturbed": equal(local_parameters(plain.model), final),
            "came back": swapping.came_back,
            "losses": swapping.swapped_losses,
            "last": gather(swapping.model, swapping.other),
            "raw": plain.evaluate()["eval_loss"],
        }

    first, second = run_on_ranks(rank, backend=backend)
    for seen in first, second:
        assert seen["unperturbed"]
        assert seen["came back"] == [True] * 4
    assert first["losses"] == second["losses"]
    assert second["last"] == {}

    # One process that never heard of ranks evaluates the weights that were swapped in.
    model = tiny_llama()
    assert model.load_state_dict(first["last"], strict=True)
    single = trainer(Trainer, tmp_path, use_cpu=True)
    single.model = model
    assert single.evaluate()["eval_loss"] == pytest.approx(first["losses"][-1], rel=1e-2 if "bf16" in args else 1e-5)
    assert abs(first["losses"][-1] - first["raw"]) > 0.1


@pytest.mark.parametrize("backend", BACKENDS)
def test_gather_and_scatter_are_inverses_over_numbers_of_ranks(backend, tmp_path):
    foreign = {name: torch.randn_like(weight) for name, weight in local_parameters(tiny_llama()).items()}

    def rank():
        trained = trainer(Trainer, tmp_path, **backend_args(backend))
        trained.train()
        trained.evaluate()
        assert_backend(trained, backend)
        local = local_parameters(trained.model)
        full = gather(trained.model, local)
        expected = trained.accelerator.get_state_dict(trained.model_wrapped)

        if dist.get_rank() == 0:
            save_file(full, tmp_path / "full.safetensors")
        dist.barrier()
        again = scatter(trained.model, load_file(tmp_path / "full.safetensors"))
        sizes = {name: weight.numel() for name, weight in local.items()}
        return full, expected, equal(again, local), sizes, gather(trained.model, scatter(trained.model, foreign))

    (full, expected, same, sizes, roundtrip), (nothing, _, same_too, sizes_too, _) = run_on_ranks(rank, backend=backend)
    assert equal(full, dict(expected))
    assert nothing == {}
    assert same
    assert same_too
    assert equal(roundtrip, foreign)
    parts = 2 if backend in ("fsdp2", "zero3") else 1
    for name, weight in full.items():
        assert sizes[name] + sizes_too[name] == weight.numel() * 2 / parts
