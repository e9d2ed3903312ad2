"""The direction of a metric: declared, never guessed from its name."""

from __future__ import annotations

TRAINER = {"loss": False, "runtime": False, "samples_per_second": True, "steps_per_second": True}
"""Metrics that Trainer itself computes."""

EVALUATE = dict.fromkeys(
    "accuracy bleu exact_match f1 matthews_correlation mean_iou meteor precision r_squared recall roc_auc "
    "rouge1 rouge2 rougeL rougeLsum".split(),
    True,
) | dict.fromkeys("brier_score cer mae mape mase mean_perplexity mse smape wer".split(), False)
"""Results of metrics of the library ``evaluate``, as their cards say; a metric of another name is none of them."""


def greater_is_better(metric: str, declared: bool | None = None) -> bool:
    """Return whether more of a metric is better, from a declaration, or from Trainer or ``evaluate`` for their own.

    Args:
        metric: Name of the metric, with or without ``eval_``.
        declared: The declaration; None: there is none.
    """
    known = TRAINER | EVALUATE
    name = metric.removeprefix("eval_")
    if declared is None and name not in known:
        raise ValueError(f"metric({name!r}): its direction is not declared. Set greater_is_better=True or False.")
    return known[name] if declared is None else declared
