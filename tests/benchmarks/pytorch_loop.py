"""The main job in PyTorch, to measure ours against: by default as it is commonly written, with all
labels, 5 epochs for the teacher and 10 for each student, constant rate, teacher inside the step.

    python tests/benchmarks/pytorch_loop.py DATA_DIR [--channels-last] [--cached] [--compiled]

It takes nothing from the examples. --cached is the best case.
"""

import copy
import functools

import torch
from idx import parser, read
from torch import nn
from torch.nn import functional as F


def block(channels_in, channels_out, padding):
    conv = nn.Conv2d(channels_in, channels_out, 3, padding=padding)
    return conv, nn.BatchNorm2d(channels_out), nn.ReLU(), nn.MaxPool2d(2)


def make_teacher():
    return nn.Sequential(
        *block(1, 64, 1), *block(64, 128, 1), *block(128, 128, 1), nn.Flatten(),
        nn.Linear(1152, 512), nn.ReLU(), nn.Dropout(0.5),
        nn.Linear(512, 256), nn.ReLU(), nn.Dropout(0.5), nn.Linear(256, 10),
    )  # fmt: skip


def make_student():
    return nn.Sequential(
        *block(1, 16, 0), *block(16, 32, 0), nn.Flatten(),
        nn.Linear(800, 64), nn.ReLU(), nn.Linear(64, 10),
    )  # fmt: skip


def distillation_loss(logits, teacher_logits, label):
    soft = F.kl_div(
        F.log_softmax(logits / 3, 1), F.softmax(teacher_logits / 3, 1), reduction="batchmean"
    )
    return 0.5 * F.cross_entropy(logits, label) + 0.5 * 9 * soft


def train_step(model, optimizer, image, label, teacher=None, teacher_logits=None):
    """One step on the labels and, with a teacher or its logits, on those."""
    if teacher is not None:
        with torch.no_grad():
            teacher_logits = teacher(image)
    optimizer.zero_grad()
    logits = model(image)
    if teacher_logits is None:
        loss = F.cross_entropy(logits, label)
    else:
        loss = distillation_loss(logits, teacher_logits, label)
    loss.backward()
    optimizer.step()
    return loss


@torch.inference_mode()
def predict(model, image):
    model.eval()
    return torch.cat([model(part) for part in image.split(1000)])


def train(model, epochs, peak, data, seed, teacher=None, teacher_logits=None):
    """Trains at a constant rate or, given a peak, one-cycle and with the fused Adam; prints the
    accuracy of each epoch."""
    (image, label), test = data
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3, fused=bool(peak))
    steps = epochs * (len(label) // 128)
    schedule = None
    if peak:  # as in optax.cosine_onecycle_schedule; the momentum stays
        schedule = torch.optim.lr_scheduler.OneCycleLR(
            optimizer, peak, total_steps=steps + 1, cycle_momentum=False
        )
    generator = torch.Generator().manual_seed(seed)
    for epoch in range(1, epochs + 1):
        model.train()
        order = torch.randperm(len(label), generator=generator)
        for chosen in order[: len(label) // 128 * 128].split(128):
            cached = None if teacher_logits is None else teacher_logits[chosen]
            train_step(model, optimizer, image[chosen], label[chosen], teacher, cached)
            if schedule:
                schedule.step()
        accuracy = (predict(model, test[0]).argmax(1) == test[1]).float().mean().item()
        print(f"epoch {epoch}: {accuracy:.4f}", flush=True)


def load(folder, last):
    """Images [N, 1, 28, 28] in [0, 1] and labels, of the training and the test set."""
    tensors = []
    for part in ("train", "t10k"):
        image, label = map(torch.from_numpy, read(folder, part))
        # With one channel only the strides tell the layouts apart, and convolutions go by them.
        image = image.permute(0, 3, 1, 2) if last else image.reshape(-1, 1, 28, 28)
        tensors.append((image, label.long()))
    return tensors


def parse(argv=None):
    line = parser(__doc__)
    line.add_argument(
        "--channels-last", action="store_true", help="lay images out as [B, H, W, C] does"
    )
    line.add_argument(
        "--cached",
        action="store_true",
        help="the schedule and the epochs of ours (3 and 4, one-cycle), the teacher's logits "
        "computed once, and the fused Adam",
    )
    line.add_argument("--compiled", action="store_true", help="networks through torch.compile")
    return line.parse_args(argv)


def prepare(model, flags):
    """What a network goes through before it is used."""
    last = flags.channels_last
    model = model.to(memory_format=torch.channels_last if last else torch.contiguous_format)
    return torch.compile(model, dynamic=False) if flags.compiled else model


def cases(folder, *flags):
    """What compare.py times: functions that take a number of steps, by name."""
    flags = parse([str(folder), *flags])
    image, label = load(flags.data_dir, flags.channels_last)[0]
    torch.manual_seed(0)
    networks = make_teacher(), make_student(), make_teacher()
    teacher, student, other = (prepare(network, flags) for network in networks)
    other.eval()
    with torch.no_grad():
        table = predict(other, image[:4096]).clone()
    student.train()
    teacher.train()
    places = torch.randperm(4096).split(128)
    adam = functools.partial(torch.optim.Adam, lr=1e-3)
    optimizers = {model: adam(model.parameters()) for model in (teacher, student)}

    def steps(model, count, **how):
        for i in range(count):
            at = places[i % len(places)]
            more = {"teacher_logits": table[at]} if how.get("cached") else {}
            more |= {"teacher": other} if how.get("inside") else {}
            loss = train_step(model, optimizers[model], image[at], label[at], **more)
        return loss.item()

    @torch.inference_mode()
    def inference(count):
        for i in range(count):
            logits = other(image[places[i % len(places)]])
        return logits.sum().item()

    return {
        "student step": functools.partial(steps, student),
        "teacher step": functools.partial(steps, teacher),
        "teacher inference": inference,
        "distillation step": functools.partial(steps, student, inside=True),
        "distillation step, cached logits": functools.partial(steps, student, cached=True),
    }


def main(flags):
    data, cached = load(flags.data_dir, flags.channels_last), flags.cached
    teacher_epochs, epochs, teacher_peak, peak = (3, 4, 5e-3, 2e-2) if cached else (5, 10, 0, 0)
    torch.manual_seed(0)
    print("teacher")
    teacher = prepare(make_teacher(), flags)
    train(teacher, teacher_epochs, teacher_peak, data, 0)
    teacher.eval()
    torch.manual_seed(42)
    start = make_student()
    how = {"teacher_logits": predict(teacher, data[0][0])} if cached else {"teacher": teacher}
    for name, guide in (("distilled", how), ("baseline", {})):
        print(name)
        train(prepare(copy.deepcopy(start), flags), epochs, peak, data, 42, **guide)


if __name__ == "__main__":
    main(parse())
