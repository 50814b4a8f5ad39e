"""tests/paper: its methods against naive versions, its README against its figures, and make.py."""
import copy
import json
import re
import sys
from argparse import Namespace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

HERE = Path(__file__).resolve().parent
TINY = HERE / "tiny-llama"
sys.path += [str(HERE / "paper"), str(TINY)]
import depth_by_kind  # noqa: E402
import make  # noqa: E402
import reproduce  # noqa: E402
import tables  # noqa: E402

from flexidepth import DecoderLayer, FlexiDepth  # noqa: E402
from train import Row, evaluate  # noqa: E402

RESULTS = json.loads((HERE / "paper" / "results.json").read_text())
ANGLES = torch.arange(9)[:, None] * torch.tensor(4 * [-1.0] + 4 * [1.0])
ROTATION = ANGLES.cos(), ANGLES.sin()  # of nine tokens in conftest's model
REAL = torch.ones(2, 9, dtype=torch.bool)


@pytest.fixture
def x():
    """Hidden states of two rows of nine tokens."""
    return torch.randn(2, 9, 32, generator=torch.Generator().manual_seed(1))


# ---- README and tables ---------------------------------------------------------------------------
def test_readme_has_the_tables_of_the_results():
    """A figure of tests/paper/README.md was typed by hand, or is of an older run."""
    made = tables.make_tables(RESULTS)
    readme = (HERE / "paper" / "README.md").read_text()
    found = re.findall(r"<!-- (?!end)(\w+) -->\n\n(.*?)\n\n<!-- end -->", readme, re.DOTALL)
    assert len(found) == 4
    assert dict(found) == made


def test_results_are_of_the_script():
    """A setting was changed, or a run planned, and its figures were not measured; or a method gets
    another seed's depth."""
    settings = RESULTS["settings"]
    assert (settings["alpha"], settings["alphas"]) == (reproduce.ALPHA, reproduce.ALPHAS)
    assert (settings["lr"], settings["batch_size"]) == (reproduce.LR, reproduce.BATCH_SIZE)
    assert settings["steps"] == reproduce.STEPS
    matched = reproduce.matched_runs([7.0, 8.0, 9.0])
    assert matched["12x96/untrained/1"].keywords == {"depth": 8.0}
    planned = reproduce.first_runs(3)
    assert planned["12x96/no adapter/2"].keywords == {"alpha": 1.1e-3, "part": "no adapter"}
    recorded = {name for name in RESULTS["runs"] if name.startswith(tables.BASE)}
    assert planned.keys() | matched.keys() == recorded


# ---- Training and measuring ----------------------------------------------------------------------
def test_measure_agrees_with_train():
    """Exact match or depth are counted in another way than by train.py."""
    rows = reproduce.read("valid")
    few = []
    for task in tables.TASKS:
        few += [row for row in rows if row.task == task][:4]
    torch.manual_seed(0)
    model = FlexiDepth.from_pretrained(TINY)  # with random gates some answers are partly wrong
    expected = evaluate(model, few, Namespace(micro_batch_size=256, device="cpu"))
    found = reproduce.measure(model, few)
    for task in tables.TASKS:
        assert found["exact"][task] == pytest.approx(expected[task]["exact"])
        assert found["layers"][task] == pytest.approx(expected[task]["layers"])
        assert 6 <= found["positions"][task]["end"] <= 12
    assert 0 < sum(found["exact"].values()) < 6
    full = reproduce.measure(model, few, reproduce.always("full"))
    assert full["exact"] == pytest.approx({t: expected[t]["base_exact"] for t in tables.TASKS})
    assert set(full["layers"].values()) == {12}


# ---- Parts removed -------------------------------------------------------------------------------
def test_tokens_that_skip_are_hidden(model, x):
    """Without K, V of skipped tokens nothing is hidden, or kept tokens are hidden too."""
    normal = model.model.layers[3].self_attn
    hides = copy.deepcopy(normal)
    hides.__class__ = reproduce.KeptKeys
    kept = REAL.clone()
    kept[0, 1] = kept[1, :4] = False

    def run(attention, h, kept):
        places = kept.flatten().nonzero()[:, 0]
        return attention(h, *attention.keys_values(h, ROTATION), ROTATION, places)

    changed = x.clone()
    changed[0, 1] += 1  # it skips
    torch.testing.assert_close(run(hides, x, kept), run(hides, changed, kept), rtol=0, atol=0)
    assert not torch.allclose(run(normal, x, kept), run(normal, changed, kept))
    changed = x.clone()
    changed[0, 2] += 1  # it is kept, and the third kept token of the row comes later
    assert not torch.allclose(run(hides, x, kept)[2], run(hides, changed, kept)[2])

    torch.testing.assert_close(run(hides, x, REAL), run(normal, x, REAL))
    run(hides, x.requires_grad_(), kept).sum().backward()
    assert x.grad.isfinite().all()


def test_straight_through(model, x):
    """Paths are scaled after all, or the router's gradient is not that of the decision."""
    layer = model.model.layers[3]
    layer.__class__ = reproduce.StraightThrough
    out, gate, kept = layer(x, ROTATION, None, "learned")
    full, _, _ = DecoderLayer.forward(layer, x, ROTATION, None, "full")
    skip = x + layer.router_proj(layer.post_attention_layernorm(x))
    assert kept.any() and not kept.all()
    torch.testing.assert_close(out, torch.where(kept[..., None], full, skip))

    gate.retain_grad()
    out.square().sum().backward()
    expected = (2 * out * (full - skip)).sum(-1)
    torch.testing.assert_close(gate.grad, expected, rtol=1e-3, atol=1e-4)
    assert layer.router.router_enc.weight.grad.abs().sum() > 0


@pytest.mark.parametrize("part", tables.PARTS)
def test_parts_removed_train(model, ids, monkeypatch, part):
    """Without a part the router does not learn, the base does, or the part is still there."""
    before = copy.deepcopy(model)
    reproduce.remove(part, model)
    routed = model.model.layers[2:]
    routers = [copy.deepcopy(layer.router.state_dict()) for layer in routed]
    monkeypatch.setattr(reproduce, "BATCH_SIZE", 2)
    rows = [Row(row, row, "all") for row in ids(2, 9)]
    penalty = reproduce.linear_penalty if "penalty" in part else reproduce.skip_loss
    reproduce.train(model, rows, 1e-3, 2, 0, penalty)

    for layer, old in zip(routed, routers):
        for name, p in layer.router.state_dict().items():
            assert not torch.equal(p, old[name])
    for name, p in before.named_parameters():
        if not p.requires_grad:
            assert torch.equal(p, model.get_parameter(name))
    changed = {"no K, V for skipped tokens": "KeptKeys", "linear router": "LinearRouter",
               "no adapter": "NoAdapter", "no factors g, 1 - g": "StraightThrough",
               "both paths seen, linear router": "LinearRouter",
               "both paths seen, no adapter": "NoAdapter"}.get(part)
    classes = {type(module).__name__ for layer in routed for module in layer.modules()}
    assert changed is None or changed in classes


# ---- Other ways to skip --------------------------------------------------------------------------
def test_bare_layers(model, ids):
    """Random skipping of the base scales, adapts, or has another rate than asked for."""
    ids = ids(2, 9)
    full = model(ids, route="full").logits
    for layer in model.model.layers[2:]:
        layer.__class__ = reproduce.BareLayer
    everything = reproduce.at_random(1.0, 0)(None, None)
    torch.testing.assert_close(model(ids, route=everything).logits, full)
    nothing = model(ids, route=reproduce.at_random(0.0, 0)(None, None)).logits
    model.model.layers = model.model.layers[:2]
    torch.testing.assert_close(nothing, model(ids, route="full").logits)

    kept = reproduce.at_random(0.3, 0)(None, None)(2, torch.zeros(100, 100))
    assert kept.float().mean().item() == pytest.approx(0.3, abs=0.02)
    assert reproduce.rate_of(3.5, model.config) == 0.75


def test_mindskip(model, x):
    """Decisions see the answer or padding, or differ within a row; a row that skips runs its
    attention or not its mlp; or the router gets no gradient."""
    targets = torch.full((2, 9), -100)
    targets[:, 4:] = 1  # position 4 is the prompt's last: it predicts the answer's first token
    gate = torch.rand(2, 9)
    route = reproduce.by_prompt(targets, REAL)
    torch.testing.assert_close(route(0, gate), gate[:, :5].mean(1, keepdim=True).expand(2, 9))

    layer = model.model.layers[3]
    layer.__class__ = reproduce.AttentionOnly
    out, decision, kept = layer(x, ROTATION, None, lambda index, gate: 0 * gate + 0.4)
    assert not kept.any() and torch.equal(decision, torch.zeros(2, 9))
    torch.testing.assert_close(out, x + layer.mlp(layer.post_attention_layernorm(x)))
    out, _, _ = layer(x, ROTATION, None, lambda index, gate: 0 * gate + 0.6)
    full, _, _ = DecoderLayer.forward(layer, x, ROTATION, None, "full")
    torch.testing.assert_close(out, full)

    out, _, _ = layer(x, ROTATION, None, route)
    out.square().sum().backward()
    assert layer.router.router_enc.weight.grad.abs().sum() > 0


def test_block_influence(model, ids):
    """The influence is that of another layer or of padding, or is no angle."""
    ids = ids(2, 9)
    real = REAL.clone()
    real[1, 5:] = False
    found = reproduce.block_influence(model, ids, real)
    layers = model.model.layers
    model.model.norm = model.lm_head = torch.nn.Identity()
    states = []
    for n in range(5):
        model.model.layers = layers[:n]
        states.append(model(ids, route="full").logits)
    for i in range(4):
        angles = F.cosine_similarity(states[i][real], states[i + 1][real], dim=-1)
        assert found[i] == pytest.approx(1 - angles.mean().item(), abs=1e-5)


# ---- Runs ----------------------------------------------------------------------------------------
def test_a_run_that_was_interrupted_goes_on(tmp_path):
    """Runs are done twice or lost, or get the seed or name of another."""
    results = {"settings": {"steps": 7}, "runs": {"12x96/a/0": {"old": 0}}}
    planned = {f"12x96/{what}/{seed}": lambda steps, seed, what=what: {what: [steps, seed, 1 / 3]}
               for what, seed in (("a", 0), ("a", 1), ("b", 2))}
    reproduce.run(planned, results, tmp_path / "out.json")
    assert [file.name for file in tmp_path.iterdir()] == ["out.json"]
    written = json.loads((tmp_path / "out.json").read_text())
    assert written == results
    assert written["runs"] == {"12x96/a/0": {"old": 0}, "12x96/a/1": {"a": [7, 1, 0.33333]},
                               "12x96/b/2": {"b": [7, 2, 0.33333]}}


# ---- depth_by_kind.py ----------------------------------------------------------------------------
def test_kinds_of_tokens():
    """A token is taken for one of another kind, above all at the start of a sentence."""
    chat = ["<|begin_of_text|>", "<|start_header_id|>", "user", "<|end_header_id|>", "\n\n", "It",
            " cost", "s", " 12", ".", "50", ".", " \"", "Wh", "y", "?\"", " we", " don", "'t", "\n",
            "ask", [226, 130], [172], " 7", "<|eot_id|>"]
    special, role, blank = "special token", "role of a speaker", "white space"
    first, word, rest = "start of a sentence", "start of a word", "rest of a word"
    digits, mark, part = "digits", "punctuation", "part of a character"
    assert list(depth_by_kind.kinds_of(chat)) == [
        special, special, role, special, blank, first, word, rest, digits, mark, digits, mark, mark,
        first, rest, mark, first, word, rest, blank, first, part, part, digits, special]
    chatml = ["Hi", "<|im_end|>", "<|im_start|>", "ass", "istant", "\n", "Yes", "<|im_end|>", "No"]
    assert list(depth_by_kind.kinds_of(chatml)) == [
        first, special, special, role, role, blank, first, special, first]


def make_record(prompt, answer, task):
    """A record of a model of four layers, of which layers 2 and 3 are routed."""
    def part(texts, decisions):
        depths = [4 - decision.count("0") for decision in decisions]
        return {"ids": [sum(map(ord, text)) for text in texts], "texts": texts, "layers": depths,
                "decisions": decisions}
    return {"version": 2, "routing_layers": [2, 3], "task": task, "prompt": part(*prompt),
            "answer": part(*answer)}


def test_depth_by_kind(tmp_path, monkeypatch, capsys):
    """Figures are of the wrong group or layer, mix prompts with answers, or miss what repeats."""
    records = [
        make_record((["Say", " 7", " 7"], ["00", "11", "11"]),
                    ([" 7", " 7", "!"], ["10", "11", "00"]), "repeat"),
        make_record((["Add", " 2"], ["00", "10"]), (["4", "!"], ["11", "10"]), "add")]
    file = tmp_path / "depth.jsonl"
    file.write_text("".join(json.dumps(record) + "\n" for record in records))
    monkeypatch.setattr(sys, "argv", ["depth_by_kind.py", str(file)])
    depth_by_kind.main()
    head, *lines = capsys.readouterr().out.splitlines()
    table = {line[:24].strip(): line[24:].split() for line in lines}
    assert list(table) == ["start of a sentence", "punctuation", "digits", "repeats", "task repeat",
                           "task add", "2 layers", "3 layers", "4 layers", "all tokens", "",
                           "layer 2 kept", "layer 3 kept", "explained by the layer"]
    assert table["digits"] == ["3", "60.0%", "3.67", "3", "60.0%", "3.67"]
    assert table["repeats"] == ["2", "40.0%", "3.50", "0"]
    assert table["task add"] == ["2", "40.0%", "3.50", "2", "40.0%", "2.50"]
    assert table["all tokens"] == ["5", "100.0%", "3.20", "5", "100.0%", "3.00"]
    assert table["layer 2 kept"] == ["80.0%", "60.0%"]
    assert table["layer 3 kept"] == ["40.0%", "40.0%"]
    assert table["explained by the layer"] == ["16.7%", "4.0%"]


def test_variance_that_the_layer_explains():
    """A pruned model looks adaptive, or the other way round."""
    assert depth_by_kind.explained_by_layer([0.0, 1.0, 1.0]) == pytest.approx(1)
    assert depth_by_kind.explained_by_layer([0.7, 0.7]) == 0
    draws = torch.rand(50, 3, generator=torch.Generator().manual_seed(0))
    kept = (draws < torch.tensor([0.2, 0.5, 0.9])).float()                        # (T, R)
    within = kept.var(0, correction=0).mean()
    expected = 1 - (within / kept.var(correction=0)).item()
    found = depth_by_kind.explained_by_layer(kept.mean(0).tolist())
    assert found == pytest.approx(expected, abs=1e-5)


# ---- make.py -------------------------------------------------------------------------------------
def test_make_writes_the_files_of_the_tiny_llama(tmp_path, monkeypatch):
    """Rows, tokenizer or config of the tiny Llama can't be made again."""
    monkeypatch.setattr(sys, "argv", ["make.py", "--steps", "0", "--out", str(tmp_path)])
    make.main()
    names = ["config.json", "tokenizer.model", "train.jsonl", "valid.jsonl"]
    assert sorted(file.name for file in tmp_path.iterdir()) == names
    for name in names:
        assert (tmp_path / name).read_bytes() == (TINY / name).read_bytes()


def test_make_trains_a_base(tmp_path, monkeypatch, capsys):
    """The base does not learn, or its file can't be loaded."""
    monkeypatch.setattr(sys, "argv", ["make.py", "--steps", "4", "--out", str(tmp_path)])
    monkeypatch.setattr(make, "VALID_ROWS", 5)
    make.main()
    first, *_, last = re.findall(r"loss ([\d.]+)", capsys.readouterr().out)
    assert float(last) < float(first)
    FlexiDepth.from_pretrained(tmp_path)
