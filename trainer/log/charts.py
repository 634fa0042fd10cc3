"""The charts of a run by the question that they answer: TensorBoard's layout, and the curves of a report."""

import re
from collections.abc import Collection
from typing import Any, NamedTuple

KINDS = ("real", "reconstructed", "generated")


class Chart(NamedTuple):
    """One or more curves over the steps: its title with units, regular expressions of the beginnings of the curves'
    names, and whether the values span orders of magnitude."""

    title: str
    tags: tuple[str, ...]
    log: bool = False

    def of(self, tags: Collection[str]) -> list[str]:
        """Return those of the tags that the chart shows."""
        return [tag for tag in tags if any(re.match(pattern, tag) for pattern in self.tags)]


def _of_discriminator(mode: str) -> list[Chart]:
    loss = (f"{mode}/(./)?discriminator_loss", f"{mode}/(./)?chance")
    return [
        Chart(f"loss of the {mode} discriminator, and its chance level", loss),
        Chart(f"accuracy of the {mode} discriminator", (f"{mode}/.*accuracy/",)),
    ]


QUESTIONS: dict[str, list[Chart]] = {
    "How good is it?": [
        Chart("FID and rFID", (r"eval/r?fid\d",), log=True),
        Chart("KID", (r"eval/kid\d",), log=True),
        Chart("inception score", (r"eval/is\d",)),
        Chart("precision and recall", ("eval/precision", "eval/recall")),
        Chart("density and coverage", ("eval/density", "eval/coverage")),
        Chart("PSNR of reconstructions (dB)", ("eval/psnr",)),
        Chart("PSNR of cycles (dB)", ("eval/cycle_psnr",)),
    ],
    "Is it learning?": [
        Chart("reconstruction loss", (".*/reconstruction", ".*/perceptual$")),
        Chart("loss of cycles and of identity", (".*/cycle$", ".*/identity$")),
        Chart("norms of gradients", (".*/grad_norm$",), log=True),
        Chart("learning rates", (".*/lr$",)),
    ],
    "Who is winning?": [
        *_of_discriminator("binary"),
        *_of_discriminator("ternary"),
        *(Chart(f"{kind} images are named", (f"ternary/named/{kind}/",)) for kind in KINDS),
        Chart("loss of the discriminators' opponents", (".*/generator_loss",)),
        Chart("weight of the discriminators for their opponents", (".*/weight_for_opponents$",)),
    ],
    "Are the codes healthy?": [
        Chart("KL of posterior and prior (nats per image)", (".*/kl$",)),
        Chart("active units", ("eval/active_units",)),
        Chart("prior gap", ("eval/prior_gap",), log=True),
        Chart("high frequencies of maps of codes (1: white noise)", ("eval/spectrum",)),
        Chart("R² of z recovered from G(z)", ("eval/z_recovered",)),
    ],
    "Is the machine busy?": [
        Chart("images per second", ("speed/images_per_second",)),
        Chart("share of the time spent waiting for data", ("speed/data_wait",)),
        Chart("peak memory of the main process (GB)", ("speed/.*_gb$",)),
        Chart("TFLOPS of a process", ("speed/tflops",)),
        Chart("starts of the run", ("run/starts",)),
    ],
}


def chart_layout(tags: Collection[str]) -> dict[str, Any]:
    """Return a layout for `SummaryWriter.add_custom_scalars`: by question, the charts that show any of the tags.

    Every question is there, also without charts: TensorBoard appends those that its first run lacks.
    """
    return {
        question: {chart.title: ["Multiline", [*chart.tags]] for chart in charts if chart.of(tags)}
        for question, charts in QUESTIONS.items()
    }
