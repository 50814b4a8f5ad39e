"""How fast it is, and how near to the ideal by what was executed. Prints a table; --json keeps it.

    python tests/bench.py                               # every row: a quarter of an hour on two cores
    python tests/bench.py --only a b c d e --json bench.json

Each figure is a ratio of things timed in turn, A B C A B C ..., on the same random weights in the
same process, and the median over those turns: a shared machine changes its pace, but for all alike.
What was executed is counted beside it: FLOPs, and the bytes of the weights that took part in any
operation. Rows that compare with transformers are left out where that is not installed, rows j and
"d 8B" where 22 GB of memory and 18 GB of disk are not to be had, rows on the memory of the process
where there is no /proc. With a GPU, a to e are run there too, in both shapes.
"""
import argparse
import ctypes
import functools
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from unittest import mock

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from safetensors.torch import save_file  # noqa: E402
from torch.nn.attention import SDPBackend, sdpa_kernel  # noqa: E402
from torch.utils._python_dispatch import TorchDispatchMode  # noqa: E402
from torch.utils._pytree import tree_leaves  # noqa: E402
from torch.utils.flop_counter import FlopCounterMode  # noqa: E402

from flexidepth import Config, DecoderLayer, FlexiDepth, KVCache, generate, skip_loss  # noqa: E402
from train import LOGITS, Row, autocast, backward, distribute  # noqa: E402

try:
    import transformers
    transformers.utils.logging.set_verbosity_error()
except ImportError:
    transformers = None

STATUS = Path("/proc/self/status")  # Linux: how much memory this process has, and had at most
TINY = Path(__file__).resolve().parent / "tiny-llama"
LLAMA3 = {"rope_type": "llama3", "factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 8192}
COMMON = {"vocab_size": 128256, "num_attention_heads": 32, "num_key_value_heads": 8, "rms_norm_eps": 1e-5,
          "max_position_embeddings": 131072, "rope_theta": 500000.0, "rope_scaling": LLAMA3}
SHAPES = {
    "1B": COMMON | {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16,
                    "tie_word_embeddings": True},
    "8B": COMMON | {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32},
}
PROMPT = torch.tensor([[128000]])  # one token, so that all steps are steps of decoding


# ---- What is measured ----------------------------------------------------------------------------
def random_tensors(config: Config, dtype: torch.dtype, device: str = "cpu"):
    """Name and values of every parameter, one at a time: slices of one block of noise, norms of ones."""
    noise = torch.randn(1 << 22, generator=torch.Generator().manual_seed(0)).mul_(0.02).to(device, dtype)
    with torch.device("meta"):
        shapes = FlexiDepth(config).state_dict()
    for name, meta in shapes.items():
        tensor = torch.ones(meta.shape, dtype=dtype, device=device)
        if meta.ndim == 2:
            for part in tensor.view(-1).split(len(noise)):
                part.copy_(noise[:len(part)])
        yield name, tensor


@functools.cache
def random_model(shape: str, device: str, dtype: torch.dtype = torch.bfloat16) -> FlexiDepth:
    """A model with the latter half of its layers routed."""
    config = Config(**SHAPES[shape])
    with torch.device("meta"):
        model = FlexiDepth(config)
    model.load_state_dict(dict(random_tensors(config, dtype, device)), assign=True)
    return model


def as_transformers(model: FlexiDepth):
    """transformers' Llama on the very same tensors, ending its answers only at max_new_tokens."""
    c = model.config
    config = transformers.LlamaConfig(
        **{name: getattr(c, name) for name in transformers.LlamaConfig().to_dict() if hasattr(c, name)},
        rope_parameters={"rope_type": "default", "rope_theta": c.rope_theta} | (c.rope_scaling or {}))
    with torch.device("meta"):
        theirs = transformers.LlamaForCausalLM(config)
    ours = model.state_dict()
    weights = {name: ours.get(name, ours["model.embed_tokens.weight"]) for name in theirs.state_dict()}
    theirs.load_state_dict(weights, assign=True)
    theirs.model.rotary_emb = type(theirs.model.rotary_emb)(config).to(ours["model.norm.weight"].device)  # off meta
    theirs.generation_config.eos_token_id, theirs.generation_config.pad_token_id = None, 0
    return theirs.eval()


def skipping(config: Config, share: float):
    """A route that skips that share of the routed layers, evenly spread; all gates open at 0."""
    R = len(config.routing_layers)
    skipped = {layer for i, layer in enumerate(config.routing_layers)
               if int((i + 1) * share + 1e-9) > int(i * share + 1e-9)}
    assert len(skipped) == round(R * share)
    return lambda layer, gate: torch.full_like(gate, layer not in skipped, dtype=torch.bool)


def each_by_chance(share: float):
    """A route by which every token of every row skips a layer with that chance, of its own."""
    generator = torch.Generator().manual_seed(0)
    return lambda layer, gate: (torch.rand(gate.shape, generator=generator) >= share).to(gate.device)


class TouchedWeights(TorchDispatchMode):
    """Counts the bytes of the parameters that any operation reads (of an embedding, none)."""

    def __init__(self, model: FlexiDepth):
        super().__init__()
        self.sizes, self.touched = {p.data_ptr(): p.nbytes for p in model.parameters()}, set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function is not torch.ops.aten.embedding.default:
            tensors = [t for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)]
            self.touched |= {t.data_ptr() for t in tensors} & set(self.sizes)
        return function(*args, **kwargs or {})

    def bytes(self) -> int:
        return sum(self.sizes[pointer] for pointer in self.touched)


def executed(model: FlexiDepth, input_ids: torch.Tensor, route) -> dict[str, float]:
    """FLOPs, bytes of weights and mean depth of one call, the head on the last position included."""
    input_ids = input_ids.to(model.model["embed_tokens"].weight.device)
    # The plain backend, as torch does not count the products inside the fused ones on a CPU.
    with torch.inference_mode(), sdpa_kernel(SDPBackend.MATH), TouchedWeights(model) as touched, \
            FlopCounterMode(display=False) as flops:
        x, _, kept = model.hidden_states(input_ids, route=route)
        model.head(x[:, -1])
    L, R = model.config.num_hidden_layers, len(model.config.routing_layers)
    return {"flops": flops.get_total_flops(), "weight_bytes": touched.bytes(),
            "layers": L if kept is None else L - R + kept.sum(-1).float().mean().item()}


# ---- How it is measured --------------------------------------------------------------------------
def in_turn(rounds: int, sides: dict, progress: str) -> dict[str, list[float]]:
    """Seconds of each side, in turn. A first round that warms up is not counted."""
    seconds = {name: [] for name in sides}
    for i in range(rounds + 1):
        for name, run in sides.items():
            print(f"\r{progress}: round {i} of {rounds}, {name}\033[K", end="", file=sys.stderr, flush=True)
            start = time.perf_counter()
            run()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            if i:
                seconds[name].append(time.perf_counter() - start)
    print("\r\033[K", end="", file=sys.stderr, flush=True)
    return seconds


def ratio(a: list[float], b: list[float]) -> float:
    """How many times longer a took than b: the median over the turns."""
    return statistics.median(x / y for x, y in zip(a, b))


def resident(key: str) -> int:
    """VmRSS, or VmHWM, its peak, of this process, in bytes."""
    return 1024 * int(STATUS.read_text().split(f"{key}:")[1].split()[0])


def peak_growth(run) -> int | None:
    """By how many bytes the memory of this process grew, at most, while run() ran; None if nothing tells."""
    try:
        ctypes.CDLL(None).malloc_trim(0)  # or what was freed before would be used again, unseen
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from here
    except (AttributeError, OSError):
        run()
        return None
    before = resident("VmRSS")
    run()
    return resident("VmHWM") - before


def row(key: str, what: str, measured: float, at_least: float = None, at_most: float = None, **more) -> dict:
    """A line of the table, with all that was measured for it."""
    met = (at_least is None or measured >= at_least) and (at_most is None or measured <= at_most)
    bounds = {"at_least": at_least, "at_most": at_most}
    return {"row": key, "what": what, "measured": measured} | bounds | {"met": met} | more


# ---- The rows ------------------------------------------------------------------------------------
def decode(shape: str = "1B", device: str = "cpu", rounds: int = 15, tokens: int = 4):
    """Rows a to e: one row decoded, against transformers, the machine, and the ideal by bytes."""
    model, shares = random_model(shape, device), (0.0, 0.25, 0.5, 0.75, 1.0)
    tokens = tokens if device == "cpu" else 64  # enough to make little of what a call costs at all
    routes = {"full": "full"} | {share: skipping(model.config, share) for share in shares}
    counts = {name: executed(model, PROMPT, route) for name, route in routes.items()}
    read = {name: count["weight_bytes"] for name, count in counts.items()}
    matrices = [p for name, p in model.named_parameters() if p.ndim == 2 and "router" not in name]
    if not model.config.tie_word_embeddings:
        matrices = matrices[1:]  # an embedding that is no head is not multiplied
    inputs = {size: torch.randn(1, size).to(p) for p in matrices for size in (p.shape[1], p.shape[1] // 2)}

    def answer(route):
        return list(generate(model, PROMPT, tokens, route=route))

    @torch.inference_mode()
    def products(onednn, dtype=torch.bfloat16):
        before, torch.backends.mkldnn.enabled = torch.backends.mkldnn.enabled, onednn
        for _ in range(tokens):
            for matrix in matrices:
                matrix = matrix.view(dtype)  # as float32: the same bytes, taken for half as many weights
                F.linear(inputs[matrix.shape[1]].to(dtype), matrix)
        torch.backends.mkldnn.enabled = before

    def transformers_without_onednn():
        before, torch.backends.mkldnn.enabled = torch.backends.mkldnn.enabled, False
        sides["transformers"]()
        torch.backends.mkldnn.enabled = before

    sides = {name: functools.partial(answer, route) for name, route in routes.items()}
    sides["products"] = functools.partial(products, False)
    if device == "cpu":
        sides["products by oneDNN"] = functools.partial(products, True)
        sides["products in float32"] = functools.partial(products, False, torch.float32)
    else:
        decision = torch.ones(1, device=device)
        sides["1000 decisions read"] = lambda: [int(decision.sum()) for _ in range(1000)]
    if transformers:
        theirs, prompt = as_transformers(model), PROMPT.to(device)
        sides["transformers"] = lambda: theirs.generate(prompt, max_new_tokens=tokens, do_sample=False)
        if device == "cpu":
            sides["transformers, oneDNN off"] = transformers_without_onednn

    seconds = in_turn(rounds, sides, f"decode {shape} {device}")
    median = {name: statistics.median(times) for name, times in seconds.items()}
    where = f"{shape}, decode" if device == "cpu" else f"{shape} {device}, decode"
    more = {"tokens_per_second": {str(name): tokens / median[name] for name in median},
            "executed": {str(name): count for name, count in counts.items()}}
    if transformers:
        yield row("a", f"{where}: full, times transformers", ratio(seconds["transformers"], seconds["full"]), 1.9,
                  **more)
        if device == "cpu":
            yield row("a", f"{where}: full, times transformers with oneDNN off",
                      ratio(seconds["transformers, oneDNN off"], seconds["full"]))
    streamed = sum(p.nbytes for p in matrices)
    yield row("b", f"{where}: weights read a second, over bare products",
              ratio(seconds["products"], seconds["full"]) * read["full"] / streamed, 0.85,
              decode_bytes_per_second=read["full"] * tokens / median["full"],
              product_bytes_per_second=streamed * tokens / median["products"])
    if device == "cpu":
        yield row("b", f"{where}: bare products by torch's own kernels, times oneDNN's",
                  ratio(seconds["products by oneDNN"], seconds["products"]))
        yield row("b", f"{where}: bare products, bytes a second of bfloat16 over those of float32",
                  ratio(seconds["products in float32"], seconds["products"]),
                  float32_bytes_per_second=streamed * tokens / median["products in float32"])
    else:
        yield row("e", f"{where}: microseconds for one decision of an idle GPU to be read",
                  1000 * median["1000 decisions read"])
    for share in shares[1:]:
        gain, ideal = ratio(seconds["full"], seconds[share]), read["full"] / read[share]
        yield row("c", f"{where}: {share:.0%} of routed layers skipped, gain over ideal", gain / ideal, 0.93,
                  gain=gain, ideal=ideal)
    yield row("d", f"{where}: a quarter of all layers skipped, times full", ratio(seconds["full"], seconds[0.5]),
              1.15 if shape == "1B" else 1.2, ideal=read["full"] / read[0.5], **more)
    if transformers:
        yield row("d", f"{where}: a quarter skipped, times transformers",
                  ratio(seconds["transformers"], seconds[0.5]), 2.2)
    yield row("e", f"{where}: all gates open, time over full", ratio(seconds[0.0], seconds["full"]), at_most=1.04)


def prefill(rounds: int = 7, T: int = 512):
    """Row f."""
    model = random_model("1B", "cpu")
    ids = torch.randint(128000, (1, T), generator=torch.Generator().manual_seed(0))

    @torch.inference_mode()
    def ours(route):
        x, *_ = model.hidden_states(ids, KVCache(model.config, 1, T, dtype=torch.bfloat16), route)
        model.head(x[:, -1])

    sides = {"full": lambda: ours("full"), "half": lambda: ours(each_by_chance(0.5))}
    if transformers:
        theirs = as_transformers(model)
        sides["transformers"] = torch.inference_mode()(lambda: theirs(ids, use_cache=True, logits_to_keep=1))
    counts = {"full": executed(model, ids, "full"), "half": executed(model, ids, each_by_chance(0.5))}
    seconds = in_turn(rounds, sides, "prefill")
    more = {"tokens_per_second": {k: T / statistics.median(v) for k, v in seconds.items()}, "executed": counts}
    if transformers:
        yield row("f", f"1B, prefill of {T}: full, times transformers",
                  ratio(seconds["transformers"], seconds["full"]), 1.0, **more)
    gain, ideal = ratio(seconds["full"], seconds["half"]), counts["full"]["flops"] / counts["half"]["flops"]
    yield row("f", f"1B, prefill of {T}: half of the routed tokens kept, gain over ideal", gain / ideal, 0.9,
              gain=gain, ideal=ideal, **more)


def tiny(rounds: int = 15, tokens: int = 60):
    """Row g."""
    if not transformers:
        return
    model = FlexiDepth.from_pretrained(TINY, flexidepth=TINY)
    theirs = as_transformers(model)
    prompt = torch.tensor([[1]])
    sides = {"transformers": lambda: theirs.generate(prompt, max_new_tokens=tokens, do_sample=False),
             "full": lambda: list(generate(model, prompt, tokens, route="full")),
             "learned": lambda: list(generate(model, prompt, tokens))}
    seconds = in_turn(rounds, sides, "tiny")
    more = {"tokens_per_second": {k: tokens / statistics.median(v) for k, v in seconds.items()}}
    for route in ("full", "learned"):
        yield row("g", f"tiny-llama, decode: {route}, times transformers",
                  ratio(seconds["transformers"], seconds[route]), 2.5, **more)


def batches(rounds: int = 5, tokens: int = 4):
    """Row h: rows that skip independently. A layer's weights are read as soon as one row keeps it."""
    model = random_model("1B", "cpu")

    @torch.inference_mode()
    def run(ids, route):
        cache = KVCache(model.config, len(ids), tokens, dtype=torch.bfloat16)
        for _ in range(tokens):
            model(ids, cache, route)

    for B in (2, 4, 8, 16):
        ids = torch.arange(1000, 1000 + B)[:, None]
        sides = {"full": lambda: run(ids, "full"), "half": lambda: run(ids, each_by_chance(0.5))}
        seconds = in_turn(rounds, sides, f"batch of {B}")
        chance = each_by_chance(0.5)  # the same decisions as in each of the timed runs
        steps = [executed(model, ids, chance) for _ in range(tokens)]
        read = {"full": executed(model, ids, "full")["weight_bytes"],
                "half": statistics.mean(step["weight_bytes"] for step in steps)}
        yield row("h", f"1B, decode of {B} rows: half kept, times full", ratio(seconds["full"], seconds["half"]), 0.93,
                  tokens_per_second={k: B * tokens / statistics.median(v) for k, v in seconds.items()},
                  ideal=read["full"] / read["half"], weight_bytes=read)


def masked_forward(layer: DecoderLayer, x, rotation, cache, route):
    """DecoderLayer.forward as it is without gathering: both paths for every token, one thrown away."""
    h, norm = layer.input_layernorm(x), layer.post_attention_layernorm
    k, v = layer.self_attn.keys_values(h, rotation)
    y = x + layer.self_attn(h, k, v, rotation)
    if layer.router is None:
        return y + layer.mlp(norm(y)), None, None
    gate = torch.sigmoid(layer.router(h))
    kept, g = route(layer.index, gate), gate[..., None]
    full, skip = y + g * layer.mlp(norm(y)), x + (1 - g) * layer.router_proj(norm(x))
    return torch.where(kept[..., None], full, skip), gate, kept


def dense_forward(routed: dict, layer, x, **arguments):
    """The same in transformers' decoder layer, with the router and adapter of ours that it stands for."""
    h, norm, parts = layer.input_layernorm(x), layer.post_attention_layernorm, routed.get(layer)
    y = x + layer.self_attn(hidden_states=h, **arguments)[0]
    if parts is None:
        return y + layer.mlp(norm(y))
    router, adapter, gates = parts
    gate = torch.sigmoid(router(h))
    gates.append(gate)
    kept, g = torch.rand_like(gate) < 0.5, gate[..., None]
    return torch.where(kept[..., None], y + g * layer.mlp(norm(y)), x + (1 - g) * adapter(norm(x)))


def training(rounds: int = 5, T: int = 128):
    """Rows i, l: forward, backward and AdamW. In float32, which every processor multiplies at full speed."""
    model = random_model("1B", "cpu", torch.float32)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4)
    ids = torch.randint(128000, (1, T + 1), generator=torch.Generator().manual_seed(0))
    args = argparse.Namespace(alpha=1e-3, micro_batch_size=1, device="cpu")

    def gathered():  # the step of train.py
        optimizer.zero_grad()
        row = Row(ids[0], torch.ones(T + 1, dtype=torch.bool), "")
        backward(model, [row], args, functools.partial(model.hidden_states, route=each_by_chance(0.5)))
        optimizer.step()

    def masked():
        with mock.patch.object(DecoderLayer, "forward", masked_forward):
            gathered()

    sides = {"masked": masked, "gathered": gathered}
    if transformers:
        theirs = as_transformers(model).requires_grad_(False)
        gates = []
        routed = {theirs.model.layers[layer.index]: (layer.router, layer.router_proj, gates)
                  for layer in model.model["layers"] if layer.router is not None}

        def dense():
            optimizer.zero_grad()
            gates.clear()
            with mock.patch.object(
                    transformers.models.llama.modeling_llama.LlamaDecoderLayer, "forward",
                    lambda layer, x, **arguments: dense_forward(routed, layer, x, **arguments)):
                logits = theirs(ids[:, :-1], use_cache=False).logits
            loss = F.cross_entropy(logits[0].float(), ids[0, 1:]) + 1e-3 * skip_loss(torch.stack(gates, -1))
            loss.backward()
            optimizer.step()
        sides["transformers"] = dense
    seconds = in_turn(rounds, sides, "training")
    memory = {name: peak_growth(run) for name, run in sides.items()}
    random_model.cache_clear()  # other rows have it in bfloat16
    speed = {name: T / statistics.median(each) for name, each in seconds.items()}
    for key, other in [("i", "masked"), ("l", "transformers")][:len(sides) - 1]:
        name = {"i": "computing both paths and masking", "l": "transformers with dense routers"}[key]
        yield row(key, f"1B, training step of {T} tokens, half kept: speed over {name}",
                  ratio(seconds[other], seconds["gathered"]), 1.15, tokens_per_second=speed)
        if memory[other] is not None:
            yield row(key, "1B, the same: memory that grows during the step, over it",
                      memory["gathered"] / memory[other], at_most=1.0, bytes=memory)


def saved_bytes(model: FlexiDepth, T: int, checkpoint_activations: bool) -> int:
    """What autograd keeps of a forward pass of T tokens, half kept, in tensors that are no parameters."""
    parameters, kept = {p.data_ptr() for p in model.parameters()}, {}

    def pack(tensor):
        if tensor.data_ptr() not in parameters:
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor
    forward = distribute(model, argparse.Namespace(checkpoint_activations=checkpoint_activations, shard=False))
    with autocast(model), torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = forward(torch.zeros(1, T, dtype=torch.long), route=each_by_chance(0.5))
    del result
    return sum(kept.values())


def training_memory(T: int = 2048, counted: int = 256):
    """Row m: bytes of a training step of the 8B, one row of T tokens at a time. What a routed layer keeps
    for the backward pass is counted on one of its shape, with fewer tokens: it grows as they do."""
    config = Config(**SHAPES["8B"])
    with torch.device("meta"):
        shapes = FlexiDepth(config)
    trained = sum(p.numel() for p in shapes.parameters() if p.requires_grad)
    frozen = sum(p.numel() for p in shapes.parameters()) - trained
    one = Config(**SHAPES["8B"] | {"num_hidden_layers": 2, "routing_layers": [1], "vocab_size": 8})
    layer, last = [], len(config.routing_layers)
    for checkpointed in (False, True):
        model = FlexiDepth(one)
        model.model["norm"] = torch.nn.Identity()  # the layer alone
        for p in model.parameters():
            p.data = p.data if p.requires_grad else p.data.bfloat16()
        layer.append(saved_bytes(model, counted, checkpointed) * T // counted)
    fixed = 2 * frozen + 16 * trained + 2 * trained  # base; masters, gradients, Adam; autocast's copies
    logits = LOGITS * (2 + 4 + 4 + 4 + 2)  # bfloat16, float32, their log-softmax, the gradients of both
    parts = {"base": 2 * frozen, "trained": 18 * trained, "layer": layer[0], "layer_checkpointed": layer[1],
             "logits": logits}
    yield row("m", f"8B, training row of {T} tokens, half kept: GB, counted", (
        fixed + last * layer[0] + logits) / 1e9, at_most=80, bytes=parts)
    yield row("m", "8B, the same with --checkpoint-activations", (
        fixed + last * layer[1] + layer[0] + logits) / 1e9, at_most=24, bytes=parts)


def long_context(T: int = 8000, tokens: int = 24):
    """Row k: two answers in turn, token by token, after a long and a short prompt."""
    model, c = random_model("1B", "cpu"), Config(**SHAPES["1B"])
    ids = torch.randint(128000, (1, T), generator=torch.Generator().manual_seed(0))
    answers = {"long": generate(model, ids, tokens + 3, route="full"),
               "short": generate(model, ids[:, :8], tokens + 3, route="full")}
    print("\rlong context: prefill\033[K", end="", file=sys.stderr, flush=True)
    caches, init = [], KVCache.__init__

    def remember(cache, *args):
        init(cache, *args)
        caches.append(cache)

    with mock.patch.object(KVCache, "__init__", remember):  # those that the answers make for themselves
        for answer in answers.values():
            next(answer)
    held = caches[0].keys.nbytes + caches[0].values.nbytes
    grown = peak_growth(lambda: next(answers["long"]))
    sides = {name: functools.partial(next, answer) for name, answer in answers.items()}
    seconds = in_turn(tokens, sides, "long context")
    weights = executed(model, PROMPT, "full")["weight_bytes"]
    per_token = 2 * c.num_hidden_layers * c.num_key_value_heads * c.head_dim * 2  # bytes of keys and values
    ideal = (weights + T * per_token) / (weights + 8 * per_token)
    yield row("k", f"1B, a token after {T} over one after 8, over the ideal by bytes",
              ratio(seconds["long"], seconds["short"]) / ideal, at_most=1.1, ideal=ideal)
    if grown is not None:
        yield row("k", f"1B, memory that grows while a token is decoded after {T}, over the cache",
                  grown / held, at_most=0.02, cache_bytes=held)
    yield row("k", "1B, bytes of the cache over those of its shape",
              held / (per_token * (T + tokens + 2)), 1.0, 1.0)  # the last token is not fed back


LOAD = """
import sys, time
from pathlib import Path
sys.path.insert(0, sys.argv[1])
import torch
from flexidepth import FlexiDepth
start = time.perf_counter()
model = FlexiDepth.from_pretrained(sys.argv[2])
for parameter in model.parameters():  # a page is read when it is first used: use each of them
    parameter.detach().view(-1)[::1024].max()
seconds = time.perf_counter() - start
status = Path("/proc/self/status").read_text()
print(seconds, 1024 * int(status.split("VmHWM:")[1].split()[0]))
"""


def loading(rounds: int = 5, tokens: int = 3):
    """Rows j and "d 8B": a checkpoint of 16 GB in 4 shards, read, loaded, and decoded from."""
    config = Config(**SHAPES["8B"])
    with tempfile.TemporaryDirectory() as folder:
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        if memory < 22e9 or shutil.disk_usage(folder).free < 18e9 or not STATUS.is_file():
            print("j and d 8B are left out: they need 22 GB of memory, 18 GB of disk and /proc", file=sys.stderr)
            return
        folder = Path(folder)
        (folder / "config.json").write_text(json.dumps({"model_type": "llama"} | SHAPES["8B"]))
        shard, index = {}, {}
        for name, tensor in random_tensors(config, torch.bfloat16):
            shard[name], file = tensor, f"model-{len(set(index.values())) + 1:05d}-of-00004.safetensors"
            if sum(t.nbytes for t in shard.values()) > 4.1e9 or name.endswith("lm_head.weight"):
                print(f"\rloading: writing {file}\033[K", end="", file=sys.stderr, flush=True)
                save_file(shard, folder / file, metadata={"format": "pt"})
                index |= dict.fromkeys(shard, file)
                shard = {}
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
        files = [folder / file for file in sorted(set(index.values()))]
        size, loaded = sum(file.stat().st_size for file in files), []

        def read():
            buffer = bytearray(1 << 24)
            for file in files:
                with open(file, "rb", buffering=0) as opened:
                    while opened.readinto(buffer):
                        pass

        def load():
            out = subprocess.run([sys.executable, "-c", LOAD, sys.path[0], folder],
                                 check=True, capture_output=True, text=True)
            loaded.append([float(figure) for figure in out.stdout.split()])

        seconds = in_turn(rounds, {"read": read, "load": load}, "loading")
        times, peaks = zip(*loaded[1:])
        where = f"8B in {len(files)} shards, loading"
        yield row("j", f"{where}: peak memory over the files' size", statistics.median(peaks) / size, at_most=1.03,
                  file_bytes=size)
        yield row("j", f"{where}: time over reading the files", ratio(times, seconds["read"]), at_most=1.3,
                  seconds={"load": statistics.median(times), "read": statistics.median(seconds["read"])})
        model = FlexiDepth.from_pretrained(folder)
        half = skipping(config, 0.5)
        sides = {"full": lambda: list(generate(model, PROMPT, tokens, route="full")),
                 "half": lambda: list(generate(model, PROMPT, tokens, route=half))}
        seconds = in_turn(rounds, sides, "decode 8B")
        counts = {"full": executed(model, PROMPT, "full"), "half": executed(model, PROMPT, half)}
        yield row("d 8B", "8B, decode: a quarter of all layers skipped, times full",
                  ratio(seconds["full"], seconds["half"]), 1.2, executed=counts,
                  ideal=counts["full"]["weight_bytes"] / counts["half"]["weight_bytes"],
                  tokens_per_second={k: tokens / statistics.median(v) for k, v in seconds.items()})


def processor() -> str:
    """What the processor calls itself."""
    cpuinfo = Path("/proc/cpuinfo")
    names = cpuinfo.read_text().split("model name\t: ")[1:] if cpuinfo.is_file() else []
    return names[0].splitlines()[0] if names else platform.processor()


def write_json(file: Path, machine: dict, rows: list[dict]) -> None:
    """All figures so far; a file that can't be written ends the run in one line, with status 2."""
    temporary = file.with_name(f".{file.name}.{os.getpid()}")
    try:
        temporary.write_text(json.dumps({"machine": machine, "rows": rows}, indent=1) + "\n")
        temporary.replace(file)
    except OSError as error:
        print(f"bench.py: {file} can't be written: {error.strerror}", file=sys.stderr)
        sys.exit(2)


SECTIONS = {loading: "j d", decode: "a b c d e", prefill: "f", tiny: "g", batches: "h", training: "i l",
            training_memory: "m", long_context: "k"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", metavar="ROW", choices=sorted({*" ".join(SECTIONS.values()).split()}),
                        help="letters of the rows to run; rows that are measured together come together")
    parser.add_argument("--json", type=Path, help="write all figures to this file")
    args = parser.parse_args()
    machine = {"processor": processor(), "threads": torch.get_num_threads(), "torch": torch.__version__,
               "transformers": transformers and transformers.__version__,
               "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None}
    print(", ".join(f"{key} {value}" for key, value in machine.items()))
    if not transformers:
        print("transformers is not installed: rows a, g, l and parts of d and f are left out")
    sections = [section for section, rows in SECTIONS.items() if not args.only or {*rows.split()} & {*args.only}]
    if torch.cuda.is_available():
        sections += [functools.partial(decode, shape, "cuda") for shape in SHAPES
                     if not args.only or {*"abcde"} & {*args.only}]
    done = []
    if args.json:
        write_json(args.json, machine, done)  # now, rather than after the first measurement
    for section in sections:
        for measured in section():
            done.append(measured)
            bounds = [f">= {measured['at_least']}"] * (measured["at_least"] is not None) \
                + [f"<= {measured['at_most']}"] * (measured["at_most"] is not None)
            print(f"{measured['row']:4} {measured['what']:75} {measured['measured']:6.3f}  {' '.join(bounds):16} "
                  f"{'' if measured['met'] else 'not met':8}"
                  + (f" ideal {measured['ideal']:.3f}" if "ideal" in measured else "")
                  + (f", reached {measured['gain']:.3f}" if "gain" in measured else ""), flush=True)
            if args.json:
                write_json(args.json, machine, done)


if __name__ == "__main__":
    main()
