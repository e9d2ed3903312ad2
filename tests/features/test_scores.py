import pytest
import torch

from hf_accel import ScorePruning
from hf_accel.features.scores import check_classes
from hf_accel.testing import CountingText, collate_padded, tiny_trainer


@pytest.mark.parametrize(
    ("labels", "logits"),
    [
        (torch.tensor([0, 2, -100]), torch.zeros(3, 3)),
        (torch.tensor([7, 9]), torch.zeros(2, 1)),  # numbers
        (torch.tensor([[5, 6], [7, 8]]), torch.zeros(2, 2)),  # numbers of several outputs
        (torch.rand(2, 3), torch.zeros(2, 3)),
    ],
)
def test_labels_of_every_kind_of_loss_pass(labels, logits):
    check_classes(logits, labels)


@pytest.mark.parametrize("label", [3, -1])
def test_a_label_that_is_no_class_is_named(label):
    with pytest.raises(ValueError, match=rf"labels: {label} is not a class of the model, which has 0 to 2"):
        check_classes(torch.zeros(2, 3), torch.tensor([0, label]))


def test_scoring_names_a_label_that_is_no_class_and_restores_the_modes(tmp_path):
    def collate(features):
        batch = collate_padded(features)
        return batch | {"labels": batch["labels"].masked_fill(batch["labels"] == CountingText().rows[9][2], 99)}

    trainer = tiny_trainer([ScorePruning(score="loss")], tmp_path)
    trainer.data_collator = collate
    trainer.model.train()
    with pytest.raises(ValueError, match="labels: 99 is not a class of the model, which has 0 to 47"):
        trainer.train()
    assert trainer.state.global_step == 0 and all(module.training for module in trainer.model.modules())
