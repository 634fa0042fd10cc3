"""CycleGAN: two domains without pairs; a -> b -> a' and b -> a -> b'."""

from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import l1_loss

from models.adversary import Adversary
from models.networks import ImageSize, NetworkConfig, Translator
from models.networks.config import MAX_BLOCKS, check_size, sides
from models.settings import (
    DiscriminatorConfig,
    OptimizerConfig,
    check,
    check_not_negative,
    check_positive,
    check_unused,
)
from models.system import Batch, Loss, Player, System, Terms


class Passes(NamedTuple):
    fake_a: Tensor
    fake_b: Tensor
    cycle_a: Tensor
    cycle_b: Tensor
    same_a: Tensor | None
    same_b: Tensor | None


class ImagePool:
    """A pool of about `size` fakes of each domain, in buffers of the system by position in the global batch.

    Each position has ceil(size / batch size) slots for its own fakes, so that no process needs those of others. A fake
    goes into a free slot while its position has one. After that it replaces, with a chance of one half, the fake in a
    random slot, which is shown in its place (Shrivastava et al. 2017, section 2.3, where a batch is one image).
    """

    def __init__(self, system: System, size: int, shape: tuple[int, ...]):
        self.system, self.size, self.shape = system, size, shape
        system.by_position = ("pool_a", "pool_b", "pooled")
        self.hold(slice(0, 0), 1)

    def hold(self, rows: slice, batch_size: int) -> None:
        """Make the empty slots of some positions."""
        n, slots, weight = rows.stop - rows.start, -(-self.size // batch_size), next(self.system.parameters())
        for domain in "ab":
            self.system.register_buffer(f"pool_{domain}", weight.new_zeros(n, slots, *self.shape), persistent=False)
        self.system.register_buffer("pooled", weight.new_zeros(n, dtype=torch.int64), persistent=False)

    def choose(self, batch: Batch) -> Terms:
        """Return where the fakes of a batch go, by row.

        They are its place in the buffers, the slot there, whether the slot takes the fake, and whether the fake that is
        in it is shown instead.
        """
        if not len(self.system.get_buffer("pooled")):
            raise RuntimeError("CycleGAN.hold was not called, which makes the pool's slots before training")
        place, slots = batch.positions() - self.system.rows.start, self.system.get_buffer("pool_a").shape[1]
        draws, used = batch.uniform("pool", (2,)), self.system.get_buffer("pooled")[place]
        free, swap = used < slots, draws[:, 0] < 0.5
        slot = torch.where(free, used, (draws[:, 1] * slots).long())
        return {"place": place, "slot": slot.clamp(max=slots - 1), "taken": free | swap, "shown": ~free & swap}

    def mixed(self, chosen: Terms, domain: str, fake: Tensor) -> Tensor:
        """Return the fakes, some of them replaced by those that were in their slots before this step."""
        older = self.system.get_buffer(f"pool_{domain}")[chosen["place"], chosen["slot"]].to(fake.dtype)
        return torch.where(chosen["shown"][:, None, None, None], older, fake)

    def update(self, kept: Terms) -> None:
        """Put fakes, `pool_a` and `pool_b` [n, channels, height, width], into the slots that `choose` returned."""
        at, pooled = (kept["place"], kept["slot"]), self.system.get_buffer("pooled")
        for domain in "ab":
            pool = self.system.get_buffer(f"pool_{domain}")
            fakes = kept[f"pool_{domain}"].to(pool.dtype)
            pool[at] = torch.where(kept["taken"][:, None, None, None], fakes, pool[at])
        pooled[kept["place"]] = (pooled[kept["place"]] + 1).clamp(max=pool.shape[1])


class CycleGAN(System):
    """Unpaired image-to-image translation (Zhu et al. 2017) between two data sets, a and b.

    The translators are trained on generator_loss(G_ab(a)) + generator_loss(G_ba(b))
    + cycle_weight * (|G_ba(G_ab(a)) - a| + |G_ab(G_ba(b)) - b|)
    + identity_weight * (|G_ba(a) - a| + |G_ab(b) - b|), means over pixels.

    Args:
        image_size: height and width of the images in pixels, or a square's side, multiples of 4; set by data.size
        width: channels of a translator's first convolution; 64 in the paper. Lower it for speed and memory
        discriminator_width: channels of a discriminator's first convolution; null takes `width`
        discriminator_levels: halvings in a discriminator: 1 for patches of 16 pixels (null chooses it for images of
            64), 2 for 34 (128), 3 for 70 (256)
        blocks: residual blocks of a translator, 1 to 64; null chooses 6 below 256 pixels and 9 from there, as the paper
        cycle_weight: weight of the cycle consistency; lower it if translations change too little
        identity_weight: weight of leaving images of the wanted domain as they are, which keeps colours; 0 is faster
        pool: fakes of each domain that are kept to show to the discriminators again, dealt to the positions of the
            batch, at least one for each; 0 shows them this step's only
        translators: optimizer of both translators
        binary: settings of both discriminators, which share one optimizer
    """

    averaged = ("translator_ab", "translator_ba")
    architecture = ("width", "blocks")
    domains = 2
    stride = 4  # translators halve images twice

    def __init__(
        self,
        image_size: ImageSize,
        channels: int,
        width: int = 64,
        discriminator_width: int | None = None,
        discriminator_levels: Literal[1, 2, 3] | None = None,
        blocks: int | None = None,
        cycle_weight: float = 10.0,
        identity_weight: float = 5.0,
        pool: int = 50,
        translators: OptimizerConfig = OptimizerConfig(betas=(0.5, 0.999), schedule="linear", hold=0.5),
        binary: DiscriminatorConfig = DiscriminatorConfig(
            betas=(0.5, 0.999), schedule="linear", hold=0.5, adversarial="least_squares", r1_weight=0.0
        ),
    ):
        super().__init__()
        check_size(image_size, self.stride, "as translators halve images twice")
        blocks = (6 if min(sides(image_size)) < 256 else 9) if blocks is None else blocks
        _check_discriminators(image_size, discriminator_width, discriminator_levels, binary)
        discriminator_width = width if discriminator_width is None else discriminator_width
        check_positive(width=width, discriminator_width=discriminator_width, blocks=blocks)
        check(blocks <= MAX_BLOCKS, "blocks", blocks, f"{MAX_BLOCKS} at most")
        check_not_negative(cycle_weight=cycle_weight, identity_weight=identity_weight, pool=pool)
        self.cycle_weight, self.identity_weight = cycle_weight, identity_weight
        self.optimizer, self.discriminator_config = translators, binary
        architecture = (NetworkConfig(width=discriminator_width, patches=True), image_size, channels)
        options: dict[str, Any] = {"patch_halvings": discriminator_levels, "instance_norm": True}
        self.adversaries = {
            domain: Adversary(self, "binary", binary, *architecture, network=f"discriminator_{domain}", **options)
            for domain in "ab"
        }
        self.translator_ab = Translator(channels, width, blocks)
        self.translator_ba = Translator(channels, width, blocks)
        self.pool = ImagePool(self, pool, (channels, *sides(image_size))) if pool else None

    def hold(self, rows: slice, batch_size: int) -> None:
        super().hold(rows, batch_size)
        if self.pool:
            self.pool.hold(rows, batch_size)

    def passes(self, batch: Batch) -> Passes:
        a, b = batch.images
        fake_b, fake_a = self.translator_ab(a), self.translator_ba(b)
        cycle_a, cycle_b = self.translator_ba(fake_b), self.translator_ab(fake_a)
        if not self.identity_weight:
            return Passes(fake_a, fake_b, cycle_a, cycle_b, None, None)
        return Passes(fake_a, fake_b, cycle_a, cycle_b, self.translator_ba(a), self.translator_ab(b))

    def discriminator_loss(self, batch: Batch, passes: Passes) -> Loss:
        value = batch.images[0].new_zeros(())
        terms: Terms = {}
        statistics: Terms = {}
        fakes = {"a": passes.fake_a, "b": passes.fake_b}
        kept = self.pool.choose(batch) if self.pool else {}
        for (domain, fake), real in zip(fakes.items(), batch.images, strict=True):
            shown = self.pool.mixed(kept, domain, fake.detach()) if self.pool else fake
            loss = self.adversaries[domain].discriminator_loss(batch, real, {"generated": shown})
            value = value + loss.value
            terms |= {f"{domain}/{name}": term for name, term in loss.terms.items()}
            statistics |= loss.statistics
        if self.pool:
            kept |= {f"pool_{domain}": fake.detach() for domain, fake in fakes.items()}
        return Loss(value, terms, statistics, kept)

    def loss(self, batch: Batch, passes: Passes) -> Loss:
        a, b = batch.images
        loss_a = self.adversaries["a"].generator_loss(batch, a, {"generated": passes.fake_a})
        loss_b = self.adversaries["b"].generator_loss(batch, b, {"generated": passes.fake_b})
        cycle = l1_loss(passes.cycle_a, a) + l1_loss(passes.cycle_b, b)
        loss = self.adversaries["a"].weight(batch) * (loss_a + loss_b) + self.cycle_weight * cycle
        terms = {"generator_loss/a": loss_a, "generator_loss/b": loss_b, "cycle": cycle}
        if passes.same_a is not None and passes.same_b is not None:
            identity = l1_loss(passes.same_a, a) + l1_loss(passes.same_b, b)
            loss, terms["identity"] = loss + self.identity_weight * identity, identity
        return Loss(loss, terms)

    def players(self) -> list[Player]:
        config = self.discriminator_config
        both = ("discriminator_a", "discriminator_b")
        return [
            Player("binary", both, self.discriminator_loss, config, config.every, config.start, self.after),
            Player("translators", self.averaged, self.loss, self.optimizer),
        ]

    def after(self, statistics: Terms) -> None:
        for adversary in self.adversaries.values():
            adversary.after(statistics)
        if self.pool:
            self.pool.update(statistics)

    def translate(self, image: Tensor, direction: Literal["a2b", "b2a"]) -> Tensor:
        return (self.translator_ab if direction == "a2b" else self.translator_ba)(image)


def _check_discriminators(
    image_size: ImageSize, width: int | None, levels: int | None, binary: DiscriminatorConfig
) -> None:
    if binary.dino_weights is not None:
        unused = {"discriminator_levels": (levels, None), "discriminator_width": (width, None)}
        check_unused("while system.binary.dino_weights is set", **unused)
    smaller = min(sides(image_size))
    expected = f"fewer, as images of {smaller} pixels are too small to be halved so often, or null"
    check(smaller >= 2 ** (2 + (levels or 1)), "discriminator_levels", levels, expected)
