"""What a task is judged by. Every metric is better the higher it is, so that their mean over tasks means something.

scikit-learn and scipy do the statistics; they are imported when a metric is computed.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from ..messages import nearest

Metric = Callable[[np.ndarray, np.ndarray], float]
"""(predictions, labels) to a score. Labels of −100 are not to be counted."""


def accuracy(predictions: np.ndarray, labels: np.ndarray) -> float:
    """Return the share of labels that are hit; over tokens where labels are sequences."""
    counted = labels != -100
    return float((predictions == labels)[counted].mean())


def exact_match(predictions: np.ndarray, labels: np.ndarray) -> float:
    """Return the share of sequences hit at every label.

    With a model's most likely token after each true prefix as predictions, this is the share of targets that greedy
    decoding would write exactly: it writes the target if and only if no step of it departs.

    Args:
        predictions: (N, L) token ids.
        labels: (N, L), −100 where nothing is predicted.
    """
    counted = labels != -100
    return float(((predictions == labels) | ~counted).all(-1)[counted.any(-1)].mean())


def _f1(predictions: np.ndarray, labels: np.ndarray) -> float:
    from sklearn.metrics import f1_score

    return float(f1_score(labels, predictions, average="binary" if set(np.unique(labels)) <= {0, 1} else "macro"))


def _matthews(predictions: np.ndarray, labels: np.ndarray) -> float:
    from sklearn.metrics import matthews_corrcoef

    return float(matthews_corrcoef(labels, predictions))


def _pearson(predictions: np.ndarray, labels: np.ndarray) -> float:
    from scipy.stats import pearsonr

    return 0.0 if np.ptp(predictions) == 0 else float(pearsonr(predictions, labels)[0])


def _spearman(predictions: np.ndarray, labels: np.ndarray) -> float:
    from scipy.stats import spearmanr

    return 0.0 if np.ptp(predictions) == 0 else float(spearmanr(predictions, labels)[0])


METRICS: dict[str, Metric] = {
    "accuracy": accuracy,
    "f1": _f1,
    "matthews": _matthews,
    "pearson": _pearson,
    "spearman": _spearman,
    "exact_match": exact_match,
}
"""Name to metric. A correlation with predictions that are all the same is 0."""


def find_metric(metric: str | Metric) -> tuple[str, Metric]:
    """Return a metric's name and function.

    Args:
        metric: A name of `METRICS`, or a function (predictions, labels) → score.

    Raises:
        ValueError: An unknown name; the message has the nearest.

    Example:
        >>> find_metric("accuracy")[0]
        'accuracy'
    """
    if callable(metric):
        return getattr(metric, "__name__", type(metric).__name__), metric
    if metric not in METRICS:
        raise ValueError(f"Unknown metric {metric!r}: expected one of {list(METRICS)}.{nearest(str(metric), METRICS)}")
    return metric, METRICS[metric]


def as_array(values: Any) -> np.ndarray:
    """Return predictions or labels, which `Trainer` gives as an array or a tuple of them, as one array."""
    return np.asarray(values[0] if isinstance(values, (tuple, list)) else values)
