"""tests/reproduce.py: its methods against naive versions, and README.md against its figures."""
import copy
import json
import re
from concurrent.futures import Future

import pytest
import reproduce
import torch
import torch.nn.functional as F
from reproduce import HERE, KeptKeys, LinearRouter, StraightThrough, become

from flexidepth import Attention, Config, DecoderLayer, FlexiDepth
from train import evaluate

TINY = HERE / "tiny-llama"
CONFIG = Config(vocab_size=50, hidden_size=48, intermediate_size=96, num_hidden_layers=4,
                num_attention_heads=3, num_key_value_heads=1)


@pytest.fixture
def model():
    """A small random one, with layers that do something."""
    torch.manual_seed(0)
    return FlexiDepth(CONFIG)


@pytest.fixture
def ids():
    return torch.randint(50, (2, 9), generator=torch.Generator().manual_seed(0))


def rotation_of(T):
    angle = torch.arange(T)[:, None] * torch.ones(8)
    return torch.cat([angle.cos()] * 2, -1), torch.cat([-angle.sin(), angle.sin()], -1)


@pytest.fixture(scope="module")
def few():
    """The first rows of each task of the tiny Llama, as both scripts read them."""
    data = reproduce.read(TINY, "valid")
    first = torch.tensor(sorted(i for task in {*data.tasks} for i in [
        i for i, each in enumerate(data.tasks) if each == task][:4]))
    return reproduce.Data(data.input_ids[first], data.targets[first], data.real[first],
                          [data.tasks[i] for i in first])


def test_readme_has_the_tables_of_the_file():
    """A figure of README.md that was typed, or is of an older run."""
    tables = reproduce.tables(json.loads((HERE / "reproduce.json").read_text()))
    readme = (HERE.parent / "README.md").read_text()
    found = dict(re.findall(r"<!-- (?!end)(\w+) -->\n\n(.*?)\n\n<!-- end -->", readme, re.DOTALL))
    assert found == {name: tables.get(name, "") for name in found} and len(found) == 6


def test_states_stand_for_the_layers_below(few, monkeypatch):
    """Trained parts that are given the states of other rows, or a head of other words."""
    monkeypatch.setattr(reproduce, "read", lambda folder, name: few)
    reproduce.states.cache_clear()
    torch.manual_seed(3)
    whole = FlexiDepth.from_pretrained(TINY)
    with torch.no_grad():
        upper = reproduce.routed_part(TINY, 3)
        for data in reproduce.states(TINY)[:2]:
            out, expected = upper(data.input_ids), whole(few.input_ids)
            torch.testing.assert_close(out.logits[few.real], expected.logits[few.real])
            assert torch.equal(out.kept[few.real], expected.kept[few.real])
    reproduce.states.cache_clear()


def test_measure_is_what_train_measures(few):
    """Exact match, depth or the mean over tasks counted in another way than by train.py."""
    model = FlexiDepth.from_pretrained(TINY, flexidepth=TINY)
    tokenizer = reproduce.Tokenizer.from_pretrained(TINY)
    rows = [reproduce.tokenize(json.loads(line), tokenizer, True)
            for line in (TINY / "valid.jsonl").read_text().splitlines()]
    ids = {tuple(row[real].tolist()) for row, real in zip(few.input_ids, few.real)}
    expected = evaluate(model, [row for row in rows if tuple(row.ids[:-1]) in ids], 8, "cpu")
    found = reproduce.measure(model, few)
    for task, row in expected.items():
        assert found["exact"][task] == pytest.approx(row["flexidepth_exact"])
        assert found["layers"][task] == pytest.approx(row["layers"])


def test_batches_take_every_row_once_an_epoch(few):
    """Sorting by length that loses rows, or always gives the short ones first."""
    steps = list(reproduce.batches(reproduce.Data(None, None, None, ["a"] * 320), 20, 0))
    assert [len(rows) for rows in steps] == [32] * 20
    assert torch.cat(steps[:10]).sort().values.tolist()[:5] != torch.cat(steps[:10]).tolist()[:5]
    counts = torch.cat(steps).bincount()
    assert len(counts) == 320 and (counts == 2).all()


def test_tokens_that_skip_are_hidden(model):
    """No K/V that hides nothing, hides kept tokens, or shifts the answers of those that attend."""
    normal, hides = Attention(CONFIG), KeptKeys(CONFIG)
    become(hides, normal)
    h, rotation = torch.randn(1, 6, 48), rotation_of(6)
    kept = torch.tensor([[True, False, True, True, False, True]])

    def run(attention, h, kept):
        return attention.forward_kept(h, *attention.keys_values(h, rotation), rotation, kept)
    changed = h.clone()
    changed[0, 1] += 1  # it skips
    assert torch.equal(run(hides, h, kept), run(hides, changed, kept))
    assert not torch.allclose(run(normal, h, kept), run(normal, changed, kept))
    changed[0, 2] += 1  # it is kept
    assert not torch.allclose(run(hides, h, kept)[-1], run(hides, changed, kept)[-1])
    everyone = torch.ones_like(kept)
    torch.testing.assert_close(run(hides, h, everyone), run(normal, h, everyone))
    (run(hides, h.requires_grad_(), kept).sum()).backward()
    assert h.grad.isfinite().all()


def test_linear_router_is_linear():
    """One that gives (B, T, 1), which would be broadcast against (B, T), or has a bias."""
    router, h = LinearRouter(CONFIG), torch.randn(2, 5, 48)
    assert router(h).shape == (2, 5)
    torch.testing.assert_close(router(2 * h), 2 * router(h))


def test_straight_through(model, ids):
    """Paths that are scaled after all; a router without gradient, or with one where a path is not its own."""
    layer = become(StraightThrough(CONFIG, 3), model.model["layers"][3])
    x, rotation = torch.randn(2, 9, 48), rotation_of(9)
    out, gate, kept = layer(x, rotation, None, "learned")
    full = DecoderLayer.forward(layer, x, rotation, None, "full")[0]
    skip = x + layer.router_proj(layer.post_attention_layernorm(x))
    assert kept.any() and not kept.all()
    torch.testing.assert_close(out, torch.where(kept[..., None], full, skip))
    gate.retain_grad()
    out.square().sum().backward()
    torch.testing.assert_close(gate.grad, (2 * out * (full - skip)).sum(-1), rtol=1e-3, atol=1e-4)
    assert layer.router.router_enc.weight.grad.abs().sum() > 0


@pytest.mark.parametrize("part", reproduce.PARTS)
def test_parts_removed_train(model, ids, part):
    """A part whose removal breaks training, or is no removal; a router that does not learn without it."""
    before = [p.shape for p in model.parameters()]
    reproduce.removed(model, part)
    data = reproduce.Data(ids, ids.roll(-1, 1), torch.ones_like(ids, dtype=torch.bool), ["a"] * 2)
    routers = [copy.deepcopy(layer.router.state_dict()) for layer in model.model["layers"][2:]]
    embedding = model.model["embed_tokens"].weight.clone()
    reproduce.train(model, data, 1e-3, 2, 0, reproduce.PARTS[part][1])
    assert torch.equal(model.model["embed_tokens"].weight, embedding)
    for layer, old in zip(model.model["layers"][2:], routers):
        assert all(not torch.equal(p, old[name]) for name, p in layer.router.state_dict().items())
    assert ([p.shape for p in model.parameters()] == before) == (part not in ("linear router", "no adapter"))


def test_bare_layers(model, ids):
    """Random skipping of the base that scales, adapts, or has another rate than asked for."""
    full = model(ids, route="full").logits
    layers, model.model["layers"] = model.model["layers"], torch.nn.ModuleList(
        become(reproduce.BareLayer(CONFIG, layer.index), layer) for layer in model.model["layers"])
    with torch.no_grad():
        torch.testing.assert_close(model(ids, route=reproduce.at_random(1.0, 0)(None, None)).logits, full)
        nothing = model(ids, route=reproduce.at_random(0.0, 0)(None, None)).logits
        torch.testing.assert_close(nothing, model.head(model.model["norm"](model.model["embed_tokens"](ids))))
    kept = reproduce.at_random(0.3, 0)(None, None)(2, torch.zeros(100, 100))
    assert kept.float().mean().item() == pytest.approx(0.3, abs=0.02)


def test_mindskip_decides_by_the_prompt(model, ids):
    """Decisions that see the answer, padding, or differ within a row; a router that gets no gradient."""
    targets, real = torch.full_like(ids, -100), torch.ones_like(ids, dtype=torch.bool)
    targets[:, 4:] = 1  # position 4 predicts the first token of the answer, so it is the last of the prompt
    gate = torch.rand(2, 9, requires_grad=True)
    pooled = reproduce.by_prompt(targets, real)(0, gate)
    torch.testing.assert_close(pooled, gate[:, :5].mean(1, keepdim=True).expand(2, 9))
    layer = become(reproduce.AttentionOnly(CONFIG, 3), model.model["layers"][3])
    x, rotation = torch.randn(2, 9, 48), rotation_of(9)
    skips, ones, kept = layer(x, rotation, None, lambda i, gate: 0 * gate + 0.4)
    assert not kept.any() and torch.equal(ones, torch.zeros(2, 9))
    torch.testing.assert_close(skips, x + layer.mlp(layer.post_attention_layernorm(x)))
    runs = layer(x, rotation, None, reproduce.by_prompt(targets, real))[0]
    runs.square().sum().backward()
    assert layer.router.router_enc.weight.grad.abs().sum() > 0
    kept = layer(x, rotation, None, lambda i, gate: 0 * gate + 0.6)[0]
    torch.testing.assert_close(kept, DecoderLayer.forward(layer, x, rotation, None, "full")[0])


def test_block_influence(model, ids):
    """Influence of the wrong layer, of padding, or by other than the angle between input and output."""
    real = torch.ones_like(ids, dtype=torch.bool)
    real[1, 5:] = False
    found = reproduce.block_influence(model, ids, real)
    layers = model.model["layers"]
    for i in range(4):
        states = []
        for n in (i, i + 1):
            model.model["layers"], model.model["norm"] = layers[:n], torch.nn.Identity()
            states.append(model.hidden_states(ids, route="full")[0])
        angles = [F.cosine_similarity(states[0][b, t], states[1][b, t], dim=0)
                  for b in range(2) for t in range(9) if real[b, t]]
        assert found[i] == pytest.approx(1 - sum(angles).item() / len(angles), abs=1e-5)


def test_merged_layers(model):
    """A merge that adds whole layers in place of differences, loses a layer, or changes the base."""
    layers = model.model["layers"]
    weights = [layer.mlp.up_proj.weight.clone() for layer in layers]
    three = reproduce.merged(layers, 1, 3)
    assert len(three) == 2 and three[0] is layers[0]
    torch.testing.assert_close(three[1].mlp.up_proj.weight, weights[2] + weights[3] - weights[1])
    torch.testing.assert_close(reproduce.merged(layers, 0, 2)[0].mlp.up_proj.weight, weights[1])  # the second
    assert all(torch.equal(layer.mlp.up_proj.weight, old) for layer, old in zip(layers, weights))


def test_figures():
    """A test of order that is not exact; interpolation beyond the curve; a plot with its axes swapped."""
    assert reproduce.chance_of_order([[1, 2, 3]] * 3) == pytest.approx(1 / 216)
    assert reproduce.chance_of_order([[3, 2, 1]] * 3) == 1
    assert reproduce.skipped_at([(2, 100), (3, 98)], 99) == pytest.approx(2.5)
    assert reproduce.skipped_at([(2, 98), (3, 99.5)], 99) == 3
    picture = reproduce.plot([("a", 6, 100.0), ("b", 12, 82.0)], 6, 12).split("\n")
    assert picture[1] == "  100 |a" and picture[10] == "   82 |" + " " * 60 + "b" and picture[11] == "   80 |"
    assert reproduce.in_readme("x\n<!-- parts -->\n\nold\n\n<!-- end -->\ny", {"parts": "new"}) == (
        "x\n<!-- parts -->\n\nnew\n\n<!-- end -->\ny")


def test_a_run_that_was_interrupted_goes_on(tmp_path, monkeypatch):
    """Runs done twice or lost, or under the name of another; a table of runs that are not all there."""
    asked = []

    class Pool:
        def __init__(self, *arguments):
            pass

        def __enter__(self):
            return self

        def __exit__(self, *error):
            pass

        def submit(self, function, folder, steps, seed, *arguments):
            asked.append((function, folder.name, steps, seed, *arguments))
            future = Future()
            future.set_result({"seed": seed, "third": [1 / 3]})
            return future
    monkeypatch.setattr(reproduce, "ProcessPoolExecutor", Pool)
    results = {"settings": {"seeds": 2, "steps": 7}, "runs": {"12x96/a/0": {"seed": 0}}}
    jobs = [("12x96/a/0", "a", ()), ("12x96/a/1", "a", ()), ("8x48/b/2", "b", (5,))]
    reproduce.run(jobs, results, tmp_path / "out.json", 2)
    assert asked == [("a", "tiny-llama", 7, 1), ("b", "8x48-7", 7, 2, 5)]
    written = json.loads((tmp_path / "out.json").read_text())
    assert written == results and len([*tmp_path.iterdir()]) == 1
    assert written["runs"] == {"12x96/a/0": {"seed": 0}, "12x96/a/1": {"seed": 1, "third": [0.33333]},
                               "8x48/b/2": {"seed": 2, "third": [0.33333]}}
    assert reproduce.tables(written) == {}


def test_plan():
    """Runs that share a name, so that one takes the other's place; a method at the depth of another seed."""
    settings = {"seeds": 3}
    jobs = reproduce.plan(settings) + reproduce.plan(settings, [7.0, 8.0, 9.0])
    assert len({name for name, *_ in jobs}) == len(jobs) == 3 + 3 * (6 + 6) + 3 * (3 + 8)
    assert [arguments for name, _, arguments in jobs if name == "12x96/untrained/1"] == [(8.0,)]
