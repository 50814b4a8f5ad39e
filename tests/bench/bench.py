"""How fast FlexiDepth is: beside transformers, and beside what was executed. README.md explains it.

    python tests/bench/bench.py                                    # 1B shape, random weights
    python tests/bench/bench.py --shape 135M --only c d e          # some rows, of a smaller shape
    python tests/bench/bench.py --shape 8B --device cuda --json bench.json

Each line of the table says what was measured, the ideal or the peer beside it, and the ratio to
that one. The sides of a line are timed in turn, A B A B, in one process and on the same weights.
A ratio is the median over the rounds of the ratio within a round, so that a change of the
machine's pace, which meets all sides alike, does not count. Time is CPU time on a CPU, because
others may use it too, and elsewhere wall time, with the device synchronised before each reading.
"""
import argparse
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from importlib.metadata import version
from importlib.util import find_spec
from itertools import islice
from pathlib import Path
from unittest import mock

TESTS = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(TESTS.parent))

import numpy as np  # noqa: E402
import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from torch import Tensor, nn  # noqa: E402
from torch.nn.attention import SDPBackend, sdpa_kernel  # noqa: E402
from torch.utils._python_dispatch import TorchDispatchMode  # noqa: E402
from torch.utils._pytree import tree_leaves  # noqa: E402

from flexidepth import (  # noqa: E402
    Config, DecoderLayer, FlexiDepth, KVCache, compile_decode, generate, layers_used, skip_loss)
from train import Row, TokenLosses, collate, write_json  # noqa: E402

TINY = TESTS / "tiny-llama"
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
def load(args: argparse.Namespace, trained_dtype: torch.dtype | None = None) -> FlexiDepth:
    """The model of --model, or one of --shape with random weights, its latter half routed."""
    dtype = getattr(torch, args.dtype)
    trained_dtype = trained_dtype or dtype
    torch.manual_seed(0)
    if args.model:
        return FlexiDepth.from_pretrained(
            args.model, device=args.device, dtype=dtype, trained_dtype=trained_dtype)
    with torch.device("meta"):
        model = FlexiDepth(Config(**SHAPES[args.shape])).to(dtype)
    model.to_empty(device=args.device)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(trained_dtype)
        if parameter.ndim == 2:
            nn.init.uniform_(parameter, -0.03, 0.03)
        else:
            nn.init.ones_(parameter)
    return model


def as_transformers(model: FlexiDepth) -> nn.Module:
    """transformers' Llama on the very same tensors. Its answers end only at max_new_tokens."""
    import transformers

    transformers.utils.logging.set_verbosity_error()
    ours = asdict(model.config)
    rope = {"rope_type": "default"} | (ours["rope_scaling"] or {})
    rope["rope_theta"] = ours["rope_theta"]
    names = transformers.LlamaConfig().to_dict().keys() & ours.keys()
    config = transformers.LlamaConfig(
        **{name: ours[name] for name in names}, rope_parameters=rope)
    with torch.device("meta"):
        theirs = transformers.LlamaForCausalLM(config)
    weights = model.state_dict()
    weights.setdefault("lm_head.weight", weights["model.embed_tokens.weight"])
    theirs.load_state_dict({name: weights[name] for name in theirs.state_dict()}, assign=True)
    device = weights["model.norm.weight"].device
    theirs.model.rotary_emb = type(theirs.model.rotary_emb)(config).to(device)  # it was on meta
    theirs.generation_config.eos_token_id = None
    theirs.generation_config.pad_token_id = 0
    return theirs.requires_grad_(False).eval()


def skipping(config: Config, share: float) -> Callable[[int, Tensor], Tensor]:
    """A route by which all tokens skip that share of the routed layers, evenly spread."""
    skipped = set()
    for i, layer in enumerate(config.routing_layers):
        if int((i + 1) * share + 1e-9) > int(i * share + 1e-9):
            skipped.add(layer)
    return lambda layer, gate: torch.full_like(gate, layer not in skipped, dtype=torch.bool)


def by_chance(device: str) -> Callable[[int, Tensor], Tensor]:
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


@dataclass
class Executed:
    weight_bytes: int  # of all weights that were read
    flops: float       # of all matrix products
    layers: float      # used, mean over tokens


@torch.no_grad()
def executed(model: FlexiDepth, input_ids: Tensor, route) -> Executed:
    """What one call without a cache executes, with the head on the last position."""
    # This backend of attention consists of products that can be counted. It computes all T * T of
    # them, where a token t has only t + 1 keys to see.
    with sdpa_kernel(SDPBackend.MATH), Counter(model) as counter:
        x, _, kept = model.hidden_states(input_ids, route=route)
        model.head(x[:, -1])
    T = input_ids.shape[1]
    flops = counter.linear_flops + counter.attention_flops * (T + 1) / (2 * T)

    layers = model.config.num_hidden_layers
    if kept is not None:
        layers = layers_used(kept, model.config).float().mean().item()
    weight_bytes = sum(counter.weights[pointer] for pointer in counter.touched)
    return Executed(weight_bytes, flops, layers)


# ---- How it is measured --------------------------------------------------------------------------
def now(device: str) -> float:
    """Seconds."""
    if device == "cpu":
        return time.process_time()
    torch.accelerator.synchronize()
    return time.perf_counter()


def show(progress: str) -> None:
    """In place of the last one, on a terminal only."""
    if sys.stderr.isatty():
        print(f"\r\033[K{progress}", end="", file=sys.stderr, flush=True)


class Timed:
    """Seconds of each side in each round, the sides in turn. A first round is not counted."""
    def __init__(self, args: argparse.Namespace, sides: dict[str, Callable]):
        self.seconds = {name: [] for name in sides}
        for i in range(args.rounds + 1):
            for name, run in sides.items():
                show(f"round {i} of {args.rounds}: {name}")
                start = now(args.device)
                run()
                if i > 0:
                    self.seconds[name].append(now(args.device) - start)
        show("")

    def times(self, a: str, b: str) -> float:
        """How many times longer a took than b."""
        pairs = zip(self.seconds[a], self.seconds[b])
        return statistics.median(x / y for x, y in pairs)

    def speed(self, side: str, tokens: int) -> float:
        """Tokens a second."""
        return tokens / statistics.median(self.seconds[side])


@dataclass
class Line:
    """A line of the table. ratio: measured over the ideal or the peer, whichever it has."""
    row: str
    what: str
    measured: float
    ideal: float | None
    peer: float | None
    ratio: float


def beside_ideal(row: str, what: str, measured: float, ideal: float) -> Line:
    return Line(row, what, measured, ideal, None, measured / ideal)


def beside_peer(row: str, what: str, timed: Timed, side: str, peer: str, tokens: int) -> Line:
    """Speeds of a side and its peer, in tokens a second."""
    return Line(row, f"{what}, tokens/s", timed.speed(side, tokens), None,
                timed.speed(peer, tokens), timed.times(peer, side))


# ---- The rows ------------------------------------------------------------------------------------
def decode(args: argparse.Namespace) -> Iterator[Line]:
    """Rows a to e: one sequence, token by token."""
    model = load(args)
    prompt = PROMPT.to(args.device)
    tokens = 4 if args.device == "cpu" else 64
    routes = {"full": "full"}
    for percent in (0, 25, 50, 75, 100):
        routes[f"{percent} %"] = skipping(model.config, percent / 100)
    read = {name: executed(model, prompt, route).weight_bytes for name, route in routes.items()}

    def answer(route):
        return list(generate(model, prompt, tokens, route=route))

    sides = {name: partial(answer, route) for name, route in routes.items()}
    sides["products"] = lambda: multiply(model, tokens)
    if TRANSFORMERS:
        theirs = as_transformers(model)
        sides["transformers"] = lambda: theirs.generate(
            prompt, max_new_tokens=tokens, do_sample=False)

    timed = Timed(args, sides)
    if TRANSFORMERS:
        yield beside_peer("a", "decode, all layers; peer: transformers", timed, "full",
                          "transformers", tokens)
    yield Line("b", "decode, all layers, tokens/s; ideal: its matrix products alone",
               timed.speed("full", tokens), timed.speed("products", tokens), None,
               timed.times("products", "full"))
    for percent in (25, 50, 75, 100):
        name = f"{percent} %"
        yield beside_ideal(
            "d" if percent == 50 else "c", f"decode, {name} of routed layers skipped: speed over "
            "all layers; ideal by bytes", timed.times("full", name), read["full"] / read[name])
    if TRANSFORMERS:
        yield beside_peer("d", "decode, 50 % of routed layers skipped; peer: transformers, which "
                          "runs all", timed, "50 %", "transformers", tokens)
    yield beside_ideal("e", "decode, all gates open: time over all layers; ideal by bytes",
                       timed.times("0 %", "full"), read["0 %"] / read["full"])


def steer(model: FlexiDepth, share: float) -> None:
    """Let the gates of the first routed layers shut for that share of them, and the others open."""
    routed = model.config.routing_layers
    for i, index in enumerate(routed):
        logit = 10.0 if i >= share * len(routed) else -10.0
        model.model.layers[index].router.register_forward_hook(
            lambda module, inputs, output, logit=logit: 0 * output + logit)


def compiled(args: argparse.Namespace) -> Iterator[Line]:
    """Row m: one sequence, token by token, by the code that torch.compile makes."""
    model = load(args)
    with torch.device("meta"):
        twin = FlexiDepth(model.config)
    twin.load_state_dict(model.state_dict(), assign=True)
    if args.model is None:  # random gates decide nothing
        steer(model, 0.5)
        steer(twin, 0.5)
    compile_decode(twin)
    prompt = PROMPT.to(args.device)
    tokens = 4 if args.device == "cpu" else 64
    sides = {}
    for route in ("full", "learned"):
        for name, side in (("plain", model), ("compiled", twin)):
            sides[f"{name} {route}"] = partial(
                lambda side, route: list(generate(side, prompt, tokens, route=route)), side, route)
    if TRANSFORMERS:
        theirs = as_transformers(model)
        sides["transformers"] = lambda: theirs.generate(
            prompt, max_new_tokens=tokens, do_sample=False)
    if args.gguf:
        sides["llama.cpp"] = partial(llama_cpp_answer, load_llama_cpp(args), tokens)

    timed = Timed(args, sides)
    for route in ("full", "learned"):
        peers = {"not compiled": f"plain {route}"}
        for other in ("transformers", "llama.cpp"):
            if other in sides:
                peers[f"{other}, which runs all"] = other
        for what, peer in peers.items():
            yield beside_peer("m", f"decode, compiled, route {route}; peer: {what}", timed,
                              f"compiled {route}", peer, tokens)


def load_llama_cpp(args: argparse.Namespace):
    """The model of --gguf in llama.cpp, all of it on the GPU if there is one."""
    import llama_cpp

    return llama_cpp.Llama(args.gguf, n_ctx=512, n_gpu_layers=-1, n_threads=args.threads,
                           n_threads_batch=args.threads, verbose=False)


def llama_cpp_answer(theirs, tokens: int) -> list[int]:
    """So many tokens, the likeliest ones, decoded after one token."""
    return list(islice(theirs.generate(PROMPT[0].tolist(), temp=0.0, repeat_penalty=1.0), tokens))


@torch.inference_mode()
def multiply(model: FlexiDepth, tokens: int) -> None:
    """The matrix products of `tokens` tokens by the full route, and nothing else."""
    matrices = [p for p in model.parameters() if p.ndim == 2 and not p.requires_grad]
    if model.lm_head is not None:
        matrices = matrices[1:]  # an embedding that is no head is not multiplied
    inputs = {size: torch.randn(1, size).to(matrices[0])
              for size in {matrix.shape[1] for matrix in matrices}}
    with torch.backends.mkldnn.flags(False, None, None, None):  # as in `generate`
        for _ in range(tokens):
            for matrix in matrices:
                F.linear(inputs[matrix.shape[1]], matrix)


def prefill(args: argparse.Namespace) -> Iterator[Line]:
    """Row f: a prompt, all its tokens at once."""
    model = load(args)
    config, device = model.config, args.device
    dtype = model.model.norm.weight.dtype

    @torch.inference_mode()
    def ours(ids, route):
        cache = KVCache(config, 1, ids.shape[1], device, dtype)
        x, _, _ = model.hidden_states(ids, cache, route)
        model.head(x[:, -1])

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


def tiny(args: argparse.Namespace) -> Iterator[Line]:
    """Row g: tests/tiny-llama, where little is computed and much is started."""
    if not TRANSFORMERS:
        return
    model = FlexiDepth.from_pretrained(
        TINY, flexidepth=TINY, device=args.device, dtype=getattr(torch, args.dtype))
    theirs = as_transformers(model)
    prompt = PROMPT.to(args.device)
    tokens = 60
    timed = Timed(args, {
        "full": lambda: list(generate(model, prompt, tokens, route="full")),
        "learned": lambda: list(generate(model, prompt, tokens)),
        "transformers": lambda: theirs.generate(prompt, max_new_tokens=tokens, do_sample=False)})
    for route in ("full", "learned"):
        yield beside_peer("g", f"tests/tiny-llama, decode, route {route}; peer: transformers",
                          timed, route, "transformers", tokens)


def batches(args: argparse.Namespace) -> Iterator[Line]:
    """Row h: sequences that skip each by itself. One that keeps a layer makes it be read."""
    model = load(args)
    tokens = 4 if args.device == "cpu" else 64
    for B in (1, 4, 16, 64):
        ids = torch.arange(B, device=args.device)[:, None]

        def answer(route):
            return list(generate(model, ids, tokens, route=route))

        timed = Timed(args, {"full": lambda: answer("full"),
                             "half": lambda: answer(by_chance(args.device))})
        full = executed(model, ids, "full")
        route = by_chance(args.device)  # the decisions of the timed answers, step by step
        half = [executed(model, ids, route) for _ in range(tokens)]
        gain = timed.times("full", "half")
        what = f"decode of {B} sequences, half kept: speed over all layers; ideal by"
        yield beside_ideal("h", f"{what} bytes", gain, full.weight_bytes / statistics.mean(
            step.weight_bytes for step in half))
        yield beside_ideal("h", f"{what} FLOPs", gain, full.flops / statistics.mean(
            step.flops for step in half))


def long_context(args: argparse.Namespace) -> Iterator[Line]:
    """Row k: a token after many others. What the cache holds does not matter to the time."""
    model = load(args)
    config = model.config
    short, long = 100, min(8000, config.max_position_embeddings - 1)
    weight = model.model.norm.weight
    cache = KVCache(config, 1, long + 1, args.device, weight.dtype)
    cache.keys.normal_()
    cache.values.normal_()
    prompt = PROMPT.to(args.device)

    @torch.inference_mode()
    def token_after(length):
        with torch.backends.mkldnn.flags(False, None, None, None):  # as in `generate`
            for _ in range(4):
                cache.length = length
                x, _, _ = model.hidden_states(prompt, cache, "full")
                model.head(x[:, -1])

    timed = Timed(args, {"long": lambda: token_after(long), "short": lambda: token_after(short)})
    weight_bytes = executed(model, prompt, "full").weight_bytes
    per_token = (cache.keys.nbytes + cache.values.nbytes) / (long + 1)
    yield beside_ideal(
        "k", f"decode, a token after {long:,}: time over one after {short}; ideal by bytes",
        timed.times("long", "short"),
        (weight_bytes + long * per_token) / (weight_bytes + short * per_token))


def masked_layer(layer: DecoderLayer, x, rotation, cache, route):
    """DecoderLayer.forward without gathering: both paths of every token, one of them unused."""
    h = layer.input_layernorm(x)
    k, v = layer.self_attn.keys_values(h, rotation)
    attended = layer.self_attn(h, k, v, rotation)
    if layer.router is None:
        return layer.full_path(x, 1.0, attended), None, None
    gate, g, kept = layer.decide(h, route)
    full, skip = layer.full_path(x, g, attended), layer.skip_path(x, g)
    return torch.where(kept[..., None], full, skip), gate, kept


def training(args: argparse.Namespace) -> Iterator[Line]:
    """Rows i and l: forward, backward and AdamW of one row of tokens, half kept."""
    model = load(args, trained_dtype=torch.float32)
    losses = TokenLosses(model)
    optimizer = torch.optim.AdamW(
        [p for p in model.parameters() if p.requires_grad], lr=1e-4, fused=True)
    T = min(128 if args.device == "cpu" else 2048, model.config.max_position_embeddings)
    ids = np.random.default_rng(0).integers(model.config.vocab_size, size=T + 1, dtype=np.int32)
    input_ids, targets, real = collate([Row(ids, np.ones(T + 1, bool), "all")], args.device)

    def update(token_losses, gates):
        (token_losses.mean() + 1e-3 * skip_loss(gates, real)).backward()
        optimizer.step()
        optimizer.zero_grad()

    def gathered():
        token_losses, _, gates, _ = losses(input_ids, targets, by_chance(args.device))
        update(token_losses, gates)

    def masked():
        with mock.patch.object(DecoderLayer, "forward", masked_layer):
            gathered()

    sides = {"gathered": gathered, "masked": masked}
    if TRANSFORMERS:
        theirs = as_transformers(model)
        sides["transformers"] = masked_transformers(model, theirs, input_ids, targets, update)
    timed = Timed(args, sides)
    what = f"training step of {T} tokens, half kept; peer:"
    yield beside_peer("i", f"{what} both paths, masked", timed, "gathered", "masked", T)
    if TRANSFORMERS:
        yield beside_peer("l", f"{what} the same in transformers", timed, "gathered",
                          "transformers", T)


def masked_transformers(model: FlexiDepth, theirs: nn.Module, input_ids: Tensor, targets: Tensor,
                        update: Callable) -> Callable:
    """A training step of transformers' Llama with our routers and adapters, both paths computed."""
    for layer, ours in zip(theirs.model.layers, model.model.layers):
        layer.router, layer.router_proj = ours.router, ours.router_proj
    dtype = model.model.norm.weight.dtype
    device = input_ids.device
    gates = []

    def forward(layer, x, **arguments):
        h = layer.input_layernorm(x)
        attended, _ = layer.self_attn(hidden_states=h, **arguments)
        y = x + attended
        if layer.router is None:
            return y + layer.mlp(layer.post_attention_layernorm(y))
        gate = torch.sigmoid(layer.router(h).float())
        gates.append(gate)
        g = gate.to(x.dtype)[..., None]
        full = y + g * layer.mlp(layer.post_attention_layernorm(y))
        skip = x + (1 - g) * layer.router_proj(layer.post_attention_layernorm(x))
        return torch.where(torch.rand_like(g) < 0.5, full, skip)

    def step():
        gates.clear()
        with mock.patch.object(type(theirs.model.layers[0]), "forward", forward), \
                torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            logits = theirs(input_ids, use_cache=False).logits
        token_losses = F.cross_entropy(logits[0].float(), targets[0], reduction="none")
        update(token_losses, torch.stack(gates, -1))

    return step


SECTIONS = {"abcde": decode, "f": prefill, "g": tiny, "h": batches, "il": training,
            "k": long_context, "m": compiled}


# ---- All together --------------------------------------------------------------------------------
def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--only", nargs="+", choices=sorted("".join(SECTIONS)), metavar="ROW",
        help="the rows to run, by letter; what is measured together is printed together")
    add("--shape", choices=SHAPES, default="1B", help="of a model with random weights (1B)")
    add("--model", help="folder or cached hub name of a real model, in place of --shape")
    add("--gguf", help="the same model as a file of llama.cpp, which row m is then compared with")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu, cuda, mps")
    add("--dtype", choices=["float32", "bfloat16"],
        help="default: float32 on a CPU, where bfloat16 is often slow, else bfloat16")
    add("--threads", type=int, default=1, help="on a CPU (1); its times are sums over threads")
    add("--rounds", type=int, default=5, help="in which each side runs once (5)")
    add("--json", type=Path, help="also write the table to this file")
    args = parser.parse_args(argv)
    if args.rounds < 1 or args.threads < 1:
        parser.error(f"--rounds {args.rounds}, --threads {args.threads}: expected at least 1")
    if args.gguf and not (find_spec("llama_cpp") and Path(args.gguf).is_file()):
        parser.error(f"--gguf {args.gguf}: expected a file, and llama-cpp-python to be installed")
    args.dtype = args.dtype or ("float32" if args.device == "cpu" else "bfloat16")
    return args


def describe(args: argparse.Namespace) -> dict[str, str]:
    """What the figures depend on."""
    device = f"{os.cpu_count()} cores, {torch.backends.cpu.get_cpu_capability()}"
    if args.device.startswith("cuda"):
        device = torch.cuda.get_device_name(args.device)
    return {
        "device": device, "torch": torch.__version__,
        "transformers": version("transformers") if TRANSFORMERS else "none",
        "model": args.model or f"{args.shape}, random weights", "dtype": args.dtype,
        "threads": str(args.threads), "rounds": str(args.rounds)}


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    torch.set_num_threads(args.threads)
    about = describe(args)
    print(", ".join(f"{key} {value}" for key, value in about.items()))
    print(f"\n| row | {'what':90} | measured |    ideal |     peer | ratio |\n"
          f"|---|---|---|---|---|---|")
    lines = []
    for letters, section in SECTIONS.items():
        if args.only and not set(letters) & set(args.only):
            continue
        for line in section(args):
            numbers = ["" if number is None else f"{number:.4g}"
                       for number in (line.measured, line.ideal, line.peer)]
            cells = " | ".join(f"{number:>8}" for number in numbers)
            print(f"| {line.row} | {line.what:90} | {cells} | {line.ratio:5.3f} |", flush=True)
            lines.append(asdict(line))
            if args.json:
                write_json(args.json, {"about": about, "lines": lines})


if __name__ == "__main__":
    main()
