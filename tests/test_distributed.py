"""train.py in several processes, which torchrun starts: the same gradients, tables and files.

Run by torchrun, this file is the worker. Starting processes takes long, so that each setting is
started once, in a fixture, and the tests look at what it wrote.
"""
import faulthandler
import io
import json
import os
import random
import shutil
import subprocess
import sys
from argparse import Namespace
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TINY = ROOT / "tests" / "tiny-llama"
sys.path.insert(0, str(ROOT))

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

import train
from flexidepth import FlexiDepth, Tokenizer, skip_loss

ALPHA = 1e-3
SETTINGS = ["--model", TINY, "--flexidepth", TINY, "--alpha", ALPHA, "--answers-only",
            "--data", "rows.jsonl", "--batch-size", 8, "--micro-batch-size", 2]
RESUMABLE = ["--steps", 4, "--save-every", 1, "--shard"]


class RecordingAdamW(torch.optim.AdamW):
    """AdamW that keeps the gradients of its last step."""
    gradients = None

    def step(self, *arguments):
        def whole(gradient):
            return gradient.full_tensor() if hasattr(gradient, "full_tensor") else gradient.clone()

        RecordingAdamW.gradients = [
            whole(p.grad) for group in self.param_groups for p in group["params"]]
        return super().step(*arguments)


def run(*arguments):
    """train.main() in this process."""
    sys.argv = ["train.py", *map(str, SETTINGS), *map(str, arguments)]
    train.main()


def gradients(*arguments):
    """The gradients of one step of train.main() in this process."""
    adamw, torch.optim.AdamW = torch.optim.AdamW, RecordingAdamW
    try:
        run("--steps", 1, "--valid", "held-out.jsonl", *arguments)
    finally:
        torch.optim.AdamW = adamw
    return RecordingAdamW.gradients


def copy_what_kill_leaves(out, *copies):
    """Arrange for copies of the folder as it is when its second checkpoint is half written."""
    save, calls = torch.save, []

    def save_and_copy(content, file, **options):
        if isinstance(file, Path) and "checkpoint" in file.name:
            calls.append(file)
            if len(calls) == 2:
                whole = io.BytesIO()
                save(content, whole)
                file.write_bytes(whole.getvalue()[:5000])
                for copy in copies:
                    shutil.copytree(out, copy)
        save(content, file, **options)

    torch.save = save_and_copy


def work_of_two():
    split = gradients("--out", "ddp")
    sharded = gradients("--out", "fsdp", "--shard", "--checkpoint-activations")
    if train.RANK == 0:
        torch.save(split, "ddp.pt")
        torch.save(sharded, "fsdp.pt")
        copy_what_kill_leaves("whole", "killed", "unseen")
    run(*RESUMABLE, "--out", "whole")
    run(*RESUMABLE, "--out", "killed", "--resume")

    # The other process does not see the checkpoint, as may happen in a network's file system.
    # If it then waits for ever, it is ended.
    faulthandler.dump_traceback_later(60, exit=True)
    if train.RANK == 1:
        is_file = Path.is_file
        Path.is_file = lambda self: self.name != "checkpoint.pt" and is_file(self)
    run(*RESUMABLE, "--out", "unseen", "--resume")
    faulthandler.cancel_dump_traceback_later()


def work_of_four():
    split = gradients("--out", "four")
    if train.RANK == 0:
        torch.save(split, "four.pt")


if __name__ == "__main__":  # one of the processes that torchrun starts
    torch.set_num_threads(1)
    # One process group serves all runs.
    torch.distributed.init_process_group("gloo")
    torch.distributed.init_process_group = lambda *arguments, **options: None
    destroy, torch.distributed.destroy_process_group = torch.distributed.destroy_process_group, int
    work_of_two() if train.WORLD == 2 else work_of_four()
    destroy()
    sys.exit()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Rows of very different lengths, 24 to train on and 17 to evaluate, which 2 can't share."""
    folder = tmp_path_factory.mktemp("distributed")
    rng = random.Random(0)
    rows = [{"messages": [
        {"role": "user", "content": "7 * 58 = " * rng.randrange(1, 4)},
        {"role": "assistant", "content": "words " * rng.choice([1, 2, 3, 9, 25, 35])}]}
        for _ in range(24)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    lines = (TINY / "valid.jsonl").read_text().splitlines(keepends=True)
    (folder / "held-out.jsonl").write_text("".join(lines[:9] + lines[-8:]))
    return folder


def torchrun(processes, folder):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone",
               "--nproc-per-node", str(processes), __file__]
    process = subprocess.Popen(command, cwd=folder, env=os.environ | {"OMP_NUM_THREADS": "1"},
                               text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    try:
        out, err = process.communicate(timeout=120)
    except subprocess.TimeoutExpired:
        process.terminate()  # torchrun then ends its processes too
        out, err = process.communicate()
    return subprocess.CompletedProcess(command, process.returncode, out, err)


@pytest.fixture(scope="module")
def alone(folder):
    """What one process finds."""
    before = os.getcwd()
    os.chdir(folder)
    try:
        return gradients("--out", "alone")
    finally:
        os.chdir(before)


@pytest.fixture(scope="module")
def two(folder):
    return torchrun(2, folder)


@pytest.fixture(scope="module")
def four(folder):
    return torchrun(4, folder)


def note(folder, out, step=1):
    lines = (folder / out / "metrics.jsonl").read_text().splitlines()
    return json.loads(lines[step - 1])


# ---- One step ------------------------------------------------------------------------------------
def test_a_step_is_one_of_the_whole_batch(folder, alone):
    """The losses of four micro-batches would be means of means, normalised by a micro-batch's own
    tokens, or the gradients of one would overwrite those of another."""
    tokenizer = Tokenizer.from_pretrained(TINY)
    model = FlexiDepth.from_pretrained(TINY, flexidepth=TINY)
    lines = (folder / "rows.jsonl").read_text().splitlines()
    rows = [train.tokenize(json.loads(line), tokenizer, True) for line in lines]
    settings = json.loads((folder / "alone" / "train.json").read_text())["settings"]
    lengths = np.array([len(row.ids) for row in rows])
    order = train.plan_batches(lengths, 1, Namespace(**settings))
    input_ids, targets, real = train.collate([rows[i] for i in order[0]], "cpu")

    out = model(input_ids)
    lm_loss = F.cross_entropy(out.logits.flatten(0, 1), targets.flatten())
    skip = skip_loss(out.gates, real)
    (lm_loss + ALPHA * skip).backward()
    # The optimiser holds all routers, then all adapters.
    expected = [p.grad for part in (".router.", ".router_proj.")
                for name, p in model.named_parameters() if part in name]
    assert all(g.abs().max() > 1e-5 for g in expected)
    for gradient, other in zip(alone, expected, strict=True):
        torch.testing.assert_close(gradient, other, rtol=1e-4, atol=1e-6)

    found = note(folder, "alone")
    kept = out.kept[real].float().mean(0)
    assert found["lm_loss"] == pytest.approx(lm_loss.item(), rel=1e-5)
    assert found["skip_loss"] == pytest.approx(skip.item(), rel=1e-5)
    assert found["kept"] == pytest.approx(kept.tolist(), rel=1e-5)
    assert found["layers"] == pytest.approx(6 + kept.sum().item(), rel=1e-5)


def check_split(folder, alone, name, started):
    assert (folder / f"{name}.pt").is_file(), started.stderr[-2000:]
    split = torch.load(folder / f"{name}.pt", weights_only=True)
    for gradient, other in zip(split, alone, strict=True):
        torch.testing.assert_close(gradient, other, rtol=1e-4, atol=1e-6)
    found, expected = note(folder, name), note(folder, "alone")
    for key in ("lm_loss", "skip_loss", "layers", "kept", "grad_norm", "lr"):
        assert found[key] == pytest.approx(expected[key], rel=1e-4), key


@pytest.mark.parametrize("name", ["ddp", "fsdp"])
def test_two_processes_give_the_same_gradients(folder, alone, two, name):
    """Each process would normalise by its own tokens, or the gradients would be added where DDP
    and FSDP take their mean. FSDP runs with --checkpoint-activations here."""
    check_split(folder, alone, name, two)


def test_four_processes_give_the_same_gradients(folder, alone, four):
    """As with two, where no process accumulates micro-batches."""
    check_split(folder, alone, "four", four)


@pytest.mark.parametrize("name", ["ddp", "fsdp"])
def test_two_processes_evaluate_as_one(folder, alone, two, name):
    """Of several processes one would evaluate with another model, or wait for the others."""
    tables = []
    for out in ("alone", name):
        file = folder / out / "train.json"
        assert file.is_file(), two.stderr[-2000:]
        tables.append(json.loads(file.read_text())["valid"])
    assert tables[0].keys() == tables[1].keys() == {"phrase", "story"}
    for task, line in tables[0].items():
        assert tables[1][task] == pytest.approx(line, rel=1e-4), task


def same_result(folder, other):
    """Whether the tensors in both folders have the same bits."""
    first, second = (load_file(path / "flexidepth.safetensors") for path in (folder, other))
    assert first.keys() == second.keys()
    return all(torch.equal(tensor, second[name]) for name, tensor in first.items())


# ---- Killed and gone on --------------------------------------------------------------------------
def test_killed_processes_go_on(folder, two):
    """After kill -9 while a checkpoint is written, the half file would be read, or the schedule,
    the order of rows or the optimiser would begin anew. Steps would be noted twice."""
    for out in ("killed", "whole"):
        assert (folder / out / "flexidepth.safetensors").is_file(), two.stderr[-2000:]
    assert "going on after step 1" in two.stdout
    assert same_result(folder / "killed", folder / "whole")
    assert not same_result(folder / "whole", TINY)
    lines = (folder / "killed" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1, 2, 3, 4]
    assert not (folder / "killed" / "checkpoint.pt").exists()


def test_the_first_process_decides_where_to_go_on(folder, two):
    """A process that does not see the checkpoint would begin at the first step, while the other
    goes on: they would wait for each other for ever."""
    assert two.returncode == 0, two.stderr[-2000:]
    assert two.stdout.count("going on after step 1") == 2
    assert same_result(folder / "unseen", folder / "whole")
