from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig, AutoModelForCausalLM

from hf_accel.model.compression.lora import LoRA, add_adapters
from hf_accel.model.compression.low_rank_training import (
    Factorized,
    LowRankTraining,
    factors,
    give_factors,
    stable_rank,
    use_factors,
    whole,
)
from hf_accel.surgery.blocks import linear_layers
from hf_accel.testing import EXAMPLES, collate_padded, tiny_llama, tiny_trainer

GPT2 = AutoConfig.for_model("gpt2", vocab_size=48, n_embd=16, n_layer=2, n_head=2)


def prepared(technique, model, **args):
    defaults = {"deepspeed_plugin": None, "fsdp": None, "world_size": 1, "gradient_checkpointing": False}
    settings = SimpleNamespace(**defaults | {"ddp_find_unused_parameters": None} | args)
    technique.run_ = SimpleNamespace(args=settings, is_fsdp_enabled=False)
    return technique.prepare_model(model)


def test_stable_rank_of_known_spectra():
    assert stable_rank(torch.eye(5, 7)) == pytest.approx(5)
    assert stable_rank(torch.outer(torch.arange(1.0, 4), torch.ones(6))) == pytest.approx(1)
    assert stable_rank(torch.diag(torch.tensor([2.0, 1, 1]))) == pytest.approx(1.5)
    assert stable_rank(torch.zeros(3, 3)) == 0.0


def test_the_product_is_the_best_of_its_rank():
    matrix = np.random.default_rng(0).normal(size=(9, 6))
    singular = np.linalg.svd(matrix, compute_uv=False)
    left, right = factors(torch.tensor(matrix), 2)
    assert (left.shape, right.shape) == ((9, 2), (2, 6)) and left.norm().item() == pytest.approx(right.norm().item())
    error = np.linalg.norm(matrix - (left @ right).numpy())
    assert error == pytest.approx(np.sqrt((singular[2:] ** 2).sum()), rel=1e-12)


@pytest.mark.parametrize("config", [GPT2, tiny_llama().config], ids=["gpt2", "llama"])
def test_a_layer_computes_with_its_factors_for_fewer_flops(config):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).double()
    keys = list(model.state_dict())
    for layer in linear_layers(model).values():
        num_out, num_in = whole(layer).shape
        x = torch.rand(3, num_in, dtype=torch.float64)
        give_factors(layer, 3)
        untouched = layer(x)
        use_factors(layer, *factors(whole(layer), 3))
        with FlopCounterMode(display=False) as thin:
            by_factors = layer.train()(x)
        with FlopCounterMode(display=False) as full:
            by_weight = layer.eval()(x)
        torch.testing.assert_close(by_factors, by_weight, rtol=1e-9, atol=1e-12)
        assert not torch.allclose(untouched, by_weight)
        assert thin.get_total_flops() * num_out * num_in == full.get_total_flops() * 3 * (num_out + num_in)
    assert list(model.state_dict()) == keys
    loaded = AutoModelForCausalLM.from_config(config).double()
    loaded.load_state_dict(model.state_dict())
    assert model.load_state_dict(loaded.state_dict()).missing_keys == []


def test_training_is_a_loop_by_hand(tmp_path):
    options = {"optim": "sgd", "max_grad_norm": 0.0, "lr_scheduler_type": "constant", "learning_rate": 0.5}
    trainer = tiny_trainer(
        [LowRankTraining(tolerance=0.0)], tmp_path, dropout=0.0, dtype=torch.float64, num_train_epochs=1,
        train_sampling_strategy="sequential", **options,
    )  # fmt: skip
    trainer.train()

    model = tiny_llama(dropout=0.0, dtype=torch.float64).train()
    weights = {path: layer.weight for path, layer in model.named_modules() if path.endswith("_proj")}
    thin = {}
    steps = EXAMPLES // 8
    for step in range(steps):
        if step == steps // 2:
            for path, weight in weights.items():
                u, s, v = np.linalg.svd(weight.detach().numpy())
                root = np.sqrt(s[:4])
                thin[path] = [torch.tensor(u[:, :4] * root), torch.tensor(root[:, None] * v[:4])]
        for path, (left, right) in thin.items():
            weights[path].data.copy_(left @ right)
        batch = collate_padded([trainer.train_dataset[i] for i in range(8 * step, 8 * step + 8)])
        model.zero_grad()
        model(**batch).loss.backward()
        with torch.no_grad():
            for path, (left, right) in thin.items():
                gradient = weights[path].grad
                thin[path] = [left - 0.5 * gradient @ right.T, right - 0.5 * left.T @ gradient]
            for parameter in model.parameters():
                parameter -= 0.5 * parameter.grad
    for path, (left, right) in thin.items():
        weights[path].data.copy_(left @ right)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(trainer.model.get_parameter(name), parameter, rtol=1e-9, atol=1e-12)


def test_it_changes_when_stable_ranks_settle_or_at_the_latest(tmp_path):
    def changed_at(learning_rate, **fields):
        technique = LowRankTraining(**({"interval": 0.25} | fields))
        trainer = tiny_trainer([technique], tmp_path, learning_rate=learning_rate)
        trainer.train()
        return trainer.receipt.techniques[0]["report"]["changed_at"], trainer

    # Nothing moves, which the second look sees.
    assert changed_at(1e-9, earliest=0.0)[0] == 0.25
    assert changed_at(1e-9, earliest=0.25, interval=0.05)[0] == pytest.approx(8 / 24)
    at, trainer = changed_at(1e-2, tolerance=1e-9, latest=0.4)
    assert at == pytest.approx(10 / 24)
    trainer.save_model(str(tmp_path / "saved"))
    loaded, said = AutoModelForCausalLM.from_pretrained(tmp_path / "saved", output_loading_info=True)
    assert not any(said.values()) and not any(isinstance(module, Factorized) for module in loaded.modules())
    for layer in linear_layers(loaded).values():
        assert torch.linalg.matrix_rank(layer.weight, rtol=1e-4) == 4
    ids = torch.arange(3, 23)[None]
    with torch.no_grad():
        torch.testing.assert_close(loaded(ids).logits, trainer.model.eval()(ids).logits)


def test_what_it_cannot_do_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"LowRankTraining\(.*earliest=0\.6.*earliest is after latest\. Lower it"):
        LowRankTraining(earliest=0.6)
    with pytest.raises(
        ValueError, match=r"LowRankTraining\(.*does not support PeftModel because adapters are thin.*Remove one"
    ):
        prepared(LowRankTraining(), add_adapters(tiny_llama(), rank=4, alpha=8))
    with pytest.raises(ValueError, match=r"rank_ratio=0\.9.*no trainable linear layer.*Lower rank_ratio"):
        prepared(LowRankTraining(rank_ratio=0.9), tiny_llama())
    with pytest.raises(ValueError, match=r"no trainable linear layer in a block"):
        prepared(LowRankTraining(), tiny_llama().requires_grad_(False))
    for settings in ({"ddp_find_unused_parameters": False}, {"gradient_checkpointing": True}):
        with pytest.raises(ValueError, match=r"so DDP must look for them"):
            prepared(LowRankTraining(), tiny_llama(), world_size=2, **settings)
    with pytest.raises(ValueError, match=r"both claim the form of the weight matrices"):
        tiny_trainer([LowRankTraining(), LoRA(rank=4)], tmp_path).train()
