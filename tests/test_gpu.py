"""On NVIDIA GPUs: the CPU's results, no hidden waiting, and what the 8B's shape takes there.

    python -m pytest tests/test_gpu.py

Without a GPU only the first test runs. It takes torch's meta device, whose tensors have shapes and
no values, for a GPU. Run as a script, this file is train.py, and copies to stopped/ what a run
leaves that is stopped after its first checkpoint.
"""
import functools
import itertools
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
import warnings
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TINY = ROOT / "tests" / "tiny-llama"
sys.path.insert(0, str(ROOT))

import pytest
import torch
from safetensors.torch import load_file
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import train
from flexidepth import (
    Config, FlexiDepth, KVCache, Tokenizer, compile_decode, generate, skip_loss)

DEVICE = "cuda"
COUNT = torch.cuda.device_count()
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
SHAPE_8B = {"vocab_size": 128256, "hidden_size": 4096, "intermediate_size": 14336,
            "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8,
            "max_position_embeddings": 8192, "rms_norm_eps": 1e-5, "rope_theta": 500000.0}


if __name__ == "__main__":  # one of the processes of `run`
    save = train.save_checkpoint

    def save_and_copy(file, *rest):
        save(file, *rest)
        if train.RANK == 0 and not Path("stopped").exists():
            shutil.copytree(file.parent, "stopped")

    train.save_checkpoint = save_and_copy
    train.main()
    sys.exit()

torch.set_float32_matmul_precision("highest")  # no TF32


def load(device, dtype=torch.float32, **options):
    return FlexiDepth.from_pretrained(TINY, TINY, device=device, dtype=dtype, **options)


def tiny_rows():
    """Rows of all tasks of the tiny Llama."""
    tokenizer = Tokenizer.from_pretrained(TINY)
    lines = (TINY / "valid.jsonl").read_text().splitlines()[::37]
    return [train.tokenize(json.loads(line), tokenizer, True) for line in lines]


# ---- Without a GPU -------------------------------------------------------------------------------
class OneDevice(TorchDispatchMode):
    """Fails where an operation takes tensors of two devices. Counts the copies between devices."""
    copies = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        def devices(tree):
            return {t.device.type for t in tree_leaves(tree) if isinstance(t, torch.Tensor)}

        out = function(*args, **kwargs or {})
        assert len(devices((args, kwargs))) <= 1, f"{function} mixes devices"
        self.copies += len(devices((args, kwargs, out))) > 1
        return out


@pytest.mark.parametrize("kept", [0, 3, 10])
def test_only_the_decisions_wait_for_the_device(monkeypatch, kept):
    """A tensor may be made on the CPU in the middle of the model, or a value asked for, on which
    a GPU waits. kept: what each of the routed layers is told when it asks how many of 10 tokens
    run it. Any other question fails on the meta device."""
    model = load("cpu").to("meta")
    waits = []
    monkeypatch.setattr(torch.Tensor, "__int__", lambda tensor: waits.append(tensor) or kept)
    ids = torch.zeros(2, 5, dtype=torch.int64, device="meta")
    with OneDevice() as operations:
        out = model(ids)
        (out.logits.sum() + skip_loss(out.gates)).backward()
        cache = KVCache(model.config, 2, 10, "meta")
        with torch.no_grad():
            model(ids, cache)
            model(ids, cache)
        # `generate` asks, at each token, if the logits are finite and if all rows have ended.
        answers = itertools.cycle((True, False))
        monkeypatch.setattr(torch.Tensor, "__bool__", lambda tensor: next(answers))
        tokens = list(generate(model, ids, 3, stop_ids=[1]))
    monkeypatch.undo()
    assert len(tokens) == 3 and len(waits) == 6 * len(model.config.routing_layers)
    assert operations.copies == 6 * 2  # the cosines and sines of each forward pass
    gradients = [p.grad for p in model.parameters() if p.requires_grad]
    assert all(gradient.device.type == "meta" for gradient in gradients)


# ---- The CPU's results ---------------------------------------------------------------------------
@needs_gpu
@pytest.mark.parametrize("lengths", [[24], [7, 1, 16]], ids=["whole", "chunks"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_logits_gates_and_decisions(dtype, lengths):
    """A kernel of the GPU may compute something else, or a prompt in chunks may see other tokens
    than a whole one. All models take the decisions of the CPU in float32, so that one flipped gate
    does not change all that follows. Errors in bfloat16 are compared with the CPU's own."""
    reference = load("cpu")
    rows = [row.ids[:24] for row in tiny_rows() if len(row.ids) >= 24]
    ids = torch.stack([torch.from_numpy(row).long() for row in rows[:8]])
    routed = reference.config.routing_layers
    threshold = reference.config.threshold
    with torch.no_grad():
        expected = reference(ids)

        def as_the_reference(layer, gate):
            here = slice(cache.length, cache.length + gate.shape[1])
            return expected.kept[:, here, routed.index(layer)].to(gate.device)

        found = []
        for device in ("cpu", DEVICE):
            model = load(device, dtype)
            cache = KVCache(model.config, 8, 24, device, dtype)
            parts = [model(part.to(device), cache, as_the_reference)
                     for part in ids.split(lengths, 1)]
            found.append((torch.cat([part.logits for part in parts], 1).float().cpu(),
                          torch.cat([part.gates for part in parts], 1).cpu()))
        learned = model(ids.to(DEVICE))

    for i, right in enumerate((expected.logits, expected.gates)):
        rounding = (found[0][i] - right).abs()
        error = (found[1][i] - right).abs()
        assert error.mean() <= 1.5 * rounding.mean() + 1e-5
        assert error.max() <= 4 * rounding.max() + 1e-4
    near = (expected.gates - threshold).abs() < (1e-3 if dtype == torch.float32 else 0.05)
    flipped = (found[1][1].to(dtype) > threshold) != expected.kept
    assert not (flipped & ~near).any() and near.float().mean() < 0.02
    assert torch.equal(learned.kept, learned.gates.to(dtype) > threshold)


@needs_gpu
@pytest.mark.parametrize("compiled", [False, True], ids=["plain", "compiled"])
@pytest.mark.parametrize("prompts", [["Finish: the early bird"], ["38 + 47 =", "52 + 16 ="]])
def test_generated_tokens_and_depths(prompts, compiled):
    """Decoding may give other tokens or depths than on the CPU, alone or in a batch, and through
    torch.compile, which makes Triton's code there."""
    tokenizer = Tokenizer.from_pretrained(TINY)
    chats = [[{"role": "user", "content": prompt}] for prompt in prompts]
    ids = torch.tensor([tokenizer.encode_chat(chat, True) for chat in chats])
    found = []
    for device in ("cpu", DEVICE):
        model = load(device)
        if compiled and device == DEVICE:
            compile_decode(model)
        answer = generate(model, ids, 12, stop_ids=tokenizer.stop_ids)
        found.append([(token.tolist(), depth.tolist()) for token, depth in answer])
    assert found[1] == found[0]


# ---- Training ------------------------------------------------------------------------------------
def keep_none(layer_index, gate):
    return torch.zeros_like(gate, dtype=torch.bool)


@needs_gpu
@pytest.mark.parametrize("route", ["learned", train.keep_all, keep_none])
def test_gradients(route):
    """The backward pass may be another than the CPU's, also where no token takes a path."""
    rows = tiny_rows()[:8]
    found = []
    for device in ("cpu", DEVICE):
        model = load(device)
        input_ids, targets, real = train.collate(rows, device)
        losses, _, gates, kept = train.TokenLosses(model)(input_ids, targets, route)
        (losses.mean() + 1e-3 * skip_loss(gates, real)).backward()
        found.append((kept.cpu(), [p.grad.cpu() for p in model.parameters() if p.requires_grad]))
    (kept, gradients), (other_kept, others) = found
    assert torch.equal(other_kept, kept)
    for gradient, other in zip(gradients, others, strict=True):
        torch.testing.assert_close(other, gradient, rtol=1e-3, atol=1e-5)


@needs_gpu
def test_training_in_bfloat16():
    """Losses may not be finite or not fall, or float32 gates may decide otherwise than rounded
    ones in use."""
    model = load(DEVICE, torch.bfloat16, trained_dtype=torch.float32)
    used = load(DEVICE, torch.bfloat16)
    token_losses = train.TokenLosses(model)
    rows = tiny_rows()[:8]
    input_ids, targets, real = train.collate(rows, DEVICE)
    with torch.no_grad():
        assert torch.equal(token_losses(input_ids, targets)[3], used(input_ids).kept)

    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-3, weight_decay=0.0, fused=True)
    values = []
    for _ in range(8):
        losses, _, gates, _ = token_losses(input_ids, targets)
        loss = losses.mean() + 1e-3 * skip_loss(gates, real)
        loss.backward()
        values.append(loss.item())
        optimizer.step()
        optimizer.zero_grad()
    assert all(p.isfinite().all() and p.dtype == torch.float32 for p in trained)
    assert values[-1] < values[0]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A function that trains for four steps, once for the same arguments, and returns the folder
    that has the run's out/ and stopped/. processes: 0 is without torchrun. source: the folder of a
    run, which is then resumed from its stopped/."""
    data = tmp_path_factory.mktemp("data") / "rows.jsonl"
    data.write_text("".join((TINY / "train.jsonl").read_text().splitlines(True)[::20]))
    valid = data.with_name("valid.jsonl")
    valid.write_text("".join((TINY / "valid.jsonl").read_text().splitlines(True)[::97]))

    @functools.cache
    def run(processes, device, *options, source=None):
        folder = tmp_path_factory.mktemp("run")
        if source:
            shutil.copytree(source / "stopped", folder / "out")
        launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", processes]
        command = [sys.executable, *(launcher if processes else []), __file__,
                   "--model", TINY, "--flexidepth", TINY, "--data", data, "--steps", 4,
                   "--save-every", 1, "--batch-size", 4 * COUNT, "--micro-batch-size", 2,
                   "--device", device, *options]
        # Some images of Docker switch TF32 on, by this variable.
        env = os.environ | {"OMP_NUM_THREADS": "1", "TORCH_ALLOW_TF32_CUBLAS_OVERRIDE": "0"}
        done = subprocess.run([*map(str, command)], cwd=folder, env=env, text=True, timeout=600,
                              capture_output=True)
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
        return folder

    return run


def check_run(folder, expected, first_step=True):
    """The gradients of the first step, the notes on all steps and the result have to be close."""
    if first_step:
        moments = []
        for path in (folder, expected):
            saved = torch.load(path / "stopped" / "checkpoint.pt", weights_only=True)
            states = saved["state"][1]["state"]
            moments.append({name: state["exp_avg"] for name, state in states.items()})
        torch.testing.assert_close(*moments, rtol=1e-3, atol=1e-6)  # a tenth of the gradients

    first, second = ([json.loads(line) for line in open(path / "out" / "metrics.jsonl")]
                     for path in (folder, expected))
    for note, other in zip(first, second, strict=True):
        for key in ("step", "lm_loss", "skip_loss", "grad_norm", "lr"):
            assert note[key] == pytest.approx(other[key], rel=0.01), (note, other)

    # AdamW may turn a rounding error into a whole step where a gradient is near zero, so that the
    # distance of all tensors together is compared with the way that they went.
    start, result, right = (load_file(path / "flexidepth.safetensors")
                            for path in (TINY, folder / "out", expected / "out"))
    error = sum((result[name] - right[name]).square().sum() for name in right)
    moved = sum((right[name] - start[name]).square().sum() for name in right)
    assert error <= 0.01**2 * moved


@needs_gpu
def test_a_run_gives_the_cpus_result(run):
    """train.py may train something else on a GPU."""
    check_run(run(0, DEVICE), run(0, "cpu"))


@needs_gpu
@pytest.mark.parametrize("device", [DEVICE, "cpu"])
def test_stopped_and_gone_on(run, device):
    """A run that was stopped on a GPU or a CPU may go on otherwise on a GPU, or not at all."""
    whole = run(0, device)
    check_run(run(0, DEVICE, "--resume", source=whole), whole, first_step=False)


@needs_gpu
@pytest.mark.parametrize("processes, options", [(1, []), (COUNT, []), (COUNT, ["--shard"])])
def test_all_gpus_together(run, processes, options):
    """Processes that NCCL connects may add up other gradients than one process, or may not go on
    from a checkpoint."""
    if options and COUNT < 2:
        pytest.skip("--shard needs at least two GPUs")
    whole = run(processes, DEVICE, *options)
    check_run(whole, run(0, DEVICE))
    check_run(run(processes, DEVICE, *options, "--resume", source=whole), whole, first_step=False)


# ---- Waiting, memory and speed -------------------------------------------------------------------
@needs_gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("part", ["training", "prompt", "token"])
def test_one_wait_for_each_routed_layer(part, dtype):
    """The CPU may wait for the GPU more often than to learn how many tokens run a layer."""
    model = load(DEVICE, dtype)
    ids = torch.arange(48, device=DEVICE).view(2, 24)
    cache = KVCache(model.config, 2, 25, DEVICE, dtype) if part != "training" else None
    with torch.set_grad_enabled(part == "training"), warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        if part == "token":
            model(ids, cache)
            ids = ids[:, :1]
        torch.cuda.set_sync_debug_mode("warn")
        try:
            out = model(ids, cache)
            if part == "training":
                out.logits.sum().backward()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    lines = [f"{w.filename}:{w.lineno}" for w in caught if "synchronizing CUDA" in str(w.message)]
    assert len(lines) == len(model.config.routing_layers), lines


@needs_gpu
def test_memory_and_speed_of_the_8b(capsys):
    """A training step of the 8B's shape may not fit the paper's GPUs, of 40 GB. The time of a token
    with and without a quarter of the layers is printed, not judged."""
    if torch.cuda.get_device_properties(DEVICE).total_memory < 40e9:
        pytest.skip("needs a GPU of at least 40 GB")
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device(DEVICE):
            model = FlexiDepth(Config(**SHAPE_8B))
    finally:
        torch.set_default_dtype(torch.float32)
    routed = model.config.routing_layers
    for index in routed:
        model.model.layers[index].router.float()
        model.model.layers[index].router_proj.float()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4, weight_decay=0.0, fused=True)
    ids = torch.randint(SHAPE_8B["vocab_size"], (1, 2049), device=DEVICE)

    torch.cuda.reset_peak_memory_stats()
    losses, _, gates, kept = train.TokenLosses(model)(ids[:, :-1], ids[:, 1:])
    (losses.mean() + 1e-3 * skip_loss(gates)).backward()
    optimizer.step()
    memory = torch.cuda.max_memory_allocated()
    assert losses.isfinite().all() and all(p.grad.isfinite().all() for p in trained)

    def three_quarters(layer, gate):
        return torch.full_like(gate, layer - routed[0] >= model.config.num_hidden_layers // 4)

    model.to(torch.bfloat16)
    seconds = {"full": [], "three_quarters": []}
    answers = [generate(model, ids[:, :128], 25, route=route) for route in ("full", three_quarters)]
    for _ in range(25):  # the prompt and four tokens warm up
        for times, answer in zip(seconds.values(), answers):
            torch.cuda.synchronize()
            started = time.perf_counter()
            next(answer)
            torch.cuda.synchronize()
            times.append(time.perf_counter() - started)
    with capsys.disabled():
        print(f"\n{torch.cuda.get_device_name()}, torch {torch.__version__}, the 8B's shape: a step"
              f" of 2,048 tokens, {kept.float().mean():.0%} kept: {memory / 1e9:.1f} GB")
        for name, times in seconds.items():
            print(f"a token, route {name}: {1000 * statistics.median(times[5:]):.2f} ms")
    assert memory < 40e9
