"""The command line: `embedlens probe PICTURE`, `explore PICTURE`, `models`, `run STUDY`, `book`."""

from __future__ import annotations

import os
import sys
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

TRACEBACK = "EMBEDLENS_TRACEBACK"  # set in the environment: whatever ends a command is shown with its traceback


class Interruptible(TyperGroup):
    """Commands whose Ctrl-C comes to `main`, too; typer itself would end without a word."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            from embedlens.errors import EmbedLensError

            raise EmbedLensError(
                "stopped; what was finished is on disk, and the same command goes on from there"
            ) from None


app = typer.Typer(
    cls=Interruptible,
    help="What do visual tokens really encode? Probe a picture, list models, run a study, build the book.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


Picture = Annotated[Path, typer.Argument(help="Any ordinary picture: jpg, png, ...", show_default=False)]
Model = Annotated[str, typer.Option(help="'miniature', a checkpoint folder, or a Hugging Face repository id.")]
Question = Annotated[str, typer.Option(help="What to ask about the picture.")]
Preprocessing = Annotated[
    str | None,
    typer.Option(
        help="'letterbox', 'centre-crop' or 'stretch': how LLaVA-1.5 makes a picture a square.",
        show_default="as the model's family does it",
    ),
]
Device = Annotated[
    str | None,
    typer.Option(
        help="'cpu', 'cuda', 'cuda:1', 'mps' or 'auto'.", show_default="a GPU if there is one, one to a process"
    ),
]
Quantize = Annotated[str | None, typer.Option(help="'4bit' or '8bit', through bitsandbytes.", show_default="no")]


@app.command()
def probe(
    picture: Picture,
    model: Model = "miniature",
    question: Question = "What is in the picture?",
    out: Annotated[
        Path | None,
        typer.Option(help="Where to write the annotated picture.", show_default="<PICTURE>-probed.png here"),
    ] = None,
    k: Annotated[int, typer.Option("-k", help="Words per visual token in the printed grid.", min=1)] = 1,
    layer: Annotated[int, typer.Option(help="Layer to read; 0 is what enters the first block.", min=0)] = 0,
    lens: Annotated[str, typer.Option(help="'embed' (nearest input embeddings) or 'logit' (final norm and head).")] = (
        "embed"
    ),
    preprocessing: Preprocessing = None,
    device: Device = None,
    quantize: Quantize = None,
) -> None:
    """Print the top words of each visual token of PICTURE and write them on it."""
    from PIL import Image

    from embedlens.errors import writing
    from embedlens.loading import load
    from embedlens.pictures import open_picture
    from embedlens.probe import probe_picture

    out = out if out is not None else Path(f"{picture.stem}-probed.png")
    formats = Image.registered_extensions()
    _check_out(out, {ending for ending, name in formats.items() if name in Image.SAVE}, "picture", picture)
    image = open_picture(picture)  # before the model loads: a wrong path should not take seconds to be refused
    loaded = load(model, device=device, quantize=quantize, preprocessing=preprocessing)
    result = probe_picture(loaded, image, question, k=k, layer=layer, lens=lens)
    shapes = " + ".join(f"{view.rows}x{view.cols}" for view in result.grid.views)
    bars = int(result.grid.padded.sum())
    typer.echo(f"{picture}: {image.width}x{image.height} px, {shapes} patches, {bars} in bars (▒)")
    typer.echo(f"{loaded!r}\n{lens} lens at layer {layer} of {loaded.n_layers}\n")
    typer.echo(f"{result.table()}\n\n{question}\n{result.answer}")
    with writing(out):
        result.annotated().save(out)
    typer.echo(f"\nwrote {out}")
    _warn_of_the_miniature(model)


@app.command()
def explore(
    picture: Picture,
    model: Model = "miniature",
    question: Question = "What is in the picture?",
    out: Annotated[
        Path | None, typer.Option(help="Where to write the page, .html.", show_default="<PICTURE>-explored.html here")
    ] = None,
    preprocessing: Preprocessing = None,
    device: Device = None,
    quantize: Quantize = None,
) -> None:
    """Write a page to look inside PICTURE: each visual token's words, group and attention, layer by layer."""
    from embedlens.explorer import explore as explored
    from embedlens.loading import load
    from embedlens.pictures import open_picture

    out = out if out is not None else Path(f"{picture.stem}-explored.html")
    _check_out(out, {".html", ".htm"}, "page", picture)
    _check_out(out.with_suffix(".png"), {".png"}, "picture", picture)
    image = open_picture(picture)  # before the model loads: a wrong path should not take seconds to be refused
    loaded = load(model, device=device, quantize=quantize, preprocessing=preprocessing)
    page = explored(loaded, image, question, names=[picture.name])
    page.save(out)
    page.save(out.with_suffix(".png"))
    typer.echo(f"{question}\n{page.scenes[0]['answer']}\n\nwrote {out} and {out.with_suffix('.png')}")
    _warn_of_the_miniature(model)


def _check_out(out: Path, endings: set[str], kind: str, picture: Path) -> None:
    from embedlens.errors import EmbedLensError

    such_as = {"picture": ".png or .jpg", "page": ".html"}[kind]
    if out.resolve() == picture.resolve():
        raise EmbedLensError(f"{out} is the picture itself and would be written over: name another --out")
    if out.is_dir():
        raise EmbedLensError(f"--out {out} is a folder: name a file in it")
    if not out.resolve().parent.is_dir():
        raise EmbedLensError(f"--out {out} lies in a folder that does not exist: create {out.parent} first")
    if out.suffix.lower() not in endings:
        raise EmbedLensError(f"--out {out} has no {kind} ending: end it in {such_as}")


def _warn_of_the_miniature(model: str) -> None:
    if model == "miniature":
        from embedlens.explorer import NOTE

        typer.echo(f"note: {NOTE}", err=True)


@app.command()
def models() -> None:
    """List the supported families with sizes, limits and tested versions, and the facts of the shipped miniature."""
    from embedlens.families import FAMILIES, TESTED_WITH
    from embedlens.memory import sizes

    table = sizes()
    typer.echo("GiB are for one picture; below cards, how many pictures run at a time, in 16 / 8 / 4 bit (–: not one).")
    for family in FAMILIES:
        typer.echo(f"{family.NAME}: {', '.join(family.CLASSES)}\n{table.loc[list(family.EXAMPLES)].T.to_string()}")
        for limit in family.LIMITS:
            typer.echo(f"  note: {limit}")
    typer.echo(
        f"Tested with transformers {', '.join(TESTED_WITH)}, on small random checkpoints of these classes; sizes are "
        f"estimates from configs.\n\n{_miniature_facts()}"
    )


def _miniature_facts() -> str:
    """What its folder says."""
    from importlib.resources import files

    from embedlens.memory import config_of, needed

    folder = Path(str(files("embedlens").joinpath("miniature")))
    config, size = config_of(folder), (folder / "model.safetensors").stat().st_size
    text, vision = config.text_config, config.vision_config
    return (
        f"miniature: {config.architectures[0]}, {needed(config).parameters / 1e6:.1f} M parameters, "
        f"{size / 1e6:.0f} MB, ships with this package\n"
        f"  vision tower: {vision.num_hidden_layers} layers of width {vision.hidden_size}, "
        f"{vision.image_size} px in patches of {vision.patch_size} px\n"
        f"  language model: {text.num_hidden_layers} layers of width {text.hidden_size}"
    )


@app.command()
def run(
    study: Annotated[
        str, typer.Argument(help="'other_models', 'sinks', 'dead', or your own as module:function.", show_default=False)
    ],
    model: Model = "miniature",
    dataset: Annotated[
        str, typer.Option(help="'miniworld', or a COCO folder such as coco:/data/coco/val2017.")
    ] = "miniworld",
    n: Annotated[int, typer.Option("-n", help="Pictures; for 'sinks' and 'dead', questions of each family.")] = 200,
    seed: Annotated[int, typer.Option(help="Of the pictures and of all that is drawn at random.", min=0)] = 0,
    device: Device = None,
    dtype: Annotated[
        str | None,
        typer.Option(help="'float32', 'float16' or 'bfloat16'.", show_default="the checkpoint's own on a GPU"),
    ] = None,
    quantize: Quantize = None,
    preprocessing: Preprocessing = None,
    batch_size: Annotated[str, typer.Option(help="Pictures at a time; 'auto' finds what fits.")] = "auto",
    out: Annotated[
        Path | None,
        typer.Option(help="Folder for rows and table; goes on from what is there.", show_default="runs/MODEL/STUDY"),
    ] = None,
    results: Annotated[
        Path | None,
        typer.Option(
            help="Folder for the record of other_models.", show_default="the checkout's results; outside one, results"
        ),
    ] = None,
) -> None:
    """Run a study on many pictures, in as many processes as accelerate or torchrun launched.

    Each writes a table. other_models: clusters and token groups of one model; the whole of chapter 09, whose record it
    writes. sinks: the arms of Table 1; a part of chapter 03, whose notebook writes the record. dead: the arms of
    Table 2; a part of chapter 04, whose notebook writes the record.
    """
    from embedlens.errors import EmbedLensError
    from embedlens.studies import run_named

    if batch_size != "auto" and not batch_size.isdecimal():
        raise EmbedLensError(f"--batch-size {batch_size}: pass a number or 'auto'")
    size = batch_size if batch_size == "auto" else int(batch_size)
    say = partial(typer.echo, err=True)
    loaded_with = {"device": device, "dtype": dtype, "quantize": quantize, "preprocessing": preprocessing}
    run_named(study, model, dataset, n, seed, **loaded_with, batch_size=size, out=out, results=results, say=say)


@app.command()
def book(
    chapters: Annotated[
        list[str] | None,
        typer.Argument(help="Chapters to run, by number or name, such as 02; none: all.", show_default=False),
    ] = None,
    parameter: Annotated[
        list[str] | None,
        typer.Option("-p", "--parameter", metavar="NAME=VALUE", help="A notebook parameter; may be repeated."),
    ] = None,
    execute: Annotated[bool, typer.Option(help="Run the chapters, or render their committed outputs.")] = True,
    render: Annotated[bool, typer.Option(help="Render the pages, or only run the chapters that changed.")] = True,
    refresh: Annotated[bool, typer.Option("--refresh", help="Renew the committed notebooks; render nothing.")] = False,
    out: Annotated[
        Path, typer.Option(help="Folder for the run and rendered book; a new one, or one that this command made.")
    ] = Path("_build"),
    jobs: Annotated[
        int | None,
        typer.Option(help="Chapters at a time.", show_default="as cores and memory allow; one on a GPU", min=1),
    ] = None,
) -> None:
    """Run the chapters that changed, check them and render the book (in a checkout of the repository)."""
    from embedlens.book import builder
    from embedlens.errors import EmbedLensError

    if (refresh or not render) and (parameter or not execute):
        raise EmbedLensError("--refresh and --no-render run the committed notebooks as they are: drop -p, --no-execute")
    try:
        the_book = builder()
        root = the_book.find_root()
        pages = the_book.chapters(root, chapters) if parameter else []
        values = the_book.parse_parameters(parameter or [], [root / page for page in pages])
        if refresh:
            the_book.refresh(chapters, out=out, jobs=jobs)
        elif not render:
            the_book.executed(notebooks=chapters, out=out, jobs=jobs)
        else:
            the_book.build(chapters, execute=execute, parameters=values, out=out, jobs=jobs)
    except ModuleNotFoundError as error:
        raise EmbedLensError(
            f"the book needs {error.name}, which is not installed: run make book, or pip install 'embedlens[book]'"
        ) from None


def main() -> None:
    """Entry point; whatever ends a command is one sentence on stderr, exit code 2 (a chapter that fails: 1)."""
    from embedlens.errors import EmbedLensError

    for stream in (sys.stdout, sys.stderr):
        # A terminal or pipe in an old encoding should show a question mark, not fail, on a word it cannot print.
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")
    try:
        app()
    except Exception as error:
        if os.environ.get(TRACEBACK):
            raise
        print(f"embedlens: {_sentence(error)}", file=sys.stderr)
        sys.exit(error.exit_code if isinstance(error, EmbedLensError) else EmbedLensError.exit_code)


def _sentence(error: Exception) -> str:
    """What ended a command and what helps.

    >>> _sentence(PermissionError(13, "Permission denied", "/data/a.json"))
    '/data/a.json (Permission denied): pass a place that may be read and written; what was written before is kept'
    """
    from embedlens.errors import EmbedLensError, refused

    if isinstance(error, EmbedLensError):
        return str(error)
    if isinstance(error, OSError) and error.errno is not None:
        return refused(error, str(error.filename or "a file or a connection fails"))
    said = " ".join([f"{type(error).__name__}:", *str(error).split()]).removesuffix(":")
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return f"too little memory ({said}): pass a smaller model, fewer at a time, or --quantize 4bit on a GPU"
    if isinstance(error, ModuleNotFoundError):
        return f"{said}: install it, or run this where it lies"
    return f"{said} is a fault of embedlens or of the study: {TRACEBACK}=1 before the command shows where it is raised"


if __name__ == "__main__":
    main()
