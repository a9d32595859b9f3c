"""What the tests of the integrations share."""

import pytest

from genai_kernels.integrations.diffusers import convolutions


@pytest.fixture(autouse=True)
def _convolutions_are_ours(request, monkeypatch):
    """The maps of these tests are so small that PyTorch's convolutions would be taken on most machines."""
    if request.path.stem.startswith("test_diffusers"):
        monkeypatch.setattr(convolutions, "_FEWEST_PIXELS", 1)
        monkeypatch.setattr(convolutions, "_low_precision_is_fast", lambda: False)
