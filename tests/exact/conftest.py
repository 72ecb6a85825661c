"""Fixtures of the exactness oracle: torch as it was before, and rank processes to share."""

from __future__ import annotations

import gc
import os
import random
from collections.abc import Iterator
from unittest import mock

import numpy as np
import pytest
import torch
from links import RankPool


@pytest.fixture(scope="session", autouse=True)
def quick_links() -> Iterator[None]:
    """Each link collects its garbage, which need not look through all that was imported."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture(scope="session")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """What torch.compile makes is kept for the next link, and compiled without more processes."""
    folder = str(tmp_path_factory.mktemp("compiled"))
    settings = {"TORCHINDUCTOR_CACHE_DIR": folder, "TORCHINDUCTOR_COMPILE_THREADS": "1"}
    with mock.patch.dict(os.environ, settings):
        yield


@pytest.fixture(scope="session")
def ranks(compiled: None) -> Iterator[RankPool]:
    """Processes for links of several ranks."""
    pool = RankPool()
    yield pool
    pool.close()


@pytest.fixture(autouse=True)
def torch_as_before(compiled: None) -> Iterator[None]:
    """A link changes torch for good, as it may where the process is its own."""
    cudnn, fill = torch.backends.cudnn, torch.utils.deterministic
    flags = cudnn.deterministic, cudnn.benchmark, fill.fill_uninitialized_memory
    exact, threads = torch.are_deterministic_algorithms_enabled(), torch.get_num_threads()
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    torch.set_num_threads(1)
    with mock.patch.dict(os.environ):
        yield
    torch.set_num_threads(threads)
    torch.use_deterministic_algorithms(exact)
    cudnn.deterministic, cudnn.benchmark, fill.fill_uninitialized_memory = flags
    random.setstate(states[0])
    np.random.set_state(states[1])
    torch.set_rng_state(states[2])
