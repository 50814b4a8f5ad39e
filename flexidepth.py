"""FlexiDepth in one file: a pre-trained Llama whose tokens choose, layer by layer, how deep to go.

The method of Luo, Wang, Yan: "Adaptive Layer-skipping in Pre-trained LLMs", COLM 2025, arXiv
2503.23798. The pre-trained model is frozen. Each of its later layers gets two small trained parts:
a router, which gives every token a gate score g in (0, 1), and an adapter, a narrow mlp. For a
token x that enters such a layer, with h = input_layernorm(x) and norm the layer's second norm:

    k, v = k_proj(h), v_proj(h)                                 of every token
    g = sigmoid(router(h))
    g > 0.5:  x = x + attention(h)                              the full path
              x = x + g * mlp(norm(x))
    else:     x = x + (1 - g) * adapter(norm(x))                the skipping path

A token with g = 0.4 skips. It still gets its norms, router, key, value and adapter, whose output is
scaled by 0.6 and added. It needs no query, attention, output projection or mlp: that is the saving.
Its key and value are needed: later tokens that run this layer attend to all tokens before them. In
Llama-3-8B a token that skips a layer uses 22 million weights of it, where the pre-trained layer
uses 218 million. (Where some tokens of a prompt or batch run the layer and some skip it, one
attention call computes all places, and what it gives for skipping tokens is never read: that is
faster than leaving them out. q_proj, o_proj and the mlp still run only for those that run the
layer.)

The routers and adapters are trained on L = L_lm + alpha * L_skip. L_lm is the language model's
cross-entropy, and L_skip the mean over tokens of (sum over the layers of the token's gates)². alpha
is the price of depth: the larger it is, the more tokens skip. The paper has 1e-3. The decision
g > 0.5 has no gradient. The router learns through the factor g or (1 - g) on the output of the mlp
or adapter that ran, and through L_skip. The factors stay at inference, so a layer is *not* the
pre-trained one even where all its gates are open. A model called with route="full", in place of the
default "learned", leaves routers and adapters out: it is the pre-trained model.

Another routing rule needs no change here: give the model or `generate` a route that is a function
(layer_index, gate) -> kept, such as lambda layer_index, gate: gate > 0.7. The function gets the
layer's index among all layers, and the gates (B, T) of the new tokens in the base's dtype, but no
positions. It returns a bool tensor on the gates' device that broadcasts to (B, T): True where the
token takes the full path. It replaces the comparison g > threshold and nothing else: the factors g
and 1 - g stay.

In this example one folder holds both a base model and the routers and adapters for it:

    model = FlexiDepth.from_pretrained("tests/tiny-llama", flexidepth="tests/tiny-llama")
    tokenizer = Tokenizer.from_pretrained("tests/tiny-llama")
    chat = [{"role": "user", "content": "38 + 47 ="}]
    ids = torch.tensor([tokenizer.encode_chat(chat, add_generation_prompt=True)])
    for token, depth in generate(model, ids, max_new_tokens=20, stop_ids=tokenizer.stop_ids):
        print(tokenizer.decode(token.tolist()), depth.item())

Where the paper and the released weights differ, this file follows the weights: the router is
tanh(norm(.)) where the paper has norm(tanh(.)). The adapter's official name is `router_proj`. In it
`down_proj` maps D to adapter_size and `up_proj` maps back, the reverse of an mlp.

Dtypes: everything runs in the dtype of the base model. In training the routers and adapters are
float32 under autocast; from_pretrained rounds them to the base's dtype unless it is told not to.
Gates are float32, but they decide and multiply as rounded to the base's dtype, so that training and
use decide alike.

Letters in shapes: B batch, T new tokens, S cached and new tokens, N tokens of the B * T that run a
layer; D hidden_size, H attention heads, K key/value heads, d head_dim, V vocabulary; L layers, R of
them FlexiDepth layers (routing_layers), in layer order. A lone token means B = T = 1.
"""
import base64
import json
import os
import re
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from functools import partial
from itertools import pairwise
from pathlib import Path

import tiktoken
import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

# "learned", "full", or a function (layer_index, gate (B, T)) -> kept (B, T)
Route = str | Callable[[int, Tensor], Tensor]
Rotation = tuple[Tensor, Tensor]  # cat(cos, cos), cat(-sin, sin) of the new positions, each (T, d)

# Settings that would change the result, and the values that this file implements. A setting with no
# value here has to be absent or null. The released checkpoint calls itself "ddllama".
SUPPORTED = {
    "model_type": ("llama", "ddllama"),
    "hidden_act": ("silu",),
    "rope_type": ("default", "llama3"),
    "attention_bias": (False,),
    "mlp_bias": (False,),
    "sliding_window": (),
    "quantization_config": (),
}
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
        L = self.num_hidden_layers
        heads = self.num_attention_heads
        self.num_key_value_heads = self.num_key_value_heads or heads
        self.head_dim = self.head_dim or self.hidden_size // heads
        self.router_size = self.router_size or max(1, self.hidden_size // 16)
        self.adapter_size = self.adapter_size or max(1, self.intermediate_size // 16)
        if self.routing_layers is None:
            self.routing_layers = range(L // 2, L)
        self.routing_layers = sorted(set(self.routing_layers))

        if heads % self.num_key_value_heads:
            raise ValueError(f"num_key_value_heads {self.num_key_value_heads} must divide {heads}")
        if self.head_dim % 2:
            raise ValueError(f"head_dim {self.head_dim} must be even")
        if not self.routing_layers or not set(self.routing_layers) <= set(range(L)):
            raise ValueError(f"routing_layers {self.routing_layers}; expected some of 0..{L - 1}")
        if self.rope_scaling and not set(LLAMA3_ROPE) <= set(self.rope_scaling):
            raise ValueError(f"rope_scaling {self.rope_scaling}; expected {', '.join(LLAMA3_ROPE)}")

    @classmethod
    def from_json(cls, path: Path, **overrides) -> "Config":
        """Read a config.json; overrides win unless None. ValueError if a key is missing, or set to
        what this file does not implement."""
        raw = read_json(path)
        try:
            # Two spellings: rope_parameters (transformers 5); rope_theta and rope_scaling (older).
            rope = raw.get("rope_scaling") or raw.get("rope_parameters") or {}
            raw["rope_type"] = rope.get("rope_type", rope.get("type", "default"))
            for key, known in SUPPORTED.items():
                if raw.get(key) not in (None, *known):
                    raise ValueError(f"{key} {raw[key]!r} is not supported; expected "
                                     f"{known or None}")

            raw["rope_theta"] = rope.get("rope_theta", raw.get("rope_theta"))
            raw["rope_scaling"] = rope if raw["rope_type"] == "llama3" else None
            raw |= {key: value for key, value in overrides.items() if value is not None}
            names = [field.name for field in fields(cls) if raw.get(field.name) is not None]
            return cls(**{name: raw[name] for name in names})
        except (AttributeError, TypeError, ValueError, ZeroDivisionError) as error:
            raise ValueError(f"{path}: {error}") from None


# ---- Llama ---------------------------------------------------------------------------------------
class RMSNorm(nn.Module):
    def __init__(self, size: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        # The same steps and casts as in the released model. F.rms_norm may differ in the last bit,
        # which can flip the decision of a gate that is close to the threshold.
        scale = torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + self.eps)
        # A router's weight is float32 in training. It is rounded here as it will be in use.
        return self.weight.to(x.dtype) * (x.float() * scale).to(x.dtype)


class Linear(nn.Linear):
    def __init__(self, in_features: int, out_features: int):
        super().__init__(in_features, out_features, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight)  # F.linear; in compiled code it may be a sum


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
    cos, signed_sin = rotation
    return x * cos + x.roll(x.shape[-1] // 2, dims=-1) * signed_sin


class KVCache:
    """Keys and values of all layers and tokens, (L, B, K, max_length, d) each, for inference. Its
    device and dtype have to be the model's."""
    def __init__(self, config: Config, batch_size: int, max_length: int, device="cpu", dtype=None):
        shape = (config.num_hidden_layers, batch_size, config.num_key_value_heads, max_length,
                 config.head_dim)
        # Zeros, because compiled decoding reads unused places too. It gives them a weight of 0, but
        # 0 times a NaN would be NaN.
        self.keys = torch.zeros(shape, device=device, dtype=dtype)
        self.values = torch.zeros_like(self.keys)
        self.length = 0  # tokens held; the model adds T when all layers have stored theirs

    def update(self, layer_index: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Store k and v (B, K, T, d) of the new tokens; return all of the layer's, (B, K, S, d).
        ValueError if the batch size differs, or the cache is too short."""
        _, rows, _, room, _ = self.keys.shape
        end = self.length + k.shape[2]
        if k.shape[0] != rows or end > room:
            raise ValueError(f"{k.shape[0]} rows with {end} tokens; the cache has room for {rows} "
                             f"rows with {room}")
        keys = self.keys[layer_index, :, :, :end]
        values = self.values[layer_index, :, :, :end]
        keys[:, :, self.length:] = k
        values[:, :, self.length:] = v
        return keys, values


class Attention(nn.Module):
    """Grouped-query attention in two steps, because skipping tokens take only the first."""
    def __init__(self, config: Config):
        super().__init__()
        self.head_dim = config.head_dim
        q_size = config.num_attention_heads * config.head_dim
        kv_size = config.num_key_value_heads * config.head_dim
        self.q_proj = Linear(config.hidden_size, q_size)
        self.k_proj = Linear(config.hidden_size, kv_size)
        self.v_proj = Linear(config.hidden_size, kv_size)
        self.o_proj = Linear(q_size, config.hidden_size)

    def keys_values(self, h: Tensor, rotation: Rotation) -> tuple[Tensor, Tensor]:
        """First step, for every token: h (B, T, D) -> rotated keys, and values, (B, K, T, d)."""
        k = self.k_proj(h).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)     # (B, K, T, d)
        v = self.v_proj(h).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)     # (B, K, T, d)
        return rotate(k, rotation), v

    def forward(self, h: Tensor, k: Tensor, v: Tensor, rotation: Rotation,
                mask: Tensor | None = None) -> Tensor:
        """Second step: all tokens of h (B, T, D) attend to k and v (B, K, S, d) -> (B, T, D).
        mask (1, S), bool, only with T = 1: the keys that the token sees, where that is not all."""
        attended = self.attend(self.q_proj(h), k, v, rotation, mask)
        return self.o_proj(attended)                                              # (B, T, D)

    def forward_kept(
            self, h: Tensor, k: Tensor, v: Tensor, rotation: Rotation, places: Tensor) -> Tensor:
        """Second step, only for the N tokens at these places (N,) among the B * T -> (N, D)."""
        B, T, _ = h.shape
        queries = self.q_proj(h.flatten(0, 1)[places])                            # (N, H * d)
        # Each query goes back to its own place among the B * T, where `attend` knows what it sees.
        # Attention of the other places is computed in vain and never read. They hold zeros, because
        # the NaN that unused memory may hold would spoil the gradients of keys and values.
        q = queries.new_zeros(B * T, queries.shape[-1]).index_copy(0, places, queries)
        attended = self.attend(q.unflatten(0, (B, T)), k, v, rotation)
        return self.o_proj(attended.flatten(0, 1)[places])                        # (N, D)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, rotation: Rotation,
               mask: Tensor | None = None) -> Tensor:
        """Attention of unrotated queries (B, T, H * d) to (B, K, S, d) -> (B, T, H * d). With T > 1
        tokens attend causally. mask is for T = 1."""
        B, T, _ = q.shape
        K = k.shape[1]
        S = k.shape[2]
        q = rotate(q.unflatten(-1, (-1, self.head_dim)).transpose(1, 2), rotation)    # (B, H, T, d)
        if T == 1:
            # The one token of each row sees all of the row's keys, or those of the mask. Queries
            # that share a key head are rows of one matrix product, which reads the keys once.
            q = q.reshape(B, K, -1, self.head_dim)                                # (B, K, H / K, d)
            return F.scaled_dot_product_attention(q, k, v, mask).reshape(B, 1, -1)

        # Token t of the T sees keys 0..S-T+t. With S = T the kernel's own is_causal says the same.
        causal = None
        if S > T:
            causal = q.new_ones(T, S, dtype=torch.bool).tril(S - T)
        out = F.scaled_dot_product_attention(q, k, v, causal, is_causal=(S == T), enable_gqa=True)
        return out.transpose(1, 2).flatten(2)                                     # (B, T, H * d)


class MLP(nn.Module):
    def __init__(self, config: Config):
        super().__init__()
        self.gate_proj = Linear(config.hidden_size, config.intermediate_size)
        self.up_proj = Linear(config.hidden_size, config.intermediate_size)
        self.down_proj = Linear(config.intermediate_size, config.hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


# ---- FlexiDepth ----------------------------------------------------------------------------------
TRAINED = re.compile(r"model\.layers\.(\d+)\.(?:router|router_proj)\.")  # names of trained tensors


class Router(nn.Module):
    """The logit of a token's gate, through a bottleneck of router_size."""
    def __init__(self, config: Config):
        super().__init__()
        self.router_enc = Linear(config.hidden_size, config.router_size)
        self.router_norm = RMSNorm(config.router_size, config.rms_norm_eps)
        self.router_dec = Linear(config.router_size, config.hidden_size)
        self.router_head = Linear(config.hidden_size, 1)

    def forward(self, h: Tensor) -> Tensor:
        # differs from the paper, which has norm(tanh(.)): the released weights need tanh(norm(.))
        h = torch.tanh(self.router_norm(self.router_enc(h)))
        return self.router_head(self.router_dec(h)).squeeze(-1)                   # (B, T)


class Adapter(nn.Module):
    """Runs in place of the mlp: a SwiGLU, by default a sixteenth as wide. Its names are those of
    the released weights: `gate_proj` and `down_proj` map D to adapter_size, `up_proj` maps back."""
    def __init__(self, config: Config):
        super().__init__()
        self.gate_proj = Linear(config.hidden_size, config.adapter_size)
        self.down_proj = Linear(config.hidden_size, config.adapter_size)
        self.up_proj = Linear(config.adapter_size, config.hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        return self.up_proj(F.silu(self.gate_proj(x)) * self.down_proj(x))


class DecoderLayer(nn.Module):
    """A Llama layer; if in routing_layers, with a router, and an adapter for tokens that skip."""
    def __init__(self, config: Config, index: int):
        super().__init__()
        self.config = config
        self.index = index
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = MLP(config)
        self.router = None
        self.router_proj = None  # the adapter, by its official name
        if index in config.routing_layers:
            self.router = Router(config)
            self.router_proj = Adapter(config)

    def decide(self, h: Tensor, route: Route) -> tuple[Tensor, Tensor, Tensor]:
        """h (B, T, D) -> gate (B, T), float32; g (B, T, 1), the gate rounded to h's dtype; and kept
        (B, T), bool: whether g > threshold, or what the route function returns."""
        # L_skip takes the gate in float32: in bfloat16 it would be 1 from a logit of 6.25 on, and
        # have no gradient. The rounded gate decides and multiplies, as in the released model.
        gate = torch.sigmoid(self.router(h).float())
        rounded = gate.to(h.dtype)
        if route == "learned":
            kept = rounded > self.config.threshold
        else:
            kept = route(self.index, rounded).bool().expand_as(rounded)
        return gate, rounded[..., None], kept

    def full_path(self, x: Tensor, g: Tensor | float, attended: Tensor) -> Tensor:
        """x and attended, attention's output (..., D), and g (..., 1) -> (..., D)."""
        x = x + attended
        return x + g * self.mlp(self.post_attention_layernorm(x))

    def skip_path(self, x: Tensor, g: Tensor) -> Tensor:
        """x (..., D) and g (..., 1) -> (..., D)."""
        return x + (1 - g) * self.router_proj(self.post_attention_layernorm(x))

    def forward(self, x: Tensor, rotation: Rotation, cache: KVCache | None, route: Route
                ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """x (B, T, D) -> x (B, T, D), gate (B, T), float32, and kept (B, T), bool. The last two
        are None where nothing is routed."""
        h = self.input_layernorm(x)
        k, v = self.self_attn.keys_values(h, rotation)  # of every token, kept or not
        if cache is not None:
            k, v = cache.update(self.index, k, v)

        if self.router is None or route == "full":  # the pre-trained layer: as if g were 1
            return self.full_path(x, 1.0, self.self_attn(h, k, v, rotation)), None, None

        gate, g, kept = self.decide(h, route)
        N = int(kept.sum())  # on a GPU, the only place of the layer where the host waits for it
        if not torch.is_grad_enabled():
            # If all tokens go one way, as a lone token always does, nothing is gathered, and the
            # weights of the other path are not read.
            if N == kept.numel():
                return self.full_path(x, g, self.self_attn(h, k, v, rotation)), gate, kept
            if N == 0:
                return self.skip_path(x, g), gate, kept

        # Tokens are gathered by their path, and put back. The places of kept tokens come first, and
        # each group is in order. nonzero() would give the same, but would wait for the device.
        order = kept.flatten().int().argsort(descending=True, stable=True)        # (B * T,)
        full = order[:N]                                                          # (N,)
        skip = order[N:]                                                          # (B * T - N,)
        # With gradients both paths run, even if one of them has no token. Its gradients are then
        # zeros and not None, which DDP needs.
        tokens = x.flatten(0, 1)                                                  # (B * T, D)
        g = g.flatten(0, 1)                                                       # (B * T, 1)
        attended = self.self_attn.forward_kept(h, k, v, rotation, full)           # (N, D)
        out = torch.empty_like(tokens)
        out[full] = self.full_path(tokens[full], g[full], attended)
        out[skip] = self.skip_path(tokens[skip], g[skip])
        return out.view_as(x), gate, kept


@dataclass
class Output:
    logits: Tensor        # (B, T, V), in the model's dtype
    gates: Tensor | None  # (B, T, R), float32, of the FlexiDepth layers; None with route="full"
    kept: Tensor | None   # (B, T, R), bool, True where the full path ran; None with route="full"


class FlexiDepth(nn.Module):
    """A frozen Llama with FlexiDepth layers to train. Parameters have their official names."""
    def __init__(self, config: Config):
        super().__init__()
        self.config = config
        self.folder: Path | None = None  # where it was loaded from
        # nn.Embedding(V, D) would import more of torch on the meta device, which takes a second. So
        # it gets these weights, which FlexiDepth.from_pretrained replaces.
        words = torch.empty(config.vocab_size, config.hidden_size).uniform_(-1, 1)
        self.model = nn.Module()
        self.model.embed_tokens = nn.Embedding.from_pretrained(words)
        self.model.layers = nn.ModuleList(
            DecoderLayer(config, index) for index in range(config.num_hidden_layers))
        self.model.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.lm_head = None
        if not config.tie_word_embeddings:
            self.lm_head = Linear(config.hidden_size, config.vocab_size)
        for name, parameter in self.named_parameters():
            parameter.requires_grad = bool(TRAINED.match(name))
        self.frequencies = rotary_frequencies(config)  # not a buffer, so .to(dtype) leaves it alone

    def forward(self, input_ids: Tensor, cache: KVCache | None = None, route: Route = "learned"
                ) -> Output:
        """Logits, gates and decisions for input_ids (B, T), int64, padded (if at all) at the end.

        cache: holds the rows' earlier tokens (no padding) and takes these. route: "learned"
        compares gates with the threshold; "full" bypasses routers and adapters, which leaves the
        pre-trained model; a function decides. ValueError for another route, or if the cache or
        the context is too short."""
        x, gates, kept = self.hidden_states(input_ids, cache, route)
        return Output(self.head(x), gates, kept)

    def hidden_states(self, input_ids: Tensor, cache: KVCache | None = None,
                      route: Route = "learned") -> tuple[Tensor, Tensor | None, Tensor | None]:
        """As `forward`, but with normed hidden states (B, T, D) in place of logits, so that a
        caller can give `head` the positions that it needs."""
        if not callable(route) and route not in ("learned", "full"):
            raise ValueError(f"route is {route!r}; expected 'learned', 'full' or a function")
        start = cache.length if cache is not None else 0
        end = start + input_ids.shape[1]
        if end > self.config.max_position_embeddings:
            raise ValueError(f"{end} tokens; the context is {self.config.max_position_embeddings}")

        x = self.model.embed_tokens(input_ids)                                    # (B, T, D)
        angle = torch.arange(start, end, device="cpu")[:, None] * self.frequencies    # (T, d/2)
        # The host need not wait for copies to CUDA, which are in order with the work that reads
        # them. Other devices may not promise that.
        cos = angle.cos().to(x, non_blocking=x.is_cuda)
        sin = angle.sin().to(x, non_blocking=x.is_cuda)
        rotation = torch.cat((cos, cos), -1), torch.cat((-sin, sin), -1)          # (T, d) each

        gates = []
        decisions = []
        for layer in self.model.layers:
            x, gate, kept = layer(x, rotation, cache, route)
            if gate is not None:
                gates.append(gate)
                decisions.append(kept)
        if cache is not None:
            cache.length = end
        x = self.model.norm(x)
        if not gates:
            return x, None, None
        return x, torch.stack(gates, -1), torch.stack(decisions, -1)              # (B, T, R)

    def head(self, x: Tensor) -> Tensor:
        """Logits (..., V) of hidden states (..., D)."""
        if self.lm_head is None:
            return linear(x, self.model.embed_tokens.weight)
        return self.lm_head(x)

    @classmethod
    def from_pretrained(cls, path: str | Path, flexidepth: str | Path | None = None,
                        routing_layers: list[int] | None = None, device: str = "cpu",
                        dtype: torch.dtype | None = None,
                        trained_dtype: torch.dtype | None = None) -> "FlexiDepth":
        """Load a Llama or FlexiDepth checkpoint: a folder, or a hub name in the local cache.

        The routers and adapters are
        - those of the folder or file `flexidepth`, if it is given;
        - else those among the model's own weights (a flexidepth.safetensors beside them is read
          only if it is asked for);
        - else new random ones (torch's global generator) in routing_layers, or in those that
          config.json names, or in the latter half.

        The threshold is the one that was saved with them, else that of config.json, else 0.5; it
        may be changed as model.config.threshold. dtype: None is the checkpoint's, or if its tensors
        differ config.json's. trained_dtype, of routers and adapters: None is the base's; with
        another the model has to run under autocast.
        FileNotFoundError or ValueError, with the file, if one is missing, broken or does not fit.
        """
        return load_model(cls, path, flexidepth, routing_layers, device, dtype, trained_dtype)

    def save_flexidepth(self, path: str | Path) -> Path:
        """Write routers, adapters and threshold to a .safetensors file, or into a folder, in their
        dtype. Returns the file. OSError if it can't be written; an older file then stays."""
        file = Path(path).expanduser()
        if file.suffix != ".safetensors":
            file = file / "flexidepth.safetensors"
        trained = {name: p for name, p in self.named_parameters() if TRAINED.match(name)}
        save_trained(file, trained, self.config)
        return file

    def save_pretrained(self, path: str | Path) -> None:
        """Write the whole model, in the base's dtype, as a folder in the released layout, which
        from_pretrained reads: the weights and the threshold in one file, config.json, and the
        tokenizer's files of the folder it came from. ValueError if it is that same folder."""
        save_model(self, Path(path).expanduser())


def skip_loss(gates: Tensor, mask: Tensor | None = None) -> Tensor:
    """L_skip: gates (B, T, R), mask (B, T) True at real tokens -> scalar, float32."""
    per_token = gates.float().sum(-1).square()  # the square falls hardest on tokens that go deep
    if mask is None:
        return per_token.mean()
    return per_token[mask].mean()


def layers_used(kept: Tensor, config: Config) -> Tensor:
    """The depth of every token, the plain layers + the FlexiDepth layers whose full path it took:
    kept (..., R) -> (...)."""
    return config.num_hidden_layers - len(config.routing_layers) + kept.sum(-1)


# ---- Generation ----------------------------------------------------------------------------------
def sample(logits: Tensor, temperature: float, top_p: float,
           generators: Sequence[torch.Generator] | None = None) -> Tensor:
    """Tokens (B,) of logits (B, V): the likeliest ones at temperature 0, else drawn from the
    nucleus top_p, with a CPU generator for each row, or torch's global one."""
    if temperature == 0:
        return logits.argmax(-1)
    if generators is not None and len(generators) != len(logits):
        raise ValueError(f"{len(generators)} generators for {len(logits)} rows")
    # On the CPU, so that a seed gives the same text from every device. In float64 and with their
    # maximum at 0, because a tiny temperature would divide float32 logits to infinity.
    scores = logits.cpu().double()
    scores = (scores - scores.amax(-1, keepdim=True)) / temperature
    probs, ids = scores.softmax(-1).sort(descending=True)
    probs[probs.cumsum(-1) - probs >= top_p] = 0  # the likeliest token always stays
    generators = generators or [None] * len(logits)
    drawn = [torch.multinomial(p, 1, generator=g) for p, g in zip(probs, generators)]
    return ids.gather(-1, torch.stack(drawn))[:, 0].to(logits.device)


@torch.inference_mode()
def generate(model: FlexiDepth, input_ids: Tensor, max_new_tokens: int, temperature: float = 0.0,
             top_p: float = 1.0, generators: Sequence[torch.Generator] | None = None,
             stop_ids: Iterable[int] = (), route: Route = "learned"
             ) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield token and depth, int64 (B,) each, after prompts (B, T) of one length. The depth is that
    of the position that predicted the token. Prompts and answers are both routed. After
    compile_decode(model) a lone token runs compiled code.

    Ends when each row has had a token of stop_ids, after max_new_tokens, or at the end of the
    context. A row that has had one goes on until all have: what it yields then means nothing.
    generators: as for `sample`. ValueError, at the first token, if a setting is wrong, and later
    if the logits are no longer finite."""
    context = model.config.max_position_embeddings
    if input_ids.ndim != 2 or input_ids.numel() == 0 or input_ids.shape[1] > context:
        raise ValueError(f"input_ids {[*input_ids.shape]}; expected (B, T), T from 1 to {context}")
    if not 0 <= temperature < float("inf") or not 0 < top_p <= 1:
        raise ValueError(f"temperature {temperature}, top_p {top_p}; expected >= 0 and in (0, 1]")

    B, T = input_ids.shape
    weight = model.model.embed_tokens.weight
    stops = torch.tensor(sorted(stop_ids), dtype=torch.int64, device=weight.device)
    ended = torch.zeros(B, dtype=torch.bool, device=weight.device)
    new_tokens = max(0, min(max_new_tokens, context - T + 1))  # the last one is not fed back
    cache = KVCache(model.config, B, T + new_tokens - 1, weight.device, weight.dtype)
    input_ids = input_ids.to(weight.device)
    for _ in range(new_tokens):
        # For a lone token oneDNN would repack all weights to use them once, so it is on only for
        # more than one. None leaves the other settings as they are.
        onednn = torch.backends.mkldnn.enabled and input_ids.numel() > 1
        with torch.backends.mkldnn.flags(
                enabled=onednn, deterministic=None, allow_tf32=None, fp32_precision=None):
            x, _, kept = model.hidden_states(input_ids, cache, route)
            logits = model.head(x[:, -1])                                         # (B, V)
        if not logits.isfinite().all():
            raise ValueError(f"the logits after {cache.length} tokens are not finite numbers: "
                             "broken weights, or a dtype that is too narrow (try float32)")
        token = sample(logits, temperature, top_p, generators)
        depth = torch.full_like(token, model.config.num_hidden_layers)
        if kept is not None:
            depth = layers_used(kept[:, -1], model.config)
        yield token, depth
        ended |= torch.isin(token, stops)
        if ended.all():
            return
        input_ids = token[:, None]


# ---- Compiled decoding ---------------------------------------------------------------------------
def linear(x: Tensor, weight: Tensor) -> Tensor:
    """F.linear. For a lone token in compiled code on a CPU it may be a sum instead, which the
    compiler turns into a single pass over the weights."""
    if torch.compiler.is_compiling() and x.numel() == x.shape[-1] and x.device.type == "cpu":
        # As long as x stays in the fastest cache while the weights pass by, the sum read float32
        # weights up to 1.9 times as fast. In bfloat16 it was often slower (tests/bench/README.md).
        if x.dtype == torch.float32 and x.numel() <= 2048:
            return (weight * x.unsqueeze(-2)).sum(-1)
    return F.linear(x, weight)


def compile_decode(model: FlexiDepth) -> None:
    """Let torch.compile make the code that `generate` runs for a lone token: one function that all
    layers share, and one for the head. Compiling takes some seconds, mostly at the first tokens.
    Compiled code adds in another order, so that the last bits of logits and gates change. Longer
    prompts, batches and routes that are functions still run the eager layers. To be called once for
    a model. ValueError if there is no compiler: it takes a C++ compiler, and on a GPU Triton as
    well."""
    try:
        torch.compile(model.model.layers[0].mlp)(model.model.embed_tokens.weight[:1])
    except Exception as error:  # a missing compiler shows in many ways
        raise ValueError(f"torch.compile does not work here ({str(error)[:100]!r}); it needs a C++ "
                         "compiler, and Triton on a GPU") from None

    compiled_layer = torch.compile(decode_layer)
    compiled_head = torch.compile(model.head)
    eager_head = model.head

    def head(x: Tensor) -> Tensor:
        if x.numel() == x.shape[-1]:
            return compiled_head(x)
        return eager_head(x)

    model.head = head
    for layer in model.model.layers:
        layer.forward = partial(decode_or_run, compiled_layer, layer, layer.forward)


def decode_or_run(compiled_layer: Callable, layer: DecoderLayer, eager: Callable, x: Tensor,
                  rotation: Rotation, cache: KVCache | None, route: Route
                  ) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """DecoderLayer.forward of a compiled model: only a lone token takes the compiled code."""
    fits = cache is not None and cache.keys.shape[1] == 1 and cache.length < cache.keys.shape[3]
    if not fits or callable(route) or x.shape[:2] != (1, 1):
        return eager(x, rotation, cache, route)
    place = torch.full((1,), cache.length, device=x.device)
    keys = cache.keys[layer.index]                                       # (1, K, max_length, d)
    values = cache.values[layer.index]
    return compiled_layer(layer, x, rotation, keys, values, place, route)


def decode_layer(layer: DecoderLayer, x: Tensor, rotation: Rotation, keys: Tensor, values: Tensor,
                 place: Tensor, route: str) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """DecoderLayer.forward for a lone token x (1, 1, D), in a form that compiles as a whole. A
    Python `if` on the decision would cut the code in pieces, so it is a torch.cond here, which
    compiles both paths and runs one. A cache that grows would need new code for each length, so
    attention is to the whole cache, keys and values (1, K, max_length, d), under a mask, and the
    token's place (1,) in it is a tensor."""
    h = layer.input_layernorm(x)
    k, v = layer.self_attn.keys_values(h, rotation)
    keys.index_copy_(2, place, k)
    values.index_copy_(2, place, v)
    mask = torch.arange(keys.shape[2], device=x.device)[None] <= place            # (1, max_length)

    def run_full(x: Tensor, h: Tensor, g: Tensor | float) -> Tensor:
        return layer.full_path(x, g, layer.self_attn(h, keys, values, rotation, mask))

    def run_skip(x: Tensor, h: Tensor, g: Tensor) -> Tensor:
        return layer.skip_path(x, g)

    if layer.router is None or route == "full":
        return run_full(x, h, 1.0), None, None
    gate, g, kept = layer.decide(h, route)
    return torch.cond(kept.all(), run_full, run_skip, (x, h, g)), gate, kept


# ---- Loading and saving --------------------------------------------------------------------------
def read_json(path: Path) -> dict:
    """A JSON object. FileNotFoundError, or ValueError if it is not one."""
    try:
        return {**json.loads(path.read_text(encoding="utf-8"))}  # only an object can be unpacked
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path}: not a JSON object ({error})") from None


def find_folder(path: str | Path) -> Path:
    """The folder `path`, or that of a hub name ("meta-llama/Llama-3.2-1B") in the local cache."""
    folder = Path(path).expanduser()
    if folder.is_dir():
        return folder
    cache = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    hub = f"{os.environ.get('HF_HOME') or f'{cache}/huggingface'}/hub"
    hub = os.environ.get("HF_HUB_CACHE") or os.environ.get("HUGGINGFACE_HUB_CACHE") or hub
    hub = Path(os.path.expandvars(hub)).expanduser()
    repository = hub / f"models--{str(path).replace('/', '--')}"
    main = repository / "refs" / "main"
    if main.is_file():  # it holds the name of the newest snapshot
        return repository / "snapshots" / main.read_text().strip()
    snapshots = sorted(repository.glob("snapshots/*"), key=lambda folder: folder.stat().st_mtime)
    if snapshots:
        return snapshots[-1]
    raise FileNotFoundError(f"{path}: no such folder, nor in {hub} (hub names: hf download {path})")


def find_weights(path: Path, name: str) -> dict[Path, set[str] | None]:
    """The files that hold the weights, each with the tensors to take from it, None for all.
    path: a file; or a folder that has `name`, model.safetensors, or shards with an index."""
    for file in (path, path / name, path / "model.safetensors"):
        if file.is_file():
            return {file: None}
    index = path / "model.safetensors.index.json"
    if index.is_file():
        shards = {}
        for key, shard in read_json(index).get("weight_map", {}).items():
            shards.setdefault(path / shard, set()).add(key)
        return shards
    if any(path.glob("model-*.safetensors")):
        raise FileNotFoundError(f"{path}: has shards but no {index.name}; download that file too")
    if any(path.glob("*.bin")) or any(path.glob("*.pth")):
        raise FileNotFoundError(f"{path}: has its weights as .bin or .pth only, which can run code "
                                "when read; download or make model.safetensors")
    raise FileNotFoundError(f"{path}: holds neither {name} nor {index.name}")


def read_tensors(path: Path, name: str, device: str) -> tuple[dict[str, Tensor], dict[str, str]]:
    """All tensors of find_weights, in the dtypes of the files, and the files' metadata."""
    tensors = {}
    metadata = {}
    for file, wanted in find_weights(path, name).items():
        try:
            with safe_open(file, framework="pt", device=str(device)) as opened:
                metadata |= opened.metadata() or {}
                for key in wanted or opened.keys():
                    if not key.endswith("rotary_emb.inv_freq"):  # old files hold what we compute
                        tensors[key] = opened.get_tensor(key)
        except SafetensorError as error:
            with open(file, "rb") as opened:
                if opened.read(30).startswith(b"version https://git-lfs"):
                    raise ValueError(f"{file}: a Git LFS pointer in place of the weights; fetch "
                                     "them with `git lfs pull` or `hf download`") from None
            raise ValueError(f"{file}: not a whole safetensors file ({error})") from None
    return tensors, metadata


def pop_trained(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Take the tensors of routers and adapters out of those of a checkpoint."""
    return {name: tensors.pop(name) for name in list(tensors) if TRAINED.match(name)}


def load_model(cls, path, flexidepth, routing_layers, device, dtype, trained_dtype) -> FlexiDepth:
    """The work of FlexiDepth.from_pretrained."""
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"device {device!r}: {str(error)[:100]}") from None
    folder = find_folder(path)
    base, metadata = read_tensors(folder, "model.safetensors", device)
    trained = pop_trained(base)
    if flexidepth is not None:
        source = Path(flexidepth).expanduser()
        if not source.is_file():
            source = find_folder(flexidepth)
        given, metadata = read_tensors(source, "flexidepth.safetensors", device)
        trained = pop_trained(given)
        del given  # a file that holds a whole model would fill memory
        if not trained:
            raise FileNotFoundError(f"{source}: no flexidepth.safetensors, or no routers in it")

    # Which layers route, and how wide they are, is read from the tensors themselves.
    layers = sorted({int(TRAINED.match(name)[1]) for name in trained})
    if layers and routing_layers is not None and sorted(set(routing_layers)) != layers:
        raise ValueError(f"routing_layers {routing_layers} asked for; trained are {layers}")
    found = {}
    if layers:
        part = f"model.layers.{layers[0]}"
        for key, name in (("router_size", f"{part}.router.router_enc.weight"),
                          ("adapter_size", f"{part}.router_proj.down_proj.weight")):
            if name in trained:
                found[key] = trained[name].shape[0]
    if "threshold" in metadata:
        found["threshold"] = float(metadata["threshold"])
    config = Config.from_json(
        folder / "config.json", routing_layers=layers or routing_layers, **found)
    if config.tie_word_embeddings:  # either name will do; some checkpoints hold both
        head = base.pop("lm_head.weight", None)
        if head is not None:
            base.setdefault("model.embed_tokens.weight", head)

    with torch.device("meta"):  # shapes without memory; the weights are assigned to them
        model = cls(config)
    model.folder = folder
    if not trained:
        for index in config.routing_layers:
            layer = model.model.layers[index]
            layer.router = Router(config).to(device)
            layer.router_proj = Adapter(config).to(device)
        trained = {name: t for name, t in model.state_dict().items() if TRAINED.match(name)}

    if dtype is None:
        dtype = common_dtype(base, read_json(folder / "config.json"))
    for tensors, wanted in ((base, dtype), (trained, trained_dtype or dtype)):
        for name in tensors:
            tensors[name] = tensors[name].to(wanted)
    try:
        model.load_state_dict(base | trained, strict=True, assign=True)
    except RuntimeError as error:  # all names and shapes, which may be hundreds of lines
        files = f"{path} with {flexidepth}" if flexidepth else path
        message = " ".join(str(error).split())
        raise ValueError(f"{files}: {message}"[:300]) from None
    return model


def common_dtype(tensors: dict[str, Tensor], config: dict) -> torch.dtype:
    """The dtype of all tensors; if they differ, that of config.json, or else of the embedding."""
    dtypes = {t.dtype for t in tensors.values()}
    if len(dtypes) == 1:
        return dtypes.pop()
    named = getattr(torch, str(config.get("dtype") or config.get("torch_dtype")), None)
    if isinstance(named, torch.dtype):
        return named
    embedding = tensors.get("model.embed_tokens.weight")
    return torch.float32 if embedding is None else embedding.dtype


@contextmanager
def whole_file(file: Path) -> Iterator[Path]:
    """A temporary name to write to. The file appears under its own name only when it is complete;
    until then, and if anything fails, an older one stays."""
    temporary = file.with_name(f".{file.name}.part")
    try:
        yield temporary
        temporary.replace(file)
    except SafetensorError as error:  # such as a full disk
        raise OSError(f"{file}: not written ({error})") from None
    finally:
        temporary.unlink(missing_ok=True)


def save_trained(file: Path, trained: dict[str, Tensor], config: Config) -> None:
    """The work of FlexiDepth.save_flexidepth, for trained tensors by their official names."""
    file.parent.mkdir(parents=True, exist_ok=True)
    tensors = {name: t.detach() for name, t in trained.items()}
    with whole_file(file) as temporary:
        # Several keys of metadata would stand in a random order. With a single one, equal tensors
        # make equal files.
        save_file(tensors, temporary, {"threshold": str(config.threshold)})


def save_model(model: FlexiDepth, folder: Path) -> None:
    """The work of FlexiDepth.save_pretrained."""
    folder.mkdir(parents=True, exist_ok=True)
    if model.folder is None:
        raw = asdict(model.config)
        if raw["rope_scaling"]:
            raw["rope_scaling"]["rope_type"] = "llama3"
    else:
        if model.folder.samefile(folder):
            raise ValueError(f"{folder}: the base model is in this folder; give another one")
        raw = read_json(model.folder / "config.json")
        for pattern in ("tokenizer*", "original/tokenizer.model", "*chat_template*",
                        "special_tokens_map.json", "generation_config.json"):
            for file in filter(Path.is_file, model.folder.glob(pattern)):
                copy = folder / file.relative_to(model.folder)
                copy.parent.mkdir(exist_ok=True)
                shutil.copyfile(file, copy)
    dtype = model.model.embed_tokens.weight.dtype
    raw.pop("dtype", None)  # transformers 5 writes this for torch_dtype
    raw |= {"model_type": "ddllama", "routing_layers": model.config.routing_layers,
            "torch_dtype": str(dtype).removeprefix("torch.")}
    tensors = {name: t.to(dtype) for name, t in model.state_dict().items()}
    with whole_file(folder / "model.safetensors") as temporary:
        save_file(tensors, temporary,
                  {"format": "pt", "threshold": str(model.config.threshold)})
    with whole_file(folder / "config.json") as temporary:
        temporary.write_text(json.dumps(raw, indent=2) + "\n", encoding="utf-8")


# ---- Text ----------------------------------------------------------------------------------------
# Llama 3's special tokens, in the order in which they follow the ranks of tokenizer.model.
RESERVED = [f"<|reserved_special_token_{i}|>" for i in range(251)]
SPECIAL = ["<|begin_of_text|>", "<|end_of_text|>", *RESERVED[:4], "<|start_header_id|>",
           "<|end_header_id|>", RESERVED[4], "<|eot_id|>", *RESERVED[5:]]
# The patterns that cut text before its bytes are merged to tokens: Llama 3's, GPT-2's, SmolLM2's.
SPLIT = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
         r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")
GPT2_SPLIT = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
DIGIT_SPLIT = (r"\p{N}|'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?[^\s\p{L}\p{N}]+"
               r"|\s+(?=\p{N})|\s+(?!\S)|\s+")
# Runs of blanks, or of anything else, are cut after 25,000 characters, as in Meta's tokenizer:
# tiktoken fails on very long ones.
LONG_RUN = re.compile(r"\s{25000}|\S{25000}")
# The special tokens that frame a message. A format needs all of its own.
CHAT_FORMATS = {"llama3": ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
                "chatml": ("<|im_start|>", "<|im_end|>")}
ENDS = ("<|end_of_text|>", "<|endoftext|>", "<|eot_id|>", "<|im_end|>")  # of a text or an answer


@dataclass
class Vocabulary:
    """What the tokenizer files of a folder say."""
    ranks: dict[bytes, int]   # token -> id; tokens are merged in the order of their ids
    special: dict[str, int]   # by name; never recognised in a text
    added: dict[str, int]     # by name; recognised in a text, before anything else
    pattern: str
    begin: str | None         # the special token that a text begins with

    def size(self) -> int:
        return 1 + max([*self.ranks.values(), *self.special.values(), *self.added.values()])


def read_tokenizer_model(file: Path) -> Vocabulary:
    """Meta's tokenizer.model: lines of a base64 token and its rank."""
    if is_sentencepiece(file):
        raise ValueError(f"{file}: a SentencePiece model, as of Llama 2 and TinyLlama; only "
                         "byte-level BPE, as of Llama 3, is supported")
    ranks = {}
    for number, line in enumerate(file.read_bytes().splitlines(), 1):
        try:
            token, rank = line.split()
            ranks[base64.b64decode(token, validate=True)] = int(rank)
        except ValueError:
            raise ValueError(f"{file}: line {number} is not 'base64 rank', as in Llama 3") from None
    special = {name: rank for rank, name in enumerate(SPECIAL, len(ranks))}
    return Vocabulary(ranks, special, {}, SPLIT, "<|begin_of_text|>")


def is_sentencepiece(file: Path) -> bool:
    """Whether a tokenizer.model is a protocol buffer, and not Meta's lines of text."""
    with open(file, "rb") as opened:
        return opened.read(1) == b"\n"  # the mark of its first field


def byte_characters() -> dict[str, int]:
    """The character that stands for each byte in a tokenizer.json: printable ones for themselves,
    the others numbered from 256 on."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    characters = {chr(byte): byte for byte in printable}
    return characters | {chr(256 + i): byte for i, byte in enumerate(others)}


def read_pattern(pre_tokenizer: dict) -> str:
    """How a tokenizer.json cuts text. ValueError if it is not one of the three known ways."""
    steps = pre_tokenizer.get("pretokenizers", [pre_tokenizer])
    kinds = [step["type"] for step in steps]
    first = steps[0]
    level = steps[-1]
    if level["type"] == "ByteLevel" and not level["add_prefix_space"]:
        own_pattern = level.get("use_regex", True)
        if kinds == ["ByteLevel"] and own_pattern:
            return GPT2_SPLIT
        if kinds == ["Digits", "ByteLevel"] and own_pattern and first["individual_digits"]:
            return DIGIT_SPLIT
        if kinds == ["Split", "ByteLevel"] and not own_pattern and not first.get("invert"):
            if first["behavior"] == "Isolated":
                return first["pattern"]["Regex"]
    raise ValueError(f"pre_tokenizer {kinds} is not supported with these settings")


def read_tokenizer_json(file: Path) -> Vocabulary:
    """A byte-level BPE tokenizer.json. ValueError for another kind."""
    raw = read_json(file)
    byte = byte_characters()
    framing = sum(CHAT_FORMATS.values(), ())
    special = {}
    added = {}
    try:
        model = raw["model"]
        if model["type"] != "BPE" or raw.get("normalizer"):
            raise ValueError(f"model {model['type']}, normalizer {raw.get('normalizer')}")
        pattern = read_pattern(raw["pre_tokenizer"])
        for token in raw["added_tokens"]:
            # A token that frames messages must not be recognised in a text, whatever the file says.
            if token["special"] or token["content"] in framing:
                special[token["content"]] = token["id"]
            elif token.get("lstrip") or token.get("rstrip") or token.get("single_word"):
                raise ValueError(f"added token {token['content']!r} takes blanks or whole words")
            else:
                added[token["content"]] = token["id"]
        named = special | added
        vocab = {token: i for token, i in model["vocab"].items() if token not in named}
        ranks = {bytes(byte[character] for character in token): i for token, i in vocab.items()}

        # tiktoken merges in the order of ranks, and so must the file's own list of merges.
        pairs = [pair.split(" ") if isinstance(pair, str) else pair for pair in model["merges"]]
        merged = [vocab[left + right] for left, right in pairs if left in vocab and right in vocab]
        if len(merged) != len(pairs) or merged != sorted(merged):
            raise ValueError("its merges are not in the order of its ids")
        # tiktoken takes any whole word that is a token, merged or not, as ignore_merges says.
        unmerged = {i for token, i in vocab.items() if len(token) > 1} - set(merged)
        if unmerged and not model.get("ignore_merges"):
            raise ValueError(f"no merge makes {len(unmerged)} of its tokens")
    except (KeyError, TypeError, AttributeError, IndexError, ValueError) as error:
        raise ValueError(f"{file}: not a byte-level BPE that is supported ({error!r})") from None

    begin = read_begin(raw.get("post_processor") or {})
    if begin not in special:  # some files of Llama 3 do not say what their texts begin with
        begin = "<|begin_of_text|>" if "<|begin_of_text|>" in special else None
    return Vocabulary(ranks, special, added, pattern, begin)


def read_begin(post_processor: dict) -> str | None:
    """The token that a tokenizer.json puts before every text, by its name, if it puts one."""
    for step in post_processor.get("processors", [post_processor]):
        template = step.get("single") or [{}]
        if "SpecialToken" in template[0]:
            return template[0]["SpecialToken"]["id"]
    return None


def read_chat_template(folder: Path) -> str:
    """The folder's chat template, "" if it has none."""
    if (folder / "chat_template.jinja").is_file():
        return (folder / "chat_template.jinja").read_text(encoding="utf-8")
    settings = folder / "tokenizer_config.json"
    if not settings.is_file():
        return ""
    return str(read_json(settings).get("chat_template") or "")


class Tokenizer:
    """Text and chats as token ids, on tiktoken.

    vocab_size: one more than the largest id. special: ids of the special tokens by name.
    stop_ids: the tokens that end an answer. chat_format: "llama3", "chatml", or None where the
    folder's chat template is neither."""
    def __init__(self, vocabulary: Vocabulary, chat_template: str = "",
                 stop_ids: Sequence[int] = ()):
        self.vocab_size = vocabulary.size()
        self.special = special = vocabulary.special
        self.added = vocabulary.added
        names = sorted(self.added, key=len, reverse=True)  # the longest one that matches is meant
        self.find_added = re.compile(f"({'|'.join(map(re.escape, names)) or '(?!)'})")
        ends = [special[name] for name in ENDS if name in special]
        self.stop_ids = {*stop_ids, *ends}
        self.begin = [special[vocabulary.begin]] if vocabulary.begin else []
        self.end = [*ends, *stop_ids][:1]
        # SmolLM2 has no tokens for some bytes. They get ids past the last one for tiktoken's sake,
        # and encode drops them, as the tokenizers package does.
        lacking = [bytes([b]) for b in range(256) if bytes([b]) not in vocabulary.ranks]
        ranks = vocabulary.ranks | {b: self.vocab_size + i for i, b in enumerate(lacking)}
        self.encoding = tiktoken.Encoding(
            "flexidepth", pat_str=vocabulary.pattern, mergeable_ranks=ranks,
            special_tokens=special | self.added)

        # A format fits if all of its tokens are special, and the template, if there is one, names
        # the first of them. Two that fit leave open which is meant.
        fitting = [name for name, tokens in CHAT_FORMATS.items()
                   if all(token in special for token in tokens)
                   and tokens[0] in (chat_template or tokens[0])]
        self.chat_format = fitting[0] if len(fitting) == 1 else None
        self.begin_chat = []
        if self.chat_format == "llama3" or "bos_token" in chat_template:
            self.begin_chat = self.begin

    @classmethod
    def from_pretrained(cls, path: str | Path) -> "Tokenizer":
        """From tokenizer.json or tokenizer.model (here or in original/) of a folder or hub name.
        Of several the one with the largest id is read, as an older one may lie beside it.
        FileNotFoundError if there is none, ValueError if one is of a kind that is not supported."""
        folder = find_folder(path)
        vocabularies = []
        if (folder / "tokenizer.json").is_file():
            vocabularies.append(read_tokenizer_json(folder / "tokenizer.json"))
        for file in (folder / "tokenizer.model", folder / "original" / "tokenizer.model"):
            if file.is_file() and not (vocabularies and is_sentencepiece(file)):
                vocabularies.append(read_tokenizer_model(file))
        if not vocabularies:
            raise FileNotFoundError(f"{path}: holds neither tokenizer.model nor tokenizer.json")

        stop_ids = []
        for file in (folder / "config.json", folder / "generation_config.json"):
            ids = read_json(file).get("eos_token_id") if file.is_file() else None
            if ids is not None:
                stop_ids += ids if isinstance(ids, list) else [ids]
        return cls(max(vocabularies, key=Vocabulary.size), read_chat_template(folder), stop_ids)

    def encode(self, text: str, *, bos: bool = False, eos: bool = False) -> list[int]:
        """Token ids. Names of special tokens in the text are plain text. Those of other added
        tokens are recognised. Bytes that the vocabulary lacks are left out. bos and eos add the
        tokens that this tokenizer's texts begin and end with, if it has such tokens."""
        ids = []
        for part in self.find_added.split(text):
            if part in self.added:
                ids.append(self.added[part])
                continue
            cuts = [0, *(run.end() for run in LONG_RUN.finditer(part)), len(part)]
            for start, end in pairwise(cuts):
                ids += self.encoding.encode_ordinary(part[start:end])
        ids = [i for i in ids if i < self.vocab_size]
        return self.begin * bos + ids + self.end * eos

    def encode_message(self, message: dict) -> tuple[list[int], list[bool]]:
        """Token ids of one message of a chat, {"role": ..., "content": ...}, and a list of bools,
        True at the tokens that begin in the content, and at the one that ends the turn: what the
        author says."""
        content = message["content"]
        opening, prefix = self.open_message(message["role"])
        if self.chat_format == "llama3":
            content = content.strip()
            closing = [self.special["<|eot_id|>"]]
        else:
            closing = [self.special["<|im_end|>"], *self.encode("\n")]

        # To the template, prefix and content are one text. A token that holds the end of the prefix
        # and the beginning of the content counts as prefix.
        text = self.encode(prefix + content)
        said = [False] * len(opening)
        place = 0
        for token in text:
            said.append(place >= len(prefix.encode()))
            place += len(self.token_bytes(token))
        said += [True] + [False] * (len(closing) - 1)
        return [*opening, *text, *closing], said

    def open_message(self, role: str) -> tuple[list[int], str]:
        """Token ids that open a message, and the text between them and its content. ValueError if
        the chat format is not known."""
        if self.chat_format == "llama3":
            return [self.special["<|start_header_id|>"], *self.encode(role),
                    self.special["<|end_header_id|>"]], "\n\n"
        if self.chat_format == "chatml":
            return [self.special["<|im_start|>"]], f"{role}\n"
        raise ValueError("this model's chat format is neither Llama 3's nor ChatML: it can only "
                         "continue plain text (sample.py --raw, rows of text for train.py)")

    def encode_chat(self, messages: list[dict], add_generation_prompt: bool = False) -> list[int]:
        """Token ids of [{"role": ..., "content": ...}, ...], and of the header of an answer. They
        are those of the folder's own template, but for system messages and dates that some
        templates make up where none is given."""
        ids = list(self.begin_chat)
        for message in messages:
            ids += self.encode_message(message)[0]
        if add_generation_prompt:
            opening, prefix = self.open_message("assistant")
            ids += [*opening, *self.encode(prefix)]
        return ids

    def token_bytes(self, token: int) -> bytes:
        """The bytes of one token, or a placeholder for an id that this tokenizer does not have."""
        try:
            if token < self.vocab_size:
                return self.encoding.decode_single_token_bytes(token)
        except (KeyError, OverflowError):
            pass
        return f"<|unknown_{token}|>".encode()

    def decode(self, ids: Iterable[int]) -> str:
        """The text of token ids, special tokens included; bytes not in UTF-8 become U+FFFD."""
        return b"".join(map(self.token_bytes, ids)).decode("utf-8", errors="replace")
