import json
import math

import datasets
import pytest
import torch
import torch.nn.functional as F
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    PreTrainedTokenizerFast,
    Trainer,
)

from hf_accel import AccelTrainer, Distillation, SequenceLengthWarmup, Technique
from hf_accel.optim.objective.distillation import divergence, hidden_difference, most_likely
from hf_accel.surgery.frozen_model import check_same_classes
from hf_accel.testing import (
    CountingText,
    collate_padded,
    largest_difference,
    losses_of,
    tiny_convnext,
    tiny_llama,
    tiny_teacher,
    tiny_tokenizer,
    tiny_trainer,
    weights_of,
)

TEACHER = "hf_accel.testing:tiny_teacher"
EXACT = {"dropout": 0.0, "dtype": torch.float64}


def other_convnext():
    return tiny_convnext(dropout=0.0, seed=1)


def longer_vocabulary():
    model = tiny_llama()
    model.resize_token_embeddings(50)
    return model


def probabilities(logits, temperature):
    powers = [math.exp(z / temperature) for z in logits]
    return [power / sum(powers) for power in powers]


def by_hand(student, teacher, temperature, k=None):
    """T^2 sum_c p_c log(p_c / q_c), with all but the k likeliest classes of the teacher as one."""
    p, q = probabilities(teacher, temperature), probabilities(student, temperature)
    if k is not None:
        kept = sorted(range(len(p)), key=lambda c: -p[c])[:k]
        p, q = ([values[c] for c in kept] + [1 - sum(values[c] for c in kept)] for values in (p, q))
    return temperature**2 * sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))


def logits(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * 2


@pytest.mark.parametrize("temperature", [1.0, 2.0, 5.0])
@pytest.mark.parametrize("k", [None, 1, 3, 6])
def test_the_divergence_is_its_closed_form(temperature, k):
    student, teacher = logits(0, 5, 7), logits(1, 5, 7)
    found = divergence(student, *most_likely(teacher, k, temperature), temperature)
    expected = [by_hand(*rows, temperature, k) for rows in zip(student.tolist(), teacher.tolist(), strict=True)]
    assert torch.allclose(found, torch.tensor(expected, dtype=torch.float64), rtol=1e-10, atol=1e-13)


def test_all_classes_are_kept_where_k_is_their_number():
    student, teacher = logits(0, 5, 7), logits(1, 5, 7)
    whole = divergence(student, *most_likely(teacher, None, 2.0), 2.0)
    for k in (7, 100):
        assert torch.equal(divergence(student, *most_likely(teacher, k, 2.0), 2.0), whole)
    assert (divergence(student, *most_likely(teacher, 3, 2.0), 2.0) < whole).all()
    for k in (None, 3):
        assert divergence(teacher, *most_likely(teacher, k, 2.0), 2.0).abs().max() < 1e-15


def test_the_gradient_is_the_difference_of_probabilities():
    student, teacher = logits(0, 5, 7).requires_grad_(), logits(1, 5, 7)
    divergence(student, *most_likely(teacher, None, 3.0), 3.0).sum().backward()
    assert torch.allclose(student.grad, 3.0 * ((student / 3).softmax(-1) - (teacher / 3).softmax(-1)))


def test_blocks_are_compared_at_equal_depth():
    student = [logits(i, 2, 3, 4) for i in range(3)]
    teacher = [logits(10 + i, 2, 3, 4) for i in range(7)]
    expected = torch.zeros(2, 3, dtype=torch.float64)
    for ours, theirs in ((0, 0), (1, 3), (2, 6)):
        for c in range(4):
            expected += (student[ours][..., c] - teacher[theirs][..., c]) ** 2 / (3 * 4)
    assert torch.allclose(hidden_difference(student, teacher), expected)


# In training ----------------------------------------------------------------------------------------------------------


class Thrice(Technique):
    """Every example counts three times."""

    def __init__(self):
        pass

    def select(self, epoch, num_examples, generator):
        return torch.arange(num_examples), torch.full((num_examples,), 3.0)


def first_gradient(techniques, tmp_path, **settings):
    """The gradient of the first update, before clipping, by name."""
    trainer = tiny_trainer(techniques, tmp_path, max_steps=1, max_grad_norm=0.0, **(EXACT | settings))
    gradients = {}

    def spy(model, grad_norm=None):
        gradients.update({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})
        return type(trainer)._get_grad_norm(trainer, model, grad_norm)

    trainer._get_grad_norm = spy
    trainer.train()
    return gradients


def first_examples(data, n=8):
    ids = torch.randperm(64, generator=torch.Generator().manual_seed(7))[:n]
    return [data[int(i)] for i in ids]


@pytest.fixture(scope="module")
def expected():
    """Gradients of the first eight texts, by a loop over tokens: of the labels, the teacher and the hidden states."""
    batch = collate_padded(first_examples(CountingText()))
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")} | {"output_hidden_states": True}
    teacher = tiny_teacher().eval()
    with torch.no_grad():
        theirs = teacher(**inputs)
    parts = []
    for part in range(3):
        model = tiny_llama(**EXACT)
        ours = model(**inputs)
        total, count = torch.zeros((), dtype=torch.float64), 0
        for row in range(8):
            for t in range(batch["labels"].shape[1] - 1):
                if (label := batch["labels"][row, t + 1]) == -100:
                    continue
                count += 1
                z, z_t = ours.logits[row, t], theirs.logits[row, t].double()
                if part == 0:
                    total = total + F.cross_entropy(z, label)
                elif part == 1:
                    p, q = (z_t / 3).softmax(-1), (z / 3).softmax(-1)
                    total = total + 9 * (p * (p / q).log()).sum()
                else:
                    for a, b in zip(ours.hidden_states, theirs.hidden_states, strict=True):
                        total = total + ((a[row, t] - b[row, t].double()) ** 2).mean() / 5
        (total / count).backward()
        parts.append({n: p.grad if p.grad is not None else torch.zeros_like(p) for n, p in model.named_parameters()})
    return parts


@pytest.mark.parametrize(("size", "hidden", "factor"), [(8, 0.0, 1), (3, 0.5, 1), (8, 0.5, 3)])
def test_the_gradient_is_that_of_a_loop(size, hidden, factor, expected, tmp_path):
    technique = Distillation(TEACHER, temperature=3.0, weight=0.3, hidden=hidden)
    others = [Thrice()] if factor == 3 else []
    found = first_gradient([technique, *others], tmp_path, micro_batch_size=size)
    labels, answers, states = expected
    sums = {n: factor * (0.7 * labels[n] + 0.3 * answers[n] + hidden * states[n]) for n in labels}
    assert largest_difference(found, sums) < 1e-6  # the teacher computes in float32


def test_classes_of_images_have_a_teacher(tmp_path):
    technique = Distillation(f"{__name__}:other_convnext", temperature=3.0, weight=0.3)
    found = first_gradient([technique], tmp_path, modality="image", dtype=torch.float32)
    trainer = tiny_trainer([], tmp_path, modality="image", dropout=0.0)
    rows = first_examples(trainer.train_dataset)
    images, labels = torch.stack([r["pixel_values"] for r in rows]), torch.tensor([r["labels"] for r in rows])
    model = trainer.model
    z, z_t = model(images).logits, other_convnext().eval()(images).logits.detach()
    p, q = (z_t / 3).softmax(-1), (z / 3).softmax(-1)
    (0.7 * F.cross_entropy(z, labels) + 0.3 * 9 * (p * (p / q).log()).sum(-1).mean()).backward()
    assert largest_difference(found, {n: p.grad for n, p in model.named_parameters()}) < 1e-5


@pytest.mark.parametrize("k", [5, 48])
def test_the_cache_says_what_the_teacher_says(k, tmp_path):
    runs = []
    for cache in (None, "answers", "answers"):
        technique = Distillation(TEACHER, top_k=k, cache=cache)
        trainer = tiny_trainer([technique], tmp_path, max_steps=4, micro_batch_size=3)
        trainer.train()
        runs.append(weights_of(trainer))
        assert trainer.receipt.techniques[0]["report"]["cached"] == (64 if cache else 0)
        assert (technique.teacher_ is None) == (cache is not None)
    assert largest_difference(runs[0], runs[1]) < 1e-5
    assert largest_difference(runs[1], runs[2]) == 0.0


def test_a_cache_of_something_else_is_refused(tmp_path):
    tiny_trainer([Distillation(TEACHER, cache="answers")], tmp_path, max_steps=1).train()
    for fields, sentence in [
        ({"temperature": 4.0}, "temperature=2.0, and this run has 4.0. Set cache to another folder"),
        ({"top_k": 3}, "top_k=None, and this run has 3"),
        ({"teacher": None}, "teacher='hf_accel.testing:tiny_teacher', and this run has 'weights of sum"),
    ]:
        technique = Distillation(**({"teacher": TEACHER, "cache": "answers"} | fields))
        with pytest.raises(ValueError, match=f"Distillation.*written with {sentence}"):
            tiny_trainer([technique], tmp_path).train()


class Shorter(Technique):
    """Takes a label from every text."""

    def __init__(self):
        pass

    def transform_batch(self, batch):
        for micro in batch.micro_batches:
            micro.inputs["labels"][:, 1] = -100
        return batch


def test_a_cache_that_does_not_fit_the_inputs_is_refused(tmp_path):
    with pytest.raises(ValueError, match="the cache has .* items of the examples .* augmentation changes them"):
        tiny_trainer([Distillation(TEACHER, cache="answers"), Shorter()], tmp_path, max_steps=1).train()


def test_the_teacher_is_charged_and_stays_out_of_the_model(tmp_path):
    plain = tiny_trainer([], tmp_path, trainer_class=Trainer, max_steps=4)
    plain.train()
    taught = tiny_trainer([Distillation(TEACHER)], tmp_path, max_steps=4)
    taught.train()
    entry = taught.receipt.techniques[0]
    assert entry["seconds"] > 0 and entry["report"]["divergence"] > 0
    # 2 operations a parameter and position for the teacher, 6 for the model of the same size.
    assert taught.receipt.flops == pytest.approx(plain.state.total_flos * (1 + 2 / 6))
    taught.save_model(str(tmp_path / "saved"))
    assert {name for name, _ in taught.model.named_parameters()} == {n for n, _ in tiny_llama().named_parameters()}
    assert json.loads((tmp_path / "saved" / "config.json").read_text()).get("output_hidden_states") is None
    assert (tmp_path / "saved" / "model.safetensors").stat().st_size < 1.1 * sum(
        4 * p.numel() for p in taught.model.parameters()
    )


def test_with_no_weight_the_weights_are_the_trainers(tmp_path):
    runs = []
    for trainer_class, techniques in ((Trainer, []), (AccelTrainer, [Distillation(TEACHER, weight=0.0)])):
        runs.append(tiny_trainer(techniques, tmp_path, max_steps=6, trainer_class=trainer_class))
        runs[-1].train()  # a trainer's constructor seeds
    assert largest_difference(*map(weights_of, runs)) == 0.0


def test_without_a_teacher_the_model_stays_near_what_it_was(tmp_path):
    initial = weights_of(tiny_trainer([], tmp_path))
    distances = []
    for weight in (0.2, 0.95):
        technique = Distillation(weight=weight)
        trainer = tiny_trainer([technique], tmp_path, max_steps=12)
        trainer.train()
        assert largest_difference(initial, dict(technique.initial_.state_dict())) == 0.0
        distances.append(trainer.receipt.techniques[0]["report"]["divergence"])
    assert distances[1] < 0.7 * distances[0]


def test_a_teacher_comes_from_a_folder(tmp_path):
    tiny_teacher().save_pretrained(tmp_path / "teacher")
    runs = []
    for teacher in (TEACHER, str(tmp_path / "teacher")):
        runs.append(tiny_trainer([Distillation(teacher)], tmp_path, max_steps=2))
        runs[-1].train()
    assert largest_difference(*map(weights_of, runs)) == 0.0


# What is refused ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "settings", "sentence"),
    [
        ({"teacher": "/no/such"}, {}, "'/no/such' cannot be loaded .* Give the folder or the id of a model"),
        ({"teacher": "hf_accel.testing:none"}, {}, "returns no model .* Name a function"),
        ({"teacher": "hf_accel.testing:CountingText"}, {}, "returns a CountingText. It must return a PreTrainedModel"),
        (
            {"teacher": f"{__name__}:longer_vocabulary"},
            {},
            "has 50 tokens, and the model has 48. Give one with the same",
        ),
        ({"teacher": f"{__name__}:other_convnext"}, {}, "is not a model for causal LM, but LlamaForCausalLM is"),
        ({"cache": "a", "hidden": 1.0}, {}, "the cache does not hold hidden states"),
        ({"cache": "a"}, {"modality": "masked text"}, "masks differ each time"),
        ({"hidden": 1.0}, {"modality": "image"}, "hidden states have a width of None"),
    ],
)
def test_what_cannot_be_learned_from_is_refused_before_the_first_step(fields, settings, sentence, tmp_path):
    trainer = tiny_trainer([Distillation(**fields)], tmp_path, **settings)
    with pytest.raises(ValueError, match=f"Distillation\\(.*{sentence}"):
        trainer.train()
    assert trainer.state.global_step == 0


def test_numbers_have_no_distribution(tmp_path):
    sizes = dict(vocab_size=50, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8)
    model = BertForSequenceClassification(BertConfig(**sizes, num_labels=1))
    with pytest.raises(ValueError, match="support BertForSequenceClassification .* not choose one of several classes"):
        tiny_trainer([Distillation()], tmp_path, model=model).train()


def test_labels_in_another_order_are_refused():
    model, other = tiny_convnext(), tiny_convnext()
    for order, names in ((model, "abcd"), (other, "abdc")):
        order.config.id2label = dict(enumerate(names))
    with pytest.raises(ValueError, match="'x' has the labels in another order"):
        check_same_classes(Distillation("x"), "x", other, model)
    other.config.id2label = dict(enumerate("wxyz"))  # other names for what may be the same
    check_same_classes(Distillation("x"), "x", other, model)


def test_another_tokenizer_is_refused(tmp_path):
    tokenizer = tiny_tokenizer()
    tiny_teacher().save_pretrained(tmp_path / "teacher")
    swapped = json.loads(tokenizer._tokenizer.to_str())
    swapped["model"]["vocab"] |= {"10": 11, "11": 10}
    other = PreTrainedTokenizerFast(tokenizer_object=type(tokenizer._tokenizer).from_str(json.dumps(swapped)))
    for saved, fits in ((tokenizer, True), (other, False)):
        saved.save_pretrained(tmp_path / "teacher")
        trainer = tiny_trainer([Distillation(str(tmp_path / "teacher"))], tmp_path, max_steps=1)
        trainer.processing_class = tokenizer
        if fits:
            trainer.train()
        else:
            with pytest.raises(ValueError, match="has another tokenizer. Give a model of the same vocabulary"):
                trainer.train()


def padded(model, size):
    """The model with more tokens, which its tokenizer does not know."""
    model.resize_token_embeddings(size)
    return model


@pytest.mark.parametrize("fields", [{}, {"top_k": 4}, {"cache": "a"}, {"top_k": 4, "cache": "a"}], ids=str)
def test_a_teacher_whose_vocabulary_is_padded_teaches_what_both_know(fields, tmp_path):
    losses = []
    for size in (48, 64):
        folder = tmp_path / str(size)
        padded(tiny_teacher(), size).save_pretrained(folder)
        tiny_tokenizer().save_pretrained(folder)
        trainer = tiny_trainer([Distillation(str(folder), **fields)], folder / "run", max_steps=3, dropout=0.0)
        trainer.processing_class = tiny_tokenizer()
        trainer.train()
        losses.append(losses_of(trainer))
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)


def test_a_model_whose_vocabulary_is_padded_learns_what_both_know(tmp_path):
    tiny_teacher().save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    student = padded(tiny_llama(dropout=0.0), 56)
    technique = Distillation(str(tmp_path), weight=1.0, temperature=1.0)
    args = {"max_steps": 1, "learning_rate": 0.0, "train_sampling_strategy": "sequential"}
    trainer = tiny_trainer([technique], tmp_path, model=student, **args)
    trainer.processing_class = tiny_tokenizer()
    batch = collate_padded([trainer.train_dataset[i] for i in range(8)])
    with torch.no_grad():
        ours, theirs = (
            m(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
            for m in (student, tiny_teacher())
        )
    here = batch["labels"][:, 1:] != -100
    rows = zip(ours[:, :-1][here][:, :48].tolist(), theirs[:, :-1][here].tolist(), strict=True)
    expected = [by_hand(*row, 1.0) for row in rows]
    trainer.train()
    assert losses_of(trainer) == pytest.approx([sum(expected) / len(expected)], rel=1e-5)


def test_answers_for_another_number_of_classes_are_refused(tmp_path):
    tiny_trainer([Distillation(TEACHER, cache=str(tmp_path / "a"))], tmp_path, max_steps=1).train()
    trainer = tiny_trainer([Distillation(TEACHER, cache=str(tmp_path / "a"))], tmp_path, model=longer_vocabulary())
    with pytest.raises(ValueError, match="was written with classes=48, and this run has 50"):
        trainer.train()


def test_a_cache_needs_indices(tmp_path):
    trainer = tiny_trainer([Distillation(cache="a")], tmp_path, max_steps=2)
    trainer.train_dataset = datasets.Dataset.from_list([CountingText()[0]]).to_iterable_dataset()
    with pytest.raises(ValueError, match="it chooses examples by index"):
        trainer.train()


def test_the_teacher_answers_in_the_precision_of_the_run(tmp_path):
    trainer, seen = tiny_trainer([Distillation(TEACHER)], tmp_path, bf16=True, max_steps=1), set()
    technique = trainer.techniques[0]
    technique.inspect_dataset(trainer.train_dataset)
    layer = technique.teacher_.model.layers[0].mlp.up_proj
    layer.register_forward_hook(lambda module, inputs, output: seen.add(output.dtype))
    technique._load_teacher = lambda: technique.teacher_
    technique.inspect_dataset = lambda dataset: None
    trainer.train()
    assert seen == {torch.bfloat16} and layer.weight.dtype == torch.float32


def test_the_model_as_it_was_is_moved_to_the_device(tmp_path):
    technique = Distillation()
    trainer = tiny_trainer([technique], tmp_path)
    technique.initial_.to("meta")
    trainer.args.__dict__["_setup_devices"] = torch.device("meta")
    assert {p.device.type for p in technique._load_teacher().parameters()} == {"meta"}


@pytest.mark.parametrize("cut", ["truncate", "rechunk"])
@pytest.mark.parametrize("last", [True, False])
def test_hidden_states_of_texts_that_are_cut(cut, last, tmp_path):
    techniques = [Distillation(TEACHER, hidden=1.0), SequenceLengthWarmup(cut=cut)]
    trainer = tiny_trainer(techniques if last else techniques[::-1], tmp_path, max_steps=3)
    trainer.train()
    assert all(math.isfinite(loss) for loss in losses_of(trainer)) and trainer.receipt.steps == 3
