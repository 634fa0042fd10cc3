"""Earlier fakes that CycleGAN's discriminators are shown (Shrivastava et al. 2017, section 2.3)."""

import torch
from torch import Tensor

from models.system import Batch, System, Terms


class ImagePool:
    """A pool of `size` fakes of each domain, in buffers of the system.

    A fake goes into a free slot while there is one. After that it replaces, with a chance of one half, the fake in a
    random slot, which is shown to the discriminator in its place. The slots follow from a step's draws and positions in
    the global batch, so the number of processes changes nothing.
    """

    def __init__(self, system: System, size: int, shape: tuple[int, ...]):
        self.system, self.size = system, size
        for domain in "ab":
            system.register_buffer(f"pool_{domain}", torch.zeros(size, *shape))
        system.register_buffer("pooled", torch.zeros((), dtype=torch.int64))

    def slots(self, draws: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Return the slot of each fake, `size` if it goes into none, and whether an older fake is in it, both [n].

        `draws` are [n, 2] from U[0, 1), `positions` those of the fakes in the global batch, [n].
        """
        used = self.system.get_buffer("pooled")
        free = used + positions
        drawn = torch.where(draws[:, 0] < 0.5, (draws[:, 1] * self.size).long(), self.size)
        return torch.where(free < self.size, free, drawn), (free >= self.size) & (drawn < used)

    def mixed(self, batch: Batch, domain: str, fake: Tensor) -> Tensor:
        """Return the fakes, some of them replaced by those that were in their slots before this step."""
        slot, known = self.slots(batch.uniform("pool", (2,)), batch.positions())
        older = self.system.get_buffer(f"pool_{domain}")[slot.clamp(max=self.size - 1)].to(fake.dtype)
        return torch.where(known[:, None, None, None], older, fake)

    def statistics(self, batch: Batch, fakes: dict[str, Tensor]) -> Terms:
        """Return what `update` needs of this part of the global batch, with fakes by domain."""
        placed = {f"fakes/{domain}": batch.placed(fake.detach()) for domain, fake in fakes.items()}
        return placed | {"draws": batch.placed(batch.uniform("pool", (2,)))}

    def update(self, statistics: Terms) -> None:
        """Put a step's fakes into their slots; of two in one slot the later position stays."""
        pooled = self.system.get_buffer("pooled")
        draws = statistics["draws"].to(self.system.get_buffer("pool_a").dtype)
        positions = torch.arange(len(draws), device=draws.device)
        slot, _ = self.slots(draws, positions)
        chosen = slot[:, None] == torch.arange(self.size, device=draws.device)  # [batch, pool]
        last = torch.where(chosen, positions[:, None], -1).amax(0)
        for domain in "ab":
            pool = self.system.get_buffer(f"pool_{domain}")
            fakes = statistics[f"fakes/{domain}"][last.clamp(min=0)].to(pool.dtype)
            pool.copy_(torch.where((last >= 0)[:, None, None, None], fakes, pool))
        pooled.copy_((pooled + len(draws)).clamp(max=self.size))
