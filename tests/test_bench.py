"""The benchmark counts what was executed. Its ideals are made of these counts, so they are held to
counts by hand, on a small model."""
import pytest
import torch

from bench import bench
from flexidepth import Config, FlexiDepth

D, KV, INNER, ROUTER, ADAPTER, VOCAB = 32, 16, 48, 2, 3, 40
KEYS_VALUES = 2 * D * KV
ROUTED = D * ROUTER + ROUTER * D + D       # enc, dec and head of a router, without its norm
FULL = 2 * D * D + 3 * D * INNER           # queries, output and mlp
SKIP = 3 * D * ADAPTER                     # the adapter


@pytest.fixture(scope="module")
def model():
    """Four layers, 2 and 3 routed by random gates. float32."""
    torch.manual_seed(0)
    config = Config(vocab_size=VOCAB, hidden_size=D, intermediate_size=INNER, num_hidden_layers=4,
                    num_attention_heads=4, num_key_value_heads=2)
    return FlexiDepth(config)


@pytest.mark.parametrize("share, kept", [(0.0, 2), (0.5, 1), (1.0, 0)])
def test_weights_read_for_a_token(model, share, kept):
    """This catches weights that are read for nothing, and a counter that misses some: the ideals of
    decoding are ratios of these bytes."""
    found = bench.executed(model, torch.tensor([[1]]), bench.skipping(model.config, share))
    layers = 4 * (2 * D + KEYS_VALUES) + 2 * FULL
    routed = 2 * (ROUTED + ROUTER) + kept * FULL + (2 - kept) * SKIP
    assert found.weight_bytes == 4 * (layers + routed + D + D * VOCAB)


def test_products_of_a_prompt(model):
    """This catches products that the counter misses, or attention counted for keys not seen: the
    ideal of a prefill is a ratio of these FLOPs."""
    T = 7
    ids = torch.ones(1, T, dtype=torch.int64)

    def flops(route):
        return bench.executed(model, ids, route).flops

    attention = 2 * 2 * D * T * (T + 1) / 2    # scores and values, of t + 1 keys at token t
    plain = 2 * T * (KEYS_VALUES + FULL) + attention
    head = 2 * D * VOCAB
    assert flops("full") == 4 * plain + head

    # Three of the seven tokens keep layers 2 and 3. Attention and adapter run at all places.
    first_three = torch.arange(T) < 3
    routed = 2 * T * (KEYS_VALUES + ROUTED) + 2 * 3 * FULL + 2 * T * SKIP + attention
    assert flops(lambda layer, gate: first_three) == 2 * plain + 2 * routed + head


def test_all_rows_on_a_small_model(monkeypatch, capsys):
    """This catches rows that no longer run after a change of the code that they measure. Row m
    compiles, which takes long."""
    monkeypatch.setattr(bench, "TRANSFORMERS", False)
    monkeypatch.setitem(bench.SHAPES, "1B", bench.SHAPES["135M"] | {
        "vocab_size": 99, "num_hidden_layers": 4, "max_position_embeddings": 512})
    bench.main("--device cpu --rounds 1 --only c f h i".split())
    lines = [line.split() for line in capsys.readouterr().out.splitlines() if line.startswith("| ")]
    assert [line[1] for line in lines] == ["row", *"cdccefhhhhhhhhi"]
