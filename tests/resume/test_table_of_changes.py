"""Every single change between two starts of a user's script is seen, and judged as it should be."""

# ruff: noqa: E501 (a table)

from __future__ import annotations

import re
import shutil

import pytest

from resume.edited_scripts import KILLED_AT, edited, started
from scenarios import metrics, outcome

HARMLESS = {
    # script, edit, path of the difference
    "other save cadence": ("configured", ("save_steps=4", "save_steps=3"), "save_steps"),
    "other log cadence": ("configured", ("logging_steps=1", "logging_steps=2"), "logging_steps"),
    "retention": (
        "configured",
        ("save_total_limit=None", "save_total_limit=2"),
        "save_total_limit",
    ),
    "workers": ("configured", ("num_workers=0", "num_workers=2"), "dataloader_num_workers"),
    "no sample is left out": (
        "configured",
        ("    seed=1", "    dataloader_drop_last=True,\n    seed=1"),
        "dataloader_drop_last",
    ),
}
EQUIVALENT = {
    "accumulation": ("configured", ("micro_batch_size=8", "micro_batch_size=4"), "micro_batch_size"),
    "threads": ("configured", ("num_threads(1)", "num_threads(2)"), "environment.num_threads"),
    "determinism": ("configured", ("determinism=True", "determinism=False"), "full_determinism"),
    "a comment": ("configured", ("# Scores of", "# The scores of"), "code.script_digest"),
    "a docstring": ("configured", ('"""Attends."""', '"""Attends well."""'), "code.script_digest"),
    "a variable": (
        "configured",
        ("FOLDER, KILL_AT", "import numpy  # noqa\nos.environ['NVIDIA_TF32_OVERRIDE'] = '0'\nFOLDER, KILL_AT"),
        "environment.variables.NVIDIA_TF32_OVERRIDE",
    ),
    "the data set's code, but not its records": (
        "configured",
        ("return len(self.x)", "return self.x.shape[0]"),
        "data.source.Points",
    ),
    "one more callback": ("configured", ("[Kill()]", "[Kill(), Callback()]"), "callbacks.names"),
    "the kernel of the optimizer": ("configured", ('"adamw_torch"', '"adamw_torch_fused"'), "optim"),
    "a setting that no code names": (
        "configured", ("self.n_head = 2", "self.n_head = 2\n        self.unused = 1"), "model.unused",
    ),
    "attention of a GPT-2": (
        "gpt2", ("n_layer=1,", 'n_layer=1, attn_implementation="eager",'), "model.attn_implementation",
    ),
    "another kernel": ("handmade", ("foreach=False", "foreach=True"), "optimizer.foreach"),
}  # fmt: skip
CHANGED = {
    # script, edit, path, the name that allows it, words of the effect
    "learning rate": ("configured", ("rate=0.01", "rate=0.02"), "learning_rate", "learning rate"),
    "weight decay": ("configured", ("decay=0.1", "decay=0.2"), "weight_decay", "moments are kept"),
    "betas": ("configured", ("beta1=0.9", "beta1=0.8"), "adam_beta1", "moments are kept"),
    "epsilon": ("configured", ("epsilon=1e-8", "epsilon=1e-6"), "adam_epsilon", "other updates"),
    "schedule": ("configured", ('"linear"', '"cosine"'), "lr_scheduler_type", "learning rate"),
    "a schedule by metric": (
        "configured", ('"linear"', '"reduce_lr_on_plateau"'), "lr_scheduler_type", "learning rate",
    ),
    "warm-up": ("configured", ("warmup_steps=0", "warmup_steps=6"), "warmup_steps", "learning rate"),
    "clipping": ("configured", ("norm=0.05", "norm=0.1"), "max_grad_norm", "other gradients"),
    "bf16": ("configured", ("bf16=False", "bf16=True"), "bf16", "other gradients"),
    "fp16": ("configured", ("bf16=False", "fp16=True"), "fp16", "other gradients"),
    "batch size": (
        "configured", ("    batch_size=8,\n    micro_batch_size=8", "    batch_size=4,\n    micro_batch_size=4"),
        "batch_size", "steps of another size",
    ),
    "seed": ("configured", ("seed=1", "seed=2"), "seed", "another order"),
    "shuffle": ("configured", ("shuffle=True", "shuffle=False"), "shuffle", "another order"),
    "part of an epoch": (
        "configured", ("    seed=1", "    samples_per_epoch=32,\n    seed=1"), "samples_per_epoch",
        "another order",
    ),
    "dropout": ("configured", ("Dropout(0.1)", "Dropout(0.2)"), "model.layer.drop", "this layer"),
    "heads of equal shapes": ("configured", ("n_head = 2", "n_head = 4"), "model.n_head", "model"),
    "one more dropout": (
        "configured", ("        self.drop =", "        self.also = nn.Dropout(0.1)\n        self.drop ="),
        "model.layer.also", "this layer",
    ),
    "activation": ("configured", ("torch.relu", "torch.tanh"), "model.source", "code of this class"),
    "frozen": (
        "configured", ("model = Attention()", "model = Attention()\nmodel.query.requires_grad_(False)"),
        "model.frozen", "other parameters train",
    ),
    "a hook on a layer": (
        "configured", ("model = Attention()", "model = Attention()\nmodel.out.register_forward_hook(lambda m, i, o: 2 * o)"),
        "model.out._forward_hooks", "something else",
    ),
    "a hook on a gradient": (
        "configured", ("model = Attention()", "model = Attention()\nmodel.out.weight.register_hook(lambda g: 2 * g)"),
        "model.out.weight._backward_hooks", "something else",
    ),
    "a method put in place of another": (
        "configured", ("model = Attention()", "model = Attention()\nmodel.forward = lambda x: model.out(x)"),
        "model.forward", "something else",
    ),
    "a method put into an installed class": (
        "configured", ("model = Attention()", "nn.Linear.forward = lambda self, x: 2 * x @ self.weight.mT\nmodel = Attention()"),
        "model.out.forward", "something else",
    ),
    "a layer in evaluation mode": (
        "configured", ("model = Attention()", "model = Attention()\nmodel.drop.eval()"), "model.eval", "evaluation mode",
    ),
    "a hook on the optimizer": (
        "handmade", ("config = Tr", "optimizer.register_step_pre_hook(lambda *given: None)\nconfig = Tr"),
        "optimizer._optimizer_step_pre_hooks", "other updates",
    ),
    "one more setting of a loop of one's own": (
        "own_loop", ("0.5}}", '0.5, "mix": 0.1}}'), "data.mix", "batches",
    ),
    "fewer samples": ("configured", ("Points(40", "Points(32"), "data.length", "another order"),
    "other samples": ("configured", ("seed=7", "seed=8"), "data.records", "other samples"),
    "a transform": (
        "configured", ("seed=7)", "seed=7, transform=torch.tanh)"), "data.transform", "other batches",
    ),
    "the collator's code": ("configured", ("x + noise", "x - noise"), "data.collate_fn", "batches"),
    "the collator's number": ("configured", ("= 0.01", "= 0.02"), "data.collate_fn", "batches"),
    "the loss": (
        "configured", ("EntropyLoss()", "EntropyLoss(label_smoothing=0.1)"), "loss", "another loss",
    ),
    "the optimizer's rate": ("handmade", ("lr=0.01", "lr=0.02"), "optimizer.lr", "moments"),
    "the optimizer's betas": ("handmade", ("(0.9, 0.999)", "(0.8, 0.999)"), "optimizer.betas", "moments"),
    "decay of one group": (
        "handmade", ('"weight_decay": 0.1', '"weight_decay": 0.2'), "optimizer.weight_decay", "moments",
    ),
    "a lambda": ("handmade", ("(step + 1)", "(step + 2)"), "scheduler", "learning rate"),
    "a lambda's closure": ("handmade", ("warmed_up(4)", "warmed_up(8)"), "scheduler", "learning rate"),
    "a lambda's global": ("handmade", ("PEAK = 0.9", "PEAK = 0.8"), "scheduler", "learning rate"),
    "rate in a loop of one's own": ("own_loop", ("lr=0.1", "lr=0.2"), "optimizer.lr", "moments"),
    "schedule in a loop of one's own": ("own_loop", ("gamma=0.5", "gamma=0.6"), "scheduler.gamma", "learning"),
    "settings of a loop of one's own": ("own_loop", ("0.5}}", "0.6}}"), "data.noise", "batches"),
    "dropout in a loop of one's own": ("own_loop", ("(0.1)", "(0.2)"), "model.layer.1", "this layer"),
    "heads of a GPT-2": ("gpt2", ("n_head=2", "n_head=4"), "model.n_head", "something else"),
    "dropout of a GPT-2": ("gpt2", ("resid_pdrop=0.1", "resid_pdrop=0.2"), "model.resid_pdrop", "else"),
}  # fmt: skip
REFUSED = {
    # script, edit, words of the error
    "optimizer": ("configured", ('"adamw_torch"', '"sgd"'), r'optim: .*skip=\["optimizer"\]'),
    "optimizer of one's own": (
        "handmade", ("torch.optim.AdamW(groups, lr=0.01, betas=(0.9, 0.999), foreach=False)",
                     "torch.optim.SGD(groups, lr=0.01)"), r"optimizer\.class",
    ),
    "schedule of one's own": (
        "handmade", ("LambdaLR(optimizer, warmed_up(4))", "StepLR(optimizer, 2)"), "LambdaLR.*StepLR",
    ),
    "parameters between groups": (
        "handmade", ("[model[0].weight, model[2].weight]\nothers = [", "[model[2].weight]\nothers = [model[0].weight, "),
        "grouped otherwise",
    ),
    "width": ("configured", ("key = nn.Linear(8, 8)", "key = nn.Linear(8, 8, bias=False)"), r"key\.bias"),
    "shape": ("configured", ("out = nn.Linear(8, 4)", "out = nn.Linear(8, 5)"), r"out\.weight.*\[4, 8\].*\[5, 8\]"),
    "one more layer": (
        "configured", ("        self.drop =", "        self.more = nn.Linear(8, 8)\n        self.drop ="),
        r"more\.weight",
    ),
    "type of the weights": (
        "configured", ("model = Attention()", "model = Attention().double()"), "float32.*float64",
    ),
    "tied weights": (
        "configured", ("model = Attention()", "model = Attention()\nmodel.key.weight = model.query.weight"),
        "tied",
    ),
    "layers of a GPT-2": ("gpt2", ("n_layer=1", "n_layer=2"), r"transformer\.h\.1"),
}  # fmt: skip
SAME = {
    "nothing": ("configured", ("seed=1", "seed=1")),
    "equal shapes reordered": (
        "configured",
        ("self.query = nn.Linear(8, 8)\n        self.key = nn.Linear(8, 8)",
         "self.key, self.query = nn.Linear(8, 8), nn.Linear(8, 8)"),
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def killed(tmp_path_factory):
    """Runs of each script, killed after their checkpoint of step 4."""
    folders = {}
    for name in ("configured", "handmade", "own_loop", "gpt2"):
        folders[name] = tmp_path_factory.mktemp(name)
        assert started(edited(name), folders[name], kill_at=KILLED_AT) == {}
    return folders


@pytest.fixture
def again(killed, tmp_path):
    """Starts an edited script again in a copy of the killed run of the script."""

    def start(name, edit, **named):
        place = tmp_path / f"{name}{len(list(tmp_path.iterdir()))}"
        shutil.copytree(killed[name], place)
        return started(edited(name, edit), place, **named)

    return start


def differences(found: dict) -> dict:
    """Return what differs besides the text of the script, and the place of the copied run."""
    left_out = ("code.script_digest", "output_dir", "callbacks.0.")  # the last one killed the run
    rows = found["differences"].items()
    return {path: row for path, row in rows if not path.startswith(left_out)}


@pytest.mark.parametrize("row", HARMLESS)
def test_a_harmless_change_passes_with_a_line(row, again):
    name, edit, path = HARMLESS[row]
    found = again(name, edit)
    assert found["step"] == 4
    assert found["differences"][path][0] == "harmless"


@pytest.mark.parametrize("row", EQUIVALENT)
def test_an_equivalent_change_passes_with_a_line(row, again):
    name, edit, path = EQUIVALENT[row]
    found = again(name, edit)
    assert found["differences"][path][0] == found["verdict"] == "equivalent"


@pytest.mark.parametrize("row", CHANGED)
def test_a_change_of_the_training_is_refused_unless_it_is_named(row, again):
    name, edit, path, words = CHANGED[row]
    found = again(name, edit)
    assert found["error"] == "DifferenceError"
    assert path in found["message"]
    assert words in found["message"]
    named = again(name, edit, allow=path.partition(".")[0])
    assert named["verdict"] == "changed"
    assert any(
        p.startswith(path) and row[0] == "changed" for p, row in named["differences"].items()
    )


@pytest.mark.parametrize("row", REFUSED)
def test_what_does_not_fit_is_refused_by_name(row, again):
    name, edit, words = REFUSED[row]
    found = again(name, edit, allow="model,optim,optimizer,data,scheduler")
    assert found["error"] in ("StateMismatchError", "DifferenceError")
    assert re.search(words, found["message"])


@pytest.mark.parametrize("row", SAME)
def test_what_does_not_change_the_training_is_exact(row, again):
    name, edit = SAME[row]
    assert differences(again(name, edit)) == {}


def test_reordered_parameters_of_equal_shapes_go_on_with_the_same_bits(again, tmp_path):
    name, edit = SAME["equal shapes reordered"]
    again(name, edit)
    again(name, ("seed=1", "seed=1"))
    reordered, same = (place / "run" for place in sorted(tmp_path.glob("configured*")))
    assert outcome(reordered, 8)["tensors"] == outcome(same, 8)["tensors"]
    assert metrics(reordered) == metrics(same)


def test_the_table_has_at_least_forty_rows():
    assert len({**HARMLESS, **EQUIVALENT, **CHANGED, **REFUSED, **SAME}) >= 40
