"""What a screen shows of an image."""

from torch import Tensor


def visible(image: Tensor) -> Tensor:
    """Return images [n, channels, height, width] in [-1, 1] in grey or colour, [n, 1 or 3, height, width].

    Of four channels the fourth is alpha (-1 is clear, 1 opaque), and they are shown over white. Of two channels the
    first is shown, and of more than four the first three, as red, green and blue.
    """
    channels = image.shape[1]
    if channels != 4:
        return image[:, :1] if channels < 3 else image[:, :3]
    colour, alpha = image[:, :3], (image[:, 3:] + 1) / 2
    return colour * alpha + (1 - alpha)
