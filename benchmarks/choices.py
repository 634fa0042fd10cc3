"""What the ways of computing a step bring on this machine's CPU: `python -m benchmarks.choices`.

Each row times the training step of a small system one way and another, with one thread: a round times the second way
before and after the first, and the ratio is the mean of its times over the first one's. A run chooses channels_last by
itself (`trainer/networks.py`). Memory is that of the activations that a step keeps, as the dry run counts it.
"""

from collections.abc import Iterator

import torch

from benchmarks.common import Training, accelerator, paired, parser, precisions, print_table
from trainer.config.parser import configure
from trainer.networks import checkpoint_activations
from trainer.step_memory import FakeRun

DCGAN = "--system VAEGAN --system.networks.family dcgan --data.channels 3 --data.size 64 --trainer.batch_size 32"
RESIDUAL = "--system VAEGAN --data.channels 3 --data.size 32 --system.networks.width 16 --trainer.batch_size 16"
TOKENIZER = (
    "--system VAEGAN --data.channels 3 --data.size 64 --trainer.batch_size 4 --system.networks.latent_stride 8 "
    "--system.networks.patches true --system.networks.attention [16]"
)
KL = "--system VAE --data.channels 3 --data.size 64 --trainer.batch_size 4 --system.networks.family kl"
FORMATS = {
    "dcgan": DCGAN,
    "dcgan, GroupNorm": f"{DCGAN} --system.networks.norm group",
    "residual, R1": RESIDUAL,
    "residual, GroupNorm, R1": f"{RESIDUAL} --system.networks.norm group",
    "residual tokenizer, attention, R1": TOKENIZER,
    "kl": f"{KL} --system.networks.latent_stride 4",
}
RECOMPUTED = {name: FORMATS[name] for name in ("residual, R1", "residual tokenizer, attention, R1", "kl")}


def training(settings: str, precision: str, channels_last: bool = False, checkpointing: bool = False) -> Training:
    words = ["--data.train", "none", "--evaluate.every", "0", "--trainer.precision", precision]
    made = Training(configure([*settings.split(), *words]), accelerator(precision), channels_last=False)
    if channels_last:  # in every network, also where a run does without
        made.system.to(memory_format=torch.channels_last)
    checkpoint_activations(made.system, checkpointing)
    return made


def formats(rounds: int) -> Iterator[list[object]]:
    for name, settings in FORMATS.items():
        for shown, precision in precisions().items():
            ways = (training(settings, precision, channels_last) for channels_last in (True, False))
            took, _, ratio = paired(*ways, rounds)
            yield [name, shown, f"{1e3 * took:.0f}", f"{ratio:.2f}"]


def recomputed(rounds: int) -> Iterator[list[object]]:
    for name, settings in RECOMPUTED.items():
        ways = [training(settings, "no", checkpointing=on) for on in (True, False)]
        *_, ratio = paired(*ways, rounds)
        peaks = []
        for on in ("true", "false"):
            words = ["--data.train", "none", "--trainer.precision", "no", "--trainer.activation_checkpointing", on]
            config = configure([*settings.split(), *words])
            peaks.append(FakeRun(config, "cpu", 1).peak(config.trainer.batch_size, config.trainer.batch_size)[0])
        yield [name, *(f"{peak / 2**20:.0f}" for peak in peaks), f"{peaks[0] / peaks[1]:.2f}", f"{1 / ratio:.2f}"]


def main() -> None:
    given = parser(__doc__, rounds=7).parse_args()
    torch.set_num_threads(1)
    print_table(
        "networks | precision | ms a step in channels_last | times faster than by default", formats(given.rounds)
    )
    head = "networks | peak MiB with activation checkpointing | without | of it | times the time"
    print_table(head, recomputed(given.rounds))


if __name__ == "__main__":
    main()
