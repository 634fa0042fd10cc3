"""The settings of a run's data, training and evaluation, as dataclasses."""

import os
from dataclasses import dataclass, field
from typing import Literal

from jsonargparse.typing import NonNegativeInt, PositiveFloat, PositiveInt, register_type

from data.images import LIMITS, Limits
from data.shards.cache import Cache
from data.shards.reader import OnError, Shards
from data.shards.remote import is_remote
from models.networks.perceptual import WeightsFile
from trainer.distributed.stop import parse_time_limit

Metric = Literal["fid", "is", "kid", "prdc"]
METRICS: tuple[Metric, ...] = ("fid", "is", "kid", "prdc")  # of samples; prdc: precision, recall, density, coverage


class Location(str):
    """A URL, or an absolute path: relative to the YAML file that has it, on the command line to the working folder."""


def _absolute(path: str) -> str:
    return os.path.abspath(os.path.expanduser(path))


# jsonargparse works inside a YAML file's folder while it reads that file, so abspath means what the file means.
for _kind in (Location, WeightsFile):
    register_type(_kind, str, lambda value, kind=_kind: kind(value if is_remote(value) else _absolute(value)))


@dataclass
class DataConfig:
    """Data.

    Args:
        train: folder of WebDataset shards to learn from, an index.json of such, or a URL of either (s3, gs, hf, http
            ...); a list of two for CycleGAN
        test: held-out shards that evaluations compare with; as many as train
        size: pixels a side, 32 to 256: images are resized and cropped to it when read
        channels: 1 (grey) or 3 (colour)
        workers: processes a rank that decode ahead; 0 decodes in the training process
        crop: train on random crops that keep from so much to so much of an image, such as [0.5, 1]; unset: its centre
        flip: mirror half of the training images
        on_error: stop at shards and samples that are damaged, missing, empty or without an image; or skip them: damaged
            shards and samples without an image are left out, and the next good one stands in for a damaged image
        max_skipped: stop where more than this share of the images needed a stand-in
        window: samples among which a step's are chosen; a set no larger is shuffled whole. Unset: 2,048 times
            trainer.batch_size, at least 524,288
        lanes: places at once from which a step reads a larger set; each rank, and its cache, reads from its own. Unset:
            a quarter of trainer.batch_size, at least 64
        cache: folder for remote shards, on a disk of this machine
        cache_gb: gigabytes that it never passes
        max_pixels: of an image; one that has more is taken as damaged, for the memory it would take
        max_bytes: of an encoded image
        max_scans: of a JPEG, each of which takes time for all of its pixels
    """

    # The list first: as a Location, one would be written as a single text.
    train: list[Location] | Location
    test: list[Location] | Location | None = None
    size: int = 32
    channels: Literal[1, 3] = 3
    workers: NonNegativeInt = 2
    crop: tuple[float, float] | None = None
    flip: bool = False
    on_error: OnError = "stop"
    max_skipped: float = 0.01
    window: PositiveInt | None = None
    lanes: PositiveInt | None = None
    cache: Location | None = None
    cache_gb: PositiveFloat = 50.0
    max_pixels: PositiveInt = LIMITS.pixels
    max_bytes: PositiveInt = LIMITS.bytes
    max_scans: PositiveInt = LIMITS.scans

    def __post_init__(self) -> None:
        if self.crop and not 0 < self.crop[0] <= self.crop[1] <= 1:
            raise ValueError(f"data.crop is {list(self.crop)}, expected two shares, such as [0.5, 1]")
        if not 0 <= self.max_skipped <= 1:
            raise ValueError(f"data.max_skipped is {self.max_skipped}, expected a share between 0 and 1")

    def open(self, sources: list[str], on_error: OnError = "stop", by_user: bool = True) -> list[Shards]:
        """Shards of training or of held-out images; `by_user`: as `Shards` has it.

        Raises:
            DataError: they are missing or damaged.
        """
        cache = Cache(self.cache, int(self.cache_gb * 1e9)) if self.cache else None
        limits = Limits(self.max_pixels, self.max_bytes, self.max_scans)
        return [Shards(source, on_error, cache, by_user, limits) for source in sources]

    @property
    def trains(self) -> list[str]:
        return [*self.train] if isinstance(self.train, list) else [self.train]

    @property
    def tests(self) -> list[str]:
        return [*self.test] if isinstance(self.test, list) else [self.test] if self.test else []


@dataclass
class TrainerConfig:
    """Trainer.

    Args:
        steps: optimizer steps of the whole run
        batch_size: images a step, over all processes
        micro_batch: images a process takes through the networks at once, at most, to bound memory; unset: its whole
            share
        seed: of the weights, the order of the data and every draw
        run_dir: where all results go; the same command again goes on from there. Unset: runs/RECIPE
        precision: of passes; unset: the launcher's where that is bf16 or fp16, else bf16 on a GPU that has it
        overflows: updates in a row that fp16 may skip before the run has diverged
        grad_sync: average gradients between processes while they are made (ddp), or all at once after each player's
            last backward (flat), which can miss none and hides none of its time
        deterministic: take algorithms on a GPU that give the same bits each time, or fail where there is none
        save_every: steps between checkpoints; every evaluation and the last step save one, too
        log_every: steps between log lines
        check_every: steps between checks that all processes have the same weights; every save is one, too
        keep: newest checkpoints kept, besides the best by FID
        keep_every: keep the checkpoints of multiples of so many steps, too
        time_limit: "HH:MM:SS" or as else SLURM writes times: save and leave before the process is that old
        timeout: seconds that a process waits for the others before the run stops and names who is missing; more than a
            checkpoint takes to be written
        ema_half_life: of the averaged weights, in images
        ema_ramp: it is at most this share of the images seen
        compile: have torch.compile make encoders, decoders and generators faster, which takes it a minute or so;
            discriminators stay as they are, since a gradient penalty cannot go through compiled networks
        share_passes: make encoder and decoder passes once a step where possible; off saves memory, not the result
        accept_new_data: go on although images, their order or batch_size are others than those the run began with
    """

    steps: PositiveInt = 10_000
    batch_size: PositiveInt = 64
    micro_batch: PositiveInt | None = None
    seed: NonNegativeInt = 0
    run_dir: Location | None = None
    precision: Literal["no", "bf16", "fp16"] | None = None
    overflows: PositiveInt = 20
    grad_sync: Literal["ddp", "flat"] = "ddp"
    deterministic: bool = False
    save_every: PositiveInt = 1000
    log_every: PositiveInt = 50
    check_every: PositiveInt = 1000
    keep: PositiveInt = 2
    keep_every: PositiveInt | None = None
    time_limit: str | None = None
    timeout: PositiveInt = 600
    ema_half_life: PositiveInt = 10_000
    ema_ramp: PositiveFloat = 0.05
    compile: bool = False
    share_passes: bool = True
    accept_new_data: bool = False

    def __post_init__(self) -> None:
        if self.time_limit is not None:
            parse_time_limit(self.time_limit)


@dataclass
class EvaluateConfig:
    """Evaluation.

    Args:
        every: steps between evaluations (and after the last step); 0 is never
        num: samples drawn from the prior; the scores' names carry it
        extractor: inception (torch-fidelity's InceptionV3), demo-cnn (a small one trained on the labelled shards),
            demo-random (the same with random weights: needs no labels, and gives no inception score), file (one's own,
            as TorchScript or by torch.export), or one that torch-fidelity has registered, such as dinov2-vit-l-14
        weights: file of the extractor's weights; unset: TORCH_HOME's or downloaded (inception), or trained (demo-cnn)
        metrics: of samples: fid, is, kid, prdc (precision, recall, density and coverage)
        lpips: file of torchvision's vgg16 weights (a state_dict), for LPIPS of reconstructions; unset: no LPIPS
        statistics: folder where those of held-out images are kept, or one .npz file; unset: RUN_DIR/statistics
        budget: share of the run's time that evaluations may take: one that would take more is left out, but for the
            last step's. The training is the same whatever is left out
    """

    every: NonNegativeInt = 1000
    num: PositiveInt = 2000
    extractor: str = "inception"
    weights: Location | None = None
    metrics: list[Metric] = field(default_factory=lambda: [*METRICS])
    lpips: Location | None = None
    statistics: Location | None = None
    budget: PositiveFloat = 1.0

    def __post_init__(self) -> None:
        if self.num < 2:
            raise ValueError(f"evaluate.num must be at least 2; got {self.num}")
        if not 0 < self.budget <= 1:
            raise ValueError(f"evaluate.budget is {self.budget}, expected a share above 0 and up to 1")
