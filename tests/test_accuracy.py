"""Tasks, their rows and prompts, accuracies with errors, and the comparison question by question."""

import json
import math

import pytest
from lm_eval.evaluator import evaluate
from lm_eval.models.huggingface import HFLM

from spd import Plan, SPDModel
from spd.errors import SPDError
from spd.tasks import KNOWN, PAPER, Accuracy, average, compare, load_tasks, mcnemar, read_rows, stderr
from spd.tiny import tasks as tiny

CHOICES = {"text": ["ice", "fire"], "label": ["A", "B"]}
ROWS = {  # a row of each task in the form of the hub's, or (hellaswag) of what the harness makes of it
    "arc_easy": {"id": "1", "question": "What is cold?", "choices": CHOICES, "answerKey": "A"},
    "arc_challenge": {"id": "1", "question": "What is hot?", "choices": CHOICES, "answerKey": "B"},
    "hellaswag": {"ind": 1, "query": "Ice: It", "choices": ["melts.", "burns.", "sings.", "runs."], "gold": 0},
    "lambada_openai": {"text": "Ice is cold and fire is hot"},
    "piqa": {"goal": "Cool a drink", "sol1": "Add ice.", "sol2": "Add fire.", "label": 0},
    "sciq_validation": {
        "question": "What melts?", "distractor1": "fire", "distractor2": "air", "distractor3": "light",
        "correct_answer": "ice", "support": " Ice melts.",
    },
    "winogrande": {"sentence": "Ice met fire and _ melted.", "option1": "ice", "option2": "fire", "answer": "1"},
    "mmlu_test": {"question": " Is ice cold?", "subject": "anatomy", "choices": ["Yes", "No", "2", "3"], "answer": 0},
    "mmlu_dev": {"question": "Is fire?", "subject": "anatomy", "choices": ["No", "Yes", "4", "5"], "answer": 1},
}  # fmt: skip
PROMPTS = {
    "arc_easy": ("Question: What is cold?\nAnswer:", " ice"),
    "hellaswag": ("Ice: It", " melts."),
    "lambada_openai": ("Ice is cold and fire is", " hot"),
    "piqa": ("Question: Cool a drink\nAnswer:", " Add ice."),
    "sciq": ("Ice melts.\nQuestion: What melts?\nAnswer:", " fire"),
    "winogrande": ("Ice met fire and ice", " melted."),
}


@pytest.fixture
def folder(tmp_path):
    for name, row in ROWS.items():
        (tmp_path / f"{name}.jsonl").write_text((json.dumps(row) + "\n") * (5 if name == "mmlu_dev" else 2))
    return tmp_path


def test_prompts_are_the_harness_s(folder):
    tasks = {task.name: task for task in load_tasks(",".join((*PAPER, "mmlu")), folder)}
    assert {name: task.chance for name, task in tasks.items()} == {
        "arc_easy": 0.5, "arc_challenge": 0.5, "hellaswag": 0.25, "lambada_openai": 0.0, "piqa": 0.5, "sciq": 0.25,
        "winogrande": 0.5, "mmlu": 0.25,
    }  # fmt: skip
    assert tasks["sciq"].source == "sciq_validation.jsonl"
    for name, prompt in PROMPTS.items():
        part = tasks[name].parts[name]
        part.build_all_requests(limit=1)
        assert part.instances[0].args == prompt
    (part,) = tasks["mmlu"].parts.values()
    part.build_all_requests(limit=1)
    context, continuation = part.instances[0].args
    assert context.startswith(
        "The following are multiple choice questions (with answers) about anatomy.\n\nIs fire?\nA. No"
    )
    assert context.count("Answer: B") == 5 and context.endswith("\nD. 3\nAnswer:") and continuation == " A"


def test_what_cannot_be_loaded(folder, tmp_path):
    (tmp_path / "piqa.jsonl").write_text('{"goal": 1}\n[]\n')
    with pytest.raises(SPDError, match=r"Line 2 of .*piqa.jsonl is not a JSON object\."):
        load_tasks("piqa", folder)
    (tmp_path / "piqa.jsonl").write_text('{"aim": "Cool a drink"}\n')
    with pytest.raises(SPDError, match="are not of the form that lm-eval's task piqa reads"):
        load_tasks("piqa", folder)
    with pytest.raises(SPDError, match=r"The rows of .*piqa.jsonl are not of the form .* \(Arrow"):
        (tmp_path / "piqa.jsonl").write_text('{"goal": "a"}\n{"goal": [1]}\n')
        load_tasks("piqa", folder)
    (tmp_path / "piqa.jsonl").unlink()
    with pytest.raises(SPDError, match=r"There is no .*piqa.jsonl, which the task piqa reads"):
        load_tasks("arc_easy,piqa", folder)
    with pytest.raises(SPDError, match=rf"Unknown task 'riddles'; known: {', '.join(KNOWN)}\."):
        load_tasks("piqa,riddles", folder)
    (tmp_path / "mmlu_dev.jsonl").write_text(json.dumps(ROWS["mmlu_dev"]) + "\n")
    with pytest.raises(SPDError, match="has not 5 rows of the subject anatomy"):
        load_tasks("mmlu", folder)


def test_a_row_ends_at_a_line_feed_alone(tmp_path):
    (tmp_path / "rows.jsonl").write_text('{"goal": "one\u2028two\x85three"}\r\n\n{"goal": "four"}\n', newline="")
    assert [row["goal"] for row in read_rows(tmp_path / "rows.jsonl")] == ["one\u2028two\x85three", "four"]


def test_errors_and_flips_by_hand():
    assert stderr([1.0, 0.0, 0.0, 1.0]) == pytest.approx(math.sqrt(0.25 / 3))
    assert mcnemar(0, 0) == 1.0 and mcnemar(5, 0) == pytest.approx(2 / 2**5) and mcnemar(3, 3) == 1.0
    found = compare([1, 1, 1, 0, 0], [0, 0, 1, 1, 0])
    assert (found["lost"], found["gained"], found["acc_full"]) == (2, 1, 0.6)
    assert found["difference"] == pytest.approx(-0.2) and found["p"] == 1.0
    one = {"acc": 0.5, "stderr": 0.03, "compared": compare([1, 1], [0, 1])}
    two = {"acc": 0.7, "stderr": 0.04, "compared": compare([1, 0], [1, 1])}
    mean = average({"one": one, "two": two})
    assert (mean["metric"], mean["tasks"]) == ("acc", ["one", "two"])
    assert mean["acc"] == pytest.approx(0.6) and mean["stderr"] == pytest.approx(0.025)
    assert mean["compared"]["lost"] == mean["compared"]["gained"] == 1
    assert mean["compared"]["difference"] == pytest.approx(0.0)
    assert average({}) is None


def test_the_tiny_tasks_tell_a_damaged_model_from_a_whole_one(spd_tiny):
    assert tiny.last_word() == tiny.last_word() and tiny.continuation() == tiny.continuation()
    words, four = tiny.last_word(), tiny.continuation()
    assert len(words) == len(four) == tiny.QUESTIONS
    assert all(row["word"].strip() in row["context"].split() for row in words)
    assert all(len(set(row["choices"])) == 4 for row in four) and {row["answer"] for row in four} == {0, 1, 2, 3}
    model = SPDModel.from_pretrained(spd_tiny, tp=8)
    accuracy = Accuracy(load_tasks("tiny_last_word,tiny_continuation"), limit=100)
    accuracy.compare_with(model)
    model.plan = Plan.dropping(8, range(8))
    found = accuracy(model)
    assert found["average"]["tasks"] == ["tiny_last_word", "tiny_continuation"]
    for scores in found["tasks"].values():
        full = scores["compared"]["acc_full"]
        assert full > scores["chance"] + 3 * scores["stderr"] and scores["acc"] < full
        assert scores["compared"]["difference"] == pytest.approx(scores["acc"] - full)
        assert scores["compared"]["lost"] > scores["compared"]["gained"]


def test_accuracies_are_those_of_the_harness(shared):
    """The harness with its own `hf` model, over the same rows: accuracies and standard errors."""
    folder = shared / "models/stories260K"
    tasks = load_tasks("arc_easy,lambada_openai,winogrande,sciq", shared / "tasks")
    found = Accuracy(tasks, limit=25)(SPDModel.from_pretrained(folder, tp=2))["tasks"]
    parts = {name: part for task in tasks for name, part in task.parts.items()}
    theirs = evaluate(HFLM(pretrained=str(folder), dtype="float32", device="cpu", batch_size=8), {"tasks": parts},
                      limit=25, bootstrap_iters=10)["results"]  # fmt: skip
    for name, scores in found.items():
        assert scores["acc"] == theirs[name]["acc,none"] and scores["n"] == 25
        assert scores["stderr"] == theirs[name]["acc_stderr,none"]
        if "acc_norm,none" in theirs[name]:
            assert scores["acc_norm"] == theirs[name]["acc_norm,none"]
            assert scores["acc_norm_stderr"] == theirs[name]["acc_norm_stderr,none"]
        else:
            assert scores["acc_norm"] is None
