"""The VAE-GAN: discriminators make a VAE's reconstructions and samples sharp."""

from functools import partial
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from models import losses
from models.adversary import Adversary, Images, mean_generator_loss
from models.losses import MODES, ModeName, Opponent
from models.networks import Decoder, Discriminator, Encoder, NetworkConfig
from models.networks.perceptual import Kind, Perceptual, WeightsFile
from models.settings import DiscriminatorConfig, OptimizerConfig, check_effect, check_positive, check_weights
from models.system import Batch, Loss, Player, System, Terms


class Passes(NamedTuple):
    mean: Tensor
    log_variance: Tensor
    reconstructed: Tensor
    generated: Tensor
    adversarial: Tensor  # the reconstructions that carry the adversarial gradient
    decoded: Tensor  # all of these images, as the decoder made them


class VAEGAN(System):
    """VAE-GAN (Larsen et al. 2016), with discriminators that see reconstructions and samples from the prior.

    The `binary` discriminator tells real from fake; the `ternary` one tells real, reconstructed and generated images
    apart, which drives the encoder's codes to match the prior. Each has its own network and its own optimizer.
    Encoder and decoder lower
    reconstruction_weight * reconstruction + kl_weight * KL + adversarial_weight * (mean generator loss of the modes).

    Args:
        image_size: pixels a side, from the data
        channels: 1 or 3, from the data
        latent_dim: numbers per code, or per position of it
        networks: settings of the networks
        discriminator: the modes that play
        reconstruction: of pixels, of a discriminator's features, or of both
        likelihood: p(x|z) of pixels, with a scale of 1; features are gaussian
        feature_discriminator: whose features (from step 0 on, whatever its `start`); needed where both modes play and
            reconstruction is not "pixels"
        feature_layer: its level whose activations are compared, counted from 0; unset: the last
        reconstruction_weight: of the reconstruction term
        perceptual_weight: of the distance of x and its reconstruction in a trained network's features; 0 is off
        perceptual: lpips (of VGG16) or convnext (ConvNeXt-S)
        perceptual_weights: file of that network's weights, torchvision's
        kl_weight: of KL(q(z|x) || N(0, I))
        kl_warmup: steps in which it rises from 0
        free_bits: nats that each number of a code may hold at no cost (Kingma et al. 2016)
        adversarial_weight: of the adversarial term
        adaptive: also weigh it by the ratio of two gradients at the decoder's last layer in the step before, of the
            reconstruction term's mean over an image's values and of the adversarial term (Esser et al. 2021, eq. 7).
            Terms here are sums over them: VQGAN's weight of 0.8 is an adversarial_weight of 0.8 * channels * size^2
        adaptive_limit: the largest such ratio; `adaptive_saturated` among the terms is the share of steps that were
            given it
        encoder_adversarial: whether the encoder gets the adversarial gradient of its reconstructions
        opponent: fakes of a ternary game want to be called real, or not to be called what they are (not_own)
        class_weights: of real, reconstructed and generated images in the ternary discriminator's loss
        autoencoder: optimizer of encoder and decoder
        binary: settings of the binary discriminator, if it plays
        ternary: settings of the ternary discriminator, if it plays

    Raises:
        ValueError: a size or weight is out of its range, or an option has no effect as set.
    """

    averaged = ("encoder", "decoder")

    def __init__(
        self,
        image_size: int,
        channels: int,
        latent_dim: int = 32,
        networks: NetworkConfig = NetworkConfig(),
        discriminator: Literal["binary", "ternary", "both"] = "binary",
        reconstruction: Literal["pixels", "features", "both"] = "pixels",
        likelihood: Literal["gaussian", "laplace"] = "gaussian",
        feature_discriminator: ModeName | None = None,
        feature_layer: int | None = None,
        reconstruction_weight: float = 1.0,
        perceptual_weight: float = 0.0,
        perceptual: Kind = "lpips",
        perceptual_weights: WeightsFile | None = None,
        kl_weight: float = 1.0,
        kl_warmup: int = 0,
        free_bits: float = 0.0,
        adversarial_weight: float = 10.0,
        adaptive: bool = False,
        adaptive_limit: float = 1e4,
        encoder_adversarial: bool = True,
        opponent: Opponent = "real",
        class_weights: tuple[float, float, float] = (1.0, 1.0, 1.0),
        autoencoder: OptimizerConfig = OptimizerConfig(),
        binary: DiscriminatorConfig | None = None,
        ternary: DiscriminatorConfig | None = None,
    ):
        super().__init__()
        check_positive(latent_dim=latent_dim, adaptive_limit=adaptive_limit)
        check_weights(
            reconstruction_weight=reconstruction_weight,
            perceptual_weight=perceptual_weight,
            kl_weight=kl_weight,
            kl_warmup=kl_warmup,
            free_bits=free_bits,
            adversarial_weight=adversarial_weight,
        )
        if not kl_weight:
            check_effect("system.kl_weight is 0", kl_warmup=(kl_warmup, 0), free_bits=(free_bits, 0.0))
        if not adaptive:
            check_effect("system.adaptive is off", adaptive_limit=(adaptive_limit, 1e4))
        if not adversarial_weight:
            check_effect("system.adversarial_weight is 0", adaptive=(adaptive, False))
        if reconstruction == "features":
            check_effect("system.reconstruction is features", likelihood=(likelihood, "gaussian"))
        self.latent_shape = networks.latent_shape(image_size, latent_dim)
        self.reconstruction, self.likelihood = reconstruction, likelihood
        self.reconstruction_weight, self.perceptual_weight = reconstruction_weight, perceptual_weight
        self.kl_weight, self.kl_warmup, self.free_bits = kl_weight, kl_warmup, free_bits
        self.adversarial_weight, self.encoder_adversarial = adversarial_weight, encoder_adversarial
        self.adaptive, self.adaptive_limit = adaptive, adaptive_limit
        self.optimizer = autoencoder
        self.encoder = Encoder(networks, image_size, channels, 2 * latent_dim)
        self.decoder = Decoder(networks, image_size, channels, latent_dim)

        playing: list[str] = ["binary", "ternary"] if discriminator == "both" else [discriminator]
        _check_ternary(playing, opponent, class_weights, ternary)
        self.adversaries: dict[str, Adversary] = {}
        for name, given in {"binary": binary, "ternary": ternary}.items():
            if name not in playing:
                if given is not None:
                    raise ValueError(f"system.{name} has no effect while system.discriminator is {discriminator}")
                continue
            mode, settings, network = MODES[name], given or DiscriminatorConfig(), f"discriminator_{name}"
            made = Discriminator(
                networks, image_size, channels, mode.logits, settings.spectral_norm, settings.minibatch_stddev
            )
            self.add_module(network, made)
            game = (opponent, class_weights) if name == "ternary" else ()
            self.adversaries[name] = Adversary(self, mode, settings, name, network, *game)
        self.feature_mode, self.feature_layer = self._features(feature_discriminator, feature_layer)
        if adaptive:
            self.register_buffer("adaptive_weight", torch.zeros(()))  # from the last step's gradients
        if bool(perceptual_weight) != bool(perceptual_weights):
            raise ValueError(
                f"system.perceptual_weight is {perceptual_weight} and system.perceptual_weights {perceptual_weights}: "
                "give both, or neither"
            )
        if perceptual_weights:
            self.perceptual = Perceptual(perceptual, perceptual_weights)
        else:
            check_effect("system.perceptual_weight is 0", perceptual=(perceptual, "lpips"))

    def _features(self, name: ModeName | None, layer: int | None) -> tuple[str, int]:
        playing = list(self.adversaries)
        if self.reconstruction == "pixels":
            if name is not None or layer is not None:
                raise ValueError(
                    "system.feature_discriminator and system.feature_layer have no effect while system.reconstruction "
                    "is pixels: set it to features or both, or leave them unset"
                )
            return playing[0], 0
        if name is None and len(playing) == 2:
            raise ValueError(
                f"system.reconstruction is {self.reconstruction} and system.discriminator is both: say whose features, "
                "with system.feature_discriminator binary or ternary"
            )
        if name is not None and name not in playing:
            raise ValueError(f"system.feature_discriminator is {name}, but system.discriminator is {playing[0]}")
        network = self.get_submodule(f"discriminator_{name or playing[0]}")
        assert isinstance(network, Discriminator)
        levels = len(network.levels)
        layer = levels - 1 if layer is None else layer
        if not 0 <= layer < levels:
            raise ValueError(f"system.feature_layer is {layer}, expected 0 to {levels - 1} for this discriminator")
        return name or playing[0], layer

    def passes(self, batch: Batch) -> Passes:
        mean, log_variance = self.posterior(batch.image)
        z = losses.reparameterize(mean, log_variance, batch.normal("posterior", self.latent_shape))
        prior = batch.normal("prior", self.latent_shape)
        # Without the encoder's share, the adversarial gradient enters the decoder through a second pass on fixed codes.
        codes = [z, prior] if self.encoder_adversarial else [z, prior, z.detach()]
        decoded = self.decoder(torch.cat(codes))
        images = decoded.chunk(len(codes))
        adversarial = images[0] if self.encoder_adversarial else images[2]
        return Passes(mean, log_variance, images[0], images[1], adversarial, decoded)

    def fakes(self, passes: Passes) -> Images:
        return {"reconstructed": passes.reconstructed, "generated": passes.generated}

    def discriminator_loss(self, mode: str, batch: Batch, passes: Passes) -> Loss:
        return self.adversaries[mode].discriminator_loss(batch, batch.image, self.fakes(passes))

    def loss(self, batch: Batch, passes: Passes) -> Loss:
        terms = self.reconstruction_terms(batch, passes.reconstructed)
        likelihood = torch.stack([value for name, value in terms.items() if name != "perceptual"]).sum()
        reconstruction = self.reconstruction_weight * likelihood
        if "perceptual" in terms:
            reconstruction = reconstruction + self.perceptual_weight * terms["perceptual"]
        kl = losses.gaussian_kl(passes.mean, passes.log_variance, self.free_bits)
        loss = reconstruction + self.kl_weight * batch.ramp(0, self.kl_warmup) * kl
        fakes = self.fakes(passes._replace(reconstructed=passes.adversarial))
        generator_loss, generator_losses = mean_generator_loss(
            list(self.adversaries.values()), batch, batch.image, fakes
        )
        terms |= {"kl": kl} | generator_losses
        if generator_loss is None:
            return Loss(loss, terms)
        if not self.adaptive:
            return Loss(loss + self.adversarial_weight * generator_loss, terms)
        # The ratio is that of the plain terms, or it would undo the weight and the ramp.
        plain = torch.stack(list(generator_losses.values())).mean()
        statistics = self._last_layer_gradients(passes.decoded, reconstruction / batch.image[0].numel(), plain)
        weight = self.get_buffer("adaptive_weight").clone()
        terms |= {"adaptive_weight": weight, "adaptive_saturated": (weight >= self.adaptive_limit).to(weight.dtype)}
        return Loss(loss + weight * self.adversarial_weight * generator_loss, terms, statistics)

    def reconstruction_terms(self, batch: Batch, reconstructed: Tensor) -> Terms:
        """-log p(x|z) on pixels, on the features of a discriminator's layer (Larsen et al. 2016, eq. 7), or both."""
        terms = {}
        if self.reconstruction != "features":
            terms["reconstruction"] = losses.likelihood(self.likelihood, batch.image, reconstructed)
        if self.reconstruction != "pixels":
            adversary = self.adversaries[self.feature_mode]
            terms["reconstruction/features"] = losses.squared_error(
                *adversary.features(batch, self.feature_layer, [batch.image, reconstructed])
            )
        if self.perceptual_weight:
            terms["perceptual"] = self.perceptual(batch.image, reconstructed)
        return terms

    def _last_layer_gradients(self, decoded: Tensor, reconstruction: Tensor, generator_loss: Tensor) -> Terms:
        """Of two losses of the decoded images, at the weight of the decoder's last layer."""
        (last,) = (p for name, p in self.decoder.named_parameters() if name.endswith("last.weight"))
        gradients = {}
        for name, value in {"reconstruction": reconstruction, "adversarial": generator_loss}.items():
            # As fp16 has few powers of two, a gradient is enlarged on its way to the images, which are fp32, and goes
            # on with magnitudes that sum to 2^8: its products with activations below 2^8 then sum to less than 2^16.
            (of_images,) = torch.autograd.grad(2**12 * value, decoded, retain_graph=True)
            size = of_images.abs().sum().clamp(min=1e-30) / 2**8
            (gradient,) = torch.autograd.grad(decoded, last, of_images / size, retain_graph=True)
            gradients[name] = gradient * (size / 2**12)
        return gradients

    def _adapt(self, statistics: Terms) -> None:
        if statistics:
            weight = losses.adaptive_weight(
                statistics["reconstruction"], statistics["adversarial"], self.adaptive_limit
            )
            kept = self.get_buffer("adaptive_weight")
            kept.copy_(torch.where(weight.isfinite(), weight, kept))  # fp16 may overflow now and then

    def players(self) -> list[Player]:
        discriminators = [
            game.player(partial(self.discriminator_loss, name)) for name, game in self.adversaries.items()
        ]
        after = self._adapt if self.adaptive else None
        autoencoder = Player("autoencoder", ("encoder", "decoder"), self.loss, self.optimizer, after=after)
        return [*discriminators, autoencoder]

    def sample(self, z: Tensor) -> Tensor:
        return self.decoder(z)

    def posterior(self, image: Tensor) -> tuple[Tensor, Tensor]:
        mean, log_variance = losses.at_least_fp32(self.encoder(image)).chunk(2, dim=1)
        return mean, log_variance

    def reconstruct(self, image: Tensor) -> Tensor:
        return self.decoder(self.posterior(image)[0])


def _check_ternary(
    playing: list[str],
    opponent: Opponent,
    class_weights: tuple[float, float, float],
    ternary: DiscriminatorConfig | None,
) -> None:
    if not all(weight > 0 for weight in class_weights):
        raise ValueError(f"system.class_weights is {list(class_weights)}, expected three numbers above 0")
    if "ternary" not in playing:
        changed = {"opponent": (opponent, "real"), "class_weights": (class_weights, (1, 1, 1))}
        check_effect("system.discriminator is binary", **changed)
    elif opponent == "not_own" and (ternary or DiscriminatorConfig()).adversarial != "logistic":
        raise ValueError(
            "system.opponent is not_own, which is a term of the cross-entropy: set ternary.adversarial logistic"
        )
