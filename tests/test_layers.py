"""The routed layers in training and use: dtypes of gates, gradients, sizes and the cost of a token.

The equations themselves are held to tests/reference.py by test_reference.py.
"""
import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from flexidepth import Config, FlexiDepth, trained_part


def set_logits(model, layer_index, logits):
    """Let a layer's router give these logits, in the dtype in which it runs."""
    def replace(router, inputs, output):
        return logits.to(output.dtype)

    model.model.layers[layer_index].router.register_forward_hook(replace)


def keep_all(layer_index, gate):
    return torch.ones_like(gate)


def keep_none(layer_index, gate):
    return torch.zeros_like(gate)


# ---- Gates and their dtypes ----------------------------------------------------------------------
@pytest.mark.parametrize("train", [False, True])
def test_gates_decide_and_multiply_as_rounded_to_the_base(folder, ids, train):
    """A gate may decide or multiply in float32 where the released model does so in bfloat16. Near
    the threshold training and use would then decide apart."""
    model = FlexiDepth.from_pretrained(folder, dtype=torch.bfloat16).train(train)
    logits = torch.randn(1, 64, generator=torch.Generator().manual_seed(0)).bfloat16()
    logits[0, :8] = torch.tensor([1e-3, 2e-3, 4e-3, 7e-3, -1e-3, 0.0, 1e-8, 1e-2])
    set_logits(model, 3, logits)
    out = model(ids(1, 64))
    assert out.gates.dtype == torch.float32
    assert torch.equal(out.gates[..., 1], logits.float().sigmoid())
    # In float32 some of the logits above give gates that are open, in bfloat16 they do not.
    expected = logits.sigmoid() > 0.5
    assert torch.equal(out.kept[..., 1], expected)
    assert not torch.equal(logits.float().sigmoid() > 0.5, expected)


@pytest.mark.parametrize("opens", [True, False])
def test_factors_are_those_of_a_sigmoid_in_bfloat16(folder, ids, opens):
    """The factor g or 1 - g may have other bits than those of a sigmoid computed in bfloat16."""
    model = FlexiDepth.from_pretrained(folder, dtype=torch.bfloat16)
    logits = torch.randn(1, 64, generator=torch.Generator().manual_seed(0)).bfloat16()
    set_logits(model, 3, logits)
    layer = model.model.layers[3]
    seen = {}

    def rule(layer_index, gate):
        seen[layer_index] = gate
        return torch.full_like(gate, opens)

    def keep_values(layer, inputs, output):
        seen["x"], seen["rotation"] = inputs[:2]
        seen["out"] = output[0]

    layer.register_forward_hook(keep_values)
    with torch.no_grad():
        model(ids(1, 64), route=rule)
        x, rotation = seen["x"], seen["rotation"]
        g = logits.sigmoid()[..., None]
        expected = layer.skip_path(x, g)
        if opens:
            h = layer.input_layernorm(x)
            attended = layer.self_attn(h, *layer.self_attn.keys_values(h, rotation), rotation)
            expected = layer.full_path(x, g, attended)
    assert seen[3].dtype == torch.bfloat16 and torch.equal(seen[3], logits.sigmoid())
    assert torch.equal(seen["out"], expected)


@pytest.mark.parametrize("through", ["gates", "logits"])
def test_a_gate_near_one_keeps_its_gradient(folder, ids, through):
    """In bfloat16 a gate at a logit of 8 is exactly 1 and has no gradient, so that L_skip and L_lm
    could never close it again. Training runs on a bfloat16 base under autocast."""
    model = FlexiDepth.from_pretrained(folder, dtype=torch.bfloat16)
    for p in trained_part(dict(model.named_parameters())).values():
        p.data = p.data.float()
    logits = torch.full((1, 8), 8.0, requires_grad=True)
    set_logits(model, 3, logits)
    with torch.autocast("cpu", torch.bfloat16):
        out = model(ids(1, 8))
        getattr(out, through).float().square().sum().backward()
    assert (out.gates[..., 1] < 1).all() and out.kept[..., 1].all()
    assert (logits.grad != 0).all()

    rounded = torch.full((1, 8), 8.0, dtype=torch.bfloat16, requires_grad=True)
    rounded.sigmoid().sum().backward()
    assert (rounded.grad == 0).all()  # This is what the test is about.


# ---- What is trained -----------------------------------------------------------------------------
@pytest.mark.parametrize("train", [False, True])
def test_training_changes_routers_and_adapters_alone(model, ids, train):
    """A tensor of the base may be trained, or decay, along with the gates."""
    assert not model.training  # Gradients are the paper's unless they are asked for otherwise.
    model.train(train)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=1e-2)
    for _ in range(3):
        out = model(ids(2, 8))
        (out.logits.square().mean() + out.gates.mean()).backward()
        optimizer.step()
    for name, p in model.named_parameters():
        assert torch.equal(p, before[name]) != (".router" in name), name


@pytest.mark.parametrize("route, idle", [(keep_all, "router_proj"), (keep_none, None)])
def test_a_path_that_no_token_takes(model, ids, route, idle):
    """Its weights may be read for nothing, which shows in gradients that are zeros and not None. In
    training mode both paths are computed, and each weight has a gradient."""
    for train in (False, True):
        model.train(train).zero_grad()
        model(ids(1, 4), route=route).logits.sum().backward()
        for name, p in trained_part(dict(model.named_parameters())).items():
            if not idle or idle not in name:
                assert (p.grad != 0).any(), name
            elif train:
                assert (p.grad == 0).all(), name
            else:
                assert p.grad is None, name


def test_training_mode_computes_the_same(model, ids):
    """Training mode may compute something else. Where all tokens take one path it is the same bit
    for bit. Where paths are mixed, products of gathered tokens may differ in the last bit."""
    for route in (keep_all, keep_none, "full", "learned"):
        with torch.no_grad():
            expected = model.eval()(ids(3, 20), route=route)
            out = model.train()(ids(3, 20), route=route)
        if route == "learned":
            assert 0.1 < out.kept.float().mean() < 0.9 and torch.equal(out.kept, expected.kept)
            torch.testing.assert_close(out.logits, expected.logits, rtol=0, atol=1e-6)
        else:
            assert torch.equal(out.logits, expected.logits)


def test_gradient_of_a_gate_in_training_mode(model, ids):
    """A gate learns from its own factor alone, as in the paper, unless model.train() is called. It
    then also has to learn what the path that was not taken would have given: the difference of the
    paths, projected on the gradient of the loss with respect to the layer's output. All other
    gradients have to stay, gathered or not, also of tokens whose keys alone were used."""
    layer = model.model.layers[3]
    inputs, outputs = [], []
    layer.register_forward_hook(
        lambda layer, given, out: inputs.append(given[0]) or outputs.append(out[0]))
    logits = torch.linspace(-1, 1, 20)[None].requires_grad_()
    set_logits(model, 3, logits)

    def run(rule=lambda layer_index, gate: gate > 0.5):
        # Layer 2 is left out of it: it keeps all tokens.
        return model(ids(1, 20), route=lambda i, gate: (keep_all if i == 2 else rule)(i, gate))

    def gradients():
        loss = run().logits.square().sum()
        adapter = layer.router_proj.up_proj.weight
        return torch.autograd.grad(loss, (logits, outputs[-1], inputs[-1], adapter))

    paper, *others = gradients()
    run(keep_all)
    run(keep_none)
    full, skip = outputs[-2:]  # All attend to the same keys, so a token can change its path alone.
    model.train()
    found, *still = gradients()
    torch.testing.assert_close(still, others)
    g = logits.detach().sigmoid()
    expected = paper + ((full - skip) * others[0]).sum(-1) * g * (1 - g)
    torch.testing.assert_close(found, expected)
    assert (found - paper).abs().min() > 1e-3


def test_fresh_routers_are_coin_flips(model, ids):
    """The gates of new routers may start shut or open, and then they hardly learn."""
    gates = model(ids(8, 16)).gates
    assert gates.shape == (8, 16, 2)
    assert abs(gates.mean() - 0.5) < 0.2 and gates.std() > 0.01


# ---- Sizes and costs -----------------------------------------------------------------------------
def test_size_of_the_8b():
    """Widths may differ from those of the released checkpoint, whose 16 routers and adapters are
    about 210 M parameters beside Llama-3-8B's 8.03 G."""
    with torch.device("meta"):
        model = FlexiDepth(Config(128256, 4096, 14336, 32, 32, 8))
    sizes = {True: 0, False: 0}
    for name, p in model.named_parameters():
        sizes[".router" in name] += p.numel()
    assert sizes[True] == 16 * (2 * 4096 * 256 + 256 + 4096 + 3 * 4096 * 896)
    assert sizes[False] == 8_030_261_248
    assert round(sizes[True] / 1e6) == 210


@pytest.mark.parametrize("kept", [0, 1, 5, 8])
def test_a_skipped_token_costs_what_the_method_says(model, ids, kept):
    """Work may be done and thrown away. A token that skips is due its router, key, value and
    adapter, one that does not its query, attention, output projection and mlp. If tokens go both
    ways, all run the small adapter. Norms are no products and are not counted. kept: how many of 8
    tokens run each of two layers."""
    D, kv, inner, router, adapter, T = 32, 16, 48, 2, 3, 8

    # The product of a token and an (m, n) matrix is 2mn. The attention of a query to T keys is 4TD.
    keys_values = 2 * (2 * D * kv)
    routing = 2 * (D * router + router * D + D)
    full = 2 * (2 * D * D + 3 * D * inner)
    attention = T * 4 * T * D
    skip = 2 * (3 * D * adapter)
    expected = 2 * (T * (keys_values + full) + attention)  # the two plain layers
    expected += 2 * (T * (keys_values + routing) + kept * full + T * skip * (kept < T))
    expected += T * 2 * D * 40                             # the head
    if kept:  # The causal kernel runs on all places, those of skipping tokens hold zeros.
        expected += 2 * attention

    # The plain backend is used, as torch does not count the products of the fused ones on a CPU.
    counter = FlopCounterMode(display=False)
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), counter:
        model(ids(1, T), route=lambda i, g: (torch.arange(T) < kept)[None])
    assert counter.get_total_flops() == expected
