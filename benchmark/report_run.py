"""A page of one finished run: what was asked, what came out, what an attack does to the images.

Usage    python benchmark/report_run.py runs/robust_kd/my-run-s0
         python benchmark/report_run.py runs/robust_kd/my-run-s0 --n 200 --out my-run.html
Page     One HTML file that needs nothing else: the images are inside, it has no scripts, and it
         loads nothing. report_run.html is its text with places to fill. What comes from a file is
         escaped in `escape` and nowhere else.
Attack   PGD-20 on the last epoch of the student (--method teacher: of the teacher), with the radius
         and step of the run's own evaluation, from the same random start as its first one there. It
         attacks --n test images, a fixed choice.
Data     The data set is read again and must be the one that the run had (its checksum is in
         config.json). A net of your own is never imported because a file says so: repeat --model.
         Without matplotlib the page has the learning curves only if the folder has a curves.png.
"""

import base64
import html
import importlib
import io
import string
import sys
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import common
import eval_robustness
import robust_kd
from benchmark import evaluation_attack
from benchmark.report import metric_title

TEMPLATE = Path(__file__).with_suffix(".html")
SCRIPTS = ("fickle_teacher", "messy_collab", "robust_kd", "soft_randomization", "teacher_free_kd")
EXAMPLES = 8  # images shown with their perturbation
LARGEST_MATRIX = 20  # classes; with more of them the most frequent confusions are listed
LISTED_CONFUSIONS = 15
BROKEN = "broken by the attack"
WITHSTANDS = "withstands the attack"
WRONG_BEFORE = "wrong without attack"


def parse_args(argv=None):
    """The flags as a namespace; raises UserError."""
    parser = common.Parser(__doc__)
    add = parser.add_argument
    add("run", metavar="RUN", help="folder of a finished run, runs/SCRIPT/NAME-sSEED")
    add("--out", metavar="FILE.html", help="file of the page (default: report.html in RUN)")
    add("--n", type=common.whole, default=1000, help="number of test images that are attacked")
    add("--data-root", default="data", help="folder with the data set of the run")
    add("--model", metavar="MODULE:FUNCTION", help="net of your own, named as for the run")
    args = parser.parse_args(argv)
    if args.out and Path(args.out).suffix != ".html":
        parser.error(f"--out: expected FILE.html, got {args.out}")
    return args


# ------------------------------------------------------------------------------------------------
# What the run folder says


class Run(NamedTuple):
    """What the files of a finished run say."""

    folder: Path
    script: str  # robust_kd, ...
    config: dict  # config.json
    rows: list[dict]  # summary.json
    net: dict  # the row of the net that is attacked


def read_run(folder: Path) -> Run:
    """The run in a folder; a UserError if it is none, not finished or damaged."""
    folder = folder.resolve()
    wanted = "give the folder of a finished run, runs/SCRIPT/NAME-sSEED"
    if not folder.is_dir():
        raise common.UserError(f"{folder}: no such folder; {wanted}")
    script = folder.parent.name
    if script not in SCRIPTS:
        raise common.UserError(f"{folder}: {script} is none of {', '.join(SCRIPTS)}; {wanted}")
    config = common.read_json(folder / "config.json")
    if config is None:
        raise common.UserError(f"{folder}: has no config.json; {wanted}")
    rows = common.read_summary(folder)
    if rows is None:
        advice = "the command of the run goes on where it stopped"
        raise common.UserError(f"{folder}: not finished, there is no summary.json; {advice}")
    try:
        check_config(config)
    except common.MALFORMED:
        raise common.UserError(f"{folder / 'config.json'}: damaged; not that of a run") from None
    wanted_net = "teacher" if config["flags"].get("method") == "teacher" else "student"
    for row in rows:
        if row.get("net") == wanted_net and isinstance(row.get("file"), str):
            return Run(folder, script, config, rows, row)
    advice = "delete it, and the command of the run makes it again"
    raise common.UserError(f"{folder / 'summary.json'}: names no file of a net; {advice}")


def check_config(config: dict):
    """Raise one of MALFORMED if what the page needs of config.json is not that of a run."""
    flags = config["flags"]
    subsets = [flags[name] for name in ("train_subset", "test_subset") if flags[name] is not None]
    counts = [flags["val_size"], flags["seed"], config["fingerprint"], *subsets]
    if 0 in subsets or not all(type(count) is int and count >= 0 for count in counts):
        raise ValueError("not counts of images")
    if not isinstance(flags["data"], str) or not isinstance(flags.get("extra_data") or "", str):
        raise ValueError("not names of data")
    eps, step_size = evaluation_attack(flags)
    if not 0 <= eps <= 1 or not 0 <= step_size <= 1:
        raise ValueError("no radius or no step")


def read_data(run: Run, root: str) -> common.Data:
    """The data of a run, on the CPU; a UserError if they are not there or others by now."""
    flags = run.config["flags"]
    counts = {name: flags[name] for name in ("val_size", "train_subset", "test_subset")}
    data = common.load_data(flags["data"], root, **counts)
    extra = flags.get("extra_data")
    if extra:
        data = robust_kd.add_extra_data(data, extra)
    if data.fingerprint != run.config["fingerprint"]:
        other = f"{run.folder} was made with other images or labels than are there now"
        raise common.UserError(f"{flags['data']}: {other}; put its data back")
    return data


# ------------------------------------------------------------------------------------------------
# The attack


class Attacked(NamedTuple):
    """Test images before and after the attack, on the CPU, in the fixed order of their choice."""

    x: Tensor  # float32 (N, C, H, W) in [0, 1]
    x_adv: Tensor
    labels: Tensor  # int64 (N,)
    probs: Tensor  # float32 (N, K)
    probs_adv: Tensor

    def outcomes(self) -> list[str]:
        """For each image: BROKEN, WITHSTANDS or WRONG_BEFORE."""
        outcomes = []
        predictions = self.probs.argmax(1).tolist(), self.probs_adv.argmax(1).tolist()
        for label, before, after in zip(self.labels.tolist(), *predictions):
            if before != label:
                outcomes.append(WRONG_BEFORE)
            else:
                outcomes.append(WITHSTANDS if after == label else BROKEN)
        return outcomes


def attack_images(model, data: common.Data, n: int, flags: dict) -> Attacked:
    """PGD-20 on n test images (on all if there are fewer), with the radius and step of the run.

    The random start of an image depends on the run's seed and on the number of the image alone, as
    in the evaluation. Raises UserError if the model does not return a logit for each class.
    """
    device = next(model.parameters()).device
    x, labels = data.x_test.to(device), data.y_test.to(device)
    order = torch.from_numpy(np.random.default_rng(0).permutation(len(x))[:n])
    settings = eval_robustness.Settings(*evaluation_attack(flags), seed=flags["seed"])
    parts, done = [], 0
    with common.evaluating(model):
        logits = eval_robustness.clean_logits(model, x, labels, classes=len(data.classes))
        images = eval_robustness.Images(x, labels, logits)
        for _, batch in eval_robustness.batches(images, order, settings, "pgd20"):
            x_adv = eval_robustness.pgd(model, batch)
            probs, probs_adv = batch.logits.softmax(1), model(x_adv).float().softmax(1)
            parts.append([t.cpu() for t in (batch.x, x_adv, batch.labels, probs, probs_adv)])
            done += len(x_adv)
            common.print_line(f"attacked {done} of {len(order)} test images", live=True)
    return Attacked(*(torch.cat(tensors) for tensors in zip(*parts)))


def choose_examples(outcomes: list[str]) -> list[int]:
    """Positions of up to EXAMPLES images: the first broken ones, then the first that withstand.

    Half of each; where there are too few, the other ones and then those that are wrong before.
    """
    places = {BROKEN: [], WITHSTANDS: [], WRONG_BEFORE: []}
    for i, outcome in enumerate(outcomes):
        places[outcome].append(i)
    n_broken = max(EXAMPLES // 2, EXAMPLES - len(places[WITHSTANDS]))
    n_withstands = max(EXAMPLES // 2, EXAMPLES - len(places[BROKEN]))
    chosen = places[BROKEN][:n_broken] + places[WITHSTANDS][:n_withstands] + places[WRONG_BEFORE]
    return chosen[:EXAMPLES]


# ------------------------------------------------------------------------------------------------
# Pieces of HTML


def escape(value) -> str:
    """Any value as text of a page; it may stand in quotes too."""
    return html.escape(str(value))


def code(words: list[str]) -> str:
    """Words of a command, each of which stays on its line if it can."""
    return " ".join(f"<code>{escape(word)}</code>" for word in words)


def image_uri(pixels: np.ndarray) -> str:
    """uint8 (H, W, C) as the address of a PNG image that lies in the page itself."""
    file = io.BytesIO()
    Image.fromarray(pixels[:, :, 0] if pixels.shape[2] == 1 else pixels).save(file, "PNG")
    return f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"


def to_pixels(x: Tensor) -> np.ndarray:
    """An image (C, H, W), clipped to [0, 1] and rounded to 8 bits -> uint8 (H, W, C)."""
    return (x.clamp(0, 1) * 255).round().byte().permute(1, 2, 0).numpy()


def scroll_box(content: str, label: str) -> str:
    """A box in which wide content can be moved, by the keyboard too."""
    return f'<div class="scroll" tabindex="0" role="group" aria-label="{label}">{content}</div>'


def html_table(head: list[str], rows: list[list], label: str, kind: str = "numbers") -> str:
    """A table of values that are escaped here; the first column names its row.

    kind: "numbers" are aligned on the right and keep their line, "words" are not.
    """
    cells = "".join(f'<th scope="col">{escape(text)}</th>' for text in head)
    lines = [f"<thead><tr>{cells}</tr></thead>"]
    for first, *others in rows:
        cells = "".join(f"<td>{escape(text)}</td>" for text in others)
        lines.append(f'<tr><th scope="row">{escape(first)}</th>{cells}</tr>')
    return scroll_box(f'<table class="{kind}">{"".join(lines)}</table>', label)


def cell_text(key: str, value) -> str:
    """A cell of the summary: accuracies in percent with two digits, a missing value as a dash."""
    if value is None:
        return "-"
    if key.endswith("_acc") and isinstance(value, float | int):
        return f"{100 * value:.2f}"
    if isinstance(value, float):
        return f"{value:,.1f}"
    return f"{value:,}" if isinstance(value, int) else str(value)


# ------------------------------------------------------------------------------------------------
# What is filled into the page


def learning_curves(run: Run) -> str:
    """The figure of the learning curves, drawn now if the run has not drawn it."""
    path = run.folder / "curves.png"
    if not path.is_file():
        with common.drawing(path):
            common.draw_run(run.folder, run.rows)
    if not path.is_file():
        return "<p>No figure: matplotlib is not installed, or there is no log of the epochs.</p>"
    source = image_uri(common.read_image(path))  # not a link to another file, and no other data
    words = "Accuracy after each epoch, on training and held-out images"
    return scroll_box(f'<img class="wide" src="{source}" alt="{words}">', "learning curves")


def confusion(title: str, labels: Tensor, probs: Tensor, classes: list[str]) -> str:
    """Which class is taken for which: labels (N,), probs (N, K).

    A table with a row for each true class or, of many classes, the most frequent confusions.
    """
    pairs = Counter(zip(labels.tolist(), probs.argmax(1).tolist()))
    right = sum(count for (true, predicted), count in pairs.items() if true == predicted)
    n = len(labels)
    caption = f"{title}: {right:,} of {n:,} right ({100 * right / n:.2f}&nbsp;%)"
    if len(classes) > LARGEST_MATRIX:
        wrong = Counter({pair: count for pair, count in pairs.items() if pair[0] != pair[1]})
        rows = []
        for (true, predicted), count in wrong.most_common(LISTED_CONFUSIONS):
            rows.append([classes[true], classes[predicted], count])
        table = html_table(["true class", "taken for", "images"], rows, title, "words")
        return f"<div><h4>{caption}</h4>{table}</div>"

    head = ""
    for name in [*classes, "images"]:
        head += f'<th scope="col" title="{escape(name)}"><span>{escape(name)}</span></th>'
    lines = [f'<tr><th class="corner">true class</th>{head}</tr>']
    for true, name in enumerate(classes):
        counts = [pairs[true, predicted] for predicted in range(len(classes))]
        cells = ""
        for predicted, count in enumerate(counts):
            colour = common.COLOURS[0] if predicted == true else common.COLOURS[1]
            opacity = round(255 * 0.6 * count / max(sum(counts), 1))
            kind = ' class="zero"' if count == 0 else ""
            cells += f'<td{kind} style="background:{colour}{opacity:02x}">{count}</td>'
        row_name = f'<th scope="row" title="{escape(name)}">{escape(name)}</th>'
        lines.append(f'<tr>{row_name}{cells}<td class="total">{sum(counts)}</td></tr>')
    table = f'<table class="confusion">{"".join(lines)}</table>'
    return f"<div><h4>{caption}</h4>{scroll_box(table, title)}</div>"


def came_out(run: Run, attacked: Attacked, data: common.Data) -> dict:
    """The table of the summary and the confusions, with how they were measured."""
    flags = run.config["flags"]
    eps, step = evaluation_attack(flags)
    attack = f"radius {255 * eps:.4g}/255 in L-infinity, step {255 * step:.4g}/255"
    measured = f"One seed, {len(data.x_test):,} test images."
    if any(key.startswith("pgd") for row in run.rows for key in row):
        starts = escape(flags.get("eval_restarts", 1))
        measured += f" PGD: {attack}, random starts for each image: {starts}."
    choice = f"all {len(data.x_test):,} test images"
    if len(attacked.x) < len(data.x_test):
        choice = f"{len(attacked.x):,} of the {len(data.x_test):,} test images, chosen at random"
        choice += " but always the same (<code>--n</code> says how many)"
    legend = "A row is a true class, a column what the net takes it for. Blue is right, orange is"
    legend += " wrong; the stronger, the larger the share of the row."
    if len(data.classes) > LARGEST_MATRIX:
        legend = f"The {LISTED_CONFUSIONS} most frequent confusions."
    confusions = confusion("Clean images", attacked.labels, attacked.probs, data.classes)
    confusions += confusion("Under PGD-20", attacked.labels, attacked.probs_adv, data.classes)
    keys = dict.fromkeys(key for row in run.rows for key in row if key != "net")
    rows = [[cell_text(key, row.get(key)) for key in keys] for row in run.rows]
    summary = html_table([metric_title(key) for key in keys], rows, "results")
    return {"measured": measured, "attack": attack, "choice": choice, "legend": legend} | {
        "summary": summary,
        "confusions": confusions,
    }


def prediction(probs: Tensor, label: int, classes: list[str]) -> str:
    """The largest of probs (K,): its class, its probability, and whether it is the label."""
    predicted = int(probs.argmax())
    mark = "✓" if predicted == label else "✗"
    return f"{mark} {escape(classes[predicted])}, {100 * probs[predicted]:.1f}&nbsp;%"


def example(attacked: Attacked, i: int, outcome: str, classes: list[str]) -> str:
    """One image with its perturbation, its attacked version and both predictions."""
    x, x_adv, label = attacked.x[i], attacked.x_adv[i], int(attacked.labels[i])
    kinds = {BROKEN: "broken", WITHSTANDS: "withstands", WRONG_BEFORE: "wrong"}
    pictures = ""
    for picture, title, words in (
        (x, "image", prediction(attacked.probs[i], label, classes)),
        (0.5 + 10 * (x_adv - x), "tenfold change", ""),
        (x_adv, "attacked image", prediction(attacked.probs_adv[i], label, classes)),
    ):
        pictures += f"""
<figure><img class="pixels" src="{image_uri(to_pixels(picture))}" alt="{title}">
<figcaption>{title}<br><b>{words}</b></figcaption></figure>"""
    return f"""
<div class="card {kinds[outcome]}"><p>True class: <b>{escape(classes[label])}</b>, {outcome}</p>
<div class="three">{pictures}</div></div>"""


def origin(run: Run, data: common.Data, device: torch.device) -> str:
    """A table of the versions and data of the run, and with what the page was made."""
    config = run.config
    train, val, test = (f"{len(x):,}" for x in (data.x_train, data.x_val, data.x_test))
    facts = {
        "folder": run.folder.name,
        "seed": config["flags"]["seed"],
        "commit": config.get("commit") or "unknown",
        "Python": config.get("python"),
        "PyTorch": config.get("torch"),
        "GPU": config.get("gpu") or "none, trained on the CPU",
        "data": config["flags"]["data"],
        "images": f"{train} to train, {val} held out, {test} to test",
        "data fingerprint": config["fingerprint"],
        "attacked net": run.net["file"],
        "this page": f"attacked on {device.type}, by PyTorch {torch.__version__}",
    }
    return html_table(["what", "value"], list(facts.items()), "versions and data", "words")


def make_page(run: Run, data: common.Data, attacked: Attacked, device) -> str:
    """The whole page; its text is the same for the same run, data and flags."""
    script = importlib.import_module(run.script)
    title, _, computes = script.__doc__.split("\nUsage")[0].partition("\n")
    tiles, examples = "", ""
    for key, value in run.net.items():
        if key.endswith("_acc") and "conditional" not in key:
            text = escape(cell_text(key, value))
            tiles += f"<div><b>{text}&nbsp;%</b>{escape(metric_title(key))}</div>"
    outcomes = attacked.outcomes()
    for i in choose_examples(outcomes):
        examples += example(attacked, i, outcomes[i], data.classes)
    values = {
        "title": escape(f"{run.script}: {run.folder.name}"),
        "script": run.script,
        "script_title": escape(title),
        "net": escape(run.net["model"]),
        "tiles": tiles,
        "command": code(str(run.config.get("command")).split(" ")),
        "computes": scroll_box(f"<pre>{escape(computes.strip())}</pre>", "docstring of the script"),
        "curves": learning_curves(run),
        "n": f"{len(outcomes):,}",
        "n_broken": f"{outcomes.count(BROKEN):,}",
        "n_withstands": f"{outcomes.count(WITHSTANDS):,}",
        "n_wrong": f"{outcomes.count(WRONG_BEFORE):,}",
        "half": EXAMPLES // 2,
        "examples": examples,
        "blue": common.COLOURS[0],
        "orange": common.COLOURS[1],
        "light_blue": common.COLOURS[5],
    }
    values |= came_out(run, attacked, data) | {"facts": origin(run, data, device)}
    return string.Template(TEMPLATE.read_text(encoding="utf-8")).substitute(values)


def main(argv=None):
    """Read the run and its data, attack its net, write the page."""
    args = parse_args(argv)
    run = read_run(Path(args.run))
    out = Path(args.out).resolve() if args.out else run.folder / "report.html"
    if args.model:
        common.find_function("--model", args.model)
    data = read_data(run, args.data_root)
    device = common.find_device("auto")
    model = common.load_model(run.folder / run.net["file"], data).to(device)
    attacked = attack_images(model, data, args.n, run.config["flags"])
    page = make_page(run, data, attacked, device)
    # a name in a foreign file may hold half a character, which UTF-8 has no bytes for
    common.write_atomically(out, lambda file: file.write(page.encode(errors="replace")))
    common.print_line(f"written: {out}")


if __name__ == "__main__":
    common.start(main, stopped="nothing is half written; the same command begins again:")
