"""Smaller models that begin with some of a larger one's values."""

import pytest
import torch
from architectures import tiny, used

from hf_accel import ShrinkFrom
from hf_accel.testing import VOCABULARY, tiny_trainer

LARGE = {"hidden_size": 48, "intermediate_size": 80, "num_attention_heads": 6, "num_hidden_layers": 8}


def shrunk(technique, name, donor, directory, **sizes):
    """What a trainer makes of a fresh model of these sizes, before its first step."""
    donor.save_pretrained(directory / "large")
    technique.checkpoint = str(directory / "large")
    modality = "masked text" if name in ("BERT", "RoBERTa") else "text"
    return tiny_trainer([technique], directory, model=tiny(name, seed=5, **sizes), modality=modality).model


def taken(matrix, rows, columns):
    """Element by element, with no indexing by tensors."""
    values = matrix.tolist()
    return torch.tensor([[values[row][column] for column in columns] for row in rows])


def spaced(size, new_size):
    """The integers k for which the interval of k's share of the new ones begins in k."""
    return [next(k for k in range(size) if k * new_size <= i * size < (k + 1) * new_size) for i in range(new_size)]


def of_heads(heads):
    """The elements of whole heads of 8."""
    return [head * 8 + element for head in heads for element in range(8)]


@pytest.mark.parametrize("elements", ["uniform", "first"])
@pytest.mark.parametrize("blocks, kept", [("first", [0, 1, 2]), ("interleaved", [0, 2, 5])])
def test_a_llama_is_some_of_a_larger_one(elements, blocks, kept, tmp_path):
    """Six heads, of which pairs share keys and values, become four."""
    donor = used(tiny("Llama", **LARGE, num_key_value_heads=3))
    sizes = {"hidden_size": 36, "head_dim": 8, "intermediate_size": 20, "num_attention_heads": 4}
    technique = ShrinkFrom(elements=elements, blocks=blocks)
    model = shrunk(technique, "Llama", donor, tmp_path, **sizes, num_key_value_heads=2, num_hidden_layers=3)
    uniform = elements == "uniform"
    width = spaced(48, 36) if uniform else list(range(36))
    mlp = spaced(80, 20) if uniform else list(range(20))
    kv = of_heads([0, 1])  # of three, both ways
    heads = of_heads([0, 1, 2, 3])
    old, new = donor.state_dict(), model.state_dict()
    words = list(range(VOCABULARY))
    assert torch.equal(new["model.embed_tokens.weight"], taken(old["model.embed_tokens.weight"], words, width))
    assert torch.equal(new["lm_head.weight"], taken(old["lm_head.weight"], words, width))
    assert torch.equal(new["model.norm.weight"], old["model.norm.weight"][width])
    for block, source in enumerate(kept):
        expected = {
            "self_attn.q_proj": (heads, width),
            "self_attn.k_proj": (kv, width),
            "self_attn.v_proj": (kv, width),
            "self_attn.o_proj": (width, heads),
            "mlp.gate_proj": (mlp, width),
            "mlp.up_proj": (mlp, width),
            "mlp.down_proj": (width, mlp),
        }
        for layer, (rows, columns) in expected.items():
            before = old[f"model.layers.{source}.{layer}.weight"]
            assert torch.equal(new[f"model.layers.{block}.{layer}.weight"], taken(before, rows, columns)), layer


def test_heads_at_equal_distances_bring_their_queries(tmp_path):
    donor = used(tiny("Qwen", **LARGE | {"num_attention_heads": 8}, num_key_value_heads=4, head_dim=8))
    sizes = {"hidden_size": 24, "intermediate_size": 40, "num_attention_heads": 4, "num_key_value_heads": 2}
    model = shrunk(ShrinkFrom(), "Qwen", donor, tmp_path, **sizes, head_dim=8)
    width = spaced(48, 24)
    name = "model.layers.1.self_attn.{}.weight"
    old, new = donor.state_dict(), model.state_dict()
    assert torch.equal(new[name.format("k_proj")], taken(old[name.format("k_proj")], of_heads([0, 2]), width))
    assert torch.equal(new[name.format("q_proj")], taken(old[name.format("q_proj")], of_heads([0, 1, 4, 5]), width))
    assert torch.equal(new[name.format("q_norm")], old[name.format("q_norm")])


def test_a_gpt2_is_some_of_a_larger_one(tmp_path):
    """Queries, keys and values lie in one matrix, (in, out), and heads are taken from each."""
    donor = used(tiny("GPT-2", **LARGE))
    model = shrunk(ShrinkFrom(), "GPT-2", donor, tmp_path, hidden_size=16, num_attention_heads=2)
    width, heads, mlp = spaced(48, 16), of_heads([0, 3]), spaced(192, 64)
    fused = [part * 48 + element for part in range(3) for element in heads]
    for block in range(4):
        old, new = donor.transformer.h[block], model.transformer.h[block]
        assert torch.equal(new.attn.c_attn.weight, taken(old.attn.c_attn.weight, width, fused))
        assert torch.equal(new.attn.c_attn.bias, old.attn.c_attn.bias[fused])
        assert torch.equal(new.attn.c_proj.weight, taken(old.attn.c_proj.weight, heads, width))
        assert torch.equal(new.mlp.c_fc.weight, taken(old.mlp.c_fc.weight, width, mlp))
        assert torch.equal(new.mlp.c_proj.weight, taken(old.mlp.c_proj.weight, mlp, width))
        assert torch.equal(new.ln_1.bias, old.ln_1.bias[width])
    assert torch.equal(model.transformer.wpe.weight, taken(donor.transformer.wpe.weight, range(64), width))


def test_a_bert_is_some_of_a_larger_one(tmp_path):
    donor = used(tiny("BERT", **LARGE))
    model = shrunk(ShrinkFrom(blocks="interleaved"), "BERT", donor, tmp_path, hidden_size=24, num_attention_heads=3)
    width, heads, mlp = spaced(48, 24), of_heads([0, 2, 4]), spaced(80, 32)
    for block, source in enumerate([0, 2, 4, 6]):
        old, new = donor.bert.encoder.layer[source], model.bert.encoder.layer[block]
        assert torch.equal(new.attention.self.key.weight, taken(old.attention.self.key.weight, heads, width))
        assert torch.equal(new.attention.output.dense.weight, taken(old.attention.output.dense.weight, width, heads))
        assert torch.equal(new.output.dense.weight, taken(old.output.dense.weight, width, mlp))
        assert torch.equal(new.output.LayerNorm.bias, old.output.LayerNorm.bias[width])
    old, new = donor.cls.predictions, model.cls.predictions
    assert torch.equal(new.transform.dense.weight, taken(old.transform.dense.weight, width, width))
    assert torch.equal(new.decoder.weight, taken(old.decoder.weight, range(VOCABULARY), width))
    assert torch.equal(new.bias, old.bias) and new.decoder.weight is model.bert.embeddings.word_embeddings.weight


def test_all_of_it_is_the_checkpoint(tmp_path):
    donor = used(tiny("Llama"))
    before, after = donor.state_dict(), shrunk(ShrinkFrom(), "Llama", donor, tmp_path).state_dict()
    assert all(torch.equal(after[name], before[name]) for name in before)


REFUSED = {
    "nothing": ({}, {"checkpoint": None}, "checkpoint is None. Name the folder"),
    "wider": (
        {"hidden_size": 32, "num_attention_heads": 4},
        {},
        "its width is 32, and the checkpoint's 16.* ExpandFrom",
    ),
    "deeper": ({"num_hidden_layers": 5}, {}, "its number of blocks is 5, and the checkpoint's 4.* ExpandFrom"),
    "wider MLP": ({"intermediate_size": 33}, {}, "its mlp is 33, and the checkpoint's 32.* ExpandFrom"),
    "size of heads": ({"num_attention_heads": 1}, {}, "heads have 16 elements, and the checkpoint's 8. Keep"),
    "tied": ({"tie_word_embeddings": True}, {}, "tie_word_embeddings is True, and the checkpoint's False"),
}


@pytest.mark.parametrize("sizes, fields, words", REFUSED.values(), ids=REFUSED)
def test_what_cannot_be_shrunk_is_refused(sizes, fields, words, tmp_path):
    tiny("Llama").save_pretrained(tmp_path / "large")
    technique = ShrinkFrom(**({"checkpoint": str(tmp_path / "large")} | fields))
    with pytest.raises(ValueError, match=rf"^ShrinkFrom\(.*\): (?!ShrinkFrom).*{words}"):
        tiny_trainer([technique], tmp_path, model=tiny("Llama", **sizes))


def test_adapters_on_top_are_refused(tmp_path):
    from hf_accel import LoRA

    technique = ShrinkFrom("hf_accel.testing:tiny_larger")
    with pytest.raises(ValueError, match="both claim the weights under adapters"):
        tiny_trainer([technique, LoRA()], tmp_path)
