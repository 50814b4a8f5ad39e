"""tests/paper: its methods against naive versions, its README against its figures, and make.py."""
import copy
import json
import re
import sys
from argparse import Namespace
from concurrent.futures import Future
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

HERE = Path(__file__).resolve().parent
TINY = HERE / "tiny-llama"
sys.path += [str(HERE / "paper"), str(TINY)]
import batches  # noqa: E402
import depth_by_kind  # noqa: E402
import make  # noqa: E402
import reproduce  # noqa: E402
import smollm2  # noqa: E402
import tables  # noqa: E402

from flexidepth import Attention, Config, DecoderLayer, FlexiDepth  # noqa: E402
from train import Row, TokenLosses, evaluate  # noqa: E402

CONFIG = Config(vocab_size=50, hidden_size=48, intermediate_size=96, num_hidden_layers=4,
                num_attention_heads=3, num_key_value_heads=1)


@pytest.fixture
def model():
    """A small random model, of which layers 2 and 3 are routed."""
    torch.manual_seed(0)
    return FlexiDepth(CONFIG)


@pytest.fixture
def ids():
    return torch.randint(50, (2, 9), generator=torch.Generator().manual_seed(0))


@pytest.fixture
def x():
    """Hidden states of two rows of nine tokens."""
    return torch.randn(2, 9, 48, generator=torch.Generator().manual_seed(1))


def rotation_of(T):
    angle = torch.arange(T)[:, None] * torch.ones(8)
    return torch.cat([angle.cos()] * 2, -1), torch.cat([-angle.sin(), angle.sin()], -1)


def of_class(module, new_class):
    """A copy of a module, as an object of another class."""
    changed = copy.deepcopy(module)
    changed.__class__ = new_class
    return changed


# ---- README and tables ---------------------------------------------------------------------------
def test_readme_has_the_tables_of_the_results():
    """A figure of tests/paper/README.md was typed by hand, or is of an older run."""
    made = tables.make_tables(json.loads((HERE / "paper" / "results.json").read_text()))
    made |= smollm2.make_tables(json.loads((HERE / "paper" / "smollm2.json").read_text()))
    made |= batches.make_tables(json.loads((HERE / "paper" / "batches.json").read_text()))
    readme = (HERE / "paper" / "README.md").read_text()
    found = re.findall(r"<!-- (?!end)(\w+) -->\n\n(.*?)\n\n<!-- end -->", readme, re.DOTALL)
    assert len(found) == 10
    assert dict(found) == made
    assert tables.fill(readme, made) == readme


def test_results_are_of_the_settings_in_the_script():
    """A setting of reproduce.py was changed, and the figures were not measured again."""
    settings = json.loads((HERE / "paper" / "results.json").read_text())["settings"]
    assert settings["alphas"] == reproduce.ALPHAS
    assert settings["sibling_alphas"] == reproduce.SIBLING_ALPHAS
    assert (settings["alpha"], settings["steps"]) == (reproduce.ALPHA, reproduce.STEPS)
    assert (settings["lr"], settings["batch_size"]) == (reproduce.LR, reproduce.BATCH_SIZE)
    assert settings["bases"] == {name: list(base) for name, base in reproduce.BASES.items()}


def test_figures():
    """The test of order is not exact, interpolation leaves the curve, or the plot swaps axes."""
    assert tables.chance_of_order([[1, 2, 3]] * 3) == pytest.approx(1 / 216)
    assert tables.chance_of_order([[3, 2, 1]] * 3) == 1
    assert tables.skipped_at([(2, 100), (3, 98)], 99) == pytest.approx(2.5)
    assert tables.skipped_at([(2, 98), (3, 99.5)], 99) == 3
    picture = tables.plot([("a", 6, 100.0), ("b", 12, 82.0)], 6, 12).split("\n")
    assert picture[1] == "  100 |a"
    assert picture[10] == "   82 |" + " " * 60 + "b"
    assert picture[11] == "   80 |"


def test_tables_fill_only_their_own_places():
    """A table that was not made is emptied, or text beside the tables is lost."""
    text = ("x\n<!-- parts -->\n\nold\n\n<!-- end -->\ny\n"
            "<!-- depth -->\n\nkeep\n\n<!-- end -->\nz")
    assert tables.fill(text, {"parts": "new \\1"}) == text.replace("old", "new \\1")
    assert tables.make_tables({"settings": {"seeds": 1, "alpha": 1, "alphas": [1]}, "runs": {}}
                              ) == {}


# ---- Training and measuring ----------------------------------------------------------------------
def test_measure_agrees_with_train():
    """Exact match or depth are counted in another way than by train.py."""
    rows = reproduce.read(TINY, "valid")
    few = []
    for task in tables.TASKS:
        few += [row for row in rows if row.task == task][:4]
    few.sort(key=lambda row: len(row.ids))
    torch.manual_seed(0)
    model = FlexiDepth.from_pretrained(TINY)  # with random gates some answers are partly wrong

    class Few(list):
        lengths = np.array([len(row.ids) for row in few])

    settings = Namespace(micro_batch_size=256, device="cpu")
    expected = evaluate(TokenLosses(model), Few(few), model.config, settings)
    found = reproduce.measure(model, few)
    for task in tables.TASKS:
        assert found["exact"][task] == pytest.approx(expected[task]["exact"])
        assert found["layers"][task] == pytest.approx(expected[task]["layers"])
        assert 6 <= found["positions"][task]["end"] <= 12
    assert 0 < sum(found["exact"].values()) < 6
    full = reproduce.measure(model, few, reproduce.always("full"))
    assert full["exact"] == pytest.approx({t: expected[t]["base_exact"] for t in tables.TASKS})
    assert set(full["layers"].values()) == {12}


def test_batches_take_every_row_once_an_epoch():
    """Sorting by length loses rows, or always gives the short ones first."""
    steps = list(reproduce.batches(list(range(320)), 20, seed=0))
    assert [len(batch) for batch in steps] == [32] * 20
    assert sorted(sum(steps, [])) == sorted([*range(320), *range(320)])
    assert len(set(sum(steps[:8], []))) == 256
    firsts = [batch[0] for batch in steps[:8]]
    assert firsts != sorted(firsts)


# ---- Parts removed -------------------------------------------------------------------------------
def test_tokens_that_skip_are_hidden():
    """Without K, V of skipped tokens nothing is hidden, or kept tokens are hidden too."""
    torch.manual_seed(0)
    normal = Attention(CONFIG)
    hides = of_class(normal, reproduce.KeptKeys)
    h = torch.randn(2, 6, 48)
    rotation = rotation_of(6)
    kept = torch.tensor([[True, False, True, True, False, True],
                         [False, False, True, True, True, False]])

    def run(attention, h, kept):
        full = kept.flatten().nonzero()[:, 0]
        return attention.forward_kept(h, *attention.keys_values(h, rotation), rotation, full)

    changed = h.clone()
    changed[0, 1] += 1  # it skips
    torch.testing.assert_close(run(hides, h, kept), run(hides, changed, kept), rtol=0, atol=0)
    assert not torch.allclose(run(normal, h, kept), run(normal, changed, kept))
    changed = h.clone()
    changed[0, 2] += 1  # it is kept, and the third kept token of the row comes later
    assert not torch.allclose(run(hides, h, kept)[2], run(hides, changed, kept)[2])

    everyone = torch.ones_like(kept)
    torch.testing.assert_close(run(hides, h, everyone), run(normal, h, everyone))
    run(hides, h.requires_grad_(), kept).sum().backward()
    assert h.grad.isfinite().all()


def test_linear_router_is_linear():
    """It gives (B, T, 1), which would be broadcast against (B, T), or has a bias."""
    router = reproduce.LinearRouter(CONFIG)
    h = torch.randn(2, 5, 48)
    assert router(h).shape == (2, 5)
    torch.testing.assert_close(router(2 * h), 2 * router(h))


def test_straight_through(model, x):
    """Paths are scaled after all, or the router's gradient is not that of the decision."""
    layer = of_class(model.model.layers[3], reproduce.StraightThrough)
    rotation = rotation_of(9)
    out, gate, kept = layer(x, rotation, None, "learned")
    full, _, _ = DecoderLayer.forward(layer, x, rotation, None, "full")
    skip = x + layer.router_proj(layer.post_attention_layernorm(x))
    assert kept.any() and not kept.all()
    torch.testing.assert_close(out, torch.where(kept[..., None], full, skip))

    gate.retain_grad()
    out.square().sum().backward()
    expected = (2 * out * (full - skip)).sum(-1)
    torch.testing.assert_close(gate.grad, expected, rtol=1e-3, atol=1e-4)
    assert layer.router.router_enc.weight.grad.abs().sum() > 0


@pytest.mark.parametrize("part", tables.PARTS)
def test_parts_removed_train(model, ids, part):
    """Without a part the router does not learn, the base does, or the part is still there."""
    before = copy.deepcopy(model)
    reproduce.remove(part, model)
    routed = model.model.layers[2:]
    routers = [copy.deepcopy(layer.router.state_dict()) for layer in routed]
    rows = [Row(row.numpy().astype(np.int32), np.ones(9, bool), "all") for row in ids]
    penalty = reproduce.linear_penalty if "penalty" in part else reproduce.skip_loss
    reproduce.train(model, rows, 1e-3, 2, 0, penalty)

    for layer, old in zip(routed, routers):
        for name, p in layer.router.state_dict().items():
            assert not torch.equal(p, old[name])
    for name, p in before.named_parameters():
        if not reproduce.TRAINED.match(name):
            assert torch.equal(p, model.get_parameter(name))
    changed = {"no K, V for skipped tokens": "KeptKeys", "linear router": "LinearRouter",
               "no adapter": "NoAdapter", "no factors g, 1 - g": "StraightThrough"}.get(part)
    classes = {type(module).__name__ for layer in routed for module in layer.modules()}
    assert changed is None or changed in classes


def test_prices_of_penalties(monkeypatch):
    """A variant of the penalty is trained with another one's price or form."""
    asked = []
    monkeypatch.setattr(reproduce, "read", lambda folder, name: name)
    monkeypatch.setattr(reproduce, "measure", lambda model, rows: rows)
    monkeypatch.setattr(reproduce, "train", lambda model, rows, alpha, steps, seed, penalty:
                        asked.append((rows, alpha, penalty)))
    for part in ("full", "linear penalty", "linear penalty, 3 alpha"):
        assert reproduce.run_flexidepth(TINY, 7, 0, 1.0, part) == "valid"
    assert asked == [("train", 1.0, reproduce.skip_loss), ("train", 1.0, reproduce.linear_penalty),
                     ("train", 3.0, reproduce.linear_penalty)]


# ---- Other ways to skip --------------------------------------------------------------------------
def test_bare_layers(model, ids):
    """Random skipping of the base scales, adapts, or has another rate than asked for."""
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
    assert reproduce.rate_of(3.5, CONFIG) == 0.75


def test_mindskip_decides_by_the_prompt(ids):
    """Decisions see the answer or padding, or differ within a row."""
    targets = torch.full_like(ids, -100)
    targets[:, 4:] = 1  # position 4 is the prompt's last: it predicts the answer's first token
    real = torch.ones_like(ids, dtype=torch.bool)
    gate = torch.rand(2, 9)
    pooled = reproduce.by_prompt(targets, real)(0, gate)
    torch.testing.assert_close(pooled, gate[:, :5].mean(1, keepdim=True).expand(2, 9))


def test_mindskip_skips_attention_alone(model, ids, x):
    """A row that skips runs its attention or not its mlp, or the router gets no gradient."""
    layer = of_class(model.model.layers[3], reproduce.AttentionOnly)
    rotation = rotation_of(9)
    out, decision, kept = layer(x, rotation, None, lambda index, gate: 0 * gate + 0.4)
    assert not kept.any() and torch.equal(decision, torch.zeros(2, 9))
    torch.testing.assert_close(out, x + layer.mlp(layer.post_attention_layernorm(x)))
    out, _, _ = layer(x, rotation, None, lambda index, gate: 0 * gate + 0.6)
    full, _, _ = DecoderLayer.forward(layer, x, rotation, None, "full")
    torch.testing.assert_close(out, full)

    real = torch.ones_like(ids, dtype=torch.bool)
    out, _, _ = layer(x, rotation, None, reproduce.by_prompt(ids, real))
    out.square().sum().backward()
    assert layer.router.router_enc.weight.grad.abs().sum() > 0


def test_block_influence(model, ids):
    """The influence is that of another layer or of padding, or is no angle."""
    real = torch.ones_like(ids, dtype=torch.bool)
    real[1, 5:] = False
    found = reproduce.block_influence(model, ids, real)
    layers = model.model.layers
    model.model.norm = torch.nn.Identity()
    states = []
    for n in range(5):
        model.model.layers = layers[:n]
        states.append(model.hidden_states(ids, route="full")[0])
    for i in range(4):
        angles = [F.cosine_similarity(states[i][b, t], states[i + 1][b, t], dim=0).item()
                  for b in range(2) for t in range(9) if real[b, t]]
        assert found[i] == pytest.approx(1 - sum(angles) / len(angles), abs=1e-5)


def test_merged_layers(model):
    """A merge adds whole layers in place of differences, loses a layer, or changes the base."""
    layers = model.model.layers
    weights = [layer.mlp.up_proj.weight.clone() for layer in layers]
    two = reproduce.merge(layers, 1, 3)
    assert len(two) == 2 and two[0] is layers[0]
    torch.testing.assert_close(two[1].mlp.up_proj.weight, weights[2] + weights[3] - weights[1])
    three = reproduce.merge(layers, 0, 2)
    assert len(three) == 3
    torch.testing.assert_close(three[0].mlp.up_proj.weight, weights[1])
    assert all(torch.equal(layer.mlp.up_proj.weight, old) for layer, old in zip(layers, weights))


# ---- Runs ----------------------------------------------------------------------------------------
def test_a_run_that_was_interrupted_goes_on(tmp_path, monkeypatch):
    """Runs are done twice or lost, or get the folder, seed or name of another."""
    asked = []

    class Pool:
        def __init__(self, *arguments):
            pass

        def __enter__(self):
            return self

        def __exit__(self, *error):
            pass

        def submit(self, function, folder, steps, seed):
            asked.append((function, folder.name, steps, seed))
            future = Future()
            future.set_result({"seed": seed, "third": [1 / 3]})
            return future

    monkeypatch.setattr(reproduce, "ProcessPoolExecutor", Pool)
    results = {"settings": {"seeds": 2, "steps": 7}, "runs": {"12x96/a/0": {"seed": 0}}}
    planned = {"12x96/a/0": "a", "12x96/a/1": "a", "8x48/b/2": "b"}
    reproduce.run(planned, results, tmp_path / "out.json", 2)
    assert asked == [("a", "tiny-llama", 7, 1), ("b", "8x48-7", 7, 2)]
    assert [file.name for file in tmp_path.iterdir()] == ["out.json"]
    written = json.loads((tmp_path / "out.json").read_text())
    assert written == results
    assert written["runs"] == {"12x96/a/0": {"seed": 0},
                               "12x96/a/1": {"seed": 1, "third": [0.33333]},
                               "8x48/b/2": {"seed": 2, "third": [0.33333]}}


def test_planned_runs_are_those_of_the_results():
    """A run is not planned or takes another's place, or a method gets another seed's depth."""
    results = json.loads((HERE / "paper" / "results.json").read_text())
    planned = reproduce.first_runs(3) | reproduce.sibling_runs(3, ["6x96", "8x48"])
    matched = reproduce.matched_runs([7.0, 8.0, 9.0])
    assert planned.keys() | matched.keys() == results["runs"].keys()
    assert matched["12x96/untrained/1"].keywords == {"depth": 8.0}
    without = planned["12x96/no adapter/2"]
    assert isinstance(without, partial)
    assert without.keywords == {"alpha": reproduce.ALPHA, "part": "no adapter"}


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
    def part(texts, layers):
        return {"ids": [sum(map(ord, text)) for text in texts], "texts": texts, "layers": layers}
    return {"version": 1, "task": task, "prompt": part(*prompt), "answer": part(*answer)}


def test_depth_by_kind(tmp_path, monkeypatch, capsys):
    """Figures are of the wrong group, mix prompts with answers, or miss what repeats."""
    records = [
        make_record((["Say", " 7", " 7"], [2, 4, 4]), ([" 7", " 7", "!"], [3, 4, 2]), "repeat"),
        make_record((["Add", " 2"], [2, 3]), (["4", "!"], [4, 3]), "add")]
    file = tmp_path / "depth.jsonl"
    file.write_text("".join(json.dumps(record) + "\n" for record in records))
    monkeypatch.setattr(sys, "argv", ["depth_by_kind.py", str(file)])
    depth_by_kind.main()
    head, *lines = capsys.readouterr().out.splitlines()
    table = {line[:24].strip(): line[24:].split() for line in lines}
    assert list(table) == ["start of a sentence", "punctuation", "digits", "repeats", "task repeat",
                           "task add", "2 layers", "3 layers", "4 layers", "all tokens"]
    assert table["digits"] == ["3", "60.0%", "3.67", "3", "60.0%", "3.67"]
    assert table["repeats"] == ["2", "40.0%", "3.50", "0"]
    assert table["task add"] == ["2", "40.0%", "3.50", "2", "40.0%", "2.50"]
    assert table["all tokens"] == ["5", "100.0%", "3.20", "5", "100.0%", "3.00"]


@pytest.mark.parametrize("text, message", [
    ("", "no records"), ("{}\n", "line 1"), ("[1]\n", "line 1"), ("{\"version\"", "line 1"),
    (json.dumps(make_record((["a"], []), (["b"], [2]), "x")), "line 1"),
    ("{\"version\": 2}\n", "version 2")])
def test_depth_by_kind_refuses_other_files(tmp_path, monkeypatch, text, message):
    """A file that is no depth map gives a traceback, or a table of nothing."""
    file = tmp_path / "depth.jsonl"
    file.write_text(text)
    monkeypatch.setattr(sys, "argv", ["depth_by_kind.py", str(file)])
    with pytest.raises(ValueError, match=message):
        depth_by_kind.main()


# ---- batches.py ----------------------------------------------------------------------------------
def test_sequences_that_agree_follow_their_mean():
    """A layer runs for some sequences and not for others, a position decides for another, or
    padding has a say."""
    gate = torch.tensor([[0.9, 0.4, 0.1], [0.2, 0.7, 0.4]])                       # (B, T)
    kept = batches.agree(0.5)(3, gate)
    assert kept.tolist() == [[True, True, False]] * 2
    real = torch.tensor([[True, True, True], [True, False, False]])
    kept = batches.agree(0.5, real)(3, gate)
    assert kept.tolist() == [[True, False, False]] * 2


def test_layers_that_nobody_needs():
    """A layer that some sequence needs in a step counts as spared, or one that none needs not."""
    kept = torch.tensor([[[True, False, False], [False, False, True]],
                         [[False, False, False], [False, False, True]]])          # (2, B, R)
    assert batches.spared(kept) == 3 / 6  # layer 1 in the first step, layers 0 and 1 in the second


def test_quality_agrees_with_train():
    """Loss or exact match are counted in another way than by train.py, or padding changes them."""
    every = reproduce.read(TINY, "valid")
    few = []
    for task in tables.TASKS:
        few += [row for row in every if row.task == task][:4]
    torch.manual_seed(0)
    model = FlexiDepth.from_pretrained(TINY)

    class Few(list):
        lengths = np.array([len(row.ids) for row in few])

    expected = evaluate(TokenLosses(model), Few(few), model.config,
                        Namespace(micro_batch_size=7, device="cpu"))
    for rule, prefix in (("full", "base_"), ("learned", ""), ("agree", "")):
        # In batches of one row "agree" is "learned".
        loss, exact = batches.quality(model, Few(few), rule, 1 if rule == "agree" else 7)
        assert loss == pytest.approx(smollm2.mean(expected, f"{prefix}loss"), rel=1e-4)
        assert exact == pytest.approx(smollm2.mean(expected, f"{prefix}exact"))


def test_ideals_of_a_batch_by_hand(model, ids):
    """A layer that one sequence needs counts as spared, or prompts count as decoded tokens."""
    layer = model.model.layers[2]
    full = 48 * 48 * 2 + 3 * 48 * 96       # q_proj, o_proj and the mlp
    adapter = 3 * 48 * 6
    router = sum(p.numel() for p in layer.router.parameters())
    always = 50 * 48 + 48 + 4 * (2 * 48 * 16 + 2 * 48) + 2 * full  # head, norms, k, v, plain layers
    kept = torch.tensor([[[True, False], [False, False]]])         # one step, (1, B, R)
    by_bytes, by_flops = batches.ideals(model, kept)
    all_layers = always + 2 * full
    both = always + 2 * router
    assert by_bytes == pytest.approx(all_layers / (both + full + 2 * adapter), rel=1e-6)
    assert by_flops == pytest.approx(all_layers / (both + (full + 3 * adapter) / 2), rel=1e-6)

    decided = batches.decisions(model, ids, "learned")
    assert decided.shape == (batches.NEW_TOKENS - 1, 2, 2)
    tokens = [token for token, _ in batches.generate(model, ids, batches.NEW_TOKENS)]
    out = model(torch.cat([ids, torch.stack(tokens[:-1], 1)], 1))
    assert torch.equal(out.kept[:, 9:].transpose(0, 1), decided)


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
    options = {"--steps": 12, "--rows": 16, "--layers": 2, "--hidden-size": 48, "--out": tmp_path}
    arguments = [str(word) for option in options.items() for word in option]
    monkeypatch.setattr(sys, "argv", ["make.py", *arguments])
    monkeypatch.setattr(make, "VALID_ROWS", 5)
    make.main()
    losses = [float(loss) for loss in re.findall(r"loss ([\d.]+)", capsys.readouterr().out)]
    assert losses[-1] < losses[0]
    assert FlexiDepth.from_pretrained(tmp_path).config.num_hidden_layers == 2


def test_held_out_rows_are_never_drawn():
    """A row that valid.jsonl holds out is trained on."""
    train, valid, held_out = make.make_rows(make.random.Random(0))
    with_a_rule = [row for row in train if row["task"] not in ("phrase", "multiply")]
    questions = {make.question_of(row) for row in with_a_rule}
    assert not questions & held_out
    assert {make.question_of(row) for row in valid} >= held_out and len(held_out) == 800
    rng = make.random.Random(1)
    for _ in range(300):
        row = make.draw_for_training("add", rng, set())
        assert make.question_of(row) not in held_out
