"""The command line: documented keys, and one sentence for every mistake."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import mlflow
import pytest
import yaml
from conftest import random_model, with_tokenizer

from spd import records
from spd.options import COMMANDS


@pytest.fixture
def common(plain, text_of_words):
    return ["--model", plain, "--tp", 4, "--text", text_of_words, "--seq-len", 16]


def measured(spd, common, out="s.json"):
    code, result, err = spd("sensitivity", *common, "--windows", 8, "--out", out)
    assert code == 0, err
    return result


def test_every_command_takes_bits_and_groups(spd, common, tmp_path):
    model = common[:4]

    def plan_and_share(*options):
        code, result, err = spd("eval", *common, "--windows", 2, *options)
        assert code == 0, err
        return result["plan"], result.get("group"), result["bytes_share"]

    packed = 4 * (4 + 2)  # 4 slices of 8 values: 4 bytes of codes at 4 bits, 2 of a scale; against 64 bytes in 16 bits
    assert plan_and_share() == ("FF FF FF", None, 1.0)
    assert plan_and_share("--bits", 4) == ("44 44 4F", None, (5 * packed + 64) / (6 * 64))
    assert plan_and_share("--drop", "1", "--bits-plain", 3, "--group", 2)[:2] == ("tt Gt tF", 2)
    code, _, err = spd("sensitivity", *common, "--windows", 4, "--out", "s.json")
    assert code == 0, err
    swept = ["--skip", 4, "--windows", 2, "--percentages", "0,34", "--bits", 4, "--group", 2]
    code, result, err = spd("sweep", "s.json", *common, *swept)
    assert code == 0 and [row["plan"].count("G") for row in result["curve"]] == [0, 1], err
    assert result["curve"][0]["plan"] == "44 44 4F"
    code, result, err = spd(
        "generate", *model, "--prompt", "t5 t6", "--max-new-tokens", 2, "--drop", "all", "--group", 4
    )
    assert code == 0 and (result["plan"], result["group"]) == ("GF GF GF", 4), err
    repair = ["distill", *common, "--windows", 10, "--drop", "1", "--bits", 4, "--out", "repair"]
    code, result, err = spd(*repair)
    assert code == 0 and result["plan"] == "44 D4 4F", err
    assert [block["treatment"] for block in result["blocks"]] == ["keep", "closed form, drop", "keep"]
    assert plan_and_share("--plan", "repair")[0] == "44 D4 4F"
    code, _, err = spd("export", "--model", common[1], "--plan", "repair", "--out", "whole")
    assert code == 1 and "vLLM cannot serve a plan with 44, 4F, D4 in it" in err
    grouped = tmp_path / "grouped.json"
    document = json.loads((tmp_path / "repair/plan.json").read_text()) | {"changed": [], "group": 2}
    grouped.write_text(json.dumps(document | {"policies": [["group", "full"]] * 3}))
    assert plan_and_share("--plan", grouped)[:2] == ("GF GF GF", 2)
    grouped.write_text(json.dumps(document | {"policies": [["group", "full"]] * 3, "group": 3}))
    for options, message in (
        (("--bits", 5), "Unknown number of bits '5'; known: 8, 4, 3, 2"),
        (("--bits", 4, "--bits-plain", 4), "either kept (--bits) or lost (--bits-plain)"),
        (("--drop", "all", "--group", 3), "tp=4 shards cannot be divided into groups of 3"),
        (("--plan", "repair", "--bits", 4), "--plan already says what every sync point does; leave out --drop, "),
        (("--plan", grouped), "tp=4 shards cannot be divided into groups of 3"),
    ):
        code, _, err = spd("eval", *common, "--windows", 2, *options)
        assert code not in (0, 70) and message in err


def test_scores_rank_blocks_without_classes(spd, common, tmp_path):
    code, result, err = spd(
        "sensitivity", *common, "--windows", 4, "--fast", "--policies", "drop,int4", "--out", "s.json"
    )
    assert code == 0 and result["windows"] == 4 and set(result["scores"]) == {"attention", "mlp"}, err
    dropping = result["losses"]["attention"]["drop"]
    assert len(dropping) == len(result["scores"]["mlp"]["int4"]) == 3 and "sensitivity" not in result
    code, plan, err = spd("plan", "s.json", "--budget", 2, "--out", "plan.json")
    assert code == 0 and plan["classes"] == [None] * 3 and sorted(plan["treatments"]) == ["drop", "drop", "keep"], err
    assert [policies[0] for policies in plan["policies"]].index("full") == dropping.index(max(dropping))
    code, swept, err = spd("sweep", "s.json", *common, "--skip", 4, "--windows", 2, "--percentages", "67")
    assert code == 0 and swept["curve"][0]["plan"] == plan["plan"], err
    for options, message in (
        (["sweep", "s.json", *common, "--strategies", "b2b"], "Scores give no classes"),
        (["sensitivity", *common, "--fast", "--policies", "mail"], "Unknown policy 'mail'"),
    ):
        code, _, err = spd(*options)
        assert code not in (0, 70) and message in err
    code, _, err = spd("sensitivity", *common, "--windows", 4, "--fast", "--policies", "int4", "--out", "n.json")
    code, _, err = spd("plan", "n.json")
    assert code and "neither sensitivities nor scores of dropping attention syncs" in err


def test_bench_takes_bits_and_groups(spd):
    sizes = ["--prompt-len", 8, "--new-tokens", 1, "--repeats", 1]
    asked = ["--shape", "llama-8m", "--tp", 4, "--alone", "--link", "1GBps,2ms", "--drop", "none", "--drop", "all"]
    code, result, err = spd("bench", *asked, "--bits", 4, *sizes)
    assert code == 0, err
    assert [row["plan"][:2] for row in result["predicted"]] == ["44", "D4"]
    packed, whole = 4 * (64 * 4 // 8 + 2 * 2), 256 * 4  # bytes a token: slices of 64 values
    first, second = (row["communication_ms"]["ttft_ms"] for row in result["predicted"])
    assert first - second == pytest.approx(6 * (2 + 1.5 * 8 * packed / 1e6)) and packed < whole
    code, _, err = spd("bench", *asked, "--group", 3, *sizes)
    assert code and "groups of 3" in err


def test_eval(spd, common, tmp_path):
    code, result, _ = spd(
        "eval", *common, "--windows", 5, "--skip", 2, "--drop", "0,2", "--drop-mlp", "1", "--out", "deep/out.json"
    )
    assert code == 0
    assert result["tokens"] == 75 and result["windows"] == 5 and result["plan"] == "DF FD DF"
    assert result["perplexity"] > 1 and result["tp"] == 4 and result["data"]["skip"] == 2
    assert json.loads((tmp_path / "deep/out.json").read_text()) == result
    (record,) = (tmp_path / "runs").glob("*.json")
    record = json.loads(record.read_text())
    assert record["result"] == result and record["command"] == "eval" and record["config"]["drop"] == "0,2"
    assert record["versions"]["torch"] and record["hardware"]["cores"]


def test_sensitivity_plan_eval_sweep(spd, common, tmp_path):
    s = measured(spd, common)
    assert len(s["perplexity_from"]) == 4 and len(s["sensitivity"]) == len(s["sensitivity_nats"]) == 3
    assert s["block_evaluations"] == 9
    code, plan, _ = spd("plan", "s.json", "--budget", "70%", "--tau1", 0.0, "--tau2", 1e6, "--out", "plan.json")
    assert code == 0
    assert plan["budget"] == {"blocks": 2, "percent": pytest.approx(200 / 3)}
    assert [len(plan[key]) for key in ("policies", "classes", "treatments")] == [3, 3, 3]
    assert plan["model"] == s["model"] and plan["tp"] == 4 and plan["data"]["fingerprint"] == s["data"]["fingerprint"]
    code, by_file, _ = spd("eval", *common, "--plan", "plan.json")
    spec = ",".join(str(i) for i, pair in enumerate(plan["policies"]) if pair[0] == "drop")
    code, by_spec, _ = spd("eval", *common, "--drop", spec)
    assert by_file["plan"] == by_spec["plan"] == plan["plan"] and by_file["perplexity"] == by_spec["perplexity"]
    code, sweep, _ = spd("sweep", "s.json", *common)
    assert [p["blocks"] for p in sweep["curve"]] == [0, 1, 2, 3]
    assert sweep["curve"][2]["perplexity"] == by_file["perplexity"]
    assert [p["percent"] for p in sweep["curve"]] == pytest.approx([0, 100 / 3, 200 / 3, 100])
    code, some, _ = spd("sweep", "s.json", *common, "--percentages", "0,100")
    assert [p["blocks"] for p in some["curve"]] == [0, 3]


def test_generate(spd, plain):
    code, result, _ = spd(
        "generate", "--model", plain, "--prompt", "t5 t6", "--max-new-tokens", 4, "--drop", "all", "--tp", 2
    )
    assert code == 0 and result["plan"] == "DF DF DF"
    assert result["token_ids"][:2] == [5, 6] and len(result["token_ids"]) <= 6 and result["text"].startswith("t5 t6")
    code, batch, _ = spd("generate", "--model", plain, "--prompt", "t5 t6", "--prompt", "t9", "--max-new-tokens", 4)
    assert [row[0] for row in batch["token_ids"]] == [5, 9] and len(batch["text"]) == 2


def test_bench_starts_its_processes_and_report_draws(spd, common, plain, tmp_path):
    measured(spd, common)
    spd("plan", "s.json", "--budget", "1")
    spd("sweep", "s.json", *common)
    code, result, err = spd(
        "bench",
        "--model",
        plain,
        "--tp",
        2,
        "--sensitivity",
        "s.json",
        "--prompt-len",
        8,
        "--new-tokens",
        2,
        "--repeats",
        2,
        "--link",
        "1GBps,100us",
    )
    assert code == 0, err
    assert [row["blocks_dropped"] for row in result["plans"]] == [0, 1, 2, 3]
    assert result["tp"] == 2 and result["link"] == "1GBps,100us" and result["hardware"]["cores"]
    spd("plan", "s.json", "--budget", "2", "--out", "plan.json")
    plan = json.loads(Path("plan.json").read_text())
    code, _, err = spd("bench", "--model", plain, "--tp", 2, "--plan", "plan.json")
    assert code == 1 and "was made for tp=4, not tp=2" in err
    Path("plan.json").write_text(json.dumps(plan | {"tp": 1}))
    options = ["--drop", "none", "--prompt-len", 8, "--repeats", 1, "--records", "other"]
    code, alone, err = spd("bench", "--model", plain, "--plan", "plan.json", *options)
    assert code == 0, err
    assert [row["plan"] for row in alone["plans"]] == [plan["plan"], "FF FF FF"]
    code, report, err = spd("report", "runs", "--out", "figures")
    assert code == 0, err
    names = {Path(file).name for file in report["files"]}
    assert {"overview.png", "sensitivity.png", "perplexity.png", "ttft.png", "tables.md"} <= names
    assert all(Path(file).stat().st_size for file in report["files"])
    assert "## perplexity" in err  # the tables are shown


def test_bench_of_a_shape(spd):
    code, result, err = spd(
        "bench",
        "--shape",
        "llama-8m",
        "--drop",
        "none",
        "--drop",
        "all",
        "--prompt-len",
        8,
        "--new-tokens",
        0,
        "--repeats",
        1,
    )
    assert code == 0, err
    assert [row["plan"][:2] for row in result["plans"]] == ["FF", "DF"]
    assert result["plans"][0]["tpot_ms"] is None


def test_runs_reach_mlflow(spd, common, tmp_path):
    code, result, err = spd("eval", *common, "--windows", 2, "--reproduction", "r1", mirror=True)
    assert code == 0, err
    client = mlflow.MlflowClient(f"sqlite:///{tmp_path}/mlflow.db")
    experiment = client.get_experiment_by_name("spd")
    runs = client.search_runs([experiment.experiment_id])
    assert len(runs) == 2  # the reproduction and its stage
    child = next(run for run in runs if "mlflow.parentRunId" in run.data.tags)
    assert child.data.metrics["perplexity"] == pytest.approx(result["perplexity"])


def test_an_experiment_gives_the_defaults(spd, plain, text_of_words, tmp_path):
    experiment = {
        "common": {"model": str(plain), "tp": 2, "text": str(text_of_words), "seq_len": 16, "windows": 4},
        "sweep": {"windows": 3, "skip": 4, "percentages": "0,100"},
    }
    Path("e.yaml").write_text(yaml.safe_dump(experiment))
    code, result, err = spd("--experiment", "e.yaml", "sensitivity", "--out", "s.json")
    assert code == 0, err
    assert result["windows"] == 4 and result["tp"] == 2
    code, sweep, _ = spd("--experiment", "e.yaml", "sweep", "s.json", "--windows", 2)
    assert sweep["windows"] == 2 and sweep["data"]["skip"] == 4  # an option given wins, its own section comes next
    for wrong, message in (
        ({"common": {"tp": 0}}, "common.tp: it must be at least 1, and is 0 (given: 0)"),
        ({"common": {"tpp": 2}}, "common.tpp: there is no such option"),
        ({"sensitivity": {"windows": "many"}}, "sensitivity.windows: 'many' is not a whole number"),
        ({"sensitivity": {"text": ["a"]}}, "sensitivity.text: ['a'] is not a value of this option"),
        ({"sensitivty": {"windows": 3}}, "there is no command 'sensitivty'; known: common, eval"),
        ({"sensitivity": {"text": None}}, "sensitivity.text: None is not a value of this option"),
        ({"sensitivity": {"mlflow": "no"}}, "sensitivity.mlflow: 'no' is not a value of this option"),
        ({"common": 3}, "it needs sections of options"),
    ):
        Path("e.yaml").write_text(yaml.safe_dump(wrong))
        code, _, err = spd("--experiment", "e.yaml", "sensitivity", "--model", plain)
        assert code == 1 and message in err


def test_an_experiment_gives_an_option_that_may_be_given_again(tmp_path):
    """A list of one, which more are added to; a switch; and nothing to a command that lacks the option."""
    path = tmp_path / "e.yaml"
    path.write_text(yaml.safe_dump({"common": {"compile": True, "tp": 4}, "bench": {"drop": "all", "tp": 2}}))
    given = COMMANDS["bench"].parse(["--drop", "none"], path)
    assert (given.drop, given.compile, given.tp, given.plan) == (["all", "none"], True, 2, [])
    assert COMMANDS["bench"].parse(["--no-compile"], path).drop == ["all"]
    assert COMMANDS["eval"].parse(["--model", "m"], path).tp == 4


MISTAKES = {
    "tp beyond the heads": (["--tp", "9"], "tp=9 is impossible: the model has 8 query heads"),
    "no such model": (["--model", "nowhere"], "There is no model folder nowhere"),
    "no such text": (["--text", "nowhere.txt"], "There is no text nowhere.txt"),
    "empty text": (["--text", "empty.txt"], "The text empty.txt is empty"),
    "text shorter than a window": (["--text", "short.txt"], "0 windows of 16; at least 1 is needed"),
    "window longer than the model": (["--seq-len", "4096"], "exceed the model's 128 positions"),
    "blocks that do not exist": (["--drop", "3"], "Block 3 does not exist: the model has blocks 0 to 2"),
    "plan and drop": (["--plan", "p.json", "--drop", "1"], "leave out --drop"),
    "missing plan": (["--plan", "p.json"], "There is no plan at p.json"),
    "plan of another length": (["--plan", "long.json"], "has 4 blocks, the model 3"),
    "plan of another model": (["--plan", "other.json"], "was made for m (abc), and this model is"),
    "unknown dtype": (["--dtype", "float8"], "Unknown dtype 'float8'; known: float32"),
    "output below a file": (["--out", "short.txt/out.json"], "Cannot write short.txt"),
    "records below a file": (["--records", "short.txt/runs"], "Cannot write short.txt"),
    "a GPU that is not there": (["--device", "cuda"], "needs a GPU of its own"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_end_as_one_sentence(spd, common, tmp_path, mistake):
    if mistake == "a GPU that is not there" and __import__("torch").cuda.is_available():
        pytest.skip("there is a GPU")
    Path("empty.txt").write_text("")
    Path("short.txt").write_text("t5 t6 t7")
    for name, blocks in (("long", 4), ("other", 3)):
        document = {"policies": [["full", "full"]] * blocks, "model": {"name": "m", "fingerprint": "abc"}, "tp": 4}
        Path(f"{name}.json").write_text(json.dumps(document))
    before = sorted(path.name for path in tmp_path.rglob("*"))
    options, message = MISTAKES[mistake]
    code, result, err = spd("eval", *common, *options)
    assert code == 1 and result is None
    said = err.strip().splitlines()
    assert len(said) == 1 and message in said[0], err
    assert "Traceback" not in err
    assert [p for p in sorted(path.name for path in tmp_path.rglob("*")) if p != "runs"] == before


def test_other_architectures_and_damaged_weights(spd, plain, text_of_words, tmp_path):
    folder = shutil.copytree(plain, tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"model_type": "gpt2"}))
    code, _, err = spd("eval", "--model", folder, "--text", text_of_words)
    assert code == 1 and "only LLaMA models" in err
    (folder / "config.json").write_text(json.dumps(config | {"intermediate_size": 96}))
    code, _, err = spd("eval", "--model", folder, "--text", text_of_words)
    assert code == 1 and "its configuration asks for (96, 32)" in err
    (folder / "config.json").write_text(json.dumps(config))
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    code, _, err = spd("bench", "--model", folder)
    assert code == 1 and "is truncated" in err


def test_bench_mistakes(spd, plain):
    for options, message in (
        ([], "either --model (a checkpoint) or --shape"),
        (["--shape", "llama9"], "Unknown shape 'llama9'; known: llama2-7b"),
        (["--shape", "llama-8m", "--link", "fast"], "the form is BANDWIDTH,LATENCY"),
        (["--shape", "llama-8m", "--prompt-len", "5000"], "exceed the model's 4096 positions"),
        (["--shape", "llama2-70b", "--tp", "64"], "64 processes on"),
        (["--shape", "llama-8m", "--tp", "9"], "tp=9 is impossible"),
        (["--shape", "llama-8m", "--plan", "p.json"], "A plan file belongs to a model"),
    ):
        code, _, err = spd("bench", *options)
        assert code == 1 and message in err, err


def test_wrong_options_show_the_usage(spd):
    code, _, err = spd("eval")
    assert code == 2 and "required: --model" in err and len(err.splitlines()) == 1


def test_help_is_there(spd):
    for command in COMMANDS:
        assert spd(command, "--help")[0] == 0
    assert spd("--help")[0] == 0
    code, _, err = spd("evaluate")
    assert code == 2 and "invalid choice: 'evaluate'" in err and len(err.splitlines()) == 1


def test_the_record_is_written_before_the_result(spd, common, tmp_path, monkeypatch):
    """A kill between them leaves no --out that Make takes as done while no record says so."""
    from spd import records, tracking

    written, write = [], records.write_json

    def killed(path, document):
        written.append(Path(path).parent.name)
        if Path(path).name == "out.json":
            raise KeyboardInterrupt
        write(path, document)

    monkeypatch.setattr(records, "write_json", killed)
    monkeypatch.setattr(tracking, "mirror", lambda *_, **__: written.append("mlflow"))
    code, result, _ = spd("eval", *common, "--windows", 2, "--out", "stage/out.json", mirror=True)
    assert code == 130 and result is None and written == ["runs", "stage"]
    assert len(list((tmp_path / "runs").iterdir())) == 1 and not list((tmp_path / "stage").iterdir())
    monkeypatch.setattr(records, "write_json", lambda path, _: written.append(Path(path).parent.name))
    code, result, _ = spd("eval", *common, "--windows", 2, "--out", "stage/out.json", mirror=True)
    assert code == 0 and result and written[2:] == ["runs", "stage", "mlflow"]


def test_a_command_that_fills_its_out_says_where_its_result_goes(spd, common, tmp_path):
    """Folders of 'distill', 'export' and 'report': the printed result only where it belongs."""
    measured(spd, common)
    assert json.loads(Path("s.json").read_text())["sensitivity"]
    for command, results in (
        (["distill", *common, "--windows", 4, "--drop", "0", "--recipe", "zs"], ["result.json"]),
        (["export", *common[:2], "--plan", "distill"], []),
        (["report", "runs"], []),
    ):
        code, _, err = spd(*command, "--out", command[0])
        assert code == 0, err
        assert [path.name for path in Path(command[0]).glob("result*")] == results
        Path("file").touch()
        code, _, err = spd(*command, "--out", f"file/{command[0]}")  # found before the work
        assert code == 1 and "Cannot write file" in err and ".probe" in err


def test_a_question_asked_again_is_answered_at_once(spd, common, plain, tmp_path):
    """From --out, before anything heavy is imported; another number, other data or a lost record ask it anew."""
    asked = ["eval", *common, "--windows", 2, "--out", "out.json"]
    code, result, err = spd(*asked)
    assert code == 0, err
    (tmp_path / "light" / "torch").mkdir(parents=True)
    (tmp_path / "light" / "torch" / "__init__.py").write_text("raise ImportError('torch is heavy')")
    path = os.pathsep.join([str(tmp_path / "light"), str(Path(__file__).parents[1])])
    command = [sys.executable, "-m", "spd", *map(str, asked), "--no-mlflow"]
    again = subprocess.run(command, env=os.environ | {"PYTHONPATH": path}, capture_output=True, text=True)
    assert again.returncode == 0 and "holds this answer already" in again.stderr, again.stderr
    assert json.loads(again.stdout) == result and len(list(Path("runs").iterdir())) == 1

    def runs(*options):
        assert spd(*asked, *options)[0] == 0
        return len(list(Path("runs").iterdir()))

    assert runs("--batch-size", 2) == 1  # changes no number
    assert runs("--drop", "all") == 2
    assert runs("--drop", "all") == 2
    Path("words.txt").write_text(Path(common[5]).read_text())
    assert runs("--drop", "all", "--text", "words.txt") == 2  # the same words elsewhere
    Path("words.txt").write_text("t5 " + Path(common[5]).read_text())
    assert runs("--drop", "all", "--text", "words.txt") == 3
    next(Path("runs").glob(f"{json.loads(Path('out.json').read_text())['record']}.json")).unlink()
    assert runs("--drop", "all", "--text", "words.txt") == 3  # the record was gone, and is there again


def test_a_killed_write_leaves_nothing(spd, common, tmp_path, monkeypatch):
    """A disk that fills up while the result is written: a sentence, and neither half a file nor a temporary one."""

    def full(*_):
        raise OSError(28, "No space left on device")

    from spd import records

    check = records.check_writable
    monkeypatch.setattr(
        records, "check_writable", lambda folder: (check(folder), monkeypatch.setattr(os, "replace", full))[0]
    )
    code, _, err = spd("eval", *common, "--windows", 2, "--out", "out.json")
    assert code == 1 and "No space left on device" in err
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_as_a_program(tmp_path):
    """`python -m spd` outside the checkout: exit code, stdout and stderr as a script sees them."""
    folder = tmp_path / "model"
    with_tokenizer(folder, random_model(folder))
    command = [sys.executable, "-m", "spd", "eval", "--model", folder, "--text", "nowhere.txt", "--no-mlflow"]
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])}
    run = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment)
    assert run.returncode == 1 and run.stdout == ""
    assert run.stderr.startswith("There is no text nowhere.txt; give a file or one of builtin, builtin-train, wiki")
    assert len(run.stderr.splitlines()) == 1


def test_distill_eval_generate_export(spd, common, plain, tmp_path):
    measured(spd, common)
    spd("plan", "s.json", "--budget", "100%", "--tau1", -1e9, "--tau2", 0.0, "--out", "plan.json")
    calibration = [*common, "--windows", 10, "--skip", 10]
    command = ["distill", *calibration, "--plan", "plan.json", "--recipe", "paper", "--epochs", 1, "--out", "repair"]
    command += ["--learning-rate", 1e-3]
    code, result, err = spd(*command)
    assert code == 0, err
    assert {"blocks", "perplexity_before", "perplexity_after", "seconds"} <= set(result)
    assert set(result["blocks"][0]) >= {"index", "class", "treatment", "loss_before", "loss_after"}
    assert json.loads((tmp_path / "repair/result.json").read_text()) == result
    assert json.loads((tmp_path / "repair/plan.json").read_text())["classes"]
    code, again, _ = spd(*command)
    assert code == 0 and again == result  # it was finished: nothing is done twice
    held_out = [*common, "--windows", 1, "--skip", 19]
    code, scored, _ = spd("eval", *held_out, "--plan", "repair")
    assert scored["perplexity"] == result["perplexity_after"]
    assert spd("generate", "--model", plain, "--tp", 4, "--prompt", "t5", "--plan", "repair")[0] == 0
    code, exported, err = spd("export", "--model", plain, "--plan", "repair", "--out", "hf")
    assert code == 0, err
    assert exported["tp"] == 4 and exported["exported"]["fingerprint"] != result["model"]["fingerprint"]
    code, elsewhere, _ = spd("eval", *["hf" if word == plain else word for word in held_out], "--plan", "hf")
    assert elsewhere["perplexity"] == pytest.approx(scored["perplexity"], rel=1e-5)


@pytest.mark.parametrize("stopped_at", ["write_record", "write_json"])
def test_a_result_counts_only_after_its_record(spd, common, tmp_path, monkeypatch, stopped_at):
    """Stopped before either, a repair's folder holds no result; the next run publishes the one that it has."""
    command = ["distill", *common, "--windows", 10, "--drop", "0", "--recipe", "closed-form", "--out", "x"]
    write = getattr(records, stopped_at)

    def stop(path, document, *rest):
        if stopped_at == "write_record" or path == Path("x/result.json"):
            raise KeyboardInterrupt
        return write(path, document, *rest)

    monkeypatch.setattr(records, stopped_at, stop)
    assert spd(*command)[0] == 130
    monkeypatch.undo()
    monkeypatch.chdir(tmp_path)
    made = (tmp_path / "x/plan.json").stat().st_mtime_ns
    assert not (tmp_path / "x/result.json").exists()
    assert len(list((tmp_path / "runs").iterdir())) == (stopped_at == "write_json")
    code, result, err = spd(*command)
    assert code == 0 and (tmp_path / f"runs/{result['record']}.json").exists(), err
    assert json.loads((tmp_path / "x/result.json").read_text()) == result
    assert (tmp_path / "x/plan.json").stat().st_mtime_ns == made, "nothing was repaired again"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--recipe", "magic"], "Unknown recipe"),
        (["--recipe", "paper", "--epochs", "-1"], "must not be negative"),
        (["--recipe", "closed-form", "--drop-mlp", "1"], "closed form"),
        (["--recipe", "zs", "--windows", "1"], "held-out"),
        (["--recipe", "paper", "--strategy", "all"], "Unknown strategy 'all'; known: zs, b2b, b2b+hg"),
    ],
)
def test_distill_refuses_in_words(spd, common, tmp_path, options, message):
    code, result, err = spd("distill", *common, "--windows", "10", "--drop", "0", "--out", "x", *options)
    assert code == 1 and result is None and message in err
    assert not (tmp_path / "x" / "result.json").exists()


def test_sweep_of_strategies(spd, common):
    """One curve a way of repairing; nothing dropped is the same for all, and repairs are kept for another run."""
    measured(spd, common)
    options = ["--strategies", "zs,b2b,closed-form", "--percentages", "0,100", "--calibration", "10", "--skip", 10]
    options += ["--tau1", -2e9, "--tau2", -1e9, "--epochs", 1, "--learning-rate", 1e-3]
    code, result, err = spd("sweep", "s.json", *common, *options)
    assert code == 0, err
    curve = {(p["strategy"], p["blocks"]): p["perplexity"] for p in result["curve"]}
    assert len({curve[name, 0] for name in ("zs", "b2b", "closed-form")}) == 1
    assert len({curve[name, 3] for name in ("zs", "b2b", "closed-form")}) > 1  # a repair that ends worse is undone
    folders = [path.name[:-9] for path in Path("repairs").iterdir() if path.is_dir()]
    assert sorted(folders) == ["b2b-ESB", "closed-form-3"]
    (points,) = Path("repairs").glob("points-*.json")
    kept = json.loads(points.read_text())
    kept.popitem()  # as if stopped, and one point marked
    points.write_text(json.dumps(kept | {"FF FF FF": kept["FF FF FF"] | {"perplexity": 1.5}}))
    again = spd("sweep", "s.json", *common, *options)[1]["curve"]
    assert [p["perplexity"] for p in again[::2]] == [1.5] * 3  # read
    assert again[1::2] == result["curve"][1::2]  # one computed anew
    assert spd("sweep", "s.json", *common, *options, "--seq-len", 8)[1]["curve"][0]["perplexity"] != 1.5
    code, _, err = spd(
        "sweep", "s.json", *common, *options[:-8], "--skip", 5, "--strategies", "b2b", "--calibration", 9
    )
    assert code == 1 and "--calibration 9 needs --skip 9 or more" in err
    code, _, err = spd("sweep", "s.json", *common, "--strategies", "magic")
    assert code == 1 and "Unknown strategy 'magic'; known: zs, b2b" in err


def test_eval_and_sweep_of_tasks(spd, common, tmp_path):
    rows = [{"goal": f"t{i} t{i + 1}", "sol1": f"t{i + 2} t9", "sol2": "t7", "label": i % 2} for i in range(5, 13)]
    (tmp_path / "piqa.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "lambada_openai.jsonl").write_text('{"text": "t5 t6 t7 t8"}\n{"text": "t8 t7 t6"}\n')
    options = ["--tasks", "piqa,lambada_openai", "--tasks-dir", tmp_path, "--limit", 6]
    model = common[:4]
    code, result, err = spd("eval", *model, *options, "--drop", "all", "--compare")
    assert code == 0, err
    assert {"acc", "acc_norm", "stderr", "n", "chance", "compared"} <= set(result["tasks"]["piqa"])
    assert "perplexity" not in result and result["plan"] == "DF DF DF" and result["tasks"]["piqa"]["n"] == 6
    assert result["average"]["compared"]["acc_full"] == pytest.approx(
        sum(scores["compared"]["acc_full"] for scores in result["tasks"].values()) / 2
    )
    code, both, _ = spd("eval", *common, *options, "--data-parallel", 1)
    assert both["perplexity"] > 1 and "compared" not in both["tasks"]["piqa"]
    measured(spd, common)
    code, sweep, err = spd("sweep", "s.json", *common, *options, "--percentages", "0,100")
    assert code == 0, err
    none, whole = sweep["curve"]
    assert none["average"]["compared"] | {"p": 1.0, "lost": 0, "gained": 0} == none["average"]["compared"]
    assert whole["tasks"] == result["tasks"] and whole["perplexity"]
    (kept,) = Path("repairs").glob("answers-*.json")
    answers, truncated = json.loads(kept.read_text())
    kept.write_text(json.dumps([answers | {"lambada_openai": {"acc": [1.0, 0.0]}}, truncated]))
    again = spd("sweep", "s.json", *common, *options, "--percentages", "67")[1]["curve"][0]
    assert again["tasks"]["lambada_openai"]["compared"]["acc_full"] == 0.5  # as kept: the full model is asked once
    for wrong, words in (
        (["eval", *model], "There is nothing to evaluate: give --text, --tasks or both."),
        (["eval", *model, "--tasks", "riddles"], "Unknown task 'riddles'; known: arc_easy"),
        (["eval", *model, "--tasks", "sciq", "--tasks-dir", tmp_path], "which the task sciq reads"),
        (["eval", *model, "--tasks", "sciq"], "The rows of sciq are not in the local cache"),
        (
            ["eval", *common, "--data-parallel", 2],
            "2 copies of the model need as many equal parts of the processes, which are 1.",
        ),
    ):
        code, _, err = spd(*wrong)
        assert code == 1 and words in err and "Traceback" not in err


def test_a_calibration_text_of_its_own_needs_no_skipping(spd, common, tmp_path):
    measured(spd, common)
    other = tmp_path / "other.txt"
    other.write_text(" ".join(f"t{3 + i % 90}" for i in range(300)))
    options = ["--strategies", "closed-form", "--percentages", "34", "--calibration", "5", "--windows", 4]
    code, result, err = spd("sweep", "s.json", *common, *options, "--calibration-text", other)
    assert code == 0, err
    assert [p["blocks"] for p in result["curve"]] == [1] and result["data"]["skip"] == 0
    code, _, err = spd("sweep", "s.json", *common, *options, "--calibration-text", common[5])
    assert code == 1 and "--calibration 5 needs --skip 5" in err


def test_what_is_missing_is_listed(tmp_path):
    """Of an experiment with another model and no network, all of it and nothing begun."""
    experiment = tmp_path / "e.yaml"
    experiment.write_text(
        yaml.safe_dump(
            {
                "common": {"model": "spd-tiny", "tp": 17, "text": "none.txt"},
                "sweep": {"tasks": "piqa", "tasks_dir": str(tmp_path)},
            }
        )
    )
    command = [sys.executable, Path(os.getcwd(), "experiments/preflight.py"), experiment, "--tp", "17"]
    environment = os.environ | {"PYTHONPATH": os.getcwd()}
    run = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert run.returncode != 0 and not run.stdout
    lines = run.stderr.strip().splitlines()
    assert lines[0] == "Missing (FORCE=1 goes on all the same):" and len(lines) == 4
    for line, words in zip(lines[1:], ("tp=17 is impossible", "no text none.txt", "no rows of piqa"), strict=True):
        assert words in line


def test_the_command_line_starts_without_what_takes_long():
    """Help, a wrong word and a question that was answered before want neither torch nor pydantic."""
    code = "import sys, spd.cli; print(sorted({'torch', 'pydantic', 'transformers', 'mlflow'} & set(sys.modules)))"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=Path(__file__).parent.parent, capture_output=True, text=True
    )
    assert done.stdout == "[]\n", done.stderr
