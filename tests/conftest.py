"""Two CPU devices for every test, and optional real data: a test that wants it skips, with a reason, where there is none."""

# ruff: noqa: E402  jax reads its flags when it is imported
import os
import pathlib

# Most of a test's time is compiling: fewer LLVM passes. They change the speed of a program, not its meaning.
COMPILE_FAST = "--xla_llvm_disable_expensive_passes=true"
if os.environ.get("NANOLLAMA_TEST_GPU") != "1":  # tests/gpu
    os.environ["JAX_PLATFORMS"] = "cpu"
    os.environ["XLA_FLAGS"] = f"--xla_force_host_platform_device_count=4 {COMPILE_FAST}"

import jax
import pytest

from nanollama_jax import sharding
from tests.trained import chat_tokenizer, trained  # noqa: F401  fixtures

ROOT = pathlib.Path(__file__).parent.parent
SHARED_DATA = ROOT / "../shared/data"


@pytest.fixture(scope="session")
def shared_data() -> pathlib.Path:
    if not SHARED_DATA.is_dir():
        pytest.skip("the optional folder of real test data is absent")
    return SHARED_DATA


@pytest.fixture
def one_device():
    """A mesh of the first device, entered."""
    mesh = sharding.make_mesh(1, 1, devices=jax.devices()[:1])
    with sharding.use_mesh(mesh):
        yield mesh
