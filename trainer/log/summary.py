"""What a run prints when it starts."""

from accelerate import Accelerator

from trainer.parts import RunParts


def run_summary(parts: RunParts, accelerator: Accelerator, step: int) -> str:
    """Return the run's settings, networks, data and batch split, and the step at which it starts or resumes."""
    config, world = parts.config, accelerator.num_processes
    sizes = {name: sum(p.numel() for p in network.parameters()) for name, network in parts.networks.items()}
    networks = [f"{name} {size:,} weights{' (frozen)' * (name in parts.frozen)}" for name, size in sizes.items()]
    return (
        f"{config.redacted_yaml()}\n"
        f"{type(parts.system).__name__}: {', '.join(networks)}\n"
        + "".join(f"{line}\n" for line in (parts.initial.lines if parts.initial else ()))
        + f"{' + '.join(f'{len(shards):,}' for shards in parts.trains)} training images, "
        f"{parts.orders[0].steps_per_epoch} steps an epoch; {world} process{'es' if world > 1 else ''} on "
        f"{accelerator.device.type}, precision {accelerator.mixed_precision}; {config.trainer.batch_size} images a "
        f"step = {world} x {parts.per_rank_batch // parts.micro_batch} x {parts.micro_batch}\n"
        f"{'Resuming' if step else 'Starting'} at step {step} of {config.trainer.steps} in {config.run_dir}"
    )
