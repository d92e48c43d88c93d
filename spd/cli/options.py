"""Options that several commands share, and what each command does first."""

from pathlib import Path
from typing import Annotated, Any

import typer

from spd.errors import SPDError

Model = Annotated[str, typer.Option(help="Hugging Face LLaMA folder, 'spd-tiny', or hub id.", metavar="DIR|HUB_ID")]
TP = Annotated[int, typer.Option(help="Logical tensor-parallel degree; it fixes the numbers, processes do not.", min=1)]
Text = Annotated[
    str | None,
    typer.Option(
        help="Text file, 'builtin' (spd-tiny's held-out text), 'builtin-train', 'wikitext2-train' or 'wikitext2-test'.",
        metavar="FILE|NAME",
    ),
]
SeqLen = Annotated[int | None, typer.Option(help="Tokens a window; left out: the model's positions, at most 2048.")]
Windows = Annotated[int | None, typer.Option(help="Use the first N windows; left out: all.")]
Skip = Annotated[int, typer.Option(help="Pass over N windows first, to keep evaluation apart from calibration.")]
Drop = Annotated[
    str | None,
    typer.Option(help="Blocks whose attention sync is dropped: none, all, or as in 1,3,5-7 (from 0).", metavar="SPEC"),
]
DropMLP = Annotated[str | None, typer.Option("--drop-mlp", help="The same for the sync after the MLP.", metavar="SPEC")]
PlanPath = Annotated[Path | None, typer.Option("--plan", help="Plan file, or a folder made by 'distill'.")]
Dtype = Annotated[str, typer.Option(help="float32, bfloat16 or float16.")]
Device = Annotated[str, typer.Option(help="cpu or cuda (one GPU a process).")]
Seed = Annotated[int, typer.Option(help="Seed of everything random.")]
Out = Annotated[Path | None, typer.Option(help="Also write the result here, whole or not at all.")]
Records = Annotated[Path, typer.Option(help="Folder for the record of this run.")]
Reproduction = Annotated[
    str | None, typer.Option(help="Name of the reproduction this run is a stage of (its parent run in MLflow).")
]
MLflow = Annotated[bool, typer.Option(help="Mirror the record to MLflow (MLFLOW_TRACKING_URI, else ./mlflow.db).")]
SensitivityPath = Annotated[Path, typer.Argument(help="What 'sensitivity --out' wrote.", metavar="SENSITIVITY.json")]
Percentages = Annotated[
    str | None, typer.Option(help="Percentages of blocks to drop, as in 0,25,50; left out: every number of blocks.")
]
Tau1 = Annotated[float, typer.Option(help="ISB up to this sensitivity, SB above; perplexity points.")]
Tau2 = Annotated[float, typer.Option(help="SB up to this sensitivity, ESB above; perplexity points.")]
Calibration = Annotated[
    int, typer.Option(help="Windows to repair on: the first of the text, which --skip must pass over.", min=2)
]
RepairsFolder = Annotated[
    Path, typer.Option("--repairs", help="Folder of the repairs; an interrupted run goes on there.")
]
PaperEpochs = Annotated[int | None, typer.Option("--epochs", help="Of the paper's distillation.")]
PaperRate = Annotated[float | None, typer.Option("--learning-rate", help="Of the paper's distillation.")]
Tasks = Annotated[
    str | None,
    typer.Option(
        help="Tasks to answer, as in piqa,sciq: the paper's arc_easy, arc_challenge, hellaswag, lambada_openai, piqa, "
        "sciq, winogrande; mmlu; tiny_last_word and tiny_continuation, of the built-in text.",
        metavar="NAMES",
    ),
]
TasksDir = Annotated[
    Path | None, typer.Option(help="Folder of NAME.jsonl with the tasks' rows; left out: from the hub.", metavar="DIR")
]
Limit = Annotated[
    int | None, typer.Option(help="Only the first N questions of a task (of each subject, for mmlu).", min=1)
]
BatchSize = Annotated[int, typer.Option(help="Contexts of tasks in a forward pass.", min=1)]
RUNS = Path("runs")


def open_session(context: typer.Context, own: Path | None = None, result: Path | None = None):
    """A session whose result goes to `--out`.

    A command that fills `--out` by itself says which folder it writes to (`own`), and the file that its result goes
    to, if any.
    """
    from spd.session import Session

    _check_choice("dtype", context.params, ("float32", "bfloat16", "float16"))
    _check_choice("device", context.params, ("cpu", "cuda"))
    say_if_dry(context)
    if own is None and context.params["out"] is not None:
        result = context.params["out"]
        own = result.parent
    return Session(context.info_name, context.params, own, result)


def say_if_dry(context: typer.Context) -> None:
    """With --dry-run: what the command would take, and its end."""
    if context.obj is not None and context.obj.dry_run is not None:
        from spd.budget import reckoned
        from spd.launch import say

        say(reckoned(context.info_name, context.params, context.obj.dry_run, context.obj.gpu))
        raise typer.Exit()


def _check_choice(name: str, options: dict[str, Any], known: tuple[str, ...]) -> None:
    if options.get(name, known[0]) not in known:
        raise SPDError(f"Unknown {name} '{options[name]}'; known: {', '.join(known)}.")


def numbers(spec: str | None) -> list[float] | None:
    try:
        return None if spec is None else [float(part) for part in spec.split(",")]
    except ValueError:
        raise SPDError(f"'{spec}' is not a list of percentages; write them as in 0,25,50.") from None
