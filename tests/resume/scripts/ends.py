"""A user's script that ends in the way, and reads in the way, that its arguments say."""

import contextlib
import multiprocessing
import os
import signal
import sys
import threading
import time

import torch

from unbroken.checkpoint import SavePolicy

out, way, end, workers, context = (
    sys.argv[1],
    sys.argv[2],
    sys.argv[3],
    int(sys.argv[4]),
    sys.argv[5],
)
HANGS = end.startswith("hangs")


class Samples(torch.utils.data.Dataset):
    read = 0

    def __len__(self):
        return 64

    def __getitem__(self, index):
        self.read += 1
        if HANGS and self.read > 8:  # in a worker: its third batch
            threading.Event().wait()
        return {"x": torch.ones(4) * index, "y": torch.ones(4)}


class Starting(Samples):
    """Has two steps an epoch; a worker that is started for the second one signals all."""

    def __len__(self):
        return 8

    def __setstate__(self, state):
        self.__dict__.update(state)
        with contextlib.suppress(FileNotFoundError):
            os.remove(f"{out}-step-2")
            signal_all()

    def __getstate__(self):
        return {"read": self.read}


class Evaluated(Samples):
    def __getitem__(self, index):
        if index == 3:
            signal_all()
        return super().__getitem__(index)


class Model(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(4, 4)

    def forward(self, x, y):
        return {"loss": (self.layer(x) - y).square().mean()}


def after_step(step):
    if "starting" in way:
        if step == 2:
            open(f"{out}-step-2", "w").close()
        return
    if step != 3 or "evaluating" in way:
        return
    if "error" in end:
        raise RuntimeError("a mistake of the user")
    if "exit" in end:
        sys.exit(7)
    if "SIGKILL" in end:
        os.kill(os.getpid(), signal.SIGKILL)
    signal_all()


def signal_all():
    """Do as Slurm and a terminal do: signal every process of the job."""
    for name in end.split():
        if name.startswith("SIG"):
            os.killpg(0, getattr(signal, name))


def own_trainer():
    from unbroken import Trainer, TrainerConfig
    from unbroken.training import Callback

    class Ending(Callback):
        def on_step_end(self, trainer):
            after_step(trainer.progress.step)

    sizes = {"batch_size": 4, "max_steps": 6, "dataloader_num_workers": workers}
    evaluated = {}
    if "evaluating" in way:
        sizes["eval_steps"] = 3
        evaluated = {
            "eval_dataset": torch.utils.data.DataLoader(Evaluated(), 4, num_workers=workers)
        }
    samples = Samples()
    if "starting" in way:  # of a data set alone, workers start once, before the first step
        sizes["dataloader_num_workers"] = 0
        samples = torch.utils.data.DataLoader(Starting(), 4, num_workers=workers)
    config = TrainerConfig(output_dir=out, save_steps=2, **sizes)
    Trainer(Model(), config, samples, callbacks=[Ending()], **evaluated).train()


def drop_in():
    import transformers

    from unbroken.adapters.transformers import Trainer

    class Ending(transformers.TrainerCallback):
        def on_step_end(self, args, state, control, **others):
            after_step(state.global_step)

    arguments = transformers.TrainingArguments(
        out,
        max_steps=6,
        save_steps=2,
        per_device_train_batch_size=4,
        dataloader_num_workers=workers,
        dataloader_persistent_workers="persistent" in way,
        eval_strategy="steps" if "evaluating" in way else "no",
        eval_steps=3,
        remove_unused_columns=False,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
    )
    global trainer
    samples = Starting() if "starting" in way else Samples()
    data = {"train_dataset": samples, "eval_dataset": Evaluated()}
    trainer = Trainer(Model(), arguments, **data, callbacks=[Ending()])
    trainer.train()


def own_loop():
    from unbroken import Checkpointer, batch_source

    global batches, checkpointer
    model = Model()
    optimizer = torch.optim.AdamW(model.parameters())
    samples = Samples()
    if "loader" in way:
        options = {"num_workers": workers, "multiprocessing_context": context if workers else None}
        samples = torch.utils.data.DataLoader(samples, batch_size=4, **options)
        data = batch_source(samples, seed=0, global_batch_size=4)
    else:
        data = batch_source(samples, seed=0, global_batch_size=4, num_workers=workers)
    parts = {"model": model, "optimizer": optimizer, "data": data}
    checkpointer = Checkpointer(out, save=SavePolicy(steps=2, mode="async"), **parts)
    if "with" in way:
        with checkpointer:
            train(checkpointer, **parts)
    else:
        train(checkpointer, **parts)


def train(checkpointer, model, optimizer, data):
    global batches
    step = checkpointer.resume().step
    batches = data.iterate()
    for batch in batches:
        if step == 6:
            break
        model(**batch.data)["loss"].backward()
        optimizer.step()
        optimizer.zero_grad()
        data.used(batch)
        step += 1
        checkpointer.save_if_due(step)
        after_step(step)


def loop_of_turns():
    from unbroken import Checkpointer

    model = Model()
    optimizer = torch.optim.AdamW(model.parameters())
    samples = torch.utils.data.DataLoader(Samples(), batch_size=4, num_workers=workers)
    run = Checkpointer(out, data=samples, model=model, optimizer=optimizer, save_steps=2)

    def turn(batch):
        model(**batch)["loss"].backward()
        optimizer.step()
        optimizer.zero_grad()
        after_step(run.step)

    if "steps" in way:
        for batch in run.steps(6):
            turn(batch)
            if "break" in end and run.step == 3:
                break
    else:
        for _ in run.epochs(1):
            for batch in run.batches():
                turn(batch)


def stock():
    model = Model()
    optimizer = torch.optim.AdamW(model.parameters())
    for batch in torch.utils.data.DataLoader(Samples(), batch_size=4, num_workers=workers):
        model(**batch)["loss"].backward()
        optimizer.step()
        optimizer.zero_grad()
    torch.save([model.state_dict(), optimizer.state_dict()], f"{out}/last.pt")


WAYS = {
    "trainer": own_trainer,
    "drop-in": drop_in,
    "loop": own_loop,
    "turns": loop_of_turns,
    "stock": stock,
}

if __name__ == "__main__":
    multiprocessing.set_start_method(context)
    try:
        WAYS[way.split()[0]]()
    finally:
        print(f"LAST {time.monotonic()}", flush=True)
