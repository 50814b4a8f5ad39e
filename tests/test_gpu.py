"""On NVIDIA GPUs: the CPU's results, and no hidden waiting.

    python -m pytest tests/test_gpu.py

Without a GPU only the first test runs. It takes torch's meta device, whose tensors have shapes and
no values, for a GPU.
"""
import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TINY = ROOT / "tests" / "tiny-llama"
sys.path.insert(0, str(ROOT))

import pytest
import torch
from safetensors.torch import load_file
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from flexidepth import FlexiDepth, KVCache, Tokenizer, compile_decode, generate, skip_loss

DEVICE = "cuda"
COUNT = torch.cuda.device_count()
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")

torch.set_float32_matmul_precision("highest")  # no TF32


def load(device, dtype=torch.float32, **options):
    return FlexiDepth.from_pretrained(TINY, TINY, device=device, dtype=dtype, **options)


def tiny_ids(device):
    """Eight rows of 25 tokens, of all tasks of the tiny Llama."""
    lines = (TINY / "valid.jsonl").read_text().splitlines()[::37]
    encode = Tokenizer.from_pretrained(TINY).encode_chat
    rows = [encode(json.loads(line)["messages"])[:25] for line in lines]
    return torch.tensor([row for row in rows if len(row) == 25][:8], device=device)


def train_loss(model, ids, route="learned"):
    """The loss of a step of training, in which routers and adapters are float32, and kept."""
    dtype = model.lm_head.weight.dtype
    for p in model.parameters():
        p.data = p.data.float() if p.requires_grad else p.data
    with torch.autocast(ids.device.type, dtype, enabled=dtype != torch.float32):
        logits, gates, kept = model(ids[:, :-1], route=route)
    loss = torch.nn.functional.cross_entropy(logits.float().mT, ids[:, 1:])
    return loss + 1e-3 * skip_loss(gates, ids[:, 1:] >= 0), kept


# ---- Without a GPU -------------------------------------------------------------------------------
class OneDevice(TorchDispatchMode):
    """Fails where an operation takes tensors of two devices. Counts the copies between devices."""
    copies = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **kwargs or {})
        given, found = ({t.device.type for t in tree_leaves(tree) if isinstance(t, torch.Tensor)}
                        for tree in ((args, kwargs), (args, kwargs, out)))
        assert len(given) <= 1, f"{function} mixes devices"
        self.copies += len(found) > 1
        return out


@pytest.mark.parametrize("kept", [0, 3, 10])
def test_only_the_decisions_wait_for_the_device(folder, monkeypatch, kept):
    """A tensor may be made on the CPU in the middle of the model, or a value asked for, on which
    a GPU waits. kept: what each of the two routed layers is told when it asks how many of 10 tokens
    run it. Any other question fails on the meta device."""
    model = FlexiDepth.from_pretrained(folder).to("meta")
    waits = []
    monkeypatch.setattr(torch.Tensor, "__int__", lambda tensor: waits.append(tensor) or kept)
    ids = torch.zeros(2, 5, dtype=torch.int64, device="meta")
    with OneDevice() as operations:
        for training in (True, False):  # In training mode there is no waiting at all.
            out = model.train(training)(ids)
            (out.logits.sum() + out.gates.sum()).backward()
        cache = KVCache(model.config, 2, 10, "meta")
        with torch.no_grad():
            model(ids, cache)
            model(ids, cache)
        # `generate` asks, at each token, if the logits are finite and if all rows have ended.
        answers = iter([True, False] * 3)
        monkeypatch.setattr(torch.Tensor, "__bool__", lambda tensor: next(answers))
        tokens = list(generate(model, torch.zeros(10, 1, dtype=torch.int64), 3, stop_ids=[1]))
    assert len(tokens) == 3 and len(waits) == 6 * 2
    assert operations.copies == 7 * 2 + 1  # cosines and sines of each forward pass, and the prompt
    assert all(p.grad.device.type == "meta" for p in model.parameters() if p.requires_grad)


# ---- The CPU's results ---------------------------------------------------------------------------
@needs_gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_logits_gates_and_decisions(dtype):
    """A kernel of the GPU may compute something else. All models take the decisions of the CPU in
    float32, so that one flipped gate does not change all that follows. Errors in bfloat16 are
    compared with the CPU's own. The float32 routers of training have to decide as rounded ones."""
    def as_the_reference(layer, gate):
        return expected.kept[..., reference.config.routing_layers.index(layer)].to(gate.device)

    reference = load("cpu")
    ids = tiny_ids("cpu")[:, :-1]
    with torch.no_grad():
        expected = reference(ids)
        on_cpu, on_gpu = (load(device, dtype)(ids.to(device), route=as_the_reference)
                          for device in ("cpu", DEVICE))
        used = load(DEVICE, dtype)(ids.to(DEVICE))
        _, kept = train_loss(load(DEVICE, dtype), tiny_ids(DEVICE))

    for right, cpu, gpu in zip(expected[:2], on_cpu[:2], on_gpu[:2]):
        rounding, error = (cpu.float() - right).abs(), (gpu.float().cpu() - right).abs()
        assert error.mean() <= 1.5 * rounding.mean() + 1e-5
        assert error.max() <= 4 * rounding.max() + 1e-4
    assert torch.equal(used.kept, kept)


@needs_gpu
@pytest.mark.parametrize("compiled", [False, True], ids=["plain", "compiled"])
@pytest.mark.parametrize("prompts", [["Finish: the early bird"], ["38 + 47 =", "52 + 16 ="]])
def test_generated_tokens_and_depths(prompts, compiled):
    """Decoding may give other tokens or depths than on the CPU, alone or in a batch, and through
    torch.compile, which makes Triton's code there."""
    tokenizer = Tokenizer.from_pretrained(TINY)
    chats = [[{"role": "user", "content": prompt}] for prompt in prompts]
    ids = torch.tensor([tokenizer.encode_chat(chat, True) for chat in chats])
    model = load(DEVICE)
    if compiled:
        compile_decode(model)
    expected, found = ([(step.token.tolist(), step.depth.tolist()) for step in generate(m, ids, 12)]
                       for m in (load("cpu"), model))
    assert found == expected


# ---- Training ----------------------------------------------------------------------------------
@needs_gpu
@pytest.mark.parametrize("processes", {0, 1, COUNT})
def test_a_run_gives_the_cpus_result(tmp_path, processes):
    """train.py may train something else on a GPU, or on several. processes: 0 is no torchrun."""
    def call(out, device, processes):
        launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", processes]
        command = [sys.executable, *(launcher if processes else []), ROOT / "train.py", "--model",
                   TINY, "--flexidepth", TINY, "--data", TINY / "valid.jsonl", "--steps", 4,
                   "--batch-size", 4 * max(1, COUNT), "--micro-batch-size", 2, "--device", device,
                   "--out", tmp_path / out]
        env = os.environ | {"TORCH_ALLOW_TF32_CUBLAS_OVERRIDE": "0"}  # Some images switch it on.
        return subprocess.run([*map(str, command)], env=env, text=True, stderr=subprocess.PIPE)

    done = call("gpu", DEVICE, processes)
    assert done.returncode == 0, done.stderr[-4000:]
    call("cpu", "cpu", 0)

    notes = [[json.loads(line) for line in open(tmp_path / out / "metrics.jsonl")]
             for out in ("gpu", "cpu")]
    for note, other in zip(*notes, strict=True):
        for key in ("step", "lm_loss", "skip_loss", "grad_norm", "lr"):
            assert note[key] == pytest.approx(other[key], rel=0.01), (note, other)

    # AdamW may turn a rounding error into a whole step where a gradient is near zero, so that the
    # distance of all tensors together is compared with the way that they went.
    start, result, right = (load_file(folder / "flexidepth.safetensors")
                            for folder in (TINY, tmp_path / "gpu", tmp_path / "cpu"))
    error, moved = (sum((other[name] - right[name]).square().sum() for name in right)
                    for other in (result, start))
    assert error <= 0.01**2 * moved
