"""The paper's tables in small: FlexiDepth on the tiny Llama beside other ways to skip, and without its parts.

    python tests/reproduce.py                  # all of them: 72 runs, two bases to train among them
    python tests/reproduce.py --only router    # just the runs with this in their names
    python tests/reproduce.py --seeds 1 --steps 30 --out quick.json
    python tests/reproduce.py --readme         # put the tables into README.md too

The figures of a run go to --out as soon as it ends, and no run that is there is run again: an interrupted
command goes on, a finished one prints its tables. Smaller Llamas are made in out/siblings.
"""
import argparse
import copy
import functools
import itertools
import json
import math
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from statistics import fmean, pstdev, stdev

import torch
import torch.nn.functional as F
from torch import Tensor, nn

HERE = Path(__file__).resolve().parent
OUT = HERE.parent / "out" / "siblings"
sys.path.insert(0, str(HERE.parent))
from flexidepth import (  # noqa: E402
    TRAINED, Attention, DecoderLayer, FlexiDepth, Tokenizer, layers_used, rotate, skip_loss)
from train import collate, tokenize  # noqa: E402

# The recipe of the tiny Llama in train.py, in a third of its steps, at three times its price (see `alpha`).
STEPS, ALPHA, LR, BATCH, WARM_UP, CALIBRATION = 300, 1.1e-3, 5e-3, 32, 0.03, 128
ALPHAS, SIBLING_ALPHAS = [3.5e-5, 1.1e-4, 3.5e-4, 1.1e-3, 3.5e-3, 3.5e-2], [1.1e-4, 3.5e-4, 1.1e-3, 3.5e-3]
# Layers, width, and how the base is trained: steps, rows a step. The tiny Llama is there already.
TINY, BASES = "12x96", {"12x96": (12, 96, 2000, 96), "6x96": (6, 96, 1200, 32), "8x48": (8, 48, 1500, 48)}
EASY, TASKS = ("phrase", "repeat", "copy"), ("phrase", "repeat", "copy", "story", "add", "multiply")
LEARNED = ("random, adapters trained", "attention only, by sequence")  # other ways to skip


# ---- Rows, and the states that the frozen plain layers make of them

@dataclass
class Data:
    input_ids: Tensor  # (N, T), rows in order of their length
    targets: Tensor    # (N, T), -100 where no answer is due
    real: Tensor       # (N, T), False at padding
    tasks: list[str]

    def __getitem__(self, rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """input_ids, targets and real of some rows, no longer than the longest of them."""
        length = int(self.real[rows].sum(1).max())
        return tuple(each[rows, :length] for each in (self.input_ids, self.targets, self.real))

    def parts(self) -> tuple[Tensor, ...]:
        return torch.arange(len(self.tasks)).split(256)


def read(folder: Path, name: str) -> Data:
    tokenizer, lines = Tokenizer.from_pretrained(folder), (folder / f"{name}.jsonl").read_text().splitlines()
    rows = [tokenize(json.loads(line), tokenizer, True) for line in lines]
    rows.sort(key=lambda row: len(row.ids))
    return Data(*collate(rows, "cpu"), [row.task for row in rows])


@functools.cache
def states(folder: Path) -> tuple[Data, Data, Tensor]:
    """Rows of train and valid whose input_ids are places in a table (places, D): what enters the first routed
    layer there. The layers below it are frozen and run for all tokens, so they need to run only once."""
    model, found, tables = FlexiDepth.from_pretrained(folder), [], []
    model.model["layers"] = model.model["layers"][:model.config.routing_layers[0]]
    model.model["norm"] = nn.Identity()
    for data in (read(folder, "train"), read(folder, "valid")):
        table, start = torch.zeros(*data.real.shape, model.config.hidden_size), sum(map(len, tables))
        for rows in data.parts():
            input_ids, *_ = data[rows]
            with torch.no_grad():
                table[rows, :input_ids.shape[1]] = model.hidden_states(input_ids, route="full")[0]
        places = start + torch.arange(data.real.numel()).view(data.real.shape)
        found.append(Data(places, data.targets, data.real, data.tasks))
        tables.append(table.flatten(0, 1))
    return *found, torch.cat(tables)


def routed_part(folder: Path, seed: int) -> FlexiDepth:
    """The routed layers alone, with new routers and adapters. The embedding is the table of states."""
    torch.manual_seed(seed)
    model = FlexiDepth.from_pretrained(folder)
    words = model.model["embed_tokens"].weight
    model.lm_head = nn.Linear(*reversed(words.shape), bias=False)
    model.lm_head.weight = words
    model.model["embed_tokens"] = nn.Embedding.from_pretrained(states(folder)[2])
    model.model["layers"] = model.model["layers"][model.config.routing_layers[0]:]
    return model


# ---- Training and measuring. A route may depend on the batch: it is made by route_of(targets, real)

def learned(targets: Tensor, real: Tensor) -> str:
    return "learned"


def full(targets: Tensor, real: Tensor) -> str:
    return "full"


def batches(data: Data, steps: int, seed: int) -> Iterator[Tensor]:
    """Row numbers of each step: epochs in random order, eight batches at a time sorted by length."""
    generator, N = torch.Generator().manual_seed(seed), len(data.tasks)
    epochs = [torch.randperm(N, generator=generator) for _ in range(-(-steps * BATCH // N))]
    for pool in torch.cat(epochs)[:steps * BATCH].split(8 * BATCH):
        parts = pool.sort().values.split(BATCH)
        yield from (parts[i] for i in torch.randperm(len(parts), generator=generator))


def train(model: FlexiDepth, data: Data, alpha: float, steps: int, seed: int, penalty: Callable = skip_loss,
          route_of: Callable = learned) -> None:
    """Routers and adapters, and only they: L = L_lm + alpha * penalty(gates, real)."""
    for name, p in model.named_parameters():
        p.requires_grad_(bool(TRAINED.match(name)))
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=LR, weight_decay=0, fused=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(
        (step + 1) / (WARM_UP * steps), (1 + math.cos(math.pi * step / steps)) / 2))
    for rows in batches(data, steps, seed):
        input_ids, targets, real = data[rows]
        counted = targets != -100
        x, gates, _ = model.hidden_states(input_ids, route=route_of(targets, real))
        loss = F.cross_entropy(model.head(x[counted]), targets[counted]) + alpha * penalty(gates, real)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()


@torch.inference_mode()
def measure(model: FlexiDepth, data: Data, route_of: Callable = learned) -> dict:
    """By task: exact match, and of the tokens of the answers layers used, their spread and means by position.
    Greedy decoding gives a row's answer just if each of its tokens is the likeliest after those before it."""
    exact, tokens, everywhere = {task: [] for task in TASKS}, {task: [] for task in TASKS}, []
    for rows in data.parts():
        input_ids, targets, real = data[rows]
        counted, missed = targets != -100, torch.zeros_like(real)
        x, _, kept = model.hidden_states(input_ids, route=route_of(targets, real))
        missed[counted] = model.head(x[counted]).argmax(-1) != targets[counted]
        depth = real * len(model.model["layers"]) if kept is None else layers_used(kept, model.config)
        everywhere += depth[real].tolist()
        for i, row in enumerate(rows.tolist()):
            used = depth[i, counted[i]].tolist()
            exact[data.tasks[row]].append(not missed[i].any())
            tokens[data.tasks[row]] += zip([*map(str, range(1, len(used))), "end"], used)
    layers = {task: [used for _, used in found] for task, found in tokens.items()}
    positions = {task: {at: fmean(used for place, used in found if place == at)
                        for at in (*"123456", "end") if any(place == at for place, _ in found)}
                 for task, found in tokens.items()}
    return {"exact": {task: fmean(each) for task, each in exact.items()},
            "layers": {task: fmean(each) for task, each in layers.items()},
            "spread": {task: pstdev(each) for task, each in layers.items()},
            "positions": positions, "layers_with_prompt": fmean(everywhere)}


# ---- Parts removed

class KeptKeys(Attention):
    """No keys and values of tokens that skip: later ones attend to those before them that run this layer."""
    def forward_kept(self, h, k, v, rotation, kept):
        T = h.shape[1]
        q = self.q_proj(h).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)     # (B, H, T, d)
        mask = h.new_ones(T, T, dtype=torch.bool).tril() & kept[:, None, None]    # (B, 1, T, T)
        mask = mask | torch.eye(T, dtype=torch.bool)  # queries of tokens that skip, not read, need a key too
        out = F.scaled_dot_product_attention(rotate(q, rotation), k, v, mask, enable_gqa=True)
        return self.o_proj(out.transpose(1, 2).flatten(2)[kept])                  # (N, D)


class LinearRouter(nn.Linear):
    def __init__(self, config):
        super().__init__(config.hidden_size, 1, bias=False)

    def forward(self, h):
        return super().forward(h).squeeze(-1)                                     # (B, T)


class NoAdapter(nn.Module):
    def forward(self, x):
        return torch.zeros_like(x)


class StraightThrough(DecoderLayer):
    """No factors g and 1 - g: the decision, 0 or 1, chooses a path, and passes its gradient on to g."""
    def forward(self, x, rotation, cache, route):
        full, _, _ = super().forward(x, rotation, cache, "full")
        skip = x + self.router_proj(self.post_attention_layernorm(x))
        gate = torch.sigmoid(self.router(self.input_layernorm(x)))                # (B, T)
        hard = straight_through(gate, self.config.threshold)[..., None]
        return hard * full + (1 - hard) * skip, gate, gate > self.config.threshold


def straight_through(gate: Tensor, threshold: float) -> Tensor:
    """The value of the decision, with the gradient of the gate."""
    return (gate > threshold).float() + gate - gate.detach()


def linear_penalty(gates: Tensor, mask: Tensor) -> Tensor:
    return gates.sum(-1)[mask].mean()


def become(new: nn.Module, old: nn.Module) -> nn.Module:
    """A module of another class, with the parameters of the old one."""
    new.load_state_dict(old.state_dict())
    return new


def removed(model: FlexiDepth, part: str) -> FlexiDepth:
    layers, config = model.model["layers"], model.config
    for i, layer in [(i, layer) for i, layer in enumerate(layers) if layer.router is not None]:
        if part == "no K, V for skipped tokens":
            layer.self_attn = become(KeptKeys(config), layer.self_attn)
        elif part == "linear router":
            layer.router = LinearRouter(config)
        elif part == "no adapter":
            layer.router_proj = NoAdapter()
        elif part == "no factors g, 1 - g":
            layers[i] = become(StraightThrough(config, layer.index), layer)
    return model


PARTS = {  # name: (kept in the paper, penalty, its price over alpha)
    "full": ("102.1", skip_loss, 1), "no K, V for skipped tokens": ("84.3", skip_loss, 1),
    "linear router": ("68.7", skip_loss, 1), "no adapter": ("28.1", skip_loss, 1),
    "no factors g, 1 - g": ("", skip_loss, 1), "linear penalty": ("", linear_penalty, 1),
    "linear penalty, 3 alpha": ("", linear_penalty, 3)}


def run_flexidepth(folder: Path, steps: int, seed: int, alpha: float, part: str = "full") -> dict:
    model, (_, penalty, price), (rows, valid, _) = routed_part(folder, seed), PARTS[part], states(folder)
    train(removed(model, part), rows, alpha * price, steps, seed, penalty)
    return measure(model, valid)


# ---- Other ways to skip

class BareLayer(DecoderLayer):
    """The base's layer for tokens that the route keeps, nothing for others: no adapter, no factor."""
    def forward(self, x, rotation, cache, route):
        full, _, _ = super().forward(x, rotation, cache, "full")
        kept = route(self.index, x[..., 0])                                       # (B, T)
        return torch.where(kept[..., None], full, x), kept, kept


class AttentionOnly(DecoderLayer):
    """MindSkip: the mean gate over a row's prompt says if it runs the attention. The mlp always runs."""
    def forward(self, x, rotation, cache, route):
        h = self.input_layernorm(x)
        gate = route(self.index, torch.sigmoid(self.router(h)))                   # (B, T), the same in a row
        hard = straight_through(gate, self.config.threshold)
        x = x + hard[..., None] * self.self_attn(h, *self.self_attn.keys_values(h, rotation), rotation)
        return x + self.mlp(self.post_attention_layernorm(x)), hard, gate > self.config.threshold


def by_prompt(targets: Tensor, real: Tensor) -> Callable:
    """A route that gives every token of a row the mean gate over its prompt."""
    prompt = real & ((targets != -100).cumsum(1) <= 1)  # its last token predicts the first of the answer
    return lambda layer, gate: ((gate * prompt).sum(1) / prompt.sum(1))[:, None].expand_as(gate)


def at_random(rate: float, seed: int) -> Callable:
    """A coin for every token and layer, for all batches."""
    generator = torch.Generator().manual_seed(seed)
    return lambda targets, real: lambda layer, gate: torch.rand(gate.shape, generator=generator) < rate


def block_influence(model: FlexiDepth, input_ids: Tensor, real: Tensor) -> list[float]:
    """Of every layer 1 - cos(input, output), mean over real tokens (ShortGPT)."""
    found = []

    def hook(layer, given, out):
        found.append(1 - F.cosine_similarity(given[0], out[0], dim=-1)[real].mean().item())
    hooks = [layer.register_forward_hook(hook) for layer in model.model["layers"]]
    model.hidden_states(input_ids, route="full")
    for handle in hooks:
        handle.remove()
    return found


def merged(layers: nn.ModuleList, first: int, count: int) -> nn.ModuleList:
    """`count` layers in a row made one: the first's parameters plus the others' differences (LaCo)."""
    one = copy.deepcopy(layers[first])
    for name, p in one.named_parameters():
        p.data = p + sum(layer.get_parameter(name) - p for layer in layers[first + 1:first + count])
    return nn.ModuleList([*layers[:first], one, *layers[first + count:]])


@torch.no_grad()
def run_untrained(folder: Path, steps: int, seed: int, depth: float) -> dict:
    """The base at a mean of `depth` layers. Where a method has whole numbers n of layers, rows get n or n + 1
    of them, in shares that give the mean: expected exact match is the mean of both by these shares."""
    model, valid, rows = FlexiDepth.from_pretrained(folder), read(folder, "valid"), read(folder, "train")
    layers, routed, L = model.model["layers"], model.config.routing_layers, model.config.num_hidden_layers
    chosen = torch.randperm(len(rows.tasks), generator=torch.Generator().manual_seed(seed))[:CALIBRATION]
    input_ids, _, real = rows[chosen]
    influence = block_influence(model, input_ids, real)
    whole = model.hidden_states(input_ids, route="full")[0][real]

    def with_layers(chosen, function: Callable, *arguments):
        model.model["layers"] = nn.ModuleList(chosen)
        result = function(*arguments)
        model.model["layers"] = layers
        return result

    def likeness() -> float:
        x = model.hidden_states(input_ids, route="full")[0][real]
        return F.cosine_similarity(whole, x, dim=-1).mean().item()

    def last_dropped(n: int) -> nn.ModuleList:
        return layers[:n]

    def influential(n: int) -> list:
        best = sorted(range(L), key=lambda i: -influence[i])[:n]
        return [layers[i] for i in sorted(best)]

    def most_alike(n: int) -> nn.ModuleList:
        candidates = [merged(layers, i, L - n + 1) for i in range(n)]
        return max(candidates, key=lambda candidate: with_layers(candidate, likeness))
    result, n = {"influence": influence}, int(depth)
    for method, choose in {"last layers dropped": last_dropped, "layers dropped by influence": influential,
                           "layers merged": most_alike}.items():
        few, more = (with_layers(choose(m), measure, model, valid, full)["exact"] for m in (n, n + 1))
        result[method] = {"exact": {task: few[task] + (depth - n) * (more[task] - few[task]) for task in few}}
    for i in routed:
        layers[i] = become(BareLayer(model.config, i), layers[i])
    return result | {"random": measure(model, valid, at_random(1 - (L - depth) / len(routed), seed))}


def run_trained(folder: Path, steps: int, seed: int, method: str, depth: float) -> dict:
    """Ways to skip that learn, at a mean of `depth` layers."""
    model, (rows, valid, _) = routed_part(folder, seed), states(folder)
    layers, config = model.model["layers"], model.config
    rate = 1 - (config.num_hidden_layers - depth) / len(layers)
    if method == "random, adapters trained":
        train(model, rows, 0, steps, seed, route_of=at_random(rate, seed))
        return measure(model, valid, at_random(rate, seed + 1000))
    for i, layer in enumerate(layers):
        layers[i] = become(AttentionOnly(config, layer.index), layer)
    train(model, rows, 10, steps, seed, lambda gates, real: (gates[real].mean() - rate).square(), by_prompt)
    return measure(model, valid, by_prompt)


# ---- Runs

def run_base(folder: Path, steps: int, seed: int, layers: int, width: int, base_steps: int, rows: int):
    """The figures of a base, which is made if it is not there."""
    if not (folder / "model.safetensors").is_file():
        part = folder.with_suffix(".part")
        options = {"--out": part, "--layers": layers, "--hidden-size": width, "--rows": rows, "--seed": seed,
                   "--steps": base_steps * steps // STEPS}
        command = [sys.executable, HERE / "make_tiny_llama.py", *itertools.chain(*options.items())]
        subprocess.run([*map(str, command)], check=True, stdout=subprocess.DEVNULL,
                       env=os.environ | {"OMP_NUM_THREADS": "1"})  # a core each, as all runs have
        part.rename(folder)
    model = FlexiDepth.from_pretrained(folder)
    size = sum(p.numel() for name, p in model.named_parameters() if not TRAINED.match(name))
    up = [layer.mlp.up_proj.weight.flatten() for layer in model.model["layers"]]
    # Merging layers relies on neighbours being alike.
    alike = [F.cosine_similarity(a, b, dim=0).item() for a, b in itertools.pairwise(up)]
    return {"parameters": size, "neighbours": alike} | measure(model, read(folder, "valid"), full)


def plan(settings: dict, depths: list[float] | None = None) -> list[tuple]:
    """(name, function, arguments after folder, steps and seed) of the runs that need no other; given the mean
    depth of every seed's FlexiDepth, of those that need this depth or the smaller bases."""
    jobs, siblings = [], [base for base in BASES if base != TINY]
    if depths is None:
        jobs = [(f"{base}/base/0", run_base, BASES[base]) for base in BASES]
    for seed in range(settings["seeds"]):
        if depths is None:
            jobs += [(f"{TINY}/alpha {alpha:g}/{seed}", run_flexidepth, (alpha,)) for alpha in ALPHAS]
            jobs += [(f"{TINY}/{part}/{seed}", run_flexidepth, (ALPHA, part)) for part in PARTS][1:]
        else:
            jobs += [(f"{TINY}/untrained/{seed}", run_untrained, (depths[seed],))]
            jobs += [(f"{TINY}/{method}/{seed}", run_trained, (method, depths[seed])) for method in LEARNED]
            jobs += [(f"{base}/alpha {alpha:g}/{seed}", run_flexidepth, (alpha,))
                     for base in siblings for alpha in SIBLING_ALPHAS]
    return jobs


def start_worker() -> None:
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)  # a tenth faster: Adam's means of a router that has closed are tiny


def run(jobs: list[tuple], results: dict, out: Path, workers: int) -> None:
    """Those of the jobs that are not in the results yet."""
    runs, steps, started, futures = results["runs"], results["settings"]["steps"], time.time(), {}
    with ProcessPoolExecutor(workers, get_context("spawn"), start_worker) as pool:
        for name, function, arguments in [job for job in jobs if job[0] not in runs]:
            base, _, seed = name.split("/")
            folder = HERE / "tiny-llama" if base == TINY else OUT / f"{base}-{steps}"
            futures[pool.submit(function, folder, steps, int(seed), *arguments)] = name
        for done, future in enumerate(as_completed(futures), 1):
            runs[futures[future]] = rounded(future.result())
            write(out, results)
            print(f"{time.time() - started:5.0f} s  {futures[future]}, {done} of {len(futures)}", flush=True)


def rounded(value):
    if isinstance(value, dict):
        return {key: rounded(each) for key, each in value.items()}
    return [*map(rounded, value)] if isinstance(value, list) else round(value, 5)


def write(file: Path, results: dict) -> None:
    """A run a line, by name. The file is whole at any time."""
    runs = [f"  {json.dumps(name)}: {json.dumps(run)}" for name, run in sorted(results["runs"].items())]
    text = ",\n".join(runs)
    replace(file, f'{{"settings": {json.dumps(results["settings"])},\n "runs": {{\n{text}\n }}}}\n')


def replace(file: Path, text: str) -> None:
    part = file.with_name(f".{file.name}.part")
    part.write_text(text)
    part.replace(file)


# ---- Tables. Kept: exact match over the base's, mean over tasks, percent. Spreads: standard deviations

def depth_of(result: dict) -> float:
    """Layers used by the tokens of the answers, mean over tasks."""
    return fmean(result["layers"].values())


def kept_of(result: dict, base: dict) -> float:
    return 100 * fmean(result["exact"][task] / base["exact"][task] for task in TASKS)


def over_seeds(values: list[float], digits: int = 2) -> str:
    return f"{fmean(values):.{digits}f}" + (f" ± {stdev(values):.{digits}f}" if len(values) > 1 else "")


def markdown(head: list[str], rows: list[list[str]]) -> str:
    return "\n".join(f"| {' | '.join(row)} |" for row in [head, ["---"] * len(head), *rows])


def of(results: dict, what: str, base: str = TINY) -> list[dict]:
    """The runs of all seeds."""
    return [results["runs"][f"{base}/{what}/{seed}"] for seed in range(results["settings"]["seeds"])]


def quality(results: dict, found: list[dict], depths: list[dict]) -> list[str]:
    """Cells: kept, layers used, exact match of every task."""
    base = results["runs"][f"{TINY}/base/0"]
    return [over_seeds([kept_of(each, base) for each in found], 1), over_seeds([*map(depth_of, depths)]),
            *(f"{100 * fmean(each['exact'][task] for each in found):.1f}" for task in TASKS)]


def skipping(results: dict) -> str:
    default, untrained = of(results, f"alpha {ALPHA:g}"), of(results, "untrained")
    base = results["runs"][f"{TINY}/base/0"]
    rows = [["the base", "100", *quality(results, [base], [base])],
            ["FlexiDepth", "100.7", *quality(results, default, default)]]
    for label, paper, name in (
            ("attention only, by sequence (MindSkip)", "60.2", "attention only, by sequence"),
            ("random", "", "random"), ("random, adapters trained", "", "random, adapters trained"),
            ("layers merged (LaCo)", "65.3", "layers merged"),
            ("last layers dropped (LayerSkip)", "43.9", "last layers dropped"),
            ("layers dropped by influence (ShortGPT)", "32.0", "layers dropped by influence")):
        found = [each[name] for each in untrained] if name in untrained[0] else of(results, name)
        rows.append([label, paper, *quality(results, found, found if "layers" in found[0] else default)])
    return markdown(["", "paper: kept, %", "kept, %", "layers used", *TASKS], rows)


def parts(results: dict) -> str:
    rows = []
    for part, (paper, *_) in PARTS.items():
        found = of(results, f"alpha {ALPHA:g}" if part == "full" else part)
        rows.append([part, paper, *quality(results, found, found)])
    return markdown(["", "paper: kept, %", "kept, %", "layers used", *TASKS], rows)


def depth(results: dict) -> str:
    found, plain, rows = of(results, f"alpha {ALPHA:g}"), BASES[TINY][0] // 2, []
    paper = {"repeat": 20.09, "copy": 21.95, "add": 22.45, "multiply": 23.90}  # of 32, 16 of them routed
    for task in sorted(TASKS, key=lambda task: fmean(each["layers"][task] for each in found)):
        layers, at = [each["layers"][task] for each in found], [each["positions"][task] for each in found]
        rows.append([task, over_seeds(layers), f"{fmean(each['spread'][task] for each in found):.2f}",
                     f"{100 * (fmean(layers) - plain) / plain:.0f}",
                     f"{100 * (paper[task] - 16) / 16:.0f}" if task in paper else "",
                     *(f"{fmean(each[place] for each in at):.1f}" if place in at[0] else ""
                       for place in (*"123456", "end"))])
    return markdown(["task", "layers used", "spread of tokens", "routed layers run, %", "the same, paper",
                     "token 1", *"23456", "end"], rows)


def chance_of_order(rows: list[list[float]]) -> float:
    """Page's test, exact: how often rows in random orders rise from left to right as much as these do."""
    ranks = [[1 + sum(other < value for other in row) for value in row] for row in rows]

    def score(table) -> float:
        return sum(j * rank for row in table for j, rank in enumerate(row))
    orders = itertools.permutations(range(1, len(rows[0]) + 1))
    return fmean(score(table) >= score(ranks) for table in itertools.product([*orders], repeat=len(rows)))


def by_size(results: dict) -> list[str]:
    """The tiny Llama, and siblings whose runs are all there, largest first."""
    runs = {name for name, *_ in plan(results["settings"], [0] * results["settings"]["seeds"])}
    lacking = {name.split("/")[0] for name in runs - results["runs"].keys()}
    lacking |= {base for base in BASES if f"{base}/base/0" not in results["runs"]}
    there = [base for base in BASES if base == TINY or base not in lacking]
    return sorted(there, key=lambda base: -results["runs"][f"{base}/base/0"]["parameters"])


def order(results: dict) -> str:
    rows = []
    for base, price in itertools.product(by_size(results), (3.5e-4, ALPHA)):
        found = [each["layers"] for each in of(results, f"alpha {price:g}", base)]
        table = [[fmean(each[task] for task in EASY), each["add"], each["multiply"]] for each in found]
        steps = [[row[j + 1] - row[j] for row in table] for j in range(2)]
        finer = [[each[task] for task in ("repeat", "copy", "add", "multiply")] for each in found]
        rows.append([base.replace("x", " x "), f"{price:g}", *(over_seeds(column) for column in zip(*table)),
                     *(f"{over_seeds(step)} ({sum(d > 0 for d in step)} of {len(step)})" for step in steps),
                     f"{chance_of_order(table):.3f}", f"{chance_of_order(finer):.3f}"])
    return markdown(["layers x width", "alpha", "easy", "add", "multiply", "add - easy", "multiply - add",
                     "p", "p of four"], rows)


def alpha(results: dict) -> str:
    rows, points, base = [], [], results["runs"][f"{TINY}/base/0"]
    for letter, price in zip("abcdefgh", ALPHAS):
        found = of(results, f"alpha {price:g}")
        exact = [100 * fmean(each["exact"].values()) for each in found]
        points += [(letter, depth_of(each), y) for each, y in zip(found, exact)]
        rows.append([letter, f"{price:g}", over_seeds([depth_of(each) for each in found]),
                     over_seeds([each["layers_with_prompt"] for each in found]), over_seeds(exact, 1),
                     over_seeds([kept_of(each, base) for each in found], 1)])
    return (markdown(["", "alpha", "layers used", "with the prompt", "exact match, %", "kept, %"], rows)
            + f"\n\n```\n{plot(points, BASES[TINY][0] // 2, BASES[TINY][0])}\n```")


def plot(points: list[tuple[str, float, float]], low: int, high: int) -> str:
    """Letters at x from low to high and y from a multiple of ten to 100."""
    least = min(90, 10 * int(min(y for *_, y in points) // 10))
    across, grid = 10 * (high - low), [[" "] * (10 * (high - low) + 1) for _ in range(11)]
    for letter, x, y in points:
        grid[round(10 * (100 - y) / (100 - least))][round(across * (x - low) / (high - low))] = letter
    lines = [f"{100 - (100 - least) * i / 10:>5g} |{''.join(row)}".rstrip() for i, row in enumerate(grid)]
    ticks = "".join(f"{x:<10}" for x in range(low, high + 1)).rstrip()
    lines += [f"      +{'-' * (across + 1)}", f"       {ticks}  layers used"]
    return "\n".join(["exact match, %", *lines])


def skipped_at(points: list[tuple[float, float]], least: float) -> float:
    """The most layers skipped at which `least` is kept, on lines between points (layers skipped, kept)."""
    most = 0.0
    for (skipped, kept), (more, then) in itertools.pairwise(sorted([(0.0, 100.0), *points])):
        if then >= least:
            most = more
        elif kept >= least:
            most = skipped + (more - skipped) * (kept - least) / (kept - then)
    return most


def siblings(results: dict) -> str:
    rows = []
    for name in by_size(results):
        base, (layers, width, *_) = results["runs"][f"{name}/base/0"], BASES[name]
        of_seeds = zip(*(of(results, f"alpha {price:g}", name) for price in SIBLING_ALPHAS))
        curves = [[(layers - depth_of(each), kept_of(each, base)) for each in found] for found in of_seeds]
        rows.append([str(layers), str(width), f"{base['parameters']:,}",
                     f"{100 * fmean(base['exact'].values()):.1f}"])
        for least in (99, 95):
            found = [skipped_at(curve, least) for curve in curves]
            rows[-1] += [over_seeds(found), f"{100 * fmean(found) / layers:.0f}"]
    return markdown(["layers", "width", "parameters", "exact match of the base, %",
                     "layers skipped at 99 % kept", "% of all", "at 95 % kept", "% of all"], rows)


def tables(results: dict) -> dict[str, str]:
    """Markdown by name, as in README.md, of the tables whose runs are all there."""
    made = {}
    for make in (skipping, parts, depth, order, alpha, siblings):
        with suppress(KeyError):
            made[make.__name__] = make(results)
    return made


def in_readme(text: str, made: dict[str, str]) -> str:
    """README.md with its tables, each between two comments, replaced."""
    return re.sub(r"(<!-- (?!end)(\w+) -->\n\n).*?(?=\n\n<!-- end -->)",
                  lambda found: found[1] + made.get(found[2], ""), text, flags=re.DOTALL)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--only", default="", help="just the runs with this in their names, as 8x48 or router")
    add("--steps", type=int, default=STEPS, help="of a training (300); with fewer, bases too get fewer")
    add("--seeds", type=int, default=3, help="of routers, adapters and the order of rows (3)")
    add("--jobs", type=int, default=os.cpu_count(), help="runs at a time (one a core)")
    add("--out", type=Path, default=HERE / "reproduce.json", help="figures (tests/reproduce.json)")
    add("--readme", action="store_true", help="put the tables into README.md too")
    args = parser.parse_args()
    if min(args.steps, args.seeds, args.jobs) < 1:
        parser.error("--steps, --seeds and --jobs: expected at least 1")
    settings = json.loads(json.dumps({
        "steps": args.steps, "seeds": args.seeds, "lr": LR, "batch_size": BATCH, "alpha": ALPHA,
        "alphas": ALPHAS, "sibling_alphas": SIBLING_ALPHAS, "calibration_rows": CALIBRATION, "bases": BASES}))
    results = json.loads(args.out.read_text()) if args.out.is_file() else {"settings": settings, "runs": {}}
    if results["settings"] != settings:
        parser.error(f"{args.out} was made with {results['settings']}; give another --out, or remove it")
    run([job for job in plan(settings) if args.only in job[0]], results, args.out, args.jobs)
    default = [results["runs"].get(f"{TINY}/alpha {ALPHA:g}/{seed}") for seed in range(args.seeds)]
    if all(default):  # or --only left them out
        jobs = plan(settings, [*map(depth_of, default)])
        run([job for job in jobs if args.only in job[0]], results, args.out, args.jobs)
    made = tables(results)
    print("\n\n".join(f"{name}\n\n{table}" for name, table in made.items()))
    if args.readme:
        readme = HERE.parent / "README.md"
        replace(readme, in_readme(readme.read_text(), made))


if __name__ == "__main__":
    main()
