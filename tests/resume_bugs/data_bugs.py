"""Bugs of a script in where it goes on in its data, in their order, and in what it draws."""

from __future__ import annotations

from resume_bugs.corpus import PARTS, Bug, and_load
from unbroken.check import Culprit

LOAD, EPOCH = PARTS["load"], PARTS["epoch"]
NO_TORCH = LOAD.replace('torch.set_rng_state(state["torch"])\n', "")
NOISY = PARTS["data"].replace("return self.x[index]", "return self.x[index] + {noise}")
GLOBAL_NOISE = NOISY.format(noise="0.1 * torch.randn(8)")
OWN_NOISE = NOISY.format(noise="0.1 * torch.randn(8, generator=noise)").replace(
    "class Samples", "noise = torch.Generator().manual_seed(7)\n\n\nclass Samples"
)
LINES = """
TEXT = FOLDER.parent / "lines.txt"
TEXT.write_text("\\n".join(" ".join(map(str, (i, i % 7, i % 5, 1))) for i in range(200)))


def batches_from(lines):
    while rows := list(itertools.islice(lines, 4)):
        yield torch.tensor([[float(word) for word in row.split()] for row in rows]) / 50
"""
READ_LINES = {
    "data": LINES,
    "model": "model = nn.Sequential(nn.Linear(4, 16), nn.Dropout(0.1), nn.Linear(16, 1))",
    "constants": "EPOCHS = 1",
    "batches": "enumerate(batches_from(lines))",
}


def rest(indices: str, *, seed: str = "epoch", more: str = "generator=torch.Generator()") -> str:
    """Return the begin of an epoch whose loader reads a Subset of some indices of its order."""
    return f"""
order = torch.Generator().manual_seed({seed})
indices = torch.randperm(48, generator=order).tolist()
loader = DataLoader(Subset(data, {indices}), batch_size=4, {more})
"""


RIGHT_REST = rest("indices[4 * position :]")
FROM_POSITION = {"batches": "enumerate(loader, position)"}

DATA_BUGS = (
    Bug(
        "position_lost",
        "The epoch begins again at its first batch.",
        Culprit.DATA_RESTARTED,
        {"batches": "enumerate(loader)"},
        {"batches": PARTS["batches"]},
    ),
    Bug(
        "one_batch_ahead",
        "The position counts a batch that was read ahead.",
        Culprit.DATA_SKIPPED,
        {"due": "save(step, epoch, place + 2)"},
        {"due": "save(step, epoch, place + 1)"},
        {"epoch": "order = torch.Generator().manual_seed(100)\n" + EPOCH.strip().split("\n", 1)[1]},
    ),
    Bug(
        "one_batch_behind",
        "The position is that of the batch before.",
        Culprit.DATA_REPEATED,
        {"due": "save(step, epoch, place)"},
        {"due": "save(step, epoch, place + 1)"},
    ),
    Bug(
        "written_late",
        "The state is put together before the step, by reference, and written after it.",
        Culprit.DATA_REPEATED,
        {"due": "save(step - 1, epoch, place)"},
        {"due": "save(step, epoch, place + 1)"},
    ),
    Bug(
        "epoch_counted_again",
        "The epoch that the sampler is told counts those of this process.",
        Culprit.EPOCH_ORDER,
        {"epoch": EPOCH.replace("100 + epoch", "100 + passes") + "passes += 1"},
        {"epoch": EPOCH + "passes += 1"},
        {"setup": "passes = 0"},
    ),
    Bug(
        "order_generator_forgotten",
        "One generator shuffles all epochs, and begins again at its seed.",
        Culprit.EPOCH_ORDER,
        {"load": LOAD},
        {"load": and_load('order.set_state(state["order"])')},
        {
            "setup": """
order = torch.Generator().manual_seed(100)
begin = None
loader = DataLoader(data, batch_size=4, shuffle=True, generator=order)
""",
            "epoch": "begin = order.get_state()",
            "save": 'state["order"] = begin',
        },
    ),
    Bug(
        "shuffled_anew",
        "The global generator shuffles, and stands in mid-epoch when it does so after a resume.",
        Culprit.DATA_ORDER,
        {"load": LOAD, "epoch": "loader = DataLoader(data, batch_size=4, shuffle=True)"},
        {
            "load": NO_TORCH,
            "epoch": """
if IS_RESUMED and epoch == first_epoch:
    torch.set_rng_state(state["begin"])
begin = torch.get_rng_state()
loader = iter(DataLoader(data, batch_size=4, shuffle=True))
skipped = list(itertools.islice(loader, position))
if IS_RESUMED and epoch == first_epoch:
    torch.set_rng_state(state["torch"])
""",
            "batches": "enumerate(loader, position)",
        },
        {
            "setup": "begin = torch.get_rng_state()",
            "save": 'state["begin"] = begin',
        },
    ),
    Bug(
        "rest_in_the_order_of_the_data",
        "The rest of an epoch is a Subset of the samples in their own order.",
        Culprit.DATA_ORDER,
        {"epoch": rest("range(4 * position, 48) if position else indices")},
        {"epoch": RIGHT_REST},
        FROM_POSITION,
    ),
    Bug(
        "rest_of_another_epoch",
        "The rest of an epoch is a Subset by the order of the epoch before.",
        Culprit.EPOCH_ORDER,
        {"epoch": rest("indices[4 * position :]", seed="epoch - 1 if position else epoch")},
        {"epoch": RIGHT_REST},
        FROM_POSITION,
    ),
    Bug(
        "rest_counts_samples",
        "The rest of an epoch begins at sample `position`, which counts batches.",
        (Culprit.DATA_ORDER, Culprit.DATA_REPEATED, Culprit.POSITION_UNITS),
        {"epoch": rest("indices[position:]")},
        {"epoch": RIGHT_REST},
        FROM_POSITION,
    ),
    Bug(
        "skipped_samples_draw",
        "The generator is restored before batches are skipped, whose augmentation draws from it.",
        Culprit.AUGMENTATION,
        {"batches": PARTS["batches"]},
        {
            "load": NO_TORCH,
            "epoch": EPOCH.replace("loader = DataLoader", "loader = iter(DataLoader")
            .replace("order)\n", "order))\n", 1)
            .replace("generator=order))", "generator=order))")
            + """
skipped = list(itertools.islice(loader, position))
if IS_RESUMED and epoch == first_epoch:
    torch.set_rng_state(state["torch"])
""",
            "batches": "enumerate(loader, position)",
        },
        {"data": GLOBAL_NOISE},
    ),
    Bug(
        "augmentation_generator_forgotten",
        "Augmentation draws from a generator of its own, which is not saved.",
        Culprit.AUGMENTATION,
        {"resumed": ""},
        {"resumed": 'if IS_RESUMED:\n    noise.set_state(state["noise"])'},
        {
            "data": OWN_NOISE,
            "save": 'state["noise"] = noise.get_state()',
            "epoch": RIGHT_REST,
            **FROM_POSITION,
        },
    ),
    Bug(
        "augmentation_by_epoch_forgotten",
        "Augmentation is seeded by an attribute that counts the epochs of this process.",
        Culprit.AUGMENTATION,
        {"epoch": "data.epoch += 1\n" + EPOCH.strip()},
        {"epoch": "data.epoch = epoch\n" + EPOCH.strip()},
        {
            "data": NOISY.format(
                noise="0.1 * torch.randn(8, generator=self.noise_of(index))"
            ).replace(
                "    def __init__",
                """    epoch = -1

    def noise_of(self, index):
        return torch.Generator().manual_seed(99 * self.epoch + index)

    def __init__""",
            )
        },
    ),
    Bug(
        "worker_seeds_differ",
        "Workers draw augmentation under a seed that the loader takes from the global generator.",
        Culprit.AUGMENTATION,
        {"epoch": rest("indices", more="num_workers=2")},
        {
            "epoch": rest(
                "indices", more="num_workers=2, generator=torch.Generator().manual_seed(1)"
            )
        },
        {"data": GLOBAL_NOISE},
    ),
    Bug(
        "curriculum_forgotten",
        "A curriculum's level is an attribute of the data set, and begins again.",
        Culprit.AUGMENTATION,
        {"load": LOAD},
        {"load": and_load('data.level = state["level"]')},
        {
            "data": PARTS["data"]
            .replace("self.x[index]", "self.x[index] * self.level")
            .replace("    def __init__", "    level = 1.0\n\n    def __init__"),
            "save": 'state["level"] = data.level',
            "end": "data.level += 1",
        },
    ),
    Bug(
        "mixup_of_numpy_forgotten",
        "Mixup draws from NumPy's generator, of which nothing is saved.",
        (Culprit.AUGMENTATION, Culprit.GENERATORS, Culprit.SEED_RESET),
        {"load": LOAD},
        {"load": and_load('np.random.set_state(state["numpy"])')},
        {
            "save": 'state["numpy"] = np.random.get_state()',
            "train": """
share = np.random.beta(0.4, 0.4)
batch = share * batch + (1 - share) * batch.flip(0)
"""
            + PARTS["train"].strip(),
        },
    ),
    Bug(
        "masks_of_python_forgotten",
        "Masks are drawn by Python's `random`, of which nothing is saved.",
        (Culprit.AUGMENTATION, Culprit.GENERATORS, Culprit.SEED_RESET),
        {"load": LOAD},
        {"load": and_load('random.setstate(state["python"])')},
        {
            "save": 'state["python"] = random.getstate()',
            "train": """
batch = batch * torch.tensor([float(random.random() > 0.2) for _ in range(8)])
"""
            + PARTS["train"].strip(),
        },
    ),
    Bug(
        "dropout_begins_again",
        "The script seeds at each start, and the generator is not restored after that.",
        Culprit.SEED_RESET,
        {"load": NO_TORCH},
        {"load": LOAD},
        {"model": "model = nn.Sequential(nn.Linear(8, 16), nn.Dropout(0.3), nn.Linear(16, 1))"},
    ),
    Bug(
        "drawn_before_the_restore",
        "The generator is restored, and a validation then draws from it.",
        Culprit.GENERATORS,
        {"resumed": "if IS_RESUMED:\n    model(data[0])"},
        {"resumed": 'if IS_RESUMED:\n    model(data[0])\n    torch.set_rng_state(state["torch"])'},
        {"model": "model = nn.Sequential(nn.Linear(8, 16), nn.Dropout(0.3), nn.Linear(16, 1))"},
    ),
    Bug(
        "file_offset_lost",
        "A file of lines is read from its begin.",
        Culprit.DATA_RESTARTED,
        {"epoch": "lines = iter(TEXT.read_text().splitlines())"},
        {"epoch": "lines = iter(TEXT.read_text().splitlines()[4 * position :])"},
        {**READ_LINES, "due": "save(step, epoch, step)"},
    ),
    Bug(
        "file_offset_counts_lines",
        "A file of lines goes on at line `position`, which counts batches.",
        (Culprit.DATA_REPEATED, Culprit.DATA_RESTARTED),
        {"epoch": "lines = iter(TEXT.read_text().splitlines()[position:])"},
        {"epoch": "lines = iter(TEXT.read_text().splitlines()[4 * position :])"},
        {**READ_LINES, "due": "save(step, epoch, step)"},
    ),
    Bug(
        "shuffle_buffer_lost",
        "The stream goes on where it was read to, but the buffer that shuffles it is empty.",
        (Culprit.DATA_ORDER, Culprit.DATA_SKIPPED),
        {"load": and_load('order.setstate(state["order"])', 'read = state["read"]')},
        {
            "load": and_load(
                'order.setstate(state["order"])',
                'read = state["read"]',
                'buffer.extend(state["buffer"])',
            )
        },
        {
            "constants": "EPOCHS = 1",
            "data": """
buffer, read, order = [], 0, random.Random(3)


def shuffled():
    global read
    while read < 400:
        buffer.append(torch.tensor([read % 9, read % 7, read % 5, read % 3]) / 4.0)
        read += 1
        if len(buffer) > 16:
            yield buffer.pop(order.randrange(len(buffer)))


def batches_of(items):
    while rows := list(itertools.islice(items, 4)):
        yield torch.stack(rows)
""",
            "model": "model = nn.Sequential(nn.Linear(4, 16), nn.Dropout(0.1), nn.Linear(16, 1))",
            "save": 'state |= {"buffer": list(buffer), "read": read, "order": order.getstate()}',
            "epoch": "",
            "batches": "itertools.islice(enumerate(batches_of(shuffled())), 36 - step)",
        },
    ),
    Bug(
        "replay_buffer_lost",
        "A replay buffer begins empty.",
        (Culprit.DATA_ORDER, Culprit.AUGMENTATION),
        {"load": and_load('draw.setstate(state["draw"])')},
        {"load": and_load('draw.setstate(state["draw"])', 'memory.extend(state["memory"])')},
        {
            "setup": "memory, draw = deque(maxlen=40), random.Random(9)",
            "save": 'state |= {"memory": list(memory), "draw": draw.getstate()}',
            "train": """
memory.extend(batch)
batch = torch.stack([draw.choice(memory) for _ in range(4)])
"""
            + PARTS["train"].strip(),
        },
    ),
    Bug(
        "window_lost",
        "A checkpoint inside an accumulation window has no gradients in it.",
        Culprit.ACCUMULATION,
        {"save": ""},
        {"save": 'state["gradients"] = [p.grad for p in model.parameters()]'},
        {
            "load": and_load(
                'for one, gradient in zip(model.parameters(), state.get("gradients", ())):',
                "    one.grad = gradient",
            ),
            "constants": "EPOCHS = 6",
            "train": """
(model(batch).square().mean() / 3).backward()
if (step + 1) % 3 == 0:
    optimizer.step()
    optimizer.zero_grad()
""",
        },
        kill_after=7,
    ),
    Bug(
        "epoch_skipped",
        "The run goes on at the begin of the next epoch.",
        Culprit.EPOCH_SKIPPED,
        {"load": and_load("first_epoch, position = first_epoch + 1, 0")},
        {"load": LOAD},
    ),
)
