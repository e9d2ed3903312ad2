import copy
import io

import pytest
import torch
from torch import nn
from transformers import SwinConfig, SwinForImageClassification

from hf_accel import ProgressiveLayerDrop, StochasticDepth
from hf_accel.surgery.block_wrapper import hidden_states, wrap_block
from hf_accel.testing import tiny_bert, tiny_llama, tiny_trainer


class Doubling(nn.Module):
    def forward(self, hidden, mask=None):
        return 2 * hidden


def plus(number):
    return lambda call, args, kwargs: call(*args, **kwargs) + number


def test_functions_run_around_each_other_and_end_in_any_order():
    for first_ends_first in (True, False):
        block, x = Doubling(), torch.ones(1)
        ends = [wrap_block(block, plus(1)), wrap_block(block, lambda call, args, kwargs: 10 * call(*args, **kwargs))]
        assert block(x) == block(hidden=x) == 30 and isinstance(block, Doubling)
        assert type(block).__name__ == "Doubling"
        ends.pop(0 if first_ends_first else 1)()
        assert block(x) == (20 if first_ends_first else 3)
        ends.pop()()
        assert type(block) is Doubling and block(x) == 2


def test_hooks_and_compilation_lie_inside_and_other_blocks_outside():
    block, other, seen = Doubling(), Doubling(), []
    block.register_forward_hook(lambda *_: seen.append("hook"))
    end = wrap_block(block, lambda call, args, kwargs: hidden_states(block, args, kwargs))
    assert block(torch.ones(1)) == block(hidden=torch.ones(1)) == 1 and seen == []
    assert other(torch.ones(1)) == 2
    end()
    assert block(torch.ones(1)) == 2 and seen == ["hook"]


@pytest.mark.parametrize("make", [tiny_llama, tiny_bert])
def test_copies_are_as_the_model_was(make):
    model = make().eval()
    plain, batch = copy.deepcopy(model), {"input_ids": torch.arange(3, 9)[None]}
    blocks = model.model.layers if hasattr(model, "model") else model.bert.encoder.layer
    kind = type(blocks[1])
    end = wrap_block(blocks[1], lambda call, args, kwargs: hidden_states(blocks[1], args, kwargs))
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    for copied in (copy.deepcopy(model), torch.load(file, weights_only=False)):
        assert torch.equal(copied(**batch).logits, plain(**batch).logits)
        assert [type(module) for module in copied.modules()] == [type(module) for module in plain.modules()]
    assert not torch.equal(model(**batch).logits, plain(**batch).logits)
    end()
    assert type(blocks[1]) is kind and torch.equal(model(**batch).logits, plain(**batch).logits)


@pytest.mark.parametrize("technique", [ProgressiveLayerDrop(), StochasticDepth()], ids=repr)
def test_blocks_of_stages_are_left_out_and_stages_are_not(technique, tmp_path):
    assert tiny_trainer([technique], tmp_path, modality="image", max_steps=2).train().global_step == 2
    sizes = {"image_size": 8, "patch_size": 1, "embed_dim": 8, "depths": [1, 1], "num_heads": [1, 1], "window_size": 2}
    swin = SwinForImageClassification(SwinConfig(**sizes, num_labels=4))
    with pytest.raises(ValueError, match=rf"{type(technique).__name__}.*and cannot be skipped"):
        tiny_trainer([technique], tmp_path, modality="image", max_steps=2, model=swin).train()
