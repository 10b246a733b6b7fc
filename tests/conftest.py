"""Every test: no network, the same seed, one thread; what is expensive is made once for all test processes."""

import os

# Before anything imports transformers, which reads them once.
os.environ["HF_HUB_OFFLINE"] = os.environ["TRANSFORMERS_OFFLINE"] = "1"
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
# Before anything imports torch, and for the processes that tests start: `make test` runs a process a core, and threads
# beyond that wait for one another (tests' tensors are too small to gain from any).
os.environ.setdefault("OMP_NUM_THREADS", "1")

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from filelock import FileLock

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before anything imports triton, which reads it once

REPOSITORY = Path(__file__).resolve().parents[1]


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--quick", action="store_true", help="no slow test, and one case of each parametrised test")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if not torch.cuda.is_available() and "CALD_SPEECH_GPU_TESTS_ON" not in os.environ:
        for item in items:
            # Not `in item.keywords`: those are names of folders too, the checkout's own among them.
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device, and torch.cuda.is_available() is False"))
    if config.getoption("--quick"):
        kept = quick_cases(items)
        config.hook.pytest_deselected(items=[item for item in items if item not in kept])
        items[:] = [item for item in items if item in kept]


def quick_cases(items: list[pytest.Item]) -> set[pytest.Item]:
    """Of each test that is neither slow nor wide, the first case."""
    first: dict[str, pytest.Item] = {}
    for item in items:
        if not {"slow", "wide", "gpu"} & {mark.name for mark in item.iter_markers()}:
            first.setdefault(item.nodeid.partition("[")[0], item)
    return set(first.values())


def once_for_all_workers(tmp_path_factory: pytest.TempPathFactory, name: str, make: Callable[[Path], object]) -> Path:
    """A folder that the first of the test processes to ask for it fills, for all of them.

    For session fixtures that train or write much: under pytest-xdist each process has its own session.

    Arguments
    ---------
    tmp_path_factory : pytest.TempPathFactory
        The fixture.
    name : str
        The folder's name, of its own among all tests.
    make : callable
        Gets the folder, empty, and fills it; nobody may write there afterwards. What it raises fails the test that
        asked, and the next one tries again.

    Example
    -------
    @pytest.fixture(scope="session")
    def trained(tmp_path_factory):
        return once_for_all_workers(tmp_path_factory, "trained", lambda folder: train_a_miniature(folder))
    """
    base = tmp_path_factory.getbasetemp()  # under pytest-xdist a folder for each process beside those of the others
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / name
    done = folder.with_name(f"{name}.done")
    with FileLock(folder.with_name(f"{name}.lock")):
        if not done.exists():
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir()
            make(folder)
            done.touch()
    return folder


@pytest.fixture(autouse=True)
def no_waiting_for_the_disk(monkeypatch) -> None:
    """Tests outlast no power cut: they do not wait some 10 ms for each file to be on the disk."""
    monkeypatch.setattr(os, "fsync", lambda handle: None)
    monkeypatch.setattr(os, "sync", lambda: None)


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


@pytest.fixture(scope="session")
def speech_of(shared_data) -> Callable[[str], Path]:
    """The folder of a corpus in ``shared_data`` by its name; the test is skipped where it is not there."""

    def find(corpus: str) -> Path:
        if not (shared_data / corpus).is_dir():
            pytest.skip(f"needs real speech, and there is no {corpus} in {shared_data}")
        return shared_data / corpus

    return find
