"""train.py as a user runs it, in one process: what it prints, writes, goes on with and refuses."""
import io
import json
import os
import runpy
import shutil
import sys
from argparse import Namespace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

import train
from flexidepth import FlexiDepth, Tokenizer, generate

ROOT = Path(__file__).resolve().parent.parent
TINY = ROOT / "tests" / "tiny-llama"
STEPS = ("--steps", 6, "--save-every", 2)


@pytest.fixture(scope="session")
def script():
    """A function that runs train.py in this process, as its command line does. It returns None,
    or the one line with which the script ended in failure."""
    def script(*arguments, name="train.py"):
        before = sys.argv
        sys.argv = [name, *map(str, arguments)]
        try:
            runpy.run_path(str(ROOT / name), run_name="__main__")
        except SystemExit as end:
            # Python prints a text to standard error and exits with status 1.
            assert isinstance(end.code, str) and end.code.strip().count("\n") == 0, end.code
            return end.code.strip()
        finally:
            sys.argv = before
    return script


@pytest.fixture(scope="session")
def train_in(script, tmp_path_factory):
    """A function that runs train.py in a folder, on few rows of the tiny Llama."""
    data = tmp_path_factory.mktemp("data")
    rows = (TINY / "train.jsonl").read_text().splitlines(keepends=True)
    (data / "rows.jsonl").write_text("".join(rows[::90]))

    def train_in(folder, *arguments):
        before = os.getcwd()
        os.chdir(folder)
        try:
            return script("--data", data / "rows.jsonl", "--batch-size", 8,
                          "--micro-batch-size", 4, *arguments)
        finally:
            os.chdir(before)
    return train_in


@pytest.fixture(scope="session")
def killed_and_whole(train_in, tmp_path_factory):
    """A finished run in whole/, and in killed/ a copy of what it would have left if it had been
    killed when its second checkpoint was half written."""
    folder = tmp_path_factory.mktemp("runs")
    save, calls = torch.save, []

    def note_what_kill_leaves(content, file):
        if "checkpoint" in file.name:
            calls.append(file)
            if len(calls) == 2:
                whole = io.BytesIO()
                save(content, whole)
                file.write_bytes(whole.getvalue()[:5000])
                shutil.copytree(folder / "whole", folder / "killed")
        save(content, file)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "save", note_what_kill_leaves)
        assert train_in(folder, *STEPS, "--out", "whole") is None
    return folder


@pytest.fixture
def killed(killed_and_whole, tmp_path):
    """A folder whose out/ holds a run that was killed."""
    shutil.copytree(killed_and_whole / "killed", tmp_path / "out")
    return tmp_path


def notes(out):
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def same_result(out, other):
    """Whether the tensors in both folders have the same bits."""
    first, second = (load_file(path / "flexidepth.safetensors") for path in (out, other))
    assert first.keys() == second.keys()
    return all(torch.equal(tensor, second[name]) for name, tensor in first.items())


# ---- A run ---------------------------------------------------------------------------------------
def test_a_run_writes_its_result(train_in, script, tmp_path, capsys):
    """A run would end without its table, with a file that does not fit the model, or with one that
    sample.py does not find. It would change the model's folder."""
    before = {file.name: file.stat().st_mtime_ns for file in TINY.iterdir()}
    few = tmp_path / "valid.jsonl"
    few.write_text("".join((TINY / "valid.jsonl").read_text().splitlines(keepends=True)[:4]))
    assert train_in(tmp_path, "--steps", 3, "--eval-every", 2, "--valid", few) is None
    said = capsys.readouterr().out
    for words in ("step 3/3", "skip loss", "layers used", "tokens/s", "s left", "phrase", "mean"):
        assert words in said
    assert said.count("task  ") == 2
    mean = next(line for line in said.splitlines() if line.startswith("task mean"))
    assert mean.split()[5] == "100.0%"  # exact match of the base

    out = tmp_path / "out"
    result = json.loads((out / "train.json").read_text())
    assert result["settings"]["steps"] == 3 and result["valid"]["phrase"]["rows"] == 4
    assert sorted(file.name for file in out.iterdir()) == [
        "flexidepth.safetensors", "metrics.jsonl", "tokens-valid.pt", "tokens.pt",
        "train.json"]
    assert {file.name: file.stat().st_mtime_ns for file in TINY.iterdir()} == before
    model = FlexiDepth.from_pretrained(TINY, flexidepth=out)
    assert model.config.routing_layers == list(range(6, 12))

    lines = notes(out)
    assert [line["step"] for line in lines] == [1, 2, 3] and set(lines[1]["valid"]) == {"phrase"}
    assert all(line["layers"] == pytest.approx(6 + sum(line["kept"])) for line in lines)
    assert all(1 < line["tokens_per_s"] < 1e8 for line in lines)

    before = os.getcwd()
    os.chdir(tmp_path)
    try:
        script("--prompt", "7 * 58 =", "--max-new-tokens", 1, name="sample.py")
        assert "routers and adapters of out" in capsys.readouterr().out
        os.chdir(TINY)
        script("--prompt", "7 * 58 =", "--max-new-tokens", 1, name="sample.py")
        assert "routers and adapters of out" not in capsys.readouterr().out
    finally:
        os.chdir(before)


def test_all_layers_run_in_the_warm_up(train_in, tmp_path):
    """Tokens would be routed in steps in which all layers are to run, or not be in later ones."""
    assert train_in(tmp_path, "--steps", 3, "--open-warmup", 0.34) is None
    first, second, third = notes(tmp_path / "out")
    assert first["kept"] == pytest.approx([1] * 6) and first["layers"] == pytest.approx(12)
    assert second["layers"] < 11.9 and third["layers"] < 11.9


def test_alpha_falls_with_the_learning_rate(train_in, tmp_path):
    """--falling-alpha would change what is noted and not the gradient, or not fall. The second of
    two steps has half of the learning rate, and the rate 0 keeps both runs at the same gates."""
    norms = {}
    for alpha, option in ((0.2, "--falling-alpha"), (0.1, "--no-falling-alpha")):
        folder = tmp_path / option
        folder.mkdir()
        settings = ("--steps", 2, "--lr", 0, "--alpha", alpha, option)
        assert train_in(folder, *settings) is None
        lines = notes(folder / "out")
        assert lines[1]["alpha"] == pytest.approx(0.1)
        norms[option] = [line["grad_norm"] for line in lines]
    falling, constant = norms.values()
    assert falling[0] > 1.5 * constant[0] and falling[1] == pytest.approx(constant[1])


def test_the_routers_have_a_learning_rate_of_their_own(train_in, tmp_path):
    """--router-lr would reach the adapters, or not the routers. At 0 the routers stay."""
    assert train_in(tmp_path, "--steps", 2, "--router-lr", 0, "--flexidepth", TINY) is None
    before = load_file(TINY / "flexidepth.safetensors")
    after = load_file(tmp_path / "out" / "flexidepth.safetensors")
    for name, tensor in after.items():
        same = torch.equal(tensor, before[name].float())
        assert same == (".router." in name), name


def test_the_last_layers_stay_plain(train_in, tmp_path):
    """--plain-end would route other layers, or be obeyed by gates that have their own."""
    assert train_in(tmp_path, "--steps", 1, "--plain-end", 2) is None
    again = tmp_path / "again"
    again.mkdir()
    gates = tmp_path / "out"
    assert train_in(again, "--steps", 1, "--plain-end", 0, "--flexidepth", gates) is None
    for folder in (gates, again / "out"):
        config = json.loads((folder / "train.json").read_text())["config"]
        assert config["routing_layers"] == [4, 5, 6, 7, 8, 9]
    assert "expected some of 0..11" in train_in(again, "--plain-end", 7, "--out", "other")


@pytest.mark.parametrize("option", ["--epochs", "--steps"])
def test_no_steps_change_nothing(train_in, tmp_path, capsys, option):
    """An evaluation alone would write other routers and adapters than it was given."""
    few = tmp_path / "valid.jsonl"
    few.write_text((TINY / "valid.jsonl").read_text().splitlines()[0])
    assert train_in(tmp_path, option, 0, "--flexidepth", TINY, "--valid", few) is None
    assert same_result(tmp_path / "out", TINY)
    assert "of exact match kept" in capsys.readouterr().out and notes(tmp_path / "out") == []


def test_the_same_tensors_make_the_same_file(tmp_path):
    """Two equal runs would write files of different bytes, so that their checksums differ."""
    model = FlexiDepth.from_pretrained(TINY, flexidepth=TINY)
    files = set()
    for _ in range(12):
        model.save_flexidepth(tmp_path)
        files.add((tmp_path / "flexidepth.safetensors").read_bytes())
    assert len(files) == 1


# ---- Stopped and gone on -------------------------------------------------------------------------
def test_killed_and_gone_on(killed, killed_and_whole, train_in, capsys):
    """After kill -9 while a checkpoint is written, the half file would be read, or the schedule,
    the order of rows or the optimiser would begin anew. Steps would be noted twice."""
    out = killed / "out"
    assert [line["step"] for line in notes(out)] == [1, 2, 3, 4]
    assert train_in(killed, *STEPS, "--resume") is None
    assert "going on after step 2" in capsys.readouterr().out
    assert same_result(out, killed_and_whole / "whole") and not same_result(out, TINY)

    def comparable(lines):
        return [{key: value for key, value in line.items() if key != "tokens_per_s"}
                for line in lines]

    assert comparable(notes(out)) == comparable(notes(killed_and_whole / "whole"))
    assert not (out / "checkpoint.pt").exists()


def test_gone_on_with_other_micro_batches(killed, killed_and_whole, train_in):
    """A run that ran out of memory could not go on with a smaller --micro-batch-size."""
    assert train_in(killed, *STEPS, "--resume", "--micro-batch-size", 2) is None
    for line, other in zip(notes(killed / "out"), notes(killed_and_whole / "whole"), strict=True):
        assert line["lm_loss"] == pytest.approx(other["lm_loss"], rel=1e-2)


def test_resume_where_there_is_nothing(train_in, tmp_path):
    """A job whose command always has --resume would fail at its first start."""
    assert train_in(tmp_path, "--steps", 1, "--resume") is None
    assert [line["step"] for line in notes(tmp_path / "out")] == [1]


def test_interrupted_by_the_keyboard(train_in, tmp_path, monkeypatch):
    """Ctrl-C would end in a traceback, or not say how to go on."""
    step = torch.optim.AdamW.step

    def interrupted(self, *arguments):
        if self.param_groups[0]["lr"] < 0.004:
            raise KeyboardInterrupt
        return step(self, *arguments)

    monkeypatch.setattr(torch.optim.AdamW, "step", interrupted)
    ended = train_in(tmp_path, "--steps", 6, "--save-every", 1)
    assert ended.startswith("train.py: interrupted; --resume goes on")
    monkeypatch.undo()
    assert train_in(tmp_path, "--steps", 6, "--save-every", 1, "--resume") is None
    assert [line["step"] for line in notes(tmp_path / "out")] == [1, 2, 3, 4, 5, 6]


@pytest.fixture
def no_step(monkeypatch):
    """Fails where a step of training is taken."""
    def step(*_):
        pytest.fail("trained before it looked")

    monkeypatch.setattr(torch.optim.AdamW, "step", step)


def everything_in(folder):
    return {file.name: file.read_bytes() for file in folder.iterdir() if "tokens" not in file.name}


@pytest.mark.parametrize("arguments, words", [
    ([], "holds an unfinished run; give --resume"),
    (["--resume", "--alpha", "0.5"], "is of another run: its alpha was 0.00035, now it is 0.5"),
    (["--resume", "--seed", "1"], "is of another run: its seed was 0, now it is 1"),
    (["--resume", "--steps", "7"], "is of another run: its steps was 6, now it is 7"),
    (["--resume", "--batch-size", "4"], "is of another run: its batch_size was 8, now it is 4"),
    (["--resume", "--data", TINY / "valid.jsonl"], "is of another run: its data was"),
])
def test_another_run_is_not_gone_on_with(killed, train_in, no_step, arguments, words):
    """The steps of two runs would be mixed, or an unfinished run would be lost."""
    before = everything_in(killed / "out")
    ended = train_in(killed, *STEPS, *arguments)
    assert ended.startswith("train.py: ") and words in ended
    assert everything_in(killed / "out") == before


def test_another_base_is_not_gone_on_with(killed, train_in, no_step, tmp_path):
    """A run would go on with a base of the same shape that other training has changed."""
    other = shutil.copytree(TINY, tmp_path / "other")
    tensors = load_file(other / "model.safetensors")
    tensors["model.layers.3.mlp.up_proj.weight"][0, 0] += 1
    save_file(tensors, other / "model.safetensors")
    ended = train_in(killed, *STEPS, "--resume", "--recipe", "tiny", "--model", other)
    assert "is of another run: its base was" in ended


def test_a_finished_run_is_left_alone(killed_and_whole, train_in, no_step):
    """The result of a run would be written over."""
    before = everything_in(killed_and_whole / "whole")
    for arguments in ([], ["--resume"]):
        ended = train_in(killed_and_whole, *STEPS, "--out", "whole", *arguments)
        assert "holds a finished run; give another --out" in ended
    assert everything_in(killed_and_whole / "whole") == before


def test_gates_are_never_written_over(train_in, tmp_path, no_step):
    """A run that was stopped while its table was made would lose its gates to the next one."""
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "flexidepth.safetensors").write_bytes(b"gates")
    assert "holds a finished run" in train_in(tmp_path, *STEPS)
    assert (tmp_path / "out" / "flexidepth.safetensors").read_bytes() == b"gates"


def saved(content):
    whole = io.BytesIO()
    torch.save(content, whole)
    return whole.getvalue()


FOREIGN = {
    "empty": b"", "text": b"no checkpoint\n", "binary": bytes(range(256)) * 99,
    "cut": saved({"step": torch.arange(9999)})[:5000],
    "dictionary": saved({"model": torch.ones(3)}),
    "list": saved([1, 2]), "tensor": saved(torch.ones(3)), "number": saved(7),
    "code": saved({"fingerprint": Namespace(), "step": 1}),
    "fingerprint": saved({"fingerprint": [1], "step": 1})}


@pytest.mark.parametrize("name", FOREIGN)
def test_a_foreign_checkpoint_is_refused(killed, train_in, no_step, name):
    """Another program's checkpoint.pt, or a damaged one, would end in a traceback, or in a page of
    advice how to run the code in it."""
    (killed / "out" / "checkpoint.pt").write_bytes(FOREIGN[name])
    ended = train_in(killed, *STEPS, "--resume")
    assert f"{Path('out', 'checkpoint.pt')}: not a checkpoint of train.py" in ended
    assert len(ended) < 250


# ---- Refusals ------------------------------------------------------------------------------------
@pytest.mark.parametrize("arguments, words", [
    (["--model", "no/such/model"], "no/such/model"),
    (["--model", "bare"], "no train.jsonl; name a file of rows with --data"),
    (["--flexidepth", "none"], "none"), (["--flexidepth", "empty.jsonl"], "empty.jsonl"),
    (["--data", "none.jsonl"], "none.jsonl"), (["--data", "empty.jsonl"], "empty.jsonl: no row"),
    (["--data", "one.jsonl"], "1 rows to use, fewer than --batch-size 32"),
    (["--data", "broken.jsonl"], "broken.jsonl: line 2"), (["--valid", "broken.jsonl"], "line 2"),
    (["--out", "empty.jsonl"], "empty.jsonl"), (["--seq-len", "3"], "of more than --seq-len 3"),
    (["--alpha", "-1"], "--alpha -1"), (["--alpha", "nan"], "--alpha nan"),
    (["--lr", "much"], "--lr: invalid float value: 'much'"), (["--lr", "-1"], "--lr -1"),
    (["--steps", "-1"], "--steps -1"), (["--epochs", "-1"], "--epochs -1"),
    (["--epochs", "inf"], "--epochs inf"), (["--seed", "-1"], "--seed -1"),
    (["--clip", "-1"], "--clip -1"), (["--open-warmup", "-1"], "--open-warmup -1"),
    (["--beta2", "1"], "beta"), (["--beta2", "-0.1"], "beta"),
    (["--seq-len", "0"], "--seq-len 0"), (["--save-every", "0"], "--save-every 0"),
    (["--batch-size", "0"], "--batch-size 0"), (["--batch-size", "x"], "--batch-size: invalid int"),
    (["--micro-batch-size", "0"], "--micro-batch-size 0"),
    (["--batch-size", "8", "--micro-batch-size", "3"], "no multiple of"),
    (["--shard"], "--shard needs several processes"), (["--device", "gpu7"], "gpu7"),
    (["--device", "cuda:99"], "cuda"), (["--recipe", "cake"], "invalid choice: 'cake'"),
    (["--dtype", "int8"], "invalid choice: 'int8'"), (["--stepz", "1"], "--stepz"),
])
def test_refusals(script, tmp_path, monkeypatch, no_step, arguments, words):
    """A traceback would come in place of one line, or only after the training."""
    monkeypatch.chdir(tmp_path)
    good = json.dumps({"text": "a"}) + "\n"
    for name, content in (("empty", "\n"), ("one", good), ("broken", good + "{oops\n")):
        (tmp_path / f"{name}.jsonl").write_text(content)
    (tmp_path / "bare").mkdir()
    for name in ("config.json", "model.safetensors", "tokenizer.model"):
        shutil.copy(TINY / name, tmp_path / "bare")
    ended = script(*arguments)
    assert ended and ended.startswith("train.py: ") and words in ended


# ---- Where it runs -------------------------------------------------------------------------------
def test_world_size_that_was_left_over(monkeypatch):
    """A WORLD_SIZE in the environment, as clusters set it, would make a lone process wait for
    others."""
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    monkeypatch.setenv("WORLD_SIZE", "8")
    monkeypatch.setenv("RANK", "3")
    module = runpy.run_path(str(ROOT / "train.py"))
    assert (module["WORLD"], module["RANK"]) == (1, 0)


def test_processes_of_srun_are_refused(script, monkeypatch, no_step):
    """Two processes that srun started would both train alone, and write to the same files."""
    monkeypatch.setenv("SLURM_NTASKS", "2")
    assert "srun started several processes" in script()
    monkeypatch.setenv("SLURM_NTASKS", "1")
    assert "--steps -1" in script("--steps", "-1")


def test_no_module_that_windows_lacks(monkeypatch):
    """The scripts would not start on Windows."""
    for name in ("fcntl", "grp", "posix", "pty", "pwd", "readline", "resource", "syslog",
                 "termios", "tty"):
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.delitem(sys.modules, "flexidepth")
    for name in ("train.py", "sample.py"):
        assert "main" in runpy.run_path(str(ROOT / name))


@pytest.mark.parametrize("closed", ["closed", "pipe", "narrow"])
def test_output_that_nobody_reads(train_in, tmp_path, monkeypatch, closed):
    """A closed standard output, a closed pipe as of `| head`, or a terminal without Unicode would
    end a run of many hours."""
    stream = None
    if closed == "pipe":
        source, sink = os.pipe()
        os.close(source)
        stream = open(sink, "w")
    if closed == "narrow":
        stream = io.TextIOWrapper(io.BytesIO(), "cp1252")
    monkeypatch.setattr(sys, "stdout", stream)
    ended = train_in(tmp_path, "--steps", 1)
    if stream is not None:
        stream.close()
    monkeypatch.undo()
    assert ended is None and (tmp_path / "out" / "flexidepth.safetensors").is_file()


# ---- The parts of train.py -----------------------------------------------------------------------
@pytest.fixture
def batch():
    """input_ids, targets and real of rows of very different lengths."""
    tokenizer = Tokenizer.from_pretrained(TINY)
    rows = [train.tokenize({"messages": [
        {"role": "user", "content": "7 * 58 ="}, {"role": "assistant", "content": "words " * n}]},
        tokenizer, True) for n in (1, 30, 9)]
    return train.collate(rows, "cpu")


def test_logits_in_chunks_give_the_whole_loss(monkeypatch, batch):
    """A chunk would be lost or counted twice, or the logits of a batch would all be in memory."""
    input_ids, targets, _ = batch
    model = FlexiDepth.from_pretrained(TINY, flexidepth=TINY)
    trained = [p for p in model.parameters() if p.requires_grad]
    logits = model(input_ids).logits[targets != -100]
    expected = F.cross_entropy(logits, targets[targets != -100], reduction="none")
    expected_gradients = torch.autograd.grad(expected.sum(), trained)

    sizes, head = [], model.head
    monkeypatch.setattr(model, "head", lambda x: sizes.append(len(x)) or head(x))
    monkeypatch.setattr(train, "LOGITS", 7 * model.config.vocab_size)
    losses, likeliest, _, _ = train.TokenLosses(model)(input_ids, targets)
    torch.testing.assert_close(losses, expected)
    assert torch.equal(likeliest, logits.argmax(-1))
    assert max(sizes) == 7 and sum(sizes) == len(logits)
    for gradient, other in zip(torch.autograd.grad(losses.sum(), trained), expected_gradients):
        torch.testing.assert_close(gradient, other, rtol=1e-4, atol=1e-6)


def test_checkpoint_activations(batch):
    """Layers that are computed again would give other gradients, or would still keep their
    activations."""
    input_ids, targets, real = batch
    results = []
    for again in (False, True):
        model = FlexiDepth.from_pretrained(TINY, flexidepth=TINY)
        weights = {p.data_ptr() for p in model.parameters()}
        args = Namespace(checkpoint_activations=again, shard=False)
        losses = train.distribute(model, args)
        kept = {}

        def pack(tensor):
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in weights:
                kept[storage.data_ptr()] = storage.nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            token_losses, _, gates, _ = losses(input_ids, targets)
        (token_losses.sum() + train.skip_loss(gates, real)).backward()
        gradients = [p.grad for p in model.parameters() if p.requires_grad]
        results.append((gradients, sum(kept.values())))

    (gradients, memory), (others, less) = results
    assert all(torch.equal(g, other) for g, other in zip(gradients, others, strict=True))
    assert less < 0.5 * memory


def test_gates_in_training_decide_as_in_use(batch):
    """Float32 routers under autocast would decide otherwise than the bfloat16 ones that are used
    later, or their gates would be rounded to 1, where they have no gradient."""
    input_ids, targets, _ = batch
    training = FlexiDepth.from_pretrained(
        TINY, flexidepth=TINY, dtype=torch.bfloat16, trained_dtype=torch.float32)
    used = FlexiDepth.from_pretrained(TINY, flexidepth=TINY, dtype=torch.bfloat16)
    losses, _, gates, kept = train.TokenLosses(training)(input_ids, targets)
    with torch.no_grad():
        out = used(input_ids)
    assert torch.equal(kept, out.kept) and torch.equal(gates, out.gates)
    assert gates.dtype == losses.dtype == torch.float32
    assert 0 < kept.float().mean() < 1 and not torch.equal(gates, gates.bfloat16().float())


def read_rows(tmp_path, lines):
    data = tmp_path / "rows.jsonl"
    data.write_text("\n".join(lines))
    return train.Rows(data, tmp_path / "tokens.pt", Tokenizer.from_pretrained(TINY),
                      Namespace(seq_len=256, answers_only=True))


def test_exact_match_is_that_of_greedy_decoding(tmp_path):
    """The table is made from one pass over rows in batches. It would tell other answers, or other
    depths, than decoding row by row gives."""
    model = FlexiDepth.from_pretrained(TINY, flexidepth=TINY)
    tokenizer = Tokenizer.from_pretrained(TINY)
    model.config.threshold = 0.56  # at this one some of the answers are wrong
    lines = (TINY / "valid.jsonl").read_text().splitlines()[::97]
    args = Namespace(micro_batch_size=5, device="cpu", shard=False)
    table = train.evaluate(
        train.TokenLosses(model), read_rows(tmp_path, lines), model.config, args)

    wrong = 0
    for task, line in table.items():
        right, depths = [], []
        for row in (row for row in map(json.loads, lines) if row["task"] == task):
            prompt = tokenizer.encode_chat(row["messages"][:1], add_generation_prompt=True)
            found = [(token.item(), depth.item()) for token, depth in generate(
                model, torch.tensor([prompt]), 30, stop_ids=tokenizer.stop_ids)]
            answer = tokenizer.decode([token for token, _ in found])
            right.append(answer == row["messages"][1]["content"] + "<|eot_id|>")
            depths += [depth for _, depth in found]
        assert line["rows"] == len(right) and line["exact"] == sum(right) / len(right)
        wrong += len(right) - sum(right)
        if all(right):
            assert line["layers"] == pytest.approx(sum(depths) / len(depths))
            assert line["tokens"] == len(depths)
    assert 0 < wrong < len(lines)


# ---- The tiny Llama ------------------------------------------------------------------------------
def test_tiny_llama(tmp_path):
    """The base would not be good at its tasks, the gates would not skip a quarter of all layers
    with 99.5 % of its exact match, or the folder would have outgrown the repository."""
    assert sum(file.stat().st_size for file in TINY.iterdir()) < 5e6
    model = FlexiDepth.from_pretrained(TINY, flexidepth=TINY)
    rows = read_rows(tmp_path, (TINY / "valid.jsonl").read_text().splitlines())
    args = Namespace(micro_batch_size=128, device="cpu", shard=False)
    table = train.evaluate(train.TokenLosses(model), rows, model.config, args)
    assert all(line["base_exact"] >= 0.97 for line in table.values()), table

    mean = {key: sum(line[key] for line in table.values()) / len(table) for key in table["add"]}
    assert mean["exact"] >= 0.995 * mean["base_exact"] and mean["layers"] <= 0.75 * 12
    depth = {task: line["layers"] for task, line in table.items()}
    assert max(depth[task] for task in ("phrase", "repeat", "copy")) < depth["add"]
    assert depth["add"] < depth["multiply"]


def test_validation_rows_of_rules_are_held_out():
    """Rows of the four tasks with a rule could have been learnt by heart from train.jsonl."""
    questions = []
    for name in ("train", "valid"):
        rows = map(json.loads, (TINY / f"{name}.jsonl").read_text().splitlines())
        questions.append({row["messages"][0]["content"]: row["task"] for row in rows})
    seen, held_out = questions
    shared = {task for question, task in held_out.items() if question in seen}
    assert shared == {"phrase", "multiply"}
