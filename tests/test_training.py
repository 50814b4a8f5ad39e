"""train.py at scale: processes, checkpoints, token files, chunks of logits, what is written at the end.

Run by torchrun, this file is the worker of test_gradients_do_not_depend_on_the_split.
"""
import io
import json
import math
import os
import random
import signal
import subprocess
import sys
import time
from argparse import Namespace
from contextlib import suppress
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

import train
from flexidepth import TRAINED, FlexiDepth, Tokenizer

TINY = ROOT / "tests" / "tiny-llama"
TORCHRUN = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node")
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1"}


def very_different_rows() -> list[train.Row]:
    tokenizer, rng = Tokenizer.from_pretrained(TINY), random.Random(0)
    return [train.tokenize({"messages": [{"role": "user", "content": "7 * 58 =" * rng.randrange(1, 4)}, {
        "role": "assistant", "content": "words " * length}]}, tokenizer, True) for length in (1, 2, 30, 3, 25, 1, 9, 35)]


def settings(**changes) -> Namespace:
    return Namespace(**{"alpha": 1e-3, "micro_batch_size": 2, "device": "cpu", "shard": False, "seed": 0,
                        "checkpoint_activations": False, "batch_size": 8} | changes)


def gradients(args: Namespace, dtype=None) -> dict[str, torch.Tensor]:
    model = FlexiDepth.from_pretrained(TINY, flexidepth=TINY, dtype=dtype)
    figures = train.backward(model, very_different_rows(), args, train.distribute(model, args))
    named = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    return {name: g.full_tensor() if args.shard else g for name, g in named.items()} | {"sums": torch.tensor(figures)}


if __name__ == "__main__":  # one of the processes that torchrun starts
    torch.distributed.init_process_group("gloo")
    result = gradients(settings(shard=sys.argv[2] == "shard", checkpoint_activations=sys.argv[2] == "shard"))
    if train.RANK == 0:
        torch.save(result, sys.argv[1])
    torch.distributed.destroy_process_group()
    sys.exit()


# ---- Processes

@pytest.mark.parametrize("processes, how", [(2, "ddp"), (4, "ddp"), (2, "shard")])
def test_gradients_do_not_depend_on_the_split(tmp_path, processes, how):
    """Means of means, a loss normalised by a process's own tokens, micro-batches that overwrite each other."""
    alone = gradients(settings())
    assert alone["sums"][0] > 0 and all(g.abs().max() > 1e-5 for name, g in alone.items() if "router_head" in name)
    subprocess.run([*TORCHRUN, str(processes), __file__, tmp_path / "grads.pt", how], env=ENVIRONMENT, check=True,
                   stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, timeout=120)
    together = torch.load(tmp_path / "grads.pt", weights_only=True)
    assert together.keys() == alone.keys()
    for name, g in alone.items():
        torch.testing.assert_close(together[name], g, rtol=1e-5, atol=1e-6, msg=name)


def command(out, *more, processes=1):
    start = (sys.executable,) if processes == 1 else (*TORCHRUN, str(processes))
    return [str(part) for part in (*start, ROOT / "train.py", "--steps", 40, "--save-every", 5, "--batch-size", 8,
                                   "--micro-batch-size", 4, "--valid", out.parent / "valid.jsonl", "--out", out, *more)]


def wait_for(found, process):
    for _ in range(600):
        if found() or process.poll() is not None:
            return
        time.sleep(0.05)


@pytest.fixture(scope="module")
def never_stopped(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    rows = (TINY / "valid.jsonl").read_text().splitlines(keepends=True)
    (folder / "valid.jsonl").write_text("".join(rows[:9] + rows[-8:]))  # 17: a process ends up with none
    subprocess.run(command(folder / "whole", "--eval-every", 20, "--full"), env=ENVIRONMENT, check=True, timeout=200)
    return folder


@pytest.mark.parametrize("processes", [1, 2])
def test_resume_is_bit_identical(never_stopped, processes):
    """A schedule, order of rows or optimiser that begins anew; a half checkpoint that ends the run; rows that
    two processes evaluate twice or not at all."""
    out = never_stopped / f"killed-{processes}"
    process = subprocess.Popen(command(out, processes=processes), env=ENVIRONMENT,
                               stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    wait_for(lambda: len(train.checkpoints(out)) == 2, process)
    for file in Path("/proc").glob("[0-9]*/cmdline"):  # torchrun's processes too: they have sessions of their own
        with suppress(OSError):
            if str(out) in file.read_text():
                os.kill(int(file.parent.name), signal.SIGKILL)
    process.wait()
    assert not (out / "flexidepth.safetensors").exists() and len(train.checkpoints(out)) in (2, 3)
    newest = train.checkpoints(out)[-1]
    newest.write_bytes(newest.read_bytes()[:5000])
    again = subprocess.run(command(out, "--resume", processes=processes), env=ENVIRONMENT, text=True,
                           capture_output=True, timeout=200)
    assert f"{newest} is not whole" in again.stdout and "going on from step" in again.stdout, again.stderr
    assert (out / "flexidepth.safetensors").read_bytes() == (never_stopped / "whole/flexidepth.safetensors").read_bytes()
    steps = [json.loads(line)["step"] for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert steps == list(range(1, 41)) and not train.checkpoints(out)
    tables = [json.loads((folder / "train.json").read_text())["valid"] for folder in (out, never_stopped / "whole")]
    for task, line in tables[1].items():
        assert tables[0][task] == pytest.approx(line, rel=1e-5), task


def test_ctrl_c_saves(never_stopped, monkeypatch, capsys):
    """A run whose steps are lost, or that does not say how to go on; gates of a run that did not end."""
    out = never_stopped / "interrupted"
    process = subprocess.Popen(command(out), env=ENVIRONMENT, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    wait_for(lambda: (out / "metrics.jsonl").is_file() and (out / "metrics.jsonl").stat().st_size > 0, process)
    process.send_signal(signal.SIGINT)
    stdout, stderr = process.communicate(timeout=60)
    assert process.returncode == 130 and "--resume" in stdout and stderr == ""
    step = int(train.checkpoints(out)[-1].stem.split("-")[1])
    assert f"stopped after step {step};" in stdout and not (out / "flexidepth.safetensors").exists()
    for folder, more, word in (
            (out, [], "holds an unfinished run"), (never_stopped / "whole", ["--resume"], "the run has ended"),
            (out, ["--resume", "--alpha", "0.5"], "alpha was 0.00035, is 0.5")):
        monkeypatch.setattr(sys, "argv", command(folder, *more)[1:])
        with pytest.raises(SystemExit) as refused:
            train.main()
        err = capsys.readouterr().err
        assert refused.value.code == 2 and word in err and err.count("\n") == 1
    assert int(train.checkpoints(out)[-1].stem.split("-")[1]) == step


def test_a_full_disk_costs_a_checkpoint_and_not_the_run(tmp_path, monkeypatch, capsys):
    """A temporary file left behind, an old checkpoint removed before the new one is there."""
    model = FlexiDepth.from_pretrained(TINY, flexidepth=TINY)
    optimizer, args = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad]), Namespace(out=tmp_path)
    for step in (1, 2, 3):
        train.save_checkpoint(model, optimizer, step, io.BytesIO(), args, {})
    def full(*_):
        raise OSError(28, "No space left on device")
    monkeypatch.setattr(torch, "save", full)
    train.save_checkpoint(model, optimizer, 4, io.BytesIO(), args, {})
    assert "No space left" in capsys.readouterr().out
    assert sorted(os.listdir(tmp_path)) == ["checkpoint-00000002.pt", "checkpoint-00000003.pt"]


def test_two_processes_with_one_row(never_stopped):
    """Processes that wait for each other for ever, or that all train on the same row."""
    (never_stopped / "one.jsonl").write_text('{"text": "one"}\n')
    result = subprocess.run(command(never_stopped / "one", "--data", never_stopped / "one.jsonl", processes=2),
                            env=ENVIRONMENT, text=True, capture_output=True, timeout=120)
    assert result.returncode and "1 rows to use, fewer than --batch-size 8" in result.stderr


# ---- Data

def test_padding_on_lengths_like_tulus():
    """Rows that are padded to the longest of a random few, rows left out or seen twice in an epoch."""
    lengths = np.clip(np.random.default_rng(0).lognormal(6, 1, 20000), 16, 2048).astype(np.int64)
    args = settings(batch_size=64, micro_batch_size=8)
    plan = train.plan_batches(lengths, 937, args)
    assert torch.equal(plan, train.plan_batches(lengths, 937, args))
    rows, seen = torch.from_numpy(lengths)[plan].sort(1)[0].view(-1, 8), torch.bincount(plan.flatten(), minlength=20000)
    assert 1 - rows.sum() / (rows.max(1)[0] * 8).sum() < 0.05
    assert set(seen.tolist()) <= {2, 3} and (seen == 2).sum() < 0.01 * 20000
    assert torch.from_numpy(lengths)[plan].double().mean(1).std() < 3 * lengths.std() / math.sqrt(64 / 8)


def test_token_files(tmp_path, monkeypatch, capsys):
    """Ids cut to 16 bits, answers lost, rows tokenised again for nothing or not again when they must be."""
    tokenizer = Tokenizer.from_pretrained(TINY)
    talk = [{"role": role, "content": f" {role} says\n"} for role in ("system", "user", "assistant", "user", "assistant")]
    data = tmp_path / "rows.jsonl"
    data.write_text("\n".join(json.dumps(row) for row in (
        {"messages": talk[:2]}, {"messages": talk, "task": "talk"}, {"text": "long " * 300})))
    rows = train.Rows(data, tokenizer, tmp_path, settings(seq_len=256, answers_only=True))
    assert len(rows) == 1 and rows[0].task == "talk" and "1 rows of more than 256 tokens" in capsys.readouterr().out
    assert rows.tokens.dtype == np.uint32 and rows[0].ids.tolist() == tokenizer.encode_chat(talk)
    answers = tokenizer.decode(rows[0].ids[rows[0].counted].tolist())
    assert answers == "assistant says<|eot_id|>" * 2
    assert train.Rows(data, tokenizer, tmp_path, settings(seq_len=4096, answers_only=False))[2].counted.all()
    files = set(tmp_path.glob("tokens-*"))
    monkeypatch.setattr(train, "Pool", lambda *_: pytest.fail("tokenised again"))
    train.Rows(data, tokenizer, tmp_path, settings(seq_len=256, answers_only=True))
    monkeypatch.undo()
    data.write_text(data.read_text() + "\n" + json.dumps({"text": "new"}))
    assert len(train.Rows(data, tokenizer, tmp_path, settings(seq_len=256, answers_only=True))) == 2
    assert len(set(tmp_path.glob("tokens-*")) - files) == 2 and not list(tmp_path.glob(".*"))
    monkeypatch.setattr(Tokenizer, "encode_chat", lambda self, messages, add_generation_prompt=False: [
        1, 2, *(3 for message in messages for _ in message["content"])])  # another template
    rows = train.Rows(data, tokenizer, tmp_path, settings(seq_len=256, answers_only=True))
    assert set(rows[0].ids.tolist()) == {1, 2, 3}


# ---- Memory and precision

def test_logits_in_chunks_give_the_whole_loss(monkeypatch):
    """A chunk that is lost or counted twice; logits of a whole batch at once."""
    model = FlexiDepth.from_pretrained(TINY)
    x, targets = torch.randn(50, 96, requires_grad=True), torch.randint(650, (50,))
    loss = F.cross_entropy(model.head(x), targets)
    most = []
    head = model.head
    monkeypatch.setattr(model, "head", lambda x: most.append(len(x)) or head(x))
    monkeypatch.setattr(train, "LOGITS", 7 * model.config.vocab_size)
    chunked, gradient = train.lm_loss(model, x, targets, 50)
    torch.testing.assert_close(chunked, loss.detach())
    torch.testing.assert_close(gradient, torch.autograd.grad(loss, x)[0])
    assert most == [7] * 7 + [1]


def saved_bytes(model, args) -> tuple[int, list]:
    """What autograd keeps for the backward pass of a batch, and the layers whose inputs have a gradient."""
    kept, graph = {}, []
    for layer in model.model["layers"]:
        layer.register_forward_pre_hook(lambda layer, inputs: graph.append(layer.index) if inputs[0].requires_grad else None)
    forward = train.distribute(model, args)
    input_ids = torch.randint(650, (4, 200))
    parameters = {p.data_ptr() for p in model.parameters()}
    def pack(tensor):
        if tensor.data_ptr() not in parameters:
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = forward(input_ids)
    del result
    return sum(kept.values()), graph


def test_memory_of_a_step():
    """A graph of layers that learn nothing; checkpoints that save nothing, or change the gradients."""
    plain, graph = saved_bytes(FlexiDepth.from_pretrained(TINY, flexidepth=TINY), settings())
    assert graph == [7, 8, 9, 10, 11]
    less, _ = saved_bytes(FlexiDepth.from_pretrained(TINY, flexidepth=TINY), settings(checkpoint_activations=True))
    assert less < 0.2 * plain
    for name, g in gradients(settings(checkpoint_activations=True)).items():
        assert torch.equal(g, gradients(settings())[name])


def test_gates_in_training_decide_as_in_inference():
    """Float32 masters under autocast whose gates fall otherwise than those of the bfloat16 copies in use."""
    model = FlexiDepth.from_pretrained(TINY, flexidepth=TINY, dtype=torch.bfloat16)
    used = FlexiDepth.from_pretrained(TINY, flexidepth=TINY, dtype=torch.bfloat16)
    for name, p in model.named_parameters():
        p.data = p.data.float() if TRAINED.match(name) else p.data
    input_ids, _, real = train.collate(very_different_rows(), "cpu")
    with train.autocast(model):
        _, gates, kept = model.hidden_states(input_ids)
    with torch.no_grad():
        _, _, decided = used.hidden_states(input_ids)
    assert gates.requires_grad and gates.dtype == torch.bfloat16 and torch.equal(kept, decided)


# ---- What is watched, and the result

def test_metrics_and_collapse(never_stopped):
    """A figure that is not noted; a collapse that is not told, or a warning for healthy routing."""
    lines = [json.loads(line) for line in (never_stopped / "whole/metrics.jsonl").read_text().splitlines()]
    assert len(lines) == 41 and set(lines[20]["valid"]) == {"phrase", "story"}
    assert set(lines[0]) == {"step", "lm_loss", "skip_loss", "layers", "kept", "grad_norm", "lr", "tokens_per_s", "memory"}
    assert all(line["layers"] == pytest.approx(6 + sum(line["kept"])) for line in lines if "layers" in line)
    assert train.collapse([0.5, 0.98, 0.02], [6, 7, 8]) == ""
    assert "layers [7]: that saves nothing, try a larger --alpha" in train.collapse([0.5, 0.995, 0.5], [6, 7, 8])
    assert "no token keeps ANY routed layer: " in train.collapse([0.0, 0.001], [6, 7])


@pytest.mark.parametrize("shards", [1, 3])
def test_full_folder_in_the_released_layout(never_stopped, tmp_path, shards):
    """A folder that does not load, gates that are not the trained ones, a base that was copied and changed."""
    full, trained = never_stopped / "whole/full", load_file(never_stopped / "whole/flexidepth.safetensors")
    model = FlexiDepth.from_pretrained(TINY, flexidepth=never_stopped / "whole")
    if shards > 1:  # of a base that is itself in shards, with routers to be replaced, in one layer by none
        base, full = tmp_path / "base", tmp_path / "full"
        base.mkdir()
        for i, tensors in enumerate((model.state_dict(), {})):  # routers and the rest in one shard, an old copy too
            save_file(tensors or {"model.norm.weight": torch.zeros(96)}, base / f"model-0000{i + 1}-of-00002.safetensors")
        (base / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {
            name: "model-00001-of-00002.safetensors" for name in model.state_dict()}}))
        for name in ("config.json", "tokenizer.model"):
            (base / name).write_bytes((TINY / name).read_bytes())
        trained = {name: 2 * t for name, t in trained.items() if ".layers.6." not in name}
        save_file(trained, tmp_path / "fewer.safetensors")
        model = FlexiDepth.from_pretrained(TINY, flexidepth=tmp_path / "fewer.safetensors")
        train.write_full(base, tmp_path, model, trained)
    loaded = FlexiDepth.from_pretrained(full)
    for name, t in loaded.state_dict().items():
        assert torch.equal(t, trained.get(name, model.state_dict()[name])), name
    assert not list(full.glob("*.jsonl")) and not (full / "tokenizer.model").samefile(TINY / "tokenizer.model")
    config, index = (json.loads((full / f"{name}.json").read_text()) for name in ("config", "model.safetensors.index"))
    assert config["model_type"] == "ddllama" and config["routing_layers"] == model.config.routing_layers
    assert set(index["weight_map"]) == set(loaded.state_dict())
    assert index["metadata"]["total_size"] == sum(4 * p.numel() for p in loaded.parameters())
    assert Tokenizer.from_pretrained(full).encode("7 * 58 =") == Tokenizer.from_pretrained(TINY).encode("7 * 58 =")
