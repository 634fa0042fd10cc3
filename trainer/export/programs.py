"""A system's networks as programs for other runtimes, each compared with the network itself before it is kept."""

import copy
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from models import System
from trainer.extras import needs
from trainer.precision import strict_fp32

Kind = Literal["onnx", "torch_export"]
Execute = Callable[..., Sequence[Tensor]]
TRACED, COMPARED = 2, 3  # images with which a program is traced and compared: a program must not know their number
# How much further from the exact outputs a program may be than the network is, whose own rounding is measured against
# float64. Another order of the same sums rounds as much; the margin is for runtimes with more terms in a sum.
MARGIN = 16.0


class Use(NamedTuple):
    """What a program computes."""

    network: str  # whose weights it needs; also the program's name
    given: tuple[str, ...]  # names of the inputs
    made: tuple[str, ...]  # names of the outputs
    call: Callable[..., Any]  # of a system and the inputs


def uses_of(system: System, image_shape: tuple[int, ...]) -> list[Use]:
    """Return the programs that a system's abilities give; `image_shape` is (channels, height, width)."""
    uses = []
    if system.can("posterior"):
        _, log_variance = system.posterior(torch.zeros(1, *image_shape))
        made = ("mean",) if log_variance.isneginf().all() else ("mean", "log_variance")
        uses.append(Use("encoder", ("image",), made, lambda system, image: system.posterior(image)[: len(made)]))
    if system.can("sample"):
        given = ("latent", "label") if system.classes else ("latent",)
        uses.append(Use("decoder", given, ("image",), lambda system, *given: [system.sample(*given)]))
    if system.can("translate"):
        for network, way in ("translator_ab", "a2b"), ("translator_ba", "b2a"):
            translate = lambda system, image, way=way: [system.translate(image, way)]  # noqa: E731
            uses.append(Use(network, ("image",), ("translated",), translate))
    return uses


class Program(nn.Module):
    """A use of a system as a module, which has the weights of that use alone."""

    def __init__(self, system: System, use: Use):
        super().__init__()
        self.system, self.use = copy.deepcopy(system), use
        for name, _ in [*self.system.named_children(), *self.system.named_buffers(recurse=False)]:
            if name != use.network:
                delattr(self.system, name)
        self.eval()

    def forward(self, *given: Tensor) -> tuple[Tensor, ...]:
        return tuple(self.use.call(self.system, *given))


def write_programs(system: System, image_shape: tuple[int, ...], folder: Path, kinds: Sequence[Kind]) -> list[str]:
    """Write each of a system's programs as NETWORK.onnx or NETWORK.pt2 and return the files' names.

    The system is on the CPU and in eval mode; `image_shape` is (channels, height, width).

    Raises:
        ValueError: a network cannot be converted, its program computes something else, or a package is missing.
    """
    if "onnx" in kinds:
        needs("--onnx", "export", "onnxruntime", "onnx", "onnxscript")
    written = []
    for use in uses_of(system, image_shape) if kinds else []:
        program = Program(system, use)
        generator = torch.Generator().manual_seed(0)
        shape = system.latent_shape if use.given[0] == "latent" else image_shape
        label = torch.arange(COMPARED) % max(1, system.classes)
        given = [torch.randn(COMPARED, *shape, generator=generator).clamp(-1, 1), label][: len(use.given)]
        for kind in kinds:
            path = folder / f"{use.network}{SUFFIX[kind]}"
            try:
                run = WRITERS[kind](program, tuple(one[:TRACED] for one in given), path)
            except Exception as error:  # these compilers raise errors of many kinds
                reason = str(error).strip().splitlines()[:1] or [type(error).__name__]
                raise ValueError(f"--{kind}: {use.network} cannot be converted: {reason[0]}") from error
            check(program, run, given, f"--{kind}: the program of {use.network}")
            written.append(path.name)
    return written


@torch.no_grad()
def check(program: Program, run: Execute, given: Sequence[Tensor], what: str) -> None:
    """Compare a program with the network on a batch of another size than it was traced with.

    Raises:
        ValueError: an output is further from float64's than MARGIN times the rounding of the network in float32.
    """
    exactly = [one.double() if one.is_floating_point() else one for one in given]
    with strict_fp32(given[0].device):
        eager, exact = program(*given), copy.deepcopy(program).double()(*exactly)
    found = run(*given)
    for name, own, true, other in zip(program.use.made, eager, exact, found, strict=True):
        rounding = max((own - true).abs().max().item(), torch.finfo(own.dtype).eps * true.abs().max().item())
        error = (other - true).abs().max().item() if other.shape == true.shape else float("nan")
        if not error <= MARGIN * rounding:
            raise ValueError(
                f"{what} computes another {name} than the network: it is off by {error:.2g}, expected at most "
                f"{MARGIN * rounding:.2g}. Nothing was exported"
            )


def _write_onnx(program: Program, example: tuple[Tensor, ...], path: Path) -> Execute:
    import onnxruntime

    named: dict[str, Any] = dict(input_names=[*program.use.given], output_names=[*program.use.made])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about versions of packages
        batch = (({0: "batch"},) * len(example),)
        torch.onnx.export(
            program, example, path, dynamo=True, dynamic_shapes=batch, external_data=False, verbose=False, **named
        )
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    names = program.use.given

    def run(*given: Tensor) -> list[Tensor]:
        feed = {name: one.numpy() for name, one in zip(names, given, strict=True)}
        return [*map(torch.from_numpy, session.run(None, feed))]

    return run


def _write_torch_export(program: Program, example: tuple[Tensor, ...], path: Path) -> Execute:
    batch = (({0: torch.export.Dim("batch")},) * len(example),)  # one entry, of *given
    exported = torch.export.export(program, example, dynamic_shapes=batch)
    torch.export.save(exported, path)
    return torch.export.load(path).module()


SUFFIX: dict[Kind, str] = {"onnx": ".onnx", "torch_export": ".pt2"}
WRITERS: dict[Kind, Callable[[Program, tuple[Tensor, ...], Path], Execute]] = {
    "onnx": _write_onnx,
    "torch_export": _write_torch_export,
}
