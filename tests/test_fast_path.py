"""What makes decoding fast must change nothing: not a token, not a depth, not the caller's torch.

The plain path is the model as it trains: no cache, every token gathered (gradients are on), torch as
it comes. The fast one is `generate`: one token at a time, nothing gathered, oneDNN off.
"""
import pytest
import torch
from test_files import ids, write_checkpoint
from torch.utils._python_dispatch import TorchDispatchMode

from bench import SHAPES, executed, skipping
from flexidepth import Config, FlexiDepth, KVCache, generate, layers_used


@pytest.fixture
def model(tmp_path):
    """Four layers, 2 and 3 routed by random gates. float32."""
    folder = write_checkpoint(tmp_path)
    torch.manual_seed(0)
    return FlexiDepth.from_pretrained(folder)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_tokens_and_depths_are_those_of_the_plain_path(model, dtype):
    """A path taken by the wrong token, a gate that scales the wrong thing, a kernel of another
    precision. In 16 bits the two round apart, so there a token need only be as likely as the best."""
    model = model.to(dtype)
    with torch.no_grad():
        for layer in model.config.routing_layers:  # gates too decided for rounding to turn
            model.model["layers"][layer].router.router_head.weight.mul_(100)
    prompt = ids(1, 2)
    tokens = list(generate(model, prompt, 24))
    whole = torch.cat([prompt, torch.tensor([[token for token, _ in tokens]])], 1)
    out = model(whole[:, :-1])
    assert out.logits.dtype == dtype and out.logits.requires_grad
    assert (out.gates.float() - 0.5).abs().min() > 0.05
    assert [d for _, d in tokens] == layers_used(out.kept, model.config)[0, 1:].tolist()
    assert {d for _, d in tokens} == {2, 3, 4}
    logits = out.logits[0, 1:].float()
    chosen = logits.gather(1, torch.tensor([[token] for token, _ in tokens]))[:, 0]
    short = ((logits.max(-1).values - chosen).max() / logits.abs().max()).item()
    assert short <= (0 if dtype == torch.float32 else 2 * torch.finfo(dtype).eps)


@pytest.mark.parametrize("rows", [1, 3])
def test_tokens_that_go_one_way_are_not_gathered(model, rows):
    """The copies, masks and indices of gathering, paid for a choice between all and nothing."""
    class Operations(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            names.add(function.name())
            return function(*args, **kwargs or {})

    names = set()
    token, rule = ids(rows, 1), lambda layer, gate: torch.full_like(gate, layer == 2)
    plain = model(token, route=rule)
    with torch.inference_mode(), Operations():
        fast = model(token, KVCache(model.config, rows, 8), rule)
    assert "aten::linear" in names
    assert not [name for name in names if "index" in name or "nonzero" in name or "mask" in name]
    assert torch.equal(fast.kept, plain.kept) and fast.kept[0, 0].tolist() == [True, False]
    torch.testing.assert_close(fast.logits, plain.logits, rtol=0, atol=1e-6)


@pytest.mark.parametrize("onednn", [True, False])
def test_a_callers_torch_stays_as_it_was(model, onednn, monkeypatch):
    """A switch left over when the caller gets a token, when an answer is abandoned, or by an error."""
    monkeypatch.setattr(torch.backends.mkldnn, "enabled", onednn)

    def settings():
        return torch.backends.mkldnn.enabled, torch.is_grad_enabled(), torch.is_inference_mode_enabled()
    seen = set()

    def rule(layer, gate):
        seen.add((gate.shape[1], settings()))
        if len(seen) == 2 and fails:
            raise ZeroDivisionError
        return gate > 0.5
    for fails in (False, True):
        seen.clear()
        answer = generate(model, ids(1, 5), 4, route=rule)
        assert next(answer) and settings() == (onednn, True, False)
        if fails:
            with pytest.raises(ZeroDivisionError):
                next(answer)
        else:
            next(answer)
            answer.close()
        assert settings() == (onednn, True, False)
    # Many rows of a prompt by torch's choice, the single ones after it without oneDNN.
    assert seen == {(5, (onednn, False, True)), (1, (False, False, True))}


def test_weights_read_for_a_token(model):
    """Weights that are read for nothing: decoding is as slow as the bytes it touches."""
    D, kv, inner, router, adapter = 32, 16, 48, 2, 3
    always = 2 * D + 2 * D * kv                                     # two norms, keys, values
    routed = D * router + router + router * D + D                   # enc, norm, dec, head
    full, skip = 2 * D * D + 3 * D * inner, 3 * D * adapter
    outside = D + D * 40                                            # norm and head
    for share, kept in ((0.0, 2), (0.5, 1), (1.0, 0)):
        counts = executed(model, ids(1, 1), skipping(model.config, share))
        expected = outside + 4 * always + 2 * full + 2 * routed + kept * full + (2 - kept) * skip
        assert counts["weight_bytes"] == 4 * expected and counts["layers"] == 2 + kept
    bypassed = executed(model, ids(1, 1), "full")
    assert bypassed["weight_bytes"] == 4 * (outside + 4 * always + 4 * full) and bypassed["layers"] == 4


def test_skipped_layers_of_the_benchmark():
    """Shares that are not what the table says; the 8B's 8 of 32 layers are half of those routed."""
    config = Config(**SHAPES["8B"])
    gate = torch.ones(1, 1)
    for share, skipped in ((0.0, 0), (0.25, 4), (0.5, 8), (0.75, 12), (1.0, 16)):
        rule = skipping(config, share)
        assert sum(not rule(layer, gate).item() for layer in range(16, 32)) == skipped
