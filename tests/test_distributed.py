"""Gradients and files of train.py in one process, and in several in which torchrun runs this."""
import functools
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TINY = ROOT / "tests" / "tiny-llama"
sys.path.insert(0, str(ROOT))

import pytest
import torch
from safetensors.torch import load_file
from torch.autograd.graph import saved_tensors_hooks

import train
from flexidepth import DecoderLayer, FlexiDepth, Tokenizer

SETTINGS = ["--model", TINY, "--recipe", "tiny", "--data", "rows.jsonl", "--valid",
            "held-out.jsonl", "--batch-size", 8]


def run(*arguments):
    """train.main() in this process."""
    sys.argv = ["train.py", *map(str, SETTINGS), *map(str, arguments)]
    train.main()


def gradients(micro_batch_size, out, *arguments):
    """The gradients of one step of train.main() in this process, as AdamW gets them."""
    found = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.optim.AdamW, "step", lambda self: found.extend(
            p.grad.clone() for p in self.param_groups[0]["params"]))
        run("--steps", 1, "--micro-batch-size", micro_batch_size, "--out", out, *arguments)
    return found


def run_and_go_on(whole, killed):
    """A run into the folder `whole`. Another one goes on in `killed`, a copy of it as it was while
    its second checkpoint was half written."""
    save = torch.save

    def save_and_copy(content, file):
        save(content, file)
        if content["step"] == 2:
            data = file.read_bytes()
            file.write_bytes(data[:5000])
            shutil.copytree(whole, killed)
            file.write_bytes(data)

    torch.save = save_and_copy
    run("--steps", 4, "--save-every", 1, "--out", whole)
    torch.save = save
    run("--steps", 4, "--save-every", 1, "--out", killed, "--resume")


if __name__ == "__main__":  # one of the processes that torchrun starts
    torch.set_num_threads(1)
    # One process group serves all runs. Each begins when all processes are there.
    torch.distributed.init_process_group("gloo")
    torch.distributed.init_process_group = torch.distributed.barrier
    destroy, torch.distributed.destroy_process_group = torch.distributed.destroy_process_group, int
    # The first routers of each process are others, as on machines of different kinds.
    seed, torch.manual_seed = torch.manual_seed, lambda number: seed(number + train.RANK)

    size = {2: 1, 4: 3}[train.WORLD]  # of four processes one gets no row of the eight
    torch.save(gradients(size, train.WORLD), f"{train.WORLD}-{train.RANK}.pt")
    if train.WORLD == 2:
        run_and_go_on("whole-2", "killed-2")
        data = ["rows.jsonl", "held-out.jsonl"][train.RANK]
        try:  # without a step, in which they would wait for each other
            run("--epochs", 0, "--data", data, "--out", "mixed")
        except ValueError as error:
            Path(f"refused-{train.RANK}").write_text(str(error))
    destroy()
    sys.exit()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Rows of very different lengths, 24 to train on and 17 held out, and the current folder."""
    folder = tmp_path_factory.mktemp("distributed")
    rows = [{"messages": [{"role": "user", "content": "7 * 58 = " * (1 + i % 4)},
                          {"role": "assistant", "content": "words " * length}]}
            for i, length in enumerate([1, 2, 3, 9, 25, 35] * 4)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    lines = (TINY / "valid.jsonl").read_text().splitlines(keepends=True)
    (folder / "held-out.jsonl").write_text("".join(lines[:9] + lines[-8:]))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(sys, "argv", sys.argv)
        yield folder


@pytest.fixture(scope="module")
def alone(folder):
    """The gradients of one process, in micro-batches of two rows."""
    return gradients(2, "alone")


@functools.cache
def torchrun(processes):
    """Start this file in several processes, which takes long, so only once. The tests look at what
    they wrote. Returns what they print."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone",
               "--nproc-per-node", str(processes), __file__]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, text=True, stdout=pipe, stderr=pipe) as process:
        try:
            out, err = process.communicate(timeout=200)
        finally:
            process.terminate()  # torchrun then ends its processes too
    assert process.returncode == 0, err[:3000]
    return out


def notes(out):
    return [json.loads(line) for line in Path(out, "metrics.jsonl").read_text().splitlines()]


def assert_close(found, expected):
    for gradient, other in zip(found, expected, strict=True):
        torch.testing.assert_close(gradient, other, rtol=1e-5, atol=3e-7)


# ---- One process ---------------------------------------------------------------------------------
def naive(model, rows, towards_base):
    """L_lm, L_skip and the mean depth, row by row and thus without padding."""
    lm = skip = depth = 0
    for row in rows:
        out = model(row.ids[None, :-1])
        counted = row.targets[1:] != -100
        log_probs = out.logits[0, counted].log_softmax(-1)
        if towards_base:
            base = model(row.ids[None, :-1], route="full").logits[0, counted].softmax(-1)
            lm += (base * (base.log() - log_probs)).sum()
        else:
            lm -= log_probs.gather(-1, row.targets[1:][counted][:, None]).sum()
        skip += out.gates.sum(-1).square().sum()
        depth += (6 + out.kept.sum(-1)).sum()  # six plain layers
    tokens = sum(len(row.ids) - 1 for row in rows)
    return lm / sum((row.targets[1:] != -100).sum() for row in rows), skip / tokens, depth / tokens


@pytest.mark.parametrize("recipe", ["tiny", "smol"])
def test_a_step_is_one_of_the_whole_batch(folder, recipe):
    """The losses of micro-batches would be means of means, each normalised by its own tokens, or
    padding would count. Or "smol" would not train towards the base's prediction, not give gates the
    gradient of the path not taken, or not lower the price, in the second step of two to 0.55."""
    found = gradients(3, recipe, "--recipe", recipe, "--alpha", 1e-3, "--steps", 2)
    found = found[len(found) // 2:]
    torch.manual_seed(0)
    model = FlexiDepth.from_pretrained(TINY).train(recipe == "smol")
    tokenizer = Tokenizer.from_pretrained(TINY)
    rows = [train.tokenize(json.loads(line), tokenizer, recipe == "tiny")
            for line in Path("rows.jsonl").read_text().splitlines()]
    batch = train.plan_batches(24, 2, 8, 0)[1]
    lm, skip, depth = naive(model, [rows[i] for i in batch], recipe == "smol")
    (lm + (1e-3 if recipe == "tiny" else 5.5e-4) * skip).backward()
    expected = [p.grad for p in model.parameters() if p.requires_grad]
    assert all(g.abs().max() > 1e-5 for g in expected)
    assert_close(found, expected)

    note = notes(recipe)[1]
    assert note["lm_loss"] == pytest.approx(lm.item(), rel=1e-5)
    assert note["skip_loss"] == pytest.approx(skip.item(), rel=1e-5)
    assert note["layers"] == pytest.approx(depth.item(), rel=1e-5)


@pytest.mark.parametrize("size", [1, 3, 8])
def test_any_micro_batch_gives_the_same_gradients(folder, alone, size):
    """Micro-batches would not add up, or a last one that is not full would count for more."""
    assert_close(gradients(size, f"micro-{size}"), alone)


def test_checkpoint_activations(folder):
    """Layers computed again would give other gradients, or would still keep their activations."""
    results = []
    for options in (["kept"], ["again", "--checkpoint-activations"]):
        sizes = {}

        def pack(tensor):
            sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with saved_tensors_hooks(pack, lambda tensor: tensor):
            results.append((gradients(8, *options), sum(sizes.values())))
    (expected, memory), (found, less) = results
    assert all(map(torch.equal, found, expected)) and less < 0.5 * memory


def test_nothing_to_learn_where_the_model_is_the_base(folder, monkeypatch):
    """The divergence from the base, or its gradient, would not be 0 where all layers run with gates
    of 1, so that FlexiDepth is the base: it would be that from other tokens or another model."""
    def decide(self, h, route):
        gate = torch.ones(h.shape[:2])
        return gate, gate > 0.5

    monkeypatch.setattr(DecoderLayer, "decide", decide)
    found = gradients(8, "base", "--recipe", "smol")
    assert notes("base")[0]["lm_loss"] == 0 and not any(g.any() for g in found)


def test_clipping(folder):
    """Gradients would be clipped in the paper's recipe, or not in that of the released weights."""
    paper, released = (gradients(8, recipe, "--recipe", recipe, "--alpha", 10)
                       for recipe in ("paper", "released"))
    norm = notes("released")[0]["grad_norm"]
    assert norm > 2 and norm == notes("paper")[0]["grad_norm"]
    assert_close(released, [g / norm for g in paper])


# ---- Several processes ---------------------------------------------------------------------------
@pytest.mark.parametrize("processes", [2, 4])
def test_several_processes_are_one(folder, alone, processes):
    """Each process would normalise by its own tokens, begin with routers of its own, or have
    gradients of its own. Two of them have four micro-batches each, of four the last has none."""
    torchrun(processes)
    for rank in range(processes):
        assert_close(torch.load(f"{processes}-{rank}.pt"), alone)
    found, expected = (notes(out)[0] | json.loads(Path(out, "train.json").read_text())["valid"]
                       for out in (str(processes), "alone"))
    assert found.keys() == expected.keys() > {"layers", "phrase", "story"}
    for name, value in expected.items():
        assert found[name] == pytest.approx(value, rel=1e-4), name


@pytest.mark.parametrize("processes", [1, 2])
def test_killed_and_gone_on(folder, capsys, processes):
    """After kill -9 while a checkpoint is written, the half file would be read, or the schedule,
    the order of rows or the optimiser would begin anew, in one process or in all."""
    whole, killed = f"whole-{processes}", f"killed-{processes}"
    if processes == 1:
        run_and_go_on(whole, killed)
        said = capsys.readouterr().out
    else:
        said = torchrun(2)
    assert said.count("steps 2 to 4") == 1
    assert [note["step"] for note in notes(killed)] == [1, 2, 2, 3, 4]
    assert notes(killed)[2:] == notes(whole)[1:]
    found, expected = (load_file(Path(out, "flexidepth.safetensors")) for out in (killed, whole))
    assert found.keys() == expected.keys()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in found.items())
    assert sorted(os.listdir(killed)) == ["flexidepth.safetensors", "metrics.jsonl", "train.json"]


def test_machines_with_other_data_are_refused(folder):
    """Two machines whose files are not the same would train on two data sets."""
    torchrun(2)
    assert "data was 24 rows of" in Path("refused-1").read_text() and not Path("refused-0").exists()
