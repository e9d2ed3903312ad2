import itertools
import random
from dataclasses import dataclass
from types import SimpleNamespace

import datasets
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForMaskedLM

from hf_accel import AccelTrainer, Technique
from hf_accel.batch import ORDER, MicroBatch
from hf_accel.data.batching.packing import Packing, best_fit_decreasing
from hf_accel.features.truncation import truncate
from hf_accel.losses import head_of
from hf_accel.testing import (
    CountingText,
    collate_padded,
    largest_difference,
    losses_of,
    tiny_llama,
    tiny_trainer,
    weights_of,
)

LENGTHS = (5, 1, 9, 3, 4, 2)


def features(lengths=LENGTHS, seed=0):
    generator = torch.Generator().manual_seed(seed)
    rows = [torch.randint(3, 48, (n,), generator=generator).tolist() for n in lengths]
    return [{"input_ids": row, "labels": [-100 if token % 5 == 0 else token for token in row]} for row in rows]


def packing(model=None, width=9, **fields):
    technique = Packing(**fields)
    technique.run_ = SimpleNamespace(args=SimpleNamespace(device=torch.device("cpu"), use_cache=False))
    technique.inspect_dataset([{"input_ids": [0] * width}])
    model = model or tiny_llama(0.0)
    technique.prepare_model(model)
    technique.on_train_begin(SimpleNamespace(torch_compile=False), None, None, model=model)
    return technique


def fewest_rows(lengths, capacity):
    """By trying every assignment."""
    for number in range(1, len(lengths) + 1):
        for assignment in itertools.product(range(number), repeat=len(lengths)):
            sums = [0] * number
            for row, length in zip(assignment, lengths, strict=True):
                sums[row] += length
            if max(sums) <= capacity:
                return number
    raise AssertionError


def test_rows_hold_every_example_once_and_are_few():
    rng = random.Random(0)
    for _ in range(40):
        capacity = rng.randint(4, 12)
        lengths = [rng.randint(1, capacity) for _ in range(rng.randint(1, 6))]
        rows = best_fit_decreasing(lengths, capacity)
        assert sorted(i for row in rows for i in row) == list(range(len(lengths)))
        assert all(sum(lengths[i] for i in row) <= capacity for row in rows)
        assert len(rows) <= 11 / 9 * fewest_rows(lengths, capacity) + 6 / 9  # the bound of Dosa (2007)
    # The fullest row that has room, not the first.
    assert best_fit_decreasing([6, 5, 4, 3, 2], 10) == [[0, 2], [1, 3, 4]]
    assert best_fit_decreasing([8, 7, 3, 2], 10) == [[0, 3], [1, 2]]


def test_the_rows_are_those_of_the_definition():
    technique = packing(width=4)
    rows = [{"input_ids": row, "labels": list(row)} for row in ([7], [5, 6], [1, 2, 3, 4])]
    packed = technique.collate(rows, collate_padded)
    assert packed.pop(ORDER).tolist() == [2, 1, 0]
    assert {name: value.tolist() for name, value in packed.items()} == {
        "input_ids": [[1, 2, 3, 4], [5, 6, 7, 0]],
        "position_ids": [[0, 1, 2, 3], [0, 1, 0, 1]],
        "labels": [[-100, 2, 3, 4], [-100, 6, -100, -100]],
        "attention_mask": [[1, 1, 1, 1], [1, 1, 1, 0]],
    }
    technique.in_one_row_ = True  # as flash attention wants it
    assert technique.collate(rows, collate_padded)["input_ids"].tolist() == [[1, 2, 3, 4, 5, 6, 7, 0]]


def tiny(kind, attention, **fields):
    torch.manual_seed(0)
    fields = {"vocab_size": 48, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "use_cache": False} | fields
    config = AutoConfig.for_model(kind, **fields)
    return AutoModelForCausalLM.from_config(config, attn_implementation=attention).double()


GPT2 = {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 64, "attn_pdrop": 0.0, "embd_pdrop": 0.0}
GPT2 |= {"resid_pdrop": 0.0}
LLAMA = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
MODELS = [("llama", "sdpa", LLAMA), ("llama", "eager", LLAMA), ("gpt2", "sdpa", GPT2)]
MODELS += [("mistral", "sdpa", LLAMA | {"num_key_value_heads": 2, "sliding_window": 4})]


@pytest.mark.parametrize("one_row", [False, True])
@pytest.mark.parametrize(("kind", "attention", "fields"), MODELS)
def test_losses_and_gradient_of_each_example_are_those_of_the_padded_batch(kind, attention, fields, one_row):
    model = tiny(kind, attention, **fields)
    head, technique = head_of(model), packing(model)
    technique.in_one_row_ = one_row
    packed = technique.collate(features(), collate_padded)
    order = packed.pop(ORDER)
    assert packed["input_ids"].shape == ((1, 27) if one_row else (3, 9))
    given = {name: value for name, value in packed.items() if name != "attention_mask"}
    found = []
    for inputs, expected in ((collate_padded(features()), torch.arange(6)), (given, order)):
        model.zero_grad()
        outputs = model(**head.without_labels(model, inputs))
        losses = head.losses(outputs, inputs, len(LENGTHS))
        losses.losses_BL.sum().backward()
        per_example = torch.empty(6)
        per_example[expected] = losses.per_example(6)
        found.append((per_example, head.count(inputs), [p.grad.clone() for p in model.parameters()]))
    in_float32 = attention == "eager"  # the softmax of Llama, whatever the dtype of the model
    rtol, atol = (1e-5, 1e-5) if in_float32 else (1e-9, 1e-12)
    torch.testing.assert_close(found[0], found[1], rtol=rtol, atol=atol)


def test_nothing_crosses_between_examples_or_from_the_padding():
    model = tiny("llama", "sdpa", **LLAMA).eval()
    packed = packing(model).collate(features(), collate_padded)
    inputs = {name: packed[name] for name in ("input_ids", "position_ids")}
    with torch.no_grad():
        before = model(**inputs).logits
        for row, column in itertools.product(range(3), range(9)):
            changed = {**inputs, "input_ids": inputs["input_ids"].clone()}
            changed["input_ids"][row, column] = (changed["input_ids"][row, column] + 1) % 48
            moved = (model(**changed).logits != before).any(-1)
            later = inputs["position_ids"][row, column:]
            end = next((i for i in range(1, len(later)) if later[i] == 0), len(later))
            expected = torch.zeros_like(moved)
            expected[row, column : column + end] = True
            assert torch.equal(moved, expected)


@dataclass(eq=False)
class Watch(Technique):
    """Sees every example's loss."""

    def on_train_begin(self, args, state, control, **kwargs):
        self.seen_ = []

    def observe(self, ids_B, losses_B):
        self.seen_ += zip(ids_B.tolist(), losses_B.tolist(), strict=True)


def test_a_run_is_that_of_padded_batches(tmp_path):
    runs = []
    for techniques in ([Watch()], [Watch(), Packing()], [Watch(), Packing(max_length=50)]):
        args = {"dropout": 0.0, "dtype": torch.float64, "max_steps": 8, "micro_batch_size": 5}
        trainer = tiny_trainer(techniques, tmp_path, **args)
        trainer.train()
        runs.append(trainer)
    padded = dict(runs[0].techniques[0].seen_)
    for run in runs[1:]:
        assert largest_difference(weights_of(run), weights_of(runs[0])) < 1e-9
        assert losses_of(run) == pytest.approx(losses_of(runs[0]), rel=1e-6)
        assert dict(run.techniques[0].seen_) == pytest.approx(padded, rel=1e-5)
        assert run.receipt.tokens == runs[0].receipt.tokens
    assert runs[2].receipt.techniques[1]["report"]["examples_per_row"] > 2


def test_truncated_rows_hold_the_beginnings():
    packed = packing().collate(features(), collate_padded)
    packed.pop(ORDER)
    whole = [row["input_ids"] for row in features()]
    for length in (2, 3, 5, 9):
        shorter = truncate(packed, length)
        ids, positions, mask = (shorter[name] for name in ("input_ids", "position_ids", "attention_mask"))
        found = []
        for row in range(3):
            assert mask[row].sort(descending=True).values.equal(mask[row])
            for i in range(int(mask[row].sum())):
                if positions[row, i] == 0:
                    found.append([])
                found[-1].append(int(ids[row, i]))
            used = int(mask[row].sum())
            assert (positions[row, used:].diff() == 1).all() and (positions[row, used:] > 0).all()
            assert (shorter["labels"][row, used:] == -100).all()
        assert sorted(found) == sorted(row[:length] for row in whole)
        assert ids.shape[1] == int(mask.sum(1).max())


def test_what_does_not_fit_is_refused():
    rows = [{"input_ids": [0] * n} for n in (3, 12)]
    with pytest.raises(
        ValueError, match=r"Packing\(max_length=8\) does not support an example of 12 tokens\. Set max_length=12"
    ):
        Packing(max_length=8).inspect_dataset(rows)
    with pytest.raises(ValueError, match=r"Packing\(max_length=8\) does not support an example of 9 tokens"):
        packing(width=3, max_length=8).collate(features(), collate_padded)
    with pytest.raises(
        ValueError,
        match=r"Packing\(max_length=65\) does not support rows of 65 tokens because the model has 64 positions",
    ):
        packing(max_length=65)
    stream = datasets.Dataset.from_list(rows).to_iterable_dataset()
    with pytest.raises(
        ValueError, match=r"Packing\(max_length=None\) does not support IterableDataset .* Set max_length="
    ):
        Packing().inspect_dataset(stream)
    fields = {"vocab_size": 48, **LLAMA, "max_position_embeddings": 64}
    bert = AutoModelForMaskedLM.from_config(AutoConfig.for_model("bert", **fields))
    with pytest.raises(
        ValueError,
        match=r"Packing\(.*\) does not support BertForMaskedLM.*depends on the one before. Use PaddingFree",
    ):
        Packing().prepare_model(bert)


def test_a_given_length_needs_no_token_ids():
    for rows in ([{"text": "a b"}], datasets.Dataset.from_dict({"text": ["a b"]})):
        technique = Packing(max_length=8)
        technique.inspect_dataset(rows)
        assert technique.width_ == 8
        with pytest.raises(ValueError, match=r"no column 'input_ids'.*Set max_length="):
            Packing().inspect_dataset(rows)


def test_it_packs_a_stream(tmp_path):
    args = tiny_trainer([], tmp_path, max_steps=6).args
    rows = datasets.Dataset.from_list([CountingText()[i] for i in range(40)]).to_iterable_dataset()
    runs = []
    for techniques in ([Watch()], [Watch(), Packing(max_length=24)]):
        model = tiny_llama(0.0, torch.float64)
        runs.append(AccelTrainer(model, args, train_dataset=rows, data_collator=collate_padded, techniques=techniques))
        runs[-1].train()
    assert largest_difference(weights_of(runs[0]), weights_of(runs[1])) < 1e-9


def test_it_reports_how_full_rows_are():
    technique = packing()
    packed = technique.collate(features(), collate_padded)
    packed.pop(ORDER)
    technique.transform_batch(SimpleNamespace(micro_batches=[MicroBatch(packed, torch.arange(6), None)]))
    assert technique.report() == {"examples_per_row": 2.0, "padding": pytest.approx(1 - 24 / 27)}
    assert technique.took_effect(technique.report())
    other = packing()
    other.load_state_dict("rank", technique.state_dict("rank"))
    assert other.report() == technique.report()
