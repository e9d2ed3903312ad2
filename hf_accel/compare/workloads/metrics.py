"""Metrics of the library ``evaluate``, for a Trainer."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from transformers import EvalPrediction


def evaluate_metric(name: str) -> Callable[[EvalPrediction], dict[str, float]]:
    """Return a ``compute_metrics`` for classification, from a metric's name on the Hub or the path of its module.

    The prediction is the class of the largest logit, the reference is the label.
    """
    try:
        import evaluate
    except ImportError:
        raise ValueError(
            f"metric({name!r}): needs evaluate. Install it with: pip install 'hf-accel[evaluate]'."
        ) from None
    try:
        metric = evaluate.load(name, keep_in_memory=True)
    except (OSError, ImportError, TypeError, ValueError) as error:
        reason = " ".join(str(error).split()).rstrip(".")[:200]
        raise ValueError(
            f"metric({name!r}): evaluate cannot load it ({reason}). "
            "Without a network, give the folder of a local metric."
        ) from None

    def compute(prediction: EvalPrediction) -> dict[str, float]:
        logits = prediction.predictions[0] if isinstance(prediction.predictions, tuple) else prediction.predictions
        labels = np.asarray(prediction.label_ids)
        if np.ndim(logits) != 2 or labels.shape != (len(logits),) or not np.issubdtype(labels.dtype, np.integer):
            raise ValueError(
                f"metric({name!r}): only logits with one label per example are supported, not logits of shape "
                f"{np.shape(logits)} and {labels.dtype} labels of shape {labels.shape}. Use the workload's metrics."
            )
        found = metric.compute(predictions=np.argmax(logits, axis=-1), references=labels) or {}
        return {key: float(value) for key, value in found.items() if isinstance(value, int | float)}

    return compute
