"""Tiny models of the architectures that techniques of the model are tested on, and batches for them."""

import torch
from transformers import (
    BertConfig,
    BertForMaskedLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    ModernBertConfig,
    ModernBertForMaskedLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    ResNetConfig,
    ResNetForImageClassification,
    RobertaConfig,
    RobertaForMaskedLM,
    T5Config,
    T5ForConditionalGeneration,
    ViTConfig,
    ViTForImageClassification,
)

VOCABULARY = 48
SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
}
TOKENS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
POSITIONS = {"max_position_embeddings": 64}
MODERN = TOKENS | {"cls_token_id": 1, "sep_token_id": 2}
T5_SIZES = {"vocab_size": VOCABULARY, "d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 2, "num_heads": 2}
IMAGE = {"num_labels": 4, "image_size": 16, "patch_size": 4}
STAGES = {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [2, 2], "layer_type": "basic", "num_labels": 4}

ARCHITECTURES = {
    "Llama": (LlamaForCausalLM, LlamaConfig, SIZES | TOKENS | POSITIONS),
    "Qwen": (Qwen3ForCausalLM, Qwen3Config, SIZES | TOKENS | POSITIONS | {"num_key_value_heads": 2, "head_dim": 8}),
    "GPT-2": (GPT2LMHeadModel, GPT2Config, SIZES | TOKENS | POSITIONS),
    "BERT": (BertForMaskedLM, BertConfig, SIZES | POSITIONS),
    "RoBERTa": (RobertaForMaskedLM, RobertaConfig, SIZES | POSITIONS | TOKENS),
    "ModernBERT": (ModernBertForMaskedLM, ModernBertConfig, SIZES | POSITIONS | MODERN),
    "T5": (T5ForConditionalGeneration, T5Config, T5_SIZES | {"decoder_start_token_id": 0}),
    "ViT": (ViTForImageClassification, ViTConfig, SIZES | IMAGE),
    "ResNet": (ResNetForImageClassification, ResNetConfig, STAGES),
}
"""By name: the class, that of its configuration, and the configuration's values."""

IMAGES = ("ViT", "ResNet")
MASKED = ("BERT", "RoBERTa", "ModernBERT")


def tiny(name, dtype=torch.float32, seed=0, **values):
    """A model, the same for the same seed; the global generator is left alone."""
    kind, config, sizes = ARCHITECTURES[name]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return kind(config(**(sizes | values))).to(dtype)


def used(model, seed=0):
    """The model, with noise on every parameter, as if it had been trained."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
    return model


def inputs_for(name, dtype=torch.float32, seed=0):
    """What the forward pass of a model takes, without labels."""
    generator = torch.Generator().manual_seed(seed)
    if name in IMAGES:
        return {"pixel_values": torch.randn(2, 3, 16, 16, generator=generator, dtype=dtype)}
    ids_BL = torch.randint(3, VOCABULARY, (2, 12), generator=generator)
    return {"input_ids": ids_BL} | ({"decoder_input_ids": ids_BL.flip(1)} if name == "T5" else {})
