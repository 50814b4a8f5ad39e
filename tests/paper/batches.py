"""What batches do to layer skipping: a layer is spared only if no sequence of the batch needs it.

    python tests/paper/batches.py --name tiny --model tests/tiny-llama --gates tests/tiny-llama
    python tests/paper/batches.py --name smollm2 --model smollm2 --gates out --valid valid.jsonl
    python tests/paper/batches.py --readme     # only put the tables into tests/paper/README.md

Two rules are compared, in batches of 1, 4, 16 and 64 sequences: "learned", by which each sequence
decides for itself, and "agree", by which a layer runs for all sequences or for none, as the mean
of their gates says. Times are CPU times of decoded tokens on one core, taken in turn with those of
route="full". Figures go to batches.json.

Prompts are those of held-out rows, in a random order. `generate` takes prompts of one length, so
each is cut to its last n tokens, where nine of ten prompts have n or more; shorter ones are left
out. A cut prompt may lack a part of its question. That is no matter to depth and time, but answers
are not judged here: losses and exact match are of whole rows, with teacher forcing.
"""
import argparse
import json
import sys
import time
from argparse import Namespace
from collections import defaultdict
from pathlib import Path
from statistics import fmean, median
from tempfile import TemporaryDirectory

import numpy as np
import torch
from torch import Tensor

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent.parent))
from flexidepth import FlexiDepth, Route, Tokenizer, generate, layers_used  # noqa: E402
from train import (  # noqa: E402
    Rows, TokenLosses, collate, open_lines, read_messages, read_rows, write_json)

from tables import fill, markdown  # noqa: E402

BATCH_SIZES = (1, 4, 16, 64)
ROUNDS = 3
NEW_TOKENS = 16


# ---- Rule and prompts ----------------------------------------------------------------------------
def agree(threshold: float, real: Tensor | None = None) -> Route:
    """All sequences of a batch do what the mean of their gates says. Padding, where real (B, T) is
    False, has no say."""
    def rule(layer_index: int, gate: Tensor) -> Tensor:
        if real is not None:
            gate = gate.where(real, torch.nan)
        mean = gate.nanmean(0, keepdim=True)                                      # (1, T)
        return (mean > threshold).expand_as(gate)                                 # (B, T)

    return rule


def read_prompts(file: Path, tokenizer: Tokenizer) -> Tensor:
    """Prompts of the largest batch, int64 (B, n). ValueError if there are too few."""
    prompts = []
    for _, row in read_rows(file, open_lines(file)):
        messages = read_messages(row)
        prompts.append(tokenizer.encode_chat(messages[:-1], add_generation_prompt=True))
    lengths = sorted(map(len, prompts))
    n = lengths[len(lengths) // 10]
    prompts = [prompt[-n:] for prompt in prompts if len(prompt) >= n]
    B = BATCH_SIZES[-1]
    if len(prompts) < B:
        raise ValueError(f"{file}: {len(prompts)} prompts of {n} tokens; expected at least {B}")
    order = torch.randperm(len(prompts), generator=torch.Generator().manual_seed(0))
    return torch.tensor(prompts)[order[:B]]


# ---- What is measured ----------------------------------------------------------------------------
def decisions(model: FlexiDepth, prompts: Tensor, route: Route) -> Tensor:
    """What each sequence decides in each step of decoding, bool (steps, B, R)."""
    seen = []

    def record(layer, inputs, output):
        seen.append(output[2])

    routed = [model.model.layers[index] for index in model.config.routing_layers]
    hooks = [layer.register_forward_hook(record) for layer in routed]
    list(generate(model, prompts, NEW_TOKENS, route=route))
    for hook in hooks:
        hook.remove()
    R = len(routed)
    steps = [torch.cat(seen[i:i + R], 1) for i in range(R, len(seen), R)]  # without the prompts
    return torch.stack(steps)


def spared(kept: Tensor) -> float:
    """Share of the routed layers, over all steps, that no sequence needs: kept (steps, B, R)."""
    return (~kept.any(1)).float().mean().item()


def ideals(model: FlexiDepth, kept: Tensor) -> tuple[float, float]:
    """How much faster than with all layers the decisions (steps, B, R) would be if only the bytes
    of weights, or only multiplications, took time. Both are counted in weights."""
    layer = model.model.layers[model.config.routing_layers[0]]

    def size(*modules: torch.nn.Module) -> int:
        return sum(p.numel() for module in modules for p in module.parameters())

    full = size(layer.self_attn.q_proj, layer.self_attn.o_proj, layer.mlp)
    adapter = size(layer.router_proj)
    R = kept.shape[-1]
    # What every token uses. An embedding that is not the head as well is not multiplied.
    always = size(model) - R * (full + adapter)
    if model.lm_head is not None:
        always -= model.model.embed_tokens.weight.numel()
    all_layers = always - R * size(layer.router) + R * full

    # A weight is read if any sequence needs it. It is multiplied once for each that does.
    read = kept.any(1).float().mean() * full + (~kept).any(1).float().mean() * adapter
    multiplied = kept.float().mean() * full + (~kept).float().mean() * adapter
    by_bytes = all_layers / (always + R * read.item())
    by_flops = all_layers / (always + R * multiplied.item())
    return by_bytes, by_flops


def seconds_of(model: FlexiDepth, prompts: Tensor, route: Route) -> float:
    """CPU seconds of the decoded tokens, without the prompts and the first token."""
    tokens = generate(model, prompts, NEW_TOKENS, route=route)
    next(tokens)
    started = time.process_time()
    list(tokens)
    return time.process_time() - started


def measure(model: FlexiDepth, prompts: Tensor, route: Route) -> dict:
    """Depth and speed of decoding, for a line of the table."""
    kept = decisions(model, prompts, route)
    by_bytes, by_flops = ideals(model, kept)
    seconds = [(seconds_of(model, prompts, "full"), seconds_of(model, prompts, route))
               for _ in range(ROUNDS)]
    return {
        "layers": layers_used(kept, model.config).float().mean().item(),
        "spared": spared(kept),
        "speed": median(full / routed for full, routed in seconds),
        "by_bytes": by_bytes,
        "by_flops": by_flops,
        "tokens_per_s": len(prompts) * (NEW_TOKENS - 1) / median(routed for _, routed in seconds)}


@torch.no_grad()
def quality(model: FlexiDepth, rows: Rows, rule: str, batch_size: int) -> tuple[float, float]:
    """Held-out loss, and the share of rows of which every token that counts is the likeliest one,
    each as a mean over tasks. Rows of like length are in a batch."""
    token_losses = TokenLosses(model)
    losses_by_task = defaultdict(list)
    exact_by_task = defaultdict(list)
    order = np.argsort(rows.lengths, kind="stable")
    for start in range(0, len(order), batch_size):
        batch = [rows[i] for i in order[start:start + batch_size]]
        input_ids, targets, real = collate(batch, "cpu")
        due = targets != -100
        route = agree(model.config.threshold, real) if rule == "agree" else rule
        losses, likeliest, _, _ = token_losses(input_ids, targets, route)
        right = likeliest == targets[due]
        counts = due.sum(1).tolist()
        for row, row_losses, row_right in zip(batch, losses.split(counts), right.split(counts)):
            losses_by_task[row.task] += row_losses.tolist()
            exact_by_task[row.task].append(row_right.all().item())
    return fmean(map(fmean, losses_by_task.values())), fmean(map(fmean, exact_by_task.values()))


# ---- Tables --------------------------------------------------------------------------------------
def make_tables(results: dict) -> dict[str, str]:
    """Markdown by name, as in README.md."""
    made = {}
    for name, run in results["runs"].items():
        head = ["rule", "sequences", "layers used", "routed layers spared", "speed over all layers",
                "ideal by bytes", "ideal by FLOPs", "tokens/s", "loss", "loss of all layers",
                "exact match", "of all layers"]
        lines = []
        for line in run["lines"]:
            lines.append([
                line["rule"], str(line["sequences"]), f"{line['layers']:.2f}",
                f"{line['spared']:.1%}", f"{line['speed']:.2f}", f"{line['by_bytes']:.2f}",
                f"{line['by_flops']:.2f}", f"{line['tokens_per_s']:.0f}", f"{line['loss']:.4f}",
                f"{line['base_loss']:.4f}", f"{line['exact']:.1%}", f"{line['base_exact']:.1%}"])
        made[f"batches_{name}"] = markdown(head, lines)
    return made


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--name", help="of the entry in batches.json; without it nothing is measured")
    add("--model", type=Path, help="folder of the base")
    add("--gates", type=Path, help="its routers and adapters")
    add("--valid", type=Path, help="held-out rows, JSONL (default: valid.jsonl of the model)")
    add("--readme", action="store_true", help="put the tables into README.md")
    args = parser.parse_args()
    file = HERE / "batches.json"
    results = {"runs": {}}
    if file.is_file():
        results = json.loads(file.read_text())

    if args.name:
        torch.set_num_threads(1)
        valid = args.valid or args.model / "valid.jsonl"
        model = FlexiDepth.from_pretrained(args.model, args.gates, dtype=torch.float32)
        tokenizer = Tokenizer.from_pretrained(args.model)
        with TemporaryDirectory() as folder:
            rows = Rows(valid, Path(folder, "rows.safetensors"), tokenizer,
                        Namespace(seq_len=256, answers_only=True))
        prompts = read_prompts(valid, tokenizer)

        base = {B: quality(model, rows, "full", B) for B in BATCH_SIZES}
        lines = []
        for rule, route in (("learned", "learned"), ("agree", agree(model.config.threshold))):
            for B in BATCH_SIZES:
                line = {"rule": rule, "sequences": B} | measure(model, prompts[:B], route)
                line["base_loss"], line["base_exact"] = base[B]
                line["loss"], line["exact"] = quality(model, rows, rule, B)
                print(line, flush=True)
                lines.append(line)
        results["runs"][args.name] = {"prompt_tokens": prompts.shape[1], "lines": lines}
        write_json(file, results)

    made = make_tables(results)
    for name, table in made.items():
        print(f"{name}\n\n{table}\n")
    if args.readme:
        readme = HERE / "README.md"
        readme.write_text(fill(readme.read_text(), made))


if __name__ == "__main__":
    main()
