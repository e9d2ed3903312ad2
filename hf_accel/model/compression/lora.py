"""Train a low-rank change of each weight matrix instead of the matrix.

LoRA freezes the weights W of every linear layer except the head.  A layer of shape (out, in) computes with

    W + scaling * B A        A: (rank, in), random;  B: (out, rank), zero at first;  scaling = alpha / rank

The optimizer keeps moments of A and B only, and the backward pass makes no gradient of W.  That takes two thirds of the
operations of full fine-tuning, and a fraction of its memory.  A head without pretrained weights, as of a classifier, is
trained and saved whole.

`peft` does the work.  Adapters are saved in its format, which ``from_pretrained`` loads.  The script's own
``model.save_pretrained(...)`` also saves adapters, unless the model was not loaded from anywhere: then it saves the
whole model.  ``trainer.model.merge_and_unload()`` returns an ordinary model with B A added to the weights.

Variants:

- ``rslora`` scales by alpha / sqrt(rank), for ranks of 64 and above.
- ``dora`` trains the length of each output's weights separately from its direction, 26 % slower than ``lora`` in peft's
  benchmark.  Load it with peft's own classes: transformers 5.23 drops the lengths.
- ``pissa`` starts from the largest singular directions of W instead of zero.  It takes a singular value decomposition
  of each matrix.

Once the learning rate is tuned, such variants differ by one or two per cent.

QLoRA: the model may have quantized weights, as from ``BitsAndBytesConfig(load_in_4bit=True)``, a quarter of the memory
of bfloat16.  Its other parameters are cast to float32, as in peft, and gradients flow through the quantized layers.
Pass it to ``AccelTrainer``: a plain Trainer, which `attach` would take, refuses it before it has adapters.  To merge
adapters, load the unquantized model, because 4-bit weights round them away.  The published settings are in
configs/recipes/qlora.yaml.

The best learning rate of LoRA is about ten times that of full fine-tuning at any rank.  ``lr_factor`` multiplies
``args.learning_rate`` by that, so a tuned script of full fine-tuning needs no change.  Set ``lr_factor=1`` for a rate
that was chosen for LoRA.  Beside `Muon`, set its ``scale="match_rms"``: its default scale lengthens the steps of B by
sqrt(out / rank).

Recommendation: Use LoRA if you fine-tune a language model on at most some 50,000 examples.
When to use: Fine-tuning of language models on up to some 50,000 examples, in batches of up to 32.  In peft's benchmark
it reached the quality of full fine-tuning in 0.44 of its time.
When not to use:
- Pre-training, or fine-tuning on more than the rank can hold.
- Large batches, which harm LoRA more than full fine-tuning.
- Small models, where the extra matrix products cost as much as they save.
Defaults: ``rank`` and ``alpha`` are TRL's; Schulman et al. find 32 good for all ranks, too.  They find attention alone
worse at the same number of parameters, hence ``target``, and a rate 9.8 times as high over 14 models, hence
``lr_factor``.  ``lr_ratio`` is that of Hu et al.
Differences from the paper: All linear layers have adapters, as in Schulman et al., instead of attention alone.
References: Hu et al. (2021), LoRA, https://arxiv.org/abs/2106.09685; all layers and ten times the learning rate:
Schulman et al. (2025), LoRA without regret, https://thinkingmachines.ai/blog/lora/; Kalajdzievski (2023), rsLoRA,
https://arxiv.org/abs/2312.03732; Dettmers et al. (2023), QLoRA, https://arxiv.org/abs/2305.14314; Liu et al. (2024),
DoRA, https://arxiv.org/abs/2402.09353; Meng et al. (2024), PiSSA, https://arxiv.org/abs/2404.02948; Hayou et al.
(2024), LoRA+, https://arxiv.org/abs/2402.12354.
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

from hf_accel.adapters import is_adapted
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
    # Not the faster, random decomposition: loading must subtract the same matrices from the weights.
    "pissa": {"init_lora_weights": "pissa"},
}
"""Options of peft for each variant."""


def new_heads(model: Any) -> list[str]:
    """Return the names of the modules without pretrained weights: those beside the base, except a language head."""
    if model.get_output_embeddings() is not None:
        return []
    children = {name: child for name, child in model.named_children() if any(True for _ in child.parameters())}
    if model.base_model is not model:
        return [name for name, child in children.items() if child is not model.base_model]
    return [name for name in children if name in ("classifier", "score")]


def linear_shapes(model: Any) -> dict[str, tuple[int, int]]:
    """Return the outputs and inputs of the linear layers by path, without those of heads."""
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
    """Return the model with adapters made from the seed; only these and new heads are trained."""
    try:
        from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training
    except ImportError:
        raise ValueError("peft is not installed. Install it with: pip install 'hf-accel[peft]'.") from None
    if getattr(model, "is_quantized", False):
        prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)  # Trainer turns it on
        model.enable_input_require_grads()
        for module in model.modules():
            if getattr(module, "support_avx512bf16_for_cpu", False):
                # In bitsandbytes 0.50, an evaluation packs the weights, after which there are no gradients.
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
    """Save the adapters of a model that was loaded from somewhere, and otherwise the merged model."""
    if is_adapted(model) and getattr(model, "name_or_path", ""):
        return adapted.save_pretrained(*args, **kwargs)
    whole = copy.deepcopy(adapted).merge_and_unload() if is_adapted(model) else model
    type(model).save_pretrained(whole, *args, **kwargs)


@dataclass(eq=False)
class LoRA(Technique):
    """Freeze the model and train low-rank adapters of its linear layers, with peft.

    Args:
        rank: Rank of each adapter, at least 1 and at most the smaller side of the smallest matrix.
        alpha: Numerator of the scaling, at least 1.
        variant: Scaling, structure and initialization of the adapters.
        target: Layers with adapters: ``all-linear``, or a regular expression that matches their whole paths.
        lr_factor: Peak learning rate as a multiple of ``args.learning_rate``; 1 if that was chosen for LoRA.
        lr_ratio: Learning rate of B as a multiple of that of A (LoRA+, which recommends 16).
    """

    rank: Annotated[int, at.Ge(1)] = 16
    alpha: Annotated[int, at.Ge(1)] = 32
    variant: Variant = "lora"
    target: str = "all-linear"
    lr_factor: Positive = 10.0
    lr_ratio: Positive = 1.0
    variations: ClassVar = {"rank": 4, "target": r".*\.q_proj"}
    claims: ClassVar = frozenset({"pretrained_weights", "weight_matrices"})

    def prepare_model(self, model: nn.Module) -> nn.Module:
        """Put adapters on the layers of ``target``."""
        assert self.run_ is not None
        args = self.run_.args
        if is_adapted(model) or not hasattr(model, "get_output_embeddings"):
            problem = "has adapters already" if is_adapted(model) else "is not a model of transformers"
            place = " to AccelTrainer; other trainers refuse it" if getattr(model, "is_quantized", False) else ""
            raise ValueError(
                f"{self!r} does not support {type(model).__name__} because it {problem}. Pass the pretrained model "
                f"itself{place}."
            )
        if self.variant == "pissa" and getattr(model, "is_quantized", False):
            raise ValueError(
                f"{self!r} does not support quantized weights because they have no singular values. Set variant='lora'."
            )
        shapes = linear_shapes(model)
        if not shapes:
            raise ValueError(
                f"{self!r} needs a linear layer beside the head; {type(model).__name__} has none. Remove LoRA."
            )
        options: Any = {"rank": self.rank, "alpha": self.alpha, "variant": self.variant, "target": self.target}
        try:
            adapted = add_adapters(model, **options, seed=args.seed)
        except (ValueError, TypeError) as error:
            raise ValueError(f"{self!r}: {' '.join(str(error).split())}") from None
        layers = [path for path in shapes if hasattr(adapted.get_submodule(f"base_model.model.{path}"), "lora_A")]
        if layers and self.rank > min(shapes[smallest := min(layers, key=lambda path: min(shapes[path]))]):
            out, width = shapes[smallest]
            raise ValueError(
                f"{self!r}: rank is above the full rank of {smallest} ({out} x {width}). "
                f"Set rank={min(out, width)} or less, or another target."
            )
        # The script's own save_pretrained would otherwise write parameter names that no model loads.
        model.save_pretrained = functools.partial(_save_adapters, model, adapted)  # type: ignore[assignment]
        trained, total = adapted.get_nb_trainable_parameters()
        self.layers_, self.trained_share_ = len(layers), trained / total
        if self.lr_factor != 1:
            logger.warning(
                f"{self!r}: the peak learning rate is {self.lr_factor * args.learning_rate:g}, {self.lr_factor:g} "
                f"times learning_rate={args.learning_rate:g}, which should be the rate of full fine-tuning. "
                "Set lr_factor=1 if it was chosen for LoRA."
            )
        if self.target == "all-linear" and has_experts(model):
            logger.warning(f"{self!r}: experts of {type(model).__name__} are not linear layers and get no adapters.")
        if not getattr(model, "name_or_path", ""):
            logger.warning(
                f"{self!r}: the model was not loaded from anywhere, and the trainer saves adapters without it. "
                "Save the model, too, or merge them at the end: trainer.model.merge_and_unload()."
            )
        return adapted

    def parameter_rules(self, name: str, parameter: nn.Parameter) -> Mapping[str, Any]:
        """Return ``lr_factor`` for trained parameters, times ``lr_ratio`` for B."""
        of_b = ".lora_B." in name or ".lora_embedding_B." in name
        return {"lr": self.lr_factor * (self.lr_ratio if of_b else 1.0)}

    def report(self) -> Mapping[str, Any]:
        """Report the number of layers with adapters, and the trained share of the model's parameters."""
        return {"layers": self.layers_, "trained_share": self.trained_share_}

    def took_effect(self, report: Mapping[str, Any]) -> bool:
        return report["layers"] > 0
