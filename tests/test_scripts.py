"""train.py as a user runs it: what it prints, writes and refuses; and sample.py with what it wrote."""
import hashlib
import json
import os
import subprocess
import sys
from argparse import Namespace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import train
from flexidepth import FlexiDepth, Tokenizer, generate

ROOT = Path(__file__).resolve().parent.parent
TINY = ROOT / "tests" / "tiny-llama"


def run(script, *arguments, cwd, **environment):
    return subprocess.run([sys.executable, str(ROOT / script), *map(str, arguments)], cwd=cwd, text=True,
                          capture_output=True, timeout=300, env=os.environ | {"OMP_NUM_THREADS": "1"} | environment)


def digest(folder):
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in sorted(folder.iterdir())}


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A short training run in a folder of its own."""
    cwd = tmp_path_factory.mktemp("run")
    rows = (TINY / "valid.jsonl").read_text().splitlines(keepends=True)
    (cwd / "valid.jsonl").write_text("".join(rows[:8] + rows[-8:]))
    before = digest(TINY)
    result = run("train.py", "--steps", 3, "--batch-size", 8, "--valid", "valid.jsonl", cwd=cwd)
    assert result.returncode == 0, result.stderr
    assert digest(TINY) == before
    return cwd, result.stdout


def test_train_writes_gates_and_a_table(trained):
    """A run that ends without its table, or whose file does not fit the model it was trained for."""
    cwd, out = trained
    for word in ("step 3/3", "skip loss", "layers used", "tokens/s", "s left", "phrase", "story", "mean"):
        assert word in out
    record = json.loads((cwd / "out" / "train.json").read_text())
    assert record["settings"]["steps"] == 3 and record["valid"]["phrase"]["rows"] == 8
    names = [name for name in sorted(os.listdir(cwd / "out")) if not name.startswith("tokens-")]
    assert names == ["flexidepth.safetensors", "metrics.jsonl", "train.json"]
    model = FlexiDepth.from_pretrained(TINY, flexidepth=cwd / "out")
    assert model.config.routing_layers == list(range(6, 12))


def test_sample_uses_what_was_trained_and_says_so(trained):
    """Depths of the gates that came with the tiny Llama shown for those just trained."""
    cwd, _ = trained
    here = run("sample.py", "--show-depth", "--prompt", "7 * 58 =", cwd=cwd)
    assert here.returncode == 0 and "routers and adapters of out" in here.stdout, here.stderr
    elsewhere = run("sample.py", "--show-depth", "--prompt", "7 * 58 =", cwd=ROOT / "tests")
    assert "routers and adapters of tiny-llama" in elsewhere.stdout
    assert here.stdout.splitlines()[3:] != elsewhere.stdout.splitlines()[3:]


def call(script, capsys, *arguments):
    """Exit status and standard error of a script's main() in this process."""
    sys.argv = [script.__name__, *map(str, arguments)]
    with pytest.raises(SystemExit) as stopped:
        script.main()
    return stopped.value.code, capsys.readouterr().err


@pytest.mark.parametrize("arguments, word", [
    (["--model", "no/such/model"], "no/such/model"),
    (["--alpha", "-1"], "--alpha: -1"), (["--alpha", "much"], "invalid float value: 'much'"),
    (["--batch-size", "0"], "--batch-size: 0"), (["--device", "gpu7"], "gpu7"),
    (["--data", "none.jsonl"], "none.jsonl"), (["--data", "empty.jsonl"], "empty.jsonl: no row"),
    (["--data", "broken.jsonl"], "broken.jsonl: line 2"), (["--data", "role.jsonl"], "unknown role 'wizard'"),
    (["--data", "fields.jsonl"], "fields.jsonl: line 1"), (["--data", "binary.jsonl"], "binary.jsonl: line 1"),
    (["--data", "deep.jsonl"], "deep.jsonl: line 1"), (["--seq-len", "3"], "--seq-len 3 leaves out 3920"),
    (["--out", "empty.jsonl"], "empty.jsonl"), (["--model", "elsewhere"], "with --data"), (["--flexidepth", "none"], "none"),
])
def test_train_refuses(tmp_path, monkeypatch, capsys, arguments, word):
    """A traceback, or a word that comes only after the training and loses it."""
    monkeypatch.chdir(tmp_path)
    good = '{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}\n'
    for name, text in {"empty": "\n", "broken": good + "{oops\n", "role": good.replace("user", "wizard"),
                       "fields": '{"messages": [{"role": "user"}]}\n'}.items():
        (tmp_path / f"{name}.jsonl").write_text(text)
    (tmp_path / "binary.jsonl").write_bytes(b"\xff\xfe")
    (tmp_path / "deep.jsonl").write_text("[" * 99999)
    (tmp_path / "elsewhere").mkdir()
    for name in ("config.json", "model.safetensors", "tokenizer.model"):
        (tmp_path / "elsewhere" / name).symlink_to(TINY / name)
    monkeypatch.setattr(train, "train", lambda *_: pytest.fail("trained before it looked"))
    code, err = call(train, capsys, *arguments)
    assert code == 2 and word in err and err.count("\n") == 1, err
    assert ("--data" not in arguments) or not list(tmp_path.glob("out/tokens-*.json"))  # as if all were well


# ---- The parts of train.py

def test_padding_and_prompt_count_in_no_loss():
    """Targets that are off by one, padding taken for text, a prompt that counts among the answers."""
    tokenizer = Tokenizer.from_pretrained(TINY)
    rows = [train.tokenize({"messages": [{"role": "user", "content": "7 * 58 ="},
                                         {"role": "assistant", "content": answer}]}, tokenizer, True)
            for answer in ("406", "4 0 6")]
    input_ids, targets, real = train.collate(rows, "cpu")
    assert tokenizer.decode(targets[0][targets[0] != -100].tolist()) == "406<|eot_id|>"
    assert real.sum(1).tolist() == [len(row.ids) - 1 for row in rows]
    assert torch.equal(input_ids[1, 1:][targets[1, :-1] != -100], targets[1, :-1][targets[1, :-1] != -100])
    whole = train.tokenize({"text": "7 * 58 ="}, tokenizer, True)
    assert all(whole.counted) and tokenizer.decode(whole.ids) == "<|begin_of_text|>7 * 58 =<|end_of_text|>"


def test_a_row_is_a_line(tmp_path):
    """A line cut at U+2028 or another of Python's line ends, which JSON allows within a string."""
    line = json.dumps({"text": "a\u2028b\u0085c"}, ensure_ascii=False)
    (tmp_path / "rows.jsonl").write_text(line + "\r\n\n" + line, encoding="utf-8")
    tokenizer = Tokenizer.from_pretrained(TINY)
    assert len(train.Rows(tmp_path / "rows.jsonl", tokenizer, tmp_path, Namespace(seq_len=256, answers_only=False))) == 2


def test_micro_batches_add_up():
    """Losses normalised by the rows at hand: a batch cut in parts must give the same gradients."""
    tokenizer = Tokenizer.from_pretrained(TINY)
    raws = [json.loads(line) for line in (TINY / "train.jsonl").read_text().splitlines()[700:1000:25]]
    rows = [train.tokenize(raw, tokenizer, True) for raw in raws] + [
        train.tokenize({"text": "a much longer row " * 10}, tokenizer, True)]
    model = FlexiDepth.from_pretrained(TINY, flexidepth=TINY)
    results = []
    for micro in (13, 5, 1):
        model.zero_grad()
        figures = train.backward(model, rows, Namespace(alpha=1e-3, micro_batch_size=micro, device="cpu"))
        results.append([torch.tensor(figures), *(p.grad for p in model.parameters() if p.requires_grad)])
    for other in results[1:]:
        for a, b in zip(results[0], other):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_exact_match_is_that_of_greedy_decoding():
    """The table is filled from one pass a row; it must tell what decoding row by row would."""
    model = FlexiDepth.from_pretrained(TINY, flexidepth=TINY)
    tokenizer = Tokenizer.from_pretrained(TINY)
    raws = [json.loads(line) for line in (TINY / "valid.jsonl").read_text().splitlines()[::97]]
    table = train.evaluate(model, [train.tokenize(raw, tokenizer, True) for raw in raws], 8, "cpu")
    for task, line in table.items():
        right, depths = [], []
        for raw in (raw for raw in raws if raw["task"] == task):
            prompt = tokenizer.encode_chat(raw["messages"][:1], add_generation_prompt=True)
            tokens = list(generate(model, torch.tensor([prompt]), 30, stop_ids=tokenizer.stop_ids))
            right.append(tokenizer.decode(t for t, _ in tokens) == raw["messages"][1]["content"] + "<|eot_id|>")
            depths += [depth for _, depth in tokens]
        assert line["flexidepth_exact"] == sum(right) / len(right)
        if all(right):
            assert line["layers"] == pytest.approx(sum(depths) / len(depths))


# ---- The tiny Llama

def test_tiny_llama(tmp_path):
    """A base that is not good at its tasks, gates that do not skip a quarter of all layers with
    99.5 % of its exact match, or a folder that has outgrown the repository."""
    assert sum(file.stat().st_size for file in TINY.iterdir()) < 5e6
    assert {load_file(TINY / "model.safetensors")["model.norm.weight"].dtype} == {torch.float32}
    tokenizer = Tokenizer.from_pretrained(TINY)
    model = FlexiDepth.from_pretrained(TINY, flexidepth=TINY)
    rows = train.Rows(TINY / "valid.jsonl", tokenizer, tmp_path, Namespace(seq_len=256, answers_only=True))
    table = train.evaluate(model, rows, 128, "cpu")
    assert all(line["base_exact"] >= 0.97 for line in table.values()), table
    mean = {key: sum(line[key] for line in table.values()) / len(table) for key in table["add"]}
    assert mean["flexidepth_exact"] >= 0.995 * mean["base_exact"] and mean["layers"] <= 0.75 * 12
    assert max(table[t]["layers"] for t in ("phrase", "repeat", "copy")) < table["add"]["layers"]
    assert table["add"]["layers"] < table["multiply"]["layers"]


def test_validation_rows_of_rules_are_held_out():
    """Rows that were learnt by heart: those of the four tasks with a rule may not be in train.jsonl."""
    train_rows, valid_rows = ({json.loads(line)["messages"][0]["content"]: json.loads(line)["task"] for line in
                               (TINY / f"{name}.jsonl").read_text().splitlines()} for name in ("train", "valid"))
    shared = {task for question, task in valid_rows.items() if question in train_rows}
    assert shared == {"phrase", "multiply"}
