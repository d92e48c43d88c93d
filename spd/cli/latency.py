"""Commands of latency, measured and predicted."""

from pathlib import Path
from typing import Annotated

import typer

from spd.cli.app import app
from spd.cli.options import (
    RUNS,
    Device,
    Dtype,
    MLflow,
    Out,
    Records,
    Reproduction,
    Seed,
    numbers,
    open_session,
)

Transport = Annotated[
    str | None,
    typer.Option(help="How processes started here talk: shared-memory (default where it works) or process-group."),
]


@app.command()
def bench(
    context: typer.Context,
    model: Annotated[str | None, typer.Option(help="Checkpoint folder, 'spd-tiny' or hub id.")] = None,
    shape: Annotated[str | None, typer.Option(help="Named shape with random weights, as llama-125m.")] = None,
    tp: Annotated[int, typer.Option(help="Processes, one shard each; on CPU they are started here.", min=1)] = 1,
    plan: Annotated[
        list[Path] | None,
        typer.Option(help="Plan file or folder (its policies: weights change no timing); again to compare."),
    ] = None,
    drop: Annotated[list[str] | None, typer.Option(help="Blocks that drop; give it again to compare.")] = None,
    sensitivity: Annotated[
        Path | None, typer.Option(help="Compare plans that drop the least sensitive blocks of this file first.")
    ] = None,
    percentages: Annotated[
        str | None,
        typer.Option(help="Percentages of blocks to drop, as in 0,25,50; without --sensitivity the first blocks."),
    ] = None,
    batch: Annotated[int, typer.Option(help="Sequences.", min=1)] = 1,
    prompt_len: Annotated[int, typer.Option(help="Tokens in the prompt.", min=1)] = 128,
    new_tokens: Annotated[int, typer.Option(help="Tokens decoded to time TPOT; 0 leaves it out.", min=0)] = 16,
    link: Annotated[
        str | None, typer.Option(help="Emulated link, waited for at every all-reduce, as in 10GBps,20us.")
    ] = None,
    repeats: Annotated[int, typer.Option(help="Timed repetitions of each plan.", min=1)] = 20,
    compile_: Annotated[
        bool, typer.Option("--compile", help="By torch.compile with static shapes; on GPUs also CUDA graphs.")
    ] = False,
    alone: Annotated[
        bool, typer.Option("--alone", help="Time rank 0's shard by itself; its all-reduces are predicted over --link.")
    ] = False,
    transport: Transport = None, dtype: Dtype = "float32", device: Device = "cpu", seed: Seed = 0, out: Out = None,
    records: Records = RUNS, reproduction: Reproduction = None, mlflow: MLflow = True,
) -> None:  # fmt: skip
    """Time to first token and per output token of several plans, on real processes, interleaved.

    Beside them stand three bounds: everything full, every attention sync dropped, no communication at all.
    """
    from spd.bench import BenchSettings, plans_to_time, run

    with open_session(context) as session:
        letters, described = plans_to_time(model, shape, tp, plan or [], drop or [], sensitivity, numbers(percentages))
        settings = BenchSettings(letters, model, shape, batch, prompt_len, new_tokens, link, repeats,
                                 dtype=dtype, seed=seed, compile=compile_,
                                 share_of=tp if alone else None, transport=transport)  # fmt: skip
        result = run(session.runtime, tp, settings)
        session.publish(result, described, tp)


@app.command("bench-peers")
def bench_peers(
    context: typer.Context,
    shapes: Annotated[str, typer.Option(help="Named shapes with random weights.")] = "llama-8m,llama-125m,llama3.2-1b",
    dtypes: Annotated[str, typer.Option(help="Of weights and arithmetic.")] = "float32,bfloat16",
    degrees: Annotated[str, typer.Option(help="Processes, one shard each.")] = "1,2",
    batch: Annotated[int, typer.Option(help="Sequences.", min=1)] = 1,
    prompt_len: Annotated[int, typer.Option(help="Tokens in the prompt.", min=1)] = 128,
    new_tokens: Annotated[int, typer.Option(help="Tokens decoded to time TPOT.", min=1)] = 8,
    seconds: Annotated[float, typer.Option(help="Repetitions of a row; from 5 to 50 of them in any case.")] = 12.0,
    seed: Seed = 0, out: Out = None, records: Records = RUNS, reproduction: Reproduction = None, mlflow: MLflow = True,
) -> None:  # fmt: skip
    """Time to first token and per output token beside transformers': same weights, same threads, interleaved.

    On CPU. With several processes the peer is transformers' own tensor parallelism.
    """
    from bench_peers import compare_all, degrees_of

    from spd.launch import bar

    with open_session(context) as session:
        asked = shapes.split(","), dtypes.split(","), degrees_of(degrees)
        rows = len(asked[0]) * len(asked[1]) * len(asked[2])
        setting = {"batch": batch, "prompt_len": prompt_len, "new_tokens": new_tokens}
        with bar(rows, "rows") as done:
            result = compare_all(*asked, done, seconds=seconds, seed=seed, **setting)
        session.publish(result | setting)


@app.command("predict")
def predict_(
    context: typer.Context,
    shape: Annotated[str, typer.Option(help="Named shape, as llama2-70b.")],
    gpu: Annotated[str | None, typer.Option(help="Named GPU; left out: a100.")] = None,
    tp: Annotated[int, typer.Option(help="GPUs, one shard each.", min=1)] = 8,
    nodes: Annotated[int, typer.Option(help="Nodes they are on: which measured all-reduce counts.", min=1)] = 1,
    link: Annotated[
        str | None, typer.Option(help="Slowest hop and latency, as in 25GBps,10us; left out: the measured all-reduce.")
    ] = None,
    percent: Annotated[
        str, typer.Option(help="Percentage of blocks that drop their attention sync, or several as in 0,25,50.")
    ] = "70",
    batch: Annotated[int, typer.Option(help="Sequences.", min=1)] = 1,
    prompt_len: Annotated[int, typer.Option(help="Tokens in the prompt.", min=1)] = 128,
    new_tokens: Annotated[int, typer.Option(help="Tokens decoded; TPOT is their mean.", min=1)] = 16,
    launch_us: Annotated[float, typer.Option(help="Host time an operator waits for; 0 under CUDA graphs.", min=0)] = 0,
    calibration: Annotated[Path | None, typer.Option(help="A machine that 'profile' calibrated, not a GPU.")] = None,
    out: Out = None, records: Records = RUNS, reproduction: Reproduction = None, mlflow: MLflow = True,
) -> None:  # fmt: skip
    """Latency on machines that are not at hand: TTFT, TPOT, share of communication, what dropping gains, the ceiling.

    reduction is 1 - t_p/t_0, speedup t_0/t_p, both of TTFT; 'tpot' has its own.
    """
    from spd.calibrate import ask
    from spd.pretrained import describe

    with open_session(context) as session:
        result, config = ask(
            shape, numbers(percent), tp, gpu_name=gpu, nodes=nodes, link=link, calibration=calibration, batch=batch,
            prompt_len=prompt_len, new_tokens=new_tokens, launch_us=launch_us,
        )  # fmt: skip
        session.publish(result, describe(config, shape, f"shape-{shape}"), tp)


@app.command("predict-paper")
def predict_paper_(
    context: typer.Context,
    out: Out = None, records: Records = RUNS, reproduction: Reproduction = None, mlflow: MLflow = True,
) -> None:  # fmt: skip
    """The paper's latency figures (2 and 7) predicted for LLaMA2 7B, 13B and 70B, beside its claims.

    Also the map of links where dropping pays, where the time goes, and the model checked against a decode benchmark
    made by others. 'report' draws the record.
    """
    from predict_paper import predict_paper

    with open_session(context) as session:
        session.publish(predict_paper())


@app.command()
def profile(
    context: typer.Context,
    bench_records: Annotated[
        list[Path], typer.Argument(help="Records of 'bench', or folders of them.", metavar="RECORDS...")
    ],
    check: Annotated[
        list[Path] | None, typer.Option(help="Records to predict, not to fit; give it again for more.")
    ] = None,
    statistic: Annotated[
        str, typer.Option(help="Time of a plan's repetitions: median, or min (others on the machine only lengthen it).")
    ] = "median",
    out: Out = None, records: Records = RUNS, reproduction: Reproduction = None, mlflow: MLflow = True,
) -> None:  # fmt: skip
    """Calibrate the latency model on measurements of this machine, for 'predict --calibration'.

    The records should differ in shape, prompt, batch and link; the errors on those to --check are in the result.
    """
    from spd.calibrate import profile as calibrate
    from spd.records import load_records

    with open_session(context) as session:
        fitted, checked = (_benches(load_records(paths)) for paths in (bench_records, check or []))
        session.publish(calibrate(fitted, checked, statistic))


def _benches(records: list[dict]) -> list[dict]:
    return [record for record in records if record["command"] == "bench"]
