"""Every test: no network, the same seed, and as many threads as the small test machine has cores."""

import os

# Before anything imports transformers, which reads them once.
os.environ["HF_HUB_OFFLINE"] = os.environ["TRANSFORMERS_OFFLINE"] = "1"
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")

from pathlib import Path

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before anything imports triton, which reads it once

REPOSITORY = Path(__file__).resolve().parents[1]


def pytest_configure(config: pytest.Config) -> None:
    torch.set_num_threads(1)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device, and torch.cuda.is_available() is False"))


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def repository() -> Path:
    return REPOSITORY


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder with real speech: $CALD_SHARED_DATA, or ../shared/data beside the repository."""
    places = [REPOSITORY.parent / "shared" / "data"]
    if "CALD_SHARED_DATA" in os.environ:
        places.insert(0, Path(os.environ["CALD_SHARED_DATA"]))
    found = next((place for place in places if place.is_dir()), None)
    if found is None:
        pytest.skip(f"needs real speech in {' or '.join(map(str, places))}; set CALD_SHARED_DATA to its folder")
    return found
