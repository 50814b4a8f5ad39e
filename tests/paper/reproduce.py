"""The paper's experiments in small, on the tiny Llama: what each part of FlexiDepth is worth, and
how other ways to skip compare.

    python tests/paper/reproduce.py                  # all 55 runs
    python tests/paper/reproduce.py --seeds 1 --steps 30 --out quick.json

The figures of a run go to --out as soon as it ends, and no run that is there is run again: a
command that was interrupted goes on, and one that has finished prints the tables of README.md.
"""
import argparse
import json
import math
import sys
from collections import defaultdict
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import fmean, pstdev

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import tables

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent.parent))
from flexidepth import (  # noqa: E402
    Attention, Config, DecoderLayer, FlexiDepth, Route, Tokenizer, layers_used, rotate, skip_loss,
    whole_file)
from train import TINY, Row, collate, plan_batches, predict, read_jsonl, tokenize  # noqa: E402

# train.py's recipe for the tiny Llama, in a third of its steps, at about three times its price.
STEPS = 300
ALPHA = 1.1e-3
LR = 5e-3
BATCH_SIZE = 32
ALPHAS = [3.5e-5, 1.1e-4, 3.5e-4, 1.1e-3, 3.5e-3, 3.5e-2]
CALIBRATION_ROWS = 128  # of the training rows, for methods that look at hidden states

# What may depend on the batch: a function of its targets and real tokens that returns a route.
RouteOf = Callable[[Tensor, Tensor], Route]


# ---- Training and measuring ----------------------------------------------------------------------
def read(name: str) -> list[Row]:
    """The rows of train or valid, in the order of their lengths."""
    tokenizer = Tokenizer.from_pretrained(TINY)
    rows = [tokenize(row, tokenizer, True) for _, row in read_jsonl(TINY / f"{name}.jsonl")]
    return sorted(rows, key=lambda row: len(row.ids))


def always(route: Route) -> RouteOf:
    return lambda targets, real: route


def train(model: FlexiDepth, rows: list[Row], alpha: float, steps: int, seed: int,
          penalty: Callable = skip_loss, route_of: RouteOf = always("learned")) -> None:
    """Train routers and adapters on L_lm + alpha * penalty(gates, real)."""
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=LR, weight_decay=0.0, fused=True)
    for step, numbers in enumerate(plan_batches(len(rows), steps, BATCH_SIZE, seed)):
        cosine = (1 + math.cos(math.pi * step / steps)) / 2
        optimizer.param_groups[0]["lr"] = LR * min((step + 1) / (0.03 * steps), cosine)

        input_ids, targets, real = collate([rows[i] for i in numbers], "cpu")
        logits, gates, _ = predict(model, input_ids, route_of(targets, real))
        lm_loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten())
        loss = lm_loss + alpha * penalty(gates, real)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


@torch.inference_mode()
def measure(model: FlexiDepth, rows: list[Row], route_of: RouteOf = always("learned")) -> dict:
    """The figures of a model, by task: exact match as in train.evaluate; and of the tokens of the
    answers the layers used, their standard deviation, and the layers used by position."""
    exact = defaultdict(list)    # task -> whether each row's answer was found
    layers = defaultdict(list)   # task -> depth of each token of the answers
    by_position = defaultdict(lambda: defaultdict(list))
    everywhere = []              # depth of each token, those of the prompts among them
    for start in range(0, len(rows), 256):
        batch = rows[start:start + 256]
        input_ids, targets, real = collate(batch, "cpu")
        logits, _, kept = predict(model, input_ids, route_of(targets, real))
        right = (logits.argmax(-1) == targets) | (targets == -100)                # (B, T)
        depth = torch.full_like(input_ids, len(model.model.layers))
        if kept is not None:
            depth = layers_used(kept, model.config)
        everywhere += depth[real].tolist()
        for i, row in enumerate(batch):
            used = depth[i, targets[i] != -100].tolist()
            exact[row.task].append(float(right[i].all()))
            layers[row.task] += used
            by_position[row.task]["end"].append(used[-1])
            for position, value in enumerate(used[:-1], 1):
                by_position[row.task][str(position)].append(value)

    positions = {task: {at: fmean(found[at]) for at in tables.POSITIONS if at in found}
                 for task, found in by_position.items()}
    return {"exact": {task: fmean(exact[task]) for task in tables.TASKS},
            "layers": {task: fmean(layers[task]) for task in tables.TASKS},
            "spread": {task: pstdev(layers[task]) for task in tables.TASKS},
            "positions": {task: positions[task] for task in tables.TASKS},
            "layers_with_prompt": fmean(everywhere)}


# ---- Parts removed -------------------------------------------------------------------------------
class KeptKeys(Attention):
    """Tokens that skip have no keys and values: only tokens that run the layer are attended to."""
    def forward(self, h, k, v, rotation, places=None):
        if places is None:  # all tokens run the layer
            return super().forward(h, k, v, rotation)
        B, T, _ = h.shape
        kept = torch.zeros(B * T, dtype=torch.bool)
        kept[places] = True
        mask = kept.view(B, 1, 1, T) & torch.ones(T, T, dtype=torch.bool).tril()  # (B, 1, T, T)
        # A token that skips sees itself. Its output is not read, but may not be NaN.
        mask = mask | torch.eye(T, dtype=torch.bool)
        q = rotate(self.split_heads(self.q_proj(h)), rotation)                    # (B, H, T, d)
        out = F.scaled_dot_product_attention(q, k, v, mask, enable_gqa=True)
        out = out.transpose(1, 2).flatten(2)                                      # (B, T, H * d)
        return self.o_proj(out.flatten(0, 1)[places])                             # (N, D)


class LinearRouter(nn.Linear):
    def __init__(self, config: Config):
        super().__init__(config.hidden_size, 1, bias=False)

    def forward(self, h):
        return super().forward(h).squeeze(-1)                                     # (B, T)


class NoAdapter(nn.Module):
    def forward(self, x):
        return torch.zeros_like(x)


def straight_through(gate: Tensor, threshold: float) -> Tensor:
    """The decision as 0 or 1, with the gradient of the gate."""
    return (gate > threshold).float() + gate - gate.detach()


class StraightThrough(DecoderLayer):
    """No factors g and 1 - g: both paths run unscaled, and the decision, 0 or 1, chooses one."""
    def forward(self, x, rotation, cache, route):
        h = self.input_layernorm(x)
        k, v = self.self_attn.keys_values(h, rotation)
        full = self.full_path(x, 1.0, self.self_attn(h, k, v, rotation))
        skip = self.skip_path(x, 0.0)
        gate = torch.sigmoid(self.router(h))                                      # (B, T)
        decision = straight_through(gate, self.config.threshold)[..., None]       # (B, T, 1)
        return decision * full + (1 - decision) * skip, gate, gate > self.config.threshold


def linear_penalty(gates: Tensor, real: Tensor) -> Tensor:
    return gates.sum(-1)[real].mean()


def remove(part: str, model: FlexiDepth) -> None:
    """Take a part out of the routed layers of a model."""
    for index in model.config.routing_layers:
        layer = model.model.layers[index]
        # An object of another class has the same weights and runs the other class's forward.
        if part == "no K, V for skipped tokens":
            layer.self_attn.__class__ = KeptKeys
        elif "linear router" in part:
            layer.router = LinearRouter(model.config)
        elif "no adapter" in part:
            layer.router_proj = NoAdapter()
        elif part == "no factors g, 1 - g":
            layer.__class__ = StraightThrough


def run_flexidepth(steps: int, seed: int, alpha: float, part: str = "full") -> dict:
    """Train and measure FlexiDepth without one of its parts."""
    penalty = linear_penalty if part.startswith("linear penalty") else skip_loss
    if part == "linear penalty, 3 alpha":
        alpha = 3 * alpha
    torch.manual_seed(seed)
    model = FlexiDepth.from_pretrained(TINY)
    remove(part, model)
    model.train("both paths" in part)
    train(model, read("train"), alpha, steps, seed, penalty)
    return measure(model.eval(), read("valid"))


# ---- Other ways to skip, trained -----------------------------------------------------------------
class AttentionOnly(DecoderLayer):
    """MindSkip: one decision for a row says whether it runs the attention. The mlp always runs."""
    def forward(self, x, rotation, cache, route):
        h = self.input_layernorm(x)
        k, v = self.self_attn.keys_values(h, rotation)
        gate = route(self.index, torch.sigmoid(self.router(h)))                   # (B, T)
        decision = straight_through(gate, self.config.threshold)                  # (B, T)
        x = x + decision[..., None] * self.self_attn(h, k, v, rotation)
        x = x + self.mlp(self.post_attention_layernorm(x))
        return x, decision, gate > self.config.threshold


def by_prompt(targets: Tensor, real: Tensor) -> Route:
    """A route that gives every token of a row the mean gate over the row's prompt."""
    # The last token of the prompt predicts the first one of the answer.
    prompt = real & ((targets != -100).cumsum(1) <= 1)                            # (B, T)

    def route(layer_index: int, gate: Tensor) -> Tensor:
        mean = (gate * prompt).sum(1) / prompt.sum(1)                             # (B,)
        return mean[:, None].expand_as(gate)
    return route


def at_random(rate: float, seed: int) -> RouteOf:
    """A coin for every token and layer. It shows "run the layer" at this rate."""
    generator = torch.Generator().manual_seed(seed)
    return always(lambda layer_index, gate: torch.rand(gate.shape, generator=generator) < rate)


def rate_of(depth: float, config: Config) -> float:
    """The share of the routed layers that run where `depth` layers are used."""
    return 1 - (config.num_hidden_layers - depth) / len(config.routing_layers)


def run_random_adapters(steps: int, seed: int, depth: float) -> dict:
    """FlexiDepth with a coin in place of the gate's decision, in training too."""
    torch.manual_seed(seed)
    model = FlexiDepth.from_pretrained(TINY)
    rate = rate_of(depth, model.config)
    train(model, read("train"), 0.0, steps, seed, route_of=at_random(rate, seed))
    return measure(model, read("valid"), at_random(rate, seed + 1000))


def run_attention_only(steps: int, seed: int, depth: float) -> dict:
    """MindSkip, drawn to the wanted depth by a penalty on the distance from it."""
    torch.manual_seed(seed)
    model = FlexiDepth.from_pretrained(TINY)
    rate = rate_of(depth, model.config)
    for index in model.config.routing_layers:
        model.model.layers[index].__class__ = AttentionOnly

    def distance(gates: Tensor, real: Tensor) -> Tensor:
        return (gates[real].mean() - rate).square()

    train(model, read("train"), 10.0, steps, seed, distance, by_prompt)
    return measure(model, read("valid"), by_prompt)


# ---- Other ways to skip, untrained ---------------------------------------------------------------
class BareLayer(DecoderLayer):
    """The base's layer for tokens that the route keeps, and nothing at all for the others."""
    def forward(self, x, rotation, cache, route):
        full, _, _ = super().forward(x, rotation, cache, "full")
        kept = route(self.index, x[..., 0])                                       # (B, T)
        return torch.where(kept[..., None], full, x), kept, kept


def block_influence(model: FlexiDepth, input_ids: Tensor, real: Tensor) -> list[float]:
    """ShortGPT: 1 - cos(input, output) of every layer, mean over real tokens."""
    found = []

    def note(layer: nn.Module, inputs: tuple, outputs: tuple) -> None:
        likeness = F.cosine_similarity(inputs[0], outputs[0], dim=-1)             # (B, T)
        found.append(1 - likeness[real].mean().item())

    hooks = [layer.register_forward_hook(note) for layer in model.model.layers]
    model(input_ids, route="full")
    for hook in hooks:
        hook.remove()
    return found


@torch.no_grad()
def run_untrained(steps: int, seed: int, depth: float) -> dict:
    """Ways to skip that train nothing, at a mean of `depth` layers."""
    model = FlexiDepth.from_pretrained(TINY)
    rows, valid = read("train"), read("valid")
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed))
    input_ids, _, real = collate([rows[i] for i in order[:CALIBRATION_ROWS]], "cpu")
    influence = block_influence(model, input_ids, real)
    layers = model.model.layers
    # The layers by number, the one to drop last first.
    orders = {
        "last layers dropped": range(len(layers)),
        "layers dropped by influence": sorted(range(len(layers)), key=lambda i: -influence[i])}

    def exact_match(kept: list[int]) -> dict[str, float]:
        model.model.layers = nn.ModuleList(layers[i] for i in sorted(kept))
        return measure(model, valid, always("full"))["exact"]

    # These methods can't run 8.5 layers. Some rows get n and the others n + 1, in shares that give
    # the mean, so the expected exact match is a mean of both by these shares.
    result = {"influence": influence}
    n = int(depth)
    for method, order in orders.items():
        few, more = exact_match(order[:n]), exact_match(order[:n + 1])
        exact = {task: few[task] + (depth - n) * (more[task] - few[task]) for task in few}
        result[method] = {"exact": exact}

    model.model.layers = layers
    for index in model.config.routing_layers:
        layers[index].__class__ = BareLayer
    result["random"] = measure(model, valid, at_random(rate_of(depth, model.config), seed))
    return result


def run_base(steps: int, seed: int) -> dict:
    return measure(FlexiDepth.from_pretrained(TINY), read("valid"), always("full"))


# ---- Runs ----------------------------------------------------------------------------------------
# A run has a name, tables.BASE/what/seed, and is a function of steps and seed.
def first_runs(seeds: int) -> dict[str, Callable]:
    """The runs that need no other."""
    options = {part: {"alpha": ALPHA, "part": part} for part in tables.PARTS}
    del options["full"]  # it is among the alphas
    options |= {f"alpha {alpha:g}": {"alpha": alpha} for alpha in ALPHAS}
    return {f"{tables.BASE}/base/0": run_base} | {
        f"{tables.BASE}/{what}/{seed}": partial(run_flexidepth, **options[what])
        for seed in range(seeds) for what in options}


def matched_runs(depths: list[float]) -> dict[str, Callable]:
    """Other ways to skip, at the mean depth of FlexiDepth with each seed."""
    methods = {"untrained": run_untrained, "random, adapters trained": run_random_adapters,
               "attention only, by sequence": run_attention_only}
    return {f"{tables.BASE}/{method}/{seed}": partial(function, depth=depth)
            for seed, depth in enumerate(depths) for method, function in methods.items()}


def run(planned: dict[str, Callable], results: dict, out: Path) -> None:
    """Those of the planned runs that are not in the results yet."""
    for name, function in planned.items():
        if name not in results["runs"]:
            print(name, flush=True)
            figures = function(results["settings"]["steps"], int(name.split("/")[-1]))
            results["runs"][name] = json.loads(
                json.dumps(figures), parse_float=lambda text: round(float(text), 5))
            with whole_file(out) as temporary:
                temporary.write_text(json.dumps(results, indent=1))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--steps", type=int, default=STEPS, help="of a training (300)")
    add("--seeds", type=int, default=3, help="of routers, adapters and the order of rows (3)")
    add("--out", type=Path, default=HERE / "results.json", help="the figures")
    args = parser.parse_args()
    torch.set_num_threads(1)  # more of them gain nothing on so small a model
    # Adam's means of a router that has closed are tiny: a tenth of the time goes into them.
    torch.set_flush_denormal(True)

    settings = {"steps": args.steps, "seeds": args.seeds, "lr": LR, "batch_size": BATCH_SIZE,
                "alpha": ALPHA, "alphas": ALPHAS, "calibration_rows": CALIBRATION_ROWS}
    results = {"settings": settings, "runs": {}}
    if args.out.is_file():
        results = json.loads(args.out.read_text())
    if results["settings"] != results["settings"] | settings:
        parser.error(f"{args.out} was made with {results['settings']}; give another --out")

    run(first_runs(args.seeds), results, args.out)
    depths = [tables.mean_depth(figures) for figures in tables.of_flexidepth(results)]
    run(matched_runs(depths), results, args.out)
    for name, table in tables.make_tables(results).items():
        print(f"{name}\n\n{table}\n")


if __name__ == "__main__":
    main()
