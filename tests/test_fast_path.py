"""What makes decoding fast must change nothing, and must be there.

The plain path is the model in training mode, which computes both paths of every token, without a
cache. The fast path is `generate`: one token at a time, and only the weights of the path it takes.
"""
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from flexidepth import KVCache, generate, layers_used


class Operations(TorchDispatchMode):
    """Collects the names of the operations that run, and the addresses of what they read. The
    lookup of an embedding is left out, because it reads one row alone."""
    def __init__(self):
        super().__init__()
        self.names = set()
        self.addresses = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function is not torch.ops.aten.embedding.default:
            self.names.add(function.name())
            tensors = [t for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)]
            self.addresses |= {t.data_ptr() for t in tensors}
        return function(*args, **kwargs or {})


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_tokens_and_depths_are_those_of_the_plain_path(model, ids, dtype):
    """A token may take the wrong path, a gate may scale the wrong thing, or a kernel may have
    another precision. In 16 bits the two ways round apart, so that there a token need only be as
    likely as the best one."""
    model = model.to(dtype)
    with torch.no_grad():
        for layer in model.config.routing_layers:  # Gates far from the threshold do not flip.
            model.model.layers[layer].router.router_head.weight.mul_(100)
    prompt = ids(1, 2)
    steps = list(generate(model, prompt, 24))
    tokens = torch.stack([step.token for step in steps], 1)                       # (1, 24)
    depths = [step.depth.item() for step in steps]

    out = model.train()(torch.cat([prompt, tokens], 1)[:, :-1])
    assert out.logits.dtype == dtype and out.logits.requires_grad
    assert (out.gates - 0.5).abs().min() > 0.05
    assert depths == layers_used(out.kept, model.config)[0, 1:].tolist()
    assert set(depths) == {2, 3, 4}

    logits = out.logits[0, 1:].float()
    chosen = logits.gather(1, tokens.T)[:, 0]
    short = ((logits.amax(-1) - chosen).max() / logits.abs().max()).item()
    assert short <= (0 if dtype == torch.float32 else 2 * torch.finfo(dtype).eps)


@pytest.mark.parametrize("rows", [1, 3])
def test_tokens_that_go_one_way_are_not_gathered(model, ids, rows):
    """The copies, masks and indices of gathering may be paid for where all tokens go one way."""
    def rule(layer, gate):
        return torch.full_like(gate, layer == 2)

    token = ids(rows, 1)
    plain = model.train()(token, route=rule)
    model.eval()
    with torch.inference_mode(), Operations() as operations:
        fast = model(token, KVCache(model.config, rows, 8), rule)

    assert "aten::linear" in operations.names
    words = ("index", "nonzero", "mask", "sort", "gather", "scatter")
    assert not [name for name in operations.names if any(word in name for word in words)]
    assert torch.equal(fast.kept, plain.kept) and fast.kept[0, 0].tolist() == [True, False]
    torch.testing.assert_close(fast.logits, plain.logits, rtol=0, atol=1e-6)


@pytest.mark.parametrize("kept", [0, 1, 2, None])
def test_weights_read_for_a_token(model, ids, kept):
    """Weights may be read for nothing, and decoding is as slow as the bytes that it reads. kept:
    how many of the two routed layers the token runs, None where routing is bypassed."""
    D, kv, inner, router, adapter = 32, 16, 48, 2, 3
    always = 2 * D + 2 * D * kv                                     # two norms, keys, values
    routing = D * router + router + router * D + D                  # enc, norm, dec, head
    full = 2 * D * D + 3 * D * inner
    skip = 3 * D * adapter
    expected = D + D * 40 + 4 * always                              # the last norm and the head
    if kept is None:
        expected += 4 * full
        route = "full"
    else:
        expected += 2 * full + 2 * routing + kept * full + (2 - kept) * skip
        open_layers = model.config.routing_layers[:kept]

        def route(layer, gate):
            return torch.full_like(gate, layer in open_layers)

    cache = KVCache(model.config, 1, 8)
    with torch.inference_mode(), Operations() as operations:
        model(ids(1, 1), cache, route)
    sizes = {p.data_ptr(): p.numel() for p in model.parameters()}
    assert sum(sizes[address] for address in operations.addresses & set(sizes)) == expected
