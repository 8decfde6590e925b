"""A page of one finished run: what was asked, what came out, what an attack does to the images.

Usage    python benchmark/report_run.py runs/robust_kd/my-run-s0
         python benchmark/report_run.py runs/robust_kd/my-run-s0 --n 200 --out my-run.html
Page     One HTML file that needs nothing else: the images are inside, it has no scripts, and it
         loads nothing. The command and the flags that are not at their default; the table of
         summary.json; the learning curves; which class is taken for which, on clean and on attacked
         images; eight images with their perturbations; versions and files.
Attack   PGD-20 on the last epoch of the student (--method teacher: of the teacher), with the radius
         and step of the run's own evaluation, from the same random start as its first one there. It
         attacks --n test images, a fixed choice.
Defaults are what the script's parse_args gives for the run's --loss or --method, --data, --recipe
         and --demo alone: in teacher_free_kd.py other defaults depend on these.
Data     The data set is read again and must be the one that the run had (its checksum is in
         config.json). A net of your own is never imported because a file says so: repeat --model.
         Without matplotlib the page has the learning curves only if the folder has a curves.png.
"""

import base64
import contextlib
import html
import importlib
import io
import sys
import zipfile
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
from benchmark.plots import NO_MATPLOTLIB
from benchmark.report import metric_title

SCRIPTS = (
    "fickle_teacher",
    "messy_collab",
    "robust_kd",
    "soft_randomization",
    "teacher_free_kd",
)
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
    add(
        "--model",
        metavar="MODULE:FUNCTION",
        help="net of your own that the run has trained, named as for the run",
    )
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
    flags: dict  # its flags, those that decide what is computed
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
    rows = common.read_summary(folder / "summary.json")
    if rows is None:
        advice = "the command of the run goes on where it stopped"
        raise common.UserError(f"{folder}: not finished, there is no summary.json; {advice}")
    try:
        flags = dict(config["flags"])
        check_flags(flags, config["fingerprint"])
    except common.MALFORMED:
        raise common.UserError(f"{folder / 'config.json'}: damaged; not that of a run") from None
    if flags.get("method") == "teacher":  # this run has trained no student
        nets = rows
    else:
        nets = [row for row in rows if row.get("net") == "student"]
    if not nets or not isinstance(nets[0].get("file"), str):
        advice = "delete it, and the command of the run makes it again"
        raise common.UserError(f"{folder / 'summary.json'}: names no file of a net; {advice}")
    return Run(folder, script, config, flags, rows, nets[0])


def check_flags(flags: dict, fingerprint):
    """Raise one of MALFORMED if what the page needs of config.json is not that of a run."""
    subsets = [flags[name] for name in ("train_subset", "test_subset") if flags[name] is not None]
    counts = [flags["val_size"], flags["seed"], fingerprint, *subsets]
    if 0 in subsets or not all(type(count) is int and count >= 0 for count in counts):
        raise ValueError("not counts of images")
    if not isinstance(flags["data"], str) or not isinstance(flags.get("extra_data") or "", str):
        raise ValueError("not names of data")
    step = evaluation_step(flags) or 0
    if not 0 <= flags["eps"] <= 1 or not 0 <= step < float("inf"):
        raise ValueError("no radius or no step")


def evaluation_step(flags: dict) -> float | None:
    """The step of PGD in the evaluation of a run, in pixel units; None: a quarter of the radius."""
    # --step-size of the scripts with --eval is that of the evaluation, elsewhere of the training
    return flags["step_size"] if "eval" in flags else None


def read_data(run: Run, root: str) -> common.Data:
    """The data of a run, on the CPU; a UserError if they are not there or others by now."""
    flags = run.flags
    data = common.load_data(
        flags["data"],
        root,
        val_size=flags["val_size"],
        train_subset=flags["train_subset"],
        test_subset=flags["test_subset"],
    )
    fingerprint = data.fingerprint
    if flags.get("extra_data"):
        fingerprint = add_extra_data(fingerprint, Path(flags["extra_data"]))
    if fingerprint != run.config["fingerprint"]:
        other = f"{run.folder} was made with other images or labels than are there now"
        raise common.UserError(f"{flags['data']}: {other}; put its data back")
    return data


def add_extra_data(fingerprint: int, path: Path) -> int:
    """The fingerprint of data with generated images beside them, as robust_kd.prepare makes it."""
    if not path.is_file():  # reading a pipe would block
        raise common.UserError(f"--extra-data of the run: {path}: no such file")
    try:
        return robust_kd.with_extra_data(fingerprint, path)
    except (zipfile.BadZipFile, KeyError) as error:
        raise common.UserError(f"--extra-data of the run: {path}: damaged ({error})") from None


def read_defaults(run: Run, script) -> tuple[list[str], dict | None]:
    """-> (the flags that choose the defaults, as words; {flag: default}).

    script: the module. The defaults are None where the script refuses these flags alone.
    """
    words = []
    for name in ("loss", "method", "data", "recipe"):
        if run.flags.get(name) is not None:
            words.append(f"--{name}={run.flags[name]}")
    if run.flags.get("demo"):
        words.append("--demo")
    try:
        with contextlib.redirect_stdout(io.StringIO()):  # a preset prints what it sets
            defaults = common.run_flags(script.parse_args(words))
    except common.UserError:
        defaults = None
    return words, defaults


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
        right = (self.probs.argmax(1) == self.labels).tolist()
        right_adv = (self.probs_adv.argmax(1) == self.labels).tolist()
        outcomes = []
        for before, after in zip(right, right_adv):
            if not before:
                outcomes.append(WRONG_BEFORE)
            elif after:
                outcomes.append(WITHSTANDS)
            else:
                outcomes.append(BROKEN)
        return outcomes


def attack_images(model, data: common.Data, n: int, flags: dict) -> Attacked:
    """PGD-20 on n test images (on all if there are fewer), with the radius and step of the run.

    The random start of an image depends on the run's seed and on the number of the image alone, as
    in the evaluation. Raises UserError if the model does not return a logit for each class.
    """
    device = next(model.parameters()).device
    x, labels = data.x_test.to(device), data.y_test.to(device)
    order = torch.from_numpy(np.random.default_rng(0).permutation(len(x))[:n])
    settings = eval_robustness.Settings(flags["eps"], evaluation_step(flags), seed=flags["seed"])
    parts = []
    with common.evaluating(model):
        logits = eval_robustness.clean_logits(model, x, labels, classes=len(data.classes))
        images = eval_robustness.Images(x, labels, logits)
        for _, batch in eval_robustness.batches(images, order, settings, "pgd20"):
            x_adv = eval_robustness.pgd(model, batch)
            probs, probs_adv = batch.logits.softmax(1), model(x_adv).float().softmax(1)
            parts.append([t.cpu() for t in (batch.x, x_adv, batch.labels, probs, probs_adv)])
            done = sum(len(part[0]) for part in parts)
            common.print_line(f"attacked {done} of {len(order)} test images", live=True)
    return Attacked(*(torch.cat(tensors) for tensors in zip(*parts)))


def choose_examples(outcomes: list[str]) -> list[int]:
    """Positions of up to EXAMPLES images: the first broken ones, then the first that withstand.

    Half of each; where there are too few, the other ones and then those that are wrong before.
    """
    broken = [i for i, outcome in enumerate(outcomes) if outcome == BROKEN]
    withstands = [i for i, outcome in enumerate(outcomes) if outcome == WITHSTANDS]
    wrong = [i for i, outcome in enumerate(outcomes) if outcome == WRONG_BEFORE]
    half = EXAMPLES // 2
    n_broken = max(half, EXAMPLES - len(withstands))
    n_withstands = max(half, EXAMPLES - len(broken))
    chosen = broken[:n_broken] + withstands[:n_withstands] + wrong
    return chosen[:EXAMPLES]


# ------------------------------------------------------------------------------------------------
# Pieces of HTML: what comes from a file is escaped in `escape` and nowhere else


def escape(value) -> str:
    """Any value as text of a page; it may stand in quotes too."""
    return html.escape(str(value))


def code(words: list[str]) -> str:
    """Words of a command, each of which stays on its line if it can."""
    return " ".join(f"<code>{escape(word)}</code>" for word in words)


def image_uri(pixels: np.ndarray) -> str:
    """uint8 (H, W, C) as the address of a PNG image that lies in the page itself."""
    if pixels.shape[2] == 1:
        pixels = pixels[:, :, 0]
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
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


def pixel_units(value: float) -> str:
    """A radius or step in pixel units, as a fraction of 255."""
    return f"{255 * value:.4g}/255"


def flag_text(value) -> str:
    """The value of a flag as one types it."""
    if value is None:
        return "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, list):
        return " ".join(flag_text(part) for part in value)
    return str(value)


def column_title(key: str) -> str:
    """How a column of the summary is called: pgd20_acc is PGD-20, without_1_acc without 1."""
    return metric_title(key).removesuffix("_acc").replace("_", " ")


def cell_text(key: str, value) -> str:
    """A cell of the summary: accuracies in percent with two digits, a missing value as a dash."""
    if value is None:
        return "-"
    if key.endswith("_acc") and isinstance(value, float | int):
        return f"{100 * value:.2f}"
    if isinstance(value, float):
        return f"{value:,.1f}"
    if isinstance(value, int):
        return f"{value:,}"
    return str(value)


# ------------------------------------------------------------------------------------------------
# The four sections


def asked_section(run: Run) -> str:
    """The command, the flags that are not at their default, what the script computes."""
    script = importlib.import_module(run.script)
    words, defaults = read_defaults(run, script)
    base = code([f"{run.script}.py", *words])
    changed = []
    for name, value in run.flags.items():
        if defaults is None or value != defaults.get(name):
            default = "?" if defaults is None else flag_text(defaults.get(name))
            changed.append([f"--{name.replace('_', '-')}", flag_text(value), default])
    if defaults is None:
        text = f"All flags are listed: {base} alone is refused, so its defaults are not known."
    elif changed:
        text = f"These flags have other values than {base} alone gives them."
    else:
        text = f"All flags have the values that {base} alone gives them."
    table = html_table(["flag", "value", "default"], changed, "flags", "words") if changed else ""
    # without the first line, which is below the page's title
    computes = script.__doc__.split("\nUsage")[0].partition("\n")[2].strip()
    command = str(run.config.get("command")).split(" ")
    return f"""
<h2>What was asked</h2>
<p class="command">{code(command)}</p>
<p>{text}</p>
{table}
<h3>What the script computes</h3>
<p>The beginning of {run.script}.py, as it is now:</p>
{scroll_box(f"<pre>{escape(computes)}</pre>", "docstring of the script")}"""


def summary_table(run: Run) -> str:
    """The table of summary.json."""
    keys = list(dict.fromkeys(key for row in run.rows for key in row if key != "net"))
    rows = [[cell_text(key, row.get(key)) for key in keys] for row in run.rows]
    return html_table([column_title(key) for key in keys], rows, "results")


def learning_curves(run: Run) -> str:
    """The figure of the learning curves, drawn now if the run has not drawn it."""
    path = run.folder / "curves.png"
    if not path.is_file():
        try:
            common.draw_run(run.folder, run.rows)
        except common.MALFORMED:
            wrong = "log.jsonl of the run or of its teacher is damaged"
            raise common.UserError(f"{run.folder}: {wrong}; the curves cannot be drawn") from None
    if path.is_file():
        source = image_uri(common.read_image(path))  # not a link to another file, and no other data
        words = "Accuracy after each epoch, on training and held-out images"
        return scroll_box(f'<img class="wide" src="{source}" alt="{words}">', "learning curves")
    if common.new_figure(1, 1) is None:
        print(NO_MATPLOTLIB, flush=True)
        return f"<p>{NO_MATPLOTLIB}</p>"
    return "<p>No figure: the nets of this run have no log of their epochs.</p>"


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
        cells = []
        for predicted, count in enumerate(counts):
            colour = common.COLOURS[0] if predicted == true else common.COLOURS[1]
            opacity = round(255 * 0.6 * count / max(sum(counts), 1))
            kind = ' class="zero"' if count == 0 else ""
            cells.append(f'<td{kind} style="background:{colour}{opacity:02x}">{count}</td>')
        total = f'<td class="total">{sum(counts)}</td>'
        row_name = f'<th scope="row" title="{escape(name)}">{escape(name)}</th>'
        lines.append(f"<tr>{row_name}{''.join(cells)}{total}</tr>")
    table = f'<table class="confusion">{"".join(lines)}</table>'
    return f"<div><h4>{caption}</h4>{scroll_box(table, title)}</div>"


def result_section(run: Run, attacked: Attacked, data: common.Data) -> str:
    """The table of the summary, the learning curves and the confusions."""
    eps, step = run.flags["eps"], evaluation_step(run.flags) or run.flags["eps"] / 4
    attack = f"radius {pixel_units(eps)} in L-infinity, step {pixel_units(step)}"
    measured = f"One seed, {len(data.x_test):,} test images."
    if any(key.startswith("pgd") for row in run.rows for key in row):
        starts = run.flags.get("restarts", 1)
        measured += f" PGD: {attack}, random starts for each image: {escape(starts)}."
    if len(attacked.x) == len(data.x_test):
        choice = f"all {len(data.x_test):,} test images"
    else:
        choice = f"{len(attacked.x):,} of the {len(data.x_test):,} test images, chosen at random"
        choice += " but always the same (<code>--n</code> says how many)"
    curves = learning_curves(run)
    tables = confusion("Clean images", attacked.labels, attacked.probs, data.classes)
    tables += confusion("Under PGD-20", attacked.labels, attacked.probs_adv, data.classes)
    if len(data.classes) > LARGEST_MATRIX:
        legend = f"The {LISTED_CONFUSIONS} most frequent confusions."
    else:
        legend = """A row is a true class, a column what the net takes it for. Blue is right,
orange is wrong; the stronger, the larger the share of the row."""
    return f"""
<h2>What came out</h2>
<p>Accuracies in percent. {measured} A row is a net after its last epoch, unless it says “best on
held-out images”.</p>
{summary_table(run)}
<h3>Learning curves</h3>
{curves}
<h3>Which class is taken for which</h3>
<p><b>{escape(run.net["model"])}</b> on {choice}. The attack is PGD-20 with {attack}, one random
start. {legend} Images that are wrong without an attack are attacked too.</p>
<div class="two">{tables}</div>"""


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


def example_section(attacked: Attacked, data: common.Data) -> str:
    """Some images, their perturbations, and what the net says before and after."""
    outcomes = attacked.outcomes()
    counts = Counter(outcomes)
    cards = ""
    for i in choose_examples(outcomes):
        cards += example(attacked, i, outcomes[i], data.classes)
    return f"""
<h2>Examples</h2>
<p>Attacked images: {len(outcomes):,}. Broken by the attack (right before, wrong after):
{counts[BROKEN]:,}. Right before and after: {counts[WITHSTANDS]:,}. Wrong without an attack:
{counts[WRONG_BEFORE]:,}. Shown are the first {EXAMPLES // 2} that are broken and the first
{EXAMPLES // 2} that withstand, in a fixed random order; where there are fewer, more of the other
kind, then images that are wrong without an attack. Below each image stands what the net takes it
for, with its probability. The middle picture is the change of each pixel, ten times as large as it
was: grey is no change, and black and white cut it off. Pixels are rounded to 8 bits for this page
alone.</p>
<div class="two">{cards}</div>"""


def origin_section(run: Run, data: common.Data, device: torch.device, out: Path) -> str:
    """Versions, data and files of the run, and with what the page was made."""
    config = run.config
    train, val, test = (f"{len(x):,}" for x in (data.x_train, data.x_val, data.x_test))
    facts = [
        ["folder", run.folder.name],
        ["seed", run.flags["seed"]],
        ["commit", config.get("commit") or "unknown"],
        ["Python", config.get("python")],
        ["PyTorch", config.get("torch")],
        ["GPU", config.get("gpu") or "none, trained on the CPU"],
        ["data", run.flags["data"]],
        ["images", f"{train} to train, {val} held out, {test} to test"],
        ["data fingerprint", config["fingerprint"]],
        ["attacked net", run.net["file"]],
        ["this page", f"attacked on {device.type}, by PyTorch {torch.__version__}"],
    ]
    files = []
    for path in sorted(run.folder.iterdir()):
        hidden = path.name.startswith(".") or path.name == "lock"
        if path.is_file() and not hidden and path != out:
            files.append([path.name, f"{path.stat().st_size:,}"])
    return f"""
<h2>Where it comes from</h2>
<div class="two"><div>{html_table(["what", "value"], facts, "versions and data", "words")}</div>
<div>{html_table(["file", "bytes"], files, "files")}</div></div>"""


# ------------------------------------------------------------------------------------------------
# The page

# The two themes differ in these colours alone
THEMES = f"""
:root {{ color-scheme: light dark; --page: #ffffff; --box: #f5f7f9; --text: #1b1f24;
  --soft: #57606a; --line: #d5dbe1; --good: {common.COLOURS[0]}; --bad: {common.COLOURS[1]}; }}
@media (prefers-color-scheme: dark) {{ :root {{ --page: #14171b; --box: #1e2228; --text: #e6e9ec;
  --soft: #a3adb8; --line: #3a414a; --good: {common.COLOURS[5]}; --bad: {common.COLOURS[1]}; }} }}
"""
STYLE = """
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1.5rem 1rem 4rem; max-width: 68rem; background: var(--page);
  color: var(--text); font: 1rem/1.55 system-ui, "Segoe UI", Roboto, Helvetica, Arial, sans-serif; }
h1 { margin: 0; font-size: 1.7rem; line-height: 1.25; overflow-wrap: anywhere; }
h2 { margin: 3rem 0 .8rem; padding-top: 1rem; border-top: 1px solid var(--line);
  font-size: 1.35rem; }
h3 { margin: 2rem 0 .5rem; font-size: 1.08rem; }
h4 { margin: 0 0 .4rem; font-size: 1rem; }
p { max-width: 46rem; margin: .5rem 0 .9rem; overflow-wrap: anywhere; }
.soft { color: var(--soft); }
code, pre { font: .85rem/1.5 ui-monospace, "Cascadia Mono", Menlo, Consolas, "DejaVu Sans Mono",
  monospace; }
code { display: inline-block; max-width: 100%; overflow-wrap: anywhere; }
pre { margin: 0; padding: .8rem 1rem; width: max-content; min-width: 100%; }
.command { max-width: none; padding: .7rem 1rem; border: 1px solid var(--line);
  border-radius: 6px; background: var(--box); }
.scroll { overflow-x: auto; max-width: 100%; border: 1px solid var(--line); border-radius: 6px;
  background: var(--box); }
table { border-collapse: collapse; min-width: 100%; font-size: .9rem;
  font-variant-numeric: tabular-nums; }
th, td { padding: .35rem .75rem; text-align: right; white-space: nowrap; }
th:first-child { position: sticky; left: 0; background: var(--box); text-align: left;
  font-weight: 600; white-space: normal; min-width: min(14rem, 38vw); }
thead th { color: var(--soft); font-weight: 600; vertical-align: bottom; white-space: normal;
  min-width: 5rem; }
tr + tr > *, thead + tr > * { border-top: 1px solid var(--line); }
.words td { text-align: left; white-space: normal; overflow-wrap: anywhere; }
.words th { text-align: left; }
.tiles { display: flex; flex-wrap: wrap; gap: .8rem; margin-top: 1.2rem; }
.tiles div { padding: .6rem 1rem; background: var(--box); border: 1px solid var(--line);
  border-left: 4px solid var(--good); border-radius: 6px; color: var(--soft); font-size: .9rem; }
.tiles b { display: block; color: var(--text); font-size: 1.5rem; line-height: 1.3; }
.two { display: grid; gap: 1.2rem; align-items: start;
  grid-template-columns: repeat(auto-fit, minmax(min(100%, 26rem), 1fr)); }
.two > * { min-width: 0; }
.confusion { font-size: .82rem; }
.confusion th, .confusion td { padding: .2rem .3rem; border: 0; }
.confusion td { min-width: 2.1rem; text-align: center; }
.confusion th:first-child { padding-left: .6rem; min-width: 0; max-width: 7rem;
  white-space: nowrap; overflow: hidden; text-overflow: ellipsis; }
.confusion th span { display: block; max-height: 6rem; margin: 0 auto; overflow: hidden;
  writing-mode: vertical-rl; transform: rotate(180deg); }
.confusion tr:first-child th { vertical-align: bottom; text-align: center; font-weight: 400; }
.confusion tr:first-child th.corner { text-align: left; color: var(--soft); }
.confusion .zero, .confusion .total { color: var(--soft); }
img { display: block; max-width: 100%; height: auto; }
.wide { width: 100%; min-width: 42rem; }
.card { padding: .7rem 1rem; background: var(--box); border: 1px solid var(--line);
  border-left: 4px solid var(--soft); border-radius: 6px; }
.card.broken { border-left-color: var(--bad); }
.card.withstands { border-left-color: var(--good); }
.card p { margin: 0 0 .5rem; }
.three { display: grid; grid-template-columns: repeat(3, minmax(0, 1fr)); gap: .7rem; }
figure { margin: 0; }
figcaption { margin-top: .3rem; color: var(--soft); font-size: .8rem; line-height: 1.4;
  overflow-wrap: anywhere; }
figcaption b { color: var(--text); font-weight: 600; }
.pixels { width: 100%; image-rendering: pixelated; border-radius: 3px; }
"""
# Nothing is loaded and nothing runs, whatever the text of a run would say
POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"


def result_tiles(run: Run) -> str:
    """The accuracies of the attacked net in large type."""
    tiles = ""
    for key, value in run.net.items():
        if key.endswith("_acc") and "conditional" not in key:
            text = escape(cell_text(key, value))
            tiles += f"<div><b>{text}&nbsp;%</b>{escape(column_title(key))}</div>"
    return f'<div class="tiles">{tiles}</div>'


def make_page(run: Run, data: common.Data, attacked: Attacked, device, out: Path) -> str:
    """The whole page; its text is the same for the same run, data and flags."""
    name = escape(f"{run.script}: {run.folder.name}")
    doc = importlib.import_module(run.script).__doc__.splitlines()[0]
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="{POLICY}">
<title>{name}</title>
<style>{THEMES}{STYLE}</style>
</head>
<body>
<h1>{name}</h1>
<p class="soft">{escape(doc)}</p>
<p>Test accuracy of <b>{escape(run.net["model"])}</b> after its last epoch:</p>
{result_tiles(run)}
{asked_section(run)}
{result_section(run, attacked, data)}
{example_section(attacked, data)}
{origin_section(run, data, device, out)}
</body>
</html>
"""


def main(argv=None):
    """Read the run and its data, attack its net, write the page."""
    args = parse_args(argv)
    run = read_run(Path(args.run))
    out = Path(args.out).resolve() if args.out else run.folder / "report.html"
    if args.model:
        common.find_function("--model", args.model)
    data = read_data(run, args.data_root)
    device = common.find_device("auto")
    model = common.load_model(run.folder / run.net["file"], data)
    attacked = attack_images(model, data, args.n, run.flags)
    page = make_page(run, data, attacked, device, out)
    # a name in a foreign file may hold half a character, which UTF-8 has no bytes for
    common.write_atomically(out, lambda file: file.write(page.encode(errors="replace")))
    common.print_line(f"written: {out}")


if __name__ == "__main__":
    common.start(main, stopped="nothing is half written; the same command begins again:")
