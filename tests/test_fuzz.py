"""Mutated files of every kind that the command line reads: each ends as a result or as one sentence.

A case is a seed: it chooses a file, a mutation of it and the command that reads it. `make fuzz N=10000` runs as many
others (FUZZ=N, from FUZZ_FROM on) and says how many of each kind there were; a seed that ever failed stays in `KEPT`.
"""

import json
import os
import random
import shutil
import signal
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch
from conftest import random_model, with_tokenizer
from safetensors.torch import load_file, save_file

from spd.cli import main

LONGEST = 300  # characters of a message
SECONDS = 30  # of a case, beyond which it hangs
SUITE, PART = 240, 40  # cases in the test suite, and in one test
KEPT = (76, 92, 221, 223, 1079, 1094)  # seeds of failures that were found and mended
NUMBERS = (0, -1, 1, 2**31, -(2**63), 10**30, 1e308, -1e-308, 0.5, float("nan"), float("inf"))
OTHERS = (None, True, "x", "", "4", [], {}, [[]], {"a": []}, "\ud800", "../../elsewhere", "/etc/passwd", "x" * 5000)


# ---------------------------------------------------------------- the files, as they should be


def run(words: list, capsys, monkeypatch) -> tuple[int, str]:
    """(exit code, stderr) of a command in this process."""
    monkeypatch.setattr(sys, "argv", ["spd", *map(str, words), "--no-mlflow"])
    with pytest.raises(SystemExit) as ended:
        main()
    return ended.value.code or 0, capsys.readouterr().err


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A folder of sound files: a model in two weight files, text, rows, sensitivities, plan, repair, record."""
    folder = tmp_path_factory.mktemp("sound")
    shape = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2}
    with_tokenizer(folder / "model", random_model(folder / "model", vocab_size=32, **shape))
    whole = folder / "model" / "model.safetensors"
    tensors = load_file(whole)
    places = {name: f"model-{number % 2}.safetensors" for number, name in enumerate(tensors)}
    for file in set(places.values()):
        save_file({n: t for n, t in tensors.items() if places[n] == file}, folder / "model" / file)
    whole.unlink()
    (folder / "model" / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    (folder / "text.txt").write_text(" ".join(f"t{3 + i % 29}" for i in range(96)))
    rows = [{"goal": f"t{i}", "sol1": "t4 t5", "sol2": "t6", "label": i % 2} for i in range(3, 6)]
    (folder / "piqa.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (folder / "e.yaml").write_text("common: {tp: 2}\neval: {windows: 2, skip: 1, seq_len: 8}\n")
    patch, here = pytest.MonkeyPatch(), Path.cwd()
    os.chdir(folder)
    try:
        for words in (
            ["sensitivity", *MODEL, "--out", "s.json", "--records", "records"],
            ["plan", "s.json", "--budget", "1", "--out", "plan.json"],
        ):
            patch.setattr(sys, "argv", ["spd", *words, "--no-mlflow"])
            with pytest.raises(SystemExit) as ended:
                main()
            assert not ended.value.code, words
    finally:
        os.chdir(here)
        patch.undo()
    (record,) = (folder / "records").iterdir()
    record.rename(folder / "record.json")
    (folder / "repaired" / "blocks").mkdir(parents=True)
    plan = json.loads((folder / "plan.json").read_text()) | {"changed": ["blocks/0.0.safetensors"]}
    (folder / "repaired" / "plan.json").write_text(json.dumps(plan))
    tensors = {"blocks.0.attention.out.weight": torch.randn(2, 8, 4)}
    save_file(tensors, folder / "repaired" / "blocks" / "0.0.safetensors")
    shutil.rmtree(folder / "runs")
    return folder


MODEL = ["--model", "model", "--tp", "2", "--text", "text.txt", "--seq-len", "8", "--windows", "4"]
READERS = {  # file -> the command that reads it
    "model/config.json": ["eval", *MODEL],
    "model/model.safetensors.index.json": ["eval", *MODEL],
    "model/model-0.safetensors": ["eval", *MODEL],
    "model/tokenizer.json": ["eval", *MODEL],
    "model/tokenizer_config.json": ["generate", "--model", "model", "--prompt", "t5 t6", "--max-new-tokens", "2"],
    "plan.json": ["eval", *MODEL, "--plan", "plan.json"],
    "repaired/plan.json": ["eval", *MODEL, "--plan", "repaired"],
    "repaired/blocks/0.0.safetensors": ["eval", *MODEL, "--plan", "repaired"],
    "s.json": ["plan", "s.json", "--budget", "1"],
    "e.yaml": ["--experiment", "e.yaml", "eval", "--model", "model", "--text", "text.txt"],
    "piqa.jsonl": ["eval", "--model", "model", "--tp", "2", "--tasks", "piqa", "--tasks-dir", "."],
    "record.json": ["report", "record.json"],
    "text.txt": ["eval", *MODEL],
}


# ---------------------------------------------------------------- mutations: True where what comes out is invalid


def bits(path: Path, dice: random.Random) -> bool:
    content = bytearray(path.read_bytes())
    for _ in range(dice.choice((1, 1, 8))):
        content[dice.randrange(len(content))] ^= 1 << dice.randrange(8)
    path.write_bytes(content)
    return False


def cut(path: Path, dice: random.Random) -> bool:
    content = path.read_bytes().rstrip()
    path.write_bytes(content[: dice.randrange(1, len(content) - 1)])
    return path.suffix in (".json", ".safetensors")


def noise(path: Path, dice: random.Random) -> bool:
    path.write_bytes(b"\xff" + dice.randbytes(dice.choice((1, 100, 10_000))))
    return True


def not_an_object(path: Path, dice: random.Random) -> bool:
    text = dice.choice(['"abcde"', "[]", "3", "null", "[" * 100_000, '{"a":' * 50_000])
    path.write_bytes(text.encode(dice.choice(("utf-8", "utf-16"))))
    return path.suffix != ".txt" and path.suffix != ".yaml"


def not_a_file(path: Path, dice: random.Random) -> bool:
    path.unlink()
    kind = dice.choice((path.mkdir, lambda: os.mkfifo(path), lambda: path.symlink_to(path), lambda: None))
    kind()
    return path.name != "tokenizer_config.json"


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


def mutations(file: str) -> list:
    found = [bits, cut, noise, not_a_file]
    if file.endswith(".safetensors"):
        found += [numbers, numbers]
    if file.endswith((".json", ".jsonl")):
        found += [not_an_object, document, document, document, document]
    if file in ("model/model.safetensors.index.json", "repaired/plan.json"):
        found += [elsewhere, elsewhere]
    return found


# ---------------------------------------------------------------- cases


def hang(*_):
    raise TimeoutError(f"it hangs for more than {SECONDS} s")


def failure(seed: int, base: Path, folder: Path, capsys, monkeypatch) -> tuple[str, str | None]:
    """The kind of a case, and what is wrong with how it ended; None: nothing."""
    dice = random.Random(seed)
    shutil.copytree(base, folder)
    monkeypatch.chdir(folder)
    file = dice.choice(sorted(READERS))
    mutation = dice.choice(mutations(file))
    invalid, kind = mutation(Path(file), dice), f"{mutation.__name__} of {file}"
    signal.signal(signal.SIGALRM, hang)
    signal.alarm(SECONDS)
    try:
        code, err = run([*READERS[file], "--out", "out"], capsys, monkeypatch)
    except Exception as error:  # what `main` does not catch
        return kind, f"{type(error).__name__}: {error}"
    finally:
        signal.alarm(0)
    said = err.strip().splitlines()[-1:] or [""]
    if code not in (0, 1, 2) or "Traceback" in err:
        return kind, f"exit {code}: {said[0]}"
    if code == 0 and invalid:
        return kind, "exit 0 of what is invalid"
    if code and not 0 < len(said[0]) <= LONGEST:
        return kind, f"a message of {len(said[0])} characters"
    if list(folder.rglob("*.partial")) or (code and (list(folder.glob("runs/*.json")) or Path("out").is_file())):
        return kind, "something half-written"
    return kind, None


def test_sound_files_are_read(base, tmp_path, capsys, monkeypatch):
    for number, words in enumerate(READERS.values()):
        shutil.copytree(base, tmp_path / str(number))
        monkeypatch.chdir(tmp_path / str(number))
        code, err = run([*words, "--out", "out"], capsys, monkeypatch)
        assert code == 0, (words, err)


@pytest.fixture(scope="module")
def tally():
    """How many cases of each kind there were, and failed; shown where more than the suite's were asked for."""
    counts = Counter()
    yield counts
    if "FUZZ" in os.environ:
        print(*(f"\n{count:6} {kind}" for kind, count in sorted(counts.items())))


@pytest.mark.parametrize("part", range(int(os.environ.get("FUZZ", SUITE)) // PART + 1))
def test_mutated_files_end_as_a_result_or_a_sentence(part, base, tally, tmp_path, capsys, monkeypatch):
    start = int(os.environ.get("FUZZ_FROM", 0)) + PART * (part - 1)
    wrong = []
    for seed in range(start, start + PART) if part else KEPT:
        kind, reason = failure(seed, base, tmp_path / str(seed), capsys, monkeypatch)
        tally[kind] += 1
        if reason:
            wrong.append(f"seed {seed}, {kind}: {reason}")
            tally[f"{kind}: FAILED"] += 1
        monkeypatch.chdir(tmp_path)
        shutil.rmtree(tmp_path / str(seed))
    assert not wrong, "\n".join(wrong)
