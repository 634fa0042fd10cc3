"""What a run prints when it starts, and when it has finished."""

import os
import re
import sys
import textwrap
from collections.abc import Sequence
from pathlib import Path

from accelerate import Accelerator

from data.dataset import FEW
from data.images import channels_in_words, sides
from data.redact import redacted
from data.shards.reader import Shards
from trainer.config.parser import Config
from trainer.config.resume import flatten
from trainer.distributed.ranks import ROOT
from trainer.log.data_health import size_warning
from trainer.log.health import few_images, verdicts
from trainer.log.metrics_file import Line, is_evaluation
from trainer.parts import RunParts
from trainer.precision import cpu_has_bf16
from trainer.step import PlayerState

INDENT, WIDTH = 12, 120  # of a block's texts, and of its lines


def run_summary(parts: RunParts, players: Sequence[PlayerState], accelerator: Accelerator) -> str:
    """Return a block about a run: system, players and networks, data, batch split and processes, and scores."""
    config, world = parts.config, accelerator.num_processes
    settings, data = config.trainer, config.data
    sizes = {name: sum(weight.numel() for weight in network.parameters()) for name, network in parts.networks.items()}
    images = " + ".join(f"{len(shards):,}" for shards in parts.trains)
    held_out = " + ".join(f"{len(shards):,}" for shards in parts.tests) or "none"
    height, width = sides(data.size)
    bits = f", {data.bits} bits a channel" * (data.bits != 8)
    epoch = parts.orders[0].steps_per_epoch
    rows = [
        ("system", type(parts.system).__name__),
        *(("player", _player(state, sizes)) for state in players),
        *(("frozen", f"{name} {sizes[name]:,} weights") for name in sorted(parts.frozen)),
        *(("weights", line) for line in (parts.initial.lines if parts.initial else ())),
        ("data", f"{images} training images, {epoch} step{'s' * (epoch != 1)} an epoch; {held_out} held out"),
        *(("", redacted(source)) for source in (*data.trains, *data.tests)),
        ("images", f"{height} x {width} pixels, {channels_in_words(data.channels)}{bits}"),
        (
            "batch",
            f"{settings.batch_size} images a step = {world} x {parts.per_rank_batch // parts.micro_batch} x "
            f"{parts.micro_batch} (processes x micro-batches x images)",
        ),
        (
            "device",
            f"{world} process{'es' if world > 1 else ''} on {accelerator.device.type}, precision "
            f"{accelerator.mixed_precision}",
        ),
        ("scores", _scoring(config)),
        ("settings", str(config.run_dir / "config.yaml")),
    ]
    return "\n".join(_wrapped(name, text) for name, text in rows)


def start_line(config: Config, step: int) -> str:
    """Return at which step a run starts or resumes, and where."""
    where = redacted(str(config.trainer.run_dir))
    return f"{'Resuming' if step else 'Starting'} at step {step} of {config.trainer.steps} in {where}"


def start_warnings(config: Config, device: str, trains: Sequence[Shards], tests: Sequence[Shards]) -> list[str]:
    """Return what would make a run slower than it need be, its images blurred, or its scores uncertain.

    Args:
        config: its settings
        device: "cpu" or "cuda"
        trains, tests: training and held-out images of each data set
    """
    family, warnings = flatten(config.resolved()).get("system.networks.family"), []
    if device == "cpu" and family == "residual":
        warnings.append(
            "system.networks.family residual is for GPUs, and slow on this CPU: add --system.networks.family dcgan "
            "--system.networks.width 16 --system.networks.norm group"
        )
    if device == "cpu" and config.trainer.precision == "bf16" and not cpu_has_bf16():
        warnings.append(
            "trainer.precision bf16 is slow on this CPU, for which torch has no fast bf16: a step took 18 times as "
            "long as in fp32 where it was measured. Start a new run with --trainer.precision no"
        )
    held_out = min(map(len, tests), default=FEW)
    if config.evaluate.every and held_out < FEW:
        warnings.append(f"{few_images(held_out)} (data.prepare --test_fraction, or another data.test)")
    trained_on = {shards.fingerprint() for shards in trains}
    if config.evaluate.every and any(shards.fingerprint() in trained_on for shards in tests):
        warnings.append(
            "data.test has the same shards as data.train, so scores do not tell how the system does on images that it "
            "has not seen: name held-out ones with --data.test"
        )
    return [*warnings, *filter(None, (size_warning(shards, config.data) for shards in trains))]


def final_summary(folder: Path, config: Config, lines: Sequence[Line], tensorboard: bool) -> str:
    """Return a finished run's scores, symptoms and paths.

    Args:
        folder: the run's folder
        config: its settings
        lines: of its metrics.jsonl
        tensorboard: whether it has TensorBoard's files
    """
    symptoms = [one for one in verdicts(lines, config.resolved()) if one.found]
    scores = _scores([line for line in lines if is_evaluation(line)])
    told = [f"{one.symptom}: {one.meaning}; {one.evidence}. What to do: {one.cure}" for one in symptoms]
    board = "make board" if folder.parent == ROOT / "runs" else f"tensorboard --logdir {folder}"
    return "\n".join(
        [
            f"Finished at step {config.trainer.steps}",
            *(_wrapped("score", text) for text in scores),
            *(_wrapped("symptom", text) for text in told),
            _row("samples", str(folder / "samples")),
            _row("report", f"{_python()} -m trainer.report {folder}"),
            *([_row("curves", board)] if tensorboard else []),
        ]
    )


def _python() -> str:
    """Return Python as a shell finds it: by its path, if an environment is in use that is not activated."""
    activated = sys.prefix in (sys.base_prefix, os.environ.get("VIRTUAL_ENV"))
    return "python" if activated else os.path.relpath(sys.executable)


def _row(name: str, text: str) -> str:
    return f"  {name}".ljust(INDENT) + text


def _wrapped(name: str, text: str) -> str:
    indent = " " * INDENT
    return textwrap.fill(
        _row(name, text), WIDTH, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False
    )


def _player(state: PlayerState, sizes: dict[str, int]) -> str:
    player, optimizer = state.player, state.player.optimizer
    networks = ", ".join(f"{name} {sizes[name]:,} weights" for name in player.networks)
    when = f", from step {player.start}" * bool(player.start) + f", every {player.every} steps" * (player.every > 1)
    return f"{player.name} trains {networks}; {optimizer.algorithm}, lr {optimizer.lr}{when}"


def _scoring(config: Config) -> str:
    settings = config.evaluate
    if not settings.every:
        return "none, because evaluate.every is 0"
    return f"every {settings.every} steps and at the end, by {settings.extractor}"


def _scores(evaluations: Sequence[Line]) -> list[str]:
    """Return each FID and rFID of the last evaluation, and that of the run's best if it was lower."""
    texts = []
    for name, value in evaluations[-1].items() if evaluations else ():
        if re.match(r"eval/r?fid\d", name):
            best, step = min((line[name], line["step"]) for line in evaluations if name in line)
            lower = f"; it was lowest at step {step}: {best:.4g}" * (best < value)
            texts.append(f"{name.removeprefix('eval/')} {value:.4g}{lower}")
    return texts
