"""Numbers and tensors of objects in the frames of a loop, which nobody registers, come back."""

from __future__ import annotations

import signal

import pytest

from quiet.programs import FORWARD, loop
from quiet.running import KILLED_AT, on_two_ranks, resumes_exactly, run

CLASS = """
class MyTrainer:
    def __init__(self):
        self.model = Net()
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-2)
        self.data = batch_source(pairs, seed=0, global_batch_size=4)
        self.ema_loss, self.best, self.center, self.window = 0.0, math.inf, None, deque(maxlen=3)
        self.ready, self.name = False, "cold"
        {more}

    {methods}

    def get_ready(self):
        self.ready, self.name, self.gain = True, "warm", lambda: 1.0
        self.last_look = time.perf_counter()

    def train(self):
        objects = dict(model=self.model, optimizer=self.optimizer, data=self.data)
        with Checkpointer(FOLDER, save_steps=4, **objects) as checkpointer:
            self.report = checkpointer.resume()
            step = self.report.step
            {resumed}
            for batch in self.data.iterate():
                if step == 14:
                    break
                if not self.ready:
                    self.get_ready()
                inputs, labels = batch.data
                logits = self.model(inputs)
                loss = F.cross_entropy(logits, labels) * (1 + self.ema_loss) * self.gain()
                loss = loss * (1 + sum(self.window))
                if self.center is not None:
                    loss = loss + (logits - self.center).square().mean()
                {before}
                loss.backward()
                self.optimizer.step()
                self.optimizer.zero_grad()
                self.data.used(batch)
                self.ema_loss = 0.9 * self.ema_loss + 0.1 * loss.item()
                self.best = min(self.best, loss.item())
                mean = logits.detach().mean(0)
                self.center = mean if self.center is None else 0.9 * self.center + 0.1 * mean
                self.window.append(loss.item())
                step += 1
                checkpointer.save_if_due(step, {values})
                at(step)

def main():
    trainer = MyTrainer()
    trainer.train()
    return trainer

trainer = main()
model, report = trainer.model, trainer.report
"""


def as_a_class(
    more: str = "",
    methods: str = "",
    resumed: str = "",
    before: str = "",
    values: str = "None",
) -> str:
    """Return the loop as a method, with these lines in it."""
    parts = {"more": more, "resumed": resumed, "before": before, "methods": methods}
    text = CLASS.replace("{values}", values)
    for name, part in parts.items():
        text = text.replace(f"{{{name}}}", part or ("pass" if name != "methods" else ""))
    return text


LOSS = """
class MyLoss:
    def __init__(self):
        self.scale, self.mean = 1.0, torch.zeros(3)
    def __call__(self, logits, labels):
        loss = F.cross_entropy(logits - self.mean, labels) * self.scale
        self.scale = 0.9 * self.scale + 0.1 * loss.item()
        self.mean.lerp_(logits.detach().mean(0), 0.1)
        return loss
class OwnModule(nn.Module):
    def __init__(self):
        super().__init__()
        self.calls = 0
    def forward(self, loss):
        self.calls += 1
        return loss / self.calls
criterion, module = MyLoss(), OwnModule()
"""
FUNCTIONS = """
def make_loss():
    ema = 1.0
    def loss_fn(logits, labels):
        nonlocal ema
        loss_fn.calls += 1
        loss = F.cross_entropy(logits, labels)
        ema = 0.9 * ema + 0.1 * loss.item()
        return loss * (ema + 1 / loss_fn.calls)
    loss_fn.calls = 0
    return loss_fn
loss_fn = make_loss()
"""
PROGRAMS = {
    "a loop that is a method": as_a_class(),
    "a loss object in a variable": loop(
        before=LOSS, forward="loss = module(criterion(model(inputs), labels)); loss.backward()"
    ),
    "attributes and closures of a function": loop(
        before=FUNCTIONS, forward="loss = loss_fn(model(inputs), labels); loss.backward()"
    ),
}


@pytest.mark.parametrize("program", PROGRAMS.values(), ids=PROGRAMS)
def test_what_objects_around_a_loop_hold_comes_back(program, tmp_path):
    resumes_exactly(program, tmp_path)


def on_ranks(program: str) -> str:
    """Return the program for two ranks, which train on other samples and add their gradients."""
    ranks = "import torch.distributed as dist\nfrom unbroken.distributed import join\n"
    ranks += "dist.init_process_group('gloo')\nranks = join()\n"
    add = "[dist.all_reduce(p.grad) for p in self.model.parameters()]"
    for old, new in {
        "global_batch_size=4": "global_batch_size=4, rank=ranks.rank, world_size=2",
        "save_steps=4,": "save_steps=4, ranks=ranks,",
        "self.optimizer.step()": f"{add}\n                self.optimizer.step()",
    }.items():
        assert old in program
        program = program.replace(old, new)
    return ranks + program


def test_what_each_rank_holds_around_its_loop_comes_back_to_it(tmp_path):
    resumes_exactly(on_ranks(PROGRAMS["a loop that is a method"]), tmp_path, on_two_ranks)


def test_what_one_rank_alone_holds_around_its_loop_comes_back_to_it(tmp_path):
    program = as_a_class(
        more="self.drift = 0.0",
        before="loss = loss * (1 + self.drift); self.drift += 0.01 * (ranks.rank == 1)",
    )
    resumes_exactly(on_ranks(program), tmp_path, on_two_ranks)


FORGET = """
from unbroken.checkpoint.coverage.around import AroundLoop
AroundLoop.restore = lambda *_: None
"""


@pytest.mark.parametrize("program", PROGRAMS.values(), ids=PROGRAMS)
def test_without_it_the_run_would_be_another(program, tmp_path):
    with pytest.raises(AssertionError):
        resumes_exactly(FORGET + program, tmp_path)


NOISE = """
class Cooling:
    def __init__(self):
        self.n = 0
    def cool(self):
        self.n += 1
        return 1 + 1 / self.n
cooling = Cooling()
"""
BY_ITSELF = {
    "what a loop repeats up to its step": loop(
        before=NOISE, forward=f"inputs = inputs * cooling.cool()\n{FORWARD}"
    ).replace(
        "    step = report.step\n",
        REPEATED := "    step = report.step\n"
        "    for _ in range(report.step):\n        cooling.cool()\n",
    ),
    "what a loop skips in a method": as_a_class(
        more="self.at = 0",
        methods="def forward_to(self, n):\n        self.at += n",
        resumed="self.forward_to(step)",
        before="self.at += 1; loss = loss * (1 + 1 / self.at)",
    ),
    "what a method repeats": as_a_class(
        more="self.at = 0",
        methods="def come_to(self, n):\n        for _ in range(n):\n            self.at += 1",
        resumed="self.come_to(step)",
        before="self.at += 1; loss = loss * (1 + 1 / self.at)",
    ),
    "what a method adds": as_a_class(
        more="self.at = 0",
        methods="def count(self, n):\n        self.at += n",
        resumed="self.count(self.report.step)",
        before="self.at += 1; loss = loss * (1 + 1 / self.at)",
    ),
    "what counts from the step of the resume": as_a_class(
        more="self.done = 0",
        before="self.done += 1; loss = loss * (1 + 1 / (self.report.step + self.done))",
    ),
    "what a loop saves in the values and adds": as_a_class(
        more="self.seen = 0",
        resumed="self.seen += (checkpointer.values or {'seen': 0})['seen']",
        before="self.seen += 1; loss = loss * (1 + 1 / self.seen)",
        values="{'seen': self.seen}",
    ),
    "what a loop sets after the resume": as_a_class(
        more="self.step = 0",
        resumed="self.step = step",
        before="self.step += 1; loss = loss * (1 + 1 / self.step)",
    ),
    "batches of its own that it gives again": as_a_class(
        more="self.place = 0",
        methods="def next_batch(self):\n        self.place += 1\n        return self.place",
        resumed="_ = [self.next_batch() for _ in range(step)]",
        before="loss = loss * (1 + 1 / self.next_batch())",
    ),
}


@pytest.mark.parametrize("program", BY_ITSELF.values(), ids=BY_ITSELF)
def test_what_a_program_brings_back_by_itself_is_not_brought_back_twice(program, tmp_path):
    if "self." not in program:
        resumes_exactly(program, tmp_path)
        return
    resumes_exactly(simplified(program), tmp_path)


def simplified(program: str) -> str:
    """Return the program without what it does not bring back by itself."""
    lines = ("self.ema_loss = 0.9", "self.center = mean", "self.window.append")
    return "\n".join(line for line in program.split("\n") if not line.strip().startswith(lines))


HELPERS = """
def settle(cooling, turns):
    for _ in range(turns):
        cooling.cool()
"""


@pytest.mark.parametrize("imports", ["from helpers import settle", "import helpers"])
def test_what_a_function_of_another_file_brings_back_is_not_brought_back_twice(imports, tmp_path):
    for name in ("whole", "killed"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "helpers.py").write_text(HELPERS)
    called = "settle" if "from" in imports else "helpers.settle"
    program = BY_ITSELF["what a loop repeats up to its step"].replace(
        "    for _ in range(report.step):\n        cooling.cool()\n",
        f"    {called}(cooling, report.step)\n",
    )
    here = "sys.path.insert(0, os.path.dirname(__file__))"
    resumes_exactly(f"{here}\n{imports}\n{program}", tmp_path)


def test_another_value_of_a_start_counts_and_is_a_line(tmp_path):
    program = as_a_class()
    killed = run(program, tmp_path, KILLED_AT)
    assert killed["status"] == -signal.SIGKILL, killed["output"]
    again = run(
        program.replace(
            "self.ema_loss, self.best, self.center, self.window = 0.0",
            "self.ema_loss, self.best, self.center, self.window = 0.5",
        ),
        tmp_path,
    )
    (line,) = [one for one in again["differences"] if "ema_loss" in one]
    assert "stored 0.0, now 0.5: equivalent: the new value counts" in line
    assert again["verdict"] == "equivalent"


def test_a_second_resume_in_a_process_leaves_its_counters(tmp_path):
    text = loop(before=NOISE + "tries = Cooling()").replace(
        "        step += 1\n",
        "        step += 1\n        if step == 6 and tries.n < 2:\n            tries.cool()\n"
        "            step = checkpointer.resume().step\n",
    )
    assert run(text, tmp_path).get("verdict") is not None


BESIDE = """
class Shift:
    def __init__(self):
        self.calls = 0
    def __call__(self, a):
        self.calls += 1
        return a + 0.01 * self.calls
class Shifted:
    def __init__(self, shift):
        self.shift, self.read = shift, 0
    def __len__(self):
        return len(pairs)
    def __getitem__(self, index):
        self.read += 1
        return self.shift(pairs[index][0]), pairs[index][1]
class Throughput:
    def __init__(self):
        self.at, self.rates, self.tokens = time.perf_counter(), [], 0
    def update(self, n):
        now, self.tokens = time.perf_counter(), self.tokens + n
        self.rates.append(n / (now - self.at))
        self.at = now
class Stopper:
    def __init__(self, patience=5):
        self.patience, self.bad, self.best, self.state = patience, 0, None, None
    def step(self, value):
        self.bad = 0 if self.best is None or value < self.best else self.bad + 1
        if self.bad == 0:
            self.best, self.state = value, copy.deepcopy(model.state_dict())
shift = Shift()
valid, speed, stopper = Shifted(shift), Throughput(), Stopper()
"""


def test_what_reads_data_and_what_only_shows_a_run_is_no_new_line(tmp_path):
    after = "speed.update(4); stopper.step(loss.item()); _ = [valid[i] for i in range(3)]"
    resumes_exactly(loop(before=BESIDE, after=after), tmp_path)
    held = (tmp_path / "killed/run/checkpoint-8/state.json").read_text()
    assert "speed.at" not in held
    assert "shift.calls" not in held
    assert "stopper.best" in held
