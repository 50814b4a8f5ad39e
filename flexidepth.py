"""FlexiDepth in one file: a pre-trained Llama whose tokens choose, layer by layer, how deep to go.

The method of Luo, Wang, Yan: "Adaptive Layer-skipping in Pre-trained LLMs", COLM 2025, arXiv
2503.23798. The pre-trained model is frozen. Each of its later layers gets two small trained parts:
a router, which gives every token a gate score g in (0, 1), and an adapter, a narrow mlp. For a
token x that enters such a layer, with h = input_layernorm(x) and norm the second norm:

    k, v = k_proj(h), v_proj(h)                                 of every token
    g > 0.5:  x = x + attention(h)                              the full path
              x = x + g * mlp(norm(x))
    else:     x = x + (1 - g) * adapter(norm(x))                the skipping path

A token with g = 0.4 skips. It still gets its norms, router, key, value and adapter, whose output is
scaled by 0.6 and added. Its query, attention, output projection and mlp are not computed: that is
the saving. Key and value are needed: later tokens that run this layer attend to all before them.

The decision g > 0.5 has no gradient. The router learns through the factor g or (1 - g) on the
output of the mlp or adapter that ran, and through `skip_loss`, the price of open gates. The factors
stay at inference: a layer with all gates open is *not* the pre-trained one; route="full" runs that.
Another routing rule needs no change here: pass route=callable(layer_index, gate) -> kept. It takes
the place of g > 0.5 alone, factors stay, and sees the gates of the new tokens but no positions.

Letters in shapes: B batch, T new tokens, S cached and new tokens, N kept tokens, Q the most any row
keeps; D hidden_size, H attention heads, K key/value heads, d head_dim, V vocabulary; L layers, R of
them FlexiDepth layers (routing_layers), in layer order.
"""
import base64
import json
import os
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, fields
from pathlib import Path

import tiktoken
import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

Route = str | Callable[[int, Tensor], Tensor]  # or (layer_index, gate (B, T)) -> kept (B, T)
Rotation = tuple[Tensor, Tensor]  # cat(cos, cos), cat(-sin, sin) of the new positions, each (T, d)

# Settings that would change the result, with the values implemented here ("ddllama": released).
SUPPORTED = {"model_type": ("llama", "ddllama"), "hidden_act": ("silu",), "sliding_window": (),
             "rope_type": ("default", "llama3"), "quantization_config": (),
             "attention_bias": (False,), "mlp_bias": (False,)}
LLAMA3_ROPE = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")

@dataclass
class Config:
    """The shape of a model, by the names of config.json. ValueError if its values do not fit."""
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int | None = None   # None: as many as attention heads
    head_dim: int | None = None              # None: hidden_size / num_attention_heads
    max_position_embeddings: int = 2048
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    rope_scaling: dict | None = None         # None, or the settings of type "llama3"
    tie_word_embeddings: bool = False
    routing_layers: list[int] | None = None  # None: the latter half
    router_size: int | None = None           # None: hidden_size / 16
    adapter_size: int | None = None          # None: intermediate_size / 16
    threshold: float = 0.5                   # a gate is open strictly above it

    def __post_init__(self):
        L, heads = self.num_hidden_layers, self.num_attention_heads
        K = self.num_key_value_heads = self.num_key_value_heads or heads
        d = self.head_dim = self.head_dim or self.hidden_size // heads
        self.router_size = self.router_size or max(1, self.hidden_size // 16)
        self.adapter_size = self.adapter_size or max(1, self.intermediate_size // 16)
        routed = range(L // 2, L) if self.routing_layers is None else self.routing_layers
        self.routing_layers = sorted(set(routed))
        if heads % K or d % 2:
            raise ValueError(f"num_key_value_heads {K} must divide {heads}, head_dim {d} be even")
        if not self.routing_layers or not set(self.routing_layers) <= set(range(L)):
            raise ValueError(f"routing_layers {self.routing_layers}; expected some of 0..{L - 1}")
        if self.rope_scaling and not set(LLAMA3_ROPE) <= set(self.rope_scaling):
            raise ValueError(f"rope_scaling {self.rope_scaling}; expected {', '.join(LLAMA3_ROPE)}")

    @classmethod
    def from_json(cls, path: Path, **overrides) -> "Config":
        """Read a config.json; overrides win unless None. ValueError if it asks for other things."""
        raw = read_json(path)
        # Two spellings: rope_parameters (transformers 5); rope_theta and rope_scaling (older).
        rope = raw.get("rope_scaling") or raw.get("rope_parameters") or {}
        raw["rope_type"] = rope.get("rope_type", rope.get("type", "default"))
        for key, known in SUPPORTED.items():
            if raw.get(key) not in (None, *known):
                raise ValueError(f"{path}: {key} {raw[key]!r} is not supported: {known or None}")
        raw["rope_theta"] = rope.get("rope_theta", raw.get("rope_theta"))
        raw["rope_scaling"] = rope if raw["rope_type"] == "llama3" else None
        raw |= {key: value for key, value in overrides.items() if value is not None}
        try:
            return cls(**{f.name: raw[f.name] for f in fields(cls) if raw.get(f.name) is not None})
        except (TypeError, ValueError, ZeroDivisionError) as error:  # a key is missing or no number
            raise ValueError(f"{path}: {error}") from None

# ---- Llama ---------------------------------------------------------------------------------------
class RMSNorm(nn.Module):
    def __init__(self, size: int, eps: float):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(size)), eps

    def forward(self, x: Tensor) -> Tensor:
        # Unfused, and cast before the weight, as in Llama: a last bit can flip a gate.
        scale = torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + self.eps)
        # A router's weight, float32 while it is trained, has to decide as it will in x's dtype.
        return self.weight.to(x.dtype) * (x.float() * scale).to(x.dtype)

def rotary_frequencies(config: Config) -> Tensor:
    """Radians per position for each of the d/2 rotating pairs, float32 (d/2,) on the CPU."""
    exponent = torch.arange(0, config.head_dim, 2, device="cpu").float() / config.head_dim
    freq = 1.0 / config.rope_theta ** exponent
    if config.rope_scaling is None:
        return freq
    # Llama 3.1: fast rotations stay, slow ones go `factor` times slower, those between are blended.
    factor, low, high, context = (config.rope_scaling[key] for key in LLAMA3_ROPE)
    turns = context / (2 * torch.pi / freq)
    fast = ((turns - low) / (high - low)).clamp(0, 1)
    return (1 - fast) * freq / factor + fast * freq

def rotate(x: Tensor, rotation: Rotation) -> Tensor:
    """Rotary embedding, split-half form: dimensions i and i + d/2 turn together. x (..., d)."""
    return x * rotation[0] + x.roll(x.shape[-1] // 2, dims=-1) * rotation[1]

class KVCache:
    """Keys and values of all layers and tokens, in the model's dtype: (L, B, K, max_length, d)."""
    def __init__(self, config: Config, batch_size: int, max_length: int, device="cpu", dtype=None):
        shape = (config.num_hidden_layers, batch_size, config.num_key_value_heads, max_length)
        self.keys = torch.empty(*shape, config.head_dim, device=device, dtype=dtype)
        self.values = torch.empty_like(self.keys)
        self.length = 0  # tokens held; the model adds T when all layers have stored theirs

    def update(self, layer_index: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Store k and v (B, K, T, d) of the new tokens; return all of the layer's, (B, K, S, d)."""
        end, B, room = self.length + k.shape[2], self.keys.shape[1], self.keys.shape[3]
        if k.shape[0] != B or end > room:
            raise ValueError(f"{k.shape[0]} rows of {end} tokens; the cache is for {B} of {room}")
        keys, values = self.keys[layer_index, :, :, :end], self.values[layer_index, :, :, :end]
        keys[:, :, self.length:], values[:, :, self.length:] = k, v
        return keys, values

class Attention(nn.Module):
    """Grouped-query attention in two steps, because skipping tokens take only the first."""
    def __init__(self, config: Config):
        super().__init__()
        self.head_dim = config.head_dim
        q_size = config.num_attention_heads * config.head_dim
        kv_size = config.num_key_value_heads * config.head_dim
        self.q_proj = nn.Linear(config.hidden_size, q_size, bias=False)
        self.k_proj = nn.Linear(config.hidden_size, kv_size, bias=False)
        self.v_proj = nn.Linear(config.hidden_size, kv_size, bias=False)
        self.o_proj = nn.Linear(q_size, config.hidden_size, bias=False)

    def keys_values(self, h: Tensor, rotation: Rotation) -> tuple[Tensor, Tensor]:
        """First step, for every token: h (B, T, D) -> rotated keys, and values, (B, K, T, d)."""
        k = self.k_proj(h).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)     # (B, K, T, d)
        v = self.v_proj(h).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)     # (B, K, T, d)
        return rotate(k, rotation), v

    def forward(self, h: Tensor, k: Tensor, v: Tensor, rotation: Rotation) -> Tensor:
        """Second step: all tokens of h (B, T, D) attend to k and v (B, K, S, d) -> (B, T, D)."""
        T, S = h.shape[1], k.shape[2]
        q = self.q_proj(h).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)     # (B, H, T, d)
        # Token t of the T sees keys 0..S-T+t. If T = 1 these are all; if S = T it is is_causal.
        mask = None if T in (1, S) else h.new_ones(T, S, dtype=torch.bool).tril(S - T)
        out = F.scaled_dot_product_attention(
            rotate(q, rotation), k, v, mask, is_causal=(S == T and T > 1), enable_gqa=True)
        return self.o_proj(out.transpose(1, 2).flatten(2))                        # (B, T, D)

    def forward_kept(
            self, h: Tensor, k: Tensor, v: Tensor, rotation: Rotation, kept: Tensor) -> Tensor:
        """Second step, only for the N tokens where kept (B, T), over all S keys -> (N, D)."""
        (B, T), S = kept.shape, k.shape[2]
        row, t = kept.nonzero(as_tuple=True)                                      # (N,)
        q = self.q_proj(h[row, t]).unflatten(-1, (-1, self.head_dim))             # (N, H, d)
        q = rotate(q, tuple(part[t, None] for part in rotation))
        # Rows keep different numbers of tokens, so each row's kept ones move to the front: first to
        # slot 0, second to slot 1, ... Slots left empty see key 0 and are never read back.
        slot = kept.cumsum(1)[row, t] - 1
        Q = int(slot.max()) + 1
        queries = q.new_zeros(B, Q, *q.shape[1:]).index_put((row, slot), q)       # (B, Q, H, d)
        last_key = t.new_zeros(B, Q).index_put((row, slot), S - T + t)
        mask = torch.arange(S, device=h.device) <= last_key[:, None, :, None]     # (B, 1, Q, S)
        out = F.scaled_dot_product_attention(queries.transpose(1, 2), k, v, mask, enable_gqa=True)
        return self.o_proj(out.transpose(1, 2)[row, slot].flatten(1))             # (N, D)

class MLP(nn.Module):
    def __init__(self, config: Config):
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))

# ---- FlexiDepth ----------------------------------------------------------------------------------
TRAINED = re.compile(r"model\.layers\.(\d+)\.(?:router|router_proj)\.")  # names of trained tensors

class Router(nn.Module):
    """The logit of a token's gate, through a bottleneck of router_size."""
    def __init__(self, config: Config):
        super().__init__()
        self.router_enc = nn.Linear(config.hidden_size, config.router_size, bias=False)
        self.router_norm = RMSNorm(config.router_size, config.rms_norm_eps)
        self.router_dec = nn.Linear(config.router_size, config.hidden_size, bias=False)
        self.router_head = nn.Linear(config.hidden_size, 1, bias=False)

    def forward(self, h: Tensor) -> Tensor:
        # differs from the paper, which has norm(tanh(.)): the released weights need tanh(norm(.))
        h = torch.tanh(self.router_norm(self.router_enc(h)))
        return self.router_head(self.router_dec(h)).squeeze(-1)                   # (B, T)

class Adapter(nn.Module):
    """Runs in place of the mlp: a SwiGLU, by default a sixteenth as wide. As the released weights
    name them, and unlike MLP, `gate_proj` and `down_proj` map D to adapter_size, `up_proj` back."""
    def __init__(self, config: Config):
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.adapter_size, bias=False)
        self.down_proj = nn.Linear(config.hidden_size, config.adapter_size, bias=False)
        self.up_proj = nn.Linear(config.adapter_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.up_proj(F.silu(self.gate_proj(x)) * self.down_proj(x))

class DecoderLayer(nn.Module):
    """A Llama layer; if in routing_layers, with a router, and an adapter for tokens that skip."""
    def __init__(self, config: Config, index: int):
        super().__init__()
        self.config, self.index = config, index
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = MLP(config)
        self.router = Router(config) if index in config.routing_layers else None
        self.router_proj = Adapter(config) if index in config.routing_layers else None

    def forward(self, x: Tensor, rotation: Rotation, cache: KVCache | None, route: Route) -> tuple:
        """x (B, T, D) -> x (B, T, D), and gate and kept (B, T), or None where nothing is routed."""
        h = self.input_layernorm(x)
        k, v = self.self_attn.keys_values(h, rotation)  # of every token, kept or not
        if cache is not None:
            k, v = cache.update(self.index, k, v)

        if self.router is None or route == "full":
            x = x + self.self_attn(h, k, v, rotation)
            return x + self.mlp(self.post_attention_layernorm(x)), None, None

        gate = torch.sigmoid(self.router(h))                                      # (B, T)
        kept = gate > self.config.threshold if route == "learned" else route(self.index, gate)
        kept = kept.bool().expand_as(gate)
        N = int(kept.sum())  # the host waits for it, and then starts no path that is not taken
        # Where all go one way, as a single token does, none is gathered: x[...] is all of x. With
        # gradients on all are, and the adapter runs even on no rows: its gradients are 0, not None.
        mixed = 0 < N < kept.numel() or torch.is_grad_enabled()
        full, skip = (kept, ~kept) if mixed else (..., ...)
        g, norm, out = gate[..., None], self.post_attention_layernorm, torch.empty_like(x)
        if N > 0:  # the full path
            y = x[full] + (self.self_attn.forward_kept(h, k, v, rotation, kept) if mixed else
                           self.self_attn(h, k, v, rotation))
            out[full] = y + g[full] * self.mlp(norm(y))
        if mixed or N == 0:  # the skipping path
            y = x[skip]
            out[skip] = y + (1 - g[skip]) * self.router_proj(norm(y))
        return out, gate, kept

@dataclass
class Output:
    logits: Tensor        # (B, T, V), in the model's dtype
    gates: Tensor | None  # (B, T, R), g of every FlexiDepth layer, in the model's dtype
    kept: Tensor | None   # (B, T, R), bool, True where the full path ran; both None if bypassed

class FlexiDepth(nn.Module):
    """A frozen Llama with FlexiDepth layers to train. Parameters have their official names."""
    def __init__(self, config: Config):
        super().__init__()
        self.config, layers = config, config.num_hidden_layers
        self.model = nn.ModuleDict({
            "embed_tokens": nn.Embedding(config.vocab_size, config.hidden_size),
            "layers": nn.ModuleList(DecoderLayer(config, i) for i in range(layers)),
            "norm": RMSNorm(config.hidden_size, config.rms_norm_eps)})
        self.lm_head = None if config.tie_word_embeddings else nn.Linear(
            config.hidden_size, config.vocab_size, bias=False)
        for name, parameter in self.named_parameters():
            parameter.requires_grad = bool(TRAINED.match(name))
        self.frequencies = rotary_frequencies(config)  # not a buffer, so .to(dtype) leaves it alone

    def forward(self, input_ids: Tensor, cache: KVCache = None, route: Route = "learned") -> Output:
        """Logits, gates and decisions for input_ids (B, T), int64, padded (if at all) at the end.
        cache: holds the rows' earlier tokens (no padding) and takes these. route: "learned"
        compares gates with the threshold; "full" bypasses routers and adapters: the pre-trained
        model; a function decides. ValueError for another, or more tokens than cache or context."""
        x, gates, kept = self.hidden_states(input_ids, cache, route)
        return Output(self.head(x), gates, kept)

    def hidden_states(self, input_ids: Tensor, cache: KVCache = None, route: Route = "learned"):
        """As `forward`, but with normed hidden states (B, T, D), which `head` may take in parts."""
        if not callable(route) and route not in ("learned", "full"):
            raise ValueError(f"route is {route!r}; expected 'learned', 'full' or a function")
        start, T = cache.length if cache is not None else 0, input_ids.shape[1]
        if start + T > (context := self.config.max_position_embeddings):
            raise ValueError(f"{start + T} tokens do not fit the context of {context}")
        x = self.model["embed_tokens"](input_ids)                                 # (B, T, D)
        angle = torch.arange(start, start + T, device="cpu")[:, None] * self.frequencies  # (T, d/2)
        cos, sin = angle.cos().to(x), angle.sin().to(x)  # to the device and dtype of x
        rotation = torch.cat((cos, cos), -1), torch.cat((-sin, sin), -1)          # (T, d) each
        routed = []
        for layer in self.model["layers"]:
            x, *decision = layer(x, rotation, cache, route)
            routed += [decision] if decision[0] is not None else []               # R x 2 x (B, T)
        if cache is not None:
            cache.length += T
        gates, kept = (torch.stack(each, -1) for each in zip(*routed)) if routed else (None, None)
        return self.model["norm"](x), gates, kept

    def head(self, x: Tensor) -> Tensor:
        """Logits (..., V) of hidden states (..., D)."""
        return self.lm_head(x) if self.lm_head else F.linear(x, self.model["embed_tokens"].weight)

    def save_flexidepth(self, path: str | Path) -> Path:
        """Write routers and adapters to a .safetensors file, or into a folder. Returns the file."""
        file = Path(path, "" if Path(path).suffix == ".safetensors" else "flexidepth.safetensors")
        file.parent.mkdir(parents=True, exist_ok=True)
        trained = {name: p.detach() for name, p in self.named_parameters() if TRAINED.match(name)}
        temporary = file.with_name(f".{file.name}.{os.getpid()}")  # so that no half file is left
        try:
            temporary.write_bytes(save(trained, metadata={"format": "pt"}))
            temporary.replace(file)
        finally:
            temporary.unlink(missing_ok=True)
        return file

    @classmethod
    def from_pretrained(cls, path: str | Path, flexidepth: str | Path | None = None,
                        routing_layers: list[int] | None = None, device: str = "cpu",
                        dtype: torch.dtype | None = None) -> "FlexiDepth":
        """Load a Llama or FlexiDepth checkpoint: a folder, or a hub name in the local cache.
        flexidepth: a folder or file of trained routers and adapters. None: those in the model files
        of the checkpoint, else new random ones (torch's global generator) in routing_layers or the
        latter half. dtype: None keeps the checkpoint's. ValueError, FileNotFoundError if unfit."""
        folder = find_folder(path)
        base = read_tensors(folder, "model.safetensors", device, dtype)
        dtype = next(iter(base.values())).dtype
        trained = {name: base.pop(name) for name in list(base) if TRAINED.match(name)}
        if flexidepth is not None:
            found = Path(flexidepth) if Path(flexidepth).is_file() else find_folder(flexidepth)
            trained = read_tensors(found, "flexidepth.safetensors", device, dtype, only=TRAINED)
        # Which layers route, and how wide they are, is read from the tensors themselves.
        layers = sorted({int(TRAINED.match(name)[1]) for name in trained})
        if layers and routing_layers is not None and sorted(routing_layers) != layers:
            raise ValueError(f"routing_layers {routing_layers} asked for; trained are {layers}")
        rows = {name.split(".")[-2]: len(t) for name, t in trained.items()}
        config = Config.from_json(
            folder / "config.json", routing_layers=layers or routing_layers,
            router_size=rows.get("router_enc"), adapter_size=rows.get("down_proj"))
        with torch.device("meta"):  # shapes without memory; the weights are assigned to them
            model = cls(config)
        for i in config.routing_layers if not trained else ():
            for part, module in (("router", Router(config)), ("router_proj", Adapter(config))):
                base |= {f"model.layers.{i}.{part}.{name}": t.to(device, dtype)
                         for name, t in module.state_dict().items()}
        if config.tie_word_embeddings:
            base.pop("lm_head.weight", None)  # some checkpoints store the embedding twice
        try:
            model.load_state_dict(base | trained, strict=True, assign=True)
        except RuntimeError as error:  # names and shapes, a line each
            raise ValueError(f"{flexidepth or path}: {' '.join(str(error).split())}") from None
        return model

def skip_loss(gates: Tensor, mask: Tensor | None = None) -> Tensor:
    """L_skip: gates (B, T, R), mask (B, T) True at real tokens -> scalar, float32."""
    per_token = gates.float().sum(-1).square()  # the square: dearest where many gates are open
    return per_token.mean() if mask is None else per_token[mask].mean()

def layers_used(kept: Tensor, config: Config) -> Tensor:
    """The depth of every token, plain layers + those that kept it: kept (..., R) -> (...)."""
    return config.num_hidden_layers - len(config.routing_layers) + kept.sum(-1)

# ---- Files ---------------------------------------------------------------------------------------
def read_json(path: Path) -> dict:
    """A JSON object. FileNotFoundError, or ValueError if it is not one."""
    try:
        return {**json.loads(path.read_text(encoding="utf-8"))}
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path}: not a JSON object ({error})") from None

def find_folder(path: str | Path) -> Path:
    """The folder `path`, or that of a hub name ("meta-llama/Llama-3.2-1B") in the local cache."""
    if Path(path).is_dir():
        return Path(path)
    home = Path(os.environ.get("HF_HOME", "~/.cache/huggingface"))
    hub = Path(os.environ.get("HF_HUB_CACHE", home / "hub")).expanduser()
    repository = hub / f"models--{str(path).replace('/', '--')}"
    if (main := repository / "refs" / "main").is_file():  # it holds the name of the snapshot
        return repository / "snapshots" / main.read_text().strip()
    raise FileNotFoundError(f"{path}: no such folder, nor in {hub} (hub names: hf download {path})")

def read_tensors(path: Path, name: str, device: str, dtype: torch.dtype | None,
                 only: re.Pattern = re.compile("")) -> dict[str, Tensor]:
    """Tensors of a file; of a folder those of `name`, else model.safetensors, else as indexed."""
    index, tensors = path / "model.safetensors.index.json", {}
    files = [file for file in (path, path / name, path / "model.safetensors") if file.is_file()][:1]
    places = read_json(index).get("weight_map", {}) if not files and index.is_file() else {}
    files = files or [path / file for file in sorted({*places.values()})]
    for file in files:
        try:
            with safe_open(file, framework="pt", device=str(device)) as opened:
                for key in filter(only.match, opened.keys()):
                    if not places or places.get(key) == file.name:
                        tensors[key] = opened.get_tensor(key).to(dtype=dtype)
        except SafetensorError as error:
            raise ValueError(f"{file}: not a whole safetensors file ({error})") from None
    if not tensors:
        raise FileNotFoundError(f"{path}: no {name} or {index.name} with such tensors")
    return tensors

# ---- Text ----------------------------------------------------------------------------------------
# Llama 3's special tokens, in the order in which they follow the ranks of tokenizer.model.
RESERVED = [f"<|reserved_special_token_{i}|>" for i in range(251)]
SPECIAL = ["<|begin_of_text|>", "<|end_of_text|>", *RESERVED[:4], "<|start_header_id|>",
           "<|end_header_id|>", RESERVED[4], "<|eot_id|>", *RESERVED[5:]]
# How text is cut before its bytes are merged to tokens.
SPLIT = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
         r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")

def read_tokenizer_model(file: Path) -> dict:
    """tiktoken's arguments from Meta's tokenizer.model: lines of a base64 token and its rank."""
    ranks = {}
    for number, line in enumerate(file.read_bytes().splitlines(), 1):
        try:
            token, rank = line.split()
            ranks[base64.b64decode(token, validate=True)] = int(rank)
        except ValueError:
            raise ValueError(f"{file}: line {number} is not 'base64 rank', as in Llama 3") from None
    special = {name: rank for rank, name in enumerate(SPECIAL, len(ranks))}
    return {"pat_str": SPLIT, "mergeable_ranks": ranks, "special_tokens": special}

def read_tokenizer_json(file: Path) -> dict:
    """tiktoken's arguments from a byte-level BPE tokenizer.json. ValueError for another kind."""
    raw = read_json(file)
    try:
        model, (split, level) = raw["model"], raw["pre_tokenizer"]["pretokenizers"]
        kinds = [model["type"], split["type"], split["behavior"], level["type"]]
        odd = [level["use_regex"], level["add_prefix_space"], raw.get("normalizer")]
        # Bytes are written as characters: printable ones as they are, others numbered from 256 on.
        plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
        rest = (b for b in range(256) if b not in plain)
        byte = {chr(b): b for b in plain} | {chr(256 + i): b for i, b in enumerate(rest)}
        special = {token["content"]: token["id"] for token in raw["added_tokens"]}
        ranks = {bytes(byte[character] for character in token): rank
                 for token, rank in model["vocab"].items() if token not in special}
        # tiktoken merges in the order of ranks, and so must the file's own list of merges.
        ids = [model["vocab"]["".join(pair).replace(" ", "")] for pair in model["merges"]]
        if kinds != ["BPE", "Split", "Isolated", "ByteLevel"] or any(odd) or ids != sorted(ids):
            raise ValueError(f"{kinds}, {odd}, or merges out of order")
        pattern = split["pattern"]["Regex"]
        return {"pat_str": pattern, "mergeable_ranks": ranks, "special_tokens": special}
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise ValueError(f"{file}: not a byte-level BPE that is supported ({error!r})") from None

class Tokenizer:
    """Llama 3's text and chat format, on tiktoken. `stop_ids`: the tokens that end an answer."""
    def __init__(self, stop_ids: Iterable[int] = (), **tiktoken_arguments):
        self.encoding = tiktoken.Encoding("llama3", **tiktoken_arguments)
        self.special = tiktoken_arguments["special_tokens"]
        known = {*tiktoken_arguments["mergeable_ranks"], *self.special, *RESERVED}
        if missing := {*map(bytes, zip(range(256))), *SPECIAL} - known:
            raise ValueError(f"a tokenizer without {missing}; expected one like Llama 3's")
        self.stop_ids = {*stop_ids, self.special["<|end_of_text|>"], self.special["<|eot_id|>"]}

    @classmethod
    def from_pretrained(cls, path: str | Path) -> "Tokenizer":
        """From tokenizer.model (here or in original/) or tokenizer.json of a folder or hub name."""
        folder, stop_ids = find_folder(path), []
        for file in (folder / "config.json", folder / "generation_config.json"):
            ids = read_json(file).get("eos_token_id") if file.is_file() else None
            stop_ids += ids if isinstance(ids, list) else [] if ids is None else [ids]
        for name in ("tokenizer.model", "original/tokenizer.model", "tokenizer.json"):
            if (folder / name).is_file():
                read = read_tokenizer_json if name.endswith("json") else read_tokenizer_model
                return cls(stop_ids, **read(folder / name))
        raise FileNotFoundError(f"{path}: holds neither tokenizer.model nor tokenizer.json")

    def encode(self, text: str, *, bos: bool = False, eos: bool = False) -> list[int]:
        """Token ids. A special token's name inside the text is encoded as plain text."""
        ids = [self.special["<|begin_of_text|>"]] * bos + self.encoding.encode_ordinary(text)
        return ids + [self.special["<|end_of_text|>"]] * eos

    def encode_chat(self, messages: list[dict], add_generation_prompt: bool = False) -> list[int]:
        """Token ids of [{"role": ..., "content": ...}, ...], and of the header of an answer."""
        def header(role: str) -> list[int]:
            return [self.special["<|start_header_id|>"], *self.encode(role),
                    self.special["<|end_header_id|>"], *self.encode("\n\n")]
        ids = [self.special["<|begin_of_text|>"]]
        for message in messages:
            content = self.encode(message["content"].strip())
            ids += [*header(message["role"]), *content, self.special["<|eot_id|>"]]
        return ids + header("assistant") if add_generation_prompt else ids

    def decode(self, ids: Iterable[int]) -> str:
        """The text of token ids, special tokens included; bytes not in UTF-8 become U+FFFD."""
        return self.encoding.decode(list(ids), errors="replace")

# ---- Generation ----------------------------------------------------------------------------------
def sample(logits: Tensor, temperature: float, top_p: float, generator=None) -> int:
    """A token of logits (V,): the likeliest at temperature 0, else drawn from the nucleus top_p."""
    if temperature == 0:
        return int(logits.argmax())
    # On the CPU, so that a seed gives the same text from every device.
    probs, ids = (logits.float().cpu() / temperature).softmax(-1).sort(descending=True)
    probs[probs.cumsum(-1) - probs >= top_p] = 0  # the likeliest token always stays
    return int(ids[torch.multinomial(probs, 1, generator=generator)])

@torch.inference_mode()
def generate(model: FlexiDepth, input_ids: Tensor, max_new_tokens: int, temperature: float = 0.0,
             top_p: float = 1.0, generator: torch.Generator | None = None,
             stop_ids: Iterable[int] = (), route: Route = "learned") -> Iterator[tuple[int, int]]:
    """Yield (token id, layers used by the position that predicted it) after a prompt (1, T). Ends
    after a token of stop_ids, max_new_tokens, or at the end of the context. Prompt and answer are
    both routed. generator: a CPU one. ValueError, at the first token, if a setting is wrong."""
    T, context = input_ids.shape[-1], model.config.max_position_embeddings
    if input_ids.ndim != 2 or input_ids.shape[0] != 1 or not 0 < T <= context:
        raise ValueError(f"input_ids {[*input_ids.shape]}; expected (1, T), T from 1 to {context}")
    if temperature < 0 or not 0 < top_p <= 1:
        raise ValueError(f"temperature {temperature}, top_p {top_p}; expected >= 0 and in (0, 1]")
    weight, stop_ids = model.model["embed_tokens"].weight, set(stop_ids)
    new_tokens = max(0, min(max_new_tokens, context - T + 1))  # the last one is not fed back
    cache = KVCache(model.config, 1, T + new_tokens - 1, weight.device, weight.dtype)
    for _ in range(new_tokens):
        # For one token oneDNN would repack all weights to use them once: off, for all threads.
        onednn = torch.backends.mkldnn.enabled
        torch.backends.mkldnn.enabled = onednn and input_ids.shape[1] > 1
        try:
            x, _, kept = model.hidden_states(input_ids.to(weight.device), cache, route)
            logits = model.head(x[0, -1])
        finally:
            torch.backends.mkldnn.enabled = onednn
        token = sample(logits, temperature, top_p, generator)
        depth = model.config.num_hidden_layers
        yield token, depth if kept is None else int(layers_used(kept[0, -1], model.config))
        if token in stop_ids:
            return
        input_ids = torch.tensor([[token]])
