"""What a screen shows of an image."""

from torch import Tensor


def visible(image: Tensor) -> Tensor:
    """Return images [n, channels, height, width] in [-1, 1] in grey or colour, [n, 1 or 3, height, width].

    Of four channels the fourth is alpha (-1 is clear, 1 opaque), and they are shown over white.
    """
    if image.shape[1] != 4:
        return image
    colour, alpha = image[:, :3], (image[:, 3:] + 1) / 2
    return colour * alpha + (1 - alpha)
