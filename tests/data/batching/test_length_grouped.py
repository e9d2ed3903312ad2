from collections import Counter
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from hf_accel.data.batching.length_grouped import LengthGrouped, group_by_length
from hf_accel.testing import collate_padded, tiny_trainer


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize(("num", "batch", "mega"), [(103, 4, 5), (40, 8, 50), (7, 8, 3), (64, 4, 4)])
def test_batches_are_those_of_sorted_groups_in_another_order(num, batch, mega):
    lengths = torch.randint(1, 40, (num,), generator=generator(1))
    order = group_by_length(lengths, batch, mega, generator()).tolist()
    shuffled = torch.randperm(num, generator=generator()).tolist()
    expected = []
    for start in range(0, num, batch * mega):
        expected += sorted(shuffled[start : start + batch * mega], key=lambda i: -lengths[i])
    cut = [tuple(expected[i : i + batch]) for i in range(0, num, batch)]
    got = [tuple(order[i : i + batch]) for i in range(0, num, batch)]
    assert Counter(got) == Counter(cut) and got[-1] == cut[-1]
    assert len(cut) < 6 or got != cut
    if len(got) > 1:
        assert max(map(int, lengths[list(got[0])])) == max(int(lengths[i]) for b in got[:-1] for i in b)


def test_one_step_groups_are_the_shuffled_order_itself():
    lengths = torch.randint(1, 9, (50,), generator=generator(1))
    assert torch.equal(group_by_length(lengths, 4, 1, generator()), torch.randperm(50, generator=generator()))


def test_what_does_not_fill_a_step_is_not_always_the_shortest(tmp_path):
    """Steps of 6 of 64 examples leave 4 out, which change from epoch to epoch; all others are grouped as ever."""
    technique = LengthGrouped(mega_batch=4)
    trainer = tiny_trainer([technique], tmp_path, dataloader_drop_last=True, per_device_train_batch_size=6)
    stream, left_out = trainer.get_train_dataloader(), Counter()
    for epoch in range(40):
        stream.set_epoch(epoch)
        assert len(stream.ids_N) == 60
        left_out.update(set(range(64)) - set(stream.ids_N.tolist()))
    assert len(left_out) > 50 and max(left_out.values()) < 12
    lengths = torch.randint(1, 40, (64,), generator=generator(1))
    orders = [group_by_length(lengths, 8, 3, generator(), drop_last) for drop_last in (False, True)]
    assert torch.equal(*orders)


def test_it_orders_what_was_selected_and_reports_the_padding_it_saved():
    rows = [{"input_ids": [0] * int(n)} for n in torch.randint(1, 60, (200,), generator=generator(2))]
    technique, other = LengthGrouped(mega_batch=10), LengthGrouped()
    args = SimpleNamespace(length_column_name="length", dataloader_drop_last=False)
    technique.run_ = other.run_ = SimpleNamespace(args=args)
    technique.inspect_dataset(rows)
    ids = torch.arange(0, 200, 3)
    order = technique.order(ids, 4, generator())
    assert sorted(order.tolist()) == ids.tolist()
    report = technique.report()
    assert technique.took_effect(report)

    def padding(ids):
        batches = [[len(rows[i]["input_ids"]) for i in ids[j : j + 4]] for j in range(0, len(ids), 4)]
        return 1 - sum(map(sum, batches)) / sum(max(b) * len(b) for b in batches)

    assert report["padding"] == pytest.approx(padding(order.tolist()))
    assert report["padding_shuffled"] == pytest.approx(padding(ids[torch.randperm(len(ids), generator=generator())]))
    other.inspect_dataset(rows)
    other.load_state_dict("global", technique.state_dict("global"))
    assert other.report() == report


def test_a_collator_that_pads_to_a_multiple_makes_few_shapes(tmp_path):
    def collate(features):
        batch = collate_padded(features)
        beyond = -batch["input_ids"].shape[1] % 8
        return {name: F.pad(value, (0, beyond), value=-100 if name == "labels" else 0) for name, value in batch.items()}

    trainer = tiny_trainer([LengthGrouped(mega_batch=8)], tmp_path)
    trainer.data_collator = collate
    widths = []
    trainer.model.register_forward_pre_hook(
        lambda module, _, inputs: widths.append(inputs["input_ids"].shape[1]), with_kwargs=True
    )
    trainer.train()
    assert set(widths) == {8, 16, 24}
    assert sum(widths) / len(widths) < 20  # of 24, as long as the longest example of most shuffled batches


def test_seconds_are_grouped_and_padding_in_the_data_set_is_named(caplog):
    technique = LengthGrouped(mega_batch=10)
    technique.run_ = SimpleNamespace(args=SimpleNamespace(length_column_name="length", dataloader_drop_last=False))
    seconds = (torch.rand(40, generator=generator(3)) * 9).tolist()
    technique.inspect_dataset([{"length": s} for s in seconds])
    order = technique.order(torch.arange(40), 4, generator()).tolist()
    batches = [sorted(seconds[i] for i in order[j : j + 4]) for j in range(0, 40, 4)]
    assert sorted(map(tuple, batches)) == [tuple(sorted(seconds)[j : j + 4]) for j in range(0, 40, 4)]

    rows = [{"input_ids": [1] * 8, "attention_mask": [1] * n + [0] * (8 - n)} for n in (2, 4, 8, 2)]
    with caplog.at_level("WARNING"):
        technique.inspect_dataset(rows)
    assert "padded to 8 positions" in caplog.text and "padding=False" in caplog.text
    technique.order(torch.arange(4), 2, generator())
    assert technique.report() == {"padding": 0.5, "padding_shuffled": 0.5}
