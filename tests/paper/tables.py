"""The tables of README.md, made of what reproduce.py measured (results.json).

Kept: exact match over the base's, mean over tasks, in percent. Layers used: of the tokens of the
answers, mean over tasks. Figures with ± are means over seeds and their standard deviation."""
import re
from contextlib import suppress
from itertools import pairwise, permutations, product
from statistics import fmean, stdev

TASKS = ["phrase", "repeat", "copy", "story", "add", "multiply"]
EASY = ["phrase", "repeat", "copy"]
POSITIONS = ["1", "2", "3", "4", "5", "6", "end"]  # of a token in the answer
TINY = "12x96"

# What the paper keeps of Llama-3-8B-Instruct's quality, in percent, where it says so.
METHODS = {
    "attention only, by sequence": ("attention only, by sequence (MindSkip)", "60.2"),
    "random": ("random", ""),
    "random, adapters trained": ("random, adapters trained", ""),
    "layers merged": ("layers merged (LaCo)", "65.3"),
    "last layers dropped": ("last layers dropped (LayerSkip)", "43.9"),
    "layers dropped by influence": ("layers dropped by influence (ShortGPT)", "32.0")}
PARTS = {
    "full": "102.1", "no K, V for skipped tokens": "84.3", "linear router": "68.7",
    "no adapter": "28.1", "no factors g, 1 - g": "", "linear penalty": "",
    "linear penalty, 3 alpha": ""}
# The layers that it uses by task, of 32, of which 16 are routed.
PAPER_DEPTH = {"repeat": 20.09, "copy": 21.95, "add": 22.45, "multiply": 23.90}


# ---- Figures -------------------------------------------------------------------------------------
def of_seeds(results: dict, what: str, base: str = TINY) -> list[dict]:
    """The figures of a run with every seed. KeyError if one was not run."""
    seeds = range(results["settings"]["seeds"])
    return [results["runs"][f"{base}/{what}/{seed}"] for seed in seeds]


def of_base(results: dict, base: str = TINY) -> dict:
    return results["runs"][f"{base}/base/0"]


def mean_depth(figures: dict) -> float:
    return fmean(figures["layers"].values())


def kept(figures: dict, base: dict) -> float:
    return 100 * fmean(figures["exact"][task] / base["exact"][task] for task in TASKS)


def chance_of_order(rows: list[list[float]]) -> float:
    """Page's test, exact: how often rows in random orders rise as much as these, left to right."""
    ranks = [[1 + sum(other < value for other in row) for value in row] for row in rows]

    def score(table) -> float:
        return sum(column * rank for row in table for column, rank in enumerate(row))

    orders = list(permutations(range(1, len(rows[0]) + 1)))
    return fmean(score(table) >= score(ranks) for table in product(orders, repeat=len(rows)))


def skipped_at(points: list[tuple[float, float]], least: float) -> float:
    """The most layers skipped at which `least` is kept, on lines between the points
    (layers skipped, kept) and (0, 100)."""
    most = 0.0
    for (skipped, before), (more, after) in pairwise(sorted([(0.0, 100.0), *points])):
        if after >= least:
            most = more
        elif before >= least:
            most = skipped + (more - skipped) * (before - least) / (before - after)
    return most


# ---- Markdown ------------------------------------------------------------------------------------
def with_spread(values: list[float], digits: int = 2) -> str:
    text = f"{fmean(values):.{digits}f}"
    if len(values) > 1:
        text += f" ± {stdev(values):.{digits}f}"
    return text


def markdown(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def quality_cells(results: dict, found: list[dict], depths: list[float]) -> list[str]:
    """Kept, layers used, and exact match of every task, of the seeds of one method."""
    base = of_base(results)
    cells = [with_spread([kept(figures, base) for figures in found], 1), with_spread(depths)]
    for task in TASKS:
        cells.append(f"{100 * fmean(figures['exact'][task] for figures in found):.1f}")
    return cells


QUALITY_HEAD = ["", "paper: kept, %", "kept, %", "layers used", *TASKS]


def skipping(results: dict) -> str:
    base = of_base(results)
    flexidepth = of_seeds(results, f"alpha {results['settings']['alpha']:g}")
    untrained = of_seeds(results, "untrained")
    depths = [mean_depth(figures) for figures in flexidepth]
    rows = [["the base", "100", *quality_cells(results, [base], [mean_depth(base)])],
            ["FlexiDepth", "100.7", *quality_cells(results, flexidepth, depths)]]
    for method, (label, paper) in METHODS.items():
        if method in untrained[0]:
            found = [figures[method] for figures in untrained]
        else:
            found = of_seeds(results, method)
        used = depths  # methods that drop whole layers have FlexiDepth's mean depth by design
        if "layers" in found[0]:
            used = [mean_depth(figures) for figures in found]
        rows.append([label, paper, *quality_cells(results, found, used)])
    return markdown(QUALITY_HEAD, rows)


def parts(results: dict) -> str:
    rows = []
    for part, paper in PARTS.items():
        what = f"alpha {results['settings']['alpha']:g}" if part == "full" else part
        found = of_seeds(results, what)
        depths = [mean_depth(figures) for figures in found]
        rows.append([part, paper, *quality_cells(results, found, depths)])
    return markdown(QUALITY_HEAD, rows)


def depth(results: dict) -> str:
    found = of_seeds(results, f"alpha {results['settings']['alpha']:g}")
    plain = results["settings"]["bases"][TINY][0] // 2
    lines = []
    for task in TASKS:
        layers = [figures["layers"][task] for figures in found]
        share = (fmean(layers) - plain) / plain
        row = [task, with_spread(layers),
               f"{fmean(figures['spread'][task] for figures in found):.2f}", f"{100 * share:.0f}"]
        if task in PAPER_DEPTH:
            row.append(f"{100 * (PAPER_DEPTH[task] - 16) / 16:.0f}")
        else:
            row.append("")
        positions = [figures["positions"][task] for figures in found]
        for at in POSITIONS:
            known = at in positions[0]
            row.append(f"{fmean(each[at] for each in positions):.1f}" if known else "")
        lines.append((fmean(layers), row))
    head = ["task", "layers used", "spread of tokens", "routed layers run, %", "the same, paper",
            "token 1", *POSITIONS[1:]]
    return markdown(head, [row for _, row in sorted(lines)])


def bases_by_size(results: dict) -> list[str]:
    """The bases whose runs are all there, largest first. KeyError if there is none."""
    complete = []
    for base in results["settings"]["bases"]:
        with suppress(KeyError):
            size = of_base(results, base)["parameters"]
            for alpha in results["settings"]["sibling_alphas"]:
                of_seeds(results, f"alpha {alpha:g}", base)
            complete.append((size, base))
    if not complete:
        raise KeyError("no base has all its runs")
    return [base for _, base in sorted(complete, reverse=True)]


def order(results: dict) -> str:
    rows = []
    for base, alpha in product(bases_by_size(results), [3.5e-4, results["settings"]["alpha"]]):
        found = [figures["layers"] for figures in of_seeds(results, f"alpha {alpha:g}", base)]
        easy = [fmean(layers[task] for task in EASY) for layers in found]
        add = [layers["add"] for layers in found]
        multiply = [layers["multiply"] for layers in found]
        row = [base.replace("x", " x "), f"{alpha:g}"]
        row += [with_spread(easy), with_spread(add), with_spread(multiply)]
        for low, high in ((easy, add), (add, multiply)):
            steps = [b - a for a, b in zip(low, high)]
            rising = sum(step > 0 for step in steps)
            row.append(f"{with_spread(steps)} ({rising} of {len(steps)})")
        four = [[layers[task] for task in PAPER_DEPTH] for layers in found]
        row.append(f"{chance_of_order(list(map(list, zip(easy, add, multiply)))):.3f}")
        row.append(f"{chance_of_order(four):.3f}")
        rows.append(row)
    head = ["layers x width", "alpha", "easy", "add", "multiply", "add - easy", "multiply - add",
            "p", "p of four"]
    return markdown(head, rows)


def alpha(results: dict) -> str:
    base = of_base(results)
    rows, points = [], []
    for letter, price in zip("abcdefgh", results["settings"]["alphas"]):
        found = of_seeds(results, f"alpha {price:g}")
        depths = [mean_depth(figures) for figures in found]
        exact = [100 * fmean(figures["exact"].values()) for figures in found]
        with_prompt = [figures["layers_with_prompt"] for figures in found]
        points += [(letter, x, y) for x, y in zip(depths, exact)]
        rows.append([letter, f"{price:g}", with_spread(depths), with_spread(with_prompt),
                     with_spread(exact, 1),
                     with_spread([kept(figures, base) for figures in found], 1)])
    table = markdown(
        ["", "alpha", "layers used", "with the prompt", "exact match, %", "kept, %"], rows)
    layers = results["settings"]["bases"][TINY][0]
    return f"{table}\n\n```\n{plot(points, layers // 2, layers)}\n```"


def plot(points: list[tuple[str, float, float]], low: int, high: int) -> str:
    """Letters at x, from low to high, and y, from a multiple of ten to 100."""
    least = min(90, 10 * int(min(y for _, _, y in points) // 10))
    width = 10 * (high - low) + 1
    grid = [[" "] * width for _ in range(11)]
    for letter, x, y in points:
        line = round(10 * (100 - y) / (100 - least))
        grid[line][round((width - 1) * (x - low) / (high - low))] = letter
    lines = ["exact match, %"]
    for i, row in enumerate(grid):
        y = 100 - (100 - least) * i / 10
        lines.append(f"{y:>5g} |{''.join(row)}".rstrip())
    ticks = "".join(f"{x:<10}" for x in range(low, high + 1)).rstrip()
    lines += [f"      +{'-' * width}", f"       {ticks}  layers used"]
    return "\n".join(lines)


def siblings(results: dict) -> str:
    rows = []
    for name in bases_by_size(results):
        base = of_base(results, name)
        layers, width, *_ = results["settings"]["bases"][name]
        curves = [[] for _ in range(results["settings"]["seeds"])]  # of each seed, over alphas
        for price in results["settings"]["sibling_alphas"]:
            for curve, figures in zip(curves, of_seeds(results, f"alpha {price:g}", name)):
                curve.append((layers - mean_depth(figures), kept(figures, base)))
        row = [str(layers), str(width), f"{base['parameters']:,}",
               f"{100 * fmean(base['exact'].values()):.1f}"]
        for least in (99, 95):
            skipped = [skipped_at(curve, least) for curve in curves]
            row += [with_spread(skipped), f"{100 * fmean(skipped) / layers:.0f}"]
        rows.append(row)
    head = ["layers", "width", "parameters", "exact match of the base, %",
            "layers skipped at 99 % kept", "% of all", "at 95 % kept", "% of all"]
    return markdown(head, rows)


def make_tables(results: dict) -> dict[str, str]:
    """Markdown by name, of the tables whose runs are all there."""
    made = {}
    for make in (skipping, parts, depth, order, alpha, siblings):
        with suppress(KeyError):
            made[make.__name__] = make(results)
    return made


def fill(text: str, made: dict[str, str]) -> str:
    """The text of README.md with the tables that were made between their two comments each."""
    for name, table in made.items():
        here = re.compile(rf"(?<=<!-- {name} -->\n\n).*?(?=\n\n<!-- end -->)", re.DOTALL)
        text = here.sub(lambda found: table, text)
    return text
