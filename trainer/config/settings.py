"""The settings of a run's data, training and evaluation; their docstrings are the text of --help."""

import os
import re
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import msgspec
import yaml
from jsonargparse.typing import NonNegativeInt, PositiveFloat, PositiveInt, register_type

from data.images import LIMITS, MAX_CHANNELS, Format, Limits, Size, sides
from data.loader import Crop
from data.shards.cache import Cache
from data.shards.reader import OnError, Shards
from data.shards.remote import is_remote
from models.schedule import Schedule
from models.settings import WeightsFile
from trainer.distributed.stop import parse_time_limit
from trainer.metrics import METRICS
from trainer.posthoc import check_length
from trainer.profiler import parse_profile
from trainer.schemas import ManifestData

HUB_NAME = re.compile(r"\w[\w.-]*/\w[\w.-]*(/\w[\w.-]*)?")  # of a model, and of a folder in it
TENSORBOARD = "tensorboard"  # accelerate's name of the tracker that each run has by default


class Location(str):
    """A URL or an absolute path. A relative path starts at its YAML file's folder, or at the working directory."""


class WeightsSource(str):
    """hf://ORG/NAME of the Hugging Face hub, also written ORG/NAME where no such path exists, or an absolute path."""


class MetricName(str):
    """A name of METRICS."""


def _metric_name(value: str) -> MetricName:
    if value not in METRICS:
        raise ValueError(f"Expected one of {[*METRICS]}. Got value: {value}")
    return MetricName(value)


register_type(MetricName, str, _metric_name)


def _absolute(path: str) -> str:
    return os.path.abspath(os.path.expanduser(path))


def _located(value: str, kind: type[str]) -> str:
    if kind is WeightsSource and HUB_NAME.fullmatch(value) and not os.path.exists(os.path.expanduser(value)):
        return f"hf://{value}"
    if not value and kind is Location:  # the working directory, if a shell's variable is unset
        raise ValueError("Expected a path or a URL. Got an empty text")
    return value if is_remote(value) else _absolute(value)


# jsonargparse changes to a YAML file's folder while it reads that file, so abspath is relative to it.
for _kind in (Location, WeightsFile, WeightsSource):
    register_type(_kind, str, lambda value, kind=_kind: kind(_located(value, kind)))


def _schedule(value: object) -> Schedule:
    given = yaml.safe_load(value) if isinstance(value, str) else value
    try:
        return given if isinstance(given, Schedule) else msgspec.convert(given, Schedule)
    except ValueError as error:
        raise ValueError(
            f"Expected a number, or {{start: NUMBER, end: NUMBER, steps: N}}. Got value: {given}"
        ) from error


register_type(Schedule, asdict, _schedule)


@dataclass
class DataConfig:
    """Data.

    Args:
        train: Folder of WebDataset shards to train on, its index.json, or a URL of either (s3://, gs://, hf://,
            https://). A folder that data.prepare wrote stands for its train split. CycleGAN takes a list of two.
        test: Held-out shards, which evaluations compare with; a list of two for CycleGAN. null means the test split
            beside data.train, if data.prepare wrote one. Needed unless evaluate.every is 0.
        size: Side of square images in pixels, 16 to 1024, such as 512, or height and width, such as [256, 384]. Images
            are resized and cropped to it as they are read. Networks halve images several times, so both must be
            multiples of a power of two, which depends on the networks: those with maps of codes
            (system.networks.latent_stride) and discriminators of patches take the most sizes.
        channels: Channels of an image: 1 (grey), 3 (colour, transparent images over white), 4 (colour and alpha), or
            any number up to 1024 that all images have, as .npy files or TIFFs.
        workers: Number of processes per rank that decode images ahead. 0 decodes in the training process. Raise it when
            steps wait for data.
        bits: Bits of a channel: 8, to which images of sixteen are reduced, or 16, as PNGs, TIFFs and PPMs may have.
        crop: Train on random crops with an area between these two fractions of the image's, such as [0.5, 1], resized
            to data.size; or "random": data.size pixels of the image at a random place, unscaled, which suits large
            images and networks with maps of codes (smaller images are enlarged). null takes the largest centred part
            of the shape of data.size, as evaluations and pictures always do.
        flip: Mirror half of the training images.
        on_error: What to do about damaged or missing shards and images. "stop" ends the run. "skip" leaves out shards
            and samples without an image, and replaces a damaged image by the next good one.
        max_skipped: Fraction of the images that may be replaced, from 0 to 1, before the run stops.
        window: Shuffle block: the number of samples among which a step's are chosen. Smaller training sets are shuffled
            as a whole. null shuffles sets of up to 524,288 as a whole, and takes 2,048 times trainer.batch_size, but at
            least 524,288, for larger ones. Lower it to read fewer shards at once.
        lanes: Interleave width: the number of places in a larger training set from which each step reads. null means a
            quarter of trainer.batch_size, but at least 64. Lower it to read fewer shards at once.
        cache: Folder on a local disk in which remote shards are kept. null keeps none.
        cache_gb: Largest size of data.cache in gigabytes.
        max_pixels: Largest number of pixels of an encoded image. Larger ones count as damaged, before they take memory.
        max_bytes: Largest size of an encoded image in bytes.
        max_scans: Largest number of scans of a progressive JPEG, each of which takes the time of a whole image.
    """

    # The list first: as a Location, one would be written as a single text.
    train: list[Location] | Location
    test: list[Location] | Location | None = None
    size: Size = 32
    channels: int = 3
    workers: NonNegativeInt = 2
    bits: Literal[8, 16] = 8
    crop: Crop | None = None
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
        if isinstance(self.crop, tuple) and not 0 < self.crop[0] <= self.crop[1] <= 1:
            raise ValueError(
                f"data.crop must be two fractions, the smaller first, such as [0.5, 1]; got {list(self.crop)}"
            )
        if not 1 <= self.channels <= MAX_CHANNELS:
            raise ValueError(f"data.channels must be 1 to {MAX_CHANNELS}; got {self.channels}")
        if not 0 <= self.max_skipped <= 1:
            raise ValueError(f"data.max_skipped must be between 0 and 1; got {self.max_skipped}")

    def open(self, sources: list[str], on_error: OnError = "stop", by_user: bool = True) -> list[Shards]:
        """Open sources of shards; `by_user`: as `Shards` has it; raise DataError if they are missing or damaged."""
        cache = Cache(self.cache, int(self.cache_gb * 1e9)) if self.cache else None
        limits = Limits(self.max_pixels, self.max_bytes, self.max_scans)
        return [Shards(source, on_error, cache, by_user, limits) for source in sources]

    @classmethod
    def of_manifest(cls, saved: ManifestData, **more: Any) -> "DataConfig":
        """Return a run's data settings, without those that would run a command or write files on this machine."""
        train, test = ([*map(Location, [at] if isinstance(at, str) else at or [])] for at in (saved.train, saved.test))
        return cls(train, test, saved.size, saved.channels, bits=saved.bits, on_error=saved.on_error, **more)

    @property
    def format(self) -> Format:
        return Format(self.size, self.channels, self.bits)

    @property
    def shape(self) -> tuple[int, int, int]:
        """Channels, height and width of an image."""
        return (self.channels, *sides(self.size))

    @property
    def trains(self) -> list[str]:
        return [*self.train] if isinstance(self.train, list) else [self.train]

    @property
    def tests(self) -> list[str]:
        return [*self.test] if isinstance(self.test, list) else [self.test] if self.test else []


@dataclass
class TrainerConfig:
    """Training.

    Args:
        steps: Number of optimizer steps of the whole run. A run may be resumed with another number as long as no
            player's `schedule` has begun to lower its learning rate, by the old number or the new.
        batch_size: Number of images per step, over all processes.
        micro_batch: Largest number of images that a process takes through the networks at once. null means all of its
            images of a step. Lower it to save memory: the result is the same.
        seed: Seed of the weights, the order of the data and all random draws.
        run_dir: Folder for all results. The same command resumes the run in it. null means runs/RECIPE. A URL (s3://,
            gs://, ...) is a folder elsewhere, to which results are copied after each save, and from which the run
            resumes on any machine.
        scratch: Folder on this machine's disk in which runs work whose run_dir is a URL, each in a folder of its own
            with as many checkpoints as a local run keeps. null means ~/.cache/vaegan-trainer/runs.
        precision: Precision of forward and backward passes; weights are float32. null means the launcher's, if that is
            bf16 or fp16, or else bf16 on GPUs that have it.
        overflows: Number of updates in a row that fp16's loss scaler may skip before the run counts as diverged. The
            log's PLAYER/skipped_updates is the fraction that it has skipped.
        grad_sync: When processes average gradients. "ddp" does so during backward passes. "flat" does so once, after a
            player's last backward pass: it does not overlap with computation, and cannot miss a gradient.
        deterministic: Use GPU algorithms that give the same bits each time, and fail where there is none.
        save_every: Number of steps between checkpoints. Evaluations and the last step also save one.
        log_every: Number of steps between log lines.
        trackers: Experiment trackers that get each log line, besides metrics.jsonl: "tensorboard", or any other that
            accelerate knows, such as "wandb" (Weights & Biases) or "mlflow". A resumed run goes on in the same
            tracker run. A tracker that fails never stops a run.
        check_every: Number of steps between checks that all processes have the same weights. Each save is also checked.
        keep: Number of newest checkpoints to keep, besides the best by evaluate.best.
        keep_every: Keep also the checkpoints at multiples of this number of steps. null keeps none.
        time_limit: Save a checkpoint and exit before the process reaches this age, as SLURM writes times: minutes,
            MM:SS, HH:MM:SS or D-HH:MM:SS. null means no limit.
        timeout: Seconds that a process waits for the others before the run stops and names the missing ones. It must be
            longer than a checkpoint takes to write.
        ema_half_life: Half-life of the averaged weights, in images. It may vary: {start: 0, end: 500000, steps: 40000}
            goes from the one to the other along half a cosine in these steps, as R3GAN's does.
        ema_ramp: Largest half-life as a fraction of the images seen so far, so that early averages forget the first
            weights.
        ema_lengths: Lengths of two more averages, such as [0.05, 0.1], which checkpoints keep, so that `trainer.export
            --ema_length` can make averages of others after training (post-hoc EMA, Karras et al. 2024). A length
            is the standard deviation of the averaged steps, as a fraction of the run so far. It takes the memory of the
            averaged networks for each, and needs keep_every, in some 10 to 20 checkpoints of a run. [] keeps none.
        compile: Compile the networks with torch.compile, which takes minutes at the first start and seconds at later
            ones. Only passes with a gradient penalty stay eager, because they are differentiated twice. cuda_graphs
            also records the compiled passes as CUDA graphs, for small networks on a GPU, whose operations take less
            time than their launches; it takes more memory.
        activation_checkpointing: Keep of residual blocks only what enters them, and compute the rest again in backward
            passes: less memory for about a third more time, and the same result. true takes all networks, a list such
            as [decoder] takes these.
        share_passes: Make encoder and decoder passes once per step where possible. Turn it off to save memory: the
            result is the same.
        profile: START:STOP, such as 20:30, records what the main process does in the steps after START up to STOP, as a
            trace in RUN_DIR/profile for TensorBoard or ui.perfetto.dev, and prints what their time is spent on. null
            records nothing.
        accept_new_data: Resume even if the data, their order or the batch size changed.
        init_from: Weights to start from: a folder of diffusers' AutoencoderKL, a run, a checkpoint or an export of this
            trainer, or a folder of NETWORK.safetensors; or ORG/NAME of the Hugging Face hub. Settings of networks that
            are left unset are the weights' own. Only safetensors are read.
        init_averages: Start from the averaged weights of a run or checkpoint. Turn it off to take those that its
            optimizers changed.
        train_only: Networks to train, of those that are used after training, such as decoder. The others of these keep
            their first weights, and discriminators are trained all the same. null trains all.
    """

    steps: PositiveInt = 10_000
    batch_size: PositiveInt = 64
    micro_batch: PositiveInt | None = None
    seed: NonNegativeInt = 0
    run_dir: Location | None = None
    scratch: Location | None = None
    precision: Literal["no", "bf16", "fp16"] | None = None
    overflows: PositiveInt = 20
    grad_sync: Literal["ddp", "flat"] = "ddp"
    deterministic: bool = False
    save_every: PositiveInt = 1000
    log_every: PositiveInt = 50
    trackers: list[str] = field(default_factory=lambda: [TENSORBOARD])
    check_every: PositiveInt = 1000
    keep: PositiveInt = 2
    keep_every: PositiveInt | None = None
    time_limit: str | None = None
    timeout: PositiveInt = 600
    ema_half_life: PositiveInt | Schedule = 10_000
    ema_ramp: PositiveFloat = 0.05
    ema_lengths: list[float] = field(default_factory=list)
    compile: bool | Literal["cuda_graphs"] = False
    activation_checkpointing: bool | list[str] = False
    share_passes: bool = True
    profile: str | None = None
    accept_new_data: bool = False
    init_from: WeightsSource | None = None
    init_averages: bool = True
    train_only: list[str] | str | None = None

    def __post_init__(self) -> None:
        if self.time_limit is not None:
            parse_time_limit(self.time_limit)
        parse_profile(self.profile, self.steps)
        half_life = self.ema_half_life
        if isinstance(half_life, Schedule) and not min(half_life.start, half_life.end) >= 0 < half_life.steps:
            raise ValueError(f"trainer.ema_half_life is {half_life}, expected images from 0 on, and steps above 0")
        for length in self.ema_lengths:
            check_length("trainer.ema_lengths", length)
        names = {f"{length:g}" for length in self.ema_lengths}  # of files
        if len(names) != len(self.ema_lengths) or (names and self.keep_every is None):
            raise ValueError(
                f"trainer.ema_lengths is {self.ema_lengths} and trainer.keep_every is {self.keep_every or 'null'}, "
                "expected different lengths, and the number of steps between checkpoints that keep their averages"
            )
        if not self.init_averages and self.init_from is None:
            raise ValueError("trainer.init_averages has no effect while trainer.init_from is unset: leave it unset")
        for name in self.trackers if self.trackers != [TENSORBOARD] else []:
            from accelerate.tracking import LOGGER_TYPE_TO_CLASS  # takes a second

            if name not in LOGGER_TYPE_TO_CLASS:
                known = ", ".join(sorted(LOGGER_TYPE_TO_CLASS))
                raise ValueError(
                    f"trainer.trackers has {name!r}, expected some of {known}. tensorboard is installed; the others "
                    "are packages to install under their names, such as pip install 'vaegan-trainer[wandb]'"
                )


@dataclass
class EvaluateConfig:
    """Evaluation.

    Args:
        every: Number of steps between evaluations; the last step is also evaluated. 0 turns evaluations off.
        num: Number of samples to draw from the prior, at least 2, which is part of the scores' names. With 0, none are
            scored or shown in pictures. null means 2,000, or 0 if the system is for reconstructions alone: AE, VAE
            without a kl_weight and VAEGAN without `samples`, whose draws from the prior are no images.
        extractor: Network whose features are compared. "inception" is torch-fidelity's InceptionV3. "demo-cnn" is a
            small network trained on the labelled shards. "demo-random" has random weights and gives no inception score.
            "file" is a TorchScript or torch.export file of your own. Other names are those that torch-fidelity has
            registered, such as dinov2-vit-l-14. null means inception or, if its weights are neither in TORCH_HOME nor
            can be downloaded, demo-random; a run keeps what it began with.
        weights: File of the extractor's weights. null means the file in TORCH_HOME or a download (inception), or
            training (demo-cnn).
        metrics: Scores of samples: fid, is, kid and prdc (precision, recall, density and coverage).
        lpips: File of torchvision's vgg16 weights (a state_dict) for the LPIPS of reconstructions. null leaves it out.
        statistics: Folder in which the statistics of held-out images are kept, or one .npz file. null means
            RUN_DIR/statistics.
        best: Score that decides which checkpoint is the best: "fid" (of samples or translations) or "rfid" (of
            reconstructions), which suits a VAE with a small kl_weight that is trained as a tokenizer. null means what
            the system is for: rfid for AE, VAE without a kl_weight and VAEGAN without `samples`, and fid for others.
        budget: Largest fraction of the run's time that evaluations may take, above 0 and up to 1. Evaluations beyond it
            are left out, except the last step's. Training is the same either way.
    """

    every: NonNegativeInt = 1000
    num: NonNegativeInt | None = None
    extractor: str | None = None
    weights: Location | None = None
    metrics: list[MetricName] = field(default_factory=lambda: [*map(MetricName, METRICS)])
    lpips: Location | None = None
    statistics: Location | None = None
    best: Literal["fid", "rfid"] | None = None
    budget: PositiveFloat = 1.0

    def __post_init__(self) -> None:
        if self.num == 1:
            raise ValueError("evaluate.num must be 0, which scores no samples, or at least 2; got 1")
        if not 0 < self.budget <= 1:
            raise ValueError(f"evaluate.budget must be above 0 and at most 1; got {self.budget}")
