"""The task stream: class order, sizes of tasks, labels, and what it refuses."""

from __future__ import annotations

import numpy as np
import pytest

from plora_ext.cil.stream import TaskStream


def labels(num_classes: int, each: int = 2) -> np.ndarray:
    return np.tile(np.arange(num_classes), each)


def sizes(stream: TaskStream) -> list[int]:
    return [len(task.classes) for task in stream]


def test_class_order_of_seed_1993() -> None:
    stream = TaskStream(labels(100), labels(100))
    assert stream.class_order[:10] == [68, 56, 78, 8, 23, 84, 90, 65, 74, 76]
    assert sizes(stream) == [10] * 10


@pytest.mark.parametrize(
    ("init_cls", "increment", "expected"),
    [(0, 10, [10, 10, 3]), (11, 4, [11, 4, 4, 4]), (5, 7, [5, 7, 7, 4]), (30, 5, [23]), (0, 23, [23])],
)
def test_sizes_of_tasks(init_cls: int, increment: int, expected: list[int]) -> None:
    stream = TaskStream(labels(23), labels(23), init_cls, increment)
    assert sizes(stream) == expected
    assert len(stream) == len(expected)
    assert stream.task_of_class().tolist() == [t for t, size in enumerate(expected) for _ in range(size)]


def test_tasks_partition_the_images_and_count_labels_by_class_order() -> None:
    train, test = labels(7, 5), labels(7, 3)
    stream = TaskStream(train, test, increment=3, seed=5)
    order = np.array(stream.class_order)
    assert sorted(np.concatenate([task.train for task in stream]).tolist()) == list(range(len(train)))
    for task in stream:
        assert set(task.train_labels) == set(task.test_labels) == set(task.classes)
        np.testing.assert_array_equal(order[task.train_labels], train[task.train])
        np.testing.assert_array_equal(order[task.test_labels], test[task.test])
    joined = stream.joined()
    assert joined.classes == range(7) and len(joined.train) == len(train) and len(joined.test) == len(test)


def test_given_orders_and_tasks() -> None:
    assert TaskStream(labels(4), labels(4), class_order="sorted").class_order == [0, 1, 2, 3]
    assert TaskStream(labels(4), labels(4), class_order=[3, 1, 0, 2], increment=3).class_order == [3, 1, 0, 2]
    stream = TaskStream(labels(4), labels(4), tasks=[[2], [3, 0, 1]])
    assert stream.class_order == [2, 3, 0, 1] and sizes(stream) == [1, 3]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"tasks": [[0, 1], [1, 2]]}, "tasks must name each of the 4 classes exactly once; missing: 3; repeated: 1"),
        ({"tasks": [[0, 1], [2, 3, 9]]}, "unknown: 9"),
        ({"tasks": [[0, 1, 2, 3], []]}, "an empty task"),
        ({"tasks": [[0], [1], [2], [3], [0]]}, "tasks names 5 tasks, but the data has 4 classes"),
        ({"class_order": [0, 1, 2]}, "class_order must name each of the 4 classes exactly once; missing: 3"),
        ({"class_order": "random"}, "class_order must be a list of classes"),
        ({"increment": 0}, "increment must be at least 1"),
        ({"train_labels": [0, 1, 2, -1]}, "train_labels must lie in 0 ... 2, got unknown class -1"),
        ({"test_labels": [0, 1, 7, 3]}, "test_labels must lie in 0 ... 3, got unknown class 7"),
        ({"train_labels": [0, 1, 3, 3]}, "every class needs a training image, got none for class 2"),
        ({"train_labels": [0, 5, 9, 9]}, "must be 0 ... 9 without gaps, found 0, 5, 9"),
        ({"test_labels": [0, 1], "tasks": [[0, 1], [2, 3]]}, "every task needs a test image, got none for task 1"),
        ({"train_labels": []}, "at least one label"),
        ({"train_labels": [0.0, 1.9, 2.2, 3.0]}, "train_labels must be integers, got float64"),  # they were cut
    ],
)
def test_what_it_refuses(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message.replace("[", r"\[").replace("...", r"\.\.\.")):
        TaskStream(**{"train_labels": labels(4), "test_labels": labels(4), **arguments})
