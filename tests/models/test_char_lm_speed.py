"""What measures the character LM measures only what computes the same."""

import pytest
import torch

from python_models import char_lm_speed
from python_models.char_lm import Config
from python_models.char_lm_report import speed_table
from python_models.char_lm_train import Recipe, new_model

TINY = Config(vocabulary=40, layers=2, width=32, heads=4, kv_heads=2, hidden=48, window=8, context=48)
TEXT = torch.randint(40, (2000,), generator=torch.Generator().manual_seed(5))


@pytest.fixture(autouse=True)
def _one_thread():
    torch.set_num_threads(1)


def test_training_speed():
    found = char_lm_speed.training_speed(TINY, Recipe(4, batch=2), TEXT, rounds=3)
    assert list(found.median) == ["ours", "eager", "eager with SDPA"]
    assert all(found.low[n] <= found.median[n] <= found.high[n] for n in found.median)
    assert found.failed == {}
    assert speed_table(found)[1][0][-1] == "1.00x"


def test_no_speed_for_another_result(monkeypatch):
    def blind(q, k, v, *, causal, window_size):
        return char_lm_speed.sdpa(q, k, v, causal=causal, window_size=(window_size[0] - 1, 0))

    def with_fault(model):
        for layer in model.layers:
            layer.attention.attend = blind
        return model

    monkeypatch.setattr(char_lm_speed, "with_sdpa", with_fault)
    with pytest.raises(ArithmeticError, match="eager with SDPA: logits off by"):
        char_lm_speed.training_speed(TINY, Recipe(4, batch=2), TEXT, rounds=1)


def test_generation_speed():
    found = char_lm_speed.generation_speed(new_model(TINY, 0), TEXT[None, :20], count=4, rounds=2)
    assert list(found.median) == ["ours", "eager", "ours without a cache"]


def test_seconds_by_length():
    wanted = {"ours, window": [16, 32], "SDPA, full": [16]}
    steps = []
    found = char_lm_speed.seconds_by_length(TINY, wanted, rounds=1, step=steps.append)
    assert {name: list(times) for name, times in found.items()} == wanted
    assert steps == ["ours, window, 16 characters", "SDPA, full, 16 characters", "ours, window, 32 characters"]
    assert char_lm_speed.seconds_by_length(TINY, wanted, end=0.0)["ours, window"].keys() == {16}
