"""Shared fixtures: tolerances by dtype, a seeded generator, quiet and deterministic torch; on how many processes."""

import os

import numpy as np
import pytest
import torch

import tests.type_checker  # noqa: F401  (jaxtyping names it and imports `tests` alone)

TOLERANCES = {
    torch.float64: 1e-10,  # sums of at most a few thousand products
    torch.float32: 2e-5,  # 24-bit mantissa, float32 accumulation, K up to 27*512
    torch.float16: 4e-3,  # inputs and the result rounded to 11 bits, float32 accumulation
    torch.bfloat16: 3e-2,  # inputs and the result rounded to 8 bits, float32 accumulation
}


def tolerance(dtype: torch.dtype) -> float:
    """Largest error allowed relative to the largest reference value, judged by the worst entry."""
    return TOLERANCES[dtype]


@pytest.fixture
def assert_close():
    """Compares with a reference by the worst entry, relative to the largest reference value."""

    def check(actual: torch.Tensor, expected: torch.Tensor, *, dtype: torch.dtype | None = None) -> None:
        assert actual.shape == expected.shape, f"shape {tuple(actual.shape)} is not {tuple(expected.shape)}"
        if expected.numel() == 0:
            return
        scale = max(expected.abs().max().item(), 1e-6)
        error = (actual.double().cpu() - expected.double().cpu()).abs().max().item() / scale
        limit = tolerance(dtype or actual.dtype)
        assert error <= limit, f"relative error {error:.3g} exceeds {limit:.3g}"

    return check


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(0)


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def pytest_collection_modifyitems(items):
    """GPU tests say why they do not run where there is no CUDA device."""
    if not torch.cuda.is_available():
        for item in items:
            if "gpu" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="no CUDA device"))


MOST_PROCESSES = 4  # each takes up to 3 GiB
MOST_PROCESSES_ON_A_CARD = 8  # kernels compile on the host's cores, which is what takes the time there


def pytest_xdist_auto_num_workers(config) -> int:
    """The whole fast set on several processes, files apart, and a GPU's tests, one by one; one for all else."""
    if config.option.markexpr == "gpu":
        config.option.dist = "load"
        return min(os.cpu_count() or 1, MOST_PROCESSES_ON_A_CARD)
    whole = (
        not config.option.file_or_dir and "not slow" in config.option.markexpr and "not gpu" in config.option.markexpr
    )
    return min(os.cpu_count() or 1, MOST_PROCESSES) if whole else 0


def pytest_configure(config):
    """One thread each where several processes share the cores, and in what they start."""
    if hasattr(config, "workerinput"):
        os.environ.setdefault("OMP_NUM_THREADS", "1")
        torch.set_num_threads(1)
