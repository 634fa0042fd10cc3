"""Features of a vision transformer that was trained by DINO (Caron et al. 2021)."""

import re

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate

from models.networks.trained import Trained
from models.resize import resize

LARGEST = 224  # pixels of a side in DINO's training
NEEDED = ("pos_embed", "patch_embed.proj.weight", "blocks.0.norm1.weight")  # to tell a file's transformer
NAMES = {  # of torch's layers, for those in files of DINO and timm
    r"blocks\.": "blocks.",
    r"attn\.qkv\.": "self_attn.in_proj_",
    r"attn\.proj\.": "self_attn.out_proj.",
    r"mlp\.fc": "linear",
    r"patch_embed\.proj\.": "patches.",
}


class VisionTransformer(nn.Module):
    """A vision transformer with pre-normalization (Dosovitskiy et al. 2021), heads of 64 numbers, and a square grid."""

    def __init__(self, width: int, blocks: int, patch: int, positions: int):
        super().__init__()
        self.patches = nn.Conv2d(3, width, patch, patch)
        self.cls_token = nn.Parameter(torch.empty(1, 1, width))
        self.pos_embed = nn.Parameter(torch.empty(1, positions, width))
        self.blocks = nn.ModuleList(
            nn.TransformerEncoderLayer(width, width // 64, 4 * width, 0.0, "gelu", 1e-6, True, True)
            for _ in range(blocks)
        )
        self.norm = nn.LayerNorm(width, 1e-6)

    def forward(self, image: Tensor) -> list[Tensor]:
        """Return maps [n, width, h, w] of the patches' features after each quarter of the blocks, the last normalized.

        Args:
            image: standardized, [n, 3, height, width], the sides multiples of the patch
        """
        embedded = self.patches(image)
        tokens = embedded.flatten(2).mT + self._positions(embedded.shape[2:])
        first = (self.cls_token + self.pos_embed[:, :1]).expand(len(image), -1, -1)
        tokens, maps = torch.cat([first, tokens], 1), []
        for i, block in enumerate(self.blocks, 1):
            tokens = block(tokens)
            if 4 * i % len(self.blocks) == 0:
                last = self.norm(tokens) if i == len(self.blocks) else tokens
                maps.append(last[:, 1:].mT.unflatten(2, embedded.shape[2:]))
        return maps

    def _positions(self, size: torch.Size) -> Tensor:
        """Interpolate the grid of position embeddings to another size, as DINO does for its small crops."""
        learned = self.pos_embed[:, 1:]
        side = round(learned.shape[1] ** 0.5)
        if (side, side) == size:
            return learned
        grid = learned.mT.unflatten(2, (side, side))
        return interpolate(grid, size, mode="bicubic", align_corners=False).flatten(2).mT


class DINO(Trained):
    """A frozen vision transformer of DINO, such as ViT-S/8, whose shape is that of the file of its weights.

    The file is that of DINO's repository (`dino_deitsmall8_pretrain.pth`), or timm's for `vit_small_patch8_224.dino`.
    Images of up to 224 pixels keep their size, but for a multiple of the patch; larger ones are shrunk.
    """

    def __init__(self, weights: str, setting: str):
        super().__init__(weights, setting, "the state_dict of a vision transformer of DINO or timm", _build)

    @property
    def width(self) -> int:
        return self.network.norm.weight.numel()

    def forward(self, image: Tensor) -> list[Tensor]:
        """Return four maps of features [n, width, h, w] of images [n, 1 or 3, height, width] in [-1, 1]."""
        patch = self.network.patches.kernel_size[0]
        scale = min(1.0, LARGEST / max(image.shape[2:]))
        size = [max(1, round(side * scale / patch)) * patch for side in image.shape[2:]]
        with torch.autocast(image.device.type, enabled=False):
            return self.network(resize(self.standardized(image), size))


def _build(found: dict[str, Tensor]) -> tuple[nn.Module, dict[str, Tensor]]:
    if missing := [key for key in NEEDED if key not in found]:
        raise ValueError(f"it has no {', '.join(missing)}")
    state = dict(found)
    for pattern, name in NAMES.items():
        state = {re.sub(pattern, name, key): value for key, value in state.items()}
    blocks = 1 + max(int(key.split(".")[1]) for key in state if key.startswith("blocks."))
    _, positions, width = state["pos_embed"].shape
    return VisionTransformer(width, blocks, state["patches.weight"].shape[-1], positions), state
