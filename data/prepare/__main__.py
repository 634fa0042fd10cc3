"""Make WebDataset shards of images: `python -m data.prepare SOURCE OUT`.

SOURCE is one of
  a folder of images, flat or with one sub-folder per class; an archive of one (.tar, .tar.gz, .tar.xz, .tar.bz2, .zip)
  a .parquet file or a folder of them, in the layout of Hugging Face data sets
  WebDataset shards: a folder of .tar, or a pattern such as 'shards/{000..009}.tar'
  torchvision:NAME, a data set of torchvision.datasets that lies under --root
  digits, the data set that comes with scikit-learn
Images are PNG, JPEG, WebP, BMP, PPM, TIFF and GIF, and .npy files: [height, width, channels] of uint8 or uint16.
OUT becomes a folder of WebDataset shards for each split, and dataset.json, which describes them. Splits that SOURCE
names (train, test, validation) are kept; otherwise --test_fraction of the images becomes the split `test`.

Images keep their bytes, unless --size, --crop or --format changes them; TIFFs of many channels become .npy members.
Images that cannot be read or decoded are left out and listed in dataset.json. To continue after an
interruption, run the same command again; OUT appears when it is complete.
"""

from data.processes import end_when_interrupted, run_command

if __name__ == "__main__":
    end_when_interrupted()


from dataclasses import asdict
from pathlib import Path

from data.command import add_limits, add_workers, command_errors, command_parser, size_of
from data.dataset import FEW, read_dataset
from data.files import escaped
from data.prepare.build import TORCHVISION, prepare
from data.prepare.plan import FORMATS, HELD_OUT, PrepareSettings
from data.sources import MAX_RATIO


def main(arguments: list[str] | None = None) -> None:
    parser = command_parser("data.prepare", __doc__)
    add, default = parser.add_argument, "(default: %(default)s)"
    add("source", metavar="SOURCE", help="the images: one of the forms above")
    add("out", metavar="OUT", type=Path, help="folder to make; it must not exist yet")
    size = "resize the shorter side (bicubic, antialiased; default: keep it); with --crop, a square or [HEIGHT, WIDTH]"
    add("--size", type=size_of, metavar="PIXELS", help=size)
    add("--crop", action="store_true", help="keep only the largest centred square, or part of the shape of --size")
    alpha = "keep the transparency of images that are changed, for runs with data.channels 4 (default: over white)"
    add("--alpha", action="store_true", help=alpha)
    add("--format", help=f"{', '.join(FORMATS)}; keep encodes only what --size or --crop changes {default}")
    add("--quality", type=int, metavar="N", help=f"quality of encoded JPEG and WebP, 1 to 100 {default}")
    share = "share of the images for testing if SOURCE names no splits, by a hash of each path; 0: none "
    share += "(default: {}, and up to {} of fewer than {:,} images)".format(*HELD_OUT, round(1.2 * FEW / HELD_OUT[0]))
    add("--test_fraction", type=float, metavar="SHARE", help=share)
    add("--per_shard", type=int, metavar="N", help=f"images that a shard may have {default}")
    add("--shard_bytes", type=int, metavar="N", help=f"bytes of SOURCE's images that a shard may have {default}")
    share = f"share of the images that may be unreadable before the command stops {default}"
    add("--max_rejected", type=float, metavar="SHARE", help=share)
    ratio = f"unpacked bytes that an archive may have, as a multiple of its own {default}"
    add("--max_ratio", type=float, metavar="RATIO", help=ratio)
    add_limits(parser)
    add_workers(parser)
    add("--root", type=Path, metavar="FOLDER", help=f"folder of torchvision's data sets {default}")
    add("--download", action="store_true", help="let torchvision download what is missing from --root")
    parser.set_defaults(**asdict(PrepareSettings()), max_rejected=0.01, max_ratio=MAX_RATIO, root=TORCHVISION)
    settings = parser.parse_args(arguments)
    with command_errors(parser, "stopped: run the same command to continue"):
        counts = prepare(**vars(settings))
        dataset = read_dataset(settings.out)
    assert dataset is not None
    images = ", ".join(f"{n:,} images in {split}" for split, n in counts.items())
    print(f"{settings.out}: {images}, {len(dataset.classes)} class{'es' * (len(dataset.classes) != 1)}")
    if 0 < (held_out := counts.get("test", FEW)) < FEW:
        print(f"only {held_out} images are held out: scores by fewer than {FEW} say little, so judge by the pictures")
    if len(dataset.classes) == 1:
        name = escaped(dataset.classes[0])
        print(f"the one class is {name}: if its sub-folders are the classes, prepare that folder instead")
    if dataset.ignored:
        others = ", ".join(f"{count:,} {escaped(ending)}" for ending, count in dataset.ignored.items())
        print(f"files that are no images, by their endings: {others}")
    if dataset.rejected:
        first, place = dataset.rejected[0], settings.out / "dataset.json"
        print(
            f"warning: images that cannot be read were left out: {len(dataset.rejected):,}, such as "
            f"{escaped(first.file)}: {escaped(first.reason)}. {place} lists them all"
        )


if __name__ == "__main__":
    run_command(main)
