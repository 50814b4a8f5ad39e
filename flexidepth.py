"""FlexiDepth in one file: a pre-trained Llama whose tokens choose, layer by layer, how deep to go.

Luo, Wang, Yan: "Adaptive Layer-skipping in Pre-trained LLMs", COLM 2025, arXiv 2503.23798.

The pre-trained model is frozen. Each of its later layers gets two small trained parts: a router
that gives every token a gate score g in (0, 1), and an adapter, a narrow feed-forward. With h the
normed x, the layer computes

    k, v = k_proj(h), v_proj(h)                        for every token: later ones attend to them
    g > 0.5:  x = x + attention(h);  x = x + g * mlp(norm(x))                      the full path
    else:     x = x + (1 - g) * adapter(norm(x))                               the skipping path

A token with g = 0.4 skips this layer: it gets its norms, router, key, value and adapter, whose
output is added times 0.6, and no query, attention, output projection or mlp, which is the saving.
The decision g > 0.5 has no gradient. The router learns through the factors g and (1 - g), which
scale whichever branch ran, and through `skip_loss`, the price of open gates. The factors stay at
inference, so a layer with all gates open is *not* the pre-trained layer; route="full" is.

Another routing rule (random, a budget, every other layer) needs no change here: hand the model
route=callable(layer_index, gate) -> kept. `DecoderLayer.forward` is where it is asked.

Dimensions, as in the comments at line ends:
    B batch    T new tokens    S cached + new tokens    N kept tokens, Q of the row that keeps most
    D hidden_size    H attention heads    K key/value heads    d head_dim    V vocab_size
    L layers    R FlexiDepth layers, those of routing_layers, in layer order

Where paper and released weights differ, this follows the weights; see "differs from the paper".
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

# "learned", "full" or a function (layer_index, gate (B, T) of the new tokens) -> kept (B, T), bool
Route = str | Callable[[int, Tensor], Tensor]
Routed = tuple[Tensor, Tensor | None, Tensor | None]  # hidden states; gate and kept, None if "full"

# Keys of config.json that would change the result, each with the values that are implemented.
SUPPORTED = {
    "model_type": ("llama", "ddllama"), "hidden_act": ("silu",), "attention_bias": (False,),
    "mlp_bias": (False,), "sliding_window": (None,), "partial_rotary_factor": (1.0, None),
    "quantization_config": (None,), "pretraining_tp": (1, None), "rope_type": ("default", "llama3"),
}
LLAMA3_ROPE = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")

@dataclass
class Config:
    """The shape of a model, by the names of config.json. ValueError where it contradicts itself."""
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
        if min(self.vocab_size, self.hidden_size, self.intermediate_size, L, heads) < 1:
            raise ValueError("a vocabulary, size or number of layers or heads is below 1")
        self.num_key_value_heads = self.num_key_value_heads or heads
        self.head_dim = self.head_dim or self.hidden_size // heads
        self.router_size = self.router_size or max(1, self.hidden_size // 16)
        self.adapter_size = self.adapter_size or max(1, self.intermediate_size // 16)
        routed = range(L // 2, L) if self.routing_layers is None else self.routing_layers
        self.routing_layers = sorted(set(routed))
        if heads % self.num_key_value_heads or self.head_dim % 2:
            raise ValueError(f"{heads} heads must be a multiple of num_key_value_heads "
                             f"{self.num_key_value_heads}, and head_dim {self.head_dim} even")
        if not self.routing_layers or not set(self.routing_layers) <= set(range(L)):
            raise ValueError(f"routing_layers {self.routing_layers}; expected some of 0..{L - 1}")
        if self.rope_scaling and not set(LLAMA3_ROPE) <= set(self.rope_scaling):
            raise ValueError(f"rope_scaling {self.rope_scaling}; expected {', '.join(LLAMA3_ROPE)}")

    @classmethod
    def from_json(cls, path: Path, **overrides) -> "Config":
        """Read a config.json. ValueError names a setting that is not implemented here."""
        raw = read_json(path)
        # Two spellings: rope_parameters (transformers 5); rope_theta and rope_scaling (older).
        rope = raw.get("rope_parameters") or raw.get("rope_scaling") or {}
        raw["rope_type"] = rope.get("rope_type", rope.get("type", "default"))
        for key, allowed in SUPPORTED.items():
            if raw.get(key, allowed[0]) not in allowed:
                raise ValueError(f"{path}: {key} {raw[key]!r} is not supported, only {allowed}")
        raw["rope_theta"] = rope.get("rope_theta", raw.get("rope_theta"))
        raw["rope_scaling"] = rope if raw["rope_type"] == "llama3" else None
        values = {f.name: raw[f.name] for f in fields(cls) if raw.get(f.name) is not None}
        try:
            return cls(**values | overrides)
        except (TypeError, ValueError) as error:  # TypeError: a key is missing or not a number
            raise ValueError(f"{path}: {error}") from None

# -------------------------------------------------------------------------------------------------
# Llama

class RMSNorm(nn.Module):
    def __init__(self, size: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        # In this order and unfused: a gate near the threshold can hang on the last bit.
        x32 = x.float()
        x32 = x32 * torch.rsqrt(x32.pow(2).mean(-1, keepdim=True) + self.eps)
        return self.weight * x32.to(x.dtype)

def rotary_frequencies(config: Config) -> Tensor:
    """Radians a position of each of the d/2 rotating pairs, float32 (d/2,) on the CPU."""
    exponent = torch.arange(0, config.head_dim, 2, device="cpu").float() / config.head_dim
    freq = 1.0 / config.rope_theta ** exponent
    if config.rope_scaling is None:
        return freq
    # Llama 3.1: fast rotations stay, slow ones go `factor` times slower, those between are blended.
    factor, low, high, context = (config.rope_scaling[key] for key in LLAMA3_ROPE)
    wavelength = 2 * torch.pi / freq
    blend = (context / wavelength - low) / (high - low)
    scaled = torch.where(wavelength > context / low, freq / factor, freq)
    between = (wavelength >= context / high) & (wavelength <= context / low)
    return torch.where(between, (1 - blend) * freq / factor + blend * freq, scaled)

def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding, split-half form: dimensions i and i + d/2 turn together. x (..., d)."""
    x1, x2 = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-x2, x1), dim=-1) * sin

class KVCache:
    """Keys and values of every layer and token, allocated once: each (L, B, K, max_length, d)."""

    def __init__(self, config: Config, batch_size: int, max_length: int, device="cpu", dtype=None):
        shape = (config.num_hidden_layers, batch_size, config.num_key_value_heads, max_length,
                 config.head_dim)
        self.keys = torch.empty(shape, device=device, dtype=dtype)
        self.values = torch.empty(shape, device=device, dtype=dtype)
        self.length = 0  # tokens held; the model adds T when all layers have stored theirs

    def update(self, layer_index: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Store k and v (B, K, T, d) of the new tokens; return all of the layer's, (B, K, S, d)."""
        end = self.length + k.shape[2]
        keys, values = self.keys[layer_index, :, :, :end], self.values[layer_index, :, :, :end]
        keys[:, :, self.length:] = k
        values[:, :, self.length:] = v
        return keys, values

class Attention(nn.Module):
    """Grouped-query attention, cut where FlexiDepth cuts it: keys and values of every token; then
    query, attention and output projection of all tokens (`forward`) or the kept (`forward_kept`)."""

    def __init__(self, config: Config):
        super().__init__()
        self.head_dim = config.head_dim
        queries = config.num_attention_heads * config.head_dim
        keys = config.num_key_value_heads * config.head_dim
        self.q_proj = nn.Linear(config.hidden_size, queries, bias=False)
        self.k_proj = nn.Linear(config.hidden_size, keys, bias=False)
        self.v_proj = nn.Linear(config.hidden_size, keys, bias=False)
        self.o_proj = nn.Linear(queries, config.hidden_size, bias=False)

    def keys_values(self, h: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        """h (B, T, D) -> rotated keys, and values, (B, K, T, d)."""
        k = self.k_proj(h).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)      # (B, K, T, d)
        v = self.v_proj(h).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)      # (B, K, T, d)
        return rotate(k, cos, sin), v

    def forward(self, h: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """h (B, T, D), k and v (B, K, S, d) -> (B, T, D)."""
        T, S = h.shape[1], k.shape[2]
        q = self.q_proj(h).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)      # (B, H, T, d)
        # New token t sees keys 0..S-T+t: all of them if it is alone, a plain triangle if S = T.
        mask = None if T in (1, S) else h.new_ones(T, S, dtype=torch.bool).tril(S - T)
        x = F.scaled_dot_product_attention(
            rotate(q, cos, sin), k, v, mask, is_causal=T == S > 1, enable_gqa=True)
        return self.o_proj(x.transpose(1, 2).flatten(2))                           # (B, T, D)

    def forward_kept(
        self, h: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor, kept: Tensor
    ) -> Tensor:
        """The same for the N of the tokens where kept (B, T), which see all S keys -> (N, D)."""
        (B, T), S = kept.shape, k.shape[2]
        row, t = kept.nonzero(as_tuple=True)                                       # (N,)
        q = self.q_proj(h[row, t]).unflatten(-1, (-1, self.head_dim))              # (N, H, d)
        q = rotate(q, cos[t, None], sin[t, None])
        # Rows keep unlike numbers of tokens and are padded to Q: the s-th one kept goes to slot s.
        slot = kept.cumsum(1)[row, t] - 1
        padded = q.new_zeros(B, int(slot.max()) + 1, *q.shape[1:]).index_put((row, slot), q)
        last = t.new_zeros(padded.shape[:2]).index_put((row, slot), t + S - T)     # (B, Q)
        mask = torch.arange(S, device=h.device) <= last[:, None, :, None]          # (B, 1, Q, S)
        x = F.scaled_dot_product_attention(padded.transpose(1, 2), k, v, mask, enable_gqa=True)
        return self.o_proj(x.transpose(1, 2)[row, slot].flatten(1))                # (N, D)

class MLP(nn.Module):
    def __init__(self, config: Config):
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))

# -------------------------------------------------------------------------------------------------
# FlexiDepth

# The names of the trained tensors; the group is the layer.
TRAINED = re.compile(r"model\.layers\.(\d+)\.(?:router|router_proj)\.")

class Router(nn.Module):
    """The logit of a token's gate, through a bottleneck of D/16."""

    def __init__(self, config: Config):
        super().__init__()
        self.router_enc = nn.Linear(config.hidden_size, config.router_size, bias=False)
        self.router_norm = RMSNorm(config.router_size, config.rms_norm_eps)
        self.router_dec = nn.Linear(config.router_size, config.hidden_size, bias=False)
        self.router_head = nn.Linear(config.hidden_size, 1, bias=False)

    def forward(self, h: Tensor) -> Tensor:
        # differs from the paper: it prints norm(tanh(.)); the released weights are tanh(norm(.))
        h = torch.tanh(self.router_norm(self.router_enc(h)))
        return self.router_head(self.router_dec(h)).squeeze(-1)                    # (B, T)

class Adapter(nn.Module):
    """What a skipping token gets for an mlp: the same SwiGLU, a sixteenth as wide."""

    def __init__(self, config: Config):
        super().__init__()
        # The released names: here `down_proj` leads away from D and `up_proj` back, unlike in MLP.
        self.gate_proj = nn.Linear(config.hidden_size, config.adapter_size, bias=False)
        self.down_proj = nn.Linear(config.hidden_size, config.adapter_size, bias=False)
        self.up_proj = nn.Linear(config.adapter_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.up_proj(F.silu(self.gate_proj(x)) * self.down_proj(x))

class DecoderLayer(nn.Module):
    """A Llama layer; if it is one of routing_layers, with the router and adapter to skip it."""

    def __init__(self, config: Config, index: int):
        super().__init__()
        self.index, self.threshold = index, config.threshold
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = MLP(config)
        self.router = Router(config) if index in config.routing_layers else None
        self.router_proj = Adapter(config) if index in config.routing_layers else None

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, cache: "KVCache | None", route: Route) -> Routed:
        """x (B, T, D), cos and sin (T, d) -> x (B, T, D); gate and kept (B, T), or None."""
        h = self.input_layernorm(x)
        k, v = self.self_attn.keys_values(h, cos, sin)  # of every token, kept or not
        if cache is not None:
            k, v = cache.update(self.index, k, v)

        if self.router is None or route == "full":
            x = x + self.self_attn(h, k, v, cos, sin)
            return x + self.mlp(self.post_attention_layernorm(x)), None, None

        gate = torch.sigmoid(self.router(h))                                       # (B, T)
        kept = gate > self.threshold if route == "learned" else route(self.index, gate).bool()
        out = torch.empty_like(x)
        if kept.any():  # the full path
            y = x[kept] + self.self_attn.forward_kept(h, k, v, cos, sin, kept)     # (N, D)
            out[kept] = y + gate[kept][:, None] * self.mlp(self.post_attention_layernorm(y))
        # The skipping path; with no rows too, so that the adapter always gets a gradient.
        y, closed = x[~kept], 1 - gate[~kept][:, None]                             # (B * T - N, D)
        out[~kept] = y + closed * self.router_proj(self.post_attention_layernorm(y))
        return out, gate, kept

@dataclass
class Output:
    logits: Tensor        # (B, T, V), in the model's dtype
    gates: Tensor | None  # (B, T, R), g of every FlexiDepth layer, in the model's dtype
    kept: Tensor | None   # (B, T, R), bool, True where the full path ran; both None if bypassed

class FlexiDepth(nn.Module):
    """A Llama with FlexiDepth layers. Parameter names are those of the official checkpoints."""

    def __init__(self, config: Config):
        super().__init__()
        self.config = config
        self.model = nn.ModuleDict({
            "embed_tokens": nn.Embedding(config.vocab_size, config.hidden_size),
            "layers": nn.ModuleList(DecoderLayer(config, i) for i in range(config.num_hidden_layers)),
            "norm": RMSNorm(config.hidden_size, config.rms_norm_eps),
        })
        self.lm_head = (None if config.tie_word_embeddings else
                        nn.Linear(config.hidden_size, config.vocab_size, bias=False))
        # No buffer, or .to(torch.bfloat16) would round it.
        self.rotary_frequencies = rotary_frequencies(config)

    def forward(self, input_ids: Tensor, cache: KVCache | None = None, route: Route = "learned") -> Output:
        """Logits, gates and decisions for input_ids (B, T), int64, padded (if at all) at the end.

        cache: holds the rows' earlier tokens and takes these. route: "learned" holds gates against
        the threshold; "full" bypasses routers and adapters and is the pre-trained model; a function
        (layer_index, gate (B, T)) -> kept (B, T), bool, replaces the comparison.
        Raises ValueError for another route, shape or more tokens than context or cache can hold.
        """
        x, gates, kept = self.hidden_states(input_ids, cache, route)
        return Output(self.head(x), gates, kept)

    def hidden_states(self, input_ids: Tensor, cache: KVCache | None, route: Route) -> Routed:
        """As `forward`, but the normed hidden states (B, T, D) in place of the logits."""
        if not callable(route) and route not in ("learned", "full"):
            raise ValueError(f"route is {route!r}; expected 'learned', 'full' or a function")
        start = cache.length if cache else 0
        end, limit = start + input_ids.shape[-1], self.config.max_position_embeddings
        if input_ids.ndim != 2 or cache and cache.keys.shape[1] != len(input_ids):
            raise ValueError(f"input_ids is {list(input_ids.shape)}; expected (B, T), B as in the cache")
        if end > min(limit, cache.keys.shape[3] if cache else limit):
            raise ValueError(f"{end} tokens do not fit the context of {limit} or the cache")
        x = self.model["embed_tokens"](input_ids)                                 # (B, T, D)
        positions = torch.arange(start, end, device=x.device).float()
        angles = torch.outer(positions, self.rotary_frequencies.to(x.device)).repeat(1, 2)
        cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)             # (T, d)
        routed = []
        for layer in self.model["layers"]:
            x, gate, kept = layer(x, cos, sin, cache, route)
            routed += [(gate, kept)] if gate is not None else []
        if cache:
            cache.length = end
        gates, kept = (torch.stack(part, -1) for part in zip(*routed)) if routed else (None, None)
        return self.model["norm"](x), gates, kept

    def head(self, x: Tensor) -> Tensor:
        """Logits (..., V) of hidden states (..., D)."""
        return F.linear(x, (self.lm_head or self.model["embed_tokens"]).weight)

    def freeze_base(self) -> "FlexiDepth":
        """Leave requires_grad to routers and adapters alone. Returns the model."""
        for name, parameter in self.named_parameters():
            parameter.requires_grad = bool(TRAINED.match(name))
        return self

    def save_flexidepth(self, path: str | Path) -> Path:
        """Write routers and adapters to a .safetensors file, or flexidepth.safetensors in a folder.

        Under a temporary name, then renamed: a fault leaves what was there. Returns the file.
        """
        file = Path(path) if str(path).endswith(".safetensors") else Path(path, "flexidepth.safetensors")
        trained = {name: t.detach() for name, t in self.named_parameters() if TRAINED.match(name)}
        temporary = file.with_name(f".{file.name}.{os.getpid()}")
        file.parent.mkdir(parents=True, exist_ok=True)
        try:
            temporary.write_bytes(save(trained, metadata={"format": "pt"}))
            os.replace(temporary, file)
        finally:
            temporary.unlink(missing_ok=True)
        return file

    @classmethod
    def from_pretrained(
        cls, path: str | Path, flexidepth: str | Path | None = None,
        routing_layers: list[int] | None = None, device: str = "cpu", dtype: torch.dtype | None = None,
    ) -> "FlexiDepth":
        """Load a Llama or FlexiDepth checkpoint: a folder, or a hub name that is in the local cache.

        flexidepth: a folder or file of trained routers and adapters. Without it they are those of the
        checkpoint or, if it has none, new and random (torch's global generator), in routing_layers or
        the latter half. dtype: None keeps the checkpoint's own. Raises FileNotFoundError, or
        ValueError for a file that is corrupt, not supported or does not fit.
        """
        folder = find_folder(path)
        state = read_tensors(folder, "model.safetensors", device, dtype)
        dtype = next(iter(state.values())).dtype
        if flexidepth is not None:
            trained = read_tensors(Path(flexidepth), "flexidepth.safetensors", device, dtype)
            state = {name: t for name, t in state.items() if not TRAINED.match(name)}
            state |= {name: t for name, t in trained.items() if TRAINED.match(name)}
        # Which layers route, and how wide they are, is read from the tensors themselves.
        layers = sorted({int(match[1]) for name in state if (match := TRAINED.match(name))})
        if flexidepth is not None and not layers:
            raise ValueError(f"{flexidepth}: holds no router or adapter")
        if layers and routing_layers is not None and sorted(routing_layers) != layers:
            raise ValueError(f"routing_layers {routing_layers} asked for; trained are {layers}")
        shape = {} if routing_layers is None else {"routing_layers": routing_layers}
        if layers:
            enc, gate_proj = (state.get(f"model.layers.{layers[0]}.{name}.weight", ())
                              for name in ("router.router_enc", "router_proj.gate_proj"))
            shape = {"routing_layers": layers, "router_size": len(enc), "adapter_size": len(gate_proj)}
        config = Config.from_json(folder / "config.json", **shape)
        for i in () if layers else config.routing_layers:
            for part, module in (("router", Router(config)), ("router_proj", Adapter(config))):
                state |= {f"model.layers.{i}.{part}.{name}": t.to(device, dtype)
                          for name, t in module.state_dict().items()}
        if config.tie_word_embeddings:
            state.pop("lm_head.weight", None)  # some checkpoints store the embedding twice
        with torch.device("meta"):  # shapes without memory; the weights are assigned to them
            model = cls(config)
        try:
            model.load_state_dict(state, strict=True, assign=True)
        except RuntimeError as error:  # names and shapes, a line each
            raise ValueError(f"{path}: {' '.join(str(error).split())}") from None
        return model

def skip_loss(gates: Tensor, mask: Tensor | None = None) -> Tensor:
    """L_skip: gates (B, T, R), mask (B, T) True at real tokens -> scalar, float32.

    The square charges most to the tokens that use many layers, and keeps the gates from closing all.
    """
    per_token = gates.float().sum(-1).square()                                     # L_skip
    return per_token.mean() if mask is None else per_token[mask].mean()

def layers_used(kept: Tensor, config: Config) -> Tensor:
    """The depth of every token, plain layers + open gates: kept (B, T, R) -> (B, T), int64."""
    return config.num_hidden_layers - len(config.routing_layers) + kept.sum(-1)

# -------------------------------------------------------------------------------------------------
# Files

def read_json(path: Path) -> dict:
    """A JSON object. Raises FileNotFoundError, or ValueError where it is none."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: not JSON ({error})") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path}: expected a JSON object, found {type(value).__name__}")
    return value

def find_folder(path: str | Path) -> Path:
    """The folder `path`, or that of a hub name ("meta-llama/Llama-3.2-1B") in the local cache."""
    if Path(path).is_dir():
        return Path(path)
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", str(path)):
        raise FileNotFoundError(f"{path}: no such folder")
    home = Path(os.environ.get("HF_HOME", "~/.cache/huggingface"))
    hub = Path(os.environ.get("HF_HUB_CACHE", home / "hub")).expanduser()
    repository = hub / f"models--{str(path).replace('/', '--')}"
    main = repository / "refs" / "main"  # names the snapshot
    if main.is_file() and (folder := repository / "snapshots" / main.read_text().strip()).is_dir():
        return folder
    raise FileNotFoundError(f"{path}: no such folder, nor is it in {hub}; get it: hf download {path}")

def read_tensors(path: Path, file_name: str, device: str, dtype: torch.dtype | None) -> dict[str, Tensor]:
    """The tensors of a file, or of `file_name` or an index of shards in a folder, put on `device`."""
    index = path / "model.safetensors.index.json"
    if path.is_file() or (path / file_name).is_file():
        files = [path if path.is_file() else path / file_name]
    elif index.is_file():
        files = [path / name for name in sorted(set(read_json(index).get("weight_map", {}).values()))]
    else:
        raise FileNotFoundError(f"{path}: holds neither {file_name} nor {index.name}")
    tensors = {}
    for file in files:
        try:
            with safe_open(file, framework="pt", device=str(device)) as shard:
                tensors |= {name: shard.get_tensor(name).to(dtype=dtype) for name in shard.keys()
                            if not name.endswith("rotary_emb.inv_freq")}  # old Llama 2 files have it
        except SafetensorError as error:
            raise ValueError(f"{file}: not a whole safetensors file ({error})") from None
    if not tensors:
        raise ValueError(f"{path}: no tensors found")
    return tensors

# -------------------------------------------------------------------------------------------------
# Text

# Llama 3's special tokens, in the order in which they follow the ranks of tokenizer.model.
RESERVED = [f"<|reserved_special_token_{i}|>" for i in range(251)]
SPECIAL = ["<|begin_of_text|>", "<|end_of_text|>", *RESERVED[:4], "<|start_header_id|>",
           "<|end_header_id|>", RESERVED[4], "<|eot_id|>", *RESERVED[5:]]
SPLIT = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
         r"|\s*[\r\n]+|\s+(?!\S)|\s+")
GPT2_SPLIT = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"

Vocabulary = tuple[dict[bytes, int], str, dict[str, int]]  # ranks, split pattern, special tokens

def read_tokenizer_model(file: Path) -> Vocabulary:
    """Meta's tokenizer.model: a line is a token in base64, a blank and its rank."""
    ranks = {}
    for number, line in enumerate(file.read_bytes().splitlines(), 1):
        try:
            token, rank = line.split()
            ranks[base64.b64decode(token, validate=True)] = int(rank)
        except ValueError:
            raise ValueError(f"{file}: line {number} is not 'base64 rank', as in Llama 3's") from None
    return ranks, SPLIT, {name: len(ranks) + i for i, name in enumerate(SPECIAL)}

def read_tokenizer_json(file: Path) -> Vocabulary:
    """A byte-level BPE tokenizer.json. ValueError where it is of another kind."""
    raw = read_json(file)
    try:
        steps = raw["pre_tokenizer"].get("pretokenizers", [raw["pre_tokenizer"]])
        kinds = [(step["type"], step.get("behavior"), step.get("use_regex", True)) for step in steps]
        if kinds == [("Split", "Isolated", True), ("ByteLevel", None, False)]:
            split = steps[0]["pattern"]["Regex"]
        elif kinds == [("ByteLevel", None, True)] and not steps[0]["add_prefix_space"]:
            split = GPT2_SPLIT
        else:
            raise ValueError(f"pre_tokenizer {kinds} is not supported")
        if raw["model"]["type"] != "BPE" or raw.get("normalizer"):
            raise ValueError("only BPE without a normalizer is supported")
        # Bytes are written as printable characters; those that are none are numbered from 256 on.
        plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
        rest = (b for b in range(256) if b not in plain)
        byte = {chr(b): b for b in plain} | {chr(256 + i): b for i, b in enumerate(rest)}
        special = {token["content"]: token["id"] for token in raw["added_tokens"]}
        ranks = {bytes(byte[c] for c in token): rank
                 for token, rank in raw["model"]["vocab"].items() if token not in special}
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise ValueError(f"{file}: not a byte-level BPE tokenizer as known here ({error!r})") from None
    return ranks, split, special

class Tokenizer:
    """Llama 3's text and chat format, on tiktoken. `stop_ids`: the tokens that end an answer."""

    def __init__(self, vocabulary: Vocabulary, stop_ids: Iterable[int] = ()):
        ranks, split, self.special = vocabulary
        self.encoding = tiktoken.Encoding(
            "llama3", pat_str=split, mergeable_ranks=ranks, special_tokens=self.special)
        ends = {self.special.get("<|end_of_text|>"), self.special.get("<|eot_id|>")}
        self.stop_ids = frozenset({*stop_ids, *ends} - {None})

    @classmethod
    def from_pretrained(cls, path: str | Path) -> "Tokenizer":
        """From tokenizer.model (here or in original/) or tokenizer.json, in a folder or hub name."""
        folder = find_folder(path)
        stop_ids = []
        for file in (folder / "config.json", folder / "generation_config.json"):
            ids = read_json(file).get("eos_token_id") if file.is_file() else None
            stop_ids += ids if isinstance(ids, list) else [ids]
        for name in ("tokenizer.model", "original/tokenizer.model"):
            if (folder / name).is_file():
                return cls(read_tokenizer_model(folder / name), stop_ids)
        if (folder / "tokenizer.json").is_file():
            return cls(read_tokenizer_json(folder / "tokenizer.json"), stop_ids)
        raise FileNotFoundError(f"{path}: holds neither tokenizer.model nor tokenizer.json")

    def token(self, name: str) -> int:
        """The id of a special token. ValueError if this vocabulary has none of that name."""
        if name not in self.special:
            raise ValueError(f"the tokenizer has no {name}; expected a Llama 3 vocabulary")
        return self.special[name]

    def encode(self, text: str, *, bos: bool = False, eos: bool = False) -> list[int]:
        """Token ids. A special token's name inside the text is text."""
        start = [self.token("<|begin_of_text|>")] if bos else []
        return start + self.encoding.encode_ordinary(text) + ([self.token("<|end_of_text|>")] if eos else [])

    def encode_chat(
        self, messages: list[dict[str, str]], add_generation_prompt: bool = False
    ) -> list[int]:
        """Token ids of [{"role": ..., "content": ...}, ...], and of the opening of an answer to them."""
        ids = [self.token("<|begin_of_text|>")]
        opening = [{"role": "assistant", "content": None}] if add_generation_prompt else []
        for message in messages + opening:
            ids += [self.token("<|start_header_id|>"), *self.encode(message["role"]),
                    self.token("<|end_header_id|>"), *self.encode("\n\n")]
            if message["content"] is not None:
                ids += [*self.encode(message["content"].strip()), self.token("<|eot_id|>")]
        return ids

    def decode(self, ids: Iterable[int]) -> str:
        """The text of token ids, special tokens included; bytes that are no UTF-8 become U+FFFD."""
        return self.encoding.decode(list(ids), errors="replace")

# -------------------------------------------------------------------------------------------------
# Generation

def sample(logits: Tensor, temperature: float, top_p: float, generator: torch.Generator | None) -> int:
    """A token of logits (V,): the likeliest at temperature 0, else drawn from the nucleus top_p."""
    if temperature == 0:
        return int(logits.argmax())
    # On the CPU, so that a seed gives the same text from every device.
    probs, ids = (logits.float().cpu() / temperature).softmax(-1).sort(descending=True)
    probs[probs.cumsum(-1) - probs >= top_p] = 0  # the likeliest token always stays
    return int(ids[torch.multinomial(probs, 1, generator=generator)])

@torch.no_grad()
def generate(
    model: FlexiDepth, input_ids: Tensor, max_new_tokens: int, temperature: float = 0.0,
    top_p: float = 1.0, generator: torch.Generator | None = None, stop_ids: Iterable[int] = (),
    route: Route = "learned",
) -> Iterator[tuple[int, int]]:
    """Yield (token id, layers used where it was predicted), of prompt input_ids (1, T) and on.

    Ends after a token of stop_ids, after max_new_tokens, or at the end of the context. Prompt and
    answer are routed alike. The generator is a CPU one. Raises ValueError for an empty or too long
    prompt, a temperature below 0 or a top_p outside (0, 1].
    """
    T, context = input_ids.shape[-1], model.config.max_position_embeddings
    if input_ids.ndim != 2 or input_ids.shape[0] != 1 or not 0 < T <= context:
        raise ValueError(f"input_ids is {list(input_ids.shape)}; expected (1, T), T from 1 to {context}")
    if temperature < 0 or not 0 < top_p <= 1:
        raise ValueError(f"temperature {temperature}, top_p {top_p}; expected >= 0 and in (0, 1]")
    weight = model.model["embed_tokens"].weight
    new_tokens = min(max_new_tokens, context - T + 1)  # the last one is not fed back
    cache = KVCache(model.config, 1, T + new_tokens, weight.device, weight.dtype)
    for _ in range(new_tokens):
        x, _, kept = model.hidden_states(input_ids.to(weight.device), cache, route)
        token = sample(model.head(x[0, -1]), temperature, top_p, generator)
        depth = model.config.num_hidden_layers
        yield token, depth if kept is None else int(layers_used(kept[0, -1], model.config))
        if token in stop_ids:
            return
        input_ids = torch.tensor([[token]])
