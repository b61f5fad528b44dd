"""Four CPU devices for every test, the `slow` marker, and optional real data.

A test that needs the optional data skips, with a reason, where it is absent.
"""

# ruff: noqa: E402  jax reads its flags when it is imported
import os
import pathlib

# Most of a test's time is compiling. Fewer LLVM passes change a program's speed, not its meaning.
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
FIXTURES = pathlib.Path(__file__).parent / "fixtures"

# A test is slow if it carries the marker, if it needs one of these fixtures, which train, or if its
# file is one of these, whose tests compile full steps, or start Ray or groups of processes.
SLOW_FIXTURES = {"trained", "lab"}
SLOW_FILES = {
    "corpus/test_executor.py",
    "corpus/test_prepare_faults.py",
    "model/test_flash_attention.py",
    "model/test_llama.py",
    "planning/test_memory.py",
    "test_distributed.py",
    "train/test_preference.py",
    "train/test_step.py",
    "train/test_trl.py",
}


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "slow: left out of `make test-fast`")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        file = item.path.relative_to(ROOT / "tests").as_posix()
        if file in SLOW_FILES or SLOW_FIXTURES & set(getattr(item, "fixturenames", ())):
            item.add_marker(pytest.mark.slow)


@pytest.fixture(scope="session")
def shared_data() -> pathlib.Path:
    if not SHARED_DATA.is_dir():
        pytest.skip("the optional folder of real test data is absent")
    return SHARED_DATA


@pytest.fixture(scope="session")
def real_data() -> pathlib.Path:
    """The optional folder, or the excerpts of it that ship with the tests, laid out alike."""
    return SHARED_DATA if SHARED_DATA.is_dir() else FIXTURES


@pytest.fixture
def one_device():
    """A mesh of the first device, entered."""
    mesh = sharding.make_mesh(1, 1, devices=jax.devices()[:1])
    with sharding.use_mesh(mesh):
        yield mesh
