"""Generation: tokens, depths, ends, batches, sampling and refusals, on models made on the spot."""
import json

import pytest
import torch

from flexidepth import FlexiDepth, KVCache, Step, generate, layers_used


def run(model, input_ids, max_new_tokens, **options):
    """The tokens and depths of all rows, each (B, number of new tokens)."""
    steps = list(generate(model, input_ids, max_new_tokens, **options))
    return torch.stack([s.token for s in steps], 1), torch.stack([s.depth for s in steps], 1)


def test_generate_is_the_uncached_model(model, ids):
    """A cache or a depth may be off by one, or gates may be those of another position. All must be
    those of a fresh forward."""
    prompt = ids(1, 5)
    steps = list(generate(model, prompt, 12))
    tokens = torch.stack([step.token for step in steps], 1)
    with torch.no_grad():
        out = model(torch.cat([prompt, tokens], 1)[:, :-1])
    depths = layers_used(out.kept, model.config)[0, 4:].tolist()
    assert tokens.tolist() == out.logits[:, 4:].argmax(-1).tolist()
    assert [step.depth.item() for step in steps] == depths and len(set(depths)) > 1
    assert [step.kept.shape[1] for step in steps] == [5] + [1] * 11
    assert torch.equal(torch.cat([step.kept for step in steps], 1), out.kept)
    gates = torch.cat([step.gates for step in steps], 1)
    torch.testing.assert_close(gates, out.gates, rtol=0, atol=1e-6)
    for step in generate(model, prompt, 3, route="full"):
        assert step == Step(step.token, torch.tensor([4]), None, None)


def test_generate_stops(model, ids):
    """An answer may run past its stop token, the count asked for or the end of the context."""
    prompt = ids(1, 5)
    tokens = run(model, prompt, 6)[0][0].tolist()
    assert len(tokens) == 6
    end = tokens.index(tokens[2]) + 1
    assert run(model, prompt, 6, stop_ids={tokens[2]})[0][0].tolist() == tokens[:end]
    # Of 64 positions the prompt takes 5, and the last one of 60 tokens is not fed back.
    assert run(model, prompt, 1000)[0].shape == (1, 60)
    assert run(model, ids(1, 64), 1000)[0].shape == (1, 1)
    assert not list(generate(model, prompt, 0))


def test_the_callers_gradients_stay_on(model, ids):
    """A caller who looks at an answer token by token, or leaves it, may be left in a mode of
    torch's in which nothing can be trained."""
    answer = generate(model, ids(1, 5), 4)
    for go_on in (answer.__next__, answer.__next__, answer.close):
        go_on()
        assert torch.is_grad_enabled() and not torch.is_inference_mode_enabled()


# ---- Batches -------------------------------------------------------------------------------------
@pytest.mark.parametrize("route", ["learned", "full"])
def test_a_batch_is_its_rows(model, ids, route):
    """A row of a batch may get the tokens, depths or keys of another row."""
    prompts = ids(4, 7)
    tokens, depths = run(model, prompts, 15, route=route)
    assert tokens.shape == depths.shape == (4, 15)
    assert tokens.dtype == depths.dtype == torch.int64
    assert len(set(map(tuple, tokens.tolist()))) == 4
    for row in range(4):
        alone = run(model, prompts[row:row + 1], 15, route=route)
        assert tokens[row].tolist() == alone[0][0].tolist()
        assert depths[row].tolist() == alone[1][0].tolist()
    if route == "learned":  # Else the rows would all have gone one way, and nothing was gathered.
        assert any(len(set(step)) > 1 for step in depths.T.tolist())


def test_rows_that_stop_at_different_times(model, ids):
    """The first row that ends may end all, or one that has ended may disturb those that go on."""
    prompts = ids(4, 7)
    free = run(model, prompts, 15)[0].tolist()
    stops = {free[0][2], free[1][6], free[2][9], free[3][12]}
    ends = [min(i for i, token in enumerate(row) if token in stops) + 1 for row in free]
    assert len(set(ends)) > 1 and max(ends) < 15
    tokens = run(model, prompts, 15, stop_ids=stops)[0].tolist()
    assert len(tokens[0]) == max(ends)
    for row, end in enumerate(ends):
        assert tokens[row][:end] == free[row][:end]


# ---- Sampling ------------------------------------------------------------------------------------
def test_sampling(model, ids):
    """A seed may not repeat its text, equal rows may all be given one draw, and a nucleus may let
    the tail through or lose its best token."""
    prompt = ids(1, 5)

    def draw(seed, count=20, rows=1, **options):
        options["generator"] = torch.Generator().manual_seed(seed)
        return run(model, prompt.expand(rows, -1), count, **options)[0].tolist()

    assert draw(0, temperature=1.0) == draw(0, temperature=1.0) != draw(1, temperature=1.0)
    first, second = draw(0, rows=2, temperature=1.0)
    assert first != second
    assert draw(0, temperature=1.0, top_p=1e-6) == draw(0)
    probs = model(prompt).logits[0, -1].softmax(-1).sort(descending=True)
    nucleus = set(probs.indices[:int((probs.values.cumsum(0) < 0.3).sum()) + 1].tolist())
    first = {draw(seed, 1, temperature=1.0, top_p=0.3)[0][0] for seed in range(40)}
    assert first <= nucleus and len(first) > 1


def test_the_global_generator_is_the_default(model, ids):
    """Text without a generator may not follow torch.manual_seed, or may always be the same."""
    def draw(seed):
        torch.manual_seed(seed)
        return run(model, ids(2, 5), 8, temperature=1.0)[0].tolist()

    assert draw(0) == draw(0) != draw(1)


@pytest.mark.parametrize("temperature", [1e-3, 1e-38, 5e-324])
@pytest.mark.parametrize("scale", [1, 1e30])
def test_a_tiny_temperature_is_greedy(model, ids, temperature, scale):
    """Logits that are divided by a tiny number may become infinite, and their softmax nan."""
    with torch.no_grad():
        model.lm_head.weight.mul_(scale)
    prompts = ids(2, 5)
    greedy = run(model, prompts, 6)[0].tolist()
    assert run(model, prompts, 6, temperature=temperature)[0].tolist() == greedy


# ---- Refusals ------------------------------------------------------------------------------------
@pytest.mark.parametrize("options, word", [
    ({"input_ids": torch.zeros(1, 0, dtype=torch.long)}, "0 tokens"),
    ({"input_ids": torch.zeros(3, dtype=torch.long)}, "expected 2"),
    ({"input_ids": torch.zeros(1, 65, dtype=torch.long)}, "65 tokens; there is room for 64"),
    ({"temperature": -1}, "temperature"), ({"temperature": float("nan")}, "temperature nan"),
    ({"top_p": 0}, "top_p"), ({"top_p": 1.1}, "top_p"), ({"top_p": float("nan")}, "top_p nan"),
])
def test_generate_refuses(model, ids, options, word):
    """An empty or too long prompt may crash deep inside, or an option may do nothing."""
    with pytest.raises(ValueError, match=word):
        list(generate(model, **{"input_ids": ids(1, 3), "max_new_tokens": 2} | options))


@pytest.mark.parametrize("value", ["nan", "inf"])
@pytest.mark.parametrize("options", [{}, {"temperature": 1.0, "top_p": 0.9}])
def test_logits_that_are_not_finite(model, ids, value, options):
    """Broken weights may give text of no meaning, or an error of torch's that names no cause."""
    with torch.no_grad():
        model.lm_head.weight[7, 0] = float(value)
    with pytest.raises(ValueError, match="logits after 3 tokens are not finite.*float32"):
        list(generate(model, ids(2, 3), 2, **options))


def test_logits_that_become_nan_in_one_row(model, ids):
    """A row that turns to nan after some tokens may go unseen beside one that does not."""
    prompts = ids(2, 3)
    tokens = run(model, prompts, 4)[0]
    bad = next(token for token in tokens[1, 1:].tolist() if token not in tokens[0])
    fed_back = tokens[1].tolist().index(bad) + 1
    with torch.no_grad():
        assert bad not in prompts
        model.model.embed_tokens.weight[bad] = float("nan")
    with pytest.raises(ValueError, match=f"after {3 + fed_back} tokens"):
        list(generate(model, prompts, 8))


def test_a_cache_that_is_full(model, ids):
    """More tokens than there is room for may be stored in part."""
    cache = KVCache(model.config, 2, 8)
    with torch.no_grad():
        model(ids(2, 7), cache)
        with pytest.raises(ValueError, match="9 tokens; there is room for 8"):
            model(ids(2, 2), cache)
        model(ids(2, 1), cache)  # What is refused changes nothing.
    assert cache.length == 8


# ---- A real model --------------------------------------------------------------------------------
def test_a_real_llama_says_what_it_said_elsewhere(data):
    """A slip in Llama or the cache changes the 200 tokens of a model that nobody here made."""
    folder = data / "stories260K"
    expected = json.loads((folder / "greedy_ids.json").read_text())
    model = FlexiDepth.from_pretrained(folder)
    steps = generate(model, torch.tensor([expected[:1]]), len(expected) - 1, route="full")
    assert expected[:1] + [step.token.item() for step in steps] == expected
