"""What batches do to layer skipping: a layer is spared only if no sequence of the batch needs it.

    python tests/paper/batches.py --name tiny --model tests/tiny-llama --gates tests/tiny-llama
    python tests/paper/batches.py --name smollm2 --model smollm2 --gates out --valid valid.jsonl
    python tests/paper/batches.py --readme     # only put the tables into tests/paper/README.md

Two rules are compared, in batches of 1, 4, 16 and 64 sequences: "learned", by which each sequence
decides for itself, and "agree", by which a layer runs for all sequences or for none, as the mean
of their gates says. Prompts are those of held-out rows, each cut to its last tokens, because
`generate` takes prompts of one length. Times are CPU times of decoded tokens on one core, taken in
turn with those of route="full". Figures go to batches.json.
"""
import argparse
import json
import sys
import time
from argparse import Namespace
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory

import numpy as np
import torch
from torch import Tensor

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent.parent))
from flexidepth import FlexiDepth, Route, Tokenizer, generate, layers_used  # noqa: E402
from train import Rows, write_json  # noqa: E402

from smollm2 import loss_of  # noqa: E402
from tables import fill, markdown  # noqa: E402

BATCH_SIZES = (1, 4, 16, 64)
ROUNDS = 3
NEW_TOKENS = 16
PROMPT = 20    # tokens of each prompt


# ---- Two rules -----------------------------------------------------------------------------------
def learned(threshold: float) -> Route:
    """The rule of route="learned", as a function."""
    return lambda layer_index, gate: gate > threshold


def agree(threshold: float) -> Route:
    """All sequences of a batch do what the mean of their gates says."""
    def rule(layer_index: int, gate: Tensor) -> Tensor:
        return (gate.mean(0, keepdim=True) > threshold).expand_as(gate)           # (B, T)

    return rule


# ---- What is measured ----------------------------------------------------------------------------
def decisions(model: FlexiDepth, prompts: Tensor, rule: Route) -> Tensor:
    """What each sequence decides in each step of decoding, bool (steps, B, R)."""
    seen = []

    def record(layer_index: int, gate: Tensor) -> Tensor:
        kept = rule(layer_index, gate)
        seen.append(kept)
        return kept

    list(generate(model, prompts, NEW_TOKENS, route=record))
    R = len(model.config.routing_layers)
    steps = [torch.cat(seen[i:i + R], 1) for i in range(R, len(seen), R)]  # without the prompts
    return torch.stack(steps)


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


def measure(model: FlexiDepth, prompts: Tensor, rule: Route) -> dict:
    """A line of the table. spared: the share of routed layers that no sequence needs in a step."""
    kept = decisions(model, prompts, rule)
    by_bytes, by_flops = ideals(model, kept)
    seconds = [(seconds_of(model, prompts, "full"), seconds_of(model, prompts, rule))
               for _ in range(ROUNDS)]
    return {
        "layers": layers_used(kept, model.config).float().mean().item(),
        "spared": 1 - kept.any(1).float().mean().item(),
        "speed": median(full / routed for full, routed in seconds),
        "by_bytes": by_bytes,
        "by_flops": by_flops,
        "tokens_per_s": len(prompts) * (NEW_TOKENS - 1) / median(routed for _, routed in seconds)}


def make_tables(results: dict) -> dict[str, str]:
    """Markdown by name, as in README.md."""
    made = {}
    for name, run in results["runs"].items():
        head = ["rule", "sequences", "layers used", "routed layers spared", "speed over all layers",
                "ideal by bytes", "ideal by FLOPs", "tokens/s", "held-out loss"]
        lines = []
        for line in run["lines"]:
            lines.append([
                line["rule"], str(line["sequences"]), f"{line['layers']:.2f}",
                f"{line['spared']:.1%}", f"{line['speed']:.2f}", f"{line['by_bytes']:.2f}",
                f"{line['by_flops']:.2f}", f"{line['tokens_per_s']:.0f}", f"{line['loss']:.4f}"])
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
        model = FlexiDepth.from_pretrained(args.model, args.gates, dtype=torch.float32)
        tokenizer = Tokenizer.from_pretrained(args.model)
        with TemporaryDirectory() as folder:
            rows = Rows(args.valid or args.model / "valid.jsonl", Path(folder, "rows.safetensors"),
                        tokenizer, Namespace(seq_len=256, answers_only=True))
        prompts = []
        for row in (rows[i] for i in range(len(rows))):
            answer = int(np.flatnonzero(row.counted)[0])
            if answer >= PROMPT:
                prompts.append(row.ids[answer - PROMPT:answer].tolist())
        step = len(prompts) // BATCH_SIZES[-1]  # rows of all tasks, not only of the first ones
        prompts = torch.tensor(prompts[::step][:BATCH_SIZES[-1]])

        threshold = model.config.threshold
        own_loss = loss_of(model, rows, "learned")
        lines = []
        for name, rule in (("learned", learned(threshold)), ("agree", agree(threshold))):
            for B in BATCH_SIZES:
                line = {"rule": name, "sequences": B} | measure(model, prompts[:B], rule)
                line["loss"] = own_loss
                if name == "agree":
                    line["loss"] = loss_of(model, rows, rule, batch_size=B)
                print(line, flush=True)
                lines.append(line)
        results["runs"][args.name] = {"base_loss": loss_of(model, rows, "full"), "lines": lines}
        write_json(file, results)

    made = make_tables(results)
    for name, table in made.items():
        print(f"{name}\n\n{table}\n")
    if args.readme:
        readme = HERE / "README.md"
        readme.write_text(fill(readme.read_text(), made))


if __name__ == "__main__":
    main()
