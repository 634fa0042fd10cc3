"""A batch: pixels to [-1, 1] and back, draws by name and position alone, and values put together from parts."""

import pytest
import torch

from trainer.batch import Batch, normalize, to_uint8
from trainer.draws import draw


def batch_of(n=6, rows=slice(2, 8), size=8, seed=3, step=5, dtype=torch.float32) -> Batch:
    images = torch.arange(n * 4, dtype=dtype).view(n, 1, 2, 2)
    return Batch((images, -images), rows, size, seed, step)


def test_every_pixel_comes_back():
    pixels = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16)
    image = normalize(pixels)
    assert (image.min(), image.max()) == (-1, 1)
    assert image.dtype == torch.float32
    assert torch.equal(to_uint8(image), pixels)
    step = 1 / 127.5
    assert torch.equal(to_uint8(image + 0.4 * step), pixels)
    assert torch.equal(to_uint8(image - 0.4 * step), pixels)
    assert to_uint8(torch.tensor([-9.0, 9.0])).tolist() == [0, 255]
    assert to_uint8(image).dtype == torch.uint8
    assert normalize(pixels.permute(0, 2, 3, 1)).is_contiguous()


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_pixels_that_are_not_finite_are_counted(bad):
    with pytest.raises(FloatingPointError, match=r"^2 of 3 pixels are not finite$"):
        to_uint8(torch.tensor([bad, 0.0, bad]))


@pytest.mark.parametrize(("name", "of"), [("normal", torch.randn), ("uniform", torch.rand)])
def test_draws_are_rows_of_the_global_batchs(name, of):
    part = getattr(batch_of(), name)("prior", (3,))
    assert torch.equal(part, draw(of, 3, 5, "prior", slice(0, 8), (3,), torch.device("cpu"))[2:8])
    assert torch.equal(part, getattr(batch_of(size=99), name)("prior", (3,))), "other positions change nothing"
    others = [batch_of(seed=4), batch_of(step=6)]
    assert all(not torch.equal(getattr(other, name)("prior", (3,)), part) for other in others)
    assert not torch.equal(getattr(batch_of(), name)("posterior", (3,)), part)
    assert torch.equal(getattr(batch_of(dtype=torch.float64), name)("prior", (3,)), part.double())


def test_parts_are_rows_of_every_set_in_order():
    batch = batch_of()
    parts = batch.split(2)
    assert [part.rows for part in parts] == [slice(2, 4), slice(4, 6), slice(6, 8)]
    assert {(part.batch_size, part.seed, part.step) for part in parts} == {(8, 3, 5)}
    for i, images in enumerate(batch.images):
        assert torch.equal(torch.cat([part.images[i] for part in parts]), images)
    assert torch.equal(batch.image, batch.images[0])
    assert [part.positions().tolist() for part in parts] == [[2, 3], [4, 5], [6, 7]]


def test_turns_and_ramps_begin_at_their_first_step():
    def at(step: int) -> Batch:
        return batch_of(step=step)

    assert [step for step in range(8) if at(step).due(3)] == [0, 3, 6]
    assert [step for step in range(8) if at(step).due(3, 2)] == [2, 5]
    assert [at(step).ramp(3, 0) for step in (2, 3, 4)] == [0, 1, 1]
    assert [at(step).ramp(3, 2) for step in (0, 3, 4, 5, 7)] == [0, 0, 0.5, 1, 1]
