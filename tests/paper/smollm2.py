"""Layer skipping on a real language model: what gates of several prices cost and gain.

    python tests/paper/smollm2.py --model smollm2 --valid valid.jsonl --gates out-1 out-2 out-2@0.65
    python tests/paper/smollm2.py --readme     # only put the tables into tests/paper/README.md

The folders of --gates are results of train.py on that model, each with a threshold after an @ if it
is not to be 0.5. The figures go to smollm2.json: the held-out loss of FlexiDepth, and beside it that
of random skipping and of dropping the last layers, at the same mean depth; depth by task and by kind
of token; and the time of a decoded token with learned gates against all layers, taken in turn on
real prompts.
"""
import argparse
import json
import sys
import time
from argparse import Namespace
from collections import defaultdict
from pathlib import Path
from statistics import fmean, median

import numpy as np
import torch
from torch import nn

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent.parent))
from flexidepth import FlexiDepth, Route, Tokenizer, generate, layers_used  # noqa: E402
from train import Rows, TokenLosses, collate, evaluate, write_json  # noqa: E402

from depth_by_kind import groups_of  # noqa: E402
from reproduce import BareLayer, rate_of  # noqa: E402
from tables import fill, markdown  # noqa: E402

BATCH_SIZE = 8
LAYERS = 30       # of SmolLM2-135M
ROUNDS = 5        # of each prompt with learned gates and with all layers
PROMPTS = 6       # that are timed
NEW_TOKENS = 24   # decoded for each


def mean(table: dict, key: str) -> float:
    """Mean over tasks."""
    return fmean(line[key] for line in table.values())


# ---- Quality -------------------------------------------------------------------------------------
@torch.no_grad()
def loss_of(model: FlexiDepth, rows: Rows, route: Route, batch_size: int = BATCH_SIZE) -> float:
    """Held-out loss with another route, mean over tasks."""
    token_losses = TokenLosses(model)
    by_task = defaultdict(list)
    order = np.argsort(rows.lengths)
    for start in range(0, len(order), batch_size):
        batch = [rows[i] for i in order[start:start + batch_size]]
        input_ids, targets, _ = collate(batch, "cpu")
        losses, _, _, _ = token_losses(input_ids, targets, route)
        counts = (targets != -100).sum(1).tolist()
        for row, part in zip(batch, losses.split(counts)):
            by_task[row.task] += part.tolist()
    return fmean(map(fmean, by_task.values()))


def loss_at_random(model: FlexiDepth, rows: Rows, depth: float, bare: bool) -> float:
    """The loss with a coin for every token and layer in place of the gates' decisions. bare: also
    without adapters and factors, so that a token that skips passes a layer unchanged."""
    rate = rate_of(depth, model.config)
    generator = torch.Generator().manual_seed(0)

    def coin(layer_index: int, gate: torch.Tensor) -> torch.Tensor:
        if bare and layer_index not in model.config.routing_layers:
            return torch.ones(gate.shape, dtype=torch.bool)
        return torch.rand(gate.shape, generator=generator) < rate

    classes = [type(layer) for layer in model.model.layers]
    for index in model.config.routing_layers if bare else []:
        model.model.layers[index].__class__ = BareLayer
    loss = loss_of(model, rows, coin)
    for layer, kind in zip(model.model.layers, classes):
        layer.__class__ = kind
    return loss


def loss_of_first_layers(model: FlexiDepth, rows: Rows, depth: float) -> float:
    """The base's loss without its last layers. Some tokens get n layers and the others n + 1, in
    shares that give the mean depth; the loss is the mean by these shares."""
    layers = model.model.layers
    losses = []
    for n in (int(depth), int(depth) + 1):
        model.model.layers = nn.ModuleList(layers[:n])
        losses.append(loss_of(model, rows, "full"))
    model.model.layers = layers
    share = depth - int(depth)
    return (1 - share) * losses[0] + share * losses[1]


# ---- Depth ---------------------------------------------------------------------------------------
@torch.no_grad()
def depth_by_kind(model: FlexiDepth, tokenizer: Tokenizer, rows: Rows) -> dict[str, dict]:
    """Mean depth and count of the tokens of answers, by kind of token and by task. A token has the
    depth of the position that predicted it."""
    depths = defaultdict(list)
    for row in (rows[i] for i in range(len(rows))):
        _, _, kept = model.hidden_states(torch.from_numpy(row.ids[None, :-1]).long())
        used = layers_used(kept[0], model.config).tolist()
        begin = int(np.flatnonzero(row.counted)[0])
        ids = row.ids.tolist()
        record = {"task": row.task}
        # The first position of a row is predicted by none.
        for name, here in (("prompt", slice(0, begin)), ("answer", slice(begin, len(ids)))):
            texts = [tokenizer.decode([token]) for token in ids[here]]
            layers = ([0] + used)[here]
            record[name] = {"ids": ids[here], "texts": texts, "layers": layers}
        for name, group, depth in groups_of(record):
            if name == "answer" and "layers" not in group:
                depths[group].append(depth)
    return {group: {"tokens": len(found), "layers": round(fmean(found), 3)}
            for group, found in sorted(depths.items())}


@torch.no_grad()
def depth_with_prompts(model: FlexiDepth, rows: Rows) -> float:
    """Mean depth of all tokens of the rows, those of prompts included."""
    depths = []
    for row in (rows[i] for i in range(len(rows))):
        _, _, kept = model.hidden_states(torch.from_numpy(row.ids[None, :-1]).long())
        depths += layers_used(kept[0], model.config).tolist()
    return fmean(depths)


# ---- Time ----------------------------------------------------------------------------------------
def bytes_of_token(model: FlexiDepth, depth: float, routed: bool) -> float:
    """Bytes of the weights that a token of this mean depth uses, the head included."""
    def size(module: nn.Module) -> int:
        return sum(p.nbytes for p in module.parameters())

    config = model.config
    layer = model.model.layers[config.routing_layers[0]]
    whole = size(layer) - size(layer.router) - size(layer.router_proj)
    always = size(layer.self_attn.k_proj) + size(layer.self_attn.v_proj)
    skipped = config.num_hidden_layers - depth
    total = model.model.embed_tokens.weight.nbytes + depth * whole
    if routed:
        total += len(config.routing_layers) * size(layer.router)
        total += skipped * (always + size(layer.router_proj))
    return total


def time_of_token(model: FlexiDepth, prompts: list[list[int]]) -> dict:
    """CPU seconds of a decoded token with learned gates and with all layers, taken in turn; the
    prompt and the first token are not counted. The gain is the median ratio of neighbours."""
    seconds = {"full": [], "learned": []}
    depths = []
    for prompt in prompts:
        for _ in range(ROUNDS):
            for route in seconds:
                tokens = generate(model, torch.tensor([prompt]), NEW_TOKENS, route=route)
                next(tokens)
                started = time.process_time()
                found = [depth.item() for _, depth in tokens]
                seconds[route].append((time.process_time() - started) / len(found))
                if route == "learned":
                    depths += found
    gain = median(full / learned for full, learned in zip(seconds["full"], seconds["learned"]))
    ideal = (bytes_of_token(model, model.config.num_hidden_layers, False)
             / bytes_of_token(model, fmean(depths), True))
    return {"gain": gain, "ideal": ideal, "layers": fmean(depths),
            "seconds": {route: median(found) for route, found in seconds.items()}}


# ---- Tables --------------------------------------------------------------------------------------
def make_tables(results: dict) -> dict[str, str]:
    """Markdown by name, as in README.md."""
    runs = results["runs"]
    rows = []
    for run in runs:
        timed = run["time"]
        rows.append([
            f"{run['alpha']:g}", str(run["steps"]), f"{run['threshold']:g}",
            f"{run['layers']:.2f}", f"{run['skipped']:.1%}",
            f"{run['layers_with_prompts']:.2f}", f"{1 - run['layers_with_prompts'] / LAYERS:.1%}",
            f"{run['loss']:.3f}", f"{run['loss'] / run['base_loss'] - 1:+.1%}",
            f"{run['same']:.1%}",
            f"{run['coin_loss']:.3f}", f"{run['bare_loss']:.3f}", f"{run['first_loss']:.3f}",
            f"{timed['gain']:.2f}", f"{timed['ideal']:.2f}"])
    head = ["alpha", "steps", "threshold", "layers used, answers", "skipped", "with prompts",
            "skipped", "loss", "over the base", "next tokens as the base", "loss: coin for gate",
            "coin, no adapter", "last layers dropped", "speed over all layers", "ideal by bytes"]
    quality = markdown(head, rows)

    groups = sorted(runs[0]["depth"], key=lambda group: runs[0]["depth"][group]["layers"])
    rows = [[group, str(runs[0]["depth"][group]["tokens"]),
             *(f"{run['depth'][group]['layers']:.2f}" for run in runs)] for group in groups]
    titles = [f"alpha {run['alpha']:g}, {run['steps']} steps, threshold {run['threshold']:g}"
              for run in runs]
    kinds = markdown(["", "tokens", *titles], rows)
    return {"smollm2": quality, "smollm2_kinds": kinds}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--model", help="folder of the base")
    add("--valid", type=Path, help="held-out rows, JSONL")
    add("--gates", nargs="+", help="results of train.py: FOLDER or FOLDER@THRESHOLD")
    add("--seq-len", type=int, default=256, help="longer rows are left out (256)")
    add("--readme", action="store_true", help="only put the tables into README.md")
    args = parser.parse_args()
    file = HERE / "smollm2.json"
    if args.gates:
        torch.set_num_threads(1)
        args = Namespace(**vars(args), device="cpu", micro_batch_size=BATCH_SIZE,
                         answers_only=True)
        tokenizer = Tokenizer.from_pretrained(args.model)
        file_of_tokens = Path(args.gates[0].partition("@")[0], "smollm2-valid.safetensors")
        rows = Rows(args.valid, file_of_tokens, tokenizer, args)
        runs = []
        for gates in args.gates:
            gates, _, threshold = gates.partition("@")
            settings = json.loads(Path(gates, "train.json").read_text())["settings"]
            model = FlexiDepth.from_pretrained(args.model, gates, dtype=torch.float32)
            if threshold:
                model.config.threshold = float(threshold)
            table = evaluate(TokenLosses(model), rows, model.config, args)
            depth = mean(table, "layers")
            starts = [int(np.flatnonzero(rows[i].counted)[0]) for i in range(PROMPTS)]
            prompts = [rows[i].ids[:start].tolist() for i, start in enumerate(starts)]
            runs.append({
                "alpha": settings["alpha"], "threshold": model.config.threshold,
                "steps": settings["steps"], "layers": depth,
                "skipped": 1 - depth / model.config.num_hidden_layers,
                "layers_with_prompts": depth_with_prompts(model, rows),
                "base_loss": mean(table, "base_loss"), "loss": mean(table, "loss"),
                "same": mean(table, "same"), "tasks": table,
                "coin_loss": loss_at_random(model, rows, depth, bare=False),
                "bare_loss": loss_at_random(model, rows, depth, bare=True),
                "first_loss": loss_of_first_layers(model, rows, depth),
                "depth": depth_by_kind(model, tokenizer, rows),
                "time": time_of_token(model, prompts)})
            print(json.dumps({key: runs[-1][key] for key in ("alpha", "skipped", "loss", "time")}))
            write_json(file, {"rows": len(rows), "runs": runs})
    made = make_tables(json.loads(file.read_text()))
    for name, table in made.items():
        print(f"{name}\n\n{table}\n")
    if args.readme:
        readme = HERE / "README.md"
        readme.write_text(fill(readme.read_text(), made))


if __name__ == "__main__":
    main()
