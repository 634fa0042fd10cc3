"""Grids fit their images."""

import numpy as np
import pytest
import torch

from trainer.log.pictures import below_originals, grid, panel_size


def test_a_panel_of_few_images_has_no_empty_rows():
    """Five held-out images beside 48 samples: one row of images, then the next panel's title at once."""
    held_out, generated = torch.zeros(5, 1, 32, 32, dtype=torch.uint8), torch.zeros(48, 1, 32, 32, dtype=torch.uint8)
    drawn = np.asarray(grid({"real": held_out, "reconstructed": held_out, "generated": generated}))
    row, title = 64 + 2, 20
    assert drawn.shape == (3 * title + (1 + 1 + 4) * row - 2, 12 * row - 2, 3)
    starts = [title, row + 2 * title, 2 * row + 3 * title]
    for top, images in zip(starts, (5, 5, 12), strict=True):
        strip = drawn[top : top + 64]
        assert not strip[:, (images - 1) * row : images * row - 2].any()
        assert (strip[:, images * row :] == 255).all()
    assert not drawn[-64:, -64:].any()


def test_what_is_made_of_images_stands_below_them():
    """Also where the originals have 16 bits, and what is made of them eight."""

    def images(*numbers: int, dtype=torch.uint8) -> torch.Tensor:
        return torch.tensor(numbers).view(-1, 1, 1, 1).to(dtype)

    real = images(257, 514, 771, dtype=torch.uint16)
    panels = {"real": real, "reconstructed": images(4, 5, 6), "generated": images(7, 8, 9)}
    joined = below_originals(panels, 2)
    assert [*joined] == ["real, and reconstructed below", "generated"]
    assert joined["real, and reconstructed below"][:, 0].flatten().tolist() == [1, 2, 4, 5, 3, 255, 6, 255]
    assert joined["generated"] is panels["generated"]
    domains = dict.fromkeys(["a", "a to b", "b", "b to a"], images(1, 2))
    assert [*below_originals(domains, 2)] == ["a, and a to b below", "b, and b to a below"]


@pytest.mark.parametrize(
    ("size", "row", "number"),
    [
        *(((32, 32), 12, 48), ((128, 128), 12, 48), ((256, 256), 8, 16), ((1024, 256), 8, 8), ((512, 512), 4, 4)),
        *(((1024, 1024), 2, 2), ((16, 4096), 1, 16)),
    ],
)
def test_large_images_are_fewer(size, row, number):
    """Rows are 2,048 pixels wide at most, and a panel of more than one row has a million pixels at most."""
    assert panel_size(0, (3, *size)) == (row, number)
    with_classes, _ = panel_size(3, (3, *size))
    assert with_classes == max(row - row % 3, min(row, 2)), "whole sets of classes, or the first classes"
