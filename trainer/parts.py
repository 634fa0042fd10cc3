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
    """What a run trains, and on what."""

    config: Config  # the run's settings
    system: System  # the system; its networks are prepared for distribution by accelerate
    networks: dict[str, nn.Module]  # the same networks by name, without DDP's wrapper
    ema: EMA  # the averaged networks
    trains: list[Shards]  # training shards of each dataset
    tests: list[Shards]  # held-out shards of each dataset; empty if there are none
    orders: list[Order]  # order of the samples of each training set
    per_rank_batch: int  # images per step of one process
    micro_batch: int  # images that pass through the networks at once; divides per_rank_batch
    code: str  # checksum of the program's code
    frozen: frozenset[str]  # networks that trainer.train_only leaves as they are
    initial: Initial | None  # the weights that the run starts from; None if it draws or resumes them
