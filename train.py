"""Train the routers and adapters of a Llama; the Llama itself stays as it is.

    python train.py                                       # the tiny Llama, about two minutes
    python train.py --model smollm2 --recipe smol --data chat.jsonl
    python train.py --model meta-llama/Meta-Llama-3-8B-Instruct --data tulu.jsonl
    torchrun --nproc-per-node 8 train.py --model ...      # on 8 GPUs

Each line of the data is {"messages": [{"role": "user", "content": ...}, ...]} or {"text": ...}.
A valid.jsonl beside it holds held-out rows, of which a table is made, with a line for each "task"
that rows may have. The folder --out, which all machines of a run have to share, gets

    flexidepth.safetensors    routers and adapters, for sample.py and FlexiDepth.from_pretrained
    train.json                the settings and the table of held-out rows, when the run has ended
    metrics.jsonl             a line a step; steps that were run again after a stop have two
    checkpoint.pt             for --resume; it is deleted when the run has ended

One step: the rows of a batch are sorted by length and cut into micro-batches, which are dealt out
to the processes. Each holds the whole model, and adds up the gradients of L_lm + alpha * L_skip
(see flexidepth.py). L_lm is divided by the tokens of the whole batch that count, L_skip by all its
tokens, so how it is cut does not matter. Then the processes' gradients are added, and AdamW steps.
"""
import argparse
import json
import math
import os
import sys
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import fmean

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.checkpoint import checkpoint

from flexidepth import (
    FlexiDepth, Output, Route, Tokenizer, find_path, layers_used, skip_loss, whole_file)

TINY = Path(__file__).resolve().parent / "tests" / "tiny-llama"
# Defaults of options, and settings that have no option. These are the paper's.
PAPER = dict(
    alpha=1e-3, last_alpha=1.0, lr=1e-4, epochs=3.0, batch_size=64, micro_batch_size=1,
    seq_len=2048, answers_only=False,
    beta2=0.999,         # AdamW's
    clip=0.0,            # the largest norm of the gradients; 0 means no clipping
    towards_base=False,  # ours: L_lm is the divergence (KL) from the base's own predictions
    both_paths=False)    # ours: gates also learn from the path not taken (model.train())
RECIPES = {
    "paper": PAPER,
    # The first stage of the released weights. The second adds --alpha 1e-5 --flexidepth FIRST_OUT.
    "released": PAPER | dict(alpha=1e-4, epochs=1.0, batch_size=32, beta2=0.95, clip=1.0),
    # For a small real model, such as SmolLM2-135M, on a laptop.
    "smol": PAPER | dict(alpha=6e-3, lr=2e-3, epochs=0.176, batch_size=4, micro_batch_size=2,
                         seq_len=256, towards_base=True, both_paths=True, last_alpha=0.1),
    "tiny": PAPER | dict(alpha=3.5e-4, lr=5e-3, epochs=7.35, batch_size=32, micro_batch_size=32,
                         seq_len=256, answers_only=True),
}
# These may differ after --resume, as may the number of processes. Only rounding then differs.
FREE = ("out", "valid", "resume", "device", "save_every", "micro_batch_size",
        "checkpoint_activations")
# torchrun tells each process its place.
WORLD = int(os.environ["WORLD_SIZE"]) if dist.is_torchelastic_launched() else 1
RANK = int(os.environ["RANK"]) if WORLD > 1 else 0


def path(text: str) -> Path:
    return Path(text).expanduser()


def positive_int(text: str) -> int:
    if int(text) < 1:
        raise ValueError
    return int(text)


def non_negative(text: str) -> float:
    if not 0 <= float(text) < math.inf:
        raise ValueError
    return float(text)


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = lambda message: sys.exit(f"train.py: {message}")
    add = parser.add_argument
    add("--model", default=os.path.relpath(TINY), help="folder of a Llama, or a cached hub name")
    add("--data", type=path, help="training rows, JSONL (default: train.jsonl of the model)")
    add("--valid", type=path, help="held-out rows (default: valid.jsonl beside the training rows)")
    add("--out", type=path, default=Path("out"), help="a new folder for the result (default: out)")
    add("--flexidepth", type=path, help="start from these routers and adapters, not random ones")
    add("--resume", action="store_true", help="go on from the last checkpoint in --out, if any")
    add("--seed", type=int, default=0, help="of new routers and of the order of rows (0)")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu, cuda, mps")
    add("--dtype", choices=["float32", "bfloat16"], help="of the base (on a CPU float32)")
    add("--save-every", type=positive_int, default=200, help="steps between checkpoints (200)")
    add("--checkpoint-activations", action="store_true", help="less memory for more time")
    add("--recipe", choices=RECIPES, help="defaults of what follows (default: tiny or paper)")
    add("--alpha", type=non_negative, help="price of depth, the weight of L_skip")
    add("--last-alpha", type=non_negative, help="share of --alpha to which it falls; 1: constant")
    add("--lr", type=non_negative, help="peak learning rate")
    add("--epochs", type=non_negative, help="passes over the data; 0 trains nothing, but evaluates")
    add("--steps", type=positive_int, help="optimiser steps, in place of --epochs")
    add("--batch-size", type=positive_int, help="rows a step, of all processes together")
    add("--micro-batch-size", type=positive_int, help="rows on a device at a time")
    add("--seq-len", type=positive_int, help="longer rows, in tokens, are left out")
    add("--answers-only", action=argparse.BooleanOptionalAction, help="L_lm on answers alone")
    args = parser.parse_args()

    recipe = args.recipe or ("tiny" if Path(args.model).resolve() == TINY else "paper")
    parser.set_defaults(
        recipe=recipe, dtype="float32" if args.device == "cpu" else None, **RECIPES[recipe])
    args = parser.parse_args()  # again, with the recipe's defaults
    if (args.out / "train.json").exists() or (args.out.exists() and not args.resume):
        parser.error(f"{args.out} exists; give another --out, or --resume if its run has not ended")
    return args


# ---- Data ----------------------------------------------------------------------------------------
@dataclass
class Row:
    ids: Tensor      # (T,) int64
    targets: Tensor  # (T,) int64: the ids, but -100 where a token does not count in L_lm
    task: str


def read_jsonl(file: Path) -> Iterator[tuple[str, dict]]:
    """Yield the place and the object of each line. Raises ValueError if a line is not an object."""
    with open(file, "rb") as lines:
        for number, line in enumerate(lines, 1):
            place = f"{file}, line {number}"
            try:
                text = line.decode("utf-8-sig").strip()
                if text:
                    yield place, {**json.loads(text)}  # only an object can be unpacked
            except (ValueError, TypeError, RecursionError) as error:
                raise ValueError(f"{place}: not a JSON object ({str(error)[:100]})") from None


def read_messages(row: dict) -> list[dict]:
    """The messages of a row that have content. A tool call, for example, has none."""
    return [message for message in row.get("messages", []) if (message["content"] or "").strip()]


def tokenize(row: dict, tokenizer: Tokenizer, answers_only: bool) -> Row:
    """A row of JSON as tokens. All tokens of a conversation count in L_lm, or with answers_only
    those of answers alone. A message with "weight": 0 never counts. Raises ValueError if the row is
    not understood."""
    for name in ("conversations", "system", "tools"):
        if row.get(name):
            raise ValueError(f"{name!r} is not read; put all of a conversation into 'messages'")
    ids = []
    targets = []
    if "messages" in row:
        ids += tokenizer.begin_chat
        targets += [-100] * len(ids)
        for message in read_messages(row):
            role = message["role"]
            if role not in ("system", "user", "assistant", "tool"):
                raise ValueError(f"unknown role {role!r}; expected system, user, assistant or tool")
            header, said, rest = tokenizer.encode_message(message)
            for part, is_answer in ((header, False), (said, role == "assistant"), (rest, False)):
                counts = message.get("weight") != 0 and (is_answer or not answers_only)
                ids += part
                targets += part if counts else [-100] * len(part)
    elif row["text"].strip():
        if any(name in row["text"] for name in tokenizer.special):
            raise ValueError("chat markers in a text would be read as plain text; give 'messages'")
        ids += tokenizer.encode(row["text"], bos=True, eos=True)
        targets += ids
    return Row(torch.tensor(ids, dtype=torch.int64), torch.tensor(targets, dtype=torch.int64),
               str(row.get("task") or "all"))


def load_rows(file: Path, tokenizer: Tokenizer, args: argparse.Namespace) -> list[Row]:
    """The rows of a JSONL file that can be trained on. What is left out is counted, and printed."""
    rows = []
    left_out = Counter()
    for place, raw in read_jsonl(file):
        try:
            row = tokenize(raw, tokenizer, args.answers_only)
            empty = len(raw.get("messages", [])) - len(read_messages(raw))
            if empty:
                left_out["messages without content"] += empty
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{place}: not a row of messages or text ({error!r})") from None
        if len(row.ids) > args.seq_len:
            left_out[f"rows of more than --seq-len {args.seq_len} tokens"] += 1
        elif (row.targets[1:] == -100).all():
            left_out["rows without a token that counts"] += 1
        else:
            rows.append(row)
    print(f"{file}: {len(rows)} rows")
    for reason, count in left_out.items():
        print(f"left out {count} {reason}")
    return rows


def plan_batches(count: int, steps: int, batch_size: int, seed: int) -> list[list[int]]:
    """The numbers of every step's rows, out of `count`, the same for the same arguments. Each epoch
    has its own order. Rows that do not fill its last batch are left for other epochs."""
    generator = torch.Generator().manual_seed(seed)
    plan = []
    while len(plan) < steps:
        order = torch.randperm(count, generator=generator)
        plan += order[:count // batch_size * batch_size].view(-1, batch_size).tolist()
    return plan[:steps]


def collate(rows: list[Row], device: str) -> tuple[Tensor, Tensor, Tensor]:
    """Rows as tensors (B, T): input_ids; targets, which are the next tokens, or -100 where they do
    not count; and real, bool, False at padding. Padding comes last: no token attends to it."""
    ids = pad_sequence([row.ids for row in rows], batch_first=True, padding_value=-1)
    targets = pad_sequence([row.targets for row in rows], batch_first=True, padding_value=-100)
    ids = ids.to(device)
    targets = targets.to(device)
    return ids[:, :-1].clamp(min=0), targets[:, 1:], ids[:, 1:] >= 0


# ---- Predictions ---------------------------------------------------------------------------------
def predict(model: FlexiDepth, input_ids: Tensor, route: Route = "learned") -> Output:
    """What the model gives for input_ids (B, T). With route "full" it is the base's output."""
    dtype = model.model.embed_tokens.weight.dtype
    # Routers and adapters are float32. Autocast casts them to the base's dtype.
    with torch.autocast(input_ids.device.type, dtype, enabled=dtype != torch.float32):
        return model(input_ids, route=route)


@torch.no_grad()
def evaluate(model: FlexiDepth, rows: list[Row], args: argparse.Namespace) -> dict[str, dict]:
    """The table of held-out rows, {task: {figure: value}}, for the tokens that count in L_lm:

    base_loss, loss      cross-entropy of the base and of FlexiDepth
    same                 share of tokens for which both find the same token likeliest
    base_exact, exact    share of rows in which every token that counts is the likeliest one
    layers               mean depth: how many layers a token runs, those without a router too"""
    totals = defaultdict(Counter)
    for start in range(0, len(rows), args.micro_batch_size):
        batch = rows[start:start + args.micro_batch_size]
        input_ids, targets, _ = collate(batch, args.device)
        base = predict(model, input_ids, "full")
        out = predict(model, input_ids)
        for i, row in enumerate(batch):
            counted = targets[i] != -100
            answer = targets[i][counted]                                          # (N,)
            base_logits = base.logits[i][counted].float()                         # (N, V)
            logits = out.logits[i][counted].float()                               # (N, V)
            base_best = base_logits.argmax(-1)
            best = logits.argmax(-1)
            totals[row.task].update(
                rows=1,
                tokens=len(answer),
                base_loss=F.cross_entropy(base_logits, answer, reduction="sum").item(),
                loss=F.cross_entropy(logits, answer, reduction="sum").item(),
                same=(best == base_best).sum().item(),
                base_exact=torch.equal(base_best, answer),
                exact=torch.equal(best, answer),
                layers=layers_used(out.kept[i][counted], model.config).sum().item())

    for total in totals.values():
        for name in total.keys() - {"rows", "tokens"}:
            total[name] /= total["rows" if "exact" in name else "tokens"]
    return totals


COLUMNS = {"rows": "12.0f", "base_loss": "12.4f", "loss": "12.4f", "same": "12.1%",
           "base_exact": "12.1%", "exact": "12.1%", "layers": "12.2f"}


def print_table(table: dict[str, dict], num_layers: int) -> None:
    """What `evaluate` found, lowest depth first, and the mean over tasks."""
    mean = {name: fmean(line[name] for line in table.values()) for name in COLUMNS}
    lines = sorted(table.items(), key=lambda item: item[1]["layers"])
    width = max(len("task mean"), *map(len, table))
    print(f"\n{'task':{width}}" + "".join(f"{name:>12}" for name in COLUMNS))
    for task, line in [*lines, ("task mean", mean)]:
        cells = [f"{line[name]:{form}}" for name, form in COLUMNS.items()]
        print(f"{task:{width}}{''.join(cells)}")
    print(f"{1 - mean['layers'] / num_layers:.1%} of all layers skipped")


def load_checkpoint(file: Path) -> dict:
    """What main saved. Raises ValueError if the file is not of this program."""
    try:
        saved = torch.load(file, map_location="cpu", weights_only=True)
        return {name: saved[name] for name in ("step", "run", "trained", "optimizer")}
    except Exception as error:  # another program's file may fail in any way
        raise ValueError(f"{file}: not a checkpoint of train.py ({str(error)[:60]})") from None


# ---- Training ------------------------------------------------------------------------------------
def main() -> None:
    args = parse_args()
    torch.manual_seed(args.seed)
    if WORLD > 1:
        if RANK > 0:
            sys.stdout = open(os.devnull, "w")  # the first process prints for all
        if args.device == "cuda":
            args.device = f"cuda:{os.environ['LOCAL_RANK']}"
            torch.cuda.set_device(args.device)
        dist.init_process_group()

    dtype = args.dtype and getattr(torch, args.dtype)
    model = FlexiDepth.from_pretrained(args.model, args.flexidepth, device=args.device, dtype=dtype)
    model.train(args.both_paths)  # there is no dropout, so it means nothing else
    config = model.config
    if args.checkpoint_activations:
        for index in config.routing_layers:
            layer = model.model.layers[index]
            layer.forward = partial(checkpoint, layer.forward, use_reentrant=False)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    for p in trained.values():
        p.data = p.data.float()  # bfloat16 would lose small updates
        p.grad = torch.zeros_like(p)  # all_reduce needs one, even if no token took its path
        if WORLD > 1:
            dist.broadcast(p.data, src=0)
    optimizer = torch.optim.AdamW(
        trained.values(), lr=args.lr, betas=(0.9, args.beta2), weight_decay=0.0, fused=True)

    tokenizer = Tokenizer.from_pretrained(args.model)
    data = args.data or find_path(args.model) / "train.jsonl"
    beside = data.with_name("valid.jsonl")
    if args.valid is None and beside.is_file() and not beside.samefile(data):
        args.valid = beside
    args.seq_len = min(args.seq_len, config.max_position_embeddings)
    rows = load_rows(data, tokenizer, args)
    held_out = load_rows(args.valid, tokenizer, args) if args.valid else []
    if len(rows) < args.batch_size:
        raise ValueError(f"{data}: {len(rows)} rows to use; --batch-size has to be smaller")
    steps = args.steps or math.ceil(args.epochs * (len(rows) // args.batch_size))
    plan = plan_batches(len(rows), steps, args.batch_size, args.seed)

    # What has to be the same in all processes, and in a run that goes on.
    run = {name: str(value) for name, value in vars(args).items() if name not in FREE}
    run["config"] = str(config)
    tokens = sum(len(row.ids) for row in rows)
    run["data"] = f"{len(rows)} rows of {tokens} tokens"
    saved = [{"run": run, "step": 0}]  # nothing is saved yet
    checkpoint_file = args.out / "checkpoint.pt"
    if RANK == 0:
        args.out.mkdir(parents=True, exist_ok=args.resume)
        if checkpoint_file.is_file():
            saved = [load_checkpoint(checkpoint_file)]
    if WORLD > 1:  # the first process has read the checkpoint for all of them
        dist.broadcast_object_list(saved)
    for name, value in saved[0]["run"].items():
        if run.get(name) != value:
            raise ValueError(f"{args.out} is of another run, or of another process: its {name} was "
                             f"{value:.60}, here it is {str(run.get(name)):.60}")
    begin = saved[0]["step"]
    if begin:
        model.load_state_dict(saved[0]["trained"], strict=False)
        optimizer.load_state_dict(saved[0]["optimizer"])
    print(f"{args.model}: recipe {args.recipe}, routed layers {config.routing_layers} of "
          f"{config.num_hidden_layers}, steps {begin + 1} to {steps}")

    for step in range(begin + 1, steps + 1):
        # The learning rate rises over 3 % of the steps. Along a cosine it and alpha then fall.
        cosine = (1 + math.cos(math.pi * (step - 1) / steps)) / 2
        lr = args.lr * min(step / (0.03 * steps), cosine)
        optimizer.param_groups[0]["lr"] = lr
        fall = (1 - args.last_alpha) * (1 - cosine)
        alpha = args.alpha * (1 - fall)

        # Rows of like length share a micro-batch. Each process takes every WORLD-th one.
        batch = [rows[i] for i in plan[step - 1]]
        batch.sort(key=lambda row: len(row.ids))
        starts = range(0, len(batch), args.micro_batch_size)[RANK::WORLD]
        real_tokens = sum(len(row.ids) - 1 for row in batch)
        counted_tokens = sum((row.targets[1:] != -100).sum().item() for row in batch)
        figures = torch.zeros(3, device=args.device)  # L_lm, L_skip, mean depth
        for start in starts:
            micro_batch = batch[start:start + args.micro_batch_size]
            input_ids, targets, real = collate(micro_batch, args.device)
            counted = targets != -100
            logits, gates, kept = predict(model, input_ids)
            logits = logits[counted].float()                                      # (N, V)
            if args.towards_base:
                with torch.no_grad():
                    base_logits = predict(model, input_ids, "full").logits[counted].float()
                loss = F.kl_div(logits.log_softmax(-1), base_logits.log_softmax(-1),
                                reduction="sum", log_target=True)
            else:
                loss = F.cross_entropy(logits, targets[counted], reduction="sum")
            lm_loss = loss / counted_tokens                                # its part of L_lm
            gate_loss = skip_loss(gates, real) * real.sum() / real_tokens  # its part of L_skip
            (lm_loss + alpha * gate_loss).backward()
            depth = layers_used(kept[real], config).sum() / real_tokens
            figures += torch.stack([lm_loss, gate_loss, depth]).detach()
        if WORLD > 1:
            for tensor in (figures, *(p.grad for p in trained.values())):
                dist.all_reduce(tensor)

        clip = args.clip or math.inf
        norm = torch.nn.utils.clip_grad_norm_(trained.values(), clip).item()
        lm, skip, layers = figures.tolist()
        if not math.isfinite(lm + skip + norm):
            base_logits = predict(model, collate(batch[:1], args.device)[0], "full").logits
            advice = "a lower --lr may help, in a new --out"
            if not base_logits.isfinite().all():
                advice = "the base's own logits are not finite"
            raise ValueError(f"step {step}: losses {lm} and {skip}, gradient norm {norm}; {advice}")
        optimizer.step()
        optimizer.zero_grad(set_to_none=False)

        if RANK == 0:
            note = {"step": step, "lm_loss": lm, "skip_loss": skip, "layers": layers,
                    "grad_norm": norm, "lr": lr}
            with open(args.out / "metrics.jsonl", "a") as file:
                print(json.dumps(note), file=file)
            if step % args.save_every == 0 or step == steps:
                with whole_file(checkpoint_file) as temporary:
                    torch.save({"step": step, "run": run, "trained": trained,
                                "optimizer": optimizer.state_dict()}, temporary)
        if step % max(1, steps // 50) == 0 or step in (1, steps):
            print(f"step {step}/{steps}  loss {lm:.4f}  skip loss {skip:.3f}  "
                  f"layers used {layers:.2f}", flush=True)

    # Routers and adapters are written before the table is made, which may take long.
    if RANK == 0:
        model.save_flexidepth(args.out)
    model.eval()
    table = evaluate(model, held_out, args)  # in every process, so that none waits and times out
    if table:
        print_table(table, config.num_hidden_layers)
    if RANK == 0:
        result = {"settings": vars(args), "valid": table}
        with whole_file(args.out / "train.json") as temporary:
            temporary.write_text(json.dumps(result, indent=2, default=str), encoding="utf-8")
        checkpoint_file.unlink(missing_ok=True)
    print(f"wrote {args.out}")
    if WORLD > 1:
        dist.destroy_process_group()


if __name__ == "__main__":
    try:
        main()
    except (OSError, ValueError, RuntimeError, AssertionError) as error:  # the last two are torch's
        advice = ""
        if "allocate" in str(error):
            advice = "; a smaller --micro-batch-size or --checkpoint-activations needs less memory"
        sys.exit(f"train.py: {' '.join(str(error).split())[:500]}{advice}")
    except KeyboardInterrupt:
        sys.exit("\ntrain.py: interrupted; --resume goes on from the last checkpoint, if any")
