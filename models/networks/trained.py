"""Trained networks that no run trains: their files of weights, and the images that they take."""

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from models.visible import visible

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet, for images in [0, 1]
Build = Callable[[dict[str, Tensor]], tuple[nn.Module, dict[str, Tensor]]]


class Trained(nn.Module):
    """A frozen network of ImageNet's images.

    Args:
        weights: file of a state_dict, by torch.save or as .safetensors
        setting: the setting that gives it, for messages
        kind: what the file should hold, for messages
        build: returns the network, and its state under its own names, given the file's

    Raises:
        ValueError: the file cannot be read, or does not fit.
    """

    def __init__(self, weights: str, setting: str, kind: str, build: Build):
        super().__init__()
        self.setting = setting
        try:
            with Path(weights).open("rb") as file:
                self.sha256 = hashlib.file_digest(file, "sha256").hexdigest()
            if weights.endswith(".safetensors"):
                found = load_file(weights)
            else:
                found = torch.load(weights, map_location="cpu", weights_only=True)
            with torch.device("meta"):  # to draw weights that the file replaces would take seconds
                network, state = build(found)
            state = {name: value.float() if value.is_floating_point() else value for name, value in state.items()}
            network.load_state_dict(state, assign=True)
        except FileNotFoundError as error:
            raise ValueError(f"{setting}: {weights} does not exist, expected a file of {kind}") from error
        except Exception as error:  # pickle, zipfile and load_state_dict raise many types for a file of another kind
            raise ValueError(f"{setting}: {weights} is not {kind} ({str(error).splitlines()[0]})") from error
        self.network: Any = network
        self.register_buffer("mean", torch.tensor(MEAN)[:, None, None])
        self.register_buffer("std", torch.tensor(STD)[:, None, None])
        self.eval().requires_grad_(False)

    def standardized(self, image: Tensor) -> Tensor:
        """Return images [n, channels, h, w] in [-1, 1] as the network takes them."""
        mean, std = self.get_buffer("mean"), self.get_buffer("std")
        return ((visible(image.to(mean.dtype)).expand(-1, 3, -1, -1) + 1) / 2 - mean) / std
