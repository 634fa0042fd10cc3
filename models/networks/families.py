"""The families that `networks.family` names; another one is a file beside dcgan.py and an entry here."""

from models.networks.blocks import OPTIONS, Family
from models.networks.config import NetworkConfig
from models.networks.dcgan import DCGAN
from models.networks.kl import KL
from models.networks.residual import RESIDUAL
from models.settings import check, check_unused

FAMILIES: dict[str, Family] = {"dcgan": DCGAN, "kl": KL, "residual": RESIDUAL}


def family_of(config: NetworkConfig) -> Family:
    """Return the family that the settings name; raise a ValueError if it does not use a setting that was changed."""
    name = config.family
    check(name in FAMILIES, "networks.family", repr(name), f"one of {', '.join(sorted(FAMILIES))}")
    options = [option for option in OPTIONS if option not in FAMILIES[name].options]
    unused = {f"networks.{option}": (getattr(config, option), getattr(NetworkConfig, option)) for option in options}
    check_unused(f"while system.networks.family is {name}", **unused)
    return FAMILIES[name]
