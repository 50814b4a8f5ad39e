"""How fast FlexiDepth is: beside transformers, and beside what was executed. README.md explains it.

    python tests/bench/bench.py                                    # 1B shape, random weights
    python tests/bench/bench.py --shape 135M --only c d e          # some rows, of a smaller shape
    python tests/bench/bench.py --shape 8B --device cuda

Each line of the table says what was measured, the ideal or the peer beside it, and the ratio to
that one. The sides of a line are timed in turn, A B A B, in one process and on the same weights.
"""
import argparse
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from functools import partial
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from torch import Tensor, nn  # noqa: E402
from torch.nn.attention import SDPBackend, sdpa_kernel  # noqa: E402
from torch.utils._python_dispatch import TorchDispatchMode  # noqa: E402
from torch.utils._pytree import tree_leaves  # noqa: E402

from flexidepth import (  # noqa: E402
    Config, FlexiDepth, KVCache, Route, compile_decode, generate, skip_loss)
from train import Row, collate, predict  # noqa: E402

TRANSFORMERS = find_spec("transformers") is not None

LLAMA3 = {"vocab_size": 128256, "num_attention_heads": 32, "num_key_value_heads": 8,
          "rms_norm_eps": 1e-5, "max_position_embeddings": 131072, "rope_theta": 500000.0}
SHAPES = {
    # SmolLM2-135M, Llama-3.2-1B and Llama-3-8B.
    "135M": {"vocab_size": 49152, "hidden_size": 576, "intermediate_size": 1536,
             "num_hidden_layers": 30, "num_attention_heads": 9, "num_key_value_heads": 3,
             "rms_norm_eps": 1e-5, "max_position_embeddings": 8192, "rope_theta": 100000.0,
             "tie_word_embeddings": True},
    "1B": LLAMA3 | {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16,
                    "tie_word_embeddings": True},
    "8B": LLAMA3 | {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32},
}
PROMPT = torch.tensor([[1]])  # one token, so that all steps are steps of decoding


# ---- What is measured ----------------------------------------------------------------------------
def load(args: argparse.Namespace) -> FlexiDepth:
    """The model of --model, or one of --shape with random weights, its latter half routed."""
    torch.manual_seed(0)
    if args.model:
        return FlexiDepth.from_pretrained(args.model, device=args.device, dtype=args.dtype)
    torch.set_default_dtype(args.dtype)
    with torch.device(args.device):
        model = FlexiDepth(Config(**SHAPES[args.shape]))
    torch.set_default_dtype(torch.float32)
    return model


def as_transformers(model: FlexiDepth) -> nn.Module:
    """transformers' Llama on the very same tensors. Its answers end only at max_new_tokens."""
    import transformers

    transformers.utils.logging.set_verbosity_error()
    ours = asdict(model.config)
    rope = {"rope_type": "default", "rope_theta": ours.pop("rope_theta")}
    rope |= ours.pop("rope_scaling") or {}
    config = transformers.LlamaConfig(**ours, rope_parameters=rope)
    with torch.device("meta"):
        theirs = transformers.LlamaForCausalLM(config)
    weights = model.state_dict()
    theirs.load_state_dict({name: weights[name] for name in theirs.state_dict()}, assign=True)
    device = weights["model.norm.weight"].device
    theirs.model.rotary_emb = type(theirs.model.rotary_emb)(config).to(device)  # it was on meta
    theirs.generation_config.eos_token_id = None
    theirs.generation_config.pad_token_id = 0
    return theirs.requires_grad_(False).eval()


def skipping(config: Config, share: float) -> Route:
    """A route by which all tokens skip that share of the routed layers, evenly spread."""
    skipped = {layer for i, layer in enumerate(config.routing_layers)
               if int((i + 1) * share + 1e-9) > int(i * share + 1e-9)}
    return lambda layer, gate: torch.full_like(gate, layer not in skipped, dtype=torch.bool)


def by_chance(device: str) -> Route:
    """A route by which every token keeps a layer or skips it by a coin of its own. Each such
    route gives the same decisions in the same order."""
    generator = torch.Generator(device).manual_seed(0)
    return lambda layer, gate: torch.rand(gate.shape, generator=generator, device=device) < 0.5


# ---- What was executed ---------------------------------------------------------------------------
class Counter(TorchDispatchMode):
    """Counts the matrix products, and notes the weights that any operation reads."""
    def __init__(self, model: FlexiDepth):
        super().__init__()
        self.weights = {p.data_ptr(): p.nbytes for p in model.parameters()}
        self.touched = set()
        self.linear_flops = 0
        self.attention_flops = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **kwargs or {})
        if function is torch.ops.aten.embedding.default:  # it reads some rows, hardly anything
            return out
        for value in tree_leaves((args, kwargs)):
            if isinstance(value, Tensor) and value.data_ptr() in self.weights:
                self.touched.add(value.data_ptr())
        if function is torch.ops.aten.mm.default:
            self.linear_flops += 2 * out.numel() * args[0].shape[-1]
        if function is torch.ops.aten.bmm.default:
            self.attention_flops += 2 * out.numel() * args[0].shape[-1]
        return out


class Executed(NamedTuple):
    weight_bytes: int  # of all weights that were read
    flops: float       # of all matrix products


@torch.no_grad()
def executed(model: FlexiDepth, input_ids: Tensor, route: Route) -> Executed:
    """What one call without a cache executes, with the head on the last position."""
    # This backend of attention consists of products that can be counted. It computes all T * T of
    # them, where a token t has only t + 1 keys to see.
    with sdpa_kernel(SDPBackend.MATH), Counter(model) as counter:
        model(input_ids, route=route, last_only=True)
    T = input_ids.shape[1]
    weight_bytes = sum(counter.weights[pointer] for pointer in counter.touched)
    flops = counter.linear_flops + counter.attention_flops * (T + 1) / (2 * T)
    return Executed(weight_bytes, flops)


# ---- How it is measured --------------------------------------------------------------------------
def now(device: str) -> float:
    """Seconds of CPU time on a CPU, because others may use it too, and elsewhere of wall time."""
    if device == "cpu":
        return time.process_time()
    torch.accelerator.synchronize()
    return time.perf_counter()


class Timed:
    """Seconds of each side in each round, the sides in turn. A first round is not counted."""
    def __init__(self, args: argparse.Namespace, sides: dict[str, Callable]):
        self.seconds = {name: [] for name in sides}
        for i in range(args.rounds + 1):
            for name, run in sides.items():
                start = now(args.device)
                run()
                if i > 0:
                    self.seconds[name].append(now(args.device) - start)

    def times(self, a: str, b: str) -> float:
        """How many times longer a took than b. A change of the machine's pace, which meets all
        sides of a round alike, does not count."""
        pairs = zip(self.seconds[a], self.seconds[b])
        return statistics.median(x / y for x, y in pairs)

    def speed(self, side: str, tokens: int) -> float:
        """Tokens a second."""
        return tokens / statistics.median(self.seconds[side])


def line(row: str, what: str, measured, ideal, peer, ratio) -> str:
    """A line of the table, of numbers and empty strings."""
    cells = [f"{cell:8.4}" for cell in (measured, ideal, peer, ratio)]
    return f"| {row:3} | {what:90} | {' | '.join(cells)} |"


def beside_ideal(row: str, what: str, measured: float, ideal: float) -> str:
    return line(row, what, measured, ideal, "", measured / ideal)


def beside_peer(row: str, what: str, timed: Timed, side: str, peer: str, tokens: int) -> str:
    """Speeds of a side and its peer, in tokens a second."""
    return line(row, f"{what}, tokens/s", timed.speed(side, tokens), "", timed.speed(peer, tokens),
                timed.times(peer, side))


# ---- The rows ------------------------------------------------------------------------------------
def answer(model: FlexiDepth, prompt: Tensor, tokens: int, route: Route) -> None:
    for _ in generate(model, prompt, tokens, route=route):
        pass


def decode(args: argparse.Namespace) -> Iterator[str]:
    """Rows c to e: one sequence, token by token."""
    model = load(args)
    prompt = PROMPT.to(args.device)
    routes = {"full": "full"}
    for percent in (0, 25, 50, 75, 100):
        routes[f"{percent} %"] = skipping(model.config, percent / 100)
    read = {name: executed(model, prompt, route).weight_bytes for name, route in routes.items()}
    sides = {name: partial(answer, model, prompt, args.tokens, route)
             for name, route in routes.items()}
    if TRANSFORMERS:
        sides["transformers"] = partial(
            as_transformers(model).generate, prompt, max_new_tokens=args.tokens, do_sample=False)

    timed = Timed(args, sides)
    for percent in (25, 50, 75, 100):
        name = f"{percent} %"
        yield beside_ideal(
            "d" if percent == 50 else "c", f"decode, {name} of routed layers skipped: speed over "
            "all layers; ideal by bytes", timed.times("full", name), read["full"] / read[name])
    if TRANSFORMERS:
        yield beside_peer("d", "decode, 50 % of routed layers skipped; peer: transformers, which "
                          "runs all", timed, "50 %", "transformers", args.tokens)
    yield beside_ideal("e", "decode, all gates open: time over all layers; ideal by bytes",
                       timed.times("0 %", "full"), read["0 %"] / read["full"])


def prefill(args: argparse.Namespace) -> Iterator[str]:
    """Row f: a prompt, all its tokens at once."""
    model = load(args)
    config, device = model.config, args.device

    @torch.inference_mode()
    def ours(ids, route):
        cache = KVCache(config, 1, ids.shape[1], device, args.dtype)
        model(ids, cache, route, last_only=True)

    for T in (512, 2048):
        if T > config.max_position_embeddings:
            continue
        ids = torch.randint(config.vocab_size, (1, T), device=device)
        sides = {"full": lambda: ours(ids, "full"), "half": lambda: ours(ids, by_chance(device))}
        if TRANSFORMERS:
            theirs = torch.inference_mode()(as_transformers(model))
            sides["transformers"] = lambda: theirs(ids, use_cache=True, logits_to_keep=1)
        full = executed(model, ids, "full")
        half = executed(model, ids, by_chance(device))

        timed = Timed(args, sides)
        if TRANSFORMERS:
            yield beside_peer("f", f"prefill of {T}, all layers; peer: transformers", timed,
                              "full", "transformers", T)
        yield beside_ideal("f", f"prefill of {T}, half kept: speed over all layers; ideal by FLOPs",
                           timed.times("full", "half"), full.flops / half.flops)


def batches(args: argparse.Namespace) -> Iterator[str]:
    """Row h: sequences that skip each by itself. One that keeps a layer makes it be read."""
    model = load(args)
    for B in (1, 4, 16, 64):
        ids = torch.arange(B, device=args.device)[:, None]
        timed = Timed(args, {
            "full": lambda: answer(model, ids, args.tokens, "full"),
            "half": lambda: answer(model, ids, args.tokens, by_chance(args.device))})
        full = executed(model, ids, "full")
        route = by_chance(args.device)  # the decisions of the timed answers, step by step
        half = [executed(model, ids, route) for _ in range(args.tokens)]
        gain = timed.times("full", "half")
        what = f"decode of {B} sequences, half kept: speed over all layers; ideal by"
        yield beside_ideal("h", f"{what} bytes", gain, full.weight_bytes / statistics.mean(
            step.weight_bytes for step in half))
        yield beside_ideal("h", f"{what} FLOPs", gain, full.flops / statistics.mean(
            step.flops for step in half))


def training(args: argparse.Namespace) -> Iterator[str]:
    """Row i: forward, backward and AdamW of one row of tokens, half kept."""
    model = load(args)
    trained = [p for p in model.parameters() if p.requires_grad]
    for p in trained:
        p.data = p.data.float()
    optimizer = torch.optim.AdamW(trained, lr=1e-4, fused=True)
    T = min(128 if args.device == "cpu" else 2048, model.config.max_position_embeddings)
    ids = torch.randint(model.config.vocab_size, (T + 1,))
    input_ids, targets, real = collate([Row(ids, ids, "all")], args.device)

    def step(both_paths):
        model.train(both_paths)
        logits, gates, _ = predict(model, input_ids, by_chance(args.device))
        loss = F.cross_entropy(logits[0].float(), targets[0]) + 1e-3 * skip_loss(gates, real)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    timed = Timed(args, {"gathered": lambda: step(False), "both": lambda: step(True)})
    yield beside_peer("i", f"training step of {T} tokens, half kept; peer: both paths computed",
                      timed, "gathered", "both", T)


def compiled(args: argparse.Namespace) -> Iterator[str]:
    """Row m: one sequence, token by token, by the code that torch.compile makes."""
    model = load(args)
    with torch.device("meta"):
        twin = FlexiDepth(model.config)
    twin.load_state_dict(model.state_dict(), assign=True)
    if args.model is None:  # random gates decide nothing, so half of the routed layers are shut
        route = skipping(model.config, 0.5)
        for index in model.config.routing_layers:
            kept = route(index, torch.ones(1)).item()
            config = replace(model.config, threshold=-1.0 if kept else 2.0)
            model.model.layers[index].config = twin.model.layers[index].config = config
    compile_decode(twin)
    prompt = PROMPT.to(args.device)
    sides = {}
    for route in ("full", "learned"):
        sides[f"plain {route}"] = partial(answer, model, prompt, args.tokens, route)
        sides[f"compiled {route}"] = partial(answer, twin, prompt, args.tokens, route)
    if TRANSFORMERS:
        sides["transformers"] = partial(
            as_transformers(model).generate, prompt, max_new_tokens=args.tokens, do_sample=False)

    timed = Timed(args, sides)
    for route in ("full", "learned"):
        peers = {"not compiled": f"plain {route}"}
        if TRANSFORMERS:
            peers["transformers, which runs all"] = "transformers"
        for what, peer in peers.items():
            yield beside_peer("m", f"decode, compiled, route {route}; peer: {what}", timed,
                              f"compiled {route}", peer, args.tokens)


SECTIONS = {"cde": decode, "f": prefill, "h": batches, "i": training, "m": compiled}


# ---- All together --------------------------------------------------------------------------------
def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--only", nargs="+", choices=sorted("".join(SECTIONS)), metavar="ROW",
        help="the rows to run, by letter; c, d and e are measured together (default: all)")
    add("--shape", choices=SHAPES, default="1B", help="of a model with random weights (1B)")
    add("--model", help="folder or cached hub name of a real model, in place of --shape")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu, cuda, mps")
    add("--rounds", type=int, default=5, help="in which each side runs once (5)")
    args = parser.parse_args(argv)
    if args.rounds < 1:
        parser.error(f"--rounds {args.rounds}: expected at least 1")
    # Many processors have no units for bfloat16.
    args.dtype = torch.float32 if args.device == "cpu" else torch.bfloat16
    args.tokens = 4 if args.device == "cpu" else 64  # that are decoded each time
    torch.set_num_threads(1)
    device = f"{os.cpu_count()} cores, {torch.backends.cpu.get_cpu_capability()}"
    if args.device.startswith("cuda"):
        device = torch.cuda.get_device_name(args.device)
    print(f"{device}, torch {torch.__version__}, transformers "
          f"{version('transformers') if TRANSFORMERS else 'none'}, {args.model or args.shape}, "
          f"{args.dtype}, {args.rounds} rounds\n")
    print(f"| row | {'what':90} | measured | ideal    | peer     | ratio    |\n{'|---' * 6}|")
    for letters, section in SECTIONS.items():
        if not args.only or set(letters) & set(args.only):
            for found in section(args):
                print(found, flush=True)


if __name__ == "__main__":
    main()
