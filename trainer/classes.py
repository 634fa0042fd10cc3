"""The classes of images, for systems whose networks are given them (`system.classes`)."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from data.errors import DataError
from data.files import escaped
from data.loader import Samples
from data.order import permutation
from models import System


def check_labels(images: Samples, classes: int, labels: np.ndarray, positions: np.ndarray | None = None) -> None:
    """Check that labels are classes of a system that has `classes` of them.

    Args:
        images: where the labels are from
        labels: int64 [n], -1 where an image has none
        positions: of these images among all, [n]; None if they are all

    Raises:
        DataError: an image has no label, or one out of range; names the image.
    """
    wrong = np.flatnonzero((labels < 0) | (labels >= classes))
    if classes and len(wrong):
        first = int(wrong[0])
        found = f"label {labels[first]}" if labels[first] >= 0 else "no label"
        raise DataError(
            f"{images.name(first if positions is None else int(positions[first]))} has {found}, but system.classes is "
            f"{classes}, so every image needs a label from 0 to {classes - 1} (a member such as 000042.cls). Change "
            "system.classes, or prepare the data again, with a folder for each class"
        )


def check_class_names(names: Sequence[str], trained: Sequence[str], where: str) -> None:
    """Check that each label names the same class as in the training images, where both have names.

    Raises:
        DataError: a label names another class.
    """
    for label, (name, other) in enumerate(zip(names, trained, strict=False)):
        if name != other:
            raise DataError(
                f"{where}: label {label} is the class {escaped(name)}, but {escaped(other)} in data.train, and "
                "system.classes has the networks told the labels: prepare them with the same classes, such as the "
                "folders train and test of one data set"
            )


def in_turn(system: System, index: Tensor, classes: np.ndarray | list[int] | None = None) -> tuple[Tensor, ...]:
    """Return the classes of the images with these numbers [n], int64 [n], taken in turn, as `System.sample` takes them.

    A system without classes takes none.

    Args:
        classes: those that images are of (default: all of the system's)
    """
    if not system.classes:
        return ()
    chosen = torch.arange(system.classes) if classes is None else torch.as_tensor(classes)
    return (chosen[index.cpu() % len(chosen)].to(index.device),)


def shuffled_labels(system: System, images: Samples, seed: int) -> np.ndarray | None:
    """Return the labels of images in a fixed order of their own; None for a system without classes.

    Taken in turn, they have the images' shares of classes, as nearly as a number of them can.

    Raises:
        DataError: a label is not one of the system's classes.
    """
    if not system.classes:
        return None
    labels = images.labels
    check_labels(images, system.classes, labels)
    return labels[permutation(len(labels), seed)]
