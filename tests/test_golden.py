"""What tests/tiny-llama computes for one prompt, digit by digit, against tests/golden.json.

After tests/tiny-llama was made anew, this remakes the file, from the repository's root:

    python -m tests.test_golden
"""
import json
from pathlib import Path

import pytest
import torch

from flexidepth import FlexiDepth, Tokenizer, layers_used

FOLDER = Path(__file__).parent / "tiny-llama"
GOLDEN = Path(__file__).with_name("golden.json")
PROMPT = "Tom has 38 figs and gets 47 more."


def compute() -> dict:
    """The prompt's ids, each token's gates, decisions and depth, and the likeliest next tokens."""
    tokenizer = Tokenizer.from_pretrained(FOLDER)
    model = FlexiDepth.from_pretrained(FOLDER, flexidepth=FOLDER)
    ids = tokenizer.encode_chat([{"role": "user", "content": PROMPT}], add_generation_prompt=True)
    with torch.no_grad():
        out = model(torch.tensor([ids]))
    best = out.logits[0, -1].topk(5)
    return {
        "ids": ids,
        "gates": [[round(g, 6) for g in token] for token in out.gates[0].tolist()],
        "kept": out.kept[0].int().tolist(),
        "depths": layers_used(out.kept, model.config)[0].tolist(),
        "top_ids": best.indices.tolist(),
        "top_logits": [round(logit, 5) for logit in best.values.tolist()],
    }


def test_golden():
    """A change that is meant to change nothing may change what the model computes. Other machines
    add in another order, so that the last digits may differ."""
    expected = json.loads(GOLDEN.read_text())
    actual = compute()
    for name in ("ids", "kept", "depths", "top_ids"):
        assert actual[name] == expected[name], name
    gates = torch.tensor(actual["gates"]), torch.tensor(expected["gates"])
    torch.testing.assert_close(*gates, rtol=0, atol=1e-5)
    assert actual["top_logits"] == pytest.approx(expected["top_logits"], rel=0, abs=1e-4)
    # Both paths are taken, and no decision is so near that other machines may decide otherwise.
    decisions = torch.tensor(expected["kept"])
    assert 0.1 < decisions.float().mean() < 0.9 and (gates[1] - 0.5).abs().min() > 1e-4


if __name__ == "__main__":
    lines = [f"{json.dumps(name)}: {json.dumps(value)}" for name, value in compute().items()]
    GOLDEN.write_text("{\n" + ",\n".join(lines) + "\n}\n")
