"""tests/paper/benchmarks.py: its requests, scores and counts, against transformers and by hand."""
import json
import sys
from pathlib import Path
from statistics import fmean

import pytest
import torch

pytest.importorskip("lm_eval")
transformers = pytest.importorskip("transformers")

import datasets  # noqa: E402
from lm_eval.api.instance import Instance  # noqa: E402
from lm_eval.tasks import TaskManager  # noqa: E402

sys.path.append(str(Path(__file__).resolve().parent / "paper"))
import benchmarks  # noqa: E402

from flexidepth import FlexiDepth, Tokenizer, layers_used  # noqa: E402

CHOICES = {"query": "Question: 1+1?\n", "choices": ["2", "10"], "gold": 0}
ROWS = {
    "piqa": CHOICES, "arc_easy": {**CHOICES, "query": "Question: 1+1?"}, "hellaswag": CHOICES,
    "winogrande": {"context_options": ["It", "Everybody"], "continuation": "is.", "gold": 1},
    "lambada_openai": {"context": "one two", "continuation": "three"},
}
REQUESTS = {
    "piqa": [("Question: 1+1?\nAnswer:", " 2"), ("Question: 1+1?\nAnswer:", " 10")],
    "arc_easy": [("Question: 1+1?\nAnswer:", " 2"), ("Question: 1+1?\nAnswer:", " 10")],
    "hellaswag": [("Question: 1+1?\n", " 2"), ("Question: 1+1?\n", " 10")],
    "winogrande": [("It", " is."), ("Everybody", " is.")],
    "lambada_openai": [("one two", " three")],
}


@pytest.fixture
def bench(tmp_path, monkeypatch) -> Path:
    """A folder with a row of each task."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    for name, row in ROWS.items():
        (tmp_path / f"{name}_some.jsonl").write_text(json.dumps(row) + "\n")
    return tmp_path


@pytest.fixture
def folder(tmp_path, write_checkpoint, write_ranks) -> Path:
    """A random model with routers, a context of 64 tokens, and a tokenizer of bytes."""
    folder = write_checkpoint(tmp_path / "model", routers=True, vocab_size=512)
    FlexiDepth.from_pretrained(folder).save_flexidepth(folder)
    write_ranks(folder)
    return folder


@pytest.fixture
def lm(folder, monkeypatch) -> benchmarks.HarnessModel:
    monkeypatch.setattr(benchmarks, "BATCH_SIZE", 3)
    model = FlexiDepth.from_pretrained(folder)
    return benchmarks.HarnessModel(model, Tokenizer.from_pretrained(folder))


def instances(kind: str, *args: tuple) -> list[Instance]:
    return [Instance(request_type=kind, doc={}, arguments=each, idx=0) for each in args]


def test_requests_of_local_tasks(bench):
    """A prompt may differ from the one that the harness's task of this name has."""
    manager = TaskManager()
    for name, expected in REQUESTS.items():
        task = manager.load([benchmarks.local_task(bench, name)])["tasks"][name]
        task.build_all_requests()
        assert [request.args for request in task.instances] == expected


@torch.no_grad()
def score(oracle: transformers.LlamaForCausalLM, context: list, answer: list) -> tuple:
    """What transformers gives to a request: the last 64 tokens, and one that is only predicted."""
    ids = torch.tensor([context + answer])[:, -65:]
    logits = oracle(ids[:, :-1]).logits[0, -len(answer):]
    targets = ids[0, -len(answer):, None]
    exact = torch.equal(logits.argmax(-1, keepdim=True), targets)
    return logits.log_softmax(-1).gather(-1, targets).sum().item(), exact


def test_scores_of_the_base_are_those_of_transformers(lm, folder, ids):
    """Padding may be seen, an answer may be shifted by one, or a request that is too long may be
    cut at the wrong end."""
    oracle = transformers.LlamaForCausalLM.from_pretrained(folder)
    lines = ids(5, 90).tolist()
    requests = [(None, line[:n], line[n:n + m])
                for line, n, m in zip(lines, (1, 30, 80, 60, 7), (4, 9, 5, 5, 1))]
    # A request whose answer is the likeliest one.
    likeliest = oracle.generate(torch.tensor([lines[0][:9]]), max_new_tokens=3, do_sample=False)
    requests.append((None, lines[0][:9], likeliest[0, 9:].tolist()))

    found = lm._loglikelihood_tokens(requests, disable_tqdm=True)
    expected = [score(oracle, context, answer) for _, context, answer in requests]
    assert [exact for _, exact in found] == [exact for _, exact in expected] == 5 * [False] + [True]
    assert [each for each, _ in found] == pytest.approx([each for each, _ in expected], abs=1e-4)

    # All of a long text, each token once, in windows of 64.
    begin = lm.text.special["<|begin_of_text|>"]
    text = lm.tok_encode("x" * 100)
    windows = [([begin], text[:64]), (text[36:64], text[64:])]
    total = sum(score(oracle, *window)[0] for window in windows)
    [found] = lm.loglikelihood_rolling(instances("loglikelihood_rolling", ("x" * 100,)), True)
    assert found == pytest.approx(total, abs=1e-3)


def test_generated_text(lm):
    """Text may go on after a stop, or the place that predicts its first token be the prompt's."""
    def generate(*until: str) -> str:
        lm.seen = []
        options = {"until": [*until], "max_gen_toks": 9}
        return lm.generate_until(instances("generate_until", ("abc", options)), True)[0]

    lm.route = "learned"
    whole = generate()
    assert [count for count, _ in lm.seen] == [3] + 8 * [0]
    ids = lm.tok_encode("abc")
    for _ in range(9):
        logits, _, kept = lm.model(torch.tensor([ids]))
        ids.append(logits[0, -1].argmax().item())
    assert whole == lm.text.decode(ids[4:])
    assert torch.equal(torch.cat([kept for _, kept in lm.seen]), kept[0])
    assert generate(whole[4:6]) == whole[:whole.index(whole[4:6])]
    assert len(lm.seen) < 9


def test_figures(bench, folder, monkeypatch, capsys):
    """Prompts and answers may be exchanged, padding may count, the base may run its routers, or the
    coin may keep other shares than the gates, or the same tokens."""
    with open(bench / "lambada_openai_some.jsonl", "w") as file:
        for i in range(50):
            row = {"context": f"{i ** 9} " * (1 + i % 4), "continuation": "so"}
            file.write(json.dumps(row) + "\n")
    out = bench / "figures.json"
    options = f"--model {folder} --data {bench} --tasks winogrande lambada_openai --out {out}"
    monkeypatch.setattr(sys, "argv", ["benchmarks.py", *options.split()])
    benchmarks.main()
    rows = {(row["task"], row["route"]): row for row in json.loads(out.read_text())["rows"]}
    assert len(rows) == 6 and len(capsys.readouterr().out.splitlines()) >= 1 + 6 + 3

    base = rows["winogrande", "full"]
    assert base["answers"] == base["prompts"] == 4 and base["skipped"] == 0
    model = FlexiDepth.from_pretrained(folder)
    tokenizer = Tokenizer.from_pretrained(folder)
    prompts, answers = [], []
    for text in ("It is.", "Everybody is."):
        _, _, kept = model(torch.tensor([tokenizer.encode(text, bos=True)[:-1]]))
        depths = layers_used(kept[0], model.config).tolist()
        prompts += depths[:-4]
        answers += depths[-4:]
    learned = rows["winogrande", "learned"]
    assert learned["prompts"] == pytest.approx(fmean(prompts))
    assert learned["answers"] == pytest.approx(fmean(answers))
    assert learned["skipped"] == pytest.approx(1 - fmean(prompts + answers) / 4)

    learned, coin = rows["lambada_openai", "learned"], rows["lambada_openai", "coin"]
    assert coin["rates"] == pytest.approx(learned["rates"], abs=0.05)
    assert coin["answers"] != learned["answers"]
