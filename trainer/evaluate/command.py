"""`python -m trainer.evaluate`: compute scores, print them, write the images, audit the scores."""

import json
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from data.dataset import FEW
from data.loader import read
from data.order import permutation
from data.redact import redacted_all
from data.tables import table
from trainer.distributed.accelerator import command_accelerator
from trainer.distributed.exit import exit_with_error, user_errors
from trainer.evaluate.arguments import parser
from trainer.evaluate.ranks import raise_on_all_ranks
from trainer.evaluate.target import TIMEOUT, Target, open_target
from trainer.log.health import few_images
from trainer.log.pictures import encoded
from trainer.measures import Measure
from trainer.metrics.fid import frechet
from trainer.metrics.statistics import Gaussian, Moments, ReferenceStatistics


def main(arguments: list[str] | None = None) -> None:
    """Run the command.

    Raises:
        SystemExit: with code 2 if something cannot be scored, or 1 if the audit finds another score.
    """
    settings = parser().parse_args(arguments)
    with user_errors(), ExitStack() as stack:
        _check_out(settings.out)
        accelerator = command_accelerator(TIMEOUT)
        target = open_target(settings, accelerator, stack)
        try:
            scores = target.score()
        except FloatingPointError as error:
            raise ValueError(f"{error}: these images cannot be scored") from error
        del scores["eval/seconds_share"]  # it is a share of a run's time
        is_main = accelerator.is_main_process
        if is_main:
            _report(target, scores, accelerator.num_processes, settings.json)
        if settings.out:
            raise_on_all_ranks(lambda: _write_images(target, settings.out))
    accelerator.wait_for_everyone()
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()  # one process audits, which takes long
    if is_main and settings.audit:
        _audit(target, scores)


def _check_out(out: Path | None) -> None:
    if out and out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"--out {out} exists and is not empty: name a new folder")


def _report(target: Target, scores: dict[str, float], processes: int, as_json: bool) -> None:
    """Print a table of scores and, if it is asked for, one line of JSON with all facts."""
    evaluator, line = target.evaluator, dict(scores)
    better = {name: measure.better for name in scores if (measure := Measure.of(name))}
    shown = [
        (name.removeprefix("eval/"), f"{value:.6g}", better.get(name))
        for name, value in scores.items()
        if name != "eval/seconds"
    ]
    print(*table([("score", "value", "better"), *shown]), sep="\n")
    if evaluator.missing:
        print(evaluator.missing)
    if not evaluator.num:
        print("no samples are scored, as the run's evaluate.num is 0: --num N scores N draws from the prior")
    if 0 < evaluator.held_out_images < FEW:  # 0: statistics that do not tell of how many
        print(few_images(evaluator.held_out_images))
    if halves := fid_of_halves(evaluator.references[0]):
        n, line["eval/floor"] = halves
        print(
            f"for comparison: the FID between two halves of the real images, {n:,} against {n:,}, is "
            f"{line['eval/floor']:.4g}; more images would lower it"
        )
    if as_json:
        facts = {**target.facts, **evaluator.facts, **evaluator.recipe, "world_size": processes}
        print(json.dumps(redacted_all({**line, **facts})))
    print(end="", flush=True)


def fid_of_halves(reference: ReferenceStatistics) -> tuple[int, float] | None:
    """Return the images in each half of the kept real images, and the FID between these halves.

    It tells how much of a FID is due to the number of images. None if fewer than FEW images' features are kept.
    """
    features = reference.features
    if features is None or len(features) < FEW:
        return None
    half, order = len(features) // 2, permutation(len(features), 0)

    def gaussian(chosen: np.ndarray) -> Gaussian:
        moments = Moments(features.shape[1], torch.device("cpu"))
        for part in features[torch.from_numpy(chosen).to(features.device)].cpu().split(1024):
            moments.update(part)
        return Moments.gaussian(moments.parts)

    return half, frechet(gaussian(order[:half]), gaussian(order[half : 2 * half]))


def _write_images(target: Target, out: Path) -> None:
    """Write this rank's blocks of the scored images as PNG, or .npy where that does not hold them."""
    assert target.images is not None
    out.mkdir(parents=True, exist_ok=True)
    for index in target.evaluator.ranks.blocks(target.evaluator.num):
        for i, pixels in zip(index.tolist(), target.images(index), strict=True):
            ending, content = encoded(pixels)
            (out / f"{i:06d}.{ending}").write_bytes(content)


def _audit(target: Target, scores: dict[str, float]) -> None:
    """Compute the scores again by torch-fidelity; exit with code 1 if one differs."""
    assert target.images is not None
    assert not isinstance(target.real, ReferenceStatistics)
    real, data = target.real, target.evaluator.data

    def pixels(index: Tensor) -> Tensor:
        return read(real, index.numpy(), *data.format).image

    if len(real) > target.evaluator.kept:
        print(f"audit: KID and precision use {target.evaluator.kept:,} of the real images, and are not audited")
        scores = {name: value for name, value in scores.items() if name.startswith(("eval/fid", "eval/is"))}
    device = target.evaluator.accelerator.device
    from trainer.evaluate.audit import audit  # torch-fidelity takes seconds to import

    results = audit(target.evaluator.extractor, target.images, target.evaluator.num, pixels, len(real), scores, device)
    for result in results:
        print(result, flush=True)
    if wrong := [result for result in results if not result.agrees]:
        exit_with_error(f"the audit disagrees: {'; '.join(map(str, wrong))}", code=1)
    print(f"audit: torch-fidelity agrees in {len(results)} scores", flush=True)
