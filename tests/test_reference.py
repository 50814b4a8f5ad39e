"""The torch model against reference.py, the same method written independently in plain loops.

Whatever flexidepth.py does for speed (batches, masks, gathering the kept tokens, a cache), and for
training, must leave logits, gates and decisions as they are there. The models are tiny and random:
this holds the arithmetic to the paper, not to any checkpoint.
"""
import numpy as np
import pytest
import torch

import reference
from flexidepth import Config, FlexiDepth, KVCache, layers_used, skip_loss

# Four layers, the latter two routed. eps is large, or a norm that has another one would pass.
SHAPE = dict(vocab_size=29, hidden_size=32, intermediate_size=48, num_hidden_layers=4,
             num_attention_heads=4, num_key_value_heads=2, rms_norm_eps=1e-2)
LLAMA3 = dict(rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
              original_max_position_embeddings=64)
SHAPES = {
    "gqa": {},
    "mha": dict(num_key_value_heads=None),
    "one_kv_head": dict(num_key_value_heads=1),
    "head_dim": dict(head_dim=6),
    "tied": dict(tie_word_embeddings=True),
    "llama3_rope": dict(head_dim=16, rope_theta=500000.0, rope_scaling=LLAMA3),
    "arbitrary_layers": dict(routing_layers=[0, 2]),
    "sizes_and_threshold": dict(router_size=5, adapter_size=7, threshold=0.4),
}
ATOL = 1e-5  # float32 against float64; logits are of order 1


def build(seed=0, **changes):
    """A random model whose gates lie on both sides of the threshold, and its weights in NumPy."""
    model = FlexiDepth(Config(**SHAPE | changes))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(generator=generator)
            if parameter.ndim == 1:
                parameter.mul_(0.3).add_(1.0)                 # norms: near 1, seldom 1
            else:
                parameter.mul_(parameter.shape[1] ** -0.5)    # outputs about as large as inputs
            if "router_head" in name:
                parameter.mul_(2.0)                           # gates from about 0.1 to 0.9
    weights = {name: tensor.numpy() for name, tensor in model.state_dict().items()}
    if model.config.tie_word_embeddings:
        del weights["lm_head.weight"]  # as in files
    return model, weights


def random_ids(*shape, seed=0):
    return torch.randint(SHAPE["vocab_size"], shape, generator=torch.Generator().manual_seed(seed))


def run(model, input_ids, **options):
    """The torch model on (B, T): logits, gates and kept in NumPy, the last two None if bypassed."""
    with torch.no_grad():
        out = model(input_ids, **options)
    parts = (out.logits, out.gates, out.kept)
    return tuple(None if part is None else part.numpy() for part in parts)


def assert_same(actual, expected):
    """Decisions first: where one differs, the logits differ for that reason alone."""
    for name, a, e in zip(("kept", "gates", "logits"), actual[::-1], expected[::-1]):
        assert (a is None) == (e is None), name
        if e is not None:
            assert a.shape == e.shape, name
            atol = 0 if name == "kept" else ATOL
            np.testing.assert_allclose(a, e, rtol=0, atol=atol, err_msg=name)


def torch_rule(layer_index, gate):
    """Opens gates by layer, position and score, mostly those that the threshold would shut."""
    return (gate < 0.4) | ((layer_index + torch.arange(gate.shape[1])) % 3 == 0)


def reference_rule(layer_index, gate, position):
    return gate < 0.4 or (layer_index + position) % 3 == 0


@pytest.mark.parametrize("route", ["learned", "full", "rule"])
@pytest.mark.parametrize("shape", SHAPES)
def test_agrees_with_the_reference(shape, route):
    """A wrong equation changes the logits. Examples are g or 1 - g dropped or misplaced, tanh
    before the router's norm, the adapter's projections swapped, keys of skipped tokens lost,
    rotary pairs interleaved, query heads on the wrong key/value head, or a rule that is asked
    with the wrong layer index."""
    model, weights = build(**SHAPES[shape])
    ids = random_ids(1, 12)
    rules = (torch_rule, reference_rule) if route == "rule" else (route, route)
    expected = reference.forward(weights, model.config, ids[0].tolist(), rules[1])
    for train in (False, True):
        actual = run(model.train(train), ids, route=rules[0])
        assert_same([part if part is None else part[0] for part in actual], expected)

    logits, gates, kept = expected
    assert 0.3 < logits.std() < 10  # or the absolute tolerance would mean little
    if route != "full":
        # Both paths ran, and in every layer, or the test above would have shown half of the method.
        assert kept.any(axis=0).all() and not kept.all(axis=0).any()
        # No near-tie, in which float32 and float64 may rightly decide differently.
        assert min(abs(gates - model.config.threshold).min(), abs(gates - 0.4).min()) > 1e-4


def test_reference_in_float32():
    """A step of the reference may slip into float64 where float32 was asked for."""
    model, weights = build()
    ids = random_ids(10).tolist()
    single = reference.forward(weights, model.config, ids, dtype=np.float32)
    double = reference.forward(weights, model.config, ids)
    assert (single[0].dtype, single[1].dtype) == (np.float32, np.float32)
    assert_same(single, double)


def test_llama3_rope_reaches_its_three_bands():
    """A scaling that treats the fast, the blended or the slow pairs wrongly goes unseen where the
    model has no such pair. The shape "llama3_rope" must have all three."""
    config = Config(**SHAPE | SHAPES["llama3_rope"])
    scaled = reference.rope_frequencies(config, 16)
    config.rope_scaling = None
    ratio = reference.rope_frequencies(config, 16) / scaled
    assert ratio[0] == pytest.approx(1) and 1.1 < ratio[1] < 7.9 and ratio[2:] == pytest.approx(8)


def test_rows_of_a_batch_do_not_meet():
    """Queries may be put into the wrong row or place, as rows keep unlike numbers of tokens, or a
    mask may let a token see the future, another row or the padding after a shorter row."""
    model, weights = build()
    lengths = [11, 11, 5, 11]
    ids = random_ids(4, 11)
    ids[2, 5:] = 0  # padding
    logits, gates, kept = run(model, ids)
    assert len(set(kept[:, :, 0].sum(1))) > 1
    for row, length in enumerate(lengths):
        expected = reference.forward(weights, model.config, ids[row, :length].tolist())
        assert_same([part[row, :length] for part in (logits, gates, kept)], expected)
        alone = run(model, ids[row:row + 1, :length])
        assert_same([part[0] for part in alone], expected)


@pytest.mark.parametrize("kept_rows", [[False, False], [True, True], [False, True]],
                         ids=["none", "all", "unlike"])
def test_all_or_nothing(kept_rows):
    """An empty gather may crash where no token or every token is kept, or the zeros in the place
    of a token that skips may reach the result. With all gates open g still scales the mlp."""
    model, weights = build()
    ids = random_ids(2, 7)
    actual = run(model, ids, route=lambda i, g: torch.tensor(kept_rows)[:, None].expand_as(g))
    for row, keep in enumerate(kept_rows):
        expected = reference.forward(weights, model.config, ids[row].tolist(), lambda i, g, t: keep)
        assert_same([part[row] for part in actual], expected)
        base = reference.forward(weights, model.config, ids[row].tolist(), "full")[0]
        assert abs(expected[0] - base).max() > 0.1


@pytest.mark.parametrize("threshold, opens", [(0.5, False), (0.4999, True)])
def test_a_gate_at_the_threshold_is_closed(threshold, opens):
    """The comparison may be >= where it must be >. A head of zeros makes every gate exactly 0.5,
    which is not above 0.5."""
    model, weights = build(threshold=threshold)
    for layer in model.config.routing_layers:
        weights[f"model.layers.{layer}.router.router_head.weight"][:] = 0  # the model's own memory
    ids = random_ids(1, 6)
    actual = [part[0] for part in run(model, ids)]
    assert (actual[1] == 0.5).all() and (actual[2] == opens).all()
    assert_same(actual, reference.forward(weights, model.config, ids[0].tolist()))


@pytest.mark.parametrize("route", ["learned", "full"])
def test_prefill_and_decode(route):
    """Positions or masks may start again at 0 when tokens are fed through a cache, first some, then
    one, then some, or the keys and values of skipped tokens may never reach the cache."""
    model, weights = build()
    ids = random_ids(2, 12)
    cache = KVCache(model.config, 2, 12)
    chunks = [run(model, chunk, cache=cache, route=route)
              for chunk in ids.split([5, 1, 4, 1, 1], 1)]
    for row in range(2):
        expected = reference.forward(weights, model.config, ids[row].tolist(), route)
        actual = [None if parts[0] is None else np.concatenate([part[row] for part in parts])
                  for parts in zip(*chunks)]
        assert_same(actual, expected)


def test_skip_loss():
    """The square may stand inside the sum over layers, a mean over layers may stand for their sum,
    or padding may count in the mean."""
    gates = torch.tensor([[[0.5, 0.25], [1.0, 0.0], [0.9, 0.9]]])
    mask = torch.tensor([[True, True, False]])
    # ((0.5 + 0.25)² + (1.0 + 0.0)²) / 2 = (0.5625 + 1) / 2
    assert skip_loss(gates, mask).item() == pytest.approx(0.78125)
    assert reference.skip_loss(gates.numpy(), mask.numpy()) == pytest.approx(0.78125)

    gates = torch.rand(3, 5, 4, generator=torch.Generator().manual_seed(0))
    mask = torch.arange(5) < torch.tensor([5, 2, 4])[:, None]
    assert skip_loss(gates, mask).item() == pytest.approx(
        reference.skip_loss(gates.numpy(), mask.numpy()))


def test_layers_used():
    """Plain layers may be left out, skipped ones counted, or the sum taken over the wrong axis."""
    config = Config(**SHAPE)
    assert config.routing_layers == [2, 3]  # the latter half: 2 plain layers, 2 with gates
    kept = torch.tensor([[[True, True], [True, False], [False, False]]])
    assert layers_used(kept, config).tolist() == [[4, 3, 2]]
    assert reference.layers_used(kept[0].numpy(), 4).tolist() == [4, 3, 2]

    model, _ = build(routing_layers=[0, 1, 3])
    kept = model(random_ids(2, 8)).kept
    for row in range(2):
        expected = reference.layers_used(kept[row].numpy(), 4)
        assert layers_used(kept, model.config)[row].tolist() == expected.tolist()
