"""The numbers of every command, frozen in golden.json, so that a refactor can show that it moved none of them.

`GOLDEN=exact pytest tests/test_golden.py` compares digit for digit, on the machine that wrote the file; without it
floats may differ by rounding. `GOLDEN=write` writes the file anew. A result may gain keys, and lose none.
"""

import io
import json
import os
import re
import shlex
import sys
from contextlib import redirect_stdout
from pathlib import Path

import pytest
from budget import budget
from predict_paper import predict
from table1 import table1

from spd.cli import main

FILE, MODE = Path(__file__).with_name("golden.json"), os.environ.get("GOLDEN", "")
RTOL, ATOL = 1e-4, 1e-5  # the latter for sensitivities, which are differences

TINY = "--model spd-tiny --tp 8 --text builtin --seq-len 64 --windows 8"
FEW = "--model spd-tiny --tp 4 --text builtin --seq-len 64 --windows 24"
STORIES = "--model SHARED/models/stories260K --tp 4"
TALES = "--tp 4 --text SHARED/text/tinystories_v1_train_head.txt --seq-len 64"
HEAD = f"--model SHARED/models/stories260K {TALES}"
CLASSES, SHORT = "--tau1 0.1 --tau2 1.0", "--epochs 1 --joint-epochs 1 --generated 4"

# name -> command; {name} is the file or folder that another case gives (--out), which is run first.
CASES = {
    "eval": f"eval {TINY}",
    "eval-tp2": "eval --model spd-tiny --tp 2 --text builtin-train --seq-len 48 --windows 4 --skip 3 --drop 1,4-6",
    "eval-attention": f"eval {TINY} --drop 0,2,5-7",
    "eval-mlp": f"eval {TINY} --drop all --drop-mlp 1,3",
    "eval-bfloat16": f"eval {TINY} --drop all --dtype bfloat16",
    "eval-last-word": "eval --model spd-tiny --tp 8 --tasks tiny_last_word --limit 20 --drop 1,6 --compare",
    "sensitivity": f"sensitivity {TINY}",
    "sensitivity-tp4": f"sensitivity {FEW}",
    "plan": f"plan {{sensitivity}} --budget 70% {CLASSES}",
    "plan-blocks": "plan {sensitivity-tp4} --budget 5 --tau1 0.064 --tau2 0.09",
    "eval-plan": f"eval {TINY} --plan {{plan}} --skip 8",
    "zs": f"distill {FEW} --plan {{plan-blocks}} --recipe zs",
    "closed-form": f"distill {FEW} --plan {{plan-blocks}} --recipe closed-form",
    "paper": f"distill {FEW} --plan {{plan-blocks}} --recipe paper --epochs 1 --learning-rate 1e-3",
    "paper-b2b": f"distill {FEW} --plan {{plan-blocks}} --recipe paper --strategy b2b --epochs 1 --optimizer adamw",
    "best": f"distill {FEW} --drop 1,5 --recipe best {SHORT}",
    "eval-closed-form": f"eval {FEW} --skip 24 --plan {{closed-form}}",
    "eval-paper": f"eval {FEW} --skip 24 --plan {{paper}}",
    "eval-best": f"eval {FEW} --skip 24 --plan {{best}}",
    "sweep": f"sweep {{sensitivity-tp4}} {FEW} --skip 24 --percentages 0,50,100 --calibration 24 --repairs repairs "
    f"--strategies zs,b2b,b2b+hg,closed-form,best {CLASSES} {SHORT} --learning-rate 1e-3",
    "sweep-tasks": f"sweep {{sensitivity}} {TINY} --percentages 0,100 --tasks tiny_last_word --limit 10",
    "generate": "generate --model spd-tiny --tp 8 --prompt 'def main(' --max-new-tokens 12 --drop 5-7",
    "generate-sampled": "generate --model spd-tiny --tp 4 --prompt import --prompt 'The name of' --max-new-tokens 8 "
    "--temperature 0.8 --top-k 20 --top-p 0.9 --plan {best} --seed 3",
    "export": "export --model spd-tiny --plan {closed-form}",
    "export-eval": f"eval {FEW} --skip 24 --plan {{export}}/plan.json".replace("spd-tiny", "{export}"),
    "table1": f"table1 {TINY}",
    "predict": "predict --shape llama2-70b --percent 0,50,70,100",
    "predict-link": "predict --shape llama2-7b --gpu h200 --tp 4 --nodes 2 --link 25GBps,10us --batch 4 --launch-us 3",
    "predict-paper": "predict-paper",
    "budget": "budget",
    "bench": "bench --model spd-tiny --tp 2 --drop none --drop 0,2 --drop all --prompt-len 8 --new-tokens 2 "
    "--repeats 2 --link 10GBps,20us",
    "bench-shape": "bench --shape llama-8m --percentages 0,50 --batch 2 --prompt-len 4 --new-tokens 0 --repeats 1",
    "profile": "profile {bench-records}",
    "report": "report {sensitivity-records} {sweep-records} {bench-records}",
    "stories-eval": f"eval {HEAD} --windows 8 --drop 1,3 --drop-mlp 4",
    "stories-tasks": f"eval {STORIES} --tasks piqa,lambada_openai --tasks-dir SHARED/tasks --limit 8 --drop 2",
    "stories-sensitivity": f"sensitivity {HEAD} --windows 8",
    "stories-plan": f"plan {{stories-sensitivity}} --budget 60% {CLASSES}",
    "stories-closed-form": f"distill {HEAD} --windows 32 --plan {{stories-plan}} --recipe closed-form",
    "stories-paper": f"distill {HEAD} --windows 16 --plan {{stories-plan}} --recipe paper --epochs 1",
    "stories-best": f"distill {HEAD} --windows 16 --plan {{stories-plan}} --recipe best {SHORT}",
    "stories-export": "export --model SHARED/models/stories260K --plan {stories-closed-form}",
    "stories-export-eval": f"eval --model {{stories-export}} {TALES} --windows 8 --plan {{stories-export}}/plan.json",
    "stories-generate": f"generate {STORIES} --prompt 'Once upon a time' --max-new-tokens 16 --drop 2",
}
SCRIPTS = {"table1": table1, "predict-paper": predict, "budget": budget}
# Of commands that measure times: what is no time. Of the paper's prediction, which has thousands: every tenth row.
KEPT = {"bench": r"(plan|blocks_dropped|communicates|count|bytes|blocks|parameters|tp|link)$", "profile": "^$",
        "report": "^$", "predict-paper": r"^(?!(heat_map\.speedup\.\w+|figure7)\.\d*[1-9]\.)"}  # fmt: skip
LEFT_OUT = r"^seconds$|^hardware|^versions|\bsaved\b"  # `saved` is there where a time was positive


@pytest.fixture(scope="session")
def result(request, tmp_path_factory):
    """The document that a case prints, each run once in one folder, and those before it that it reads."""
    folder, found = tmp_path_factory.mktemp("golden"), {}

    def get(name: str) -> dict:
        if name not in found:
            words = re.sub(r"\{([\w-]+?)(-records)?\}", lambda m: get(m[1]) and m[1] + (m[2] or ""), CASES[name])
            if "SHARED" in words:
                words = words.replace("SHARED", str(request.getfixturevalue("shared")))
            found[name] = run(f"{words} --out {name} --records {name}-records --no-mlflow")
            (record,) = Path(f"{name}-records").glob("*.json")
            assert json.loads(record.read_text())["result"] == found[name]
        return found[name]

    def run(words: str) -> dict:
        script = SCRIPTS.get(words.split()[0])
        patch.setattr(sys, "argv", ["spd", *shlex.split(words)[script is not None :]])
        with redirect_stdout(io.StringIO()) as printed, pytest.raises(SystemExit) as ended:
            main(script)
        assert not ended.value.code, f"{words}: {ended.value.code}"
        return json.loads(printed.getvalue().splitlines()[-1])

    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        yield get


def leaves(value, place: str = ""):
    """(place, number or text) of everything in a document that is no path."""
    if isinstance(value, dict | list):
        for key, part in value.items() if isinstance(value, dict) else enumerate(value):
            yield from leaves(part, f"{place}.{key}".lstrip("."))
    elif not (isinstance(value, str) and "/" in value) and not re.search(LEFT_OUT, place):
        yield place, value


def keys_of(value, place: str = "") -> set[str]:
    """Keys of a document and of its rows, a row's number as *."""
    parts = value.items() if isinstance(value, dict) else (("*", part) for part in value if isinstance(part, dict))
    parts = [(key.replace(" ", "_"), part) for key, part in parts if not re.search(LEFT_OUT, key)]
    named = [(f"{place}.{key}".lstrip("."), part) for key, part in parts]
    below = [keys_of(part, name) for name, part in named if isinstance(part, dict | list)]
    return {name for name, _ in named if not name.endswith("*")}.union(*below)


@pytest.mark.parametrize("name", CASES)
def test_numbers_and_keys_stay(result, name):
    document, kept = result(name), KEPT.get(CASES[name].split()[0], "")
    found = {place: value for place, value in leaves(document) if re.search(kept, place)}
    golden = json.loads(FILE.read_text()) if FILE.exists() else {}
    if MODE == "write":
        golden[name] = {"keys": " ".join(sorted(keys_of(document))), "values": found}
        FILE.write_text(json.dumps({n: golden[n] for n in CASES if n in golden}, indent=1) + "\n")
    assert set(golden[name]["keys"].split()) <= keys_of(document)
    for place, value in golden[name]["values"].items():
        if isinstance(value, float) and MODE != "exact":
            rel, atol = 1e-2 if "bfloat16" in name else RTOL, ATOL if "sensitivity" in place else 0
            assert found[place] == pytest.approx(value, rel=rel, abs=atol), place
        elif not place.endswith("fingerprint") or "export" not in name or MODE == "exact":  # that of repaired weights
            assert (place, found[place]) == (place, value)


def test_a_report_has_its_tables_and_figures(result):
    names = {Path(file).name for file in result("report")["files"]}
    assert "tables.md" in names and any(name.endswith(".png") for name in names)
