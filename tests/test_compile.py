"""Compiled decoding must give the tokens and depths of plain decoding."""
import shutil
import sys
from pathlib import Path

import pytest
import torch

import sample
from flexidepth import FlexiDepth, RowSums, Tokenizer, compile_decode, generate

TINY = Path(__file__).resolve().parent / "tiny-llama"


@pytest.fixture(scope="module")
def models():
    """The tiny Llama with its gates, plain and compiled."""
    if not (shutil.which("g++") or shutil.which("clang++")):
        pytest.skip("torch.compile needs a C++ compiler")
    compiled = FlexiDepth.from_pretrained(TINY, TINY)
    compile_decode(compiled)
    assert type(compiled.model.layers[0].mlp.up_proj) is RowSums  # it decides the speed alone
    return FlexiDepth.from_pretrained(TINY, TINY), compiled


@pytest.mark.parametrize("route", ["learned", "full"])
def test_tokens_and_depths_are_those_of_plain_decoding(models, route):
    """The compiled layer may take the wrong path, scale by the wrong gate, put a key in the wrong
    place of the cache, or see places of the cache that hold nothing yet."""
    tokenizer = Tokenizer.from_pretrained(TINY)
    depths = set()
    # Three lengths, because the compiler makes other code from the second one on.
    for text in ("37 + 48 =", "Finish: the early bird", "Copy 2 to 3: 31 58 64 90"):
        prompt = torch.tensor([tokenizer.encode_chat([{"role": "user", "content": text}], True)])
        plain, compiled = ([*generate(model, prompt, 12, route=route)] for model in models)
        for expected, step in zip(plain, compiled, strict=True):
            assert (step.token, step.depth) == (expected.token, expected.depth)
            depths.add(step.depth.item())
            if route == "full":
                assert step.gates is step.kept is None
            else:
                assert torch.equal(step.kept, expected.kept)
                torch.testing.assert_close(step.gates, expected.gates, rtol=0, atol=2e-4)
    assert route == "full" or len(depths) > 2


def test_batches_and_other_routes_still_run(models):
    """Only a lone token has compiled code: a batch, or a route that is a function, may meet it."""
    prompts = torch.randint(20, 200, (3, 5))
    for route in ("learned", lambda layer_index, gate: gate > 0.6):
        for prompt in (prompts, prompts[:1]):
            plain, compiled = (list(generate(model, prompt, 4, route=route)) for model in models)
            for expected, step in zip(plain, compiled, strict=True):
                assert torch.equal(step.token, expected.token)
                assert torch.equal(step.depth, expected.depth)


def test_a_lone_token_runs_compiled_code(monkeypatch):
    """Compiled code would be made and not run for a single token, or run for a batch."""
    calls = []

    def note_calls(function, **options):
        def noted(*arguments):
            calls.append(function.__name__)
            return function(*arguments)
        return noted

    monkeypatch.setattr(torch, "compile", note_calls)
    model = FlexiDepth.from_pretrained(TINY)
    compile_decode(model)
    for rows, layers in ((1, 2 * 12), (2, 0)):
        calls.clear()
        prompts = torch.ones(rows, 5, dtype=torch.int64)
        assert len(list(generate(model, prompts, 3, route="full"))) == 3
        assert calls.count("decode_layer") == layers
        assert len(calls) == layers + 3  # the head is compiled for any shape


def test_the_option_of_sample_py(monkeypatch):
    """--compile may not reach the model."""
    models = []
    monkeypatch.setattr(sample, "compile_decode", models.append)
    monkeypatch.setattr(sys, "argv", ["sample.py", "--compile", "--flexidepth", str(TINY),
                                      "--prompt", "37 + 48 =", "--max-new-tokens", "1"])
    sample.main()
    assert len(models) == 1 and isinstance(models[0], FlexiDepth)
