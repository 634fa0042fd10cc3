"""The families that `networks.family` names; another one is a file beside dcgan.py and an entry here."""

from models.networks.blocks import Family
from models.networks.config import NetworkConfig
from models.networks.dcgan import DCGAN
from models.networks.residual import RESIDUAL

FAMILIES: dict[str, Family] = {"dcgan": DCGAN, "residual": RESIDUAL}


def family_of(config: NetworkConfig) -> Family:
    """Return the family that the settings name.

    Raises:
        ValueError: there is no such family, or a setting that it does not use was changed.
    """
    if config.family not in FAMILIES:
        raise ValueError(f"system.networks.family is {config.family!r}, expected one of {', '.join(sorted(FAMILIES))}")
    family = FAMILIES[config.family]
    for name in ("blocks", "attention"):
        if name not in family.options and getattr(config, name) != getattr(NetworkConfig, name):
            raise ValueError(
                f"system.networks.{name} has no effect in the {config.family} family: choose the residual family, or "
                "leave it unset"
            )
    return family
