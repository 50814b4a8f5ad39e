"""FlexiDepth as slowly and plainly as it can be written: NumPy, one token at a time, plain loops.

It is what the tests hold flexidepth.py to, so it was written from the paper's equations and the
layout of the checkpoint alone and shares no code with it: no batch, no mask, no gathering of the
kept tokens. Tokens run through the layers one after the other and a token attends to whatever
keys are in the lists so far, so that attention is causal because later keys do not exist yet.

Weights go by the names of the official checkpoint; a linear layer is (out, in), applied as W @ x.
D hidden, H heads, K key/value heads, d head_dim, T tokens, V vocabulary, R FlexiDepth layers.
"""
import math

import numpy as np


def rms_norm(x, weight, eps):
    return x / np.sqrt((x * x).mean() + eps) * weight


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def silu(x):
    return x * sigmoid(x)


def softmax(scores):
    e = np.exp(scores - scores.max())
    return e / e.sum()


def rope_frequencies(config, head_dim):
    """The angle, in radians a position, by which each of the d / 2 pairs turns."""
    frequencies = config.rope_theta ** (-np.arange(0, head_dim, 2) / head_dim)
    if config.rope_scaling:  # "llama3": fast pairs stay, slow ones are slowed, others blended
        scaling = config.rope_scaling
        turns = scaling["original_max_position_embeddings"] * frequencies / (2 * math.pi)
        low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
        keep = np.clip((turns - low) / (high - low), 0, 1)
        frequencies = keep * frequencies + (1 - keep) * frequencies / scaling["factor"]
    return frequencies


def rotate(head, position, frequencies):
    """Turn each pair of one head's vector (d). Split-half: entry j is paired with j + d / 2."""
    out = np.empty_like(head)
    half = len(head) // 2
    for j, frequency in enumerate(frequencies):
        cos, sin = math.cos(position * frequency), math.sin(position * frequency)
        out[j] = head[j] * cos - head[j + half] * sin
        out[j + half] = head[j + half] * cos + head[j] * sin
    return out


def attention(queries, keys, values):
    """One token's queries (H, d) over the keys and values of all tokens so far, T of (K, d)."""
    H, d = queries.shape
    K = len(keys[0])
    heads = []
    for h in range(H):
        kv = h // (H // K)  # neighbouring query heads share one key/value head
        scores = np.array([queries[h] @ key[kv] for key in keys]) / math.sqrt(d)
        heads.append(sum(p * value[kv] for p, value in zip(softmax(scores), values)))
    return np.concatenate(heads)


def forward(weights, config, input_ids, route="learned", dtype=np.float64):
    """Logits (T, V), gates (T, R) and decisions kept (T, R) of one sequence of T token ids.

    weights: official name -> array. config: a Config, or any object with its attributes.
    route: "learned", g > threshold; "full", routers bypassed, the base model, gates and kept None;
    or a function (layer_index, gate, position) -> bool that decides instead.
    """
    weights = {name: w.astype(dtype) for name, w in weights.items()}
    layers = [{name.removeprefix(f"model.layers.{i}."): w for name, w in weights.items()
               if name.startswith(f"model.layers.{i}.")} for i in range(config.num_hidden_layers)]
    embedding = weights["model.embed_tokens.weight"]
    lm_head = weights.get("lm_head.weight", embedding)  # tied where absent
    eps = config.rms_norm_eps
    head_dim = config.head_dim or config.hidden_size // config.num_attention_heads
    frequencies = rope_frequencies(config, head_dim)
    all_keys, all_values = [[] for _ in layers], [[] for _ in layers]
    logits, gates, kept = [], [], []

    for position, token in enumerate(input_ids):
        x = embedding[token]
        token_gates, token_kept = [], []
        for i, (layer, keys, values) in enumerate(zip(layers, all_keys, all_values)):
            h = rms_norm(x, layer["input_layernorm.weight"], eps)
            # Keys and values for every token, skipped or not: later tokens can still attend to it.
            k = (layer["self_attn.k_proj.weight"] @ h).reshape(-1, head_dim)
            v = (layer["self_attn.v_proj.weight"] @ h).reshape(-1, head_dim)
            keys.append(np.stack([rotate(head, position, frequencies) for head in k]))
            values.append(v)

            g, keep = 1, True  # a plain layer
            if route != "full" and "router.router_enc.weight" in layer:
                r = layer["router.router_enc.weight"] @ h
                r = np.tanh(rms_norm(r, layer["router.router_norm.weight"], eps))
                r = layer["router.router_dec.weight"] @ r
                g = sigmoid(layer["router.router_head.weight"] @ r)[0]
                keep = bool(g > config.threshold if route == "learned" else route(i, g, position))
                token_gates.append(g)
                token_kept.append(keep)

            if keep:
                q = (layer["self_attn.q_proj.weight"] @ h).reshape(-1, head_dim)
                q = np.stack([rotate(head, position, frequencies) for head in q])
                x = x + layer["self_attn.o_proj.weight"] @ attention(q, keys, values)
                m = rms_norm(x, layer["post_attention_layernorm.weight"], eps)
                m = silu(layer["mlp.gate_proj.weight"] @ m) * (layer["mlp.up_proj.weight"] @ m)
                x = x + g * (layer["mlp.down_proj.weight"] @ m)
            else:  # the adapter; its down_proj and up_proj are named the other way round
                a = rms_norm(x, layer["post_attention_layernorm.weight"], eps)
                a = (silu(layer["router_proj.gate_proj.weight"] @ a)
                     * (layer["router_proj.down_proj.weight"] @ a))
                x = x + (1 - g) * (layer["router_proj.up_proj.weight"] @ a)

        logits.append(lm_head @ rms_norm(x, weights["model.norm.weight"], eps))
        gates.append(token_gates)
        kept.append(token_kept)
    if route == "full":
        return np.stack(logits), None, None
    return np.stack(logits), np.array(gates), np.array(kept)


def skip_loss(gates, mask):
    """(The sum of a token's gates)², its mean where mask (B, T) is set. gates (B, T, R)."""
    return np.mean([sum(g) ** 2 for g, real in zip(np.concatenate(gates), mask.flat) if real])


def layers_used(kept, num_hidden_layers):
    """Plain layers + open gates of every token: kept (T, R) -> (T)."""
    return np.array([num_hidden_layers - len(row) + sum(row) for row in kept])
