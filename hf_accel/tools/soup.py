"""Average models that were fine-tuned from the same weights into a soup, with the inference cost of one model.

    uniform    the mean of all:  e = (w_1 + ... + w_n) / n
    greedy     from the best model to the worst, each is added to the mean if the evaluation does not get worse

For LoRA adapters, the mean is over their changes of the weights, c B A with scaling c.  The mean of A times the mean of
B differs from it.  Concatenated matrices give the exact mean, with the sum of the ranks:

    (c_1 B_1 A_1 + ... + c_n B_n A_n) / n  =  [c_1 B_1 / n | ... | c_n B_n / n] [A_1 ; ... ; A_n]

Modules that train in full beside adapters (a classifier's head) are averaged directly.  With
``add_weighted_adapter(combination_type="cat")``, peft does the same for the matrices.  It refuses such modules and
needs the base model in memory.

Floating-point buffers, such as statistics of batch normalization, are averaged like weights.  Other buffers come from
the first model.

Reference: Wortsman et al. (2022), Model soups: averaging weights of multiple fine-tuned models improves accuracy
without increasing inference time, https://arxiv.org/abs/2203.05482.
"""

from __future__ import annotations

import copy
import math
import shutil
import tempfile
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoConfig, PreTrainedModel
from transformers.utils.import_utils import is_peft_available

ADAPTER = "adapter_model.safetensors"
FROM_THE_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")
"""Initializations of peft that change the base model each time adapters are loaded."""
COMPANIONS = (".json", ".jinja", ".txt", ".model", ".yaml")
"""Endings of a model's files beside its weights: tokenizer, processor, recipe."""


def soup(folders: Sequence[Path], out: Path) -> None:
    """Write the mean of models, or of LoRA adapters, as a folder for ``from_pretrained``."""
    if not folders:
        raise ValueError("soup needs a folder. Name at least one.")
    adapters = [is_adapter(folder) for folder in folders]
    if any(adapters) and not all(adapters):
        raise ValueError(
            f"{folders[adapters.index(not adapters[0])]}: holds {'a model' if adapters[0] else 'an adapter'}, and "
            f"{folders[0]} {'an adapter' if adapters[0] else 'a model'}. Give only models or only adapters."
        )
    (_soup_of_adapters if all(adapters) else _soup_of_models)(folders, out)
    copy_companions(folders[0], out)


def greedy(
    scores: Mapping[Path, float], evaluate: Callable[[Path], float], lower_is_better: bool
) -> tuple[list[Path], float]:
    """Choose greedily the folders with the best mean, and return them with its score.

    ``scores`` holds the score of each folder alone; ``evaluate`` scores any folder.
    """
    sign = 1 if lower_is_better else -1
    first, *others = sorted(scores, key=lambda folder: sign * scores[folder])
    kept, best = [first], scores[first]
    for folder in others:
        with tempfile.TemporaryDirectory() as mean:
            soup([*kept, folder], Path(mean))
            score = evaluate(Path(mean))
        if sign * score <= sign * best:
            kept, best = [*kept, folder], score
    return kept, best


def is_adapter(folder: Path) -> bool:
    """Return whether a folder holds a peft adapter, not a whole model.  Raise ValueError if that needs peft."""
    found = (folder / "adapter_config.json").is_file()
    if found and not is_peft_available():
        raise ValueError(f"{folder}: adapters need peft. Install it with: pip install 'hf-accel[peft]'.")
    return found


def load_model(folder: Path) -> PreTrainedModel:
    """Load the model of a folder with the class that its configuration names."""
    if not (folder / "config.json").is_file():
        raise ValueError(f"{folder}: holds no model (config.json). Name a folder for from_pretrained.")
    try:
        name = (AutoConfig.from_pretrained(folder).architectures or ["None"])[0]
        if not hasattr(transformers, name):
            raise ValueError(f"transformers has no class {name}")
        return getattr(transformers, name).from_pretrained(folder)
    except (OSError, ValueError, SafetensorError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ValueError(f"{folder}: the model cannot be loaded ({reason}). Name a folder of a whole model.") from None


def load_adapter(folder: Path) -> tuple[Any, dict[str, Tensor]]:
    """Load the configuration and the weights of an adapter, without its base model."""
    from peft import PeftConfig

    try:
        return PeftConfig.from_pretrained(str(folder)), load_file(folder / ADAPTER)
    except (OSError, ValueError, SafetensorError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ValueError(f"{folder}: the adapter cannot be loaded ({reason}). Name a complete adapter.") from None


def copy_companions(folder: Path, out: Path) -> None:
    """Copy the files beside a model's weights that ``out`` lacks, except those that only training needs."""
    of_training = ("trainer_state.json", "receipt.json", ".index.json")
    for path in folder.iterdir():
        ours = path.name.startswith("accel_") or path.name.endswith(of_training)
        if path.is_file() and path.suffix in COMPANIONS and not ours and not (out / path.name).exists():
            shutil.copy(path, out / path.name)


def _soup_of_models(folders: Sequence[Path], out: Path) -> None:
    model = load_model(folders[0])
    state = model.state_dict()
    sums = {
        name: tensor.to(torch.promote_types(tensor.dtype, torch.float32), copy=True)
        for name, tensor in state.items()
        if tensor.is_floating_point()
    }
    for folder in folders[1:]:
        other = load_model(folder)
        if type(other) is not type(model):
            raise ValueError(
                f"{folder}: is a {type(other).__name__}, but {folders[0]} is a {type(model).__name__}. "
                "Give models of one architecture."
            )
        added = other.state_dict()
        _refuse_others(folders[0], _shapes(state), folder, _shapes(added))
        for name, total in sums.items():
            total += added[name]
    means = {name: (total / len(folders)).to(state[name].dtype) for name, total in sums.items()}
    model.load_state_dict(means, strict=False)
    model.save_pretrained(out)


def _soup_of_adapters(folders: Sequence[Path], out: Path) -> None:
    loaded = [load_adapter(folder) for folder in folders]
    for folder, (config, tensors) in zip(folders, loaded, strict=True):
        _refuse_other_adapters(folder, config)
        if config.base_model_name_or_path != loaded[0][0].base_model_name_or_path:
            raise ValueError(
                f"{folder}: its base model is {config.base_model_name_or_path!r}, but {folders[0]} has "
                f"{loaded[0][0].base_model_name_or_path!r}. Give adapters of one base model."
            )
        _refuse_others(folders[0], _shapes_without_ranks(loaded[0][1]), folder, _shapes_without_ranks(tensors))
    means, ranks = {}, {}
    for name, first in loaded[0][1].items():
        side = _side(name)
        if side is None:
            dtype = torch.promote_types(first.dtype, torch.float32)
            means[name] = torch.stack([tensors[name].to(dtype) for _, tensors in loaded]).mean(0).to(first.dtype)
            continue
        if side == "A":
            means[name] = torch.cat([tensors[name] for _, tensors in loaded])
            ranks[_module(name)] = len(means[name])
        else:
            scaled = [tensors[name] * _scaling(config, name, tensors[name].shape[1]) for config, tensors in loaded]
            means[name] = torch.cat(scaled, dim=1) / len(loaded)
    config = copy.deepcopy(loaded[0][0])
    config.r = config.lora_alpha = Counter(ranks.values()).most_common(1)[0][0]  # a scaling of 1
    config.rank_pattern = {module: rank for module, rank in ranks.items() if rank != config.r}
    config.alpha_pattern = dict(config.rank_pattern)
    config.use_rslora = False
    config.save_pretrained(str(out))
    save_file({name: tensor.contiguous() for name, tensor in means.items()}, out / ADAPTER, metadata={"format": "pt"})


def _refuse_others(first: Path, expected: Mapping[str, Any], folder: Path, found: Mapping[str, Any]) -> None:
    """Raise ValueError if the weights of two folders differ in names or shapes."""
    for name in [*expected, *found]:
        if expected.get(name) != found.get(name):
            raise ValueError(
                f"{folder}: {name} is {found.get(name, 'missing')}, but {expected.get(name, 'missing')} in {first}. "
                "Give models of one architecture."
            )


def _refuse_other_adapters(folder: Path, config: Any) -> None:
    kind = getattr(config.peft_type, "value", config.peft_type)
    unlike = [option for option in ("use_dora", "lora_bias", "target_parameters") if getattr(config, option, None)]
    init = getattr(config, "init_lora_weights", True)
    if str(init).lower().startswith(FROM_THE_BASE):  # loading takes matrices of its rank from the base model
        unlike.append(f"init_lora_weights={init!r}")
    if kind != "LORA" or unlike:
        raise ValueError(
            f"{folder}: soup does not support {unlike[0] if unlike else kind} because it has no exact mean. "
            "Merge each adapter into its base model, and give the merged models."
        )


def _shapes(tensors: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


def _shapes_without_ranks(tensors: Mapping[str, Tensor]) -> dict[str, tuple[Any, ...]]:
    """Return shapes with a letter for the rank of a pair of matrices, which may differ."""
    shapes: dict[str, tuple[Any, ...]] = {}
    for name, shape in _shapes(tensors).items():
        rank = {"A": 0, "B": 1, None: None}[_side(name)]
        shapes[name] = tuple("r" if i == rank else size for i, size in enumerate(shape))
    return shapes


def _side(name: str) -> str | None:
    """Return ``A`` or ``B`` for one of a pair of matrices, and None for a module that trains in full."""
    name = name.removesuffix(".weight")
    return next((side for side in "AB" if name.endswith((f".lora_{side}", f".lora_embedding_{side}"))), None)


def _module(name: str) -> str:
    """Return the base model's name of the module that a pair of matrices changes."""
    return name.removesuffix(".weight").rpartition(".lora_")[0].removeprefix("base_model.model.")


def _scaling(config: Any, name: str, rank: int) -> float:
    """Return the factor by which an adapter multiplies B A."""
    from peft.utils.other import get_pattern_key

    alpha = config.alpha_pattern.get(get_pattern_key(list(config.alpha_pattern), _module(name)), config.lora_alpha)
    return alpha / (math.sqrt(rank) if config.use_rslora else rank)
