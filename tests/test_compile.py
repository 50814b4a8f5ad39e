"""Compiled decoding must give the tokens and depths of plain decoding."""
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from flexidepth import FlexiDepth, Tokenizer, compile_decode, generate

TINY = Path(__file__).resolve().parent / "tiny-llama"


def decode(model: FlexiDepth, prompt: list[int], **settings) -> list[tuple[int, int]]:
    return [(token.item(), depth.item())
            for token, depth in generate(model, torch.tensor([prompt]), 12, **settings)]


@pytest.fixture(scope="module")
def models():
    """The tiny Llama with its gates, plain and compiled."""
    compiled = FlexiDepth.from_pretrained(TINY, TINY)
    try:
        compile_decode(compiled)
    except ValueError as error:
        pytest.skip(str(error))
    return FlexiDepth.from_pretrained(TINY, TINY), compiled


@pytest.mark.parametrize("route", ["learned", "full"])
def test_tokens_and_depths_are_those_of_plain_decoding(models, route):
    """The compiled layer may take the wrong path, scale by the wrong gate, put a key in the wrong
    place of the cache, or see places of the cache that hold nothing yet."""
    plain, compiled = models
    tokenizer = Tokenizer.from_pretrained(TINY)
    depths = set()
    # Three lengths, because the compiler makes other code from the second one on.
    for text in ("37 + 48 =", "Finish: the early bird", "Copy 2 to 3: 31 58 64 90"):
        prompt = tokenizer.encode_chat([{"role": "user", "content": text}], True)
        expected = decode(plain, prompt, route=route)
        assert decode(compiled, prompt, route=route) == expected
        depths |= {depth for _, depth in expected}
    assert route == "full" or len(depths) > 2


def test_batches_and_other_routes_still_run(models):
    """Only a single token has compiled code: a batch, or a route that is a function, must not
    meet it."""
    plain, compiled = models
    prompts = torch.randint(20, 200, (3, 5))
    for route in ("learned", lambda layer_index, gate: gate > 0.6):
        for prompt in (prompts, prompts[:1]):
            steps = list(zip(generate(plain, prompt, 4, route=route),
                             generate(compiled, prompt, 4, route=route)))
            for expected, got in steps:
                assert torch.equal(torch.stack(expected), torch.stack(got))


def test_a_lone_token_runs_compiled_code(monkeypatch):
    """Compiled code would be made and not run for a single token, or run for a batch."""
    calls = []

    def note_calls(function):
        def noted(*arguments):
            calls.append(getattr(function, "__name__", "a module"))
            return function(*arguments)
        return noted

    monkeypatch.setattr(torch, "compile", note_calls)
    model = FlexiDepth.from_pretrained(TINY)
    compile_decode(model)
    for rows, layers, heads in ((1, 2 * 12, 3), (2, 0, 0)):
        calls.clear()
        prompts = torch.ones(rows, 5, dtype=torch.int64)
        assert len(list(generate(model, prompts, 3, route="full"))) == 3
        assert calls.count("decode_layer") == layers and calls.count("head") == heads


def test_the_option_of_sample_py(tmp_path):
    """--compile would not reach the model, or the records would miss what compiled layers do."""
    found = []
    for options in ([], ["--compile"]):
        file = tmp_path / f"map{len(options)}.jsonl"
        subprocess.run(
            [sys.executable, "sample.py", "--flexidepth", "tests/tiny-llama", "--prompt",
             "37 + 48 =", "--gates", "--depth-map", file, *options],
            cwd=TINY.parent.parent, check=True, capture_output=True)
        found.append(json.loads(file.read_text()))
    plain, compiled = (record["answer"] for record in found)
    assert plain["decisions"] == compiled["decisions"] and plain["ids"] == compiled["ids"]
    for expected, gates in zip(plain["gates"], compiled["gates"], strict=True):
        assert gates == pytest.approx(expected, abs=2e-4)


def test_without_a_compiler_one_line_says_so(tmp_path):
    """Without a C++ compiler torch.compile ends in a long traceback."""
    code = ("import sys; from flexidepth import *\n"
            f"model = FlexiDepth.from_pretrained({str(TINY)!r})\n"
            "try: compile_decode(model)\n"
            "except ValueError as error: sys.exit(str(error))")
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True,
        env={"PATH": "", "CXX": "no-such-compiler", "TORCHINDUCTOR_CACHE_DIR": str(tmp_path)})
    assert done.returncode == 1
    assert "C++ compiler" in done.stderr and done.stderr.count("\n") == 1
