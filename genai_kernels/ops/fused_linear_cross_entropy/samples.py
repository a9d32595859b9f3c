"""Calls of fused_linear_cross_entropy, for the tests and the benchmarks."""

from __future__ import annotations

from typing import Any

import torch

from ...registry import Make, Sample


def _call(
    m: Make, rows: tuple[int, ...], inputs: int, vocabulary: int, *, bias: bool = False, ignored: float = 0.0,
    logits: float = 1.0, **options: Any,
):  # fmt: skip
    """`logits`: about how large they are. `ignored`: the share of rows that are."""
    weight = m(vocabulary, inputs, scale=logits * max(1, inputs) ** -0.5)
    target = m.ints(0, max(1, vocabulary), rows, torch.int64)
    target[~m.mask(*rows, keep=1 - ignored)] = options.get("ignore_index", -100)
    return (m(*rows, inputs), weight, target, *([m(vocabulary)] if bias else [])), options


def _bench(rows: int, width: int, vocabulary: int) -> Sample:
    return Sample(
        f"{rows}x{width}x{vocabulary}",
        lambda m: _call(m, (rows,), width, vocabulary),
        bench=True,
        flops=2.0 * rows * width * vocabulary,
        backward_flops=4.0 * rows * width * vocabulary,
    )


def _everything(m: Make, **options: Any):
    return _call(
        m, (3, 7), 40, 53, bias=True, ignored=0.3, logits=3.0, label_smoothing=0.1, softcap=5.0, z_loss=1e-2, **options
    )


def _masked_vocabulary(m: Make):
    """Classes that a bias of -inf rules out."""
    args, options = _call(m, (12,), 24, 38, bias=True)
    args[3][::3] = -torch.inf
    return (*args[:2], args[2] // 3 * 3 + 1, args[3]), options


SAMPLES = [
    Sample("plain", lambda m: _call(m, (2, 9), 32, 48)),
    Sample("bias", lambda m: _call(m, (11,), 40, 64, bias=True)),
    Sample("odd", lambda m: _call(m, (13,), 37, 71, bias=True)),
    Sample("sum", lambda m: _call(m, (10,), 24, 33, ignored=0.3, reduction="sum")),
    Sample("none", lambda m: _call(m, (2, 8), 24, 33, ignored=0.3, reduction="none")),
    Sample("one_row", lambda m: _call(m, (), 65, 19)),
    Sample("ignored", lambda m: _call(m, (30,), 32, 50, bias=True, ignored=0.6)),
    Sample("ignore_index_of_a_class", lambda m: _call(m, (30,), 16, 5, ignore_index=3)),
    Sample("all_ignored", lambda m: _call(m, (6,), 16, 20, bias=True, ignored=1.0)),
    Sample("all_ignored_sum", lambda m: _call(m, (6,), 16, 20, bias=True, ignored=1.0, reduction="sum")),
    Sample("smoothing", lambda m: _call(m, (20,), 32, 45, ignored=0.2, label_smoothing=0.1)),
    Sample("smoothing_of_everything", lambda m: _call(m, (9,), 32, 45, label_smoothing=1.0)),
    Sample("softcap", lambda m: _call(m, (16,), 32, 45, logits=20.0, softcap=15.0)),
    Sample("z_loss", lambda m: _call(m, (16,), 32, 45, ignored=0.2, logits=4.0, z_loss=1e-2)),
    Sample("z_loss_returned", lambda m: _call(m, (16,), 32, 45, ignored=0.2, z_loss=1e-2, return_z_loss=True)),
    Sample("everything", _everything),
    Sample("everything_sum", lambda m: _everything(m, reduction="sum", return_z_loss=True)),
    Sample("everything_none", lambda m: _everything(m, reduction="none", return_z_loss=True)),
    Sample("large_logits", lambda m: _call(m, (12,), 64, 80, logits=300.0)),
    Sample("masked_vocabulary", _masked_vocabulary),
    Sample("one_class", lambda m: _call(m, (5,), 8, 1)),
    Sample("wide_vocabulary", lambda m: _call(m, (7,), 20, 3001, ignored=0.2, reduction="none")),
    Sample("many_rows", lambda m: _call(m, (1400,), 9, 30, ignored=0.1, bias=True)),  # two chunks
    Sample("deep", lambda m: _call(m, (12,), 1100, 40)),
    Sample("strided", lambda m: ((m(40, 30).t()[:, ::2], m(20, 60)[:, ::3], torch.arange(60)[::2] % 20,
                                  m(40)[::2]), {})),
    Sample("expanded", lambda m: ((m(1, 50).expand(6, 50), m(9, 50), torch.arange(6)), {})),
    Sample("no_input", lambda m: _call(m, (3,), 0, 5, bias=True)),
    Sample("no_rows", lambda m: _call(m, (0,), 8, 5, reduction="sum")),
    _bench(2048, 192, 2048),
    _bench(1024, 512, 32000),
    _bench(2048, 2048, 32000),
]  # fmt: skip
