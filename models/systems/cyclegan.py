"""CycleGAN: two domains without pairs; a -> b -> a' and b -> a -> b'."""

from typing import Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import l1_loss

from models.adversary import Adversary
from models.losses import MODES
from models.networks import Discriminator, NetworkConfig, Translator
from models.networks.blocks import MOST_BLOCKS
from models.settings import DiscriminatorConfig, OptimizerConfig, check_positive, check_weights
from models.system import Batch, Loss, Player, System, Terms


class Passes(NamedTuple):
    fake_a: Tensor
    fake_b: Tensor
    cycle_a: Tensor
    cycle_b: Tensor
    same_a: Tensor | None
    same_b: Tensor | None


class CycleGAN(System):
    """Unpaired image-to-image translation (Zhu et al. 2017); two data sets, a and b.

    The translators lower generator_loss(G_ab(a)) + generator_loss(G_ba(b))
    + cycle_weight (|G_ba(G_ab(a)) - a| + |G_ab(G_ba(b)) - b|)
    + identity_weight (|G_ba(a) - a| + |G_ab(b) - b|), means over pixels. Each discriminator is shown its domain and,
    from a pool, fakes of this and of earlier steps (Shrivastava et al. 2017, section 2.3).

    Args:
        image_size: pixels a side, from the data; a multiple of 4
        channels: 1 or 3, from the data
        width: channels of a translator's first convolution; the paper has 64
        discriminator_width: of a discriminator's; unset: the same
        discriminator_levels: halvings of a discriminator: 3 for patches of 70 pixels, 2 for 34, 1 for 16; unset: by the
            image's size, 3 at 256, 2 at 128, 1 at 64
        blocks: residual blocks of a translator; unset: 6 below 256 pixels, else 9
        cycle_weight: of the cycles' consistency
        identity_weight: of leaving images alone that are of the wanted domain already
        pool: fakes that are kept for the discriminators, of each domain; 0: they see this step's only
        translators: optimizer of both translators
        binary: settings of both discriminators, which share an optimizer

    Raises:
        ValueError: a size or weight is out of its range, or an option has no effect as set.
    """

    averaged = ("translator_ab", "translator_ba")
    domains = 2

    def __init__(
        self,
        image_size: int,
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
        blocks = (6 if image_size < 256 else 9) if blocks is None else blocks
        discriminator_width = width if discriminator_width is None else discriminator_width
        check_positive(width=width, discriminator_width=discriminator_width, blocks=blocks)
        if blocks > MOST_BLOCKS:
            raise ValueError(f"system.blocks is {blocks}, expected {MOST_BLOCKS} at most")
        check_weights(cycle_weight=cycle_weight, identity_weight=identity_weight, pool=pool)
        self.cycle_weight, self.identity_weight, self.optimizer = cycle_weight, identity_weight, translators
        patches = NetworkConfig(width=discriminator_width, patches=True)
        self.adversaries: dict[str, Adversary] = {}
        for domain in "ab":
            network = f"discriminator_{domain}"
            made = Discriminator(
                *(patches, image_size, channels, 1, binary.spectral_norm, binary.minibatch_stddev),
                halved=discriminator_levels,
                instance_norm=True,
            )
            self.add_module(network, made)
            self.adversaries[domain] = Adversary(self, MODES["binary"], binary, "binary", network)
        self.discriminator_config = binary
        self.translator_ab = Translator(channels, width, blocks)
        self.translator_ba = Translator(channels, width, blocks)
        self.pool = pool
        if pool:
            for domain in "ab":
                self.register_buffer(f"pool_{domain}", torch.zeros(pool, channels, image_size, image_size))
            self.register_buffer("pooled", torch.zeros((), dtype=torch.int64))

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
        for domain, real, fake in zip("ab", batch.images, (passes.fake_a, passes.fake_b), strict=True):
            shown = self._from_pool(batch, domain, fake.detach()) if self.pool else fake
            loss = self.adversaries[domain].discriminator_loss(batch, real, {"generated": shown})
            value = value + loss.value
            terms |= {f"{domain}/{name}": term for name, term in loss.terms.items()}
            statistics |= {f"{domain}/{name}": term for name, term in loss.statistics.items()}
            if self.pool:
                statistics[f"fakes/{domain}"] = batch.placed(fake.detach())
        if self.pool:
            statistics["draws"] = batch.placed(batch.uniform("pool", (2,)))
        return Loss(value, terms, statistics)

    def loss(self, batch: Batch, passes: Passes) -> Loss:
        a, b = batch.images
        generator_a = self.adversaries["a"].generator_loss(batch, a, {"generated": passes.fake_a})
        generator_b = self.adversaries["b"].generator_loss(batch, b, {"generated": passes.fake_b})
        cycle = l1_loss(passes.cycle_a, a) + l1_loss(passes.cycle_b, b)
        loss = self.adversaries["a"].weight(batch) * (generator_a + generator_b) + self.cycle_weight * cycle
        terms = {"generator_loss/a": generator_a, "generator_loss/b": generator_b, "cycle": cycle}
        if passes.same_a is not None and passes.same_b is not None:
            identity = l1_loss(passes.same_a, a) + l1_loss(passes.same_b, b)
            loss, terms["identity"] = loss + self.identity_weight * identity, identity
        return Loss(loss, terms)

    def players(self) -> list[Player]:
        config = self.discriminator_config
        both = ("discriminator_a", "discriminator_b")
        translators = ("translator_ab", "translator_ba")
        return [
            Player("binary", both, self.discriminator_loss, config, config.every, config.start, self._after),
            Player("translators", translators, self.loss, self.optimizer),
        ]

    def _slots(self, draws: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        """(slot, known) of global positions with draws u [n, 2]: a free slot while there is one, else a random one for
        every second image and none (the pool's size) for the others; `known` where an older fake lies in it."""
        free = self.get_buffer("pooled") + positions
        drawn = torch.where(draws[:, 0] < 0.5, (draws[:, 1] * self.pool).long(), self.pool)
        return torch.where(free < self.pool, free, drawn), (free >= self.pool) & (drawn < self.get_buffer("pooled"))

    def _from_pool(self, batch: Batch, domain: str, fake: Tensor) -> Tensor:
        """Fakes, some of them replaced by those that lay in their slots before this step."""
        draws, positions = batch.uniform("pool", (2,)), batch.positions()
        slot, known = self._slots(draws, positions)
        older = self.get_buffer(f"pool_{domain}")[slot.clamp(max=self.pool - 1)].to(fake.dtype)
        return torch.where(known[:, None, None, None], older, fake)

    def _after(self, statistics: Terms) -> None:
        """Put this step's fakes into their slots; of two in one slot the later position stays."""
        for domain, adversary in self.adversaries.items():
            prefix = f"{domain}/"
            adversary.after({name.removeprefix(prefix): v for name, v in statistics.items() if name.startswith(prefix)})
        if not self.pool:
            return
        draws = statistics["draws"].to(self.get_buffer("pool_a").dtype)
        positions = torch.arange(len(draws), device=draws.device)
        slot, _ = self._slots(draws, positions)
        chosen = slot[:, None] == torch.arange(self.pool, device=draws.device)  # [batch, pool]
        last = torch.where(chosen, positions[:, None], -1).amax(0)
        for domain in "ab":
            pool = self.get_buffer(f"pool_{domain}")
            fakes = statistics[f"fakes/{domain}"][last.clamp(min=0)].to(pool.dtype)
            pool.copy_(torch.where((last >= 0)[:, None, None, None], fakes, pool))
        self.get_buffer("pooled").copy_((self.get_buffer("pooled") + len(draws)).clamp(max=self.pool))

    def translate(self, image: Tensor, direction: Literal["a2b", "b2a"]) -> Tensor:
        return (self.translator_ab if direction == "a2b" else self.translator_ba)(image)
