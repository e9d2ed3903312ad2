import datasets
import pytest
import torch
from transformers import BertConfig, BertForSequenceClassification, SwinConfig, SwinForImageClassification

from hf_accel.data.sampling.rho_loss import RHOLoss, highest, shallower
from hf_accel.testing import CountingText, collate_padded, largest_difference, tiny_llama, tiny_trainer


class Watched(RHOLoss):
    """Notes what it was given and what it kept."""

    def step_select(self, ids_B, losses_B):
        positions, weights = super().step_select(ids_B, losses_B)
        self.seen_ = [*getattr(self, "seen_", []), (ids_B.tolist(), losses_B.tolist(), positions.tolist())]
        return positions, weights


def by_hand(losses, keep):
    number = max(round(keep * len(losses)), 1)
    return sorted(sorted(range(len(losses)), key=lambda i: (-losses[i], i))[:number])


def test_the_highest_are_those_of_a_sort():
    for seed in range(20):
        values = torch.randint(5, (11,), generator=torch.Generator().manual_seed(seed)).float()
        assert highest(values, 0.3).tolist() == by_hand(values.tolist(), 0.3)


def test_irreducible_losses_come_from_a_column(tmp_path):
    technique = Watched(keep=0.25, column="score")
    trainer = tiny_trainer([technique], tmp_path)
    trainer.train()
    assert len(technique.seen_) == 24 and trainer.receipt.samples == 24 * 2
    scores = CountingText().scores
    for ids, losses, positions in technique.seen_:
        assert len(ids) == 8
        assert positions == by_hand([loss - scores[i] for i, loss in zip(ids, losses, strict=True)], 0.25)


def test_a_smaller_copy_is_trained_on_what_is_held_out(tmp_path):
    technique = RHOLoss(keep=0.5, holdout=0.5, epochs=8)
    trainer = tiny_trainer([technique], tmp_path, per_device_train_batch_size=4)
    before = {name: value.clone() for name, value in trainer.model.state_dict().items()}
    random = torch.random.get_rng_state()
    rest = technique.prepare_dataset(trainer.train_dataset)
    technique.inspect_dataset(rest)
    assert torch.equal(torch.random.get_rng_state(), random)
    assert all(torch.equal(value, before[name]) for name, value in trainer.model.state_dict().items())
    assert len(rest) == len(technique.irreducible_N_) == 32
    assert not technique.irreducible_N_.isnan().any()
    # It has learned: its losses are lower than those of the model that it is a copy of.
    with torch.no_grad():
        own = [trainer.model.eval()(**trainer.data_collator([rest[i]])).loss for i in range(32)]
    assert technique.irreducible_N_.mean() < torch.stack(own).mean() - 0.3
    trainer.train()
    assert trainer.receipt.samples == 3 * 32 * 0.5


def test_the_copy_is_trained_in_micro_batches_of_a_device(tmp_path):
    """Although the model's own are still to be found, from all examples of an update on."""
    trainer = tiny_trainer(
        [technique := RHOLoss(holdout=0.5)],
        tmp_path,
        micro_batch_size="auto",
        per_device_train_batch_size=4,
        gradient_accumulation_steps=4,
    )
    rows = []
    trainer.model.model.embed_tokens.register_forward_pre_hook(
        lambda module, args: rows.append(len(args[0])) if module.training else None
    )
    technique.prepare_dataset(trainer.train_dataset)
    technique._train_small(technique.held_)
    assert trainer.accel.step.micro_batch_size == 16 and set(rows) == {4}


def test_the_copy_is_trained_as_a_loop_by_hand_with_clipped_gradients(tmp_path):
    args = {"max_grad_norm": 0.5, "learning_rate": 1e-2, "weight_decay": 0.1, "per_device_train_batch_size": 4}
    trainer = tiny_trainer(
        [technique := RHOLoss(holdout=0.25, epochs=2, depth=1.0)],
        tmp_path,
        dropout=0.0,
        dtype=torch.float64,
        **args,
    )
    technique.prepare_dataset(trainer.train_dataset)
    found = technique._train_small(technique.held_)

    model = tiny_llama(dropout=0.0, dtype=torch.float64)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1)
    norms, step = [], 0
    for epoch in range(2):
        order = torch.randperm(16, generator=torch.Generator().manual_seed(trainer.args.seed + epoch)).tolist()
        for start in range(0, 16, 4):
            optimizer.param_groups[0]["lr"] = 1e-2 * (1 - step / 8)
            optimizer.zero_grad()
            model(**collate_padded([technique.held_[i] for i in order[start : start + 4]])).loss.backward()
            norms.append(torch.stack([p.grad.norm() for p in model.parameters()]).norm())
            for parameter in model.parameters():
                parameter.grad *= min(0.5 / float(norms[-1]), 1.0)
            optimizer.step()
            step += 1
    assert min(norms) > 0.5
    assert largest_difference(found.state_dict(), model.state_dict()) < 1e-6


def test_the_copy_has_the_first_blocks():
    model = tiny_llama(dropout=0.0)
    small = shallower(model, 0.5)
    assert len(small.model.layers) == small.config.num_hidden_layers == 2
    assert len(model.model.layers) == model.config.num_hidden_layers == 4
    assert torch.equal(small.model.layers[1].mlp.up_proj.weight, model.model.layers[1].mlp.up_proj.weight)
    ids = torch.tensor([[3, 4, 5]])
    whole, states = small(ids).logits, model(ids, output_hidden_states=True).hidden_states
    assert torch.allclose(whole, model.lm_head(model.model.norm(states[2])), atol=1e-6)
    config = BertConfig(vocab_size=20, hidden_size=8, num_hidden_layers=3, num_attention_heads=2, intermediate_size=8)
    assert shallower(BertForSequenceClassification(config), 0.4)(ids).logits.shape == (1, 2)
    # Stages that differ are kept.
    config = SwinConfig(image_size=32, patch_size=4, embed_dim=8, depths=[1, 1], num_heads=[2, 2], window_size=4)
    swin = shallower(SwinForImageClassification(config), 0.5)
    assert swin(torch.zeros(1, 3, 32, 32)).logits.shape == (1, 2)


@pytest.mark.parametrize(
    ("values", "sentence"),
    [([1.0, float("nan")], "1 of 2 scores are nan"), ([1.0, None], "nan")],
)
def test_bad_columns_are_refused(values, sentence, tmp_path):
    technique = RHOLoss(column="il")
    tiny_trainer([technique], tmp_path)
    table = datasets.Dataset.from_dict({"il": values})
    with pytest.raises(ValueError, match=f"RHOLoss.*{sentence}"):
        technique.inspect_dataset(table)


@pytest.mark.parametrize("fields", [{"keep": 0.0}, {"holdout": 1.0}, {"epochs": 0}, {"depth": 0.0}])
def test_a_bad_value_names_itself(fields):
    (name,) = fields
    with pytest.raises(ValueError, match=f"RHOLoss\\({name}="):
        RHOLoss(**fields)
