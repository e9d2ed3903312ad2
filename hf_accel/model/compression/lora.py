"""LoRA: train a low-rank change of each weight matrix instead of the matrix.

The weights W of every linear layer but the head are frozen, and the layer of shape (out, in) computes with

    W + scaling * B A        A: (rank, in), random;  B: (out, rank), zero at first;  scaling = alpha / rank

The optimizer keeps moments of A and B only, and the backward pass makes no gradient of W: two thirds of the operations
of full fine-tuning, and a fraction of its memory.  `peft` does the work; adapters are saved in its format, which
``from_pretrained`` loads.  The ``model.save_pretrained(...)`` of a script does so, too, unless the model was not loaded
from anywhere: then it is saved whole.  ``trainer.model.merge_and_unload()`` gives an ordinary model with B A multiplied
in.  A head without pretrained weights, as of a classifier, is trained and saved whole.

Variants: ``rslora`` scales by alpha / sqrt(rank), for ranks of 64 and above; ``dora`` trains the length of each
output's weights apart from its direction, 26 % slower than ``lora`` in peft's benchmark, and is to be loaded with
peft's own classes (transformers 5.23 leaves the lengths out); ``pissa`` starts from the largest singular directions of
W instead of from zero, which takes a singular value decomposition of each matrix.  Once the learning rate is tuned,
such variants differ by one or two per cent.

QLoRA: the model may be one whose weights are quantized, as by ``BitsAndBytesConfig(load_in_4bit=True)``, a quarter of
the memory of bfloat16.  Its other parameters are cast to float32, as peft does it, and gradients go through the layers
that are quantized.  Give it to ``AccelTrainer``: a plain Trainer, which `attach` would take, refuses it before it has
adapters.  To merge these, load the model as it was before, for weights of 4 bits round them away.  The published
settings are in configs/recipes/qlora.yaml.

The best learning rate of LoRA is about ten times that of full fine-tuning, whatever the rank, and ``lr_factor``
multiplies ``args.learning_rate`` by that.  So a tuned script of full fine-tuning stays as it is.  A rate that was
chosen for LoRA wants ``lr_factor=1``.  Beside `Muon`, set its ``scale="match_rms"``: its default scale lengthens the
steps of B by sqrt(out / rank).

Reference: Hu et al. (2021), LoRA, https://arxiv.org/abs/2106.09685; all layers and ten times the learning rate:
Schulman et al. (2025), LoRA without regret, https://thinkingmachines.ai/blog/lora/; Kalajdzievski (2023), rsLoRA,
https://arxiv.org/abs/2312.03732; Dettmers et al. (2023), QLoRA, https://arxiv.org/abs/2305.14314; Liu et al. (2024),
DoRA, https://arxiv.org/abs/2402.09353; Meng et al. (2024), PiSSA, https://arxiv.org/abs/2404.02948; Hayou et al.
(2024), LoRA+, https://arxiv.org/abs/2402.12354.

When to use: fine-tuning of language models on up to some 50,000 examples, in batches of up to 32; peft's benchmark
measured the quality of full fine-tuning in 0.44 of its time.
When not to use: pre-training, or fine-tuning on so much that the rank cannot hold it; large batches, which harm LoRA
more than full fine-tuning; small models, where the extra matrix products cost as much as they save.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

import annotated_types as at
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D
from transformers.utils import logging

from hf_accel.surgery.blocks import has_experts
from hf_accel.technique import Positive, Technique

if TYPE_CHECKING:
    from peft import PeftModel

logger = logging.get_logger(__name__)

Variant = Literal["lora", "rslora", "dora", "pissa"]

OPTIONS: Mapping[str, Mapping[str, Any]] = {
    "lora": {},
    "rslora": {"use_rslora": True},
    "dora": {"use_dora": True},
    # Not its faster, random decomposition: whoever loads the adapters must take the same matrices from the weights.
    "pissa": {"init_lora_weights": "pissa"},
}
"""What peft calls the variants."""


def new_heads(model: Any) -> list[str]:
    """Names of the modules that no pre-training knows: what a task's model has beside its base, unless it is the
    projection to the vocabulary."""
    if model.get_output_embeddings() is not None:
        return []
    children = {name: child for name, child in model.named_children() if any(True for _ in child.parameters())}
    if model.base_model is not model:
        return [name for name, child in children.items() if child is not model.base_model]
    return [name for name in children if name in ("classifier", "score")]


def linear_shapes(model: Any) -> dict[str, tuple[int, int]]:
    """Outputs and inputs of the linear layers by path, without those of heads."""
    heads = new_heads(model)
    output = model.get_output_embeddings()
    return {
        path: (module.nf, module.nx) if isinstance(module, Conv1D) else (module.out_features, module.in_features)
        for path, module in model.named_modules()
        if isinstance(module, nn.Linear | Conv1D) and module is not output and path.split(".")[0] not in heads
    }


def add_adapters(
    model: Any,
    *,
    rank: int,
    alpha: int,
    variant: Variant = "lora",
    target: str = "all-linear",
    seed: int = 0,
) -> PeftModel:
    """The model with adapters, of which only these and new heads are trained; made from the seed."""
    try:
        from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training
    except ImportError:
        raise ValueError("peft: is not installed. Install it with: pip install 'hf-accel[peft]'.") from None
    if getattr(model, "is_quantized", False):
        prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)  # Trainer turns it on
        model.enable_input_require_grads()
        for module in model.modules():
            if getattr(module, "support_avx512bf16_for_cpu", False):
                # An evaluation packs the weights so that bitsandbytes 0.50 makes no gradients any more.
                module.state_dict()  # unpacks them
                module.support_avx512bf16_for_cpu = False  # type: ignore[assignment]
    config = LoraConfig(
        r=rank,
        lora_alpha=alpha,
        target_modules=sorted(linear_shapes(model)) if target == "all-linear" else target,
        modules_to_save=new_heads(model) or None,
        fan_in_fan_out=any(isinstance(module, Conv1D) for module in model.modules()),
        **OPTIONS[variant],
    )
    devices = [model.device] if model.device.type != "cpu" else []
    with torch.random.fork_rng(devices, device_type=devices[0].type if devices else "cuda"):
        torch.manual_seed(seed)
        return get_peft_model(model, config)  # type: ignore[return-value]


def _save_adapters(model: Any, adapted: Any, *args: Any, **kwargs: Any) -> None:
    """Save the adapters of a model that was loaded from somewhere; else, and once they are merged, the model."""
    if hasattr(model, "peft_config") and getattr(model, "name_or_path", ""):
        return adapted.save_pretrained(*args, **kwargs)
    whole = copy.deepcopy(adapted).merge_and_unload() if hasattr(model, "peft_config") else model
    type(model).save_pretrained(whole, *args, **kwargs)


@dataclass(eq=False)
class LoRA(Technique):
    """Freezes the model and trains low-rank adapters of its linear layers, with peft.

    Args:
        rank: Of each adapter, at least 1 and at most the smaller side of the smallest matrix.
        alpha: Numerator of the scaling, at least 1.
        variant: How adapters are scaled, made up or initialized.
        target: The layers: ``all-linear``, or a regular expression that matches their whole paths.
        lr_factor: Peak learning rate, as a multiple of ``args.learning_rate``; 1 where that is one for LoRA.
        lr_ratio: Learning rate of B as a multiple of that of A (LoRA+, which recommends 16).
    """

    rank: Annotated[int, at.Ge(1)] = 16  # TRL
    alpha: Annotated[int, at.Ge(1)] = 32  # TRL; Schulman et al., too, find 32 good for all ranks
    variant: Variant = "lora"
    target: str = "all-linear"  # Schulman et al.: attention alone is worse at the same number of parameters
    lr_factor: Positive = 10.0  # Schulman et al.: 9.8 over 14 models
    lr_ratio: Positive = 1.0  # Hu et al.
    variations: ClassVar = {"rank": 4, "target": r".*\.q_proj"}
    claims: ClassVar = frozenset({"pretrained_weights", "weight_matrices"})

    def prepare_model(self, model: nn.Module) -> nn.Module:
        """Adapters on the layers of ``target``."""
        assert self.run_ is not None
        args = self.run_.args
        if hasattr(model, "peft_config") or not hasattr(model, "get_output_embeddings"):
            problem = "has adapters already" if hasattr(model, "peft_config") else "is no model of transformers"
            place = " to AccelTrainer, for other trainers refuse it" if getattr(model, "is_quantized", False) else ""
            raise ValueError(f"{self!r}: {type(model).__name__} {problem}. Give the pretrained model itself{place}.")
        if self.variant == "pissa" and getattr(model, "is_quantized", False):
            raise ValueError(f"{self!r}: quantized weights have no singular values. Choose another variant.")
        shapes = linear_shapes(model)
        if not shapes:
            raise ValueError(f"{self!r}: {type(model).__name__} has no linear layer but its head. Train it whole.")
        options: Any = {"rank": self.rank, "alpha": self.alpha, "variant": self.variant, "target": self.target}
        try:
            adapted = add_adapters(model, **options, seed=args.seed)
        except (ValueError, TypeError) as error:
            raise ValueError(f"{self!r}: {' '.join(str(error).split())}") from None
        layers = [path for path in shapes if hasattr(adapted.get_submodule(f"base_model.model.{path}"), "lora_A")]
        if layers and self.rank > min(shapes[smallest := min(layers, key=lambda path: min(shapes[path]))]):
            out, width = shapes[smallest]
            raise ValueError(
                f"{self!r}: rank is above what {smallest} ({out} x {width}) can have. "
                f"Choose at most {min(out, width)}, or another target."
            )
        # A script that saves its own model would otherwise write names that no model has.
        model.save_pretrained = functools.partial(_save_adapters, model, adapted)
        trained, total = adapted.get_nb_trainable_parameters()
        self.layers_, self.trained_share_ = len(layers), trained / total
        if self.lr_factor != 1:
            logger.warning(
                f"{self!r}: the peak learning rate is {self.lr_factor * args.learning_rate:g}, {self.lr_factor:g} "
                f"times learning_rate={args.learning_rate:g}, which should be that of full fine-tuning. "
                "Set lr_factor=1 where it is one for LoRA."
            )
        if self.target == "all-linear" and has_experts(model):
            logger.warning(f"{self!r}: experts of {type(model).__name__} are no linear layers, and get no adapters.")
        if not getattr(model, "name_or_path", ""):
            logger.warning(
                f"{self!r}: the model was not loaded from anywhere, and adapters are saved without it. "
                "Save it, too, or merge them in the end: trainer.model.merge_and_unload()."
            )
        return adapted

    def parameter_rules(self, name: str, parameter: nn.Parameter) -> Mapping[str, Any]:
        """``lr_factor`` for what is trained, and ``lr_ratio`` on top for B."""
        of_b = ".lora_B." in name or ".lora_embedding_B." in name
        return {"lr": self.lr_factor * (self.lr_ratio if of_b else 1.0)}

    def report(self) -> Mapping[str, Any]:
        """How many layers have adapters, and the share of the model's parameters that is trained."""
        return {"layers": self.layers_, "trained_share": self.trained_share_}

    def took_effect(self, report: Mapping[str, Any]) -> bool:
        return report["layers"] > 0
