"""TTFT and time per token of all full, drops, four bits and both, interleaved on two real processes over a link."""

from spd.bench import BenchSettings, Timed, run
from spd.cli import main
from spd.config import named_shape
from spd.options import COMPUTE, PROMPT, command, option
from spd.plan import Plan
from spd.planner import blocks_of


@command(
    option("--shape", "Named shape with random weights.", default="llama-33m"),
    option("--tp", "Processes, one shard each.", int, 2),
    option("--repeats", "Timed repetitions of each plan.", int, 20),
    *(*PROMPT, *COMPUTE),
    name="bench",
)
def bench_policies(session) -> None:
    """Plans with every sync point full, 70 % of attention's dropped, all in four kept bits, and dropped or in four."""
    o = session.options
    blocks = named_shape(o.shape).num_blocks
    full, dropped = Plan.full(blocks), Plan.dropping(blocks, range(blocks_of(70, blocks)))
    settings = BenchSettings(
        (full, dropped, full.sending(4), dropped.sending(4)), o.batch, o.prompt_len, o.new_tokens, o.link, o.repeats
    )
    timed = Timed(shape=o.shape, tp=o.tp)
    session.publish(run(session.runtime, timed, settings), timed.described)


if __name__ == "__main__":
    main(bench_policies)
