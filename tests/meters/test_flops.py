"""FLOPs against closed forms written by hand, and against torch's own counter where it sees all."""

from __future__ import annotations

import functools

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode
from transformers import (
    BatchEncoding,
    BertConfig,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    ResNetConfig,
    ResNetForImageClassification,
    ViTConfig,
    ViTForImageClassification,
)

from hf_accel.features.segment_attention import attend_by_segment
from hf_accel.meters.flops import Counting, FlopMeter, Flops, formula_of, is_compute, peak_flops
from hf_accel.surgery.freezing import detach_input, find_blocks

B, L, D, F, H, N, V, RANK, KEPT = 3, 16, 32, 48, 4, 4, 61, 2, 10
"""Rows, positions, sizes of states and of the feed-forward part, heads, blocks, words, rank of LoRA, tokens kept."""

# peft asks transformers 5.23 what it has renamed.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")

CASES = ["dense", "frozen", "lora", "checkpointing", "dropped"]


def linear(tokens: int, inputs: int, outputs: int, passes: int = 3) -> int:
    """A product and, in further passes, the gradients of its input and of its weight."""
    return 2 * tokens * inputs * outputs * passes


# Transformers --------------------------------------------------------------------------------------------------------


def build(family: str, attention: str = "sdpa"):
    torch.manual_seed(0)
    if family == "llama":
        sizes = {"hidden_size": D, "intermediate_size": F, "num_hidden_layers": N, "num_attention_heads": H}
        config = LlamaConfig(**sizes, num_key_value_heads=2, vocab_size=V, attn_implementation=attention)
        ids = torch.randint(0, V, (B, L))
        return LlamaForCausalLM(config), {"input_ids": ids, "labels": ids}
    if family == "bert":
        sizes = {"hidden_size": D, "intermediate_size": F, "num_hidden_layers": N, "num_attention_heads": H}
        # With dropout, attention is not fused on CPUs.
        sizes |= {"attention_probs_dropout_prob": 0.0}
        config = BertConfig(**sizes, vocab_size=V, num_labels=5, attn_implementation=attention)
        return BertForSequenceClassification(config), {
            "input_ids": torch.randint(0, V, (B, L)),
            "labels": torch.zeros(B, dtype=torch.long),
        }
    if family == "vit":
        sizes = {"hidden_size": D, "intermediate_size": F, "num_hidden_layers": N, "num_attention_heads": H}
        config = ViTConfig(**sizes, image_size=12, patch_size=4, num_labels=5, attn_implementation=attention)
        images = {"pixel_values": torch.randn(B, 3, 12, 12), "labels": torch.zeros(B, dtype=torch.long)}
        return ViTForImageClassification(config), images
    config = ResNetConfig(
        embedding_size=8, hidden_sizes=[8, 16, 24, 32], depths=[1, 1, 1, 1], layer_type="basic", num_labels=5
    )
    images = {"pixel_values": torch.randn(B, 3, 64, 64), "labels": torch.zeros(B, dtype=torch.long)}
    return ResNetForImageClassification(config), images


def change(model, family: str, case: str):
    """The model as a case wants it."""
    blocks = model.resnet.encoder.stages if family == "resnet" else find_blocks(model)
    if case == "frozen":
        for block in blocks[: len(blocks) // 2]:
            block.requires_grad_(False)
        blocks[0].register_forward_pre_hook(detach_input, with_kwargs=True)
    if case == "lora":
        peft = pytest.importorskip("peft")
        targets = {"llama": ["q_proj", "v_proj"], "bert": ["query", "value"], "resnet": ["convolution"]}
        names = targets.get(family, [])
        if family == "vit":
            names = [name for name, _ in model.named_modules() if name.endswith(("q_proj", "v_proj", "query", "value"))]
        model = peft.get_peft_model(model, peft.LoraConfig(r=RANK, target_modules=names))
    if case == "checkpointing" and family == "resnet":
        for block in blocks:
            block.forward = functools.partial(checkpoint, block.forward, use_reentrant=False)
    elif case == "checkpointing":
        model.activation_checkpointing_enable({"use_reentrant": False})
    if case == "dropped":
        for block in blocks[1:-1]:
            block.forward = functools.partial(on_a_part, block.forward)
    return model


def on_a_part(forward, hidden_states, *args, position_embeddings=None, **kwargs):
    """A block that sees the first tokens of each row only; the others pass it by."""
    if position_embeddings is not None:
        kwargs["position_embeddings"] = tuple(part[:, :KEPT] for part in position_embeddings)
    if kwargs.get("attention_mask") is not None:
        kwargs["attention_mask"] = kwargs["attention_mask"][..., :KEPT, :KEPT]
    seen = forward(hidden_states[:, :KEPT], *args, **kwargs)
    seen = seen[0] if isinstance(seen, tuple) else seen
    return torch.cat([seen, hidden_states[:, KEPT:]], 1)


def attention(positions: int, passes: int) -> int:
    """Scores and mixtures, of all heads; 2 passes forward, 4 backward, 1 to compute the scores again."""
    return 2 * B * positions**2 * D * passes


def block(family: str, positions: int, *, first_of_trained: bool = False, passes: int = 3) -> int:
    """The products of a block.  The first block that is trained needs no gradient of its input."""
    tokens, key_size = B * positions, D // 2 if family == "llama" else D
    mixing = sum(linear(tokens, D, size, passes - first_of_trained) for size in (D, key_size, key_size))
    feeding = linear(tokens, D, F, passes) * (3 if family == "llama" else 2)
    return mixing + linear(tokens, D, D, passes) + feeding


def closed_form(family: str, case: str) -> Flops:
    positions = 10 if family == "vit" else L  # nine patches and the token of the class
    tokens = B * positions
    if family == "llama":
        ends = linear(tokens, D, V)
    elif family == "bert":
        ends = linear(B, D, D) + linear(B, D, 5)
    else:
        ends = linear(B * 9, 3 * 16, D, 2) + linear(B, D, 5)
    seen = [KEPT if case == "dropped" and 0 < i < N - 1 and family != "vit" else positions for i in range(N)]
    if case == "dropped" and family == "vit":
        seen = [positions] * N  # as many as are kept
    model = ends + sum(block(family, p) + attention(p, 6) for p in seen)
    extra = sum(attention(p, 1) for p in seen)  # what the fused backward pass computes again
    if case == "frozen":
        frozen = N // 2
        model = ends if family != "vit" else ends - linear(B * 9, 3 * 16, D, 1)
        model += frozen * (block(family, positions, passes=1) + attention(positions, 2))
        # The first norm of a block, where it comes before the products, needs the gradient of theirs.
        model += block(family, positions, first_of_trained=family == "bert") + attention(positions, 6)
        model += (N - frozen - 1) * (block(family, positions) + attention(positions, 6))
        extra = (N - frozen) * attention(positions, 1)
    if case == "checkpointing":
        # Computing again ends where the last tensor was kept: before the last product, unless a norm follows.
        left_out = 0 if family == "bert" else linear(tokens, F, D, 1)
        extra += N * (block(family, positions, passes=1) + attention(positions, 2) - left_out)
    return Flops(model + extra, model)


def lora_form(family: str) -> Flops:
    """Frozen products lack the gradient of their weight; in the first block, that of the input as well."""
    positions = 10 if family == "vit" else L
    tokens, key_size = B * positions, D // 2 if family == "llama" else D
    if family == "llama":
        ends = linear(tokens, D, V, 2)
    elif family == "bert":
        ends = linear(B, D, D, 2) + linear(B, D, 5, 2)
    else:
        ends = linear(B * 9, 3 * 16, D, 1) + linear(B, D, 5, 2)
    blocks = N * (block(family, positions, passes=2) + attention(positions, 6))
    blocks -= linear(tokens, D, D + 2 * key_size, 1)  # the first block's
    adapters = sum(linear(tokens, D, RANK) + linear(tokens, RANK, size) for size in (D, key_size)) * N
    adapters -= 2 * linear(tokens, D, RANK, 1)
    model = ends + blocks + adapters
    return Flops(model + N * attention(positions, 1), model)


def step(model, inputs):
    return lambda: model(**inputs).loss.backward()


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("family", ["llama", "bert", "vit"])
def test_transformers_take_what_a_closed_form_says(family, case):
    model, inputs = build(family)
    model = change(model, family, case)
    _, flops = FlopMeter().measure(model, inputs, step(model, inputs))
    expected = lora_form(family) if case == "lora" else closed_form(family, case)
    assert flops == pytest.approx(expected, rel=1e-12)


# Convolutions --------------------------------------------------------------------------------------------------------


def convolutions() -> list[tuple[str, int]]:
    """Each product of the network with the operations of a pass: 64 pixels become 32, 16, then 16, 8, 4, 2."""
    found = [("stem", 2 * B * 32**2 * 3 * 8 * 49)]
    side, width = 16, 8
    for stage, size in enumerate([8, 16, 24, 32]):
        side = side // 2 if stage else side
        found += [(f"{stage}", 2 * B * side**2 * width * size * 9), (f"{stage}", 2 * B * side**2 * size * size * 9)]
        if size != width:
            found.append((f"{stage}", 2 * B * side**2 * width * size))
        width = size
    return found


@pytest.mark.parametrize("case", ["dense", "frozen", "checkpointing"])
def test_convolutions_take_what_a_closed_form_says(case):
    model, inputs = build("resnet")
    model = change(model, "resnet", case)
    _, flops = FlopMeter().measure(model, inputs, step(model, inputs))
    head = linear(B, 32, 5)
    passes = {"stem": 2, **dict.fromkeys("0123", 3)}
    if case == "frozen":
        passes = {"stem": 1, "0": 1, "1": 1, "2": 3, "3": 3}
    expected = head + sum(passes[stage] * cost for stage, cost in convolutions())
    if case == "frozen":  # no gradient of what enters the first trained stage, by its convolution and its shortcut
        expected -= 2 * B * 4**2 * 16 * 24 * (9 + 1)
    again = sum(cost for stage, cost in convolutions() if stage != "stem") if case == "checkpointing" else 0
    assert flops == pytest.approx((expected + again, expected), rel=1e-12)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("family", ["llama", "bert", "vit", "resnet"])
def test_equals_torchs_counter_under_eager_attention(family, case):
    if (family, case) == ("resnet", "dropped"):
        pytest.skip("images have no tokens to drop here")
    model, inputs = build(family, "eager")
    model = change(model, family, case)
    _, flops = FlopMeter().measure(model, inputs, step(model, inputs))
    model.zero_grad()
    with FlopCounterMode(display=False) as counter:
        step(model, inputs)()
    assert flops.executed == counter.get_total_flops()
    assert (flops.executed > flops.model) == (case == "checkpointing")


def test_torchs_counter_misses_attention_on_cpus():
    model, inputs = build("llama")
    with FlopCounterMode(display=False) as counter:
        step(model, inputs)()
    assert counter.get_total_flops() == closed_form("llama", "dense").executed - N * attention(L, 7)


def test_reentrant_checkpointing_computes_whole_blocks_again():
    model, inputs = build("llama")
    model.enable_input_require_grads()
    model.activation_checkpointing_enable({"use_reentrant": True})
    _, flops = FlopMeter().measure(model, inputs, step(model, inputs))
    dense = closed_form("llama", "dense")
    again = N * (block("llama", L, passes=1) + attention(L, 2))
    assert flops == pytest.approx((dense.executed + again, dense.model))


# Which steps are counted ---------------------------------------------------------------------------------------------


def test_each_kind_of_step_is_counted_once():
    model, inputs = build("llama")
    meter, counted = FlopMeter(), []

    def run():
        modes = torch.utils._python_dispatch._get_current_dispatch_mode_stack()
        counted.append(any(isinstance(mode, Counting) for mode in modes))
        step(model, inputs)()
        return "what it returns"

    first = meter.measure(model, inputs, run)
    assert meter.measure(model, inputs, run) == first
    assert first[0] == "what it returns" and counted == [True, False]
    meter.measure(model, inputs, run, varied=1)
    model.model.layers[0].requires_grad_(False)
    meter.measure(model, inputs, run)
    meter.measure(model, {name: value[:1] for name, value in inputs.items()}, run)
    assert counted == [True, False, True, True, True]


def test_batches_of_a_tokenizer_are_known_by_their_shapes():
    model, inputs = build("bert")
    meter = FlopMeter()
    for length in (L, L // 2):
        batch = BatchEncoding({n: value[:, :length] if value.dim() == 2 else value for n, value in inputs.items()})
        _, flops = meter.measure(model, batch, step(model, batch))
        assert flops == FlopMeter().measure(model, dict(batch), step(model, batch))[1]


def packed(lengths: list[int]) -> dict[str, torch.Tensor]:
    ids = torch.randint(0, V, (1, sum(lengths)))
    return {"input_ids": ids, "labels": ids, "position_ids": torch.cat([torch.arange(n) for n in lengths])[None]}


def test_examples_of_a_row_that_are_visited_one_by_one():
    model, _ = build("llama")
    attend_by_segment(model)
    meter, lengths = FlopMeter(), [[8, 8], [12, 4], [2, 5, 9]]
    for row in lengths:
        inputs = packed(row)
        _, flops = meter.measure(model, inputs, step(model, inputs))
        products = linear(16, D, V) + N * block("llama", L) // B
        assert flops.model == pytest.approx(products + N * 2 * D * 6 * sum(n**2 for n in row), rel=1e-12)
        assert flops.executed == pytest.approx(flops.model + N * 2 * D * sum(n**2 for n in row), rel=1e-12)
    assert [len(known) for known in meter._known.values()] == [2]  # the third was read off


def test_a_step_that_fails_is_not_known():
    model, inputs = build("llama")
    meter = FlopMeter()
    with pytest.raises(RuntimeError, match="out of memory"):
        meter.measure(model, inputs, lambda: (_ for _ in ()).throw(RuntimeError("out of memory")))
    assert meter.measure(model, inputs, step(model, inputs))[1].executed > 0


def test_forward_alone():
    model, inputs = build("bert")
    with torch.no_grad():
        _, flops = FlopMeter().measure(model, inputs, lambda: model(**inputs))
    assert flops.executed == linear(B, D, D + 5, 1) + N * (block("bert", L, passes=1) + attention(L, 2))
    with torch.inference_mode():
        assert FlopMeter().measure(model, inputs, lambda: model(**inputs))[1] == flops


# What is counted -----------------------------------------------------------------------------------------------------


def test_a_kernel_without_a_formula_is_named():
    lstm = nn.LSTM(4, 4)
    with pytest.raises(ValueError, match=r"mkldnn_rnn_layer.*no formula"):
        FlopMeter().measure(lstm, torch.ones(2, 1, 4), lambda: lstm(torch.ones(2, 1, 4)))


def test_an_operator_of_another_library_is_named_or_has_a_formula():
    @torch.library.custom_op("hf_accel_tests::product", mutates_args=())
    def product(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return a @ b

    a = torch.ones(3, 4)
    with pytest.raises(ValueError, match=r"hf_accel_tests.product.*register_flop_formula"):
        FlopMeter().measure(nn.Identity(), a, lambda: product(a, a.T))


COMPUTING = """mm addmm bmm convolution _fft_c2c mv _grouped_mm linalg_qr _cdist_forward _thnn_fused_lstm_cell
mkldnn_rnn_layer _flash_attention_forward linear"""
FREE = """add mul sum native_layer_norm embedding embedding_dense_backward _softmax gelu_backward cat copy_
_foreach_add_
linalg_vector_norm _log_softmax nll_loss_forward upsample_bilinear2d slice_scatter max_pool2d_with_indices"""


@pytest.mark.parametrize("name", COMPUTING.split())
def test_what_computes(name):
    op = getattr(torch.ops.aten, name)
    assert is_compute(getattr(op, op.overloads()[0]))


@pytest.mark.parametrize("name", FREE.split())
def test_what_is_free(name):
    op = getattr(torch.ops.aten, name)
    func = getattr(op, op.overloads()[0])
    assert not is_compute(func) and formula_of(func) is None


def test_other_products():
    a, vector = torch.ones(3, 4), torch.ones(4)
    for run, flops in [
        (lambda: a.mv(vector), 2 * 12),
        (lambda: torch.addmv(torch.ones(3), a, vector), 2 * 12),
        (lambda: vector.dot(vector), 2 * 4),
        (lambda: torch.ones(3, 3).addmm_(a, a.T), 2 * 36),
        (lambda: torch.addbmm(torch.ones(3, 3), a.expand(2, 3, 4), a.T.expand(2, 4, 3)), 2 * 72),
        (lambda: torch.fft.fft(torch.ones(2, 8, dtype=torch.complex64)), 5 * 16 * 3),
        (lambda: torch.einsum("ij,kj->ik", a, a), 2 * 36),
    ]:
        assert FlopMeter().measure(nn.Identity(), a, run)[1].executed == flops


def test_the_peak_of_a_device_is_of_its_order():
    assert 1e8 < peak_flops(torch.device("cpu"), torch.float32, size=128, seconds=0.01) < 1e13
