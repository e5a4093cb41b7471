"""Metrics of class-incremental learning, with the definitions spelled out, since toolboxes differ.

Accuracies are in percent. With T tasks, `matrix[t][i]` is the accuracy on the test images of task i's classes after
task t was learned, among all classes seen by then (no task identity is given); it is defined for i <= t.
`curve[b]` is A_b, the top-1 accuracy over the test images of all classes seen after task b.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

Matrix = Sequence[Sequence[float]]  # row t holds t + 1 accuracies


def evaluated_on(validation: float) -> str:
    """In words, the images that accuracies are of under the setting `validation`."""
    return f"{100 * validation:g} % of the training images" if validation else "the test images"


def average_accuracy(curve: Sequence[float]) -> float:
    """Average incremental accuracy, the mean of A_1 ... A_B over the tasks ("Ā"; PILOT's "Average Accuracy")."""
    return float(np.mean(curve))


def last_accuracy(curve: Sequence[float]) -> float:
    """Accuracy over all classes after the last task ("A_B")."""
    return float(curve[-1])


def fallen(matrix: Matrix) -> list[float]:
    """For every task but the last, its best accuracy minus its last."""
    return [max(row[i] for row in matrix[i:]) - matrix[-1][i] for i in range(len(matrix) - 1)]


def forgetting(matrix: Matrix) -> float | None:
    """Mean over i < T of max_b a[b, i] - a[T, i]: how far each old task fell from its best; None for one task."""
    drops = fallen(matrix)
    return float(np.mean(drops)) if drops else None


def backward_transfer(matrix: Matrix) -> float | None:
    """Mean over i < T of a[T, i] - a[i, i] ("BWT"): what later tasks did to each old one; None for one task."""
    last = len(matrix) - 1
    changes = [matrix[last][i] - matrix[i][i] for i in range(last)]
    return float(np.mean(changes)) if changes else None


def task_accuracies(correct: np.ndarray, task_of_image: np.ndarray) -> list[float]:
    """One row of the matrix: percent correct among the images of each task."""
    return (100.0 * np.bincount(task_of_image, weights=correct) / np.bincount(task_of_image)).tolist()
