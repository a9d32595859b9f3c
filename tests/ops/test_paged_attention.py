"""paged_attention: the same bits whatever a token is computed with, and no memory touched that no token sees."""

import subprocess
import sys

import pytest
import torch
from calls import same_bits
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import genai_kernels as gk
from genai_kernels.accuracy import UNIT_ROUNDOFF, map_tensors
from genai_kernels.ops.paged_attention.reference import paged_attention_reference
from genai_kernels.ops.paged_attention.samples import ACCURACY, magnitude, paged, tree
from genai_kernels.registry import FLOATS, Make

NAN = float("nan")
DTYPES = pytest.mark.parametrize("dtype", FLOATS, ids=lambda d: str(d).removeprefix("torch."))
OPTIONS = {
    "plain": {},
    "window": {"window_size": (100, 0)},
    "softcap": {"softcap": 4.0, "softmax_scale": 0.5},
    "alibi": {"alibi_slopes": torch.tensor([0.5, 0.1, 0.02, 0.3])},
    "sink": {"sink": torch.tensor([0.5, -1.0, 3.0, 0.0])},
}
OPTION = pytest.mark.parametrize("option", OPTIONS)


def rows(out):
    """Outputs and lse with the tokens first."""
    o, lse = out
    return torch.cat([o.flatten(0, -3).flatten(1).float(), lse.T], dim=1)


@DTYPES
@OPTION
def test_decode_is_prefill(dtype, option):
    """One token at a time, in chunks of any size, and all at once."""
    (q, k, v, table, _), _ = paged(Make(dtype), [700], 700, block_size=16)
    options = {**OPTIONS[option], "return_lse": True}

    def call(begin, end):
        lengths = torch.tensor([end], dtype=torch.int32)
        return rows(gk.paged_attention(q[:, begin:end], k, v, table, lengths, **options))

    whole = call(0, 700)
    for begin, end in [
        (0, 1),
        (1, 2),
        (63, 64),
        (127, 129),
        (500, 517),
        (511, 512),
        (512, 513),
        (600, 700),
        (699, 700),
    ]:
        assert same_bits(call(begin, end), whole[begin:end]), (begin, end)


@DTYPES
@OPTION
def test_whatever_the_blocks(dtype, option):
    """Block sizes from 1, both layouts, tables and lists, strides, and the order of the blocks in the pool."""
    m = Make(dtype)
    lengths, queries = [37, 600, 1030, 1], [5, 1, 40, 1]
    keys, values = [m(n, 2, 32) for n in lengths], [m(n, 2, 32) for n in lengths]
    q, cu = m(sum(queries), 4, 32), torch.tensor([0, *queries]).cumsum(0).int()
    options = {**OPTIONS[option], "return_lse": True, "cu_seqlens_q": cu}
    found = []
    for size in (1, 5, 16, 256):
        counts = [-(-n // size) for n in lengths]
        order = torch.randperm(sum(counts) + 4)
        k_cache, v_cache = (torch.full((len(order), size, 2, 32), NAN, dtype=dtype) for _ in range(2))
        lists = order[: sum(counts)].split(counts)
        for pages, k, v in zip(lists, keys, values, strict=True):
            at = pages[torch.arange(len(k)) // size], torch.arange(len(k)) % size
            k_cache[at], v_cache[at] = k, v
        table = torch.full((4, max(counts)), -7, dtype=torch.int32)  # behind its end a row is not read
        for row, pages in zip(table, lists, strict=True):
            row[: len(pages)] = pages
        lens = torch.tensor(lengths, dtype=torch.int32)
        found.append(rows(gk.paged_attention(q, k_cache, v_cache, table, lens, **options)))
        first = [c.transpose(1, 2).contiguous() for c in (k_cache, v_cache)]
        found.append(rows(gk.paged_attention(q, *first, table, lens, kv_layout="HND", **options)))
        both = torch.stack([k_cache, v_cache], dim=1)
        csr = {"indptr": torch.tensor([0, *counts]).cumsum(0).int(), "indices": order[: sum(counts)].int(),
               "last_page_len": torch.tensor([(n - 1) % size + 1 for n in lengths]).int()}  # fmt: skip
        found.append(rows(gk.paged_attention(q, both[:, 0], both[:, 1], **csr, **options)))
    assert not found[0].isnan().any()
    assert all(same_bits(f, found[0]) for f in found)


@DTYPES
def test_whatever_the_batch_and_the_threads(dtype):
    given = [1, 1100, 40, 513, 700, 1024, 90, 2000]
    new = [1, 1, 40, 2, 1, 3, 17, 1]
    (q, k, v, table, lens), options = paged(Make(dtype), given, new, heads=6, kv_heads=1)
    cu = options["cu_seqlens_q"]
    threads = torch.get_num_threads()
    together = {}
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        together[count] = rows(gk.paged_attention(q, k, v, table, lens, cu_seqlens_q=cu, return_lse=True))
    torch.set_num_threads(threads)
    assert same_bits(together[1], together[2])
    assert same_bits(together[1], together[3])
    for b in range(len(given)):
        part = slice(int(cu[b]), int(cu[b + 1]))
        bounds = torch.tensor([0, new[b]], dtype=torch.int32)
        one = gk.paged_attention(q[part], k, v, table[b : b + 1], lens[b : b + 1], cu_seqlens_q=bounds, return_lse=True)
        assert same_bits(rows(one), together[1][part]), b


@pytest.mark.parametrize("option", ["plain", "window", "softcap"])
def test_a_shared_prefix_changes_nothing(option):
    """Sequences that begin with the same blocks have the bits that they have with copies of them."""
    (q, k, v, table, lens), _ = paged(
        Make(torch.bfloat16), [1100, 1600, 1040, 530, 1100], shared=64, heads=4, kv_heads=2
    )
    assert (table[:3, :64] == table[0, :64]).all()
    apart, k2, v2 = table.clone(), [k], [v]
    for b in range(1, 5):
        used = apart[b] >= 0
        own = torch.arange(int(used.sum())) + sum(map(len, k2))
        k2.append(k[apart[b][used].long()])
        v2.append(v[apart[b][used].long()])
        apart[b][used] = own.int()
    options = {**OPTIONS[option], "return_lse": True}
    shared = gk.paged_attention(q, k, v, table, lens, **options)
    assert same_bits(rows(shared), rows(gk.paged_attention(q, torch.cat(k2), torch.cat(v2), apart, lens, **options)))


@DTYPES
@pytest.mark.parametrize("value", [NAN, float("inf")])
def test_what_no_token_sees_is_not_read(dtype, value):
    """Slots behind the end, blocks out of the window (whose entries may be anything), other sequences' blocks."""
    lengths, new, window = [150, 700, 33], [3, 1, 20], 40
    (q, k, v, table, lens), options = paged(Make(dtype), lengths, new, block_size=4)
    options.update(window_size=(window, 0), return_lse=True)
    clean = rows(gk.paged_attention(q, k, v, table, lens, **options))
    seen = torch.zeros(k.shape[:2], dtype=torch.bool)
    for row, n, t in zip(table, lengths, new, strict=True):
        for key in range(max(0, n - t - window), n):
            seen[row[key // 4], key % 4] = True
        row[: max(0, n - t - window) // 4] = -1
    for cache in (k, v):
        cache[~seen] = value
    assert same_bits(rows(gk.paged_attention(q, k, v, table, lens, **options)), clean)


def test_a_seen_nan_stays_in_its_rows():
    (q, k, v, table, lens), options = paged(Make(torch.float32), [90, 70], [20, 1])
    clean = gk.paged_attention(q, k, v, table, lens, **options)
    v[table[0, 80 // 16], 80 % 16, 1, 5] = NAN  # key 80: seen by tokens 80 to 89 of the first sequence
    found = gk.paged_attention(q, k, v, table, lens, **options)
    wrong = found.isnan()
    assert wrong[10:20, 2:, 5].all()
    assert wrong.sum() == 10 * 2
    assert same_bits(found[~wrong], clean[~wrong])


@DTYPES
def test_a_draft_tree_hides_other_branches(dtype):
    """What is not an ancestor of a token may be anything: NaN changes no bit. (The numbers: the samples `tree`.)"""
    parents = [-1, 0, 0, 1, 2, 4]
    m, context = Make(dtype), 100
    size = len(parents)
    mask = torch.eye(size, dtype=torch.bool)
    for i, parent in enumerate(parents):
        if parent >= 0:
            mask[i] |= mask[parent]
    k, v, q = m(1, context + size, 2, 32), m(1, context + size, 2, 32), m(1, size, 4, 32)
    tokens, table = torch.tensor([context + size], dtype=torch.int32), torch.zeros(1, 1, dtype=torch.int32)
    out = gk.paged_attention(q, k, v, table, tokens, tree_mask=mask)
    plain = gk.paged_attention(q, k, v, table, tokens)
    for i in range(size):
        ancestors = mask[i, : i + 1].all()  # of all before it: then it is what it is without a mask
        assert same_bits(out[0, i].float() == plain[0, i].float(), torch.ones(4, 32, dtype=torch.bool)) == ancestors
        hidden = context + (~mask[i]).nonzero().flatten()
        k2, v2 = k.clone(), v.clone()
        k2[0, hidden] = v2[0, hidden] = NAN
        assert same_bits(gk.paged_attention(q, k2, v2, table, tokens, tree_mask=mask)[0, i], out[0, i])


def test_int8_is_what_its_numbers_are():
    """A cache of int8 against one of float32 with the products. Scales that are powers of 2 commute with rounding, so
    the bits are the same although a scale comes behind the product here.
    """
    (q, k, v, table, lens), options = paged(Make(torch.float32), [300, 90, 600], int8=True)
    for name in ("k_scale", "v_scale"):
        options[name] = options[name].log2().round().exp2()
    exact = [c * s.unsqueeze(-1) for c, s in ((k, options["k_scale"]), (v, options["v_scale"]))]
    assert same_bits(gk.paged_attention(q, k, v, table, lens, **options), gk.paged_attention(q, *exact, table, lens))


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_against_the_reference(data):
    """Any lengths, blocks and options at once."""
    count = data.draw(st.integers(1, 4))
    lengths = data.draw(st.lists(st.integers(0, 600), min_size=count, max_size=count))
    new = [data.draw(st.integers(0, min(n, 40))) for n in lengths]
    kv_heads, group = data.draw(st.sampled_from([(1, 1), (2, 2), (1, 5), (3, 1)]))
    size = data.draw(st.sampled_from([1, 3, 16, 64]))
    m = Make(torch.float32, seed=data.draw(st.integers(0, 99)))
    options = {"int8": data.draw(st.booleans()), "csr": data.draw(st.booleans())}
    options["kv_layout"] = data.draw(st.sampled_from(["NHD", "HND"]))
    options["window_size"] = (data.draw(st.integers(-1, 80)), -1)
    options["softcap"] = data.draw(st.sampled_from([0.0, 5.0]))
    if data.draw(st.booleans()):
        options["sink"] = m.float32(kv_heads * group)
    if data.draw(st.booleans()):
        options["tree_mask"] = tree(m, sum(new), max(max(new), 1))
    args, kwargs = paged(m, lengths, new, heads=kv_heads * group, kv_heads=kv_heads, dim=16, block_size=size, **options)
    kwargs["return_lse"] = True
    ours = gk.paged_attention(*args, **kwargs)
    exact_args, exact_kwargs = map_tensors(lambda t: t.double() if t.is_floating_point() else t, (args, kwargs))
    exact = paged_attention_reference(*exact_args, **exact_kwargs)
    sizes, c = magnitude(*exact_args, **exact_kwargs), ACCURACY.c_fp32(*args, **kwargs)
    for a, ref, size in zip(ours, exact, sizes, strict=True):  # the accuracy rule's bound for each element
        assert torch.equal(a.isinf(), ref.isinf())
        error = (a.double() - ref).abs().nan_to_num(0)  # -inf beside -inf
        assert (error <= c * UNIT_ROUNDOFF[torch.float32] * size.double().clamp_min(1e-38)).all()


def bad(change, **options):
    def build():
        args, kwargs = paged(Make(torch.float32), [40, 30], [3, 1], **options)
        names = ("q", "k_cache", "v_cache", "block_table", "seq_lens")
        call = {**dict(zip(names, args, strict=False)), **kwargs}
        call.update(change(call))
        return call

    return build


INT = torch.int32
BAD = {
    "block": (bad(lambda c: {"block_table": c["block_table"].index_fill(1, torch.tensor([1]), 99)}), IndexError,
              r"block_table\[0, 1\]: expected 0 <= id < 8, got 99"),
    "negative": (bad(lambda c: {"block_table": c["block_table"] * 0 - 1}), IndexError, r"block_table\[0, 0\].*got -1"),
    "list": (bad(lambda c: {"indices": c["indices"] + 8}, csr=True), IndexError, r"indices\[0\]: expected 0 <= id < 8"),
    "too_long": (bad(lambda c: {"seq_lens": c["seq_lens"] + 100}), ValueError, r"seq_lens\[0\]: expected 0 to 48"),
    "too_short": (bad(lambda c: {"seq_lens": c["seq_lens"] * 0 + 2}), ValueError,
                  r"seq_lens\[0\]: expected at least the 3 new tokens"),
    "no_table": (bad(lambda c: {"block_table": None}), ValueError, "block_table: expected block_table and seq_lens"),
    "both": (bad(lambda c: {"indptr": c["seq_lens"]}), ValueError, "and not a part of each"),
    "cu": (bad(lambda c: {"cu_seqlens_q": torch.tensor([0, 3, 9], dtype=INT)}), ValueError, r"cu_seqlens_q\[2\]"),
    "long_table": (bad(lambda c: {"block_table": c["block_table"].long()}), TypeError, "block_table: expected int32"),
    "heads": (bad(lambda c: {"q": c["q"][:, :3]}), ValueError, "q: expected a multiple of the 2 heads"),
    "dtype": (bad(lambda c: {"q": c["q"].bfloat16()}), TypeError, "expected the dtype of q, bfloat16, or int8"),
    "scales": (bad(lambda c: {"k_scale": None}, int8=True), ValueError, "k_scale: expected the scales"),
    "no_scales": (bad(lambda c: {"k_scale": torch.ones(8, 16, 2)}), ValueError, "k_scale: expected None"),
    "layout": (bad(lambda c: {"kv_layout": "DHN"}), ValueError, 'kv_layout: expected "NHD" or "HND"'),
    "tree": (bad(lambda c: {"tree_mask": torch.ones(4, 2).bool()}), ValueError, r"expected \[4, at least 3\]"),
    "last": (bad(lambda c: {"last_page_len": c["last_page_len"] * 0}, csr=True), ValueError, r"last_page_len\[0\]"),
    "inner": (bad(lambda c: {"k_cache": c["k_cache"].transpose(2, 3).contiguous().transpose(2, 3)}), ValueError,
              "k_cache: expected stride 1 in the last dimension"),
    "gradient": (bad(lambda c: {"q": c["q"].requires_grad_()}), NotImplementedError, "it has no gradient"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_errors(name):
    build, kind, text = BAD[name]
    with pytest.raises(kind, match=text):
        gk.paged_attention(**build())


_FORBIDDEN = """
import ctypes, mmap, torch, genai_kernels as gk
libc = ctypes.CDLL(None, use_errno=True)
PROT_NONE, BLOCKS, BYTES = 0, 8, 16 * 2 * 64 * 4  # 8 KiB each: whole pages of memory


def cache(forbidden):
    memory = mmap.mmap(-1, BLOCKS * BYTES)
    tensor = torch.frombuffer(memory, dtype=torch.float32).view(BLOCKS, 16, 2, 64)
    tensor.copy_(torch.randn(tensor.shape, generator=torch.Generator().manual_seed(1)))
    for block in forbidden:
        assert libc.mprotect(ctypes.c_void_p(tensor[block].data_ptr()), ctypes.c_size_t(BYTES), PROT_NONE) == 0
    return tensor


def attend(forbidden, queries, window):
    k, v = cache(forbidden), cache(forbidden)
    q = torch.randn(2, queries, 4, 64, generator=torch.Generator().manual_seed(2))
    table = torch.tensor([[0, 3, 2, 4], [7, 6, 0, 0]], dtype=torch.int32)  # the window of the first has left block 0
    lengths = torch.tensor([59, 17], dtype=torch.int32)
    return gk.paged_attention(q, k, v, table, lengths, window_size=(window, 0))


for queries in (1, 3, 17):
    window = 43 - queries if queries < 17 else 26
    expected = attend([], queries, window)
    assert torch.equal(attend([0, 1, 5], queries, window), expected)
print("untouched")
"""


def test_blocks_that_no_query_sees_are_never_read():
    """Not even to be multiplied by 0: their memory is forbidden here, and a read of it would end the process."""
    result = subprocess.run(
        [sys.executable, "-c", _FORBIDDEN], capture_output=True, text=True, timeout=120, check=False
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout == "untouched\n"
