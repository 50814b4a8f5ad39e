"""FlexiDepth in one file: a pre-trained Llama in which each token chooses how many layers it runs.

The method is that of Luo, Wang and Yan, "Adaptive Layer-skipping in Pre-trained LLMs" (COLM 2025,
arXiv 2503.23798). The pre-trained model is frozen. Each of its later layers gets two small parts to
train: a router, which gives every token a gate g between 0 and 1, and an adapter, a narrow mlp. Let
x be the hidden state of a token that enters such a layer, h = input_layernorm(x), and norm the
layer's post_attention_layernorm. Then:

    k, v = k_proj(h), v_proj(h)                                 for every token
    g = sigmoid(router(h))
    g > 0.5:  x = x + attention(h)                              the full path
              x = x + g * mlp(norm(x))
    else:     x = x + (1 - g) * adapter(norm(x))                the skipping path

A token with g = 0.4 takes the skipping path: the adapter's output is multiplied by 0.6 and added to
x. Its query, output projection and mlp are not computed. If no token takes the full path, attention
is not computed either. That is the saving. Its key and value are computed all the same, because
later tokens on the full path attend to all tokens before them. In Llama-3-8B the skipping path of a
layer reads 22 million weights, where the pre-trained layer reads 218 million.

Routers and adapters are trained on

    L = L_lm + alpha * L_skip
    L_lm = the cross-entropy of the next tokens
    L_skip = the mean over tokens of (the sum over layers of the token's gates)²

alpha is the price of depth: the larger it is, the more tokens skip. The paper uses alpha = 1e-3.
The comparison g > 0.5 has no gradient. A router learns from L_lm through the factor g or 1 - g, and
from L_skip directly. The factors stay when the model is used, so a layer is not the pre-trained one
even if all its gates are above 0.5. With route="full" (the default is "learned") routers and
adapters are bypassed, which gives exactly the pre-trained model.

The factor does not tell a router whether the other path would have been better. After model.train()
both paths are computed for every token. Values stay the same, but g also gets the gradient that it
would have in g * full + (1 - g) * skip, where full and skip, the outputs of the paths, are held
constant. This is ours. In evaluation mode, a new model's mode, gates learn as in the paper.

Letters in shapes: B batch, T new tokens of a row, S cached and new tokens, N full-path tokens; D
hidden_size, H attention heads, K key/value heads, d head_dim, V vocabulary; R layers with a router.
"""
import base64
import json
import os
import re
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from functools import partial
from pathlib import Path
from typing import NamedTuple

import tiktoken
import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

LLAMA3_ROPE = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")


@dataclass
class Config:
    """The shape of a model, by the names of config.json. Raises ValueError for a wrong type."""
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int | None = None   # None: as many as attention heads
    head_dim: int | None = None              # None: hidden_size / num_attention_heads
    max_position_embeddings: int = 2048
    rms_norm_eps: float = 1e-6
    rope_theta: float | int = 10000.0
    rope_scaling: dict | None = None         # None, or the numbers of rope_type "llama3"
    tie_word_embeddings: bool = False
    routing_layers: list | None = None       # layer indices; None: the latter half
    router_size: int | None = None           # None: hidden_size / 16
    adapter_size: int | None = None          # None: intermediate_size / 16
    threshold: float = 0.5                   # a token whose gate is greater takes the full path

    def __post_init__(self):
        for field in fields(self):
            value = getattr(self, field.name)
            if not isinstance(value, field.type):
                raise ValueError(f"{field.name} is {value!r}; expected {field.type}")

        layers = list(range(self.num_hidden_layers))
        if self.routing_layers is None:
            self.routing_layers = layers[len(layers) // 2:]
        self.routing_layers = sorted(set(self.routing_layers))
        self.num_key_value_heads = self.num_key_value_heads or self.num_attention_heads
        self.head_dim = self.head_dim or self.hidden_size // self.num_attention_heads
        self.router_size = self.router_size or self.hidden_size // 16
        self.adapter_size = self.adapter_size or self.intermediate_size // 16

        if not self.routing_layers or not set(self.routing_layers) <= set(layers):
            raise ValueError(f"routing_layers {self.routing_layers}; expected some of {layers}")


# ---- Llama ---------------------------------------------------------------------------------------
class RMSNorm(nn.Module):
    def __init__(self, size: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        # As released. F.rms_norm may round otherwise, and flip a decision close to the threshold.
        mean_square = x.float().pow(2).mean(-1, keepdim=True)
        normed = x.float() * torch.rsqrt(mean_square + self.eps)
        # train.py keeps a router's weight in float32. It is rounded here as it will be in use.
        return self.weight.to(x.dtype) * normed.to(x.dtype)


def rotary_frequencies(config: Config) -> Tensor:
    """Radians per position for each of the d/2 rotating pairs, float32 (d/2,) on the CPU."""
    exponent = torch.arange(0, config.head_dim, 2, device="cpu").float() / config.head_dim
    freq = 1.0 / config.rope_theta ** exponent
    if config.rope_scaling is None:
        return freq
    # Llama 3.1: fast rotations stay, slow ones go `factor` times slower, those between are blended.
    factor, low, high, context = (config.rope_scaling[name] for name in LLAMA3_ROPE)
    turns = context / (2 * torch.pi / freq)
    fast = ((turns - low) / (high - low)).clamp(0, 1)
    return (1 - fast) * freq / factor + fast * freq


Rotation = tuple[Tensor, Tensor]  # cosines and sines for the new positions, (T, d) each


def rotate(x: Tensor, rotation: Rotation) -> Tensor:
    """Rotary embedding of x (..., T, d): its halves become a * cos - b * sin, b * cos + a * sin."""
    # Dimensions i and i + d/2 turn together: the published weights are permuted for that.
    cos, sin = rotation  # the sines of the first half are negative
    a, b = x.chunk(2, dim=-1)                                                     # (..., T, d/2)
    return x * cos + torch.cat((b, a), dim=-1) * sin


class KVCache:
    """Keys and values of all layers and tokens, (layers, B, K, max_length, d) each."""
    def __init__(self, config: Config, batch_size: int, max_length: int,
                 device="cpu", dtype: torch.dtype | None = None):
        shape = (config.num_hidden_layers, batch_size, config.num_key_value_heads, max_length,
                 config.head_dim)
        # Zeros: decode_layer, at the end, gives unused places a weight of 0, and 0 * NaN is NaN.
        self.keys = torch.zeros(shape, device=device, dtype=dtype)
        self.values = torch.zeros_like(self.keys)
        self.length = 0  # tokens held; the model adds T when all layers have stored theirs

    def update(self, layer_index: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Store k and v (B, K, T, d) of the new tokens; return all of the layer's, (B, K, S, d)."""
        end = self.length + k.shape[2]
        keys = self.keys[layer_index, :, :, :end]
        values = self.values[layer_index, :, :, :end]
        keys[:, :, self.length:] = k
        values[:, :, self.length:] = v
        return keys, values


class Attention(nn.Module):
    """Grouped-query attention in two steps, because skipping tokens take only the first."""
    def __init__(self, config: Config):
        super().__init__()
        D = config.hidden_size
        self.head_dim = config.head_dim
        q_size = config.num_attention_heads * config.head_dim
        kv_size = config.num_key_value_heads * config.head_dim
        self.q_proj = nn.Linear(D, q_size, bias=False)
        self.k_proj = nn.Linear(D, kv_size, bias=False)
        self.v_proj = nn.Linear(D, kv_size, bias=False)
        self.o_proj = nn.Linear(q_size, D, bias=False)

    def split_heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)               # (B, heads, T, d)

    def keys_values(self, h: Tensor, rotation: Rotation) -> tuple[Tensor, Tensor]:
        """First step, for every token: h (B, T, D) -> rotated keys, and values, (B, K, T, d)."""
        k = self.split_heads(self.k_proj(h))
        v = self.split_heads(self.v_proj(h))
        return rotate(k, rotation), v

    def forward(self, h: Tensor, k: Tensor, v: Tensor, rotation: Rotation,
                places: Tensor | None = None) -> Tensor:
        """Second step: tokens h (B, T, D) attend causally to k and v (B, K, S, d) -> (B, T, D).
        With places (N,), only the tokens at these of the B * T places do -> (N, D)."""
        B, T, _ = h.shape
        _, K, S, d = k.shape
        if places is None:
            q = self.q_proj(h)
        else:
            # Attention is computed at every place: N queries alone would need a mask, which is
            # slower. The other places hold zeros: NaNs would spoil the gradients of k and v.
            queries = self.q_proj(h.flatten(0, 1)[places])                        # (N, H * d)
            q = queries.new_zeros(B * T, queries.shape[-1])
            q = q.index_copy(0, places, queries).unflatten(0, (B, T))
        q = rotate(self.split_heads(q), rotation)                                 # (B, H, T, d)

        mask = None
        if T == 1:
            # A token sees all keys. Query heads that share a key head become rows of one product.
            q = q.reshape(B, K, -1, d)                                            # (B, K, H / K, d)
        elif T < S:  # token t of the T sees keys 0..S-T+t
            mask = q.new_ones(T, S, dtype=torch.bool).tril(S - T)
        causal = T == S > 1
        out = F.scaled_dot_product_attention(q, k, v, mask, is_causal=causal, enable_gqa=True)
        out = out.reshape(B, -1, T, d).transpose(1, 2).flatten(2)                 # (B, T, H * d)
        if places is not None:
            out = out.flatten(0, 1)[places]                                       # (N, H * d)
        return self.o_proj(out)


class MLP(nn.Module):
    def __init__(self, config: Config):
        super().__init__()
        D = config.hidden_size
        self.gate_proj = nn.Linear(D, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(D, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, D, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


# ---- FlexiDepth ----------------------------------------------------------------------------------
class Router(nn.Module):
    """The logit of a token's gate, through a bottleneck of router_size."""
    def __init__(self, config: Config):
        super().__init__()
        D = config.hidden_size
        self.router_enc = nn.Linear(D, config.router_size, bias=False)
        self.router_norm = RMSNorm(config.router_size, config.rms_norm_eps)
        self.router_dec = nn.Linear(config.router_size, D, bias=False)
        self.router_head = nn.Linear(D, 1, bias=False)

    def forward(self, h: Tensor) -> Tensor:
        # differs from the paper, which has norm(tanh(.)): the released weights need tanh(norm(.))
        h = torch.tanh(self.router_norm(self.router_enc(h)))
        return self.router_head(self.router_dec(h)).squeeze(-1)                   # (B, T)


class Adapter(nn.Module):
    """As in the released weights, down_proj maps D to adapter_size, and up_proj maps back."""
    def __init__(self, config: Config):
        super().__init__()
        D = config.hidden_size
        self.gate_proj = nn.Linear(D, config.adapter_size, bias=False)
        self.down_proj = nn.Linear(D, config.adapter_size, bias=False)
        self.up_proj = nn.Linear(config.adapter_size, D, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.up_proj(F.silu(self.gate_proj(x)) * self.down_proj(x))


# "learned": a token takes the full path if its gate is above the threshold. "full": all tokens run
# the pre-trained layer. To use another rule, pass as route a function (layer_index, gate) -> kept,
# such as lambda layer_index, gate: gate > 0.7, which replaces the comparison. layer_index counts
# all layers, and gate (B, T) has the dtype of x. kept, a tensor, broadcasts to (B, T).
Route = str | Callable[[int, Tensor], Tensor]
# Hidden states (B, T, D), gates (B, T), float32, and kept (B, T), bool, or None without a decision.
Routed = tuple[Tensor, Tensor | None, Tensor | None]


class DecoderLayer(nn.Module):
    """A Llama layer. Layers in routing_layers also have a router and an adapter."""
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

    def decide(self, h: Tensor, route: Route) -> tuple[Tensor, Tensor]:
        """h (B, T, D) -> gate (B, T), float32, and kept (B, T), bool, True for the full path."""
        # A bfloat16 sigmoid is 1 from a logit of 6.25 on, without a gradient. So L_skip takes the
        # float32 gate. The rounded one decides and multiplies, as in the released model.
        gate = torch.sigmoid(self.router(h).float())
        rounded = gate.to(h.dtype)
        if route == "learned":
            kept = rounded > self.config.threshold
        else:
            kept = route(self.index, rounded).bool().expand_as(rounded)
        return gate, kept

    def full_path(self, x: Tensor, g: Tensor | float, attended: Tensor) -> Tensor:
        """x and attended, attention's output, (..., D), and g (..., 1) -> (..., D)."""
        x = x + attended
        return x + g * self.mlp(self.post_attention_layernorm(x))

    def skip_path(self, x: Tensor, g: Tensor) -> Tensor:
        """x (..., D) and g (..., 1) -> (..., D)."""
        return x + (1 - g) * self.router_proj(self.post_attention_layernorm(x))

    def forward(self, x: Tensor, rotation: Rotation, cache: KVCache | None, route: Route) -> Routed:
        h = self.input_layernorm(x)
        k, v = self.self_attn.keys_values(h, rotation)  # of every token, whatever its path
        if cache:
            k, v = cache.update(self.index, k, v)

        if self.router is None or route == "full":  # the pre-trained layer: as if g were 1
            attended = self.self_attn(h, k, v, rotation)
            return self.full_path(x, 1.0, attended), None, None

        gate, kept = self.decide(h, route)
        g = gate.to(x.dtype)[..., None]                                           # (B, T, 1)
        if self.training:
            attended = self.self_attn(h, k, v, rotation)
            full = self.full_path(x, g, attended)
            skip = self.skip_path(x, g)
            out = torch.where(kept[..., None], full, skip)
            # The added term is 0. Its gradient tells the gate how the two paths differ.
            return out + (g - g.detach()) * (full - skip).detach(), gate, kept

        N = int(kept.sum())  # tokens on the full path; here the CPU waits for the GPU
        # If all tokens take one path, as a lone token does, the weights of the other are not read.
        if N == 0:
            return self.skip_path(x, g), gate, kept
        if N == kept.numel():
            attended = self.self_attn(h, k, v, rotation)
            return self.full_path(x, g, attended), gate, kept

        # Else all run the small adapter, and full-path tokens then get their own results instead.
        places = kept.flatten().nonzero_static(size=N)[:, 0]                      # (N,)
        attended = self.self_attn(h, k, v, rotation, places)                      # (N, D)
        tokens = x.flatten(0, 1)[places]                                          # (N, D)
        out = self.skip_path(x, g).flatten(0, 1)                                  # (B * T, D)
        out[places] = self.full_path(tokens, g.flatten(0, 1)[places], attended)
        return out.view_as(x), gate, kept


def skip_loss(gates: Tensor, real: Tensor) -> Tensor:
    """L_skip of gates (B, T, R) -> scalar, float32. real (B, T), bool, is False at padding."""
    per_token = gates.float().sum(-1).square()  # the square falls hardest on tokens that go deep
    return per_token[real].mean()


def layers_used(kept: Tensor, config: Config) -> Tensor:
    """The depth of each token: layers without a router, and those whose full path it took.
    kept (..., R) -> (...)."""
    return config.num_hidden_layers - len(config.routing_layers) + kept.sum(-1)


class Output(NamedTuple):
    logits: Tensor        # (B, T, V), in the model's dtype
    gates: Tensor | None  # (B, T, R), float32, of the layers with a router; None with route="full"
    kept: Tensor | None   # (B, T, R), bool, True where the full path ran; None with route="full"


class FlexiDepth(nn.Module):
    """A frozen Llama with routers and adapters to train. Parameters have their official names."""
    def __init__(self, config: Config):
        super().__init__()
        D = config.hidden_size
        V = config.vocab_size
        self.config = config
        self.folder = None  # the path that it was loaded from
        self.model = nn.Module()
        # nn.Embedding(V, D) would take seconds on the meta device, which from_pretrained uses.
        words = torch.empty(V, D).uniform_(-1, 1)
        self.model.embed_tokens = nn.Embedding.from_pretrained(words)
        layers = [DecoderLayer(config, index) for index in range(config.num_hidden_layers)]
        self.model.layers = nn.ModuleList(layers)
        self.model.norm = RMSNorm(D, config.rms_norm_eps)
        self.lm_head = nn.Linear(D, V, bias=False)
        if config.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight
        for name, parameter in self.named_parameters():
            parameter.requires_grad = ".router" in name
        self.frequencies = rotary_frequencies(config)  # not a buffer, so .to(dtype) leaves it alone
        self.eval()

    def forward(self, input_ids: Tensor, cache: KVCache | None = None, route: Route = "learned",
                last_only: bool = False) -> Output:
        """Logits, gates and decisions for input_ids (B, T), int64, padded (if at all) at the end.
        cache: holds the rows' earlier tokens, and takes these. last_only: logits of the last
        position alone, (B, 1, V). Raises ValueError if there is no room for the tokens."""
        start = cache.length if cache else 0
        end = start + input_ids.shape[1]
        room = cache.keys.shape[3] if cache else self.config.max_position_embeddings
        if end > room:
            raise ValueError(f"{end} tokens; there is room for {room}")

        x = self.model.embed_tokens(input_ids)                                    # (B, T, D)
        positions = torch.arange(start, end, device="cpu")
        angles = positions[:, None] * self.frequencies                            # (T, d/2)
        angles = torch.cat((-angles, angles), dim=-1)                             # (T, d)
        rotation = angles.cos().to(x), angles.sin().to(x)
        gates = []
        decisions = []
        for layer in self.model.layers:
            x, gate, kept = layer(x, rotation, cache, route)
            if gate is not None:
                gates.append(gate)
                decisions.append(kept)
        if cache:
            cache.length = end
        if last_only:
            x = x[:, -1:]
        logits = self.lm_head(self.model.norm(x))
        if not gates:
            return Output(logits, None, None)
        gates = torch.stack(gates, -1)                                            # (B, T, R)
        return Output(logits, gates, torch.stack(decisions, -1))

    @classmethod
    def from_pretrained(cls, path: str | Path, flexidepth: str | Path | None = None,
                        routing_layers: Iterable[int] | None = None, device: str = "cpu",
                        dtype: torch.dtype | None = None) -> "FlexiDepth":
        """Load a Llama or FlexiDepth checkpoint: a folder, or a hub name in the local cache.
        Routers and adapters are those of the folder or file `flexidepth`, if it is given. Otherwise
        they are those among the model's own weights. If there are none, new ones are made in
        routing_layers, which default to those of config.json or to the latter half. dtype: defaults
        to that of the checkpoint's largest tensor. Raises FileNotFoundError or ValueError if a file
        is missing, broken or does not fit."""
        trained = {}
        if flexidepth is not None:
            source = find_path(flexidepth)
            if (source / "flexidepth.safetensors").is_file():
                source = source / "flexidepth.safetensors"
            trained = trained_part(read_tensors(source))
            if not trained:
                raise ValueError(f"{source}: no routers and adapters; train.py makes them")
        folder = find_path(path)
        tensors = read_tensors(folder)
        own = trained_part(tensors)
        for name in own:
            del tensors[name]
        trained = trained or own

        # The tensors themselves say which layers have a router, and how wide its parts are.
        layers = {int(name.split(".")[2]) for name in trained}  # model.layers.N. ...
        sizes = {name.split(".")[-2]: len(tensor) for name, tensor in trained.items()}
        config = read_config(
            folder / "config.json",
            routing_layers=list(routing_layers or layers) or None,
            router_size=sizes.get("router_norm"),
            adapter_size=sizes.get("down_proj"),
            # If the checkpoint holds a head, it is used, even if config.json says that it is tied.
            tie_word_embeddings=False if "lm_head.weight" in tensors else None)
        with torch.device("meta"):  # shapes without memory; the weights are assigned to them
            model = cls(config)
        model.folder = folder
        if not trained:  # new parts need values
            for index in config.routing_layers:
                layer = model.model.layers[index]
                layer.router = Router(config)
                layer.router_proj = Adapter(config)
            trained = trained_part(model.state_dict())

        tensors |= trained
        dtype = dtype or max(tensors.values(), key=torch.numel).dtype
        for name in tensors:
            tensors[name] = tensors[name].to(device, dtype)
        if config.tie_word_embeddings:
            tensors["lm_head.weight"] = tensors.get("model.embed_tokens.weight")
        try:
            model.load_state_dict(tensors, strict=True, assign=True)
        except RuntimeError as error:  # it names all tensors, which may be hundreds of lines
            raise ValueError(f"{path}: {error}"[:300]) from None
        if config.tie_word_embeddings:
            model.lm_head.weight = model.model.embed_tokens.weight
        return model

    def save_flexidepth(self, folder: str | Path) -> Path:
        """Write routers and adapters to flexidepth.safetensors in a folder. Returns the file."""
        file = Path(folder).expanduser() / "flexidepth.safetensors"
        with whole_file(file) as temporary:
            save_file(trained_part(self.state_dict()), temporary)
        return file

    def save_pretrained(self, folder: str | Path) -> None:
        """Write the whole model, in the base's dtype, as a folder in the released layout, with the
        tokenizer's files of the folder it came from."""
        folder = Path(folder).expanduser()
        folder.mkdir(parents=True, exist_ok=True)
        if self.folder:
            for file in (*self.folder.glob("*token*.*"), *self.folder.glob("*_template.*"),
                         *self.folder.glob("generation_config.json")):
                shutil.copy(file, folder)

        dtype = self.model.embed_tokens.weight.dtype
        tensors = {name: tensor.to(dtype) for name, tensor in self.state_dict().items()}
        if self.config.tie_word_embeddings:
            del tensors["lm_head.weight"]
        with whole_file(folder / "model.safetensors") as temporary:
            save_file(tensors, temporary, {"format": "pt"})
        settings = asdict(self.config)
        settings["model_type"] = "ddllama"
        with whole_file(folder / "config.json") as temporary:
            temporary.write_text(json.dumps(settings, indent=2), encoding="utf-8")


# ---- Generation ----------------------------------------------------------------------------------
class Step(NamedTuple):
    """A new token of each row, and how the model found it."""
    token: Tensor         # (B,), int64
    depth: Tensor         # (B,), int64, layers used at the position that predicted the token
    gates: Tensor | None  # (B, T, R), of the positions just read: the prompt, then one at a time
    kept: Tensor | None   # (B, T, R), of the same; both None with route="full"


def sample(logits: Tensor, temperature: float, top_p: float,
           generator: torch.Generator | None = None) -> Tensor:
    """Tokens (B,) of logits (B, V): the likeliest ones at temperature 0, else drawn from the
    nucleus top_p by a CPU generator, by default torch's global one."""
    if temperature < 1e-9:  # division by it could overflow
        return logits.argmax(-1)
    # On the CPU, so that a seed gives the same text on every device.
    scores = logits.cpu().double() / temperature
    probs, ids = scores.softmax(-1).sort(descending=True)
    before = probs.cumsum(-1) - probs
    probs[before >= top_p] = 0  # the likeliest token always stays
    drawn = torch.multinomial(probs, 1, generator=generator)                      # (B, 1)
    return ids.gather(-1, drawn)[:, 0].to(logits.device)


@torch.inference_mode()
def generate(model: FlexiDepth, input_ids: Tensor, max_new_tokens: int, temperature: float = 0.0,
             top_p: float = 1.0, generator: torch.Generator | None = None,
             stop_ids: Iterable[int] = (), route: Route = "learned") -> Iterator[Step]:
    """Yield a Step for each new token after prompts (B, T), int64, of one length, until every row
    has produced a token of stop_ids, max_new_tokens are there, or the context is full. Ignore what
    a row yields after its stop token. Raises ValueError for bad arguments or non-finite logits."""
    B, T = input_ids.shape
    if not (T > 0 and temperature >= 0 and 0 < top_p <= 1):
        raise ValueError(f"{T} tokens, temperature {temperature}, top_p {top_p}; expected at least "
                         "1, at least 0, and above 0 up to 1")
    context = model.config.max_position_embeddings
    words = model.model.embed_tokens.weight
    length = min(T + max_new_tokens, context)
    cache = KVCache(model.config, B, length, words.device, words.dtype)
    stops = torch.tensor([*stop_ids], dtype=torch.int64, device=words.device)
    ended = torch.zeros(B, dtype=torch.bool, device=words.device)
    input_ids = input_ids.to(words.device)
    for _ in range(max_new_tokens):
        logits, gates, kept = model(input_ids, cache, route, last_only=True)
        logits = logits[:, -1]                                                    # (B, V)
        if not logits.isfinite().all():
            raise ValueError(f"the logits after {cache.length} tokens are not finite numbers: "
                             "broken weights, or a dtype that is too narrow (try float32)")
        token = sample(logits, temperature, top_p, generator)
        depth = torch.full_like(token, model.config.num_hidden_layers)
        if kept is not None:
            depth = layers_used(kept[:, -1], model.config)
        yield Step(token, depth, gates, kept)
        ended |= torch.isin(token, stops)
        if ended.all() or cache.length == context:
            return
        input_ids = token[:, None]


# ---- Loading and saving --------------------------------------------------------------------------
# Settings of config.json that would change the result, and what this file implements. Those with no
# value here have to be absent or null. The released checkpoint calls itself ddllama.
SUPPORTED = {
    "model_type": ("llama", "ddllama"),
    "hidden_act": ("silu",),
    "rope_type": ("default", "llama3"),
    "type": ("default", "llama3"),  # an older name of rope_type
    "attention_bias": (False,),
    "mlp_bias": (False,),
    "sliding_window": (),
    "quantization_config": (),
}


def read_json(path: Path) -> dict:
    """A JSON object. Raises FileNotFoundError, or ValueError if the file holds something else."""
    try:
        return {**json.loads(path.read_text(encoding="utf-8"))}  # only an object can be unpacked
    except (ValueError, TypeError, RecursionError) as error:
        raise ValueError(f"{path}: not a JSON object ({error})") from None


def read_config(path: Path, **overrides) -> Config:
    """Overrides that are not None take precedence. Raises ValueError if a key is not supported."""
    raw = read_json(path)
    try:
        # Rotary settings may be in a dict of their own, of either name.
        raw |= raw.get("rope_parameters") or raw.get("rope_scaling") or {}
        for name, known in SUPPORTED.items():
            if raw.get(name) not in (None, *known):
                raise ValueError(f"{name} {raw[name]!r} is not supported; expected {known or None}")
        raw["rope_scaling"] = None
        if "llama3" in (raw.get("rope_type"), raw.get("type")):
            scaling = {name: float(raw[name]) for name in LLAMA3_ROPE}
            raw["rope_scaling"] = scaling | {"rope_type": "llama3"}
        raw |= {name: value for name, value in overrides.items() if value is not None}
        names = raw.keys() & {field.name for field in fields(Config)}
        return Config(**{name: raw[name] for name in names})
    except (KeyError, TypeError, ValueError, ZeroDivisionError) as error:
        raise ValueError(f"{path}: {error!r}") from None


def find_path(path: str | Path) -> Path:
    """A file, a folder, or the folder of a hub name (meta-llama/Llama-3.2-1B) in the cache."""
    found = Path(path).expanduser()
    if found.exists():
        return found
    home = os.environ.get("HF_HOME", "~/.cache/huggingface")
    hub = Path(os.environ.get("HF_HUB_CACHE", f"{home}/hub")).expanduser()
    repository = hub / f"models--{str(path).replace('/', '--')}"
    main = repository / "refs" / "main"  # it holds the name of the newest snapshot
    if not main.is_file():
        raise FileNotFoundError(
            f"{path}: not there, nor in {hub} (hub names: hf download {path})")
    return repository / "snapshots" / main.read_text().strip()


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file, or of the model*.safetensors in a folder, by name."""
    files = [path]
    if path.is_dir():
        files = sorted(path.glob("model*.safetensors"))
    if not files:
        raise FileNotFoundError(f"{path}: holds no model*.safetensors (.bin files are not read)")
    tensors = {}
    for file in files:
        try:
            with safe_open(file, framework="pt") as opened:
                for name in opened.keys():
                    if not name.endswith("rotary_emb.inv_freq"):  # old files hold what we compute
                        tensors[name] = opened.get_tensor(name)
        except SafetensorError as error:
            raise ValueError(f"{file}: not a whole safetensors file, or a Git LFS pointer to one; "
                             f"download it again ({error})") from None
    return tensors


def trained_part(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of routers and adapters (router_proj), by their names."""
    return {name: tensor for name, tensor in tensors.items() if ".router" in name}


@contextmanager
def whole_file(file: Path) -> Iterator[Path]:
    """A temporary name to write to. The file appears under its own name only when it is complete,
    and replaces an older one. Raises OSError if the disk is full."""
    file.parent.mkdir(parents=True, exist_ok=True)
    temporary = file.with_name(f".{file.name}.part")
    temporary.touch()
    mode = temporary.stat().st_mode  # what the user's files have; save_file would give another one
    try:
        yield temporary
        temporary.chmod(mode)
        temporary.replace(file)
    except (SafetensorError, RuntimeError) as error:  # torch.save raises a RuntimeError
        raise OSError(f"{file}: not written; is the disk full? ({error})") from None
    finally:
        temporary.unlink(missing_ok=True)


# ---- Text ----------------------------------------------------------------------------------------
# Llama 3's special tokens, in the order in which they follow the ranks of tokenizer.model.
RESERVED = [f"<|reserved_special_token_{i}|>" for i in range(251)]
SPECIAL = ["<|begin_of_text|>", "<|end_of_text|>", *RESERVED[:4], "<|start_header_id|>",
           "<|end_header_id|>", RESERVED[4], "<|eot_id|>", *RESERVED[5:]]
# What may end a text or an answer.
ENDS = ("<|end_of_text|>", "<|endoftext|>", "<|eot_id|>", "<|eom_id|>", "<|im_end|>")
# How Llama 3 and SmolLM2 cut text before bytes are merged, for tiktoken and in a tokenizer.json.
SPLIT = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
         r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")
DIGIT_SPLIT = (r"\p{N}|'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?[^\s\p{L}\p{N}]+"
               r"|\s+(?=\p{N})|\s+(?!\S)|\s+")
BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
PRE_TOKENIZERS = {
    SPLIT: [{"type": "Split", "pattern": {"Regex": SPLIT}, "behavior": "Isolated", "invert": False},
            BYTE_LEVEL | {"use_regex": False}],
    DIGIT_SPLIT: [{"type": "Digits", "individual_digits": True}, BYTE_LEVEL | {"use_regex": True}],
}
# The marks that a format's template may hold, of which the first has to be there, and a pattern
# by which a template is refused: Llama 3's if it does not strip contents; ChatML's if it does, if
# it begins with a token of its own, or if a message does not end with a newline.
CHAT_FORMATS = {
    "llama3": (["<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<|begin_of_text|>",
                "<|eom_id|>", "<|python_tag|>"], r"(?s)\A(?!.*trim)"),
    "chatml": (["<|im_start|>", "<|im_end|>"],
               r"""trim|strip|bos_token|<\|im_end\|>(?!(['"] ?\+ ?['"])?(\n|\\n))"""),
}
# tiktoken fails on very long runs, so they are cut after 25,000 characters, as in Meta's tokenizer.
PIECE = re.compile(r"(?s).*?(?:\s{25000}|\S{25000}|\Z)")


def read_tokenizer_model(file: Path) -> tuple[dict, dict, str]:
    """Ranks by token, ids of special tokens by name, and the split pattern of Llama 3's
    tokenizer.model, which has a token in base64 and its rank on each line."""
    ranks = {}
    try:
        for line in file.read_bytes().splitlines():
            token, rank = line.split()
            ranks[base64.b64decode(token, validate=True)] = int(rank)
    except ValueError:
        raise ValueError(f"{file}: not 'base64 rank' on each line, as in Llama 3's file "
                         "(SentencePiece, as of Llama 2, is not supported)") from None
    special = {name: rank for rank, name in enumerate(SPECIAL, len(ranks))}
    return ranks, special, SPLIT


def byte_characters() -> dict[str, int]:
    """Characters of a tokenizer.json as bytes: printable ones, and the others from 256 on."""
    others = [byte for byte in range(256) if byte == 32 or not chr(byte).isprintable()]
    numbered = {chr(256 + i): byte for i, byte in enumerate(others)}
    return {chr(byte): byte for byte in range(256)} | numbered


def read_tokenizer_json(file: Path) -> tuple[dict, dict, str]:
    """The same of a tokenizer.json. Raises ValueError if it is of neither supported kind."""
    raw = read_json(file)
    try:
        model = raw["model"]
        steps = raw["pre_tokenizer"]["pretokenizers"]
        patterns = [pattern for pattern, known in PRE_TOKENIZERS.items() if known == steps]
        if model["type"] != "BPE" or raw.get("normalizer") or not patterns:
            raise ValueError("neither Llama 3's nor SmolLM2's kind of tokenizer")
        merges = ["".join(pair).replace(" ", "") for pair in model["merges"]]  # "a b", or a list
        made = set(merges)
        special = {}
        for token in raw["added_tokens"]:
            name = token["content"]
            special[name] = token["id"]
            if not token["special"] or len(name) == 1 or name in made:
                raise ValueError(f"added token {name!r} is not special, or is part of plain text")

        # tiktoken merges in the order of ids, and so must the file's own list of merges. If a whole
        # word is a token, tiktoken takes it without merging, as ignore_merges asks for.
        vocab = {token: i for token, i in model["vocab"].items() if token not in special}
        order = [vocab[token] for token in merges]
        unmerged = [token for token in vocab if len(token) > 1 and token not in made]
        if order != sorted(order) or (unmerged and not model.get("ignore_merges")):
            raise ValueError("its merges are not in the order of its ids, or some are missing")
        byte = byte_characters()
        ranks = {bytes(byte[character] for character in token): i for token, i in vocab.items()}
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise ValueError(f"{file}: not a tokenizer that is supported ({error!r})") from None
    return ranks, special, patterns[0]


def read_chat_template(folder: Path) -> str | None:
    """The folder's chat template, "" if it says that it has none, None if it does not say."""
    if (folder / "chat_template.jinja").is_file():
        return (folder / "chat_template.jinja").read_text(encoding="utf-8")
    if (folder / "tokenizer_config.json").is_file():
        return str(read_json(folder / "tokenizer_config.json").get("chat_template") or "")
    return None


def find_chat_format(template: str | None, special: dict[str, int]) -> str | None:
    """The one format that fits the template, or else the special tokens. None if that is unsure."""
    found = set(re.findall(r"<[|/]?\w+\|?>", template or ""))
    fitting = []
    for name, (marks, excluded) in CHAT_FORMATS.items():
        fits = marks[0] in found <= set(marks) and not re.search(excluded, template)
        if marks[0] in special and (fits or template is None):
            fitting.append(name)
    return fitting[0] if len(fitting) == 1 else None


class Tokenizer:
    """Text and chats as token ids, on tiktoken.

    vocab_size: one more than the largest id. special: ids of the special tokens by name.
    stop_ids: the tokens that end an answer. chat_format: "llama3", "chatml" or None."""
    def __init__(self, ranks: dict[bytes, int], special: dict[str, int], pattern: str,
                 chat_template: str | None = None):
        self.special = special
        self.vocab_size = 1 + max(*ranks.values(), *special.values())
        # tiktoken needs a token for each byte. Those that SmolLM2 lacks get ids that encode drops.
        lacking = {bytes([byte]): 2**30 + byte for byte in range(256)}
        self.encoding = tiktoken.Encoding(
            "flexidepth", pat_str=pattern, mergeable_ranks=lacking | ranks, special_tokens=special)
        ends = [special[name] for name in ENDS if name in special]
        self.stop_ids = set(ends)
        self.end = ends[:1]
        self.begin = [special[name] for name in SPECIAL[:1] if name in special]
        self.chat_format = find_chat_format(chat_template, special)
        self.begin_chat = self.begin if self.chat_format == "llama3" else []
        self.tool_role = "ipython" if "ipython" in (chat_template or "") else "tool"

    @classmethod
    def from_pretrained(cls, path: str | Path) -> "Tokenizer":
        """From tokenizer.json, or else tokenizer.model, of a folder or hub name. Raises ValueError
        if it is not supported, or has more tokens than the model beside it."""
        folder = find_path(path)
        if (folder / "tokenizer.json").is_file():
            vocabulary = read_tokenizer_json(folder / "tokenizer.json")
        else:
            vocabulary = read_tokenizer_model(folder / "tokenizer.model")
        tokenizer = cls(*vocabulary, read_chat_template(folder))
        model_file = folder / "config.json"
        if model_file.is_file() and tokenizer.vocab_size > read_config(model_file).vocab_size:
            raise ValueError(f"{path}: its tokenizer has more tokens than its model")
        stops_file = folder / "generation_config.json"
        if stops_file.is_file():
            ids = read_json(stops_file).get("eos_token_id")
            ids = ids if isinstance(ids, list) else [ids]
            tokenizer.stop_ids.update(i for i in ids if isinstance(i, int))
        return tokenizer

    def encode(self, text: str, *, bos: bool = False, eos: bool = False) -> list[int]:
        """Token ids. Names of special tokens in the text are plain text. bos and eos add the tokens
        that texts of this tokenizer begin and end with, if there are such tokens."""
        ids = []
        for piece in PIECE.findall(text):
            ids += self.encoding.encode_ordinary(piece)
        ids = [i for i in ids if i < self.vocab_size]
        return self.begin * bos + ids + self.end * eos

    def encode_message(self, message: dict) -> tuple[list[int], list[int], list[int]]:
        """Token ids of one message, {"role": ..., "content": ...}, in three parts: its header; its
        content with the token that ends it; and what separates it from the next message. Raises
        ValueError if the chat format is not known."""
        content = message["content"]
        role = self.tool_role if message["role"] == "tool" else message["role"]
        if self.chat_format == "llama3":
            start = self.special["<|start_header_id|>"]
            end = self.special["<|end_header_id|>"]
            header = [start, *self.encode(role), end, *self.encode("\n\n")]
            said = [*self.encode(content.strip()), self.special["<|eot_id|>"]]
            return header, said, []
        if self.chat_format == "chatml":
            # Role and content are one text. A token that holds parts of both counts as header.
            length = len(self.encode(f"{role}\n"))
            text = self.encode(f"{role}\n{content}")
            header = [self.special["<|im_start|>"], *text[:length]]
            said = [*text[length:], self.special["<|im_end|>"]]
            return header, said, self.encode("\n")
        raise ValueError("this model has no chat format, or another one than Llama 3's or ChatML: "
                         "it can only continue plain text (sample.py --raw, rows of text)")

    def encode_chat(self, messages: list[dict], add_generation_prompt: bool = False) -> list[int]:
        """Token ids of messages, and with add_generation_prompt of the header of an answer. Matches
        the folder's template, except that no default system message or date is inserted."""
        ids = list(self.begin_chat)
        for message in messages:
            ids += sum(self.encode_message(message), [])
        if add_generation_prompt:
            header, _, _ = self.encode_message({"role": "assistant", "content": ""})
            ids += header
        return ids

    def token_bytes(self, token: int) -> bytes:
        """The bytes of one token, or a placeholder for an id that this tokenizer does not have."""
        try:
            return self.encoding.decode_single_token_bytes(token)
        except KeyError:
            return f"<|unknown_{token}|>".encode()

    def decode(self, ids: Iterable[int]) -> str:
        """The text of token ids, special tokens included; bytes not in UTF-8 become U+FFFD."""
        return b"".join(map(self.token_bytes, ids)).decode("utf-8", errors="replace")


# ---- Compiled decoding ---------------------------------------------------------------------------
def compile_decode(model: FlexiDepth) -> None:
    """Compile the head, and the layers for a lone token (B = T = 1) with a cache. All else runs as
    before. It needs a C++ compiler, and Triton on a GPU. Sums change their order, so the last bits
    change. Call it once for a model."""
    compiled = torch.compile(decode_layer)

    def forward(layer, eager, x, rotation, cache, route):
        if x.shape[:2] != (1, 1) or cache is None or callable(route):
            return eager(x, rotation, cache, route)
        place = torch.full((1,), cache.length, device=x.device)
        return compiled(layer, x, rotation, cache.keys[layer.index], cache.values[layer.index],
                        place, route)

    for module in model.modules():
        if isinstance(module, nn.Linear):
            module.__class__ = RowSums
        if isinstance(module, DecoderLayer):
            module.forward = partial(forward, module, module.forward)
    model.lm_head.compile()


class RowSums(nn.Linear):
    """In compiled float32 code, the product of a lone token is a sum. On a CPU it becomes one pass
    over the weights, up to 1.9 times as fast (tests/bench/README.md)."""
    def forward(self, x: Tensor) -> Tensor:
        lone = x.numel() == x.shape[-1] <= 2048  # more would not stay in the fastest cache
        if lone and x.dtype == torch.float32 and torch.compiler.is_compiling():
            return (self.weight * x.unsqueeze(-2)).sum(-1)
        return F.linear(x, self.weight)


def decode_layer(layer: DecoderLayer, x: Tensor, rotation: Rotation, keys: Tensor, values: Tensor,
                 place: Tensor, route: str) -> Routed:
    """DecoderLayer.forward for a lone token x (1, 1, D), in a form that compiles as a whole. A
    torch.cond, in place of a Python `if`, compiles both paths and runs one. Attention is to the
    whole cache, keys and values (1, K, max_length, d), as each length would need its own code."""
    attention = layer.self_attn
    h = layer.input_layernorm(x)
    k, v = attention.keys_values(h, rotation)
    keys.index_copy_(2, place, k)
    values.index_copy_(2, place, v)
    seen = torch.arange(keys.shape[2], device=x.device)[None] <= place            # (1, max_length)

    def full_path(x, h, g):
        q = rotate(attention.split_heads(attention.q_proj(h)), rotation)          # (1, H, 1, d)
        q = q.reshape(1, keys.shape[1], -1, attention.head_dim)                   # (1, K, H / K, d)
        attended = F.scaled_dot_product_attention(q, keys, values, seen)
        attended = attention.o_proj(attended.reshape(1, 1, -1))
        return layer.full_path(x, g, attended)

    def skip_path(x, h, g):
        return layer.skip_path(x, g)

    if layer.router is None or route == "full":
        return full_path(x, h, 1.0), None, None
    gate, kept = layer.decide(h, route)
    g = gate.to(x.dtype)[..., None]                                               # (1, 1, 1)
    x = torch.cond(kept.all(), full_path, skip_path, (x, h, g))
    return x, gate, kept
