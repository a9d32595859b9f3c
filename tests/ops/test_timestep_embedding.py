"""timestep_embedding against diffusers' and the table of a schedule."""

import pytest
import torch
from calls import same_bits

import genai_kernels as gk

CONVENTIONS = {
    "ddpm": {},
    "compvis": {"flip_sin_to_cos": True, "downscale_freq_shift": 0.0},
    "scaled": {"scale": 100.0, "max_period": 500, "downscale_freq_shift": 2.5},
}


@pytest.mark.parametrize("dim", [1, 2, 3, 17, 32, 64, 321])
@pytest.mark.parametrize("convention", CONVENTIONS)
def test_it_is_that_of_diffusers(dim, convention):
    """Closer to float64 than diffusers is; the layout alone could be wrong then."""
    embeddings = pytest.importorskip("diffusers.models.embeddings", reason="what it is compared with")
    options = CONVENTIONS[convention]
    if dim // 2 == options.get("downscale_freq_shift", 1):
        pytest.skip("diffusers divides by zero here; this library refuses it")
    t = torch.tensor([0, 1, 37, 500, 999])
    peer = embeddings.get_timestep_embedding(t, dim, **options)
    ours = gk.timestep_embedding(t, dim, **options)
    exact = gk.timestep_embedding(t, dim, dtype=torch.float64, **options)
    assert ours.dtype == peer.dtype
    assert ours.shape == peer.shape
    assert (ours - exact).abs().max() <= 2.0**-23  # 1.5 ULP without fused multiply-add
    limit = 999 * options.get("scale", 1.0) * 2.0**-23  # of an angle in float32, some of its roundings
    assert (peer - exact).abs().max() <= 4 * limit


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_results_are_rounded_once(dtype):
    t = torch.tensor([3.0, 999.5])
    for options in CONVENTIONS.values():
        wide = gk.timestep_embedding(t, 321, **options)
        assert same_bits(gk.timestep_embedding(t, 321, dtype=dtype, **options), wide.to(dtype))


def test_any_timesteps():
    t = torch.tensor([3, 700])
    expected = gk.timestep_embedding(t, 32)
    for other in (t.int(), t.double(), t.float(), t.half(), torch.stack([t, t], 1)[:, 1]):
        found = gk.timestep_embedding(other, 32, dtype=torch.float32)
        assert same_bits(found, expected)
    assert gk.timestep_embedding(t.double(), 32).dtype == torch.float64
    assert gk.timestep_embedding(t.bfloat16(), 32).dtype == torch.float32
    far = gk.timestep_embedding(torch.tensor([1e15, float("inf"), float("nan")]), 8)
    assert torch.isfinite(far[0]).all()
    assert torch.isnan(far[1:]).all()


def test_the_table_of_a_schedule_has_the_bits_of_each_step():
    generator = torch.Generator().manual_seed(0)
    first, second = (torch.randn(shape, generator=generator) for shape in ((128, 32), (48, 128)))
    calls = []

    def mlp(rows):
        calls.append(rows.shape)
        h = torch.nn.functional.relu(gk.linear(rows, first))
        return h, gk.linear(h, second)

    steps = torch.arange(999, -1, -20)
    table = gk.timestep_embedding_table(steps, 32, mlp, flip_sin_to_cos=True, downscale_freq_shift=0)
    assert calls == [(50, 32)]
    assert len(table) == 50
    for i in (0, 13, -1):
        alone = mlp(gk.timestep_embedding(steps[i].view(1), 32, flip_sin_to_cos=True, downscale_freq_shift=0))
        assert same_bits(list(table[i]), list(alone))
    of_batch = table[torch.tensor([7, 7, 2])]
    assert same_bits(of_batch[1], torch.cat([table[7][1], table[7][1], table[2][1]]))
    listed = gk.timestep_embedding_table([999.0, 0.0], 32)
    assert listed.rows.dtype == torch.float32
    with pytest.raises(IndexError, match=r"genai_kernels.TimestepTable: index: expected 0 <= index < 50, got 50"):
        table[50]
    with pytest.raises(ValueError, match=r"rows: expected a row for each of 2 timesteps, got shape \[1, 32\]"):
        gk.timestep_embedding_table([1.0, 2.0], 32, lambda rows: rows[:1])


def test_errors_name_what_is_wrong():
    t = torch.tensor([1, 2])
    with pytest.raises(ValueError, match=r"genai_kernels.timestep_embedding: downscale_freq_shift: expected another"):
        gk.timestep_embedding(t, 2)
    with pytest.raises(ValueError, match="dim: expected at least 1, got 0"):
        gk.timestep_embedding(t, 0)
    with pytest.raises(ValueError, match="max_period: expected more than 0, got 0"):
        gk.timestep_embedding(t, 8, max_period=0)
    with pytest.raises(ValueError, match=r"timesteps: expected \[batch\], got shape \[\]"):
        gk.timestep_embedding(torch.tensor(1), 8)
    with pytest.raises(TypeError, match=r"timesteps: expected floating or integer numbers, got torch\.bool"):
        gk.timestep_embedding(t > 1, 8)
    with pytest.raises(TypeError, match=r"dtype: expected a floating dtype, got torch.int64"):
        gk.timestep_embedding(t, 8, dtype=torch.int64)
