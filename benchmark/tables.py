"""Every number printed in the three papers, and the command that gives it here: data, no code.

Papers   paper1  noisy collaboration (arXiv 1910.05057)   fickle_teacher.py, soft_randomization.py,
                 messy_collab.py
         paper2  "On the benefits of knowledge distillation for adversarial robustness" (arXiv
                 2203.07159), numbered as in the submission to TMLR   robust_kd.py
         paper3  the adversarial-context paper            teacher_free_kd.py
Usage    python benchmark/run.py --list                   # what these rows cost, what they wait for
Values   Accuracies in percent, as printed (paper 3 prints Tables 1 and 2 as fractions); a value of
         None is drawn in a figure and printed nowhere, so there is nothing to compare it with.
         The keys are those of a run's summary: clean_acc, pgd20_acc, aa_acc (AutoAttack), mca_acc
         (19 corruptions), cinic_acc. `conditional`: among the images that are right when clean.
         entropy (nats): mean of the softmax probabilities of the clean test images.
Runs     A script and its flags, without seed, device and folders. Rows with the same text are one
         run. `count NET CLASSES SIZE CHANNELS` trains nothing: it counts the weights of a net.
         `{ROW:N}` stands for the teacher of a row's run with seed 0, as it was after N epochs.
Turn     When a row is run: see TURNS. Later seeds of turn a have turn b.
"""

import dataclasses
import re

TURNS = {
    "a": "headline rows, one seed",
    "b": "second and third seeds of them",
    "c": "sweeps over rates and sigmas, other teachers",
    "d": "alpha and early-stopping grids, widths",
    "e": "ensembles",
    "f": "CIFAR-100 and Tiny-ImageNet",
    "g": "WRN-28-10 with generated images",
    "h": "choices that the papers leave open, and the analysis",
}


@dataclasses.dataclass(frozen=True)
class Row:
    """A line of a table of a paper, and the run that gives it here."""

    table: str  # paper2-table3
    name: str
    printed: dict  # metric -> (value, std), of which the std or both may be None
    run: str = ""  # script and flags; none: see `reason`
    turn: str = "c"
    take: str = "student"  # how the row's name in the run's summary begins
    seeds: int = 3
    baseline: str = ""  # the line of the same table with which the paper compares this one
    note: str = ""  # what the paper leaves open and may explain a difference
    reason: str = ""  # why there is no run

    @property
    def id(self):
        """Name of the row in commands and files: the table and the words of its name."""
        return f"{self.table}-{re.sub(r'[^a-z0-9.+]+', '-', self.name.lower()).strip('-')}"

    @property
    def data(self):
        """The data set of the run: --data, or the script's default."""
        found = re.search(r"--data (\S+)", self.run)
        mnist = "vanilla" in self.run or " 28 1" in self.run
        return found[1] if found else "mnist" if mnist else "cifar10" if self.run else ""


def printed(metrics, text):
    """'clean_acc aa_acc', '85.54±.18 46.33' -> {'clean_acc': (85.54, 0.18), 'aa_acc': ...}."""
    pairs = [(*map(float, pair.split("±")), None)[:2] for pair in text.split()]
    return dict(zip(metrics.split(), pairs, strict=True))


def drawn(metrics):
    """The same for a figure without numbers."""
    return dict.fromkeys(metrics.split(), (None, None))


# fmt: off
# ------------------------------------------------------------------------------------------------
# Paper 1: noisy collaboration

PGD = "pgd20_conditional_acc"
PGDS = f"pgd10_conditional_acc pgd15_conditional_acc {PGD}"
C, CP, CCP = "clean_acc", f"clean_acc {PGD}", f"clean_acc cinic_acc {PGD}"
FICKLE, SOFT = "fickle_teacher.py --method", "soft_randomization.py --method"
MESSY = "messy_collab.py --method"
HINTON, ALONE, CLEAN_TEACHER = (f"{FICKLE} {m}" for m in ("hinton", "student", "teacher"))
RATES = ["0.1", "0.2", "0.3", "0.4", "0.5"]  # dropout, signal noise
SIGMAS = ["0.01", "0.02", "0.03", "0.04", "0.05", *RATES]
NOISE = ["0.05", "0.1", "0.15", "0.25", "0.5"]  # r of Figure 10; Figures 6 and 7 print no grid
STEP = "PGD: step 0.03 in the text, 0.003 in the group's evaluation code and here"
BEST = f"the paper's teacher is the best of five by test accuracy, here it is one; {STEP}"


def paper1_text():
    """The numbers of the contributions, and the rows around them."""
    t, five = "paper1-text", {"seeds": 5, "turn": "a"}
    for net, millions in (("WRN-40-2", 2.2), ("WRN-16-2", 0.7)):
        yield Row(t, f"{net} parameters", {"millions": (millions, None)},
                  f"count {net.lower()} 10 32 3", "a")
    yield Row(t, "WRN-40-2 teacher", drawn(CP), CLEAN_TEACHER, take="teacher", **five)
    yield Row(t, "WRN-16-2 alone", drawn(CP), ALONE, **five)
    yield Row(t, "Hinton", printed(CP, "94.28 0.15"), HINTON, note=BEST, **five)
    yield Row(t, "fickle teacher, dropout 0.4", printed(C, "94.67"),
              f"{FICKLE} fickle --dropout 0.4", baseline="Hinton",
              note="no rate is printed with the number; A.3 trains longer, too", **five)
    gaussian = "Gaussian augmentation, sigma 0.05"
    yield Row(t, gaussian, printed(CP, "92.14 0.41"), f"{SOFT} gaussian --sigma 0.05",
              baseline="Hinton", note=STEP, **five)
    yield Row(t, "soft randomization, sigma 0.05", printed(CP, "92.57 16.75"),
              f"{SOFT} soft-randomization --sigma 0.05", baseline=gaussian,
              note=f"noisy images clipped to [0, 1], or not as here; {STEP}", **five)
    yield Row(t, "messy collaboration, mc-ts, r 0.5", printed(CP, "93.96 11.41"),
              f"{MESSY} mc-ts --noise-rate 0.5", baseline="Hinton",
              note=f"neither r nor the variant is printed with the numbers; {STEP}", **five)


def paper1_figures():
    """Figures 1 to 8 and 11 to 18, which print nothing."""
    five = {"seeds": 5}
    for t, m in (("paper1-figure1", CCP), ("paper1-figure2", "mca_acc")):
        yield Row(t, "dropout 0, Hinton", drawn(m), HINTON, **five)
        yield Row(t, "dropout 0, teacher", drawn(m), CLEAN_TEACHER, take="teacher", **five)
        for p in RATES:
            yield Row(t, f"dropout {p}, student", drawn(m), f"{FICKLE} fickle --dropout {p}",
                      **five)
            yield Row(t, f"dropout {p}, teacher", drawn(m), f"{FICKLE} teacher --dropout {p}",
                      take="teacher", **five)
    yield Row("paper1-figure3", "diagram", {}, reason="a diagram of the method")
    for t, m in (("paper1-figure4", CP), ("paper1-figure5", "mca_acc"), ("paper1-figure15", PGDS)):
        yield Row(t, "sigma 0, Hinton", drawn(m), HINTON, **five)
        for sigma in SIGMAS:
            yield Row(t, f"soft randomization, sigma {sigma}", drawn(m),
                      f"{SOFT} soft-randomization --sigma {sigma}", **five)
    for t, m in (("paper1-figure4", CP), ("paper1-figure15", PGDS), ("paper1-figure16", "mca_acc")):
        for sigma in SIGMAS:
            yield Row(t, f"Gaussian augmentation, sigma {sigma}", drawn(m),
                      f"{SOFT} gaussian --sigma {sigma}", **five)
    for t, m in (("paper1-figure6", "clean_acc cinic_acc"), ("paper1-figure7", PGDS),
                 ("paper1-figure16", "mca_acc")):
        yield Row(t, "r 0, Hinton", drawn(m), HINTON, **five)
        for r in NOISE:
            for method in ("mc-t", "mc-s", "mc-ts", "teacher", "student"):
                take = "teacher" if method == "teacher" else "student"
                yield Row(t, f"{method}, r {r}", drawn(m), f"{MESSY} {method} --noise-rate {r}",
                          take=take, **five)
    for name, run in (("teacher", CLEAN_TEACHER), ("WRN-16-2 alone", ALONE), ("Hinton", HINTON)):
        yield Row("paper1-figure8", name, drawn("entropy"), run, seeds=1,
                  take="teacher" if name == "teacher" else "student")
    for r in NOISE:  # the histograms are in the results, too; report.py draws them
        yield Row("paper1-figure8", f"mc-ts, noise rate {r}", drawn("entropy"),
                  f"{MESSY} mc-ts --noise-rate {r}", seeds=1)
    yield Row("paper1-figure9", "corruption rates", {},
              reason="the lines Teacher, WRN-16-2 and r 0 of Figure 10, drawn")
    for t, m in (("paper1-figure11", CCP), ("paper1-figure12", "mca_acc")):
        yield Row(t, "sigma 0, Hinton", drawn(m), HINTON, **five)
        for sigma in RATES:
            yield Row(t, f"signal noise, sigma {sigma}", drawn(m),
                      f"{FICKLE} signal --sigma {sigma}", **five)
    for t, m in (("paper1-figure13", CCP), ("paper1-figure14", "mca_acc")):
        for swap in ("top2", "all"):
            for p in ("0.1", "0.3", "0.5"):
                for threshold in ("0.1", "0.2", "0.3"):
                    run = f"--swap {swap} --swap-probability {p} --swap-threshold {threshold}"
                    yield Row(t, f"{swap}, p {p}, threshold {threshold}", drawn(m),
                              f"{FICKLE} swap {run}", note="no grid is printed", **five)
    for t, m in (("paper1-figure17", PGD), ("paper1-figure18", "mca_acc")):
        for rate in NOISE:
            for method in ("flc-t", "flc-s", "flc-ts"):
                yield Row(t, f"{method}, corruption {rate}", drawn(m),
                          f"{MESSY} {method} --corruption-rate {rate}", **five)
    for epochs, drops in ((250, "75 150 200"), (300, "90 180 240"), (350, "105 210 280")):
        yield Row("paper1-a3", f"Hinton, {epochs} epochs", drawn(C),
                  f"{HINTON} --epochs {epochs} --milestones {drops}", **five,
                  note="not in the paper: tells the longer training of A.3 from the fickle teacher")


def paper1_figure10():
    """Figure 10, a table: fixed corrupted labels (columns), wrong labels per batch (lines)."""
    lines = {  # CIFAR-10 at the five corruption rates, then CINIC-10
        "Teacher": "92.61 89.37 86.56 78.94 55.53 66.22 62.66 59.07 53.63 36.75",
        "WRN-16-2": "90.51 86.91 83.51 76.07 56.61 63.22 59.50 55.00 50.08 37.21",
        "r 0": "92.56 90.71 89.38 85.32 67.97 65.62 63.86 61.33 56.68 44.42",
        "r 0.05": "92.57 90.88 89.36 85.36 68.75 65.52 63.69 61.28 56.49 45.15",
        "r 0.1": "92.53 90.73 89.33 85.13 68.25 65.97 63.57 61.68 56.21 44.92",
        "r 0.15": "92.52 90.95 89.54 85.16 68.27 65.74 63.73 61.34 56.65 44.78",
        "r 0.25": "92.60 90.97 89.44 84.98 68.05 65.92 63.45 61.52 56.60 45.02",
        "r 0.5": "92.62 90.96 89.47 85.45 68.54 65.28 63.62 61.19 56.35 44.68",
    }
    methods = {"Teacher": ("teacher", ""), "WRN-16-2": ("student", "")}
    methods["r 0"] = ("flc-ts", "WRN-16-2")
    note = "fixed labels: uniform over the wrong classes, over all ten in the group's later code"
    for name, text in lines.items():
        method, base = methods.get(name, (f"mc-s --noise-rate {name[2:]}", "r 0"))
        numbers = text.split()
        for i, rate in enumerate(NOISE):
            yield Row("paper1-figure10", f"{name}, corruption {rate}",
                      printed("clean_acc cinic_acc", f"{numbers[i]} {numbers[i + 5]}"),
                      f"{MESSY} {method} --corruption-rate {rate}", seeds=5, note=note,
                      take="teacher" if name == "Teacher" else "student",
                      baseline=f"{base}, corruption {rate}" if base else "")


# ------------------------------------------------------------------------------------------------
# Paper 2: robust distillation

RKD = "robust_kd.py --loss"
CA, CPA = "clean_acc aa_acc", "clean_acc pgd20_acc aa_acc"
AT = f"{RKD} at --epochs 200"  # the baseline gets the epochs of teacher and student, as in Table 2
PGD_TEACHER = "--alpha 0.8 --teacher-es 40"
FFGSM_TEACHER = f"{PGD_TEACHER} --teacher-training ffgsm"
LAT_TEACHER = f"{PGD_TEACHER} --teacher-eps 2/255"
ST_TEACHER = "--alpha 0.3 --teacher-training st"
C100, TINY_IMAGENET = "--data cifar100", "--data tiny-imagenet"
DDPM = "--recipe at+ --model wrn-28-10-silu --extra-data data/{}_ddpm.npz"
EDM = "--recipe at+ --model wrn-28-10-silu --extra-data data/{}_edm_1m.npz"
SAVED = "akd --teacher-save-every 50"  # its early stops teach in Table 6 (ES 100) and in Figure 4
EPOCHS = "200 epochs by Table 2; App. C has 84.22 and 46.99 for another training"
OPEN = "early stopping and alpha are not printed: 40 and 0.8 here, alpha 0.3 for a standard teacher"
TWO = "Table 3 prints 83.13 and 48.64, Tables 2, 4 and 10 print 84.10 and 48.40"
LAM = "lambda, the reduction of the KL and the loss of the attack are not printed"
ATTACKED = "the log of the averaged probabilities is attacked here; the paper's attack is not known"


def paper2_one_teacher():
    """Tables 1 (ResNet-18), 3 and 4."""
    t = "paper2-table1"
    for data, flags, turns, lines in [
        ("CIFAR-10", "", "aae", [
            ("AT", AT, "85.54±.18 46.33±.05", EPOCHS),
            ("LAT teacher", f"{RKD} akd+ {LAT_TEACHER}", "87.37±.56 46.71±.16", OPEN),
            ("AT teacher", f"{RKD} akd+ {FFGSM_TEACHER} --teachers 4", "84.11±.10 49.15±.22",
             "the numbers are those of the four FFGSM teachers of Table 5")]),
        ("CIFAR-100", f" {C100}", "fff", [
            ("AT", AT, "60.29±.08 22.38±.32", EPOCHS),
            ("LAT teacher", f"{RKD} akd+ {LAT_TEACHER}", "62.90±.23 21.40±.10", OPEN),
            ("AT teacher", f"{RKD} akd+ {FFGSM_TEACHER}", "58.41±.09 24.53±.11",
             "the numbers are those of one FFGSM teacher of Table 5")]),
    ]:
        for turn, (name, run, text, note) in zip(turns, lines):
            yield Row(t, f"{data}, {name}", printed(CA, text), run + flags, turn, note=note,
                      baseline="" if name == "AT" else f"{data}, AT")
    for t, lines in [
        ("paper2-table3", [
            ("ST", ST_TEACHER, "c", "87.21±.03 45.17±.63", "87.19±.30 45.36±.33"),
            ("FFGSM", FFGSM_TEACHER, "c", "85.18±.25 47.51±.17", "85.20±.27 47.59±.23"),
            ("PGD-7", PGD_TEACHER, "a", "84.02±.19 48.08±.25", "83.13±.61 48.64±.34")]),
        ("paper2-table4", [
            ("eps 0", ST_TEACHER, "c", "87.21±.03 45.17±.63", "87.19±.30 45.36±.33"),
            ("eps 2/255", LAT_TEACHER, "a", "87.37±.56 46.71±.17", "87.57±.13 46.68±.24"),
            ("eps 8/255", PGD_TEACHER, "a", "84.02±.19 48.08±.25", "84.10±.37 48.40±.25")]),
    ]:
        if t == "paper2-table3":  # its caption
            yield Row(t, "AT", printed(CA, "85.54±.18 46.33±.05"), AT, "a", note=EPOCHS)
        for name, flags, turn, *texts in lines:
            for loss, text in zip(("AKD+", "RSLAD+"), texts):
                base = "AT" if t[-1] == "3" else "" if name == "eps 0" else f"{loss}, eps 0"
                note = f"{TWO}; {LAM}" if (loss, turn) == ("RSLAD+", "a") else OPEN
                yield Row(t, f"{loss}, {name}", printed(CA, text), f"{RKD} {loss.lower()} {flags}",
                          turn, baseline=base, note=note)


def paper2_capacity():
    """Tables 2 and 9."""
    for size, width, turn, lines in [
        ("x1", "", "a", [
            ("only teacher", AT, "85.54±.18 46.33±.05"),
            ("RKD-Acc.", f"{RKD} ard+ --alpha 0.2 --teacher-es 20", "87.40±.26 47.16±.14"),
            ("RKD-Rob.", f"{RKD} rslad+ --alpha 0.8 --teacher-es 40", "84.10±.37 48.40±.25")]),
        ("x1/4", " --width 1/4", "d", [
            ("only teacher", AT, "78.54±.16 41.78±.34"),
            ("RKD-Acc.", f"{RKD} akd+ --alpha 0.5 --teacher-es 40", "80.26±.10 41.39±.27"),
            ("RKD-Rob.", f"{RKD} akd+ --alpha 0.8 --teacher-es 100", "77.15±.28 42.73±.23")]),
        ("x1/16", " --width 1/16", "d", [
            ("only teacher", AT, "61.92±.49 31.93±.25"),
            ("RKD-Acc.", f"{RKD} akd+ --alpha 0.5 --teacher-es 80", "64.82±.25 30.16±.22"),
            ("RKD-Rob.", f"{RKD} akd+ --alpha 0.2 --teacher-es 80", "60.59±.18 32.14±.27")]),
    ]:
        for name, run, text in lines:
            base = "" if name == "only teacher" else f"{size}, only teacher"
            note = EPOCHS if not base else LAM if turn != "d" else "chosen by test accuracy"
            yield Row("paper2-table2", f"{size}, {name}", printed(CA, text), run + width, turn,
                      baseline=base, note=note)
    t, best = "paper2-table9", f"{RKD} akd+ --alpha 0.6 --teacher-es 30 {TINY_IMAGENET}"
    note = "the paper prints the same early stopping and alpha for both lines"
    yield Row(t, "only teacher", printed(CA, "43.96±.04 21.77±.19"), f"{AT} {TINY_IMAGENET}", "f",
              note=EPOCHS)
    for name, text in (("RKD-Acc.", "46.85±.40 19.92±.05"), ("RKD-Rob.", "42.79±.34 21.69±.02")):
        yield Row(t, name, printed(CA, text), best, "f", baseline="only teacher", note=note)


def paper2_ensembles():
    """Tables 5, 10, 12 and Appendix C.1."""
    t = "paper2-table5"
    for data, flags, lines in [
        ("CIFAR-10", "", [
            ("ST", ST_TEACHER, "87.21±.03 45.17±.63", "87.79±.10 45.58±.17"),
            ("FFGSM", FFGSM_TEACHER, "85.18±.25 47.51±.17", "84.11±.10 49.15±.22"),
            ("PGD-7", PGD_TEACHER, "84.02±.19 48.08±.25", "83.03±.18 49.33±.08")]),
        ("CIFAR-100", f" {C100}", [
            ("ST", ST_TEACHER, "62.73±.59 21.44±.36", "63.52±.57 21.07±.25"),
            ("FFGSM", FFGSM_TEACHER, "58.41±.09 24.53±.11", "59.33±.12 25.36±.11"),
            ("PGD-7", PGD_TEACHER, "58.96±.97 23.77±.68", "57.93±.02 25.34±.01")]),
    ]:
        for name, teacher, one, four in lines:
            single = f"{data}, {name}, 1 model"
            yield Row(t, single, printed(CA, one), f"{RKD} akd+ {teacher}{flags}",
                      "f" if flags else "a" if name == "PGD-7" else "c", note=OPEN)
            yield Row(t, f"{data}, {name}, 4 models", printed(CA, four),
                      f"{RKD} akd+ {teacher} --teachers 4{flags}", "f" if flags else "e",
                      baseline=single, note=OPEN)
    t, run = "paper2-table10", f"{RKD} rslad+ {FFGSM_TEACHER}"
    one, note = "1 FFGSM teacher", f"Table 3 prints 85.20 and 47.59 for one FFGSM teacher; {LAM}"
    yield Row(t, one, printed(CA, "81.91±.04 48.27±.08"), run, "c", note=note)
    yield Row(t, "4 FFGSM teachers", printed(CA, "82.21±.30 48.47±.29"), f"{run} --teachers 4", "e",
              baseline=one, note=note)
    yield Row(t, "1 PGD teacher", printed(CA, "84.10±.37 48.40±.35"), f"{RKD} rslad+ {PGD_TEACHER}",
              "a", baseline=one, note=f"{TWO}; {LAM}")
    run = f"{RKD} akd+ --alpha 0.8 --teachers 4 --eval-steps 7"
    for t, m, one, single, four in [
        ("paper2-table12", "clean_acc pgd7_acc", "ResNet-18 (AT)", "84.22 53.56", "81.86 52.74"),
        ("paper2-text", "aa_acc", "App. C, ResNet-18 (AT)", "46.99", "51.58"),
    ]:
        yield Row(t, one, printed(m, single), run, "e", "teacher")
        yield Row(t, one.replace("ResNet-18 (AT)", "ensemble"), printed(m, four), run, "e",
                  "ensemble", baseline=one, note=ATTACKED)
    for name, value in (("FFGSM", 2.0), ("PGD-7", 8.0)):
        yield Row("paper2-text", f"cost of AT with {name}", {"standard trainings": (value, None)},
                  reason="an assumption of the paper; benchmark/speed.py ladder measures")


def paper2_generated():
    """Tables 1 (WideResNets), 6, 7, 8 and 11: AT+ with a million generated images."""
    note = "PGD-7 in App. A, PGD-10 in the recipe of Section 4; EMA, or last"
    changes = {"turn": "g", "note": note}
    c10, c100 = ("CIFAR-10", "cifar10", ""), ("CIFAR-100", "cifar100", f" {C100}")
    at, akd, plus = ("AT+", "at"), ("AKD, alpha 1", "akd"), ("AKD+, alpha 0.8", "akd+ --alpha 0.8")
    rslad, rslad_plus = ("RSLAD, alpha 1", "rslad"), ("RSLAD+, alpha 0.8", "rslad+ --alpha 0.8")
    for t, m, (data, file, flags), kind, lines in [
        ("table1", CA, c10, DDPM, [(*at, "87.95±.18 58.76±.72"), (*plus, "88.35±.14 60.78±.43")]),
        ("table1", CA, c10, EDM, [(*at, "92.84±.04 61.69±.15"), (*plus, "92.67±.07 62.08±.01")]),
        ("table1", CA, c100, DDPM, [(*at, "61.96±.23 29.37±.35"), (*plus, "62.13±.09 30.48±.50")]),
        ("table1", CA, c100, EDM, [(*at, "71.53±.24 32.60±.30"), (*plus, "70.84±.07 34.35±.18")]),
        ("table6", CPA, c10, DDPM, [
            (*at, "87.95±.18 61.11±.40 58.76±.72"),
            ("AKD, alpha 1", SAVED, "88.25±.22 62.55±.04 60.37±.25"),
            ("AKD, alpha 1, ES 100", "akd --teacher-es 100", "86.75±.19 60.27±.11 58.55±.13"),
            (*plus, "88.35±.14 62.96±.36 60.78±.43"),
            (*rslad, "88.07±.16 62.15±.04 60.55±.14"),
            (*rslad_plus, "88.67±.03 62.09±.05 60.65±.01"),
            ("ARD, alpha 1", "ard", "88.23±.04 62.12±.35 59.89±.30"),
            ("ARD+, alpha 0.8", "ard+ --alpha 0.8", "88.03±.00 61.94±.06 59.53±.62")]),
        ("table6", CPA, c100, DDPM, [
            (*at, "61.96±.23 31.99±.25 29.37±.35"),
            (*plus, "62.13±.09 33.13±.32 30.48±.50")]),
        ("table7", CPA, c10, EDM, [
            (*at, "92.84±.04 64.12±.11 61.69±.15"),
            (*akd, "92.48±.14 63.98±.12 61.79±.04"),
            (*plus, "92.67±.07 64.51±.21 62.08±.01"),
            (*rslad, "92.51±.06 63.51±.15 61.78±.16"),
            (*rslad_plus, "92.76±.09 63.62±.11 61.85±.16")]),
        ("table7", CPA, c100, EDM, [
            (*at, "71.53±.24 35.58±.45 32.60±.30"),
            (*akd, "70.77±.36 36.91±.23 34.31±.47"),
            (*plus, "70.84±.07 37.05±.40 34.35±.18"),
            (*rslad, "70.54±.16 36.56±.13 33.98±.04"),
            (*rslad_plus, "70.80±.23 36.47±.16 33.78±.07")]),
    ]:
        first = f"{data}, {kind.split('}_')[1][:4].strip('_').upper()}, AT+"
        for name, loss, text in lines:
            line = first.replace("AT+", name)
            yield Row(f"paper2-{t}", line, printed(m, text),
                      f"{RKD} {loss} {kind.format(file)}{flags}",
                      baseline="" if line == first else first, **changes)
    for teachers, flags, texts in [
        ("1 teacher", "", ("88.25 62.55 60.37", "88.35 62.96 60.78")),
        ("4 teachers", " --teachers 4", ("87.99 62.53 60.55", "88.41 63.02 61.07")),
    ]:
        first = akd if flags else ("AKD, alpha 1", SAVED)
        for (name, loss), text in zip((first, plus), texts):
            yield Row("paper2-table8", f"{name}, {teachers}", printed(CPA, text),
                      f"{RKD} {loss} {DDPM.format('cifar10')}{flags}",
                      baseline=f"{name}, 1 teacher" if flags else "", **changes)
    for teacher, flags, texts in [
        ("AT+", "", ("92.84 64.12", "92.48 63.98", "92.67 64.51", "92.51 63.51", "92.76 63.62")),
        ("TRADES+", " --teacher-training trades",
         ("90.89 64.36", "90.43 63.51", "91.59 64.43", "90.34 63.91", "90.49 62.94")),
    ]:
        alone = f"{teacher}, use teacher"
        lines = [(alone, "akd"), akd, plus, rslad, rslad_plus]
        for (name, loss), text in zip(lines, texts):
            first = name == alone
            yield Row("paper2-table11", name if first else f"{teacher} teacher, {name}",
                      printed("clean_acc pgd20_acc", text),
                      f"{RKD} {loss} {EDM.format('cifar10')}{flags}",
                      take="teacher" if first else "student", baseline="" if first else alone,
                      **changes)


def paper2_figures():
    """Figures 1 to 17, without numbers: 1 to 4 are grids of runs, 5 to 17 are an analysis."""
    one = {"seeds": 1}
    for loss in ("akd+", "rslad+", "ard+"):
        for name, teacher in (("accurate", " --teacher-training st"), ("robust", "")):
            for es in (20, 40, 60, 80, 100):
                for alpha in (0.2, 0.4, 0.6, 0.8, 1.0):
                    yield Row("paper2-figure1", f"{loss}, {name} teacher, ES {es}, alpha {alpha}",
                              drawn(CA), f"{RKD} {loss} --alpha {alpha} --teacher-es {es}{teacher}",
                              "d", **one)
    yield Row("paper2-figure2", "points", {}, reason="the points of Figure 1, drawn by teacher")
    for beta in (0.0, 0.25, 0.5, 0.75, 1.0):
        run = f"{RKD} akd+ {PGD_TEACHER} --teacher-training st st at at --beta {beta}"
        yield Row("paper2-figure3", f"beta {beta}", drawn(CA), run, "e", note=OPEN, **one)
    # By B.1 the teacher has the recipe of Section 4; the student, a ResNet-18, that of Appendix A
    yield Row("paper2-figure4", "teacher", drawn(CA), f"{RKD} {SAVED} {DDPM.format('cifar10')}",
              "g", "teacher", **one)
    student = "--teacher-model wrn-28-10-silu --teacher-ckpt {paper2-figure4-teacher:%d}"
    for es in (50, 100, 200, 300, 400):
        yield Row("paper2-figure4", f"ES {es}", drawn(CA), f"{RKD} akd {student % es}", "g", **one)
    for alpha in (0.2, 0.4, 0.6, 0.8, 1.0):
        loss = "akd" if alpha == 1 else f"akd+ --alpha {alpha}"
        yield Row("paper2-figure4", f"ES 100, alpha {alpha}", drawn(CA),
                  f"{RKD} {loss} {student % 100}", "g", **one)
    two = " --trajectories --data data/planes-cars.npz"
    st = " --teacher-training st"
    for figure, name, run in [
        (5, "entropy, AKD, AT teacher", "akd --trajectories"),
        (5, "entropy, AKD, standard teacher", f"akd{st} --trajectories"),
        (6, "cosine similarity", f"akd{two}"),
        (7, "right class, adversarial images", f"akd{two}"),
        (8, "planes by difficulty", f"st{two}"),
        (9, "cars by difficulty", f"st{two}"),
        (10, "right class, clean images", f"akd{two}"),
        (11, "early stopping", f"akd --teacher-es 40{two}"),
        (12, "label mixing, alpha 0.3", f"akd+ --alpha 0.3{two}"),
        (12, "label mixing, alpha 0.7", f"akd+ --alpha 0.7{two}"),
        (13, "cosine similarity", f"akd{st}{two}"),
        (14, "right class, clean images", f"akd{st}{two}"),
        (15, "right class, adversarial images", f"akd{st}{two}"),
        (16, "early stopping", f"akd --teacher-es 40{st}{two}"),
        (17, "label mixing, alpha 0.3", f"akd+ --alpha 0.3{st}{two}"),
        (17, "label mixing, alpha 0.7", f"akd+ --alpha 0.7{st}{two}"),
    ]:
        other = {11: 6, 12: 6, 16: 13, 17: 13}.get(figure)
        draws = "benchmark/plots.py trajectories draws it from the run"
        draws += f" and that of Figure {other}" * bool(other)
        draws += ", with --teacher of the latter" * (figure in (11, 16))
        yield Row(f"paper2-figure{figure}", name, drawn("clean_acc pgd20_acc"), f"{RKD} {run}", "h",
                  note=draws, **one)


# ------------------------------------------------------------------------------------------------
# Paper 3: the adversarial context

TF = "teacher_free_kd.py --method"
TUNED = "alpha and temperature are not printed"


def paper3():
    """The rows of the adversarial-context paper."""
    t, alone, distilled = "paper3-table1", "student-alone", "student"
    for name, net, macs in (("large", "mlp-1200-1200", 2392800.0), ("small", "mlp-400", 317600.0)):
        yield Row(t, f"{name} model, size", {"macs": (macs, None), "weights": (macs, None)},
                  f"count {net} 10 28 1", "a", note="FLOPs in the paper; multiply-adds, no biases")
    base, note = "small model alone", "temperature, alpha, optimizer, augmentation are not printed"
    for name, text, take in [("large model", "98.98", "teacher"), (base, "98.06", alone),
                             ("small model, distilled", "98.73", distilled)]:
        yield Row(t, name, printed(C, text), f"{TF} vanilla", "a", take, 5, note=note,
                  baseline=base if take == distilled else "")
    for digit, name, *texts in [
        (1, "one omitted", "98.03 0.00", "98.25 98.50"),
        (2, "two omitted", "98.12 0.00", "98.51 92.73"),
    ]:
        base, note = f"{name}, alone", "without bias correction; depends on the teacher's sharpness"
        lines = (base, texts[0], alone), (f"{name}, distilled", texts[1], distilled)
        run = f"{TF} vanilla --omit-digit {digit} --bias-correction"
        for line, text, take in lines:
            yield Row("paper3-table2", line, printed("others_acc digit_acc", text), run, "a", take,
                      5, note=note, baseline=base if take == distilled else "")
    for t, lines in [
        ("paper3-table3", [
            ("ResNet-50 baseline", "plain --model resnet50", "95.29±.09"),
            ("Re-KD, ResNet-50", "re-kd", "95.46±.12"),
            ("ResNet-18 baseline", "plain --model resnet18", "94.98±.10")]),
        ("paper3-table4", [
            ("ResNet-18 baseline", "plain --model resnet18", "94.98±.10"),
            ("Tf-KD reg", "tf-kd-reg", "95.39±.15"),
            ("Tf-KD self", "tf-kd-self", "95.42±.13")]),
        ("paper3-table5", [
            ("AT, no teacher", "at", "84.22 46.99"),
            ("AT teacher", "at-kd", "82.70 47.66"),
            ("AT Tf-KD reg", "at-tf-kd-reg", "82.02 48.28"),
            ("AT Tf-KD self", "at-tf-kd-self", "81.53 48.83")]),
    ]:
        for name, method, text in lines:
            first = name == lines[0][0] or "baseline" in name
            note = "a single run in the paper" if t[-1] == "5" else ""
            note = "; ".join(filter(None, [note, "" if first else TUNED]))
            yield Row(t, name, printed(CA if t[-1] == "5" else C, text), f"{TF} {method}", "a",
                      baseline="" if first else lines[0][0], note=note)
    for method in ("plain --model resnet18", "tf-kd-reg", "tf-kd-self"):
        name = method.split()[0]
        yield Row("paper3-figure1", name, drawn(C),
                  f"{TF} {method} --grad-heatmap runs/figure1-{name}.npz", "h", seeds=1,
                  note="a heat map without numbers; the run writes ours")
    yield Row("paper3-text", "self-distillation", drawn(C), f"{TF} self-distillation", "c",
              note="the paper describes it and prints no number")


# ------------------------------------------------------------------------------------------------
# The open choices of the headline rows: one at a time

CHOICES = {
    "paper1-text-hinton": [
        "--momentum 0.99", "--milestones 60 120 160", "--step-size 0.03",
        "--teacher-seeds 5 --pick-teacher test"],
    "paper1-text-fickle-teacher-dropout-0.4": [
        "--teacher-mode train", "--epochs 200 --milestones 60 120 150"],
    "paper1-text-soft-randomization-sigma-0.05": [
        "--clip", "--momentum 0.99", "--step-size 0.03"],
    "paper1-text-messy-collaboration-mc-ts-r-0.5": [
        "--label-draw inclusive", "--momentum 0.99", "--step-size 0.03"],
    "paper2-table1-cifar-10-at": [
        "--epochs 100", "--attack-bn train", "--cycle-momentum no", "--step-size 1/255"],
    "paper2-table3-akd+-pgd-7": [
        "--alpha 0.7", "--attack-bn train", "--attack-loss kl-teacher", "--cycle-momentum no"],
    "paper2-table3-rslad+-pgd-7": [
        "--kl-reduction mean", "--attack-loss ce", "--lam 0.5", "--attack-bn train"],
    "paper2-table2-x1-rkd-acc.": [
        "--kl-reduction mean", "--attack-loss kl-teacher", "--lam 1", "--temperature 30"],
    "paper2-table4-akd+-eps-2-255": ["--alpha 0.3", "--teacher-es 100", "--attack-bn train"],
    "paper3-table1-small-model-distilled": ["--teacher-shift 0"],
    "paper3-table2-one-omitted-distilled": [
        "--teacher-shift 0", "--teacher-shift 3", "--teacher-epochs 30", "--epochs 60",
        "--lr 0.1", "--alpha 0.9"],
    "paper3-table2-two-omitted-distilled": ["--teacher-shift 0"],
    "paper3-table3-re-kd-resnet-50": ["--no-tau2", "--alpha 0.9", "--kl-reduction mean"],
    "paper3-table4-tf-kd-reg": ["--reg-form repo", "--reg-form plain", "--alpha 0.3"],
    "paper3-table4-tf-kd-self": ["--alpha 0.9", "--no-tau2", "--kl-reduction mean"],
    "paper3-table5-at-tf-kd-reg": ["--alpha 0.5", "--reg-form repo", "--attack-bn train"],
    "paper3-table5-at-tf-kd-self": ["--alpha 0.5", "--temperature 4", "--attack-bn train"],
}
# fmt: on


def choices(rows):
    """Yield the headline rows again with one open choice made otherwise, a row a choice.

    With one seed; on digits, where a run takes minutes and its spread is large, with three.
    """
    for row in rows:
        for flags in CHOICES.get(row.id, []):
            run = row.run
            for flag in re.findall(r"--[\w-]+", flags):  # said once, or the run is hard to read
                run = re.sub(rf" {flag}(?= |$)( (?!--)\S+)*", "", run)
            changes = {
                "run": f"{run} {flags}",
                "name": f"{row.name}: {flags[2:]}",
                "note": "",
                "seeds": min(row.seeds, 3) if row.data == "mnist" else 1,
            }
            table = f"{row.table.split('-')[0]}-choices"
            yield dataclasses.replace(row, table=table, turn="h", baseline="", **changes)


PARTS = [paper1_text, paper1_figures, paper1_figure10, paper2_one_teacher, paper2_capacity]
PARTS += [paper2_ensembles, paper2_generated, paper2_figures, paper3]
ROWS = [row for part in PARTS for row in part()]
ROWS += choices(ROWS)
