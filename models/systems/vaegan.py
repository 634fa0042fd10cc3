"""The VAE-GAN: discriminators make a VAE's reconstructions and samples sharp."""

from collections.abc import Collection
from functools import partial
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from models import losses
from models.adaptive import AdaptiveWeight
from models.adversary import Adversary, Fakes, check_patches
from models.codes import CodesConfig, CodeTerms
from models.losses import Mode, Opponent
from models.networks import ImageSize, NetworkConfig, build_decoder, build_encoder
from models.networks.perceptual import Perceptual, PerceptualKind
from models.settings import (
    DiscriminatorConfig,
    OptimizerConfig,
    WeightsFile,
    check,
    check_kl,
    check_not_negative,
    check_unused,
)
from models.system import Autoencoding, Batch, Loss, Player, System, Terms


class Passes(NamedTuple):
    mean: Tensor
    log_variance: Tensor
    z: Tensor
    reconstructed: Tensor
    generated: Tensor | None  # None without `samples`
    adversarial: Tensor  # the reconstructions that carry the adversarial gradient
    decoded: Tensor  # all of these images, in one tensor, as the decoder returned it


class VAEGAN(Autoencoding, System):
    """VAE-GAN (Larsen et al. 2016) whose discriminators are shown reconstructions and samples from the prior.

    The `binary` discriminator tells real images from fakes. The `ternary` one tells real, reconstructed and generated
    images apart, which drives the encoder's codes to match the prior. Each has its own network and its own optimizer.
    Encoder and decoder are trained on reconstruction_weight * reconstruction + kl_weight * KL + adversarial_weight *
    (mean generator loss of the discriminators).

    Args:
        discriminator: binary, ternary, or both, whose generator losses are averaged
        reconstruction: what is compared with the image: pixels, features of a discriminator's layer (Larsen et al.
            2016, eq. 7), or the sum of both
        likelihood: distribution p(x|z) of pixels: gaussian (squared error) or laplace (absolute error); features are
            always gaussian
        feature_discriminator: discriminator whose features are compared, from step 0 on whatever its `start`; required
            if there are both and reconstruction is not pixels
        feature_layer: level of that discriminator whose features are compared, counted from 0; null takes the last
        reconstruction_weight: weight of the reconstruction term, a sum over pixels; raise it for closer reconstructions
        perceptual_weight: weight of the distance of image and reconstruction in a trained network; 0 turns it off
        perceptual: network of the perceptual term: lpips (VGG16 with LPIPS's weights, Zhang et al. 2018), convnext
            (ConvNeXt-S) or dino (cosines of features of DINO's ViT-S/8 or another, Caron et al. 2021)
        perceptual_weights: file of that network's weights as torchvision distributes them (a state_dict); for dino as
            DINO or timm do (`dino_deitsmall8_pretrain.pth`, or model.safetensors of `vit_small_patch8_224.dino`)
        kl_weight: weight of KL(q(z|x) || N(0, I)) in nats; raise it if samples are worse than reconstructions
        adversarial_weight: weight of the mean generator loss; raise it for sharper images, lower it against artefacts
        adaptive: multiply adversarial_weight by the ratio of the gradient norms of mean reconstruction and generator
            loss at the decoder's last layer (Esser et al. 2021, eq. 7), both of the step before. As the reconstruction
            is a sum over pixels and channels, VQGAN's weight of 0.8 is adversarial_weight = 0.8 * channels * size^2
        adaptive_limit: largest factor that adaptive may apply; `adaptive_saturated` in the log is the fraction of
            steps at it. LDM's limit of 1e4 is of sums over pixels: adaptive_limit = 1e4 / (channels * size^2)
        encoder_adversarial: let the adversarial gradient reach the encoder, too; off costs one more decoder pass
        opponent: class that the ternary discriminator is made to predict for fakes: real, or any but their own
            (not_own)
        samples: show the discriminators samples from the prior, too. Turn it off for a tokenizer, whose codes another
            model will draw, and whose kl_weight is too small for good samples: it saves a decoder pass
        class_weights: relative weights of real, reconstructed and generated images in the ternary discriminator's loss
        binary: settings of the binary discriminator; null takes the defaults
        ternary: settings of the ternary discriminator; null takes the defaults
    """

    averaged = ("encoder", "decoder")
    architecture = ("latent_dim", "networks", "classes")

    def __init__(
        self,
        image_size: ImageSize,
        channels: int,
        latent_dim: int = 32,
        networks: NetworkConfig = NetworkConfig(),
        discriminator: Literal["binary", "ternary", "both"] = "binary",
        reconstruction: Literal["pixels", "features", "both"] = "pixels",
        likelihood: Literal["gaussian", "laplace"] = "gaussian",
        feature_discriminator: Mode | None = None,
        feature_layer: int | None = None,
        reconstruction_weight: float = 1.0,
        perceptual_weight: float = 0.0,
        perceptual: PerceptualKind = "lpips",
        perceptual_weights: WeightsFile | None = None,
        kl_weight: float = 1.0,
        kl_warmup: int = 0,
        free_bits: float = 0.0,
        adversarial_weight: float = 10.0,
        adaptive: bool = False,
        adaptive_limit: float = 1e4,
        encoder_adversarial: bool = True,
        opponent: Opponent = "real",
        samples: bool = True,
        class_weights: tuple[float, float, float] = (1.0, 1.0, 1.0),
        autoencoder: OptimizerConfig = OptimizerConfig(),
        binary: DiscriminatorConfig | None = None,
        ternary: DiscriminatorConfig | None = None,
        codes: CodesConfig | None = None,
        classes: int = 0,
    ):
        super().__init__()
        self.classes, self.judged_by = classes, "fid" if samples else "rfid"
        self.reconstruction, self.likelihood, self.optimizer = reconstruction, likelihood, autoencoder
        self.reconstruction_weight, self.perceptual_weight = reconstruction_weight, perceptual_weight
        self.kl_weight, self.kl_warmup, self.free_bits = kl_weight, kl_warmup, free_bits
        self.adversarial_weight, self.encoder_adversarial = adversarial_weight, encoder_adversarial
        self.adaptive, self.adaptive_limit, self.samples = adaptive, adaptive_limit, samples
        self._check_weights()
        self.latent_shape = networks.latent_shape(image_size, latent_dim)
        self.encoder = build_encoder(networks, image_size, channels, 2 * latent_dim)
        self.decoder = build_decoder(networks, image_size, channels, latent_dim, classes)
        self._check_discriminators(discriminator, binary, ternary, opponent, class_weights)
        game = partial(Adversary, self, networks=networks, image_size=image_size, channels=channels)
        self.adversaries: dict[Mode, Adversary] = {}
        if discriminator in ("binary", "both"):
            self.adversaries["binary"] = game("binary", binary or DiscriminatorConfig())
        if discriminator in ("ternary", "both"):
            self.adversaries["ternary"] = game(
                "ternary", ternary or DiscriminatorConfig(), opponent=opponent, class_weights=class_weights
            )
        check_patches(networks, *self.adversaries.values())
        self.feature_mode, self.feature_layer = self._choose_features(feature_discriminator, feature_layer)
        self.adaptive_weighting = AdaptiveWeight(self, adaptive_limit) if adaptive else None
        self._add_perceptual(perceptual, perceptual_weights)
        self.code_terms = CodeTerms(self, codes)

    def passes(self, batch: Batch) -> Passes:
        mean, log_variance = self.posterior(batch.image)
        z = losses.reparameterize(mean, log_variance, batch.normal("posterior", self.latent_shape))
        decodable = self.code_terms.noised(batch, z)
        codes = [decodable]
        if self.samples:
            codes.append(batch.normal("prior", self.latent_shape))
        if not self.encoder_adversarial:  # the adversarial gradient enters the decoder by another pass on fixed codes
            codes.append(decodable.detach())
        decoded = self.decoder(torch.cat(codes), *self.told(batch.label, len(codes)))
        images = decoded.chunk(len(codes))
        generated = images[1] if self.samples else None
        adversarial = images[0] if self.encoder_adversarial else images[-1]
        return Passes(mean, log_variance, z, images[0], generated, adversarial, decoded)

    def fakes(self, passes: Passes) -> Fakes:
        fakes = {"reconstructed": passes.reconstructed}
        return fakes if passes.generated is None else fakes | {"generated": passes.generated}

    def discriminator_loss(self, mode: Mode, batch: Batch, passes: Passes) -> Loss:
        return self.adversaries[mode].discriminator_loss(batch, batch.image, self.fakes(passes))

    def loss(self, batch: Batch, passes: Passes) -> Loss:
        terms = self.reconstruction_terms(batch, passes.reconstructed)
        first, *rest = (value for name, value in terms.items() if name != "perceptual")
        reconstruction = self.reconstruction_weight * sum(rest, first)
        if "perceptual" in terms:
            reconstruction = reconstruction + self.perceptual_weight * terms["perceptual"]
        kl = losses.gaussian_kl(passes.mean, passes.log_variance, self.free_bits)
        codes = self.code_terms.loss(batch, passes.z, reconstruction, self._pixels)
        loss = reconstruction + self.kl_weight * batch.ramp(0, self.kl_warmup) * kl + codes.value
        fakes = self.fakes(passes._replace(reconstructed=passes.adversarial))
        counting = {mode: game for mode, game in self.adversaries.items() if game.counts(batch)}
        generator_losses = {mode: game.generator_loss(batch, batch.image, fakes) for mode, game in counting.items()}
        terms |= {"kl": kl} | codes.terms
        terms |= {f"generator_loss/{mode}": value for mode, value in generator_losses.items()}
        if not counting:
            return Loss(loss, terms, codes.statistics)
        weights = {mode: game.weight(batch) for mode, game in counting.items()}
        generator_loss = losses.weighted_mean(generator_losses, weights)
        adversarial_weight = self.adversarial_weight * max(weights.values())  # a second one's ramp weakens no first one
        if not self.adaptive_weighting:
            return Loss(loss + adversarial_weight * generator_loss, terms, codes.statistics)
        ratio = self.adaptive_weighting(passes.decoded, reconstruction / batch.image[0].numel(), generator_loss)
        loss = loss + ratio.value * adversarial_weight * generator_loss
        return Loss(loss, terms | ratio.terms, codes.statistics | ratio.statistics)

    def reconstruction_terms(self, batch: Batch, reconstructed: Tensor) -> Terms:
        terms = {}
        if self.reconstruction != "features":
            terms["reconstruction"] = losses.likelihood(self.likelihood, batch.image, reconstructed)
        if self.reconstruction != "pixels":
            images = [batch.image, reconstructed]
            features = self.adversaries[self.feature_mode].features(batch, self.feature_layer, images)
            terms["reconstruction/features"] = losses.likelihood("gaussian", *features)
        if self.perceptual_weight:
            terms["perceptual"] = self.perceptual(batch.image, reconstructed)
        return terms

    def _pixels(self, image: Tensor, reconstructed: Tensor) -> Tensor:
        return self.reconstruction_weight * losses.likelihood(self.likelihood, image, reconstructed)

    def players(self) -> list[Player]:
        players = [game.player(partial(self.discriminator_loss, mode)) for mode, game in self.adversaries.items()]
        networks = ("encoder", "decoder", *self.code_terms.networks)
        return [*players, Player("autoencoder", networks, self.loss, self.optimizer, after=self._after)]

    def check_frozen(self, names: Collection[str]) -> None:
        self.code_terms.check_frozen(names)
        fits = not self.adaptive or "decoder" not in names
        check(fits, "adaptive", "true", "false, as the decoder, whose gradients it compares, is not trained")

    def _after(self, statistics: Terms) -> None:
        self.code_terms.after(statistics)
        if self.adaptive_weighting:
            self.adaptive_weighting.after(statistics)

    def _check_weights(self) -> None:
        check(self.adaptive_limit > 0, "adaptive_limit", self.adaptive_limit, "more than 0")
        names = ("reconstruction_weight", "perceptual_weight", "adversarial_weight")
        check_not_negative(**{name: getattr(self, name) for name in names})
        check_kl(self.kl_weight, self.kl_warmup, self.free_bits)
        if not self.adaptive:
            check_unused("while system.adaptive is off", adaptive_limit=(self.adaptive_limit, 1e4))
        if not self.adversarial_weight:
            unused = {"adaptive": (self.adaptive, False), "encoder_adversarial": (self.encoder_adversarial, True)}
            check_unused("while system.adversarial_weight is 0", **unused)
        if not self.reconstruction_weight:
            check_unused("while system.reconstruction_weight is 0", likelihood=(self.likelihood, "gaussian"))
        if self.reconstruction == "features":
            check_unused("while system.reconstruction is features", likelihood=(self.likelihood, "gaussian"))

    def _check_discriminators(
        self,
        discriminator: Mode | Literal["both"],
        binary: DiscriminatorConfig | None,
        ternary: DiscriminatorConfig | None,
        opponent: Opponent,
        class_weights: tuple[float, float, float],
    ) -> None:
        expected = "true, as the ternary discriminator tells them from reconstructions"
        check(self.samples or discriminator == "binary", "samples", "false", expected)
        idle = f"while system.discriminator is {discriminator}"
        if discriminator == "binary":
            check_unused(idle, ternary=(ternary, None), opponent=(opponent, "real"))
            check_unused(idle, class_weights=(class_weights, (1, 1, 1)))
        if discriminator == "ternary":
            check_unused(idle, binary=(binary, None))

    def _choose_features(self, mode: Mode | None, layer: int | None) -> tuple[Mode, int]:
        playing = list(self.adversaries)
        if self.reconstruction == "pixels":
            unused = {"feature_discriminator": (mode, None), "feature_layer": (layer, None)}
            check_unused("while system.reconstruction is pixels", **unused)
            return playing[0], 0
        if mode is None and len(playing) == 1:
            mode = playing[0]
        names = " or ".join(playing)
        if mode not in playing:
            why = f"while system.reconstruction is {self.reconstruction}"
            raise ValueError(f"system.feature_discriminator is {mode or 'null'}, expected {names} {why}")
        dino = self.adversaries[mode].config.dino_weights
        unset = (
            f"null while system.reconstruction is {self.reconstruction}; system.perceptual dino compares its features"
        )
        check(dino is None, f"{mode}.dino_weights", dino, unset)
        last = len(self.adversaries[mode].discriminator.levels) - 1
        layer = last if layer is None else layer
        check(0 <= layer <= last, "feature_layer", layer, f"0 to {last} for this discriminator")
        return mode, layer

    def _add_perceptual(self, kind: PerceptualKind, weights: WeightsFile | None) -> None:
        if bool(self.perceptual_weight) != bool(weights):
            raise ValueError(
                f"system.perceptual_weight is {self.perceptual_weight} and system.perceptual_weights is "
                f"{weights or 'null'}: set both or neither"
            )
        if weights:
            self.perceptual = Perceptual(kind, weights)
        else:
            check_unused("while system.perceptual_weight is 0", perceptual=(kind, "lpips"))
