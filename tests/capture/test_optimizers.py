"""Optimizer state goes by names, keeps its dtypes, and fits only the optimizer it came from."""

from __future__ import annotations

import pytest
import torch
from torch import nn, optim

from capture.round_trip import carry, saved
from capture.tree_equality import account
from unbroken.capture import Growth, ParameterNames, capture, restore
from unbroken.capture.kinds.optimizers import restore_optimizer
from unbroken.capture.stored_tensor import Filling
from unbroken.errors import CaptureError, StateMismatchError

transformers = pytest.importorskip("transformers")


def model(seed, dtype=torch.float32):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3, bias=False)).to(dtype)


def adafactor(parameters):
    return transformers.Adafactor(parameters, lr=0.01, relative_step=False, scale_parameter=False)


OPTIMIZERS = {
    "AdamW": optim.AdamW,
    "AdamW amsgrad": lambda p: optim.AdamW(p, amsgrad=True),
    "AdamW fused": lambda p: optim.AdamW(p, fused=True),
    "AdamW capturable": lambda p: optim.AdamW(p, capturable=True, foreach=False),
    "AdamW tensor lr": lambda p: optim.AdamW(p, lr=torch.tensor(0.01), foreach=False),
    "NAdam": optim.NAdam,
    "RAdam": optim.RAdam,
    "Adamax": optim.Adamax,
    "Adadelta": optim.Adadelta,
    "Adagrad": optim.Adagrad,
    "ASGD": optim.ASGD,
    "Rprop": optim.Rprop,
    "RMSprop": lambda p: optim.RMSprop(p, momentum=0.9, centered=True),
    "SGD": optim.SGD,
    "SGD momentum": lambda p: optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True),
    "LBFGS": lambda p: optim.LBFGS(p, lr=0.1, max_iter=3),
    "torch Adafactor": optim.Adafactor,
    "transformers Adafactor": adafactor,
}
runs_on_cpu = pytest.mark.parametrize(
    "build",
    [b for n, b in OPTIMIZERS.items() if n != "AdamW capturable"],
    ids=[n for n in OPTIMIZERS if n != "AdamW capturable"],
)


def step(net, optimizer, count=1, seed=7):
    """Train a few steps on fixed data."""
    batches = torch.randn(count, 4, 3, generator=torch.Generator().manual_seed(seed))
    for batch in batches.to(next(net.parameters()).dtype):

        @torch.enable_grad()  # transformers' Adafactor calls it without
        def closure(batch=batch):
            optimizer.zero_grad()
            loss = net(batch).square().sum()
            loss.backward()
            return loss

        optimizer.step(closure)


def state(net, optimizer):
    """Return all that an optimizer holds, by the names of parameters."""
    names = {parameter: name for name, parameter in net.named_parameters()}
    groups = [{**g, "params": [names[p] for p in g["params"]]} for g in optimizer.param_groups]
    return account([{names[p]: s for p, s in optimizer.state.items()}, groups])


def trained(build, seed=0, count=3, dtype=torch.float32):
    net = model(seed, dtype)
    optimizer = build(net.parameters())
    step(net, optimizer, count)
    return {"model": net, "optimizer": optimizer}


@runs_on_cpu
def test_it_goes_on_bit_for_bit(build):
    source, target = trained(build), trained(build, seed=1, count=1)
    carry(source, target)
    assert state(*target.values()) == state(*source.values())
    step(*source.values(), count=2, seed=8)
    step(*target.values(), count=2, seed=8)
    assert account(list(target["model"].parameters())) == account(
        list(source["model"].parameters())
    )


@runs_on_cpu
def test_without_its_state_it_goes_on_otherwise(build):
    source, target = trained(build), trained(build, seed=1, count=0)
    carry({"model": source["model"]}, {"model": target["model"]})
    differs = state(*target.values()) != state(*source.values())
    assert differs or not any(source["optimizer"].state.values())


@pytest.mark.parametrize("order", [[2, 1, 0], [1, 0, 2]], ids=str)
def test_state_follows_the_name_when_the_order_of_parameters_changes(order):
    source = trained(optim.AdamW)
    net = model(1)
    parameters = list(net.parameters())
    target = {"model": net, "optimizer": optim.AdamW([parameters[n] for n in order])}
    carry(source, target)
    for one, other in zip(net.parameters(), source["model"].parameters(), strict=True):
        moments = (o["optimizer"].state[p] for o, p in ((target, one), (source, other)))
        assert account(next(moments)) == account(next(moments))


def test_parameters_come_back_in_their_stored_order_in_which_norms_are_summed():
    net = model(1)
    optimizer = optim.AdamW(list(net.parameters())[::-1])
    carry(trained(optim.AdamW), {"model": net, "optimizer": optimizer})
    assert [id(p) for p in optimizer.param_groups[0]["params"]] == [*map(id, net.parameters())]


def test_stock_pytorch_would_have_given_the_moments_to_others():
    source, net = trained(optim.AdamW), model(1)
    weights = [net[0].weight, net[1].weight]
    other = optim.AdamW([weights[1], net[0].bias, weights[0]])
    other.load_state_dict(source["optimizer"].state_dict())
    right = source["optimizer"].state[source["model"][0].weight]["exp_avg"]
    assert torch.equal(other.state[weights[1]]["exp_avg"], right)


def test_groups_are_found_by_their_parameters():
    def build(net, order):
        groups = [
            {"params": [net[0].weight, net[1].weight], "weight_decay": 0.1},
            {"params": [net[0].bias], "weight_decay": 0.0},
        ]
        return {"model": net, "optimizer": optim.AdamW([groups[n] for n in order], lr=0.5)}

    source, target = build(model(0), (0, 1)), build(model(1), (1, 0))
    source["optimizer"].param_groups[1]["lr"] = 0.25
    carry(source, target)
    groups = target["optimizer"].param_groups
    assert [(g["lr"], g["weight_decay"]) for g in groups] == [(0.25, 0.0), (0.5, 0.1)]


def options(optimizer):
    return [{k: v for k, v in g.items() if k != "params"} for g in optimizer.param_groups]


def test_every_option_of_a_group_comes_back_and_not_the_learning_rate_alone():
    source, target = trained(optim.AdamW), trained(optim.AdamW, seed=1)
    group = source["optimizer"].param_groups[0]
    changed = {"lr": 0.5, "betas": (0.5, 0.6), "eps": 0.25, "weight_decay": 0.125}
    changed |= {"amsgrad": True, "maximize": True, "foreach": False, "initial_lr": 0.75}
    group.update(changed, layer=3, note="the head", scale=torch.tensor(2.0))
    assert set(changed) <= set(group)
    before = options(target["optimizer"])
    carry(source, target)
    assert account(options(target["optimizer"])) == account(options(source["optimizer"]))
    for name, value in changed.items():
        assert before[0].get(name) != value == target["optimizer"].param_groups[0][name], name


def test_fp32_moments_of_bf16_parameters_stay_fp32():
    source = trained(optim.SGD, dtype=torch.bfloat16)
    for parameter in source["model"].parameters():
        source["optimizer"].state[parameter] = {"exp_avg": torch.rand_like(parameter.float())}
    target = trained(optim.SGD, seed=1, count=0, dtype=torch.bfloat16)
    carry(source, target)
    assert state(*target.values()) == state(*source.values())


def test_stock_pytorch_would_have_cast_them_to_bf16():
    net = model(0, torch.bfloat16)
    one, other = (optim.SGD(net.parameters()) for _ in range(2))
    one.state[net[0].weight] = {"exp_avg": torch.rand(3, 3)}
    other.load_state_dict(one.state_dict())
    assert other.state[net[0].weight]["exp_avg"].dtype == torch.bfloat16


def test_state_that_does_not_exist_yet_stays_absent():
    net = model(0)
    optimizer = optim.AdamW(net.parameters())
    net[1](torch.randn(1, 3)).sum().backward()
    optimizer.step()
    target = carry({"model": net, "optimizer": optimizer}, trained(optim.AdamW, seed=1))
    assert list(target["optimizer"].state) == [target["model"][1].weight]


def test_restored_state_is_shared_with_nothing():
    tree = saved(trained(optim.AdamW))
    one, two = trained(optim.AdamW, seed=1, count=0), trained(optim.AdamW, seed=2, count=0)
    restore(one, tree)
    restore(two, tree)
    before = state(*two.values())
    step(*one.values())
    assert state(*two.values()) == before


def test_state_that_is_there_is_overwritten_where_it_is():
    source, target = trained(optim.AdamW), trained(optim.AdamW, seed=1)
    moments = [own["exp_avg"] for own in target["optimizer"].state.values()]
    carry(source, target)
    now = [own["exp_avg"] for own in target["optimizer"].state.values()]
    assert all(a is b for a, b in zip(now, moments, strict=True))
    assert state(*target.values()) == state(*source.values())


def test_state_in_memory_that_something_shares_is_not_overwritten():
    source, target = trained(optim.AdamW), trained(optim.AdamW, seed=1)
    block = torch.zeros(2, 3, 3)
    for layer, part in zip(target["model"], block, strict=True):
        target["optimizer"].state[layer.weight]["exp_avg"] = part
    carry(source, target)
    assert not block.any()
    assert state(*target.values()) == state(*source.values())


def test_state_of_another_layout_is_not_overwritten():
    source, target = trained(optim.AdamW), trained(optim.AdamW, seed=1)
    own = target["optimizer"].state[target["model"][0].weight]
    own["exp_avg"] = torch.zeros(3, 3).t()
    assert state(*carry(source, target).values()) == state(*source.values())


def test_a_learning_rate_that_is_a_tensor_is_filled_in_place():
    build = OPTIMIZERS["AdamW tensor lr"]
    source, target = trained(build), trained(build, seed=1)
    source["optimizer"].param_groups[0]["lr"].fill_(0.125)
    rate = target["optimizer"].param_groups[0]["lr"]
    carry(source, target)
    assert target["optimizer"].param_groups[0]["lr"] is rate
    assert rate == 0.125


def test_a_learning_rate_that_is_a_tensor_keeps_its_own_type():
    source, target = trained(OPTIMIZERS["AdamW tensor lr"]), trained(OPTIMIZERS["AdamW tensor lr"])
    rate = torch.tensor(0.1, dtype=torch.float64)
    source["optimizer"].param_groups[0]["lr"] = rate
    carry(source, target)
    found = target["optimizer"].param_groups[0]["lr"]
    assert (found.dtype, found.item()) == (torch.float64, rate.item())


def test_options_that_only_this_version_knows_keep_their_value():
    source, target = trained(optim.AdamW), trained(optim.AdamW, seed=1)
    target["optimizer"].param_groups[0]["novel"] = "default"
    carry(source, target)
    assert target["optimizer"].param_groups[0]["novel"] == "default"


def test_capturable_options_come_back():
    net, other = model(0), model(1)
    source = {"model": net, "optimizer": OPTIMIZERS["AdamW capturable"](net.parameters())}
    target = {"model": other, "optimizer": OPTIMIZERS["AdamW capturable"](other.parameters())}
    source["optimizer"].state[net[0].weight] = {"step": torch.tensor(3.0)}
    carry(source, target)
    assert target["optimizer"].state[other[0].weight]["step"].item() == 3.0


@pytest.mark.parametrize("option", ["capturable", "fused", None])
def test_step_counters_are_on_the_device_where_torch_has_them_there(option):
    source, net = trained(optim.AdamW), model(1).to("meta")  # any device but the CPU
    target, later = optim.AdamW(net.parameters()), Filling()
    source["optimizer"].param_groups[0].update({} if option is None else {option: True})
    names = ParameterNames({"model": net})
    restore_optimizer(target, saved(source)["optimizer"], names, later)
    later.finish()
    found = {own["step"].device.type for own in target.state.values()}
    assert found == {"cpu" if option is None else "meta"}
    moments = {own["exp_avg"].device.type for own in target.state.values()}
    assert moments == {"meta"}  # the home of its parameter


def test_the_state_of_another_optimizer_is_refused_by_name():
    with pytest.raises(StateMismatchError) as caught:
        carry(trained(optim.AdamW), trained(optim.SGD))
    assert str(caught.value) == "optimizer: is of another class: expected AdamW, found SGD"


def test_parameters_that_only_one_side_trains_are_named():
    source, target = trained(optim.AdamW), trained(optim.AdamW)
    target["optimizer"] = optim.AdamW(target["model"][0].parameters())
    with pytest.raises(
        StateMismatchError, match=r"optimizer\.1\.weight: the optimizer here does not"
    ):
        carry(source, target)
    with pytest.raises(
        StateMismatchError, match=r"optimizer\.1\.weight: the checkpoint's optimizer"
    ):
        carry(target, source)


def test_another_grouping_is_refused():
    target = trained(optim.AdamW)
    target["optimizer"] = optim.AdamW([{"params": [p]} for p in target["model"].parameters()])
    with pytest.raises(
        StateMismatchError, match=r"grouped otherwise: expected \[3\], found \[1, 1, 1\]"
    ):
        carry(trained(optim.AdamW), target)


def test_a_parameter_of_no_registered_object_is_named_by_place_and_shape():
    with pytest.raises(CaptureError) as caught:
        capture({"optimizer": optim.SGD(model(0).parameters())})
    assert caught.value.where == "optimizer.param_groups.0.params.0"
    assert caught.value.found == "float32[3, 3]"
    assert "register" in caught.value.hint


def test_names_of_several_objects_do_not_clash():
    net, critic, temperature = model(0), model(1), nn.Parameter(torch.ones(()))
    optimizer = optim.SGD([*net.parameters(), *critic.parameters(), temperature])
    objects = {"critic": critic, "model": net, "temperature": temperature, "optimizer": optimizer}
    names = capture(objects)["optimizer"].state["param_groups"][0]["params"]
    bare = ["0.weight", "0.bias", "1.weight"]
    assert names == [*bare, *(f"critic.{name}" for name in bare), "temperature"]


def test_state_of_a_tied_parameter_is_found_by_any_of_its_names():
    def tied(*names):
        net, weight = nn.ParameterDict(), nn.Parameter(torch.ones(2))
        for name in names:
            net[name] = weight
        return {"model": net, "optimizer": optim.SGD([weight], lr=0.1, momentum=0.9)}

    source, target = tied("wte", "head"), tied("head", "wte")
    source["optimizer"].state[source["model"].wte] = {"momentum_buffer": torch.rand(2)}
    carry(source, target)
    moments = [o["optimizer"].state[o["model"].wte] for o in (source, target)]
    assert account(moments[0]) == account(moments[1])


def test_two_parameters_of_one_name_are_refused():
    inner = nn.Module()
    inner.critic = nn.Linear(1, 1)
    with pytest.raises(CaptureError, match=r"critic\.weight: two parameters have this name"):
        capture({"model": inner, "critic": nn.Linear(1, 1)})


def test_state_of_a_parameter_that_left_its_group_comes_back():
    source, target = trained(optim.AdamW), trained(optim.AdamW)
    left = [one["optimizer"].param_groups[0]["params"].pop() for one in (source, target)]
    source["optimizer"].state[left[0]]["exp_avg"].fill_(7)
    carry(source, target)
    assert target["optimizer"].state[left[1]]["exp_avg"].eq(7).all()


def test_state_of_a_parameter_that_nobody_holds_is_refused():
    objects = trained(optim.AdamW)
    objects["optimizer"].state[nn.Parameter(torch.ones(1))] = {"step": 1}
    with pytest.raises(CaptureError, match="state of a parameter that is in none of its groups"):
        capture(objects)


def test_what_an_optimizer_shares_and_adds_comes_back():
    class Lookahead(optim.SGD):
        outer = 0

        def state_dict(self):
            return {**super().state_dict(), "outer": self.outer}

        def load_state_dict(self, state):
            self.outer = state["outer"]
            super().load_state_dict({key: state[key] for key in ("state", "param_groups")})

    source, target = trained(Lookahead), trained(Lookahead, seed=1)
    source["optimizer"].outer, source["optimizer"].state["total"] = 5, torch.ones(2)
    carry(source, target)
    assert target["optimizer"].outer == 5
    assert target["optimizer"].state["total"].tolist() == [1, 1]


def grouped(*groups):
    net = model(0)
    parameters = list(net.parameters())
    optimizer = optim.AdamW([{"params": [parameters[n] for n in group]} for group in groups])
    step(net, optimizer)
    return {"model": net, "optimizer": optimizer}


AS_MANY = {"of the same sizes": ([1], [0, 2]), "of other sizes": ([0, 1], [2])}


@pytest.mark.parametrize("groups", AS_MANY.values(), ids=AS_MANY)
def test_another_grouping_into_as_many_groups_is_refused(groups):
    carry(grouped([0], [1, 2]), grouped([1, 2], [0]))  # their order is none of it
    with pytest.raises(StateMismatchError, match=r"grouped otherwise: expected \[1, 2\]"):
        carry(grouped([0], [1, 2]), grouped(*groups))


@pytest.mark.parametrize("groups", AS_MANY.values(), ids=AS_MANY)
def test_groups_that_training_made_anew_come_back_where_all_was_built_alike(groups):
    source, target = grouped([0], [1, 2]), grouped([0], [1, 2])
    parameters = list(source["model"].parameters())
    for group, indices in zip(source["optimizer"].param_groups, groups, strict=True):
        group["params"] = [parameters[n] for n in indices]
    tree = saved(source)
    growth = Growth(target, lambda path: path == "optimizer")
    growth.grow(tree)
    restore(target, tree)
    growth.keep()
    assert names_and_moments(*target.values()) == names_and_moments(*source.values())


def names_and_moments(net, optimizer):
    names = {parameter: name for name, parameter in net.named_parameters()}
    groups = [[names[p] for p in group["params"]] for group in optimizer.param_groups]
    return groups, {names[p]: account(own) for p, own in optimizer.state.items()}
