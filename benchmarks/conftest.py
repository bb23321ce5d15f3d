"""The pytest-benchmark suite: its options, and a provider's step on a case, checked and ready to be called."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator

import pytest
import torch

from benchmarks import measure
from benchmarks.cases import Case, make_cases
from benchmarks.options import DTYPES
from benchmarks.providers import DEFAULT, PROVIDERS, Setting, UnsuitableError
from benchmarks.providers.base import Mode
from benchmarks.runner import converted, rotation
from benchmarks.workload import Workload, describe_errors, first_results, make_workload

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
MODES = ("inference", "train")
NETWORKS = ("resnet18", "resnet50")


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("resfuse's benchmarks of operators and blocks")
    group.addoption("--bench-batch", type=int, default=16, help="images in a batch (default 16)")
    group.addoption("--bench-size", type=int, help="height and width of the images (default 224)")
    group.addoption("--bench-threads", type=int, help="threads on the CPU (default: torch's own choice)")
    group.addoption("--bench-dtype", default="float32", choices=list(DTYPES), help="default float32")
    group.addoption(
        "--bench-provider", action="append", choices=list(PROVIDERS), metavar="NAME",
        help=f"may be repeated (default {', '.join(DEFAULT)}); any of {', '.join(PROVIDERS)}",
    )  # fmt: skip


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Every case of the module's LEVEL, mode and provider: those that can not run here are skipped, with the reason."""
    if "provider" not in metafunc.fixturenames:
        return
    option = metafunc.config.getoption
    cases = make_cases(metafunc.module.LEVEL, NETWORKS, option("--bench-batch"), option("--bench-size"))
    metafunc.parametrize("case", cases, ids=[case.name.replace(" ", "-") for case in cases])
    metafunc.parametrize("mode", MODES)
    metafunc.parametrize("provider", option("--bench-provider") or DEFAULT)


@pytest.fixture(autouse=True, scope="session")
def _process(request: pytest.FixtureRequest) -> Iterator[None]:
    """What the worker processes of `benchmarks.run` set, too."""
    threads, tuned = torch.get_num_threads(), torch.backends.cudnn.benchmark
    torch.set_num_threads(request.config.getoption("--bench-threads") or threads)
    torch.backends.cudnn.benchmark = True
    yield
    torch.set_num_threads(threads)
    torch.backends.cudnn.benchmark = tuned


@pytest.fixture
def step(case: Case, mode: Mode, provider: str, pytestconfig: pytest.Config) -> Callable[[], None]:
    """One call that waits until the device is done; its results have been held against float64.

    Inputs take turns, as in `benchmarks.run`.
    """
    dtype = DTYPES[pytestconfig.getoption("--bench-dtype")]
    setting = Setting(mode, dtype, DEVICE, torch.get_num_threads(), level=case.level)
    reason = PROVIDERS[provider].unavailable_reason(setting)
    if reason is not None:
        pytest.skip(f"{provider}: {reason}")
    workload = _workload(case, setting)
    module = workload.module()
    examples = tuple(tensor.detach() for tensor in workload.batch(0)[: len(case.inputs)])
    try:
        run = PROVIDERS[provider].prepare(module, examples, setting)
        batches = [converted(PROVIDERS[provider], workload, index) for index in range(rotation(workload))]
        errors = workload.errors(first_results(run, module, batches[0], workload))
    except UnsuitableError as error:
        pytest.skip(f"{provider}: {error}")
    wrong = {quantity: error for quantity, error in errors.items() if not error <= workload.limit(quantity)}
    if wrong:
        pytest.fail(f"{provider} is wrong: {describe_errors(wrong)}")
    call = measure.cycle(batches, run)

    def finished() -> None:
        call()
        measure.synchronize(DEVICE)

    return finished


@pytest.fixture
def group(case: Case, mode: Mode, pytestconfig: pytest.Config) -> str:
    """The title that the providers of one comparison share."""
    return f"{case.name}, {mode}, batch {case.inputs[0][0]}, {pytestconfig.getoption('--bench-dtype')}"


@functools.lru_cache(maxsize=1)
def _workload(case: Case, setting: Setting) -> Workload:
    """Of the last case: its providers come one after the other."""
    return make_workload(case, setting)
