"""Build models and tokenizers of a recipe: saved ones by path or name, new ones by their configuration."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig, AutoTokenizer, ByT5Tokenizer, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

from hf_accel.recipe import RecipeError
from hf_accel.recipe.technique_syntax import nearest

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
"""Dtypes of weights by their names in a recipe."""


def load_tokenizer(name: str | None, model: str | dict[str, Any]) -> Any:
    """Load a tokenizer by path or name.

    ``bytes`` gives one token for each byte of UTF-8, and None gives the tokenizer of the model's folder.
    """
    subject = "tokenizer" if name is not None else "model"
    if name is None:
        name = model if isinstance(model, str) else str(model.get("path", "bytes"))
    if name == "bytes":
        return ByT5Tokenizer(extra_ids=0)
    try:
        tokenizer = AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise RecipeError(_not_loaded(subject, name, error)) from None
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token  # labels are padded separately, so the end is learned
    return tokenizer


def load_model(kind: Any, model: str | dict[str, Any], tokenizer: Any, **options: Any) -> PreTrainedModel:
    """Load a model of an auto class, or build a new one.

    A path or a name gives saved weights, and ``{config: {model_type: ...}}`` gives new ones.  With
    ``{path: ..., quantization_config: {...}}``, transformers quantizes saved weights.  ``options`` are entries of the
    configuration that depend on the data.

    Saved weights that are not quantized train in float32, whatever their saved dtype, because small updates vanish in
    half precision.  ``{path: ..., dtype: bfloat16}`` loads them in half precision, for example for `LoRA`, which does
    not train them.
    """
    if isinstance(model, str):
        return _load_saved(kind, model, **options)
    if set(model) == {"path", "dtype"}:
        return _load_saved(kind, **model, **options)
    if set(model) == {"path", "quantization_config"}:
        return _load_quantized(kind, **model, **options)
    given = model.get("config")
    if set(model) != {"config"} or not isinstance(given, dict) or "model_type" not in given:
        raise RecipeError(
            f"model({model!r}): must be a path or a configuration. Write '{{config: {{model_type: ...}}}}', "
            "'{path: ..., dtype: bfloat16}' or '{path: ..., quantization_config: {...}}'."
        )
    given = dict(given)
    name = given.pop("model_type")
    if name not in CONFIG_MAPPING_NAMES:
        raise RecipeError(f"model.config.model_type({name!r}): is unknown. {nearest(str(name), CONFIG_MAPPING_NAMES)}")
    default = AutoConfig.for_model(name)
    known = default.to_dict().keys() | default.attribute_map.keys()
    for key in given:
        if key not in known:
            raise RecipeError(f"model.config: {type(default).__name__} has no {key!r}. {nearest(str(key), known)}")
    values = {**{name: value for name, value in options.items() if name in known}, **given}
    if tokenizer is not None:
        tokens = {f"{role}_token_id": getattr(tokenizer, f"{role}_token_id") for role in ("pad", "bos", "eos")}
        values = {"vocab_size": len(tokenizer), **tokens, **values}
    try:
        return kind.from_config(AutoConfig.for_model(name, **values))
    except (ValueError, TypeError, KeyError, StrictDataclassError) as error:
        raise RecipeError(f"model.config: {_on_a_line(error)} Correct the configuration.") from None


def dtype_of(name: str) -> torch.dtype:
    """Return a dtype of weights; raise RecipeError for an unknown name."""
    if name not in DTYPES:
        raise RecipeError(f"model.dtype({name!r}): is not a dtype of weights. {nearest(str(name), DTYPES)}")
    return DTYPES[name]


def _load_saved(kind: Any, path: str, dtype: Any = None, **options: Any) -> PreTrainedModel:
    wanted = None if dtype is None else dtype_of(dtype)
    try:
        config = AutoConfig.from_pretrained(path)
        quantized = getattr(config, "quantization_config", None) is not None
        return kind.from_pretrained(path, dtype=wanted or ("auto" if quantized else torch.float32), **options)
    except (OSError, ValueError) as error:
        raise RecipeError(_not_loaded("model", path, error)) from None
    except ImportError as error:  # no package for its quantized weights
        raise RecipeError(f"model({path!r}): {_on_a_line(error)}") from None


def _load_quantized(kind: Any, path: str, quantization_config: Any, **options: Any) -> PreTrainedModel:
    if not isinstance(quantization_config, dict):
        raise RecipeError(
            f"model.quantization_config({quantization_config!r}): must be a mapping. Write '{{load_in_4bit: true}}'."
        )
    try:
        AutoConfig.from_pretrained(path)
    except (OSError, ValueError) as error:
        raise RecipeError(_not_loaded("model", path, error)) from None
    try:
        return kind.from_pretrained(path, quantization_config=quantization_config, **options)
    except (ImportError, RuntimeError, OSError, ValueError, TypeError) as error:  # no package, no device, bad options
        raise RecipeError(f"model.quantization_config: {_on_a_line(error)}") from None


def _on_a_line(error: BaseException, length: int = 300) -> str:
    return " ".join(str(error).split())[:length]


def _not_loaded(subject: str, name: str, error: BaseException) -> str:
    if Path(name).is_dir():
        return f"{subject}({name!r}): cannot be loaded ({_on_a_line(error, 200)}). Check the folder."
    return f"{subject}({name!r}): neither a folder nor found on the Hub. Check the path."
