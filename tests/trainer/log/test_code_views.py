"""What a run shows of its codes: closed forms of the KL, what a traversal varies, and what the projector gets."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from data.loader import read
from data.shards.reader import Shards
from trainer.batch import normalize
from trainer.config.settings import DataConfig, Location
from trainer.log.board import Board
from trainer.log.codes import EMBEDDED, Embedded, code_views, embed
from trainer.log.pictures import thumbnails

KL = [0.5, 2.0, 0.0, 1.0]


class Coder:
    """A system whose codes have the means [1, 2, 0, ...] * sign, and that notes which codes it draws images of."""

    def __init__(self, shape: tuple[int, ...], certain: bool = False):
        self.shape, self.certain, self.drawn = shape, certain, []

    def posterior(self, image):
        mean = torch.tensor([1.0, 2.0, 0.0, 2**0.5]).view(self.shape).repeat(len(image), *[1] * len(self.shape))
        mean[::2] *= -1
        return mean, torch.full_like(mean, -torch.inf if self.certain else 0.0)

    def sample(self, z):
        self.drawn.append(z)
        return z.mean(1).view(-1, 1, 1, 1).expand(-1, 1, 8, 8).clamp(-1, 1)


IMAGES = torch.zeros(6, 1, 8, 8, dtype=torch.uint8)


def test_the_kl_of_each_number_is_the_closed_form_and_orders_the_traversal():
    coder = Coder((4,))
    views = code_views(coder, IMAGES)
    assert views.kl.tolist() == pytest.approx(KL, rel=1e-6)  # m^2 / 2, where the variance is 1, of float32 means
    assert views.means.shape == (6, 4)
    first = coder.posterior(IMAGES)[0][0]
    for codes, number in zip(coder.drawn, [1, 3, 0, 2], strict=True):
        assert codes[:, number].tolist() == pytest.approx(np.linspace(-3, 3, 9).tolist())
        codes[:, number] = first[number]
        assert torch.equal(codes, first.expand(9, 4)), "the other numbers are those of an image"
    assert views.traversal.size[1] > 4 * 64, "a row for each number"


def test_certain_codes_have_no_kl_and_vary_by_their_own_deviations():
    coder = Coder((4,), certain=True)
    views = code_views(coder, IMAGES)
    assert views.kl is None
    assert coder.drawn[0][:, 1].tolist() == pytest.approx(np.linspace(-6, 6, 9).tolist())  # they are -2 and 2
    code_views(coder, IMAGES[:1])
    assert coder.drawn[-1].isfinite().all(), "a single image"


def test_maps_of_codes_have_a_kl_for_each_number_and_no_traversal():
    views = code_views(Coder((1, 2, 2)), IMAGES)
    assert (views.kl.tolist(), views.traversal) == (pytest.approx(KL, rel=1e-6), None)


def test_the_projector_gets_codes_labels_and_images_of_the_same_samples(digits):
    sources = {name: Location(digits / name) for name in ("train", "test")}
    data, shards = DataConfig(**sources, size=32, channels=1), Shards(digits / "train")
    system = SimpleNamespace(posterior=lambda image: (image[:, 0, ::8, ::8], None))
    found = embed(system, shards, data, 0, torch.device("cpu"))
    assert (len(found.codes), found.images.shape) == (EMBEDDED, (EMBEDDED, 1, 32, 32))
    all_of_them = read(shards, np.arange(len(shards)), 32, 1)
    labels = {
        tuple(image.flatten().tolist()): str(int(label)) for image, label, *_ in zip(*all_of_them[:2], strict=True)
    }
    for code, label, image in zip(*found, strict=True):
        pixels = (image * 255).round().to(torch.uint8)
        assert torch.equal(code, normalize(pixels)[0, ::8, ::8].flatten())
        assert labels[tuple(pixels.flatten().tolist())] == label


def test_images_of_any_shape_are_squares_in_the_projector(tmp_path, capsys):
    images = torch.full((5, 3, 64, 16), 255, dtype=torch.uint8)
    squares = thumbnails(images, 32)
    assert squares.shape == (5, 3, 32, 32)
    assert squares[..., :8].eq(1).all()
    assert squares[..., 8:].eq(0).all()
    for _ in range(2):  # the second end of a run takes the place of the first
        board = Board(tmp_path, 0)
        board.embed(Embedded(torch.zeros(5, 2), list("abcde"), squares))
        board.close()
    assert (tmp_path / "projector" / "codes" / "metadata.tsv").read_text() == "a\nb\nc\nd\ne\n"
    assert capsys.readouterr().out == "", "no warning about what is there"
