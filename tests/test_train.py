"""train.py as a user runs it, in one process: what it prints, writes, goes on with and refuses."""
import json
import math
import os
import runpy
import shutil
import sys
from argparse import Namespace
from collections import Counter, defaultdict
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

import train
from flexidepth import FlexiDepth, Tokenizer, generate

ROOT = Path(__file__).resolve().parent.parent
TINY = ROOT / "tests" / "tiny-llama"
STEPS = ("--steps", 6, "--save-every", 2)


def script(*arguments, name="train.py"):
    """Run a script in this process, as its command line does. Returns None, or the one line with
    which it ended in failure: Python prints it to standard error, and exits with status 1."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [name, *map(str, arguments)])
        try:
            runpy.run_path(str(ROOT / name), run_name="__main__")
        except SystemExit as end:
            assert isinstance(end.code, str) and "\n" not in end.code.strip()
            return end.code.strip()


def run(*arguments):
    """Run train.py on the few rows of the current folder."""
    return script("--data", "rows.jsonl", "--batch-size", 8, "--micro-batch-size", 4, *arguments)


def write_rows(name, rows, step):
    """Write every step-th of the tiny Llama's rows into the current folder."""
    lines = (TINY / rows).read_text().splitlines(keepends=True)
    Path(name).write_text("".join(lines[::step]))


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """Each test runs in a folder that holds nothing but rows.jsonl."""
    monkeypatch.chdir(tmp_path)
    write_rows("rows.jsonl", "train.jsonl", 90)


@pytest.fixture
def stopped(monkeypatch):
    """Ctrl-C ends a run in step 5. Its folder out/ has a checkpoint of step 4."""
    with monkeypatch.context() as patch:
        steps = Mock(side_effect=[None] * 4 + [KeyboardInterrupt])
        patch.setattr(torch.optim.AdamW, "step", steps)
        assert run(*STEPS).startswith("train.py: interrupted; --resume goes on")


def notes(out="out"):
    return [json.loads(line) for line in Path(out, "metrics.jsonl").read_text().splitlines()]


def result(out="out"):
    return json.loads(Path(out, "train.json").read_text())


def contents(out):
    return {file.name: file.read_bytes() for file in Path(out).iterdir()}


# ---- A run ---------------------------------------------------------------------------------------
def test_a_run_writes_its_result(tmp_path, monkeypatch, capsys):
    """A run would end without its table, or with files that others may not read, or that are not
    where ~ says, or that sample.py can't use."""
    write_rows("valid.jsonl", "valid.jsonl", 400)
    monkeypatch.setenv("HOME", str(tmp_path))
    umask = os.umask(0o027)
    assert run("--data", "~/rows.jsonl", "--steps", 3, "--seq-len", 9999, "--out", "~/o ut") is None
    os.umask(umask)
    said = capsys.readouterr().out
    for words in ("rows.jsonl: 44 rows", "valid.jsonl: 4 rows", "step 3/3", "all layers skipped"):
        assert words in said
    header, *lines, _ = [line.split() for line in said.split("\n\n")[1].splitlines()[:-2]]
    assert header == "task rows base_loss loss same base_exact exact layers".split()
    depths = [float(line[-1]) for line in lines]
    assert len(depths) > 1 and depths == sorted(depths)

    out = tmp_path / "o ut"
    assert sorted(contents(out)) == ["flexidepth.safetensors", "metrics.jsonl", "train.json"]
    assert {oct(file.stat().st_mode & 0o777) for file in out.iterdir()} == {"0o640"}
    assert result(out)["settings"]["seq_len"] == 256  # the context of the model

    prompt = ("--prompt", "7 * 58 =", "--max-new-tokens", 1)
    assert script("--flexidepth", out, *prompt, name="sample.py") is None


def test_no_steps_change_nothing():
    """An evaluation alone would write other routers and adapters than it was given."""
    write_rows("valid.jsonl", "valid.jsonl", 800)
    assert run("--epochs", 0, "--flexidepth", TINY) is None
    gates, expected = (load_file(Path(out, "flexidepth.safetensors")) for out in ("out", TINY))
    assert all(torch.equal(gates[name], tensor) for name, tensor in expected.items())
    assert gates.keys() == expected.keys() and sorted(contents("out"))[1:] == ["train.json"]
    assert [line["exact"] for line in result()["valid"].values()] == [1, 1]


def test_data_is_not_held_out_from_itself():
    """A file named valid.jsonl would be its own held-out rows, and the table one of learnt rows."""
    shutil.move("rows.jsonl", "valid.jsonl")
    assert run("--data", "valid.jsonl", "--epochs", 0) is None and result()["valid"] == {}


def test_recipes(monkeypatch):
    """A recipe would win over an option, above all one of 0, or not be the paper's. A model that is
    not the tiny one would be trained by the tiny one's."""
    def settings(*arguments):
        monkeypatch.setattr(sys, "argv", ["train.py", *arguments])
        return vars(train.parse_args())

    paper = settings("--model", "llama")
    assert paper["recipe"] == "paper" and settings()["recipe"] == "tiny"
    assert paper == paper | {
        "alpha": 1e-3, "lr": 1e-4, "epochs": 3, "batch_size": 64, "clip": 0, "beta2": 0.999,
        "towards_base": False, "both_paths": False, "last_alpha": 1}
    changed = settings("--alpha", "0", "--epochs", "0", "--no-answers-only", "--seq-len", "7")
    assert changed == settings() | {"alpha": 0, "epochs": 0, "answers_only": False, "seq_len": 7}


def test_learning_rate(monkeypatch):
    """The learning rate would not rise over the first 3 % of the steps, or not fall along a cosine.
    A recipe's beta2 would be lost."""
    steps = Mock(side_effect=[None] * 5 + [KeyboardInterrupt])
    monkeypatch.setattr(torch.optim.AdamW, "step", steps)
    run("--steps", 100, "--save-every", 1, "--recipe", "released", "--lr", 0.3)
    expected = [0.1, 0.2] + [0.15 * (1 + math.cos(math.pi * step / 100)) for step in (2, 3, 4)]
    assert [note["lr"] for note in notes()] == pytest.approx(expected)
    group, = train.load_checkpoint(Path("out", "checkpoint.pt"))["optimizer"]["param_groups"]
    assert group["betas"] == (0.9, 0.95) and group["weight_decay"] == 0


# ---- Stopped and gone on: test_distributed.py has runs that were killed --------------------------
def test_gone_on_with_settings_that_may_change(stopped):
    """A run that ran out of memory could not go on with smaller micro-batches, or one whose files
    were moved to another folder, all but metrics.jsonl, could not go on at all."""
    Path("other").mkdir()
    shutil.copy("out/checkpoint.pt", "other")
    write_rows("few.jsonl", "valid.jsonl", 800)
    assert run(*STEPS, "--resume") is None
    assert run(*STEPS, "--resume", "--micro-batch-size", 2, "--save-every", 1, "--out", "other",
               "--checkpoint-activations", "--valid", "few.jsonl") is None
    assert [note["step"] for note in notes()] == [1, 2, 3, 4, 5, 6]
    assert [note["step"] for note in notes("other")] == [5, 6]
    for note, expected in zip(notes("other"), notes()[4:]):
        assert note["lm_loss"] == pytest.approx(expected["lm_loss"], rel=1e-4)


def test_stopped_while_the_table_is_made(monkeypatch, capsys):
    """The table, which may take long, would never be made, or the last steps be trained again. A
    command that always has --resume would fail at its first start."""
    write_rows("valid.jsonl", "valid.jsonl", 800)
    with monkeypatch.context() as patch, pytest.raises(TypeError):
        patch.setattr(torch, "equal", None)
        run("--steps", 3, "--resume")
    before = contents("out")
    assert "flexidepth.safetensors" in before and "train.json" not in before
    assert run("--steps", 3, "--resume") is None and "steps 4 to 3" in capsys.readouterr().out
    assert len(result()["valid"]) == 2
    assert contents("out")["flexidepth.safetensors"] == before["flexidepth.safetensors"]


def test_another_run_is_not_gone_on_with(stopped):
    """The steps of two runs, or of two versions of train.py, would be mixed."""
    before = contents("out")
    write_rows("other.jsonl", "train.jsonl", 80)
    for change, words in {
            "--alpha 0.5": "alpha was 0.00035, here it is 0.5", "--seed 1": "seed was 0, here it",
            "--steps 7": "steps was 6, here it is 7", "--batch-size 4": "batch_size was 8, here it",
            "--recipe smol": "recipe was tiny", f"--flexidepth={TINY}": "flexidepth was None, here",
            "--data other.jsonl": "data was 44 rows of"}.items():
        ended = run(*STEPS, "--resume", *change.split())
        assert ended.startswith("train.py: out is of another run") and f"its {words}" in ended
        assert contents("out") == before
    torch.save({"step": 4, "run": {"gone": "1"}, "trained": 0, "optimizer": 0}, "out/checkpoint.pt")
    assert "its gone was 1, here it is None" in run(*STEPS, "--resume")


def test_what_exists_is_left_alone(stopped):
    """The result of a run would be written over, or an unfinished one, or files of other kinds."""
    Path("empty").mkdir()
    Path("finished").mkdir()
    Path("finished", "train.json").write_text("{}")
    for out, *resume in (["empty"], ["out"], ["finished"], ["finished", "--resume"]):
        before = contents(out)
        assert f"{out} exists; give another --out" in run(*STEPS, "--out", out, *resume)
        assert contents(out) == before


@pytest.mark.parametrize("content", [
    b"", b"no checkpoint\n", bytes(range(256)), b"PK\3\4" + bytes(9999), {"model": 1}, [1], 7,
    Namespace()], ids=str)
def test_a_foreign_checkpoint_is_refused(stopped, content):
    """Another program's checkpoint.pt, or a damaged one, would end in a traceback, or in a page of
    advice how to run the code in it."""
    file = Path("out", "checkpoint.pt")
    torch.save(content, file)
    if isinstance(content, bytes):
        file.write_bytes(content)
    ended = run(*STEPS, "--resume")
    assert f"{file}: not a checkpoint of train.py" in ended and len(ended) < 250


# ---- Refusals ------------------------------------------------------------------------------------
@pytest.mark.parametrize("arguments, words", [
    ("--model no/such/model", "no/such/model"), ("--flexidepth rows.jsonl", "rows.jsonl"),
    ("--data none.jsonl", "none.jsonl"), ("--data bad.jsonl", "bad.jsonl, line 2"),
    ("--valid none.jsonl", "none.jsonl"), ("--valid bad.jsonl", "bad.jsonl, line 2"),
    ("--batch-size 99", "rows.jsonl: 44 rows to use; --batch-size has to be smaller"),
    ("--seq-len 3", "rows.jsonl: 0 rows to use"), ("--out rows.jsonl", "rows.jsonl"),
    ("--out rows.jsonl --resume", "rows.jsonl"), ("--out rows.jsonl/out", "rows.jsonl"),
    ("--lr much", "--lr: invalid non_negative value: 'much'"),
    ("--lr -1", "invalid non_negative"), ("--epochs inf", "invalid non_negative"),
    ("--batch-size 0", "invalid positive_int value: '0'"), ("--steps 1.5", "invalid positive_int"),
    ("--device gpu7", "gpu7"), ("--device cuda:99", "CUDA"), ("--recipe cake", "'cake'")])
def test_refusals(arguments, words):
    """A traceback would come in place of one line, or only after the training."""
    Path("bad.jsonl").write_text('{"text": "a"}\n{oops\n')
    ended = run(*arguments.split())
    assert ended.startswith("train.py: ") and words in ended
    assert not Path("out", "metrics.jsonl").exists()


@pytest.mark.parametrize("file, words", [("model", "the base's own logits are not finite"),
                                         ("flexidepth", "a lower --lr may help")])
def test_losses_that_are_not_finite(file, words):
    """A user would lower the learning rate of a broken base, or look for a fault in a good one."""
    shutil.copytree(TINY, "broken")
    file = f"broken/{file}.safetensors"
    save_file({name: t.fill_(math.nan) for name, t in load_file(file).items()}, file)
    ended = run("--model", "broken", "--flexidepth", "broken", "--recipe", "tiny")
    assert ended.startswith("train.py: step 1: losses nan") and words in ended


def test_dtype_of_the_base(monkeypatch):
    """--dtype would be ignored, or a CPU would compute in a checkpoint's bfloat16, often slowly."""
    load = Mock(side_effect=KeyboardInterrupt)
    monkeypatch.setattr(FlexiDepth, "from_pretrained", load)
    for options in ("cpu",), ("cpu", "--dtype", "bfloat16"), ("mps",):
        run("--device", *options)
    found = [call.kwargs["dtype"] for call in load.mock_calls]
    assert found == [torch.float32, torch.bfloat16, None]


def test_out_of_memory(monkeypatch):
    """A laptop's user would get a traceback in place of the advice that a GPU's user gets."""
    monkeypatch.setattr(torch.optim.AdamW, "step", lambda _: torch.empty(2 ** 60))
    assert "a smaller --micro-batch-size or --checkpoint-activations needs less" in run()


# ---- Where it runs -------------------------------------------------------------------------------
def test_world_size_that_was_left_over(monkeypatch):
    """A WORLD_SIZE that a cluster left over would make a lone process wait for others."""
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    monkeypatch.setenv("WORLD_SIZE", "8")
    monkeypatch.setenv("RANK", "3")
    module = runpy.run_path(str(ROOT / "train.py"))
    assert (module["WORLD"], module["RANK"]) == (1, 0)


# ---- Predictions ---------------------------------------------------------------------------------
def held_out(step):
    write_rows("few.jsonl", "valid.jsonl", step)
    tokenizer = Tokenizer.from_pretrained(TINY)
    return train.load_rows(Path("few.jsonl"), tokenizer, Namespace(seq_len=256, answers_only=True))


def test_gates_in_training_decide_as_in_use():
    """Float32 routers under autocast would decide otherwise than the bfloat16 ones that are used
    later, or their gates would be rounded to 1, where they have no gradient."""
    input_ids, _, _ = train.collate(held_out(97), "cpu")
    model = FlexiDepth.from_pretrained(TINY, flexidepth=TINY, dtype=torch.bfloat16)
    expected = model(input_ids)
    for p in model.parameters():
        p.data = p.data.float() if p.requires_grad else p.data
    out = train.predict(model, input_ids)
    assert torch.equal(out.kept, expected.kept) and torch.equal(out.gates, expected.gates)
    assert out.gates.dtype == torch.float32 and 0 < out.kept.float().mean() < 1
    assert not torch.equal(out.gates, out.gates.bfloat16().float())


def test_the_table_is_that_of_greedy_decoding():
    """The table is made from one pass over rows in batches. It would tell other answers, depths or
    losses than decoding row by row gives."""
    model = FlexiDepth.from_pretrained(TINY, flexidepth=TINY)
    stops = Tokenizer.from_pretrained(TINY).stop_ids
    model.config.threshold = 0.56  # at this one some of the answers are wrong
    rows = held_out(97)
    rows[0].targets[-2] += 1  # an answer that the base does not give
    table = train.evaluate(model, rows, Namespace(micro_batch_size=5, device="cpu"))

    wrong = 0
    for task, line in table.items():
        right, depths, losses, best = [], [], Counter(), defaultdict(list)
        for ids, targets in ((row.ids, row.targets) for row in rows if row.task == task):
            answer = targets[targets != -100]
            found = list(generate(model, ids[None, :-len(answer)], 30, stop_ids=stops))
            right.append([step.token.item() for step in found] == answer.tolist())
            depths += [step.depth.item() for step in found]
            for route in ("learned", "full"):
                logits = model(ids[None, :-1], route=route).logits[0, -len(answer):]
                losses[route] += F.cross_entropy(logits, answer, reduction="sum").item()
                best[route] += logits.argmax(-1).tolist()
        same = [a == b for a, b in zip(best["learned"], best["full"])]
        assert (line["rows"], line["tokens"]) == (len(right), len(same))
        assert line["exact"] == sum(right) / len(right) and line["same"] == sum(same) / len(same)
        assert line["loss"] == pytest.approx(losses["learned"] / len(same), rel=1e-4)
        assert line["base_loss"] == pytest.approx(losses["full"] / len(same), rel=1e-4)
        if all(right):
            assert line["layers"] == pytest.approx(sum(depths) / len(depths))
        wrong += len(right) - sum(right)
    assert 0 < wrong < len(rows)


# ---- The tiny Llama ------------------------------------------------------------------------------
def test_tiny_llama():
    """The base would not be good at its tasks, the gates would not skip a quarter of all layers
    with 99.5 % of its exact match, or the folder would have outgrown the repository."""
    assert sum(file.stat().st_size for file in TINY.iterdir()) < 5e6
    model = FlexiDepth.from_pretrained(TINY, flexidepth=TINY)
    table = train.evaluate(model, held_out(1), Namespace(micro_batch_size=128, device="cpu"))
    assert all(line["base_exact"] >= 0.97 for line in table.values()), table

    mean = {key: sum(line[key] for line in table.values()) / len(table) for key in table["add"]}
    assert mean["exact"] >= 0.995 * mean["base_exact"] and mean["layers"] <= 0.75 * 12
    depth = {task: line["layers"] for task, line in table.items()}
    assert max(depth[task] for task in ("phrase", "repeat", "copy")) < depth["add"]
    assert depth["add"] < depth["multiply"]


def test_validation_rows_of_rules_are_held_out():
    """Rows of the four tasks with a rule could have been learnt by heart from train.jsonl."""
    seen, held_out = ({(row["task"], row["messages"][0]["content"]) for _, row in
                       train.read_jsonl(TINY / f"{name}.jsonl")} for name in ("train", "valid"))
    assert {task for task, _ in seen & held_out} == {"phrase", "multiply"}
