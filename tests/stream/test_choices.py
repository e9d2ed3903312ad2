"""What the owners of the stream's slots return is checked before it is trained on."""

import pytest
import torch

from hf_accel import InfoBatch
from hf_accel.stream.choices import check_order, check_selection

OWNER = InfoBatch()
IDS = torch.tensor([0, 2, 2, 3])


@pytest.mark.parametrize("weights", [None, torch.ones(4)])
def test_ascending_ids_pass(weights):
    check_selection(OWNER, (IDS, weights), 0, 4)
    check_order(OWNER, IDS.flip(0), IDS, 4)


@pytest.mark.parametrize(
    ("selection", "words"),
    [
        (IDS, "returned a Tensor. Return ids and weights"),
        ((IDS.tolist(), None), "returned list. Return ids as an int64 tensor"),
        ((torch.ones(4, dtype=torch.bool), None), r"returned torch.bool of shape \(4,\)"),
        ((IDS[None], None), r"of shape \(1, 4\)"),
        ((IDS + 1, None), "returned id 4. Return ids from 0 to 3"),
        ((IDS - 1, None), "returned id -1"),
        ((IDS.flip(0), None), "out of order"),
        ((IDS[:0], None), "chose no example of epoch 5"),
        ((IDS, torch.ones(3)), r"weights of shape \(3,\) for 4 ids"),
    ],
)
def test_other_selections_are_refused(selection, words):
    with pytest.raises(ValueError, match=r"InfoBatch\(.*" + words):
        check_selection(OWNER, selection, 5, 4)


def test_an_order_has_as_many_ids():
    with pytest.raises(ValueError, match="order returned 3 ids for 4"):
        check_order(OWNER, IDS[:3], IDS, 4)
