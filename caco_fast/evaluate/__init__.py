"""Scores of a frozen encoder's features (kNN, a linear probe), and the method's loss on held-out images."""

from caco_fast.evaluate.evaluator import EvaluationConfig, Evaluator
from caco_fast.evaluate.features import extract_features
from caco_fast.evaluate.held_out import HeldOut
from caco_fast.evaluate.knn import knn_accuracy, knn_scores
from caco_fast.evaluate.linear_probe import linear_probe

__all__ = ["EvaluationConfig", "Evaluator", "HeldOut", "extract_features", "knn_accuracy", "knn_scores", "linear_probe"]
