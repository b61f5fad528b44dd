"""What only a GPU can show. Runs with NANOLLAMA_TEST_GPU=1 (`make test-gpu`), Hopper or later."""

import os

import pytest

needs_gpu = pytest.mark.skipif(
    os.environ.get("NANOLLAMA_TEST_GPU") != "1",
    reason="needs an NVIDIA GPU: set NANOLLAMA_TEST_GPU=1",
)
