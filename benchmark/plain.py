"""What speed.py compares with: the training loop and AutoAttack as most published code has them.

Training   a DataLoader with torchvision's transforms, one image at a time; the attack by
           loss.backward(), which makes the gradients of all weights in every step, too.
AutoAttack APGD-CE, APGD-T, FAB-T and Square (Croce and Hein 2020), L-infinity: one batch after the
           other through all four, gradients by backward(), the projection of FAB by sorting, rows
           that are done cut out by boolean masks. It draws other numbers than eval_robustness.py.
Shapes     B images, K classes; x, x_adv (B, C, H, W) in [0, 1]; labels, target classes (B,)
"""

from functools import partial

import torch
import torch.nn.functional as F

# ------------------------------------------------------------------------------------------------
# Training


class Images(torch.utils.data.Dataset):
    """The training set as torchvision's own CIFAR10 gives it: one image at a time, transformed."""

    def __init__(self, data):
        import torchvision.transforms as transforms
        from PIL import Image

        self.images = [Image.fromarray(x) for x in data.x_train.cpu().numpy()]
        self.labels = data.y_train.tolist()
        size = data.x_train.shape[1]
        self.transform = transforms.Compose(
            [
                transforms.RandomCrop(size, padding=4),
                transforms.RandomHorizontalFlip(),
                transforms.ToTensor(),
            ]
        )

    def __len__(self):
        return len(self.images)

    def __getitem__(self, i):
        return self.transform(self.images[i]), self.labels[i]


def pgd(model, x, labels, eps, step_size, steps, start):
    """PGD by loss.backward(): the gradients of the weights are computed and thrown away."""
    x_adv = (x + start).clamp(0, 1)
    for _ in range(steps):
        x_adv.requires_grad_(True)
        model.zero_grad()
        F.cross_entropy(model(x_adv), labels).backward()
        x_adv = x_adv.detach() + step_size * x_adv.grad.sign()
        x_adv = torch.min(torch.max(x_adv, x - eps), x + eps).clamp(0, 1)
    return x_adv


# ------------------------------------------------------------------------------------------------
# AutoAttack


def gradient(model, x, loss):
    """Logits, loss (B,) and its gradient in x, by backward(): weight gradients are made too."""
    x = x.clone().requires_grad_()
    logits = model(x)
    value = loss(logits)
    value.sum().backward()
    return logits.detach(), value.detach(), x.grad


def targeted_dlr_loss(logits, labels, target):
    """(z_t - z_y) / (z_1 - (z_3 + z_4) / 2): (B, K) -> (B,)."""
    ranked = logits.sort(1)[0]
    scale = ranked[:, -1] - (ranked[:, -3] + ranked[:, -4]) / 2 + 1e-12
    rows = torch.arange(len(logits))
    return (logits[rows, target] - logits[rows, labels]) / scale


def checkpoints(steps):
    """{iteration: how many iterations since the last one} at which APGD may halve its steps."""
    found, last, period = {}, 0, max(int(0.22 * steps), 1)
    while last + period <= steps:
        last += period
        found[last] = period
        period = max(period - max(int(0.03 * steps), 1), max(int(0.06 * steps), 1))
    return found


def apgd(model, x_clean, labels, loss, eps, steps):
    """APGD, with the history of the losses kept and read at the checkpoints: -> x_adv."""

    def project(x):
        return torch.min(torch.max(x, x_clean - eps), x_clean + eps).clamp(0, 1)

    x = project(x_clean + torch.empty_like(x_clean).uniform_(-eps, eps))
    step = torch.full((len(x), 1, 1, 1), 2 * eps, device=x.device)
    logits, value, grad = gradient(model, x, loss)
    x_adv, x_best, x_before = x_clean.clone(), x.clone(), x
    best_grad, best_value, history = grad.clone(), value.clone(), [value]
    value_at_check, was_halved = value.clone(), torch.ones(len(x), dtype=bool, device=x.device)
    wrong = logits.argmax(1) != labels
    x_adv[wrong] = x[wrong]
    periods = checkpoints(steps)
    for i in range(1, steps + 1):
        x_next = project(x + step * grad.sign())
        if i > 1:  # momentum
            x_next = project(x + 0.75 * (x_next - x) + 0.25 * (x - x_before))
        x_before, x = x, x_next
        logits, value, grad = gradient(model, x, loss)
        wrong = logits.argmax(1) != labels
        x_adv[wrong] = x[wrong]
        better = value > best_value
        x_best[better], best_grad[better] = x[better], grad[better]
        best_value[better] = value[better]
        history.append(value)
        if i in periods:
            rises = torch.zeros_like(value)
            for j in range(i - periods[i] + 1, i + 1):
                rises += history[j] > history[j - 1]
            halved = (rises <= 0.75 * periods[i]) | (~was_halved & (value_at_check >= best_value))
            was_halved, value_at_check = halved, best_value.clone()
            step[halved] /= 2
            x, grad = x.clone(), grad.clone()
            x[halved], grad[halved] = x_best[halved], best_grad[halved]
    return x_adv


def project_to_hyperplane(x, w, c):
    """The smallest step (B, D) in the box to w z = c: the kinks sorted, sums accumulated."""
    w = w * torch.where(c < 0, -1.0, 1.0)[:, None]
    room = torch.where(w > 0, x, 1 - x)
    kinks, order = room.sort(1)
    slopes = w.abs().gather(1, order)
    filled = (slopes * kinks).cumsum(1)
    rest = slopes.flip(1).cumsum(1).flip(1)
    reached = filled + kinks * (rest - slopes) >= c.abs()[:, None]  # with the radius at this kink
    first = reached.long().argmax(1, keepdim=True)
    before = torch.where(first > 0, filled.gather(1, (first - 1).clamp(min=0)), 0)
    radius = (c.abs()[:, None] - before) / rest.gather(1, first).clamp(min=1e-30)
    radius = torch.where(reached.any(1, keepdim=True), radius, 1e30)
    return -w.sign() * torch.minimum(radius, room)


def fab(model, x_clean, labels, target, eps, steps):
    """Targeted FAB to the end of its iterations, from the clean image: -> x_adv."""
    clean = x_clean.flatten(1)
    x, x_best = clean.clone(), clean.clone()
    smallest = torch.full((len(x),), 1e10, device=x.device)

    def difference(logits):
        return (logits.gather(1, target[:, None]) - logits.gather(1, labels[:, None]))[:, 0]

    for _ in range(steps):
        _, value, w = gradient(model, x.view_as(x_clean), difference)
        w = w.flatten(1)
        c = torch.cat([value, value + (w * (clean - x)).sum(1)])
        both = project_to_hyperplane(torch.cat([x, clean]), torch.cat([w, w]), c)
        d1, d2 = both.chunk(2)
        r1 = d1.abs().amax(1, keepdim=True).clamp(min=1e-8)
        r2 = d2.abs().amax(1, keepdim=True).clamp(min=1e-8)
        alpha = (r1 / (r1 + r2)).clamp(max=0.1)
        x = ((1 - alpha) * (x + 1.05 * d1) + alpha * (clean + 1.05 * d2)).clamp(0, 1)
        with torch.no_grad():
            rows = (model(x.view_as(x_clean)).argmax(1) != labels).nonzero()[:, 0]
        size = (x[rows] - clean[rows]).abs().amax(1)
        better = size < smallest[rows]
        x_best[rows[better]], smallest[rows[better]] = x[rows[better]], size[better]
        x[rows] = clean[rows] + 0.9 * (x[rows] - clean[rows])
    x_best[smallest > eps] = clean[smallest > eps]
    return x_best.view_as(x_clean)


def square_side(i, height, width):
    """Side of the square of query i: 0.8 of the area at first, which is halved at fixed queries."""
    halvings = sum(i > query for query in (10, 50, 200, 500, 1000, 2000, 4000, 6000, 8000))
    return max(round((0.8 / 2**halvings * height * width) ** 0.5), 1)


@torch.no_grad()
def square(model, x_clean, labels, eps, queries):
    """Square with a whole new image for each query, on the rows that are not done: -> x_adv."""
    n, channels, height, width = x_clean.shape
    device = x_clean.device

    def margin(x, labels):
        logits = model(x)
        of_class = logits.gather(1, labels[:, None])[:, 0]
        return of_class - logits.scatter(1, labels[:, None], -1e10).amax(1)

    stripes = torch.randint(2, (n, channels, 1, width), device=device) * 2 - 1
    x_best = (x_clean + eps * stripes).clamp(0, 1)
    smallest = margin(x_best, labels)
    for i in range(queries):
        rows = (smallest > 0).nonzero()[:, 0]
        if not len(rows):
            break
        side = square_side(i, height, width)
        top = int(torch.randint(max(height - side, 1), ()))
        left = int(torch.randint(max(width - side, 1), ()))
        sign = torch.randint(2, (channels, 1, 1), device=device) * 2 - 1
        delta = x_best[rows] - x_clean[rows]
        delta[:, :, top : top + side, left : left + side] = eps * sign
        x = (x_clean[rows] + delta).clamp(0, 1)
        value = margin(x, labels[rows])
        better = (value < smallest[rows]) | (value <= 0)
        x_best[rows[better]], smallest[rows[better]] = x[better], value[better]
    wrong = (smallest <= 0)[:, None, None, None]
    return torch.where(wrong, x_best, x_clean)


def attack(name, model, x, labels, target, eps, steps, queries):
    """One of the four attacks: -> x_adv; target (B,) is of apgd-t and fab-t."""
    if name == "apgd-ce":
        loss = partial(F.cross_entropy, target=labels, reduction="none")
        return apgd(model, x, labels, loss, eps, steps)
    if name == "apgd-t":
        loss = partial(targeted_dlr_loss, labels=labels, target=target)
        return apgd(model, x, labels, loss, eps, steps)
    if name == "fab-t":
        return fab(model, x, labels, target, eps, steps)
    return square(model, x, labels, eps, queries)


@torch.no_grad()
def autoattack(model, x, labels, eps, steps=100, queries=5000, targets=9, batch_size=500):
    """Which images (N,) stay right: each batch through all attacks; the model is in eval mode."""
    robust = torch.zeros(len(x), dtype=bool, device=x.device)
    for index in torch.arange(len(x), device=x.device).split(batch_size):
        logits = model(x[index])
        robust[index] = logits.argmax(1) == labels[index]
        others = logits.scatter(1, labels[index, None], -1e10)
        ranking = others.argsort(1, descending=True)  # (B, K): the classes to aim at, in turn
        targets = min(targets, logits.shape[1] - 1)
        passes = [("apgd-ce", 0)]
        passes += [("apgd-t", rank) for rank in range(targets)]
        passes += [("fab-t", rank) for rank in range(targets)]
        passes += [("square", 0)]
        for name, rank in passes:
            rows = robust[index].nonzero()[:, 0]
            if not len(rows):
                break
            alive, target = index[rows], ranking[rows, rank]
            with torch.enable_grad():
                x_adv = attack(name, model, x[alive], labels[alive], target, eps, steps, queries)
            robust[alive] = model(x_adv).argmax(1) == labels[alive]
    return robust
