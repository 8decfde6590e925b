"""The fickle teacher's noise against its definitions; what all three noisy scripts share."""

import json
import math
import re

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from conftest import same_weights

import common
import eval_robustness
import fickle_teacher
import messy_collab
import soft_randomization

SCRIPTS = {
    "fickle_teacher": fickle_teacher,
    "soft_randomization": soft_randomization,
    "messy_collab": messy_collab,
}
SMALL = (
    "--data shapes --model mlp-8 --teacher-model mlp-12 --device cpu --train-subset 48 --lr 0.05 "
    "--test-subset 20 --val-size 20 --batch-size 16 --teacher-epochs 2 --epochs 3 "
    "--eval-restarts 1 --name x"
)


def run(script, runs, flags=""):
    """Run a script with SMALL and the flags; -> the rows of the summary of each seed."""
    return SCRIPTS[script].main([*SMALL.split(), *flags.split(), "--runs", str(runs)])


def student_file(script, runs, flags=""):
    """Run a script with SMALL and the flags; -> the student of seed 0."""
    run(script, runs, flags)
    return runs / script / "x-s0" / "student.pt"


def roles(rows):
    """The roles of the nets in a summary, but that of a best epoch that is not the last."""
    return [row["net"] for row in rows if row["net"] != "best"]


def teacher_of(script, runs, flags):
    """Run a script for one epoch of each net; -> the file of the teacher in its summary."""
    name = f"run{len([*runs.glob('*/run*')])}"
    (rows,) = run(script, runs, f"--epochs 1 --teacher-epochs 1 {flags} --name {name}")
    (file,) = [row["file"] for row in rows if row["net"] == "teacher"]
    (folder,) = runs.glob(f"{script}/{name}-s*")
    return (folder / file).resolve()


def teacher_files(runs):
    """{seed: file} of all teachers below runs, which differ by the seed."""
    found = {}
    for path in runs.glob("teachers/*/teacher.pt"):
        seed = json.loads((path.parent / "recipe.json").read_text())["seed"]
        assert seed not in found
        found[seed] = path
    return found


# ------------------------------------------------------------------------------------------------
# The loss


def softmax(row, temperature=1.0):
    exponentials = [math.exp(value / temperature) for value in row]
    return [value / sum(exponentials) for value in exponentials]


@pytest.mark.parametrize("temperature, alpha", [(4.0, 0.9), (1.0, 0.3)])
def test_hinton_loss_is_its_equation(temperature, alpha):
    student, teacher = torch.randn(5, 4) * 2, torch.randn(5, 4) * 3
    labels = torch.tensor([0, 3, 1, 1, 2])
    total = 0.0
    for student_row, teacher_row, label in zip(student.tolist(), teacher.tolist(), labels.tolist()):
        teacher_probs = softmax(teacher_row, temperature)
        student_probs = softmax(student_row, temperature)
        kl = sum(t * math.log(t / s) for t, s in zip(teacher_probs, student_probs))
        total -= (1 - alpha) * math.log(softmax(student_row)[label])
        total += alpha * temperature**2 * kl
    loss = fickle_teacher.hinton_loss(student, teacher, labels, alpha, temperature)
    assert loss.item() == pytest.approx(total / 5, rel=1e-5)


def test_hinton_loss_gives_the_teacher_no_gradient_and_alpha_zero_is_cross_entropy():
    student = torch.randn(5, 4, requires_grad=True)
    teacher = torch.randn(5, 4, requires_grad=True)
    labels = torch.tensor([0, 3, 1, 1, 2])
    fickle_teacher.hinton_loss(student, teacher, labels, 0.9, 4.0).backward()
    assert teacher.grad is None and student.grad.abs().sum() > 0
    labels_alone = fickle_teacher.hinton_loss(student, teacher, labels, 0.0, 4.0)
    assert torch.equal(labels_alone, F.cross_entropy(student, labels))
    equal = fickle_teacher.hinton_loss(student, student, labels, 1.0, 4.0)
    assert equal.item() == pytest.approx(0, abs=1e-5)


# ------------------------------------------------------------------------------------------------
# How the teacher varies


def test_signal_noise_has_the_moments_of_its_equation_logit_by_logit():
    z = torch.tensor([[-3.0, 0.0, 0.5, 8.0]])
    noisy = fickle_teacher.signal_noise(z.expand(40_000, 4), 0.3)
    assert torch.allclose(noisy.mean(0), z[0], atol=0.05)
    assert torch.allclose(noisy.std(0), 0.3 * z[0].abs(), rtol=0.03)
    correlations = torch.corrcoef(noisy[:, [0, 2, 3]].T).triu(1)
    assert correlations.abs().max() < 0.03  # each logit has a draw of its own
    per_image = fickle_teacher.signal_noise(z.expand(1000, 4), 0.3, "image")
    assert torch.allclose(per_image / per_image[:, 3:], z / 8.0) and per_image.std(0)[3] > 1
    assert torch.equal(fickle_teacher.signal_noise(z, 0.0), z)


def swap_one_row(z, temperature, swap, threshold, gap, draws):
    """swap_logits for a row as a walk over its pairs from the top; draws: which pairs may swap."""
    order = sorted(range(len(z)), key=lambda k: -z[k])
    probs = softmax(z, temperature)
    values, classes = [z[k] for k in order], list(order)
    pairs = 1 if swap == "top2" else len(z) - 1
    for i in range(pairs):
        larger, smaller = probs[order[i]], probs[order[i + 1]]
        difference = larger - smaller
        if gap == "relative":
            difference /= larger
        if difference < threshold and draws[i]:
            classes[i], classes[i + 1] = classes[i + 1], classes[i]
    return [value for _, value in sorted(zip(classes, values))]


@pytest.mark.parametrize("gap, threshold", [("relative", 0.2), ("absolute", 0.02)])
@pytest.mark.parametrize("swap", ["top2", "all"])
def test_swaps_are_those_of_a_walk_from_the_top(swap, gap, threshold):
    z = torch.randn(200, 7) * 3
    torch.manual_seed(5)
    draws = torch.rand(200, 6) < 0.5
    torch.manual_seed(5)
    swapped = fickle_teacher.swap_logits(z, 4.0, swap, 0.5, threshold, gap)
    for row, expected_row, draws_of_row in zip(swapped.tolist(), z.tolist(), draws.tolist()):
        assert row == swap_one_row(expected_row, 4.0, swap, threshold, gap, draws_of_row)
    assert torch.equal(swapped.sort(1).values, z.sort(1).values)  # the same logits in each row
    changed_rows = (swapped != z).any(1).sum()
    assert 10 < changed_rows < 190


def test_swaps_happen_only_below_the_threshold_and_as_often_as_asked():
    z = torch.tensor([2.0, 1.9, -1.0, -5.0]).repeat(20_000, 1)  # relative gaps .02, .52, .63
    assert torch.equal(fickle_teacher.swap_logits(z, 4.0, "all", 1.0, 0.0), z)
    assert torch.equal(fickle_teacher.swap_logits(z, 4.0, "all", 0.0, 2.0), z)
    swapped = fickle_teacher.swap_logits(z, 4.0, "all", 0.3, 0.1)
    assert torch.equal(swapped[:, 2:], z[:, 2:])
    share = (swapped[:, 0] != z[:, 0]).double().mean().item()
    assert share == pytest.approx(0.3, abs=5 * math.sqrt(0.21 / 20_000))
    first_to_last = fickle_teacher.swap_logits(z[:1], 4.0, "all", 1.0, 2.0)
    assert torch.equal(first_to_last, torch.tensor([[-5.0, 2.0, 1.9, -1.0]]))
    first_two = fickle_teacher.swap_logits(z[:1], 4.0, "top2", 1.0, 2.0)
    assert torch.equal(first_two, torch.tensor([[1.9, 2.0, -1.0, -5.0]]))


@pytest.mark.parametrize("mode", ["dropout", "train"])
def test_a_fickle_teacher_varies_by_dropout_and_keeps_its_running_statistics(mode):
    teacher, x = common.build_model("wrn-10-1", dropout=0.3).eval(), torch.rand(8, 3, 32, 32)
    assert torch.equal(teacher(x), teacher(x))
    before = {name: value.clone() for name, value in teacher.state_dict().items()}
    fickle_teacher.make_fickle(teacher, mode)
    norms = [m for m in teacher.modules() if isinstance(m, nn.BatchNorm2d)]
    dropouts = [m for m in teacher.modules() if isinstance(m, nn.Dropout)]
    assert len(dropouts) == 3 and all(m.training for m in dropouts)
    assert norms and all(m.training == (mode == "train") for m in norms)
    with torch.no_grad():
        assert not torch.equal(teacher(x), teacher(x))
    for name, value in teacher.state_dict().items():
        if "running" in name:
            assert torch.equal(value, before[name]), name


def test_layers_of_all_dimensions_vary():
    layers = [nn.Dropout(), nn.Dropout2d(), nn.Dropout1d(), nn.BatchNorm1d(2), nn.BatchNorm3d(2)]
    for mode, active in (("dropout", 3), ("train", 5)):
        teacher = nn.Sequential(*layers).eval()
        fickle_teacher.make_fickle(teacher, mode)
        assert [layer.training for layer in teacher] == [True] * active + [False] * (5 - active)


def test_a_transformer_s_dropout_varies():
    """In eval mode its layers take a path of their own, without dropout."""
    layer = nn.TransformerEncoderLayer(8, 2, 16, 0.5, batch_first=True)
    teacher, x = nn.Sequential(layer).eval().requires_grad_(False), torch.rand(2, 3, 8)
    assert torch.equal(teacher(x), teacher(x))
    fickle_teacher.make_fickle(teacher, "dropout")
    with torch.no_grad():
        assert not torch.equal(teacher(x), teacher(x))
    assert layer.self_attn.training


def test_the_demo_of_a_method_without_dropout_has_a_teacher_without():
    for method in ("signal", "swap", "student"):
        flags = ["--demo", "--method", method, "--teacher-model", "resnet18-w8"]
        args = fickle_teacher.parse_args(flags)
        assert args.dropout == 0 and not fickle_teacher.teacher_args(args).dropout
    assert fickle_teacher.parse_args(["--demo"]).dropout == 0.1


def test_dropout_that_a_given_teacher_has_not_learned_with_is_refused(tmp_path, refused):
    common.save_model(tmp_path / "t.pt", common.build_model("mlp-12"))
    flags = f"{SMALL} --method hinton --teacher-ckpt {tmp_path}/t.pt --runs {tmp_path}"
    fickle_teacher.main(flags.split())
    message = refused(fickle_teacher.main, f"{flags} --dropout 0.4 --name y".split())
    assert "learned with dropout 0, not --dropout 0.4" in message


@pytest.mark.parametrize("script", [fickle_teacher, messy_collab, soft_randomization])
@pytest.mark.parametrize("method", ["teacher", "student"])
def test_a_demo_of_one_net_trains_one_net(script, method, tmp_path):
    flags = f"--demo --method {method} --epochs 1 --teacher-epochs 1 --runs {tmp_path}"
    (rows,) = script.main(f"{flags} --train-subset 30 --test-subset 10 --device cpu".split())
    assert {row["net"] for row in rows} - {"best"} == {method}


@pytest.mark.parametrize("mode", ["dropout", "train"])
def test_dropout_is_active_while_the_teacher_teaches_and_off_when_it_is_evaluated(
    mode, tmp_path, monkeypatch
):
    modes = []  # of the teacher's dropout and BatchNorm, at each batch that it sees
    get_teacher = fickle_teacher.get_teacher

    def record_modes(args, data):
        teacher = get_teacher(args, data)
        dropout = next(m for m in teacher.modules() if isinstance(m, nn.Dropout))
        norm = next(m for m in teacher.modules() if isinstance(m, nn.BatchNorm2d))
        teacher.register_forward_pre_hook(
            lambda *_: modes.append((dropout.training, norm.training))
        )
        return teacher

    monkeypatch.setattr(fickle_teacher, "get_teacher", record_modes)
    flags = f"--teacher-mode {mode} --teacher-model wrn-10-1 --dropout 0.3 --epochs 1"
    (rows,) = run("fickle_teacher", tmp_path, f"{flags} --teacher-epochs 1 --test-subset 5")
    assert modes[:3] == [(True, mode == "train")] * 3  # three batches
    assert len(modes) > 3 and set(modes[3:]) == {(False, False)}
    (teacher_path,) = teacher_files(tmp_path).values()
    teacher = common.load_model(teacher_path)
    assert teacher.build_arguments["dropout"] == 0.3
    data = common.load_data("shapes", test_subset=5)
    attack = {"eps": 0.031, "step_size": 0.003, "restarts": 1, "seed": 0}
    accuracies = eval_robustness.evaluate(
        teacher, data.x_test, data.y_test, ["clean", "pgd20"], **attack
    )
    assert rows[0]["net"] == "teacher" and rows[0] == rows[0] | accuracies
    student = common.load(tmp_path / "fickle_teacher" / "x-s0" / "student.pt")
    assert student["arch"]["dropout"] == 0.0


CHANGED_LOGITS = {  # flags -> what they make of the teacher's logits
    "--method hinton": lambda z: z,
    "--method signal --sigma 0.5": lambda z: fickle_teacher.signal_noise(z, 0.5, "logit"),
    "--method signal --sigma 0.5 --noise-per image": lambda z: fickle_teacher.signal_noise(
        z, 0.5, "image"
    ),
    "--method swap --swap all --swap-probability 0.5 --swap-threshold 0.9 --swap-gap absolute": (
        lambda z: fickle_teacher.swap_logits(z, 2.0, "all", 0.5, 0.9, "absolute")
    ),
    "--method swap --swap-probability 0.6 --swap-threshold 1": (
        lambda z: fickle_teacher.swap_logits(z, 2.0, "top2", 0.6, 1.0, "relative")
    ),
}


@pytest.mark.parametrize("flags", CHANGED_LOGITS)
def test_the_first_step_has_the_loss_of_the_method_and_its_flags(flags, tmp_path):
    flags_of_loss = "--alpha 0.3 --temperature 2 --epochs 1"
    args = fickle_teacher.parse_args([*SMALL.split(), *flags.split(), *flags_of_loss.split()])
    args.seed = 0
    data = common.load_data("shapes", train_subset=16)
    teacher = common.new_model(data, "mlp-12", 7, "teacher").eval().requires_grad_(False)
    fickle_teacher.train(args, data, tmp_path, "student", teacher)
    (row,) = common.read_log(tmp_path)["student"]  # of one step
    model = common.new_model(data, "mlp-8", 0, "student")
    ((x, labels),) = common.batches(data, 16, 0, "student", 0)
    common.seed_epoch(0, "student", 0)
    teacher_logits = CHANGED_LOGITS[flags](teacher(x))
    assert torch.equal(teacher_logits, teacher(x)) == (flags == "--method hinton")
    expected = fickle_teacher.hinton_loss(model(x), teacher_logits, labels, 0.3, 2.0)
    assert row["loss"] == pytest.approx(expected.item(), rel=1e-6)


@pytest.mark.parametrize(
    "flags, epochs, milestones",
    [
        ("--method hinton", 200, [60, 120, 150]),
        ("--method hinton --dropout 0.4", 200, [60, 120, 150]),
        ("--dropout 0.1", 250, [75, 150, 200]),
        ("--dropout 0.2", 250, [75, 150, 200]),
        ("--dropout 0.3", 300, [90, 180, 240]),
        ("--dropout 0.4", 350, [105, 210, 280]),
        ("--dropout 0.5", 350, [105, 210, 280]),
        ("", 350, [105, 210, 280]),
        ("--dropout 0.3 --epochs 20", 20, [6, 12, 16]),
        ("--dropout 0.3 --epochs 1", 1, [1, 1, 1]),
        ("--dropout 0.3 --epochs 9 --milestones 5", 9, [5]),
    ],
)
def test_the_schedule_follows_the_rate_of_dropout(flags, epochs, milestones):
    args = fickle_teacher.parse_args(flags.split())
    assert (args.epochs, args.milestones) == (epochs, milestones)


# ------------------------------------------------------------------------------------------------
# Methods and their limits, in all three scripts


@pytest.mark.parametrize(
    "script, method",
    [(script, method) for script, module in SCRIPTS.items() for method in module.METHODS],
)
def test_every_method_runs_and_ends_in_finite_numbers(script, method, tmp_path):
    (rows,) = run(script, tmp_path, f"--method {method} --epochs 1 --teacher-epochs 1")
    expected = [] if method in ("student", "gaussian") else ["teacher"]
    if method != "teacher":
        expected.append("student")
    assert roles(rows) == expected
    for row in rows:
        assert 0 <= row["pgd20_acc"] <= row["clean_acc"] <= 1 and row["epochs"] == 1
    logs = [*tmp_path.rglob("log.jsonl")]
    assert logs
    for log in logs:
        for line in log.read_text().splitlines():
            assert 0 < json.loads(line)["loss"] < 1e3


@pytest.mark.parametrize("script", SCRIPTS)
def test_the_demo_ends_with_one_table_of_a_net_alone_and_the_nets_of_its_method(
    script, tmp_path, capsys
):
    module = SCRIPTS[script]
    method = module.parse_args(["--demo"]).method
    flags = f"{SMALL} --epochs 2 --teacher-epochs 1 --runs {tmp_path}".replace("--name x", "")
    (rows,) = module.main(f"{flags} --demo".split())
    printed = capsys.readouterr().out
    assert roles(rows) == ["alone", "teacher", "student"]
    labels = ["student alone", "teacher", f"student ({method})"]
    assert [row["model"] for row in rows if row["net"] != "best"] == labels
    end = printed[printed.rindex("clean_acc") :]
    assert all(end.count(f"\n{label} ") == 1 for label in labels)
    (folder,) = tmp_path.glob(f"{script}/*")
    assert folder.name.startswith("demo-shapes")
    assert module.main(f"{flags} --demo".split()) == [rows]  # it is finished
    # alone is the net of --method student, with the same wrong labels and none beside them
    wrong = "--corruption-rate 0.5" if script == "messy_collab" else ""
    module.main(f"{flags} --method student {wrong} --name student".split())
    student = tmp_path / script / "student-s0" / "student.pt"
    assert same_weights(folder / "student-alone.pt", student)
    assert not same_weights(folder / "student.pt", student)
    module.main(f"{flags} --demo --name own".split())
    assert (tmp_path / script / "own-s0" / "summary.json").exists()


LIMITS = [
    ("fickle_teacher", "--method fickle --dropout 0", "--method hinton"),
    ("fickle_teacher", "--method signal --sigma 0", "--method hinton"),
    ("fickle_teacher", "--method swap --swap-probability 0", "--method hinton"),
    ("fickle_teacher", "--method swap --swap all --swap-threshold 0", "--method hinton"),
    ("fickle_teacher", "--method hinton --alpha 0", "--method student"),
    ("soft_randomization", "--sigma 0", "--method hinton"),
    ("soft_randomization", "--method gaussian --sigma 0", "--method student"),
    ("soft_randomization", "--alpha 0 --sigma 0.1", "--method gaussian --sigma 0.1"),
    ("messy_collab", "--method mc-ts --noise-rate 0", "--method hinton"),
    ("messy_collab", "--method flc-ts --corruption-rate 0", "--method hinton"),
    ("messy_collab", "--method mc-s --alpha 0 --noise-rate 0", "--method student"),
]


@pytest.mark.parametrize("script, flags, limit", LIMITS)
def test_at_its_limit_a_method_is_its_baseline_bit_for_bit(script, flags, limit, tmp_path):
    student = student_file(script, tmp_path / "method", flags)
    assert same_weights(student, student_file(script, tmp_path / "baseline", limit))


NOISY = [
    ("fickle_teacher", "--method hinton"),
    ("fickle_teacher", "--method hinton --teacher-milestones 2"),
    ("fickle_teacher", "--method hinton --milestones 1"),
    ("fickle_teacher", "--method fickle --dropout 0.3"),
    ("fickle_teacher", "--method hinton --dropout 0.3"),
    ("fickle_teacher", "--method signal --sigma 0.1"),
    ("fickle_teacher", "--method signal --sigma 0.1 --noise-per image"),
    ("fickle_teacher", "--method swap --swap all --swap-threshold 0.9"),
    ("soft_randomization", "--sigma 0.1"),
    ("soft_randomization", "--sigma 0.1 --clip"),
    ("messy_collab", "--method mc-t --noise-rate 0.2"),
    ("messy_collab", "--method mc-s --noise-rate 0.2"),
    ("messy_collab", "--method flc-t --corruption-rate 0.2"),
    ("messy_collab", "--method flc-s --corruption-rate 0.2"),
]


def test_away_from_its_limit_every_method_gives_another_student(tmp_path):
    students = []
    for i, (script, flags) in enumerate(NOISY):
        student = student_file(script, tmp_path / str(i), flags)
        assert not any(same_weights(student, other) for other in students), flags
        students.append(student)


# ------------------------------------------------------------------------------------------------
# Teachers and seeds, in all three scripts


@pytest.mark.parametrize("method", ["teacher", "student", "hinton"])
def test_a_baseline_is_the_same_in_each_script_and_its_teacher_is_trained_once(method, tmp_path):
    summaries, students = [], []
    for script in SCRIPTS:
        (rows,) = run(script, tmp_path, f"--method {method}")
        for row in rows:
            del row["seconds"]
        summaries.append(rows)
        students.append(tmp_path / script / "x-s0" / "student.pt")
    assert summaries[0] == summaries[1] == summaries[2]
    if method != "teacher":
        assert all(same_weights(students[0], student) for student in students)
    assert list(teacher_files(tmp_path)) == ([] if method == "student" else [0])


TEACHER_KEPT = {
    "fickle_teacher": [
        "--method hinton --epochs 3 --milestones 2",
        "--method hinton --alpha 0.2 --temperature 2",
        "--method hinton --model mlp-3 --eval-eps 0.1 --eval-step-size 0.01 --eval-restarts 2",
        "--method hinton --test-subset 10 --compile",
        "--method signal --sigma 0.5 --noise-per image",
        "--method swap --swap all --swap-probability 1 --swap-threshold 1 --swap-gap absolute",
        "--method fickle --dropout 0 --teacher-mode train",
        "--method teacher",
    ],
    "soft_randomization": ["", "--sigma 0.3 --clip", "--demo --method hinton"],
    "messy_collab": ["--method mc-s --noise-rate 0.4", "--method mc-t --noise-rate 0"],
}
TEACHER_CHANGED = [
    "--teacher-milestones 1",
    "--teacher-epochs 1 --teacher-milestones 1 2 2",
    "--teacher-model mlp-11",
    "--augment none",
    "--gamma 0.5",
    "--lr 0.2",
    "--batch-size 8",
    "--weight-decay 0",
    "--train-subset 47",
    "--val-size 10",
    "--precision fp32",
    "--dropout 0.4",
    "--method teacher --seed 1",
]


def teacher_folder(script, runs, flags):
    """The folder in which a script would look for the teacher of SMALL and the flags."""
    args = SCRIPTS[script].parse_args([*SMALL.split(), *flags.split(), "--runs", str(runs)])
    data = common.load_training_data(args, torch.device("cpu"))
    args.seed = args.seed[0]
    return common.teacher_folder(SCRIPTS[script].teacher_args(args), data)


def test_a_teacher_is_shared_if_nothing_differs_that_it_depends_on(tmp_path):
    plain = teacher_folder("fickle_teacher", tmp_path, "--method hinton")
    for script, kept in TEACHER_KEPT.items():
        for flags in kept:
            assert teacher_folder(script, tmp_path, flags) == plain, flags
    folders = {plain}
    for flags in TEACHER_CHANGED:
        folders.add(teacher_folder("fickle_teacher", tmp_path, f"--method hinton {flags}"))
    assert len(folders) == 1 + len(TEACHER_CHANGED)


def test_runs_with_the_same_teacher_train_it_once(tmp_path):
    def teacher(flags):
        return teacher_of("fickle_teacher", tmp_path, flags)

    fickle, plain = teacher("--dropout 0.4"), teacher("--method signal --sigma 0.2")
    written = [path.stat().st_mtime_ns for path in (fickle, plain)]
    assert teacher("--method hinton --dropout 0.4 --alpha 0.2 --temperature 2") == fickle
    assert teacher("--dropout 0.4 --seed 7") == fickle
    assert teacher("--method teacher --dropout 0.4 --seed 0") == fickle
    assert teacher("--method signal --sigma 0.4 --noise-per image") == plain
    assert teacher("--method swap --swap all --seed 3") == plain
    assert teacher_of("soft_randomization", tmp_path, "--sigma 0.2") == plain
    assert teacher_of("messy_collab", tmp_path, "--method mc-s --noise-rate 0.4") == plain
    others = ("--method teacher --seed 3", "--gamma 0.5", "--lr 0.2", "--weight-decay 0.1")
    for flags in others:
        if "--method" not in flags:
            flags += " --method hinton"
        assert teacher(flags) not in (fickle, plain), flags
    assert written == [path.stat().st_mtime_ns for path in (fickle, plain)]
    assert len([*tmp_path.glob("teachers/*/teacher.pt")]) == 2 + len(others)


@pytest.mark.parametrize("script", SCRIPTS)
def test_the_milestones_of_a_teacher_are_60_120_150_of_200_stretched(script):
    module = SCRIPTS[script]

    def milestones(flags):
        return module.teacher_args(module.parse_args(flags.split())).milestones

    assert milestones("") == [60, 120, 150]
    assert milestones("--teacher-epochs 4") == [2, 3, 3]
    assert milestones("--epochs 4 --milestones 1") == [60, 120, 150]
    assert milestones("--teacher-milestones 7 9") == [7, 9]


def test_seeds_share_the_teacher_and_draw_other_students(tmp_path):
    run("fickle_teacher", tmp_path, "--dropout 0.2 --seed 3 5")
    assert list(teacher_files(tmp_path)) == [0]
    students = [tmp_path / f"fickle_teacher/x-s{seed}/student.pt" for seed in (3, 5)]
    assert not same_weights(*students)
    run("fickle_teacher", tmp_path / "alone", "--dropout 0.2 --seed 5")
    assert same_weights(tmp_path / "alone/fickle_teacher/x-s5/student.pt", students[1])


@pytest.mark.parametrize("script", SCRIPTS)
def test_method_teacher_is_about_the_teacher_of_the_seed_and_students_share_it(script, tmp_path):
    summaries = run(script, tmp_path, "--method teacher --seed 0 1 2")
    files = teacher_files(tmp_path)
    assert sorted(files) == [0, 1, 2]
    data = common.load_data("shapes", test_subset=20)
    for seed, (row,) in enumerate(summaries):
        teacher = common.load_model(files[seed])
        accuracy = common.accuracy(common.predict(teacher, data.x_test), data.y_test)
        assert row["net"] == "teacher" and row["clean_acc"] == accuracy
        assert (tmp_path / script / f"x-s{seed}" / row["file"]).resolve() == files[seed].resolve()
        assert not any(same_weights(files[seed], files[other]) for other in range(seed))
    times = {seed: path.stat().st_mtime_ns for seed, path in files.items()}
    run(script, tmp_path, "--method hinton --seed 5 --epochs 1")
    assert teacher_files(tmp_path) == files  # none was trained
    assert {seed: path.stat().st_mtime_ns for seed, path in files.items()} == times


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_teacher_that_is_not_there_is_said_before_data_are_fetched(script, monkeypatch, refused):
    monkeypatch.setattr(common, "load_data", None)
    said = refused(SCRIPTS[script].main, ["--method", "hinton", "--teacher-ckpt", "none.pt"])
    assert said == "none.pt: no such checkpoint"


@pytest.mark.parametrize("script", SCRIPTS)
def test_students_can_have_the_teacher_of_another_seed(script, tmp_path, capsys):
    run(script, tmp_path, "--method hinton --seed 0 1 --teacher-seed 3 --eval-restarts 0")
    files = teacher_files(tmp_path)
    assert list(files) == [3]
    assert capsys.readouterr().out.count(f"teacher: {files[3]}") == 2
    (rows,) = run(script, tmp_path, "--method teacher --seed 3 --name t --eval-restarts 0")
    assert teacher_files(tmp_path) == files  # none was trained
    summary = common.read_json(tmp_path / script / "x-s1" / "summary.json")
    assert summary[0]["net"] == "teacher" and summary[0]["clean_acc"] == rows[0]["clean_acc"]
    # without random starts there is no PGD
    assert not any("pgd20_acc" in row for row in [*summary, *rows])


SAID = {  # settings of a net that is not trained are said, those that have an effect are not
    "--method student": "no teacher is trained here, so without effect: --teacher-epochs, "
    "--teacher-model\n",
    "--method teacher": "no student is trained here, so without effect: --epochs\n",
    "--method hinton": "",
}


@pytest.mark.parametrize("flags", SAID)
@pytest.mark.parametrize("script", SCRIPTS)
def test_settings_of_a_net_that_is_not_trained_are_said(script, flags, capsys):
    settings = ["--teacher-epochs", "2", "--epochs", "3", "--teacher-model", "mlp-12"]
    SCRIPTS[script].parse_args([*flags.split(), *settings])
    assert capsys.readouterr().out == SAID[flags]
    given = ["--method", "hinton", "--teacher-ckpt", "t.pt", *settings]
    SCRIPTS[script].parse_args(given)
    no_teacher = SAID["--method student"].replace(", --teacher-model", "")
    assert capsys.readouterr().out == no_teacher
    given[1] = "teacher"  # neither of them is trained
    SCRIPTS[script].parse_args(given)
    assert capsys.readouterr().out == no_teacher + SAID["--method teacher"]


@pytest.mark.parametrize("script", SCRIPTS)
def test_the_teacher_that_a_file_holds_teaches_as_if_it_had_been_trained_now(script, tmp_path):
    (rows,) = run(script, tmp_path, "--method hinton --seed 1")
    run(script, tmp_path, "--method teacher --seed 1 --name t")
    files, students = teacher_files(tmp_path), {}
    for seed, file in files.items():
        flags = f"--method hinton --seed 1 --name given{seed} --teacher-ckpt {file}"
        (given,) = run(script, tmp_path, flags)
        students[seed] = tmp_path / script / f"given{seed}-s1" / "student.pt"
        if seed == 0:  # the teacher of all students
            assert [row["clean_acc"] for row in given] == [row["clean_acc"] for row in rows]
            assert given[0]["net"] == "teacher" and given[0]["pgd20_acc"] == rows[0]["pgd20_acc"]
    assert teacher_files(tmp_path) == files and sorted(files) == [0, 1]
    assert same_weights(students[0], tmp_path / script / "x-s1" / "student.pt")
    assert not same_weights(students[0], students[1])


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_stopped_run_goes_on_to_the_same_bits(script, tmp_path, stop_at):
    flags = {
        "fickle_teacher": "--dropout 0.2",
        "soft_randomization": "--sigma 0.1",
        "messy_collab": "--noise-rate 0.2 --corruption-rate 0.2",
    }[script]
    whole = student_file(script, tmp_path / "whole", flags)
    argv = f"{SMALL} {flags} --runs {tmp_path / 'stopped'}"
    stop_at(SCRIPTS[script], argv, "teacher", 1)
    stop_at(SCRIPTS[script], argv, "student", 2)
    stopped = student_file(script, tmp_path / "stopped", flags)
    assert same_weights(whole, stopped)
    teachers = [teacher_files(tmp_path / name)[0] for name in ("whole", "stopped")]
    assert same_weights(*teachers)


# ------------------------------------------------------------------------------------------------
# Evaluation and refusals


def test_the_evaluation_script_gives_a_finished_student_the_numbers_of_its_summary(
    tmp_path, capsys
):
    (rows,) = run("fickle_teacher", tmp_path, "--method student --eval-eps 0.1 --eval-restarts 2")
    student = tmp_path / "fickle_teacher" / "x-s0" / "student.pt"
    # a row names its file as seen from the folder of the run
    assert student == (student.parent / rows[0]["file"])
    flags = "--data shapes --n 20 --eps 0.1 --step-size 0.003 --restarts 2 --device cpu"
    capsys.readouterr()
    eval_robustness.main([str(student), *flags.split(), "--attack", "clean", "pgd20"])
    line = re.search(rf"^{student} .*", capsys.readouterr().out, re.M)[0]
    assert line.split()[1:3] == [f"{rows[0][key]:.4f}" for key in ("clean_acc", "pgd20_acc")]


@pytest.mark.parametrize("script", SCRIPTS)
def test_the_flags_of_the_evaluation_reach_it(script, tmp_path, monkeypatch):
    asked = []

    def summary_rows(nets, data, folder, attacks, **settings):
        asked.append(settings)
        return [{"net": "student", "model": "s"}]

    monkeypatch.setattr(eval_robustness, "summary_rows", summary_rows)
    flags = "--method student --epochs 1 --seed 5 --eval-eps 0.1 --eval-step-size 0.02"
    run(script, tmp_path, f"{flags} --eval-restarts 3")
    settings = {"eps": 0.1, "step_size": 0.02, "restarts": 3, "seed": 5}
    assert asked == [settings | {"batch_size": 16}]


BAD_FLAGS = [
    ("--dropout 1", "--dropout: expected a number of at least 0 and below 1"),
    ("--dropout -0.1", "--dropout: expected"),
    ("--method swap --swap-threshold -0.1", "--swap-threshold: expected"),
    ("--method swap --swap-probability 1.1", "--swap-probability: expected"),
    ("--teacher-model resnet18", "a ResNet has no dropout"),
    ("--method signal --sigma -1", "--sigma: expected"),
    ("--method signal --dropout 0.2", "--dropout: has no effect with --method signal"),
    ("--method hinton --sigma 0.2", "--sigma: has no effect with --method hinton"),
    ("--alpha 1.1", "--alpha: expected"),
    ("--temperature 0", "--temperature: expected a number above 0"),
    ("--teacher-ckpt none.pt", "none.pt: no such checkpoint"),
    ("--method student --alpha 0.5", "--alpha: has no effect with --method student"),
    ("--method student --teacher-ckpt t.pt", "--teacher-ckpt: has no effect with --method"),
    ("--eval-eps 2", "--eval-eps: expected"),
    ("--eval-restarts -1", "--eval-restarts: expected a whole number of at least 0"),
    ("--method student --teacher-seed 1", "--teacher-seed: has no effect with --method student"),
    ("--method teacher --teacher-seed 1", "--teacher-seed: has no effect with --method teacher"),
    ("--seed 1 1", "--seed: each seed once"),
    ("--milestones 0", "--milestones: expected a whole number of at least 1"),
]


@pytest.mark.parametrize("flags, message", BAD_FLAGS)
def test_bad_flags_are_one_line_and_write_nothing(flags, message, tmp_path, refused):
    argv = [*SMALL.split(), *flags.split(), "--runs", str(tmp_path / "runs")]
    assert message in refused(fickle_teacher.main, argv)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("script", SCRIPTS)
@pytest.mark.parametrize("flag", ["--eval-eps", "--eval-step-size"])
def test_settings_of_pgd_without_pgd_are_refused(script, flag, refused):
    argv = ["--eval-restarts", "0", flag, "0.1"]
    message = f"{flag}: has no effect with --eval-restarts 0; leave it out"
    assert refused(SCRIPTS[script].parse_args, argv) == message
    SCRIPTS[script].parse_args(["--eval-restarts", "1", flag, "0.1"])


def test_a_teacher_that_does_not_fit_is_refused(tmp_path, refused):
    common.save_model(tmp_path / "calm.pt", common.build_model("mlp-12"))
    common.save_model(tmp_path / "other.pt", common.build_model("mlp-12", 7, dropout=0.3))
    common.save_model(tmp_path / "good.pt", common.build_model("mlp-12", dropout=0.3))
    argv = [*SMALL.split(), "--runs", str(tmp_path / "runs")]
    for name, module in SCRIPTS.items():
        other = [*argv, "--teacher-ckpt", str(tmp_path / "other.pt")]
        assert "7 classes" in refused(module.main, other), name
    calm = [*argv, "--dropout", "0.3", "--teacher-ckpt", str(tmp_path / "calm.pt")]
    assert "--dropout 0.3" in refused(fickle_teacher.main, calm)
    assert not (tmp_path / "runs").exists()
    run("fickle_teacher", tmp_path, f"--dropout 0.3 --teacher-ckpt {tmp_path / 'good.pt'}")
    assert (tmp_path / "fickle_teacher/x-s0/student.pt").exists()
    assert not (tmp_path / "teachers").exists()


def test_a_run_killed_in_its_evaluation_goes_on_from_a_damaged_checkpoint(tmp_path, monkeypatch):
    """The epoch that is trained again takes other seconds: student.pt has other bytes then."""
    (expected,) = run("fickle_teacher", tmp_path / "whole", "--method hinton")

    def die(*args, **kwargs):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(eval_robustness, "summary_rows", die)
        with pytest.raises(KeyboardInterrupt):
            run("fickle_teacher", tmp_path / "killed", "--method hinton")
    folder = tmp_path / "killed" / "fickle_teacher" / "x-s0"
    assert not (folder / "summary.json").exists()
    newest = folder / "student.checkpoint1.pt"  # after 3 epochs
    newest.write_bytes(newest.read_bytes()[:-100])
    (found,) = run("fickle_teacher", tmp_path / "killed", "--method hinton")
    for row, other in zip(expected, found, strict=True):
        assert row | {"seconds": None} == other | {"seconds": None}


def test_a_teacher_that_all_seeds_share_has_no_deviation(tmp_path, capsys):
    run("fickle_teacher", tmp_path, "--method hinton --seed 0 1")
    out = capsys.readouterr().out
    teacher, student = re.findall(r"^(?:teacher|student \(hinton\)) .*", out, re.M)[-2:]
    assert "+-" not in teacher and "+-" in student and "teacher.pt" not in teacher
