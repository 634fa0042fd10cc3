"""Make shards of images: `python -m data.prepare`."""

from data.prepare.build import prepare as prepare
