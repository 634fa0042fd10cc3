"""The page itself, of Gradio's parts: a tab for each thing that the system can do."""

from collections.abc import Callable, Sequence
from functools import wraps
from pathlib import Path
from typing import Any

import gradio as gr
import torch
from gradio.helpers import Examples
from PIL import Image

from data.errors import DataError
from data.images import LIMITS
from trainer.demo.model import REACH, Direction, Model, enlarged, error_map
from trainer.log.pictures import picture

EXAMPLES = 10
GRID = ("download", "fullscreen")  # buttons
ONE_AT_A_TIME: dict[str, Any] = dict(concurrency_id="model", concurrency_limit=1, show_progress="minimal")
FONTS: dict[str, Any] = dict(
    font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"]
)  # others are downloaded
STYLE = """
.gradio-container {width: 100%; max-width: 1100px !important; margin: auto}
.gradio-container img {image-rendering: pixelated}
.upload img {width: 100%; height: 100%; object-fit: contain}
"""


def build_page(model: Model, folder: Path) -> gr.Blocks:
    """Return the page.

    Args:
        model: what it shows
        folder: where example images are written
    """
    examples = [save_examples(images, folder / f"examples{i}") for i, images in enumerate(model.images)]
    with gr.Blocks(title=model.title, analytics_enabled=False, delete_cache=(600, 3600)) as page:
        gr.Markdown(f"# {model.title}")
        if model.can("reconstruct"):
            with gr.Tab("Reconstruct"):
                reconstruct_tab(model, examples[0], page)
        if model.can("sample"):
            with gr.Tab("Directions"):
                directions_tab(model, examples[0] if examples else [], page)
            if model.can("posterior"):
                with gr.Tab("Interpolate"):
                    interpolate_tab(model, examples[0], page)
            with gr.Tab("Samples"):
                samples_tab(model, page)
        if model.can("translate"):
            with gr.Tab("Translate a to b"):
                translate_tab(model, "a2b", examples[0], page)
            with gr.Tab("Translate b to a"):
                translate_tab(model, "b2a", examples[-1], page)
    return page


def serve(page: gr.Blocks, host: str, port: int | None) -> str:
    """Serve the page and return its address.

    Raises:
        ValueError: the port is not free, or this machine does not have the address.
    """
    page.queue(api_open=False)
    private: dict[str, Any] = dict(share=False, show_error=True, footer_links=[], max_file_size=LIMITS.bytes)
    looks: dict[str, Any] = dict(theme=gr.themes.Default(**FONTS), css=STYLE, ssr_mode=False, quiet=True)
    try:
        launched = page.launch(server_name=host, server_port=port, prevent_thread_lock=True, **private, **looks)
    except OSError as error:
        where = f"--port {port}" if port else "a port from 7860 on"
        raise ValueError(f"--host {host}: {where} cannot be opened there; name another") from error
    return launched[1]


def save_examples(images: torch.Tensor, folder: Path) -> list[list[str]]:
    """Write the first images as PNGs, and return their paths as Gradio's examples have them."""
    folder.mkdir()
    paths = [folder / f"{i}.png" for i in range(min(EXAMPLES, len(images)))]
    for path, image in zip(paths, images, strict=False):
        picture(image).save(path)  # enlarged here, they would be other images to the system
    return [[str(path)] for path in paths]


def user_facing(use: Callable[..., Any]) -> Callable[..., Any]:
    """Return a function whose errors of the user's are shown on the page."""

    @wraps(use)
    def guarded(*given: Any) -> Any:
        try:
            return use(*given)
        except (DataError, ValueError) as error:
            raise gr.Error(str(error), duration=None, print_exception=False) from error  # it stays until it is closed

    return guarded


def show(
    use: Callable[..., Any],
    inputs: list[Any],
    outputs: list[Any],
    changes: list[Any],
    examples: Examples | None,
    api_name: str,
    cleared: list[Any] | None = None,
) -> None:
    """Show what a function makes of the inputs whenever they change or an example is chosen.

    Args:
        use: takes the inputs' values and returns the outputs'
        inputs, outputs: parts of the page
        changes: events after which the function is used. An image's is `input`, as its `change` may come twice
        examples: of the inputs
        api_name: of the function
        cleared: outputs that are empty after an error, as what they show would be of other inputs (default: all)
    """
    given: dict[str, Any] = dict(fn=user_facing(use), inputs=inputs, outputs=outputs, **ONE_AT_A_TIME)
    # A change while the former one is computed is not lost.
    asked = [gr.on(changes, api_name=api_name, trigger_mode="always_last", **given)]
    if examples is not None:
        asked.append(examples.load_input_event.then(api_visibility="private", trigger_mode="always_last", **given))
    cleared = outputs if cleared is None else cleared
    blank = [None] * len(cleared) if len(cleared) > 1 else None
    for one in asked:
        one.failure(lambda: blank, None, cleared, api_visibility="private")


def whole(number: float | None) -> int:
    """Return the content of a number field; raise a ValueError if the field is empty."""
    if number is None:
        raise ValueError("A number field is empty: enter a whole number, such as 0")
    return int(number)


def shown(title: str, buttons: Sequence[Any] = ()) -> gr.Image:
    """Return a place for a picture, below its title: Gradio's own label would cover a corner."""
    with gr.Column(min_width=150):
        gr.Markdown(title)
        return gr.Image(label=title, show_label=False, interactive=False, format="png", type="pil", buttons=[*buttons])


def upload(label: str = "An image", shown: str | None = None) -> gr.Image:
    """Return a place to drop an image file, which may show one from the start."""
    place: dict[str, Any] = dict(sources=["upload", "clipboard"], height=260, elem_classes="upload")
    made = gr.Image(shown, label=label, type="filepath", image_mode=None, **place)
    # Gradio, which has checked the path by now, would decode the file, and answer a damaged one at length.
    made.preprocess = _path
    return made


def _path(file: Any) -> str | None:
    return file and file.path


def reconstruct_tab(model: Model, examples: list[list[str]], page: gr.Blocks) -> None:
    def reconstruct(path: str | None) -> tuple[Any, ...]:
        if path is None:
            return None, None, None, ""
        image = model.open(path)
        made = model.reconstruct(image)
        return enlarged(image), enlarged(made), *error_map(image, made)

    given = upload(shown=examples[0][0])
    with gr.Row():
        outputs = [shown("As the model sees it"), shown("Reconstruction"), shown("Error map")]
    text = gr.Markdown()
    chosen = gr.Examples(examples, given, label="Held-out images")
    show(reconstruct, [given], [*outputs, text], [given.input, page.load], chosen, "reconstruct")


def directions_tab(model: Model, examples: list[list[str]], page: gr.Blocks) -> None:
    axes, encodes = model.axes, model.can("posterior")
    assert axes is not None

    def start(given: str | float | None) -> list[Any]:
        if not encodes:
            code = model.draw(0, int(given or 0))
        elif given is None:
            code = axes.centre.float().view(model.system.latent_shape)
        else:
            code = model.generator.encoder(model.open(str(given))[None])[0][0]
        own = [round(value, 2) for value in axes.coordinates(code).clamp(-REACH, REACH).tolist()]
        return [*own, enlarged(model.decode(code[None])[0]), model.sweep(code), code]

    def move(code: Any, *values: float) -> Image.Image | None:
        if code is None:
            return None
        return enlarged(model.decode(axes.move(code, torch.tensor(values, dtype=torch.float64))[None])[0])

    what = "The codes of images vary" if encodes else "Images change"
    without = " Without an image, they start at the mean code." if encodes else ""
    gr.Markdown(f"{what} most along these directions. A slider is in standard deviations.{without}")
    code = gr.State()
    with gr.Row():
        with gr.Column(min_width=250):
            number: dict[str, Any] = dict(label="Start from sample", precision=0, minimum=0)
            given = upload("Start from an image") if encodes else gr.Number(0, **number)
            made = shown("The code's image")
        with gr.Column(min_width=250):
            sliders = [
                gr.Slider(-REACH, REACH, 0, step=0.01, label=f"Direction {i + 1}") for i in range(len(axes.scale))
            ]
    chosen = gr.Examples(examples, given, label="Held-out images") if encodes else None
    sweep = shown(f"Each direction from -{REACH:g} to {REACH:g}, while the others stay", GRID)
    outputs, changes = [*sliders, made, sweep, code], [given.input, page.load]
    show(start, [given], outputs, changes, chosen, "directions", cleared=[made, sweep, code])
    gr.on(
        [slider.input for slider in sliders],
        user_facing(move),
        [code, *sliders],
        made,
        trigger_mode="always_last",
        api_name="move",
        **ONE_AT_A_TIME | {"show_progress": "hidden"},
    )


def interpolate_tab(model: Model, examples: list[list[str]], page: gr.Blocks) -> None:
    def interpolate(a: str | None, b: str | None, steps: float) -> Image.Image | None:
        if a is None or b is None:
            return None
        for path in (a, b):
            model.open(path)  # its errors do not name the file on this machine
        return model.interpolate([a, b], int(steps), 0)

    with gr.Row():
        ends = [upload("From", examples[0][0]), upload("To", examples[-1][0])]
    steps = gr.Slider(2, 16, 9, step=1, label="Pictures")
    made = shown("From one image to the other")
    pairs = [[a, b] for (a,), (b,) in zip(examples[:6:2], examples[1:6:2], strict=False)]
    chosen = gr.Examples(pairs, ends, label="Held-out images") if pairs else None
    changes = [ends[0].input, ends[1].input, steps.release, page.load]
    show(interpolate, [*ends, steps], [made], changes, chosen, "interpolate")


def samples_tab(model: Model, page: gr.Blocks) -> None:
    def samples(seed: float | None, num: float, truncation: float) -> Image.Image:
        return model.samples(whole(seed), int(num), truncation)

    def interpolate(seed: float | None, a: float | None, b: float | None) -> Image.Image:
        return model.interpolate([str(whole(a)), str(whole(b))], 9, whole(seed))

    with gr.Row():
        seed = gr.Number(0, label="Seed", precision=0, minimum=0, min_width=120)
        num = gr.Slider(4, 100, 36, step=1, label="Samples", min_width=200)
        truncation = gr.Slider(0, 1.5, 1, step=0.05, label="Truncation (z times this)", min_width=200)
    made = shown("Samples 0, 1, 2, ... of this seed, row by row", GRID)
    with gr.Row():
        ends = [
            gr.Number(value, label=label, precision=0, minimum=0, min_width=120)
            for value, label in enumerate(("From sample", "To sample"))
        ]
    between = shown("From one sample to the other")
    changes, inputs = [seed.change, num.release, truncation.release, page.load], [seed, num, truncation]
    gr.on(changes, user_facing(samples), inputs, made, api_name="samples", **ONE_AT_A_TIME)
    changes = [seed.change, *(end.change for end in ends), page.load]
    gr.on(changes, user_facing(interpolate), [seed, *ends], between, api_name="between_samples", **ONE_AT_A_TIME)


def translate_tab(model: Model, direction: Direction, examples: list[list[str]], page: gr.Blocks) -> None:
    back: Direction = "b2a" if direction == "a2b" else "a2b"

    def translate(path: str | None) -> tuple[Image.Image | None, ...]:
        if path is None:
            return None, None, None
        image = model.open(path)
        made = model.translate(image, direction)
        return enlarged(image), enlarged(made), enlarged(model.translate(made, back))

    given = upload(f"An image of domain {direction[0]}", examples[0][0])
    with gr.Row():
        outputs = [shown("As the model sees it"), shown(f"In domain {direction[-1]}"), shown("And back")]
    chosen = gr.Examples(examples, given, label="Held-out images")
    show(translate, [given], outputs, [given.input, page.load], chosen, f"translate_{direction}")
