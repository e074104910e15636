"""Shared by all tests: no network, fixed seeds, GPU tests skipped where there is no GPU, the embedded model."""

from __future__ import annotations

import os
import random
import tempfile
from collections.abc import Iterator
from pathlib import Path

# Set before huggingface_hub is imported, which reads it once: a test that tries to download must fail, here as in CI.
os.environ["HF_HUB_OFFLINE"] = "1"
# Tests have a cache folder of their own, not the user's. Compiled code stays in it between runs.
os.environ.setdefault("REDUCIO_CACHE_DIR", str(Path(tempfile.gettempdir()) / "reducio-fast-tests"))

# Set before torch is imported: parallel workers with one thread per core each would wait for each other.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import pytest
import torch

# Triton decides at import whether its functions are compiled or interpreted: with no GPU they run on CPU tensors.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

ROOT = Path(__file__).resolve().parents[1]


def pytest_xdist_auto_num_workers() -> int:
    """With a GPU no workers, so that its tests run one at a time; else one worker per core, at most 8."""
    return 0 if torch.cuda.is_available() else min(os.cpu_count() or 1, 8)


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """With `-m "not slow"`, skips files whose tests are all slow: importing them took a worker as long as its tests."""
    if config.option.markexpr == "not slow" and collection_path.suffix == ".py":
        return "\npytestmark = pytest.mark.slow\n" in collection_path.read_text(encoding="utf-8") or None
    return None


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not torch.cuda.is_available():
        no_gpu = pytest.mark.skip(reason="needs a CUDA or ROCm device")
        for item in items:
            if "gpu" in item.keywords:
                item.add_marker(no_gpu)


@pytest.fixture(autouse=True)
def fixed_seeds() -> None:
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def same_number_of_threads() -> Iterator[None]:
    """A test that leaves another number of threads fails: 64 on two cores made each later training step 10x as long."""
    before = torch.get_num_threads()
    yield
    after = torch.get_num_threads()
    torch.set_num_threads(before)
    assert after == before, f"the test leaves {after} threads, it found {before}"


@pytest.fixture(scope="session")
def root() -> Path:
    """Root folder of the checkout."""
    return ROOT


@pytest.fixture(scope="session")
def bundle() -> Path:
    """Folder of the embedded default model."""
    return ROOT / "reducio_fast" / "models" / "tiny"
