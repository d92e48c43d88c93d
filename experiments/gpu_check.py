"""Ten minutes on one GPU: its numbers beside a CPU's, decoding beside memory's bandwidth, what a repair leaves behind.

    sh experiments/gpu_check.sh                    on a GPU; one JSON document on stdout
    sh experiments/gpu_check.sh --device cpu       the same commands at small shapes, to try them

Most run commands of `spd` in processes of their own. Each part says whether it is `ok`, or its error, and the next
goes on; null is what a CPU does not show.
"""

import json
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from shape_only import write_shape_only

from spd.cli import main
from spd.comm import Shards
from spd.config import named_shape
from spd.engines import Compiled, Eager, clock
from spd.errors import SPDError
from spd.machines import timed_passes
from spd.options import DEVICE, command, option
from spd.pretrained import SPDModel
from spd.records import read_record

SECONDS = 590  # for all of it
ALIKE = 1e-3  # relative, of what a GPU and a CPU give: Adam makes more of rounding than the rest does
OF_BANDWIDTH = 0.85  # that decoding by a graph is to reach
LEFT_BEHIND = 0.1  # of a block's weights: what repairing two more blocks may add to the peak
TINY = ("--model", "spd-tiny", "--tp", 8)
ON = (*TINY, "--text", "builtin", "--windows", 8)
REPAIR = ("distill", *ON, "--drop", "0,1", "--matmul", "fp32", "--recipe")
COMPARED = {  # commands, and a number or numbers of their results
    "sensitivity": (("sensitivity", *ON), "perplexity_from"),
    "distillation": ((*REPAIR, "paper", "--epochs", 1), "perplexity_after"),
    "closed form": ((*REPAIR, "closed-form"), "perplexity_after"),
    "generation": (("generate", *TINY, "--drop", "all", "--prompt", "Returns the mean of"), "token_ids"),
}


@dataclass(frozen=True)
class Check:
    """Where commands run, in which folder, and until when (`time.monotonic`)."""

    device: str
    folder: Path
    ends: float

    def run(self, *words, device: str | None = None) -> dict:
        """A command's result, with what its record says of the GPU. Raises SPDError with the command's last line."""
        given = map(str, (*words, "--device", device or self.device, "--no-mlflow", "--records", "records"))
        try:
            found = subprocess.run([sys.executable, "-m", "spd", *given], cwd=self.folder, capture_output=True,
                                   text=True, timeout=max(1.0, self.ends - time.monotonic()))  # fmt: skip
        except subprocess.TimeoutExpired:
            raise SPDError(f"No time was left for 'spd {words[0]}'.") from None
        if found.returncode:
            raise SPDError(f"'spd {words[0]}' ended with {found.returncode}: {found.stderr.splitlines()[-1]}")
        result = json.loads(found.stdout.splitlines()[-1])
        return result | {"gpu": read_record(self.folder / "records" / f"{result['record']}.json")["gpu"]}

    def shape(self, name: str) -> str:
        return name if self.device == "cuda" else "llama-8m"

    def parity(self) -> dict:
        """The largest relative difference of each command's numbers on CPU and GPU."""
        differ = {}
        for name, (words, key) in COMPARED.items():
            pair = [self.run(*words, "--out", f"{name}-{on}", device=on)[key] for on in ("cpu", self.device)]
            differ[name] = difference(*pair)
        return {"differ": differ, "ok": max(differ.values()) <= ALIKE}

    def decoding(self) -> dict:
        """Time per token of 7B, and the share of it that reading all weights at the rate of a copy would take."""
        shape, row = self.shape("llama2-7b"), {}
        weights, rate = timed_passes(named_shape(shape), 1, 1, 128, 64, 2)["tpot"].work().weight_byte, self.copy_rate()
        for engine, compiled in (("eager", []), ("captured", ["--compile"])):
            row[engine] = self.bench("--shape", shape, *compiled)["plans"][0]
            row[engine]["of_bandwidth"] = 1e3 * weights / rate / row[engine]["tpot_ms"]["median"]
        return row | {"copy_gb_per_s": rate / 1e9, "ok": row["captured"]["of_bandwidth"] >= OF_BANDWIDTH}

    def copy_rate(self) -> float:
        """Bytes a second that a copy reads and writes, the best of a few."""
        source, taken = torch.empty(2**30, dtype=torch.uint8, device=self.device), []
        target = torch.zeros_like(source)
        for _ in range(5):
            start = clock(source)
            for _ in range(10 if source.is_cuda else 1):
                target.copy_(source)
            taken.append((clock(source) - start) / (10 if source.is_cuda else 1))
        return 2 * source.nbytes / min(taken)

    def memory(self) -> dict:
        """Peaks of repairing one block, and three, of a model of 7B's width: gradients once stayed."""
        config = named_shape(self.shape("llama2-7b"))
        write_shape_only(self.shape("llama2-7b"), 3, self.folder / "shape")
        words = ("distill", "--model", "shape", "--tp", 8, "--text", "builtin", "--windows", 4, "--recipe", "paper")
        peaks = [
            self.run(*words, "--epochs", 1, "--drop", drop, "--out", f"drop-{drop}")["gpu"] for drop in ("0", "0-2")
        ]
        if None in peaks:
            return {"ok": None}
        more = peaks[1]["peak_bytes"] - peaks[0]["peak_bytes"]
        return {"peaks": peaks, "ok": more < LEFT_BEHIND * 4 * config.block_parameters()}

    def long_prompt(self) -> dict:
        """Tokens of both engines past the end of the rotary table that the prompt needs; float32."""
        shape, chosen = self.shape("llama-125m"), []
        model = SPDModel.random(named_shape(shape), shape, Shards(), device=self.device).transformer
        prompt = torch.arange(250, device=self.device)[None]
        for kind in (Eager, Compiled):
            with torch.no_grad():
                engine, tokens = kind(model, prompt, 64), []
                for step in (engine.prefill, *[engine.decode] * 64):
                    step()
                    tokens.append(engine.token.item())
            chosen.append(tokens)
        return {"tokens": len(chosen[0]), "ok": chosen[0] == chosen[1]}

    def share(self) -> dict:
        """Rank 0's shard of 70B by itself, and what that predicts over a link."""
        plans = ("--drop", "none", "--drop", "all", "--alone", "--link", "300GBps,25us", "--compile")
        found = self.bench("--shape", self.shape("llama2-70b"), "--tp", 8, *plans)
        kept, dropped = (row["tpot_ms"] for row in found["predicted"])
        return {name: found[name] for name in ("share", "predicted", "gpu")} | {"ok": dropped < kept}

    def bench(self, *words) -> dict:
        return self.run("bench", *words, "--dtype", "bfloat16", "--new-tokens", 64, "--repeats", 5)


def difference(one, other) -> float:
    """The largest relative one of two numbers, or lists of them; inf where these are not equally long."""
    one, other = (value if isinstance(value, list) else [value] for value in (one, other))
    if len(one) != len(other):
        return float("inf")
    return max(abs(a - b) / max(abs(a), 1e-12) for a, b in zip(one, other, strict=True))


PARTS = ("parity", "decoding", "memory", "long_prompt", "share")


@command(
    option("--device", "cuda, or cpu to try it.", DEVICE, "cuda"),
    option("--parts", f"Of {', '.join(PARTS)}.", default=",".join(PARTS)),
)
def gpu_check(session) -> None:
    """What a GPU makes of this code, in ten minutes: parity, decoding, memory, a long prompt, a share of 70B."""
    o, started, found = session.options, time.monotonic(), {}
    with tempfile.TemporaryDirectory() as folder:
        check = Check(o.device, Path(folder), started + SECONDS)
        for name in o.parts.split(","):
            begun = time.monotonic()
            try:
                found[name] = getattr(check, name)()
            except SPDError as error:
                found[name] = {"ok": False, "error": str(error)}
            found[name]["seconds"] = time.monotonic() - begun
    session.publish({"parts": found, "ok": all(part["ok"] is not False for part in found.values())})


if __name__ == "__main__":
    main(gpu_check)
