import pytest
import torch
import torch.nn.functional as F
from transformers import Trainer

from hf_accel import AccelTrainer, SelectiveLanguageModeling
from hf_accel.optim.objective.selective_language_modeling import select_tokens
from hf_accel.testing import (
    CountingText,
    collate_padded,
    largest_difference,
    tiny_llama,
    tiny_teacher,
    tiny_tokenizer,
    tiny_trainer,
    weights_of,
)

TEACHER = "hf_accel.testing:tiny_teacher"


def by_hand(scores, keep):
    """Weights of one example's items: a sort in Python."""
    kept = max(round(keep * len(scores)), 1)
    best = sorted(range(len(scores)), key=lambda i: (-scores[i], i))[:kept]
    return [len(scores) / kept if i in best else 0.0 for i in range(len(scores))]


@pytest.mark.parametrize("keep", [0.01, 0.3, 0.6, 1.0])
def test_the_selection_is_a_sort_of_each_example(keep):
    for seed in range(20):
        generator = torch.Generator().manual_seed(seed)
        scores = torch.randint(6, (3, 11), generator=generator).double()  # with many equal ones
        mask = torch.rand(3, 11, generator=generator) < 0.7
        examples = torch.tensor([[0] * 4 + [1] * 7, [2] * 11, [4] * 11])  # two in a row; 3 has no items
        scores[~mask] = torch.nan
        found = select_tokens(scores, mask, examples, keep)
        assert (found[~mask] == 0).all()
        for example in (0, 1, 2, 4):
            items = mask & (examples == example)
            assert found[items].tolist() == by_hand(scores[items].tolist(), keep)


def test_no_items_have_no_weights():
    nothing = torch.zeros(2, 3, dtype=torch.bool)
    assert select_tokens(torch.ones(2, 3), nothing, torch.zeros(2, 3, dtype=torch.long), 0.5).sum() == 0


@pytest.mark.parametrize("reference", [None, TEACHER])
@pytest.mark.parametrize("size", [8, 3])
def test_the_gradient_is_that_of_a_loop(size, reference, tmp_path):
    exact = {"dropout": 0.0, "dtype": torch.float64}
    technique = SelectiveLanguageModeling(keep=0.4, reference=reference)
    trainer = tiny_trainer(
        [technique], tmp_path, max_steps=1, max_grad_norm=0.0, optim="sgd", micro_batch_size=size, **exact
    )
    before = weights_of(trainer)
    trainer.train()

    model, teacher = tiny_llama(**exact), tiny_teacher()
    ids = torch.randperm(64, generator=torch.Generator().manual_seed(7))[:8]
    total, count, kept = torch.zeros((), dtype=torch.float64), 0, 0
    for i in ids.tolist():
        single = collate_padded([CountingText()[i]])
        labels = single["labels"][0, 1:]
        losses = F.cross_entropy(model(**single).logits[0, :-1], labels, reduction="none")
        scores = losses.detach()
        if reference is not None:
            scores = scores - F.cross_entropy(teacher(**single).logits[0, :-1], labels, reduction="none").detach()
        weights = torch.tensor(by_hand(scores.tolist(), 0.4), dtype=torch.float64)
        total, count, kept = total + (weights * losses).sum(), count + len(labels), kept + int((weights > 0).sum())
    (total / count).backward()
    expected = {name: before[name] - 5e-3 * p.grad for name, p in model.named_parameters()}
    assert largest_difference({n: v for n, v in weights_of(trainer).items() if n in expected}, expected) < 1e-8
    assert trainer.receipt.techniques[0]["report"] == {"kept": kept / count}


def test_the_reference_is_charged(tmp_path):
    runs = [tiny_trainer([SelectiveLanguageModeling(reference=r)], tmp_path, max_steps=3) for r in (None, TEACHER)]
    for trainer in runs:
        trainer.train()
    assert runs[1].receipt.flops == pytest.approx(runs[0].receipt.flops * (1 + 2 / 6))


def test_with_all_tokens_the_weights_are_the_trainers(tmp_path):
    runs = []
    for trainer_class, techniques in ((Trainer, []), (AccelTrainer, [SelectiveLanguageModeling(keep=1.0)])):
        runs.append(tiny_trainer(techniques, tmp_path, max_steps=6, trainer_class=trainer_class))
        runs[-1].train()  # a trainer's constructor seeds
    assert largest_difference(*map(weights_of, runs)) == 0.0


def test_what_has_no_tokens_is_refused(tmp_path):
    with pytest.raises(
        ValueError, match="SelectiveLanguageModeling.*ConvNextForImageClassification .* no loss for each token"
    ):
        tiny_trainer([SelectiveLanguageModeling()], tmp_path, modality="image").train()


def test_a_reference_of_a_longer_vocabulary_needs_the_same_tokenizer(tmp_path):
    reference = tiny_teacher()
    reference.resize_token_embeddings(64)
    reference.save_pretrained(tmp_path / "reference")
    trainer = tiny_trainer([SelectiveLanguageModeling(reference=str(tmp_path / "reference"))], tmp_path, max_steps=2)
    trainer.processing_class = tiny_tokenizer()
    with pytest.raises(
        ValueError, match="has 64 tokens, and the model has 48. Give one with the same vocabulary, or the"
    ):
        trainer.train()
    tiny_tokenizer().save_pretrained(tmp_path / "reference")
    trainer.train()
    assert trainer.receipt.techniques[0]["report"]["kept"] < 1
