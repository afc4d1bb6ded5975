"""Scores of a frozen encoder's features: weighted k-nearest neighbours and a linear probe."""

from caco_fast.evaluate.evaluator import EvaluationConfig, Evaluator
from caco_fast.evaluate.features import extract_features
from caco_fast.evaluate.knn import knn_accuracy
from caco_fast.evaluate.linear_probe import linear_probe

__all__ = ["EvaluationConfig", "Evaluator", "extract_features", "knn_accuracy", "linear_probe"]
