"""The digits of scikit-learn, which need no download."""

import functools

import numpy as np
from PIL import Image

from data.sources.source import Item, Request, Source, png


def open_digits(request: Request) -> Source | None:
    """Open scikit-learn's handwritten digits; every fifth of them is for testing.

    They are 1,797 grey 8x8 images in ten classes (Alpaydin & Kaynak 1998, UCI Machine Learning Repository).
    """
    if request.name != "digits":
        return None
    items = [
        Item(f"{i:06d}", f"digit {i}", i, split="test" if i % 5 == 4 else "train", label=int(label))
        for i, label in enumerate(_digits()[1])
    ]
    return Source(items, _read_digit, [str(digit) for digit in range(10)], ordered=True)


def _read_digit(item: Item) -> tuple[bytes, int]:
    return png(Image.fromarray(_digits()[0][item.where])), item.label


@functools.cache
def _digits() -> tuple[np.ndarray, np.ndarray]:
    """Return uint8 [1797, 8, 8] and labels [1797]."""
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    return (images.reshape(-1, 8, 8) * (255 / 16)).round().astype(np.uint8), labels
