"""What a run prints when it starts, and when it has finished."""

from collections.abc import Sequence
from pathlib import Path

from accelerate import Accelerator

from data.redact import redacted
from trainer.config.parser import Config
from trainer.config.resume import flatten
from trainer.distributed.ranks import ROOT
from trainer.log.health import verdicts
from trainer.log.metrics_file import Line, is_evaluation
from trainer.parts import RunParts
from trainer.step import PlayerState

WIDTH = 10  # of the names of what is listed


def run_summary(parts: RunParts, players: Sequence[PlayerState], accelerator: Accelerator, step: int) -> str:
    """Return the run's players, networks, data, batch split and scores, and the step at which it starts or resumes."""
    config, world = parts.config, accelerator.num_processes
    settings, data = config.trainer, config.data
    size = {name: sum(weight.numel() for weight in network.parameters()) for name, network in parts.networks.items()}
    held_out = " + ".join(f"{len(shards):,}" for shards in parts.tests)
    rows = [
        *(("player", _player(state, size)) for state in players),
        *(("frozen", f"{name} {size[name]:,} weights") for name in sorted(parts.frozen)),
        *(("weights", line) for line in (parts.initial.lines if parts.initial else ())),
        (
            "data",
            f"{' + '.join(f'{len(shards):,}' for shards in parts.trains)} training images, "
            f"{parts.orders[0].steps_per_epoch} steps an epoch; {held_out or 'none'} held out; "
            f"{data.size} x {data.size} pixels, {'grey' if data.channels == 1 else 'colour'}",
        ),
        *(("", redacted(source)) for source in (*data.trains, *data.tests)),
        (
            "batch",
            f"{settings.batch_size} images a step = {world} x {parts.per_rank_batch // parts.micro_batch} x "
            f"{parts.micro_batch}; {world} process{'es' if world > 1 else ''} on {accelerator.device.type}, precision "
            f"{accelerator.mixed_precision}",
        ),
        ("scores", _scoring(config)),
        ("settings", str(config.run_dir / "config.yaml")),
    ]
    begin = f"{'Resuming' if step else 'Starting'} at step {step} of {settings.steps} in {config.run_dir}"
    return "\n".join([type(parts.system).__name__, *_listed(rows), begin])


def start_warnings(config: Config, accelerator: Accelerator) -> list[str]:
    """Return what would make the run slower than it need be."""
    family = flatten(config.resolved()).get("system.networks.family")
    if accelerator.device.type == "cpu" and family == "residual":
        return [
            "system.networks.family residual is meant for GPUs, and is slow on this CPU: "
            "add --system.networks.family dcgan --system.networks.norm group"
        ]
    return []


def final_summary(folder: Path, config: Config, lines: Sequence[Line], tensorboard: bool) -> str:
    """Return a finished run's scores, symptoms and paths.

    Args:
        folder: the run's folder
        config: its settings
        lines: of its metrics.jsonl
        tensorboard: whether it has TensorBoard's files
    """
    symptoms = [one for one in verdicts(lines, config.resolved()) if one.found]
    board = "make board" if folder.parent == ROOT / "runs" else f"tensorboard --logdir {folder}"
    rows = [
        *(("scores", text) for text in _best([line for line in lines if is_evaluation(line)])),
        *(("symptom", f"{one.symptom}: {one.meaning}; {one.evidence}. What to do: {one.cure}") for one in symptoms),
        ("samples", str(folder / "samples")),
        ("report", f"python -m trainer.report {folder}"),
        *([("curves", board)] if tensorboard else []),
    ]
    return "\n".join([f"Finished at step {config.trainer.steps}", *_listed(rows)])


def _listed(rows: Sequence[tuple[str, str]]) -> list[str]:
    return [f"  {name:{WIDTH}}{text}" for name, text in rows]


def _player(state: PlayerState, size: dict[str, int]) -> str:
    player, optimizer = state.player, state.player.optimizer
    networks = ", ".join(f"{name} {size[name]:,} weights" for name in player.networks)
    when = f", from step {player.start}" * bool(player.start) + f", every {player.every} steps" * (player.every > 1)
    return f"{player.name} trains {networks}; {optimizer.algorithm}, lr {optimizer.lr:g}{when}"


def _scoring(config: Config) -> str:
    settings = config.evaluate
    if not settings.every:
        return "none, because evaluate.every is 0"
    return f"every {settings.every} steps and at the end, of {settings.num:,} samples, by {settings.extractor}"


def _best(evaluations: Sequence[Line]) -> list[str]:
    """Return each FID of the last evaluation, and the best of the run if another one was lower."""
    texts = []
    for name, value in evaluations[-1].items() if evaluations else ():
        if name.startswith("eval/fid"):
            best, step = min((line[name], line["step"]) for line in evaluations if name in line)
            lower = f"; it was lowest at step {step}: {best:.4g}" * (best < value)
            texts.append(f"{name} {value:.4g}{lower}")
    return texts
