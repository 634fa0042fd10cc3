"""`python -m trainer.generate`: make pictures and write them."""

from trainer.distributed.exit import user_errors
from trainer.generate import panels
from trainer.generate.arguments import parser
from trainer.generate.generator import Generator
from trainer.generate.writers import write, write_grid


def main(arguments: list[str] | None = None) -> None:
    """Run the command."""
    settings = parser().parse_args(arguments)
    out, command = settings.out, settings.command
    with user_errors():
        if out.exists() and not out.is_dir():
            raise ValueError(f"--out {out} is a file: name a folder, new or existing")
        generator = Generator(settings.checkpoint, command, settings.device)
        if command == "interpolate":
            written = write(panels.interpolate(generator, settings.between, settings.steps, settings.seed), out)
        else:
            num = settings.num or (64 if settings.grid else None)
            if command == "sample":
                blocks = panels.sample(generator, num or 10_000, settings.seed)
            elif out.resolve().is_relative_to(settings.images.resolve()):
                raise ValueError(f"--out {out} lies in --images {settings.images}: name a folder outside it")
            else:
                blocks = panels.compare(generator, settings.images, num, getattr(settings, "direction", None))
            written = write_grid(blocks, out / f"{command}.png") if settings.grid else write(blocks, out)
    others = len({*out.rglob("*.png")} - written)
    print(f"{out}: {len(written)} PNG{'s' * (len(written) != 1)} written{f', beside {others} older' * bool(others)}")
