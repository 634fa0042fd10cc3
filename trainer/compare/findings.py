"""Which known properties of the VAE/GAN family the scores of a comparison confirm."""

from typing import NamedTuple

from trainer.measures import MEASURES
from trainer.report.results import Entry

HOLDS, FAILS, UNDECIDED = "holds", "does not hold", "undecided: the seeds overlap"
FID_RATIO = 2.0  # from which an autoencoder's FID counts as far worse than a VAE's
RECOVERED = 0.9  # of z's variance, from which z counts as recovered


class Part(NamedTuple):
    """One comparison: of which systems, its verdict, and the figures that the verdict rests on."""

    about: str
    verdict: str
    figures: str


class Finding(NamedTuple):
    """A claim about kinds of systems, and a part for each pair of systems that it is about."""

    claim: str
    parts: list[Part]

    @property
    def verdict(self) -> str:
        verdicts = [part.verdict for part in self.parts]
        if len({*verdicts}) == 1:
            return verdicts[0]
        return f"holds in {verdicts.count(HOLDS)} of {len(verdicts)} comparisons"


def find(entries: list[Entry]) -> list[Finding]:
    """Return a finding for each claim whose systems are part of the comparison."""
    autoencoders, vaes, vaegans, ganvaes = (_of(entries, kind) for kind in ("AE", "VAE", "VAEGAN", "GANVAE"))
    binary, ternary = (_of(entries, "VAEGAN", mode) for mode in ("binary", "ternary"))
    others = [entry for entry in entries if entry.kind != "GANVAE"]
    found = [
        Finding("A VAE's samples are blurrier than a VAE-GAN's", _lower("sharpness", vaes, vaegans)),
        Finding(
            "A VAE's reconstructions are blurrier than a VAE-GAN's", _lower("sharpness_reconstructed", vaes, vaegans)
        ),
        Finding(
            "A plain autoencoder cannot turn draws from the prior into images: its FID is more than "
            f"{FID_RATIO:g} times a VAE's",
            _lower("fid", vaes, autoencoders, FID_RATIO),
        ),
        Finding(
            "A ternary discriminator brings codes closer to the prior than a binary one",
            _lower("prior_gap", ternary, binary),
        ),
        Finding("A ternary discriminator makes better samples than a binary one", _lower("fid", ternary, binary)),
        Finding(
            f"A GAN-VAE's encoder recovers more than {RECOVERED:g} of the variance of z from generated images",
            [_recovered(entry) for entry in ganvaes if entry.values("z_recovered")],
        ),
        Finding(
            "A GAN-VAE's encoder recovers z better than other systems' encoders",
            _lower("z_recovered", others, ganvaes),
        ),
    ]
    return [finding for finding in found if finding.parts]


def below(low: list[float], high: list[float], times: float = 1.0) -> str:
    """Return the verdict on whether every `low`, multiplied by `times`, is less than every `high`."""
    if times * max(low) < min(high):
        return HOLDS
    return FAILS if times * min(low) >= max(high) else UNDECIDED


def _of(entries: list[Entry], kind: str, discriminator: str | None = None) -> list[Entry]:
    return [
        entry
        for entry in entries
        if entry.kind == kind and discriminator in (None, entry.settings.get("discriminator"))
    ]


def _lower(key: str, lows: list[Entry], highs: list[Entry], times: float = 1.0) -> list[Part]:
    """Compare each pair of systems that both have the measure: is it lower for the first?"""
    measure, parts = MEASURES[key], []
    for low in lows:
        for high in highs:
            a, b = low.values(key), high.values(key)
            if a and b:
                figures = f"{measure.head} {measure.spread(a)} against {measure.spread(b)}"
                if measure.better == "near 1" and min(a + b) > 1:
                    figures += " (all above 1: noise rather than edges)"
                parts.append(Part(f"{low.name} and {high.name}", below(a, b, times), figures))
    return parts


def _recovered(entry: Entry) -> Part:
    measure, values = MEASURES["z_recovered"], entry.values("z_recovered")
    return Part(entry.name, below([RECOVERED], values), f"{measure.head} {measure.spread(values)}")
