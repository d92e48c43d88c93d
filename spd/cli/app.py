"""The command line's root: the application that the modules beside it add their commands to."""

from pathlib import Path
from types import SimpleNamespace
from typing import Annotated

import typer

app = typer.Typer(
    help="Sync-point drop for tensor-parallel LLaMA models: which all-reduces can go, and what that gains.\n\n"
    "Every command prints one JSON document as its last line on stdout; progress goes to stderr. Start it under "
    "torchrun to spread the tp shards over processes.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


@app.callback()
def defaults(
    context: typer.Context,
    experiment: Annotated[
        Path | None, typer.Option(help="YAML whose values become the defaults of the command's options.")
    ] = None,
    dry_run: Annotated[
        int | None,
        typer.Option(help="Do nothing; say what it would take on so many GPUs.", metavar="PROCESSES", min=1),
    ] = None,
    gpu: Annotated[str, typer.Option(help="Named GPU for --dry-run.")] = "a100",
) -> None:
    context.obj = SimpleNamespace(experiment=None, dry_run=dry_run, gpu=gpu)
    if experiment is not None:
        from spd.experiment import read_experiment

        command = context.command.commands.get(context.invoked_subcommand)
        names = {parameter.name for parameter in command.params}
        context.obj.experiment = read_experiment(experiment)
        chosen = context.obj.experiment.defaults(context.invoked_subcommand, names)
        context.default_map = {context.invoked_subcommand: chosen}
