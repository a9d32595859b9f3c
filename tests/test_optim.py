"""genai_kernels.optim.AdamW in the place of torch.optim.AdamW: groups, state dicts, resuming with the same bits."""

import copy
import io

import pytest
import torch
from calls import same_bits

import genai_kernels as gk
from genai_kernels.optim import AdamW


def model(dtype=torch.float32):
    torch.manual_seed(3)
    return torch.nn.Sequential(torch.nn.Linear(6, 9), torch.nn.Tanh(), torch.nn.Linear(9, 2)).to(dtype)


def groups_of(net):
    return [{"params": net[0].parameters()}, {"params": net[2].parameters(), "lr": 0.02, "weight_decay": 0.0}]


def train(net, optimizer, steps, first=0):
    for i in range(first, first + steps):
        x = torch.randn(16, 6, generator=torch.Generator().manual_seed(i)).to(net[0].weight.dtype)
        optimizer.zero_grad()
        net(x).float().square().mean().backward()
        optimizer.step()


def bits_of(net, optimizer):
    state = [v for p in net.parameters() for _, v in sorted(optimizer.state[p].items())]
    return [p.detach() for p in net.parameters()] + state


EVERYTHING = {"lr": 0.01, "max_norm": 0.1, "master_weights": True, "ema_decay": 0.9}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_resumed_run_has_the_same_bits(dtype):
    net = model(dtype)
    optimizer = AdamW(groups_of(net), **EVERYTHING)
    train(net, optimizer, 5)
    file = io.BytesIO()
    torch.save({"net": net.state_dict(), "optimizer": optimizer.state_dict()}, file)
    train(net, optimizer, 5, first=5)

    file.seek(0)
    saved, again = torch.load(file), model(dtype)
    resumed = AdamW(groups_of(again), **EVERYTHING)
    again.load_state_dict(saved["net"])
    resumed.load_state_dict(saved["optimizer"])
    train(again, resumed, 5, first=5)
    assert same_bits(bits_of(again, resumed), bits_of(net, optimizer))
    copied = copy.deepcopy(resumed)
    assert copied.max_norm == 0.1


def test_state_dicts_of_torch_load_and_ours_load_into_torch():
    ours, theirs = model(), model()
    a, b = AdamW(groups_of(ours), lr=0.01), torch.optim.AdamW(groups_of(theirs), lr=0.01)
    train(ours, a, 4)
    train(theirs, b, 4)
    for mine, other in zip(a.state_dict()["param_groups"], b.state_dict()["param_groups"], strict=True):
        assert mine == other
    assert {n: set(s) for n, s in a.state_dict()["state"].items()} == {
        n: set(s) for n, s in b.state_dict()["state"].items()
    }
    swapped, other = AdamW(groups_of(theirs)), torch.optim.AdamW(groups_of(ours))
    swapped.load_state_dict(b.state_dict())
    other.load_state_dict(a.state_dict())
    train(theirs, swapped, 1, first=4)
    train(ours, other, 1, first=4)
    assert int(swapped.state[theirs[0].weight]["step"]) == int(other.state[ours[0].weight]["step"]) == 5
    assert swapped.param_groups[1]["lr"] == 0.02


def test_the_norm_is_of_all_groups():
    net, one = model(), model()
    optimizer = AdamW(groups_of(net), max_norm=0.01)
    train(net, optimizer, 1)
    norm = gk.global_norm([p.grad for p in net.parameters()])
    assert same_bits(optimizer.grad_norm, norm)
    assert norm > 0.01
    clipped = torch.optim.SGD(one.parameters(), lr=0.0)
    train(one, clipped, 1)
    theirs = torch.nn.utils.clip_grad_norm_(one.parameters(), 0.01)
    torch.testing.assert_close(theirs, norm, rtol=2**-22, atol=0.0)  # PyTorch's own rounds a norm for each tensor
    for p, q in zip(net.parameters(), one.parameters(), strict=True):
        moment = optimizer.state[p]["exp_avg"]
        torch.testing.assert_close(moment, 0.1 * q.grad, rtol=2**-21, atol=0.0)


def test_parameters_without_gradient_wait():
    """And step on their own count when they have one."""
    a, b = torch.nn.Parameter(torch.ones(3)), torch.nn.Parameter(torch.ones(3))
    optimizer = AdamW([a, b], lr=0.1)
    a.grad = torch.ones(3)
    optimizer.step()
    assert b.tolist() == [1.0] * 3
    assert b not in optimizer.state
    after_one = a.detach().clone()
    a.grad, b.grad = None, torch.ones(3)
    optimizer.step()
    assert same_bits([a.detach(), b.detach()], [after_one, after_one])
    a.grad = torch.ones(3)
    optimizer.step()
    assert [int(optimizer.state[p]["step"]) for p in (a, b)] == [2, 2]
    assert same_bits(a.detach(), b.detach())


def test_a_gradient_in_another_layout_is_the_same_gradient():
    found = []
    for transposed in (False, True):
        p = torch.nn.Parameter(torch.arange(12.0).view(3, 4))
        p.grad = torch.arange(12.0).view(3, 4).T.contiguous().T if transposed else torch.arange(12.0).view(3, 4)
        AdamW([p]).step()
        found.append(p.detach())
    assert same_bits(*found)


def test_the_average_and_the_schedule():
    p = torch.nn.Parameter(torch.ones(4))
    optimizer = AdamW([p], lr=0.5, weight_decay=0.0, ema_decay=0.75)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda i: 0.0 if i else 1.0)
    p.grad = torch.ones(4)
    assert optimizer.step(lambda: 7.0) == 7.0
    schedule.step()
    after = p.detach().clone()
    average = 1 + (after - 1) * 0.25
    assert same_bits(optimizer.state[p]["ema"], average)
    optimizer.step()  # at lr 0
    assert same_bits(p.detach(), after)
    assert same_bits(optimizer.state[p]["ema"], average + (after - average) * 0.25)


REFUSED = {
    "lr": ({"lr": -1.0}, ValueError, "lr: expected a finite number >= 0, got -1.0"),
    "betas": ({"betas": (0.9, 1.0)}, ValueError, "betas: expected two numbers"),
    "max_norm": ({"max_norm": -1.0}, ValueError, "max_norm: expected a number >= 0"),
    "ema_decay": ({"ema_decay": 2.0}, ValueError, "ema_decay: expected 0 to 1"),
    "amsgrad": ({"amsgrad": True}, NotImplementedError, "amsgrad: expected False, got True; torch.optim.AdamW has it"),
    "capturable": ({"capturable": True}, NotImplementedError, "capturable: expected False"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refusals(name):
    options, kind, text = REFUSED[name]
    with pytest.raises(kind, match=r"genai_kernels\.optim\.AdamW: " + text):
        AdamW([torch.nn.Parameter(torch.ones(2))], **options)


def test_a_refused_step_changes_nothing():
    a, b = torch.nn.Parameter(torch.ones(3)), torch.nn.Parameter(torch.ones(3, dtype=torch.float64))
    optimizer = AdamW([{"params": [a]}, {"params": [b]}])
    a.grad, b.grad = torch.ones_like(a), torch.ones_like(b)
    with pytest.raises(TypeError, match="params: expected float32, bfloat16 or float16"):
        optimizer.step()
    assert a.tolist() == [1.0] * 3
