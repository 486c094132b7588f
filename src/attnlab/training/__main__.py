"""``python -m attnlab.training``: see the package's docstring."""

import sys
from pathlib import Path
from typing import Annotated

import torch
import typer

from attnlab.errors import AttnlabError, InputError
from attnlab.training.report import report as write_report
from attnlab.training.run import Recipe, train
from attnlab.training.siblings import SIBLINGS, publish, train_siblings

app = typer.Typer(add_completion=False, no_args_is_help=True)


@app.callback()
def main() -> None:
    """The companion and its siblings: train them, then report on them."""


@app.command("run")
def run(
    folder: Annotated[Path, typer.Argument(help="Where the run lives. An interrupted one goes on from here.")],
    tokens: Annotated[int, typer.Option(help="How many tokens to train on.")] = Recipe.tokens,
    seed: Annotated[int, typer.Option(help="Seed of weights and data order.")] = 0,
    device: Annotated[str, typer.Option(help="cpu, cuda or mps.")] = "cpu",
    threads: Annotated[int, typer.Option(help="CPU threads; 0: torch's own choice.")] = 0,
) -> None:
    """Train the companion."""
    if threads:
        torch.set_num_threads(threads)
    train(folder, recipe=Recipe(tokens=tokens, seed=seed), device=device)


@app.command("report")
def report(
    folder: Annotated[Path, typer.Argument(help="A run's folder; an unfinished one is reported as such.")],
    out: Annotated[Path, typer.Option(help="Where the model, its report and its card go, as a Hugging Face folder.")],
    device: Annotated[str, typer.Option(help="cpu, cuda or mps.")] = "cpu",
    threads: Annotated[int, typer.Option(help="CPU threads; 0: torch's own choice.")] = 0,
) -> None:
    """Measure a run: bits per byte, heads, their history, completions. Writes the companion's folder."""
    if threads:
        torch.set_num_threads(threads)
    result = write_report(folder, out, device=device)
    typer.echo(
        f"{out}: {result['bits_per_byte']['cold_256']:.3f} bits per byte"
        + ("" if result["finished"] else ", unfinished")
    )


@app.command("siblings")
def siblings(
    folder: Annotated[Path, typer.Argument(help="Where the runs live. Interrupted ones go on from here.")],
    names: Annotated[
        list[str] | None, typer.Argument(help=f"Which: {', '.join(SIBLINGS)}. All if none is named.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of weights and data order.")] = 0,
    out: Annotated[Path | None, typer.Option(help="Where the models that ship and the report on all runs go.")] = None,
    device: Annotated[str, typer.Option(help="cpu, cuda or mps.")] = "cpu",
    threads: Annotated[int, typer.Option(help="CPU threads; 0: torch's own choice.")] = 0,
) -> None:
    """Train the siblings one after another; with --out, report on every finished run in FOLDER as well."""
    if threads:
        torch.set_num_threads(threads)
    if unknown := [name for name in names or [] if name not in SIBLINGS]:
        raise InputError(f"no sibling is called {unknown[0]!r}; there are {', '.join(SIBLINGS)}")
    train_siblings(folder, seed, names or list(SIBLINGS), device=device)
    if out is not None:
        for row in publish(folder, out, device=device):
            typer.echo(f"{row['name']}, seed {row['seed']}: {row['bits_per_byte']['cold_256']:.3f} bits per byte")


if __name__ == "__main__":
    try:
        app()
    except AttnlabError as error:
        sys.exit(f"error: {error}")
