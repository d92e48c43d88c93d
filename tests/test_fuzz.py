"""Mutated files of every kind that the command line reads: each ends as a result or as one sentence.

A seed draws a case: a file, a mutation of it, and so the command that reads it, in a process forked from this one.
`make fuzz N=10000` runs as many others (FUZZ=N, from FUZZ_FROM on) and says how many of each kind there were; a case
that ever failed stays in `KEPT`.
"""

import csv
import json
import os
import random
import resource
import shutil
import signal
import sys
import traceback
from collections import Counter, deque
from contextlib import chdir
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from conftest import random_model, with_tokenizer
from safetensors.torch import load_file, save_file

from spd.cli import main
from spd.launch import cores
from spd.machines import PROFILES
from spd.repairs import Repairs

ROOT = Path(__file__).parent.parent
LONGEST = 300  # characters of a message
SECONDS, MEMORY = 30, 8 * 2**30  # of a case, beyond which it hangs or bursts
WAIT = 120  # seconds of the clock: the machine may have other work to do
SUITE, PART = 240, 40  # cases in the test suite, and in one test
NUMBERS = (0, -1, 1, 2**31, -(2**63), 10**30, 1e308, -1e-308, 0.5, float("nan"), float("inf"))
OTHERS = (None, True, "x", "", "4", [], {}, [[]], {"a": []}, "\ud800", "../../elsewhere", "/etc/passwd", "x" * 5000)
WORDS = ("", "x", "0", "-1", "nan", "inf", "1e30", "9" * 400, "0.5", "-5%", "1,,2", "3-1", "0-99999999999", "\udcff")
WORDS += ("99999999999999999999", "../..", "/dev/zero", "all", "none", "t5 t6", "1GBps,nans", "é" * 400, "a\nb", "%s{}")


# ---------------------------------------------------------------- the files, as they should be

MODEL = ["--model", "model", "--tp", "2"]
TEXT = ["--text", "text.txt", "--seq-len", "8", "--windows", "4"]
EVAL, PLAN = ["eval", *MODEL, *TEXT], ["plan", "s.json", "--budget", "1"]
DISTILL = ["distill", *MODEL, *TEXT[:4], "--plan", "plan.json"]
SWEEP = ["sweep", "s.json", *MODEL, *TEXT, "--percentages", "0,50", "--repairs", "repairs"]
PREDICT = ["predict", "--shape", "llama2-7b"]
RECORDS = ("sensitivity", "sweep", "distill", "bench")
READERS = {  # file, or command whose words are exchanged -> what reads it
    "model/config.json": EVAL,
    "model/model.safetensors.index.json": EVAL,
    "model/model-0.safetensors": EVAL,
    "model/tokenizer.json": EVAL,
    "model/tokenizer_config.json": ["generate", *MODEL, "--prompt", "t5 t6", "--max-new-tokens", "2"],
    "plan.json": [*EVAL, "--plan", "plan.json"],
    "repaired/plan.json": [*EVAL, "--plan", "repaired"],
    "repaired/blocks/0.0.safetensors": [*EVAL, "--plan", "repaired"],
    "repaired/result.json": [*DISTILL, "--out", "repaired"],
    "stopped/progress.json": [*DISTILL, "--out", "stopped"],
    "stopped/blocks/0.0.safetensors": [*DISTILL, "--out", "stopped"],
    "repairs/points-*.json": SWEEP,
    "answer.json": [*PLAN, "--out", "answer.json"],
    "s.json": PLAN,
    "e.yaml": ["--experiment", "e.yaml", "eval", "--model", "model", "--text", "text.txt"],
    "piqa.jsonl": ["eval", *MODEL, "--tasks", "piqa", "--tasks-dir", "."],
    "text.txt": EVAL,
    "all_reduces.csv": ["profile", "all_reduces.csv"],
    "decoding.csv": ["profile", "decoding.csv"],
    "operators.csv": ["profile", "operators.csv"],
    "machine.json": [*PREDICT, "--machine", "machine.json", "--link", "fast"],
    "benches/0.json": ["profile", "benches"],
    **{f"records/{name}.json": ["report", f"records/{name}.json"] for name in RECORDS},
    "records/distill.json": ["report", "records"],  # alone it is nothing to draw
    "the words of eval": [*EVAL, "--skip", "1", "--drop", "1", "--bits", "8", "--group", "2"],
    "the words of plan": [*PLAN, "--tau1", "0.1", "--tau2", "1"],
    "the words of sweep": [*SWEEP, "--strategies", "zs", "--bits-plain", "4", "--tau1", "0.1"],
    "the words of distill": [*DISTILL, "--recipe", "closed-form", "--strategy", "zs"],
    "the words of generate": ["generate", *MODEL, "--prompt", "t5", "--max-new-tokens", "3", "--temperature", "0.5"],
    "the words of predict": [*PREDICT, "--tp", "8", "--percent", "70", "--link", "10GBps,20us", "--gpu", "h100"],
}
if find_spec("gguf"):
    READERS["small.gguf"] = ["eval", "--model", "small.gguf", "--text", "text.txt", "--seq-len", "8", "--windows", "2"]
FORGIVEN = ("answer.json", "result.json")  # an answer that is none is asked anew
NOT_NEEDED = ("tokenizer_config.json", "progress.json", *FORGIVEN)  # as if it had never been there


def call(*words) -> int:
    """The exit code of a command in this process."""
    sys.argv = ["spd", *map(str, words), "--no-mlflow"]
    try:
        main()
    except SystemExit as ended:
        return ended.code or 0


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A folder of sound files; what reads them is imported, so that processes forked from here need not."""
    folder = tmp_path_factory.mktemp("sound")
    shape = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2}
    model = with_tokenizer(folder / "model", random_model(folder / "model", vocab_size=32, **shape))
    (folder / "text.txt").write_text(" ".join(f"t{3 + i % 29}" for i in range(96)))
    rows = [{"goal": f"t{i}", "sol1": "t4 t5", "sol2": "t6", "label": i % 2} for i in range(3, 6)]
    (folder / "piqa.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (folder / "e.yaml").write_text("common: {tp: 2}\neval: {windows: 2, skip: 1, seq_len: 8}\n")
    if "small.gguf" in READERS:
        from test_gguf import write_gguf

        write_gguf(folder / "small.gguf", model)
    in_two_files(folder / "model")
    write_tables(folder)
    (folder / "records").mkdir()
    for command in RECORDS[1:]:
        shutil.copy(
            next(ROOT.glob(f"experiments/records/spd-tiny/*-{command}-*.json")), folder / f"records/{command}.json"
        )
    (folder / "benches").mkdir()
    for number, bench in enumerate(sorted(ROOT.glob("experiments/records/links/*-bench-*.json"))):
        shutil.copy(bench, folder / f"benches/{number}.json")
    with pytest.MonkeyPatch.context() as patch, chdir(folder):
        patch.setattr(sys, "argv", [])
        assert not call("sensitivity", *MODEL, *TEXT, "--out", "s.json")
        assert not call("plan", "s.json", "--budget", "100%", "--out", "plan.json")
        assert not call(*DISTILL, "--out", "repaired")
        assert not call(*SWEEP)
        assert not call("profile", "all_reduces.csv", "decoding.csv", "--out", "machine.json")
        assert not call(*PLAN, "--out", "answer.json")
        assert not call("report", "records")
        for file in ("piqa.jsonl", "model/tokenizer_config.json", "machine.json", "benches/0.json"):
            assert not call(*READERS[file]), file
        finish = Repairs.finish
        patch.setattr(Repairs, "finish", lambda *some: finish(*some) or sys.exit(130))  # after its first block
        assert call(*DISTILL, "--out", "stopped") == 130
        next(Path("runs").glob("*sensitivity*")).rename("records/sensitivity.json")
        shutil.rmtree("figures")
    return folder


def in_two_files(model: Path) -> None:
    """Weights with an index, as those of large models."""
    whole = model / "model.safetensors"
    tensors = load_file(whole)
    places = {name: f"model-{number % 2}.safetensors" for number, name in enumerate(tensors)}
    for file in set(places.values()):
        save_file({n: t for n, t in tensors.items() if places[n] == file}, model / file)
    whole.unlink()
    (model / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))


def write_tables(folder: Path) -> None:
    """What other programs measured: all-reduces, decoding, operators."""
    sizes = [(n, size, 20 + n + size / 1e5) for n in (2, 4, 8) for size in (10**3, 10**5, 10**6, 10**7)]
    decoding = [
        ("llama2-7b", tp, link, batch, 128, 64, syncs, batch * tp * (30 - 5 * syncs))
        for tp in (2, 4)
        for link in ("fast", "slow")
        for batch in (1, 4)
        for syncs in (0, 2)
    ]
    with (PROFILES / "layer_ops_a100.csv").open(newline="") as file:
        operators = [row for row in csv.reader(file) if row[1] in ("model", "Llama-2-7b-hf")]
    columns = ("model", "tp", "link", "batch", "prompt_len", "new_tokens", "syncs_per_block", "tokens_per_s")
    tables = {
        "all_reduces.csv": [("devices", "bytes", "us"), *sizes],
        "decoding.csv": [columns, *decoding],
        "operators.csv": operators,
    }
    for name, rows in tables.items():
        with (folder / name).open("w", newline="") as file:
            csv.writer(file).writerows(rows)


# ---------------------------------------------------------------- mutations: True where what comes out is invalid


def nothing(*_) -> bool:
    return False


def bits(path: Path, dice: random.Random) -> bool:
    content = bytearray(path.read_bytes())
    for _ in range(dice.choice((1, 1, 8))):
        content[dice.randrange(len(content))] ^= 1 << dice.randrange(8)
    path.write_bytes(content)
    return False


def cut(path: Path, dice: random.Random) -> bool:
    content = path.read_bytes().rstrip()
    path.write_bytes(content[: dice.randrange(1, len(content) - 1)])
    return path.suffix in (".json", ".safetensors") and path.name not in FORGIVEN


def noise(path: Path, dice: random.Random) -> bool:
    path.write_bytes(b"\xff" + dice.randbytes(dice.choice((1, 100, 10_000))))
    return path.name not in FORGIVEN


def not_an_object(path: Path, dice: random.Random) -> bool:
    text = dice.choice(['"abcde"', "[]", "3", "null", "[" * 100_000, '{"a":' * 50_000])
    path.write_bytes(text.encode(dice.choice(("utf-8", "utf-16"))))
    return path.name not in FORGIVEN


def not_a_file(path: Path, dice: random.Random) -> bool:
    path.unlink()
    kinds = [path.mkdir, lambda: path.symlink_to(path), lambda: None]
    if path.name not in FORGIVEN:  # a pipe may be written to, and waits for its reader
        kinds += [lambda: os.mkfifo(path)]
    dice.choice(kinds)()
    return path.name not in NOT_NEEDED and path.parent.name != "repairs"


def numbers(path: Path, dice: random.Random) -> bool:
    """Weights that are not finite, or of integers."""
    tensors = load_file(path)
    name = dice.choice(sorted(tensors))
    if dice.random() < 0.5:
        tensors[name].view(-1)[dice.randrange(tensors[name].numel())] = dice.choice((torch.nan, torch.inf, -torch.inf))
    else:
        tensors[name] = tensors[name].to(dice.choice((torch.int32, torch.uint8, torch.bool)))
    save_file(tensors, path)
    return True


def document(path: Path, dice: random.Random) -> bool:
    """Some value of a JSON document exchanged, dropped, or buried."""
    text = path.read_text()
    found = [json.loads(line) for line in text.split("\n")] if path.suffix == ".jsonl" else json.loads(text)
    place, key = found, None
    while isinstance(place, dict | list) and place and (key is None or dice.random() < 0.7):
        above, key = place, dice.choice(list(place) if isinstance(place, dict) else range(len(place)))
        place = above[key]
    change = dice.randrange(4)
    if change == 0:
        del above[key]
    else:
        value = dice.choice((NUMBERS, OTHERS)[change % 2])
        above[key] = [[[[value]]]] if change == 3 else value
    lines = found if path.suffix == ".jsonl" else [found]
    path.write_text("\n".join(map(json.dumps, lines)))
    return False


def elsewhere(path: Path, dice: random.Random) -> bool:
    """An index or plan that names a file outside of its folder."""
    found, outside = json.loads(path.read_text()), Path("elsewhere.safetensors")
    inner = path.with_name("model-0.safetensors") if "weight_map" in found else path.parent / "blocks/0.0.safetensors"
    inner.rename(outside)
    names = [f"../{outside}", str(outside.resolve()), inner.relative_to(path.parent).as_posix()]
    name = dice.choice(names)
    if name == names[2]:
        inner.symlink_to(outside.resolve())
    elif "weight_map" in found:
        found["weight_map"] = {k: name if v == inner.name else v for k, v in found["weight_map"].items()}
    else:
        found["changed"] = [name]
    path.write_text(json.dumps(found))
    return True


def strange_text(path: Path, dice: random.Random) -> bool:
    """Not text, or not enough of it; or unusual and sound."""
    text = path.read_text()
    bad = [b"", b" \n\t ", text.encode("utf-16"), b"t5 \xed\xa0\x80 t6", text.encode("utf-32")]
    good = [
        text.encode("utf-8-sig"),
        text.replace(" ", "\r\n").encode(),
        b"\0".join([text.encode()] * 3),
        b"t5 " * 10**5,
    ]
    chosen = dice.choice(bad + good)
    path.write_bytes(chosen)
    return chosen in bad


def cells(path: Path, dice: random.Random) -> bool:
    """A table with a cell exchanged, a row or column dropped, or rows in excess."""
    with path.open(newline="") as file:
        rows = list(csv.reader(file))
    row, column = dice.randrange(dice.choice((1, len(rows)))), dice.randrange(len(rows[0]))
    change = dice.randrange(5)
    if change == 0:
        del rows[row]
    elif change == 1:
        rows = [[*some[:column], *some[column + 1 :]] for some in rows]
    elif change == 2:
        rows[row:row] = [dice.choice(rows)] * dice.choice((1, 1000))
    else:
        rows[row][column] = str(dice.choice((NUMBERS, OTHERS, WORDS)[dice.randrange(3)])).replace("\ud800", "\n")
    with path.open("w", newline="", errors="replace") as file:
        csv.writer(file).writerows(rows)
    return False


def header(path: Path, dice: random.Random) -> bool:
    """Bytes of the first kilobyte, where counts, lengths, types and names lie, exchanged for others."""
    content = bytearray(path.read_bytes())
    for _ in range(dice.choice((1, 1, 4))):
        content[dice.randrange(1024)] = dice.choice((0, 1, 0x7F, 0x80, 0xFF, dice.randrange(256)))
    path.write_bytes(content)
    return False


def exchange(words: list[str], dice: random.Random) -> bool:
    """A word of a command exchanged, dropped or said twice."""
    place = dice.randrange(1, len(words))
    change = dice.randrange(6)
    if change == 0:
        del words[place]
    elif change == 1:
        words.insert(place, dice.choice(words))
    else:
        words[place] = dice.choice(WORDS)
    return False


def mutations(file: str) -> list:
    if file.startswith("the words"):
        return [exchange]
    found = [bits, cut, noise, not_a_file]
    if file.endswith(".safetensors"):
        found += [numbers, numbers]
    if file.endswith(".gguf"):
        found += [header, header, header]
    if file.endswith(".txt"):
        found += [strange_text, strange_text]
    if file.endswith(".csv"):
        found += [cells, cells, cells]
    if file.endswith((".json", ".jsonl")):
        found += [not_an_object, document, document, document, document]
    if file in ("model/model.safetensors.index.json", "repaired/plan.json"):
        found += [elsewhere, elsewhere]
    return found


# ---------------------------------------------------------------- cases


class Case(NamedTuple):
    """What is mutated, and how; the seed throws the dice."""

    file: str
    mutation: str
    seed: int

    @classmethod
    def drawn(cls, seed: int) -> "Case":
        dice = random.Random(seed)
        file = dice.choice(sorted(READERS))
        return cls(file, dice.choice(mutations(file)).__name__, seed)

    @property
    def kind(self) -> str:
        return f"{self.mutation} of {self.file}"


KEPT = (  # failures that were found and mended
    Case("model/tokenizer_config.json", "document", 110),
    Case("model/tokenizer_config.json", "document", 306),
    Case("model/model.safetensors.index.json", "document", 530),
    Case("piqa.jsonl", "document", 5),
    Case("records/sensitivity.json", "document", 297),
    Case("records/sensitivity.json", "document", 1815),
    Case("answer.json", "not_a_file", 5000554),
    Case("the words of distill", "exchange", 7000225),
    Case("repaired/result.json", "document", 20000144),
    Case("benches/0.json", "bits", 20000236),
)


class Process:
    """A command that reads a mutated file, in a process forked from this one, in a copy of the sound files."""

    def __init__(self, case: Case, base: Path, folder: Path):
        self.case, self.folder, self.records = case, folder, set((base / "runs").iterdir())
        self.words = list(READERS[case.file])
        shutil.copytree(base, folder)
        with chdir(folder):
            self.invalid = self.mutate()
        self.id = os.fork()
        if not self.id:
            self.work()

    def mutate(self) -> bool:
        mutation, dice = globals()[self.case.mutation], random.Random(self.case.seed)
        if mutation in (nothing, exchange):
            return mutation(self.words, dice)
        return mutation(next(Path().glob(self.case.file)), dice)

    def work(self) -> None:
        code = 99
        try:
            os.chdir(self.folder)
            for stream in (1, 2):
                os.dup2(os.open("said", os.O_CREAT | os.O_WRONLY | os.O_APPEND), stream)
            sys.stdout = open(1, "w", errors="surrogateescape")  # noqa: SIM115  (open until the end)
            sys.stderr = open(2, "w", errors="backslashreplace")  # noqa: SIM115
            os.environ |= {"XDG_CACHE_HOME": "cache", "TOKENIZERS_PARALLELISM": "false", "TMPDIR": str(self.folder)}
            signal.signal(signal.SIGALRM, signal.SIG_DFL)  # it ends the process, whatever that does
            signal.alarm(WAIT)
            resource.setrlimit(resource.RLIMIT_CPU, (SECONDS, SECONDS))
            resource.setrlimit(resource.RLIMIT_DATA, (MEMORY, MEMORY))
            code = call(*self.words, *([] if "--out" in READERS[self.case.file] else ["--out", "out"]))
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)

    def failure(self) -> str | None:
        """What is wrong with how it ended; None: nothing."""
        code = self.code = os.waitstatus_to_exitcode(os.waitpid(self.id, 0)[1])
        text = (self.folder / "said").read_text(errors="replace")
        said = text.strip().splitlines()[-1:] or [""]
        if code not in (0, 1, 2) or "Traceback" in text:
            return "it hangs" if code in (-signal.SIGALRM, -signal.SIGXCPU) else f"exit {code}: {said[0][:500]}"
        if code == 0 and self.invalid:
            return "exit 0 of what is invalid"
        if code and not 0 < len(said[0]) <= LONGEST:
            return f"a message of {len(said[0])} characters"
        new = {file.name for file in self.folder.glob("runs/*.json")} - {file.name for file in self.records}
        if list(self.folder.rglob("*.partial")) or (code and (new or (self.folder / "out").is_file())):
            return "something half-written"
        return None


@pytest.mark.parametrize("file", READERS)
def test_sound_files_are_read(file, base, tmp_path):
    process = Process(Case(file, "nothing", 0), base, tmp_path / "sound")
    assert process.failure() is None and process.code == 0, (tmp_path / "sound" / "said").read_text()


@pytest.fixture(scope="module")
def tally():
    """How many cases of each kind there were, and failed; shown where more than the suite's were asked for."""
    counts = Counter()
    yield counts
    if "FUZZ" in os.environ:
        print(*(f"\n{count:6} {kind}" for kind, count in sorted(counts.items())))


@pytest.mark.parametrize("part", range(int(os.environ.get("FUZZ", SUITE)) // PART + 1))
def test_mutated_files_end_as_a_result_or_a_sentence(part, base, tally, tmp_path):
    start = int(os.environ.get("FUZZ_FROM", 0)) + PART * (part - 1)
    waiting = deque(map(Case.drawn, range(start, start + PART)) if part else KEPT)
    running, wrong = deque(), []
    while waiting or running:
        while waiting and len(running) < cores():
            case = waiting.popleft()
            running.append(Process(case, base, tmp_path / str(len(waiting))))
        ended = running.popleft()
        reason, kind = ended.failure(), ended.case.kind
        tally[kind] += 1
        if reason:
            wrong.append(f"{ended.case}: {reason}")
            print(wrong[-1])
            tally[f"{kind}: FAILED"] += 1
        shutil.rmtree(ended.folder)
    assert not wrong, "\n".join(wrong)
