"""The parts of a run, which `trainer.build` makes."""

from dataclasses import dataclass

from torch import nn

from data.order import Order
from data.shards.reader import Shards
from models import System
from trainer.config.parser import Config
from trainer.ema import EMA
from trainer.weights import Initial


@dataclass(frozen=True)
class RunParts:
    """What a run trains, and on what.

    Args:
        config: the run's settings
        system: the system; its networks are prepared for distribution by accelerate
        networks: the same networks by name, without DDP's wrapper
        ema: the averaged networks
        trains: training shards of each dataset
        tests: held-out shards of each dataset; empty if there are none
        orders: order of the samples of each training set
        per_rank_batch: images per step of one process
        micro_batch: images that pass through the networks at once; divides per_rank_batch
        code: checksum of the program's code
        frozen: networks that trainer.train_only leaves as they are
        initial: the weights that the run starts from; None if it draws or resumes them
    """

    config: Config
    system: System
    networks: dict[str, nn.Module]
    ema: EMA
    trains: list[Shards]
    tests: list[Shards]
    orders: list[Order]
    per_rank_batch: int
    micro_batch: int
    code: str
    frozen: frozenset[str]
    initial: Initial | None
