"""A frozen vision transformer: timm's structure, its images, and the loss, discriminator and alignment that use it."""

import pytest
import torch
from systems_under_test import MAPS, SILENT, SMALL, aligned, batch_of, vaegan, vit_file
from torch.nn.functional import cosine_similarity, interpolate, one_hot

from models import VAE, CodesConfig
from models.codes import alignment, code_gradients
from models.networks.dino import DINO
from models.networks.perceptual import Perceptual

F64 = torch.float64


@pytest.fixture(scope="module")
def dino():
    return DINO(vit_file(), "system.setting").double()


def test_its_features_are_those_of_timm():
    transformer = pytest.importorskip("timm.models.vision_transformer").VisionTransformer
    # DINO's ViT-S/8 but for its size; timm's own files have these names, too.
    theirs = transformer(48, 8, embed_dim=128, depth=4, num_heads=2, num_classes=0).double().eval()
    dino = DINO(vit_file(128), "system.setting").double()
    state = torch.load(vit_file(128), weights_only=True)
    grid = state["pos_embed"][:, 1:].double().mT.unflatten(2, (4, 4))
    grown = interpolate(grid, (6, 6), mode="bicubic").flatten(2).mT  # as DINO's own code does
    theirs.load_state_dict(state | {"pos_embed": torch.cat([state["pos_embed"][:, :1], grown], 1)})
    image = torch.rand(2, 3, 48, 48, dtype=F64, requires_grad=True)
    standard = (image - torch.tensor([0.485, 0.456, 0.406])[:, None, None]) / torch.tensor([0.229, 0.224, 0.225])[
        :, None, None
    ]
    maps, expected = dino(2 * image - 1), theirs.forward_intermediates(standard, indices=4, intermediates_only=True)
    expected[-1] = theirs.norm(expected[-1].flatten(2).mT).mT.unflatten(2, (6, 6))
    # The constants above are float32. Their rounding, 2^-24, grows by a few magnitudes in 4 blocks.
    for ours, other in zip(maps, expected, strict=True):
        torch.testing.assert_close(ours, other, rtol=1e-4, atol=1e-4)
    (gradient,) = torch.autograd.grad(maps[-1].square().sum(), image)
    assert (gradient.abs() > 0).all(), "it reaches every pixel"


def test_images_keep_their_size_up_to_224_pixels(dino):
    for size, expected in (((64, 64), (8, 8)), ((30, 44), (4, 6)), ((336, 448), (21, 28))):
        assert dino(torch.zeros(1, 1, *size, dtype=F64))[0].shape == (1, 64, *expected)


def test_another_file_is_refused_by_the_setting(tmp_path):
    torch.save({"weight": torch.ones(1)}, tmp_path / "other.pth")
    with pytest.raises(
        ValueError, match=r"^system.binary.dino_weights: .*other.pth is not .* of DINO or timm \(it has no p"
    ):
        vaegan(config=type(SILENT)(r1_weight=0.0, dino_weights=str(tmp_path / "other.pth")))
    torch.save(
        {"pos_embed": torch.ones(1, 2, 8), "patch_embed.proj.weight": torch.ones(8, 3, 8, 8)}, tmp_path / "b.pth"
    )
    with pytest.raises(ValueError, match=r"b.pth is not .* \(it has no blocks\.0\.norm1\.weight\)$"):
        DINO(str(tmp_path / "b.pth"), "system.setting")
    with pytest.raises(
        ValueError, match=r"^system\.setting: nofile\.pth does not exist, expected a file of the state_dict"
    ):
        DINO("nofile.pth", "system.setting")


def test_a_perceptual_distance_is_the_mean_over_depths_of_one_minus_a_cosine(dino):
    distance = Perceptual("dino", vit_file()).double()
    a, b = (torch.rand(2, 3, 32, 32, dtype=F64) * 2 - 1 for _ in range(2))
    assert distance(a, a).item() == pytest.approx(0, abs=1e-12)
    expected = torch.stack([1 - cosine_similarity(x, y).mean() for x, y in zip(dino(a), dino(b), strict=True)]).mean()
    torch.testing.assert_close(distance(a, b), expected)


def test_a_discriminator_of_features_trains_its_heads_alone_and_its_opponent_through_them():
    torch.manual_seed(0)
    system = vaegan("ternary", networks=MAPS, config=type(SILENT)(r1_weight=0.0, dino_weights=vit_file()))
    assert set(system.networks()) == {"encoder", "decoder", "discriminator_ternary"}
    assert all(not weight.requires_grad for weight in system.dino_ternary.parameters())
    batch = batch_of()
    game, images = system.adversaries["ternary"], {"reconstructed": batch.image.clone().requires_grad_()}
    logits = game._logits(batch, images)["reconstructed"]
    assert logits.shape == (4, 3, 4 * 4 * 4)
    (gradient,) = torch.autograd.grad(game.generator_loss(batch, batch.image, images), images["reconstructed"])
    assert (gradient.flatten(1).norm(dim=1) > 0).all()


def test_alignment_by_hand():
    """Two positions with orthogonal codes and equal features: every cosine is 0 or 1."""
    z = one_hot(torch.arange(2)).double().mT.reshape(1, 2, 1, 2)
    f = torch.tensor([1.0, 0.0], dtype=F64).reshape(1, 2, 1, 1).expand(1, 2, 1, 2)
    # cos(z_i, f_i) is 1 and 0; of four pairs of positions, two differ by 1.
    assert alignment(z, z, f, (0.25, 0.25)).item() == pytest.approx((0 + 0.75) / 2 + 2 * 0.75 / 4)
    assert alignment(z, f, f, (0.0, 1.0)).item() == pytest.approx(0)


def test_the_alignments_weight_is_the_ratio_of_gradients_at_the_codes():
    torch.manual_seed(0)
    system = VAE(32, 1, 4, MAPS, codes=aligned(CodesConfig())).double()
    batch = batch_of(dtype=F64)
    passes = system.passes(batch)
    value, terms, statistics, _ = system.loss(batch, passes)
    plain = terms["reconstruction"] + terms["kl"]
    torch.testing.assert_close(value, plain + 0.1 * terms["alignment"])
    norms = []
    for name in ("reconstruction", "alignment"):
        (gradient,) = torch.autograd.grad(terms[name], passes.z, retain_graph=True)
        norms.append((4 * gradient).flatten(1).square().sum(1).mean().sqrt())  # each image's own loss is 4 of the mean
    system.code_terms.after(statistics)
    torch.testing.assert_close(system.alignment_weight, norms[0] / (norms[1] + 1e-4))
    assert terms["alignment_weight"] == 1, "that of the step before"
    again = system.loss(batch, passes)
    torch.testing.assert_close(again.value, plain + 0.1 * system.alignment_weight * terms["alignment"])
    with pytest.raises(ValueError, match=r"alignment is 0.1, expected 0, as the encoder"):
        system.check_frozen(["encoder"])


def test_the_alignments_weight_may_be_large_and_stays_where_there_is_no_gradient_or_it_overflows():
    system = VAE(32, 1, 4, MAPS, codes=aligned(CodesConfig()))
    found = []
    for squares in ((1e10, 1e-2), (1e10, 0.0), (torch.inf, 1e-2), (1e10, torch.inf)):
        system.code_terms.after({"code_gradients": torch.tensor(squares)})
        found.append(system.alignment_weight.item())
    assert found[0] == pytest.approx(1e5 / (1e-1 + 1e-4))
    assert found[1:] == [found[0]] * 3


def test_the_gradient_of_an_alignment_over_many_positions_is_there_in_fp16():
    """32 images of 32 x 32 positions have 2^25 pairs of positions: a mean over them has gradients of 2^-25, or 0."""
    torch.manual_seed(0)
    z = torch.randn(32, 4, 32, 32, requires_grad=True)
    features = torch.randn(32, 4, 32, 32)
    found = []
    for half in (False, True):
        with torch.autocast("cpu", torch.float16, enabled=half):
            found.append(code_gradients(z, z.square().sum() / 32, alignment(z, features, features, (0.0, 0.1))))
    # Numbers are rounded to 2^-11 of their magnitude three times on the way (codes, cosines, differences) and four
    # times back; a share of pairs of about as much falls to the other side of the margin.
    assert found[1][1].sqrt().item() == pytest.approx(found[0][1].sqrt().item(), rel=10 * 2**-11)


def test_weights_in_half_precision_are_used_in_fp32(tmp_path):
    halved = {name: value.half() for name, value in torch.load(vit_file(), weights_only=True).items()}
    torch.save(halved, tmp_path / "half.pth")
    torch.save({name: value.float() for name, value in halved.items()}, tmp_path / "whole.pth")
    image = torch.rand(1, 1, 32, 32) * 2 - 1
    half, whole = (DINO(str(tmp_path / f"{name}.pth"), "system.setting")(image)[-1] for name in ("half", "whole"))
    assert half.dtype == torch.float32
    assert half.equal(whole)


@pytest.mark.parametrize(
    ("words", "build"),
    [
        (
            "r1_weight is 0.1, expected 0 while system.binary.dino_weights is set",
            lambda: vaegan(config=type(SILENT)(dino_weights="vit.pth")),
        ),
        (
            "binary.dino_weights is .*, expected null while system.reconstruction is features",
            lambda: vaegan(reconstruction="features", config=type(SILENT)(r1_weight=0.0, dino_weights=vit_file())),
        ),
        ("alignment is 0.1 and system.codes.dino_weights is null: set both", lambda: vae(alignment=0.1)),
        ("codes.margins has no effect while system.codes.alignment is 0", lambda: vae(margins=(0.0, 0.0))),
        ("codes.margins is .-1, 0., expected two numbers", lambda: vae(margins=(-1, 0))),
        (
            "networks.latent_stride is null, expected .* while system.codes.alignment is 0.1",
            lambda: VAE(32, 1, 4, SMALL, codes=aligned(CodesConfig())),
        ),
    ],
)
def test_what_does_not_fit_is_refused_by_name(words, build):
    with pytest.raises(ValueError, match=words):
        build()


def vae(**codes):
    return VAE(32, 1, 4, MAPS, codes=CodesConfig(**codes))
