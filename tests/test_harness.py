"""The lm-evaluation-harness model against the harness's own `hf` model on the same checkpoint, request by request."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from lm_eval.api.instance import Instance
from lm_eval.api.registry import get_model

from spd import Plan, SPDModel
from spd.errors import SPDError
from spd.harness import SpdLM, questions, score

PAIRS = [
    ("Once upon a time there was a", " little girl who"),
    ("Once upon a time there was a", " dog"),
    ("Once upon a time there was a", " little girl who"),  # again: run once
    ("The value of the first ", "argument is returned"),  # the space moves to the continuation
    ("", "A text of its own, without a context"),
    ("", "<s>and one that begins with BOS"),
    ("<s>It was a", " day"),  # no second BOS
    ("word " * 400, "end of a context that is too long"),  # cut from the left
    ("A name:", " αβγ"),
]
TEXTS = ["A short text.", "It goes on and on, and does not end with this window or the next. " * 12, ""]


def requests(kind: str, arguments: list[tuple]) -> list[Instance]:
    return [Instance(kind, {}, args, i) for i, args in enumerate(arguments)]


@pytest.fixture(scope="module", params=["spd-tiny", "stories260K", "babyllama-tok105"])
def both(request, spd_tiny):
    """(`spd` at tp=4, the harness's `hf`) on one checkpoint in float32."""
    folder = spd_tiny if request.param == "spd-tiny" else request.getfixturevalue("shared") / "models" / request.param
    ours = get_model("spd").create_from_arg_string(f"pretrained={folder},tp=4,batch_size=3")
    theirs = get_model("hf")(pretrained=str(folder), dtype="float32", batch_size=1, device="cpu")
    return ours, theirs


def test_loglikelihood(both):
    ours, theirs = (lm.loglikelihood(requests("loglikelihood", PAIRS)) for lm in both)
    assert [x for x, _ in ours] == pytest.approx([x for x, _ in theirs], abs=1e-4)
    assert [x for _, x in ours] == [x for _, x in theirs]
    assert both[0].truncated


def test_greedy_continuations_are_known_as_such(both):
    context = "Once upon a time"
    ids = both[0].model.generate(context, 4)[0]
    pair = (context, both[0].tokenizer.decode(ids, skip_special_tokens=True)[len(context) :])
    found = [lm.loglikelihood(requests("loglikelihood", [pair]))[0] for lm in both]
    assert found[0][1] and found[1][1] and found[0][0] == pytest.approx(found[1][0], abs=1e-4)


def test_loglikelihood_rolling(both):
    ours, theirs = (lm.loglikelihood_rolling(requests("loglikelihood_rolling", [(t,) for t in TEXTS])) for lm in both)
    assert ours == pytest.approx(theirs, abs=1e-4, rel=1e-6)


def test_generate_until(both):
    prompts = ["Once upon a time", "Lily and Ben", "Returns the", "word " * 400]
    options = {"until": ["\n", "."], "max_gen_toks": 24, "do_sample": False}
    asked = [(prompt, options) for prompt in prompts] + [(prompts[0], {"until": "e", "max_gen_toks": 3})]
    ours, theirs = (lm.generate_until(requests("generate_until", asked)) for lm in both)
    assert ours == theirs and any(ours)


def test_every_context_is_run_once_and_dropping_is_felt(spd_tiny, monkeypatch):
    model = SPDModel.from_pretrained(spd_tiny, tp=8)
    rows = []
    forward = type(model.transformer).forward
    monkeypatch.setattr(
        type(model.transformer), "forward", lambda m, t, *a, **k: rows.append(len(t)) or forward(m, t, *a, **k)
    )
    lm = SpdLM(model, batch_size=2)
    one_token = [("The value", " of"), ("The value", " is"), ("A list", " of"), ("A list", " of")]
    full = lm.loglikelihood(requests("loglikelihood", one_token))
    assert rows == [2]  # one pass over two contexts: nothing to add for continuations of one token
    model.plan = Plan.dropping(8, range(8))
    dropped = lm.loglikelihood(requests("loglikelihood", one_token))
    assert abs(full[0][0] - dropped[0][0]) > 1e-3 and full[2] == full[3]


def test_scores_do_not_depend_on_the_batch(variants):
    """Padded or alone, on a cache or whole: the sum of the whole sequence's log-probabilities after the context."""
    folder = variants("grouped-query")[0]
    model = SPDModel.from_pretrained(folder, tp=8, plan=Plan.from_letters("DF FD DF")).transformer
    draw = torch.Generator().manual_seed(0)
    words = [tuple(torch.randint(3, 96, (n,), generator=draw).tolist()) for n in (1, 9, 5, 1, 5, 4, 12, 2)]
    asked = [*zip(words[::2], words[1::2], strict=True)]
    asked += [(asked[1][0], (7, 8, 9)), (asked[3][0], (5,))]
    together = score(model, questions(asked), 2)
    for context, continuation in asked:
        logits = model(torch.tensor([context + continuation[:-1]]))[0, len(context) - 1 :].log_softmax(-1)
        alone = logits.gather(1, torch.tensor(continuation)[:, None]).sum().item()
        assert together[context, continuation][0] == pytest.approx(alone, abs=1e-4)


def test_what_is_refused(spd_tiny):
    model = SPDModel.from_pretrained(spd_tiny)
    with pytest.raises(SPDError, match="batch_size=auto is not supported"):
        SpdLM(model, batch_size="auto")
    with pytest.raises(SPDError, match="300 new tokens leave no room"):
        SpdLM(model).generate_until(requests("generate_until", [("A", {"until": [], "max_gen_toks": 300})]))


def test_perplexity_needs_no_harness():
    """The engine's modules load where lm-eval is not installed, and do not load it where it is."""
    code = "import sys; sys.modules['lm_eval'] = None; import spd.evaluate"
    heavy = "import sys, spd.evaluate; assert not {'datasets', 'spd.harness', 'lm_eval.api.model'} & set(sys.modules)"
    for program in (code, heavy):
        subprocess.run([sys.executable, "-c", program], check=True, cwd=Path(__file__).parents[1])
