"""append_kv_cache and the ops on blocks: what is written, what is left alone, and errors before any write."""

import pytest
import torch
from calls import same_bits

import genai_kernels as gk
from genai_kernels.ops.append_kv_cache import appended
from genai_kernels.registry import FLOATS, Make

DTYPES = pytest.mark.parametrize("dtype", FLOATS, ids=lambda d: str(d).removeprefix("torch."))
NAN, INF = float("nan"), float("inf")


@DTYPES
def test_only_the_slots_are_written(dtype):
    (k, v, k_cache, v_cache, slots), options = appended(Make(dtype), 30)
    before = k_cache.clone()
    k[3, 1, 5], k[4, 0, 0] = NAN, -0.0
    gk.append_kv_cache(k, v, k_cache, v_cache, slots, **options)
    flat, old = k_cache.flatten(0, 1), before.flatten(0, 1)
    taken = slots[slots >= 0].long()
    assert same_bits(flat[taken], k[slots >= 0])
    untouched = torch.ones(len(flat), dtype=torch.bool)
    untouched[taken] = False
    assert same_bits(flat[untouched], old[untouched])


@DTYPES
@pytest.mark.parametrize("interleaved", [False, True])
def test_rotation_has_the_bits_of_rotary_embedding(dtype, interleaved):
    (k, v, k_cache, v_cache, slots), options = appended(Make(dtype), 30, rotary=20, interleaved=interleaved)
    gk.append_kv_cache(k, v, k_cache, v_cache, slots, **options)
    rotated = gk.rotary_embedding(k, options["cos"], options["sin"], options["positions"], interleaved=interleaved)
    assert same_bits(k_cache.flatten(0, 1)[slots[slots >= 0].long()], rotated[slots >= 0])


@DTYPES
def test_int8_is_as_near_as_it_can_be(dtype):
    """Half a step of the scale, exactly the largest number; zeros, tiny numbers, and what is not finite."""
    (k, v, k_cache, v_cache, slots), options = appended(Make(dtype), 30, int8=True, skip=False)
    k[0] = 0
    k[1] *= 1e-6
    k[2, 0, 3], k[3, 1, 4] = NAN, -INF
    gk.append_kv_cache(k, v, k_cache, v_cache, slots, **options)
    stored = (k_cache * options["k_scale"].unsqueeze(-1)).flatten(0, 1)[slots.long()]
    scale = options["k_scale"].flatten(0, 1)[slots.long()].unsqueeze(-1)
    wrong = torch.zeros(30, 2, dtype=torch.bool)
    wrong[2, 0] = wrong[3, 1] = True
    assert stored[wrong].isnan().all()
    good = ~wrong
    assert ((stored - k.float()).abs() <= 0.5 * scale * (1 + 1e-5))[good].all()
    assert (k_cache.flatten(0, 1)[slots.long()].abs().amax(-1)[good & (k != 0).any(-1)] == 127).all()
    assert (stored[0] == 0).all()


def call_of(**changes):
    (k, v, k_cache, v_cache, slots), options = appended(
        Make(torch.float32), 6, skip=False, **changes.pop("options", {})
    )
    call = {"k": k, "v": v, "k_cache": k_cache, "v_cache": v_cache, "slot_mapping": slots, **options}
    return {**call, **{name: change(call) for name, change in changes.items()}}


def again(slots):
    slots = slots.clone()
    slots[4] = slots[1]
    return slots


ROTARY = {"rotary": 8}
BAD = {
    "twice": ({"slot_mapping": lambda c: again(c["slot_mapping"])}, ValueError,
              r"slot_mapping\[4\]: expected a slot of its own, got \d+, which slot_mapping\[1\] has"),
    "behind": ({"slot_mapping": lambda c: c["slot_mapping"].fill_(96)}, IndexError,
               r"slot_mapping\[0\]: expected -1 \(skip\) or 0 <= slot < 96, got 96"),
    "before": ({"slot_mapping": lambda c: c["slot_mapping"] * 0 - 2}, IndexError, "got -2"),
    "same_cache": ({"v_cache": lambda c: c["k_cache"]}, ValueError, "expected memory that does not overlap"),
    "overlap": ({"k": lambda c: c["k_cache"].view(-1, 2, 32)[:6]}, ValueError, "expected memory that does not"),
    "shape": ({"k": lambda c: c["k"][:, :1]}, ValueError, r"k: expected \[6, 2, 32\]"),
    "few_slots": ({"slot_mapping": lambda c: c["slot_mapping"][:5]}, ValueError, r"slot_mapping: expected \[6\]"),
    "float_slots": ({"slot_mapping": lambda c: c["slot_mapping"].float()}, TypeError, "expected int32 or int64"),
    "dtype": ({"v": lambda c: c["v"].half()}, TypeError, "v: expected the dtype of k"),
    "cache_dtype": ({"k_cache": lambda c: c["k_cache"].half(), "v_cache": lambda c: c["v_cache"].half()}, TypeError,
                    "k_cache: expected the dtype of k, float32, or int8"),
    "position": ({"options": ROTARY, "positions": lambda c: c["positions"] + 50}, IndexError,
                 r"positions\[0\]: expected 0 <= position < 50"),
    "no_sin": ({"options": ROTARY, "sin": lambda c: None}, ValueError, "sin: expected it together with cos"),
    "stray": ({"positions": lambda c: c["slot_mapping"]}, ValueError, "positions: expected it together with cos"),
    "wide": ({"options": ROTARY, "cos": lambda c: torch.ones(50, 17), "sin": lambda c: torch.ones(50, 17)}, ValueError,
             "a rotary_dim of at most 32"),
    "one_scale": ({"options": {"int8": True}, "v_scale": lambda c: None}, ValueError, "k_scale: expected it together"),
    "layout": ({"kv_layout": lambda c: "DNH"}, ValueError, "kv_layout: expected"),
    "expanded": ({"k_cache": lambda c: c["k_cache"][:1].expand(6, -1, -1, -1)}, ValueError, "internal overlap"),
    "gradient": ({"k": lambda c: c["k"].requires_grad_()}, NotImplementedError, "it has no gradient"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_errors_come_before_any_write(name):
    changes, kind, text = BAD[name]
    call = call_of(**dict(changes))
    caches = [t for n, t in call.items() if n in ("k_cache", "v_cache", "k_scale", "v_scale") and t is not None]
    before = [t.clone() for t in caches]
    with pytest.raises(kind, match=text):
        gk.append_kv_cache(**call)
    assert all(same_bits(a, b) for a, b in zip(caches, before, strict=True))


def test_autograd_sees_the_change():
    call = call_of()
    weight = torch.ones((), requires_grad=True)
    y = (weight * call["k_cache"]).sum()  # saves k_cache
    gk.append_kv_cache(**call)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.backward()


BLOCKS = {
    "copied_twice": (lambda c: gk.copy_blocks(c, torch.tensor([[0, 4], [1, 4]])), ValueError, "got block 4 twice"),
    "read_and_written": (lambda c: gk.copy_blocks(c, torch.tensor([[0, 4], [4, 5]])), ValueError,
                         r"block_mapping\[1, 0\]: expected a block that is not a destination, got 4"),
    "source": (lambda c: gk.copy_blocks(c, torch.tensor([[6, 4]])), IndexError, r"block_mapping\[0, 0\].*< 6, got 6"),
    "destination": (lambda c: gk.copy_blocks(c, torch.tensor([[1, -1]])), IndexError, r"block_mapping\[0, 1\].*got -1"),
    "form": (lambda c: gk.copy_blocks(c, torch.tensor([1, 2])), ValueError, r"expected \[pairs, 2\]"),
    "strides": (lambda c: gk.copy_blocks(c.transpose(1, 2), torch.tensor([[1, 2]])), ValueError, "contiguous memory"),
    "pools": (lambda c: gk.swap_blocks(c, c, torch.tensor([[1, 2]])), ValueError, "does not overlap source"),
    "shapes": (lambda c: gk.swap_blocks(c, torch.zeros(3, 4), torch.tensor([[1, 2]])), ValueError, "of the shape"),
    "dtypes": (lambda c: gk.swap_blocks(c, c.half(), torch.tensor([[1, 2]])), TypeError, "expected the dtype"),
    "gathered": (lambda c: gk.gather_kv_cache(c[..., None], c[..., None], torch.tensor([[9]]).int(),
                                              torch.tensor([2]).int()), IndexError, r"block_table\[0, 0\].*got 9"),
}  # fmt: skip


@pytest.mark.parametrize("name", BLOCKS)
def test_errors_of_blocks(name):
    run, kind, text = BLOCKS[name]
    cache = torch.randn(6, 4, 3)
    before = cache.clone()
    with pytest.raises(kind, match=text):
        run(cache)
    assert same_bits(cache, before)
