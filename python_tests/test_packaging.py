"""What a user gets: sdist and wheel contents, the import, its errors, and how the build decides."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import time
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch

import plora_ext
from plora_ext import libraries
from plora_ext.variables import WAITING, others_work

SOURCES = ["benchmarks", "build_backend", "cmake", "configs", "csrc", "docs", "plora_ext", "python_tests", "tools"]
INSTALLED = Path(plora_ext.__file__).parent
NATIVE = pytest.mark.skipif(libraries.backend() == "reference", reason="PLORA_BACKEND=reference loads no library")


def run(*command: str | Path, **environment: str | None) -> subprocess.CompletedProcess[str]:
    """Runs a command outside the source folder; a None in the environment removes the variable."""
    env = {**os.environ, **{name: value for name, value in environment.items() if value is not None}}
    env = {name: value for name, value in env.items() if environment.get(name, "") is not None}
    return subprocess.run([*map(str, command)], capture_output=True, text=True, env=env, cwd=os.path.sep)


def python(code: str, **environment: str | None) -> subprocess.CompletedProcess[str]:
    return run(sys.executable, "-c", code, **environment)


# --- sdist and wheel --------------------------------------------------------------------------------------------------


@dataclass
class Distributions:
    sdist: Path
    wheel: Path
    log: str
    """What pip printed while it built the wheel from the sdist."""

    def sdist_names(self) -> set[str]:
        with tarfile.open(self.sdist) as archive:
            return {name.partition("/")[2] for name in archive.getnames()}

    def wheel_names(self) -> set[str]:
        with zipfile.ZipFile(self.wheel) as archive:
            return set(archive.namelist())


@pytest.fixture(scope="session")
def distributions(repository: Path, tmp_path_factory: pytest.TempPathFactory) -> Distributions:
    """An sdist of a copy of the sources, and the wheel that pip builds from that sdist, isolated and without CUDA."""
    folder = tmp_path_factory.mktemp("dist")
    source = folder / "source"
    hidden = shutil.ignore_patterns(".*", "build", "dist", "runs", "*.so", "*.egg-info", "__pycache__")
    shutil.copytree(repository, source, ignore=hidden)
    result = run(sys.executable, "-m", "build", "--sdist", "--outdir", folder, source)
    assert result.returncode == 0, result.stdout + result.stderr
    (sdist,) = folder.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        safe = {"filter": "data"} if hasattr(tarfile, "data_filter") else {}  # Debian 12: not there
        archive.extractall(folder / "unpacked", **safe)
    (unpacked,) = (folder / "unpacked").iterdir()
    wheel_command = [sys.executable, "-m", "pip", "wheel", "-v", "--no-deps", "--wheel-dir", folder, unpacked]
    result = run(*wheel_command, PLORA_FORCE_CPU="1", FORCE_CUDA=None, PLORA_TORCH_DIR=None)
    assert result.returncode == 0, result.stdout + result.stderr
    (wheel,) = folder.glob("*.whl")
    return Distributions(sdist, wheel, result.stdout + result.stderr)


@pytest.mark.slow
@pytest.mark.timeout(900)
class TestDistributions:
    def test_sdist_holds_every_source(self, distributions: Distributions, repository: Path) -> None:
        names = distributions.sdist_names()
        for folder in SOURCES:
            paths = [path for path in (repository / folder).rglob("*") if path.is_file()]
            paths = [path for path in paths if path.suffix not in (".so", ".pyc")]
            assert {path.relative_to(repository).as_posix() for path in paths} <= names
        assert {"CMakeLists.txt", "setup.py", "pyproject.toml", "README.md", "LICENSE"} <= names
        assert not [name for name in names if name.endswith((".so", ".pyc"))]

    def test_wheel_holds_the_package_and_nothing_else(self, distributions: Distributions) -> None:
        names = distributions.wheel_names()
        tops = {name.partition("/")[0] for name in names}
        assert tops == {"plora_ext", f"plora_ext-{plora_ext.__version__}.dist-info"}
        assert {"plora_ext/lib/libplora_cpu.so", "plora_ext/py.typed", "plora_ext/data/icon100.npz"} <= names
        assert "plora_ext/lib/libplora_cuda.so" not in names  # switched off for this build
        assert len([name for name in names if name.startswith("plora_ext/_C.") and name.endswith(".so")]) == 1
        assert not [name for name in names if "test" in name or name.endswith((".cpp", ".cu", ".h", ".in"))]

    def test_wheel_and_source_have_the_same_modules(self, distributions: Distributions, repository: Path) -> None:
        modules = {path.relative_to(repository).as_posix() for path in (repository / "plora_ext").rglob("*.py")}
        assert modules == {name for name in distributions.wheel_names() if name.endswith(".py")}

    def test_wheel_metadata(self, distributions: Distributions) -> None:
        with zipfile.ZipFile(distributions.wheel) as archive:
            (name,) = (name for name in archive.namelist() if name.endswith("/METADATA"))
            metadata = archive.read(name).decode()
        assert f"\nVersion: {plora_ext.__version__}\n" in metadata
        assert "\nLicense-Expression: Apache-2.0\n" in metadata
        assert "\nRequires-Python: >=3.10\n" in metadata
        assert "\nRequires-Dist: torch>=2.10\n" in metadata

    def test_build_says_what_and_why_and_fetches_no_second_torch(self, distributions: Distributions) -> None:
        (line,) = re.findall(r"-- (plora_ext .*: building .*)", distributions.log)
        assert "the CPU library" in line and f"torch {torch.__version__}" in line
        assert line.endswith("no CUDA because PLORA_FORCE_CPU=1")
        assert not re.search(r"(Collecting|Downloading|Using cached) torch\b", distributions.log)


# --- the import -------------------------------------------------------------------------------------------------------

IMPORT = """
import sys, time, torch
start = time.perf_counter()
import plora_ext
seconds = time.perf_counter() - start
assert not torch.cuda.is_initialized(), "import initialised CUDA"
late = {"timm", "torchvision", "matplotlib", "rich", "yaml", "peft", "transformers"} & set(sys.modules)
assert not late, f"import loaded {sorted(late)}"
print(seconds)
"""


def test_import_is_quick_and_does_not_initialise_cuda() -> None:
    seconds = []
    for _ in range(5):  # the quickest counts: another process may have had the cores
        result = python(IMPORT)
        assert result.returncode == 0, result.stderr
        seconds.append(float(result.stdout))
        if seconds[-1] < 0.3:
            break
        time.sleep(1)
    assert min(seconds) < 0.3, f"import plora_ext took {seconds} s beyond torch"


def test_subpackages_load_when_named() -> None:
    result = python("import plora_ext; print(plora_ext.nn.__name__, plora_ext.cil.__name__, 'ops' in dir(plora_ext))")
    assert result.stdout.split() == ["plora_ext.nn", "plora_ext.cil", "True"], result.stderr
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = plora_ext.nothing


@NATIVE
def test_has_kernel() -> None:
    assert libraries.has_kernel("class_sums", "cpu")
    assert libraries.has_kernel("class_sums", "cuda") == ("cuda" in libraries.loaded)
    assert not libraries.has_kernel("class_sums", "privateuseone")
    assert not libraries.has_kernel("no_such_operator", "cpu")


def test_every_library_is_loaded_or_explained() -> None:
    assert set(libraries.loaded) | set(libraries.missing) == {"cpu", "cuda"}
    assert not set(libraries.loaded) & set(libraries.missing)
    assert all(libraries.missing.values())


def test_reference_backend_loads_no_library_and_computes() -> None:
    code = (
        "import torch, plora_ext; from plora_ext import libraries, ops\n"
        "assert libraries.backend() == 'reference' and not libraries.loaded\n"
        "sums, counts = ops.class_sums(torch.ones(3, 2), torch.tensor([0, 2, 2]), 3)\n"
        "print(sums.tolist(), counts.tolist())"
    )
    result = python(code, PLORA_BACKEND="reference")
    assert result.stdout.strip() == "[[1.0, 1.0], [0.0, 0.0], [2.0, 2.0]] [1, 0, 2]", result.stderr


# --- the environment --------------------------------------------------------------------------------------------------

WRONG = {
    "PLORA_BACKEND": "must be 'native' or 'reference'",
    "PLORA_CPU_BASE": "must be 'own' or 'torch'",
    "PLORA_CPU_ISA": "must be 'default', 'avx2', 'avx512' or 'amx'",
    "PLORA_CUDA_PATH": "must be 'auto' or 'mma'",
}
COMMANDS = ([sys.executable, "-m", "plora_ext"], [str(Path(sys.executable).with_name("plora-ext"))])


def test_a_wrong_value_is_one_line() -> None:
    for name, problem in WRONG.items():
        message = f"{name} {problem}, got 'fast '"
        assert python("import plora_ext", **{name: "fast "}).stderr.strip().endswith(f"ValueError: {message}")
        result = run(*COMMANDS[0], "train", **{name: "fast "})
        assert (result.returncode, result.stderr) == (2, f"error: {message}\n")
    for command in ([*COMMANDS[0], "info"], [sys.executable, "-m", "plora_ext.info"]):
        result = run(*command, **dict.fromkeys(WRONG, "fast "))
        assert result.returncode == 0 and not result.stderr
        for name, problem in WRONG.items():
            assert re.search(rf"^{name} +ignored: {name} {problem}, got 'fast '$", result.stdout, re.M)
    assert python("import plora_ext", **dict.fromkeys(WRONG, "")).returncode == 0


def test_an_unknown_variable_is_one_line() -> None:
    message = "unknown environment variable PLORA_BAKEND: did you mean PLORA_BACKEND?"
    result = python("import plora_ext", PLORA_BAKEND="reference")
    assert result.returncode == 0 and f"UserWarning: {message}" in result.stderr
    assert run(*COMMANDS[0], "report", PLORA_BAKEND="reference").stderr.startswith(f"warning: {message}\n")
    text = run(*COMMANDS[0], "info", PLORA_BAKEND="no", PLORA_CPU_ISA="avx2").stdout
    assert re.search(r"^PLORA_BAKEND +no \(unknown variable: did you mean PLORA_BACKEND\?\)$", text, re.M)
    assert re.search(r"^PLORA_CPU_ISA +avx2$", text, re.M)


@contextmanager
def neighbour(cores: set[int]) -> Iterator[None]:
    """A process that keeps one of these cores busy."""
    with subprocess.Popen(
        [sys.executable, "-c", "print(flush=True)\nwhile True: pass"], stdout=subprocess.PIPE
    ) as busy:
        os.sched_setaffinity(busy.pid, cores)
        assert busy.stdout and busy.stdout.readline()
        try:
            yield
        finally:
            busy.kill()


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="a core is asked for")
@pytest.mark.parametrize(
    "command, chosen",
    [
        (0, {}),
        (1, {}),
        (0, {"OMP_WAIT_POLICY": "active"}),
        (0, {"GOMP_SPINCOUNT": "1000"}),
        (0, {"KMP_BLOCKTIME": "0"}),
    ],
    ids=str,
)
def test_threads_of_the_command_sleep_beside_a_busy_process(command: int, chosen: dict[str, str]) -> None:
    """Before torch loads the OpenMP runtime, which shows what it has read; the user's choice stands."""
    if not Path(COMMANDS[command][0]).is_file():
        pytest.skip("the package is not installed as a command")
    clean = dict.fromkeys((*WAITING, "OMP_NUM_THREADS"))
    with neighbour(set(list(os.sched_getaffinity(0))[:1])):
        result = run(*COMMANDS[command], "train", "--print-config", **{**clean, **chosen, "OMP_DISPLAY_ENV": "verbose"})
    assert result.returncode == 0, result.stderr
    assert ("note: other processes keep a core busy" in result.stderr) == (not chosen)
    if spins := re.search(r"GOMP_SPINCOUNT = '(\d+)'", result.stderr):
        assert (spins[1] == "0") == (not chosen)


@pytest.mark.parametrize("busy, expected", [(0, False), (4, False), (6, True)])
def test_a_core_at_work_for_others(busy: int, expected: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ten ticks of two cores, one of which waits for a disk; core 2 is not this process's."""

    def ticks(of_core: int) -> str:
        rows = [[5, 0, of_core, 10 - of_core, 0, 0, 0, 0, 0, 0], [0, 0, 0, 1, 9 * (of_core > 0), 0, 0, 0, 0, 0],
                [of_core * 99, 0, 0, 0, 0, 0, 0, 0, 0, 0]]  # fmt: skip
        return "".join(f"cpu{i} {' '.join(map(str, row))}\n" for i, row in enumerate(rows)) + "intr 5\n"

    stat = tmp_path / "stat"
    stat.write_text("cpu0 5 0 0 0 0 0 0 0 0 0\ncpu1 0 0 0 0 0 0 0 0 0 0\ncpu2 0 0 0 0 0 0 0 0 0 0\n")
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1}, raising=False)
    monkeypatch.setattr(time, "sleep", lambda _: stat.write_text(ticks(busy)))
    assert others_work(0.1, str(stat)) is expected
    assert not others_work(0.1, str(tmp_path / "none"))
    stat.write_text("cpu0\n")
    assert not others_work(0.1, str(stat))


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="cores are asked for")
def test_a_busy_process_takes_half_of_the_rate_at_most(tmp_path: Path) -> None:
    """Of a run on two cores, when it is there from the start."""
    cores = set(sorted(os.sched_getaffinity(0))[:2])
    if len(cores) < 2:
        pytest.skip("one core")
    rng = np.random.default_rng(0)
    images, labels = rng.integers(0, 256, (640, 48, 48, 3), dtype=np.uint8), np.arange(640) % 10
    test = {"test_images": images[:10], "test_labels": labels[:10]}
    np.savez(tmp_path / "data.npz", train_images=images, train_labels=labels, **test)
    options = f"--method lora-sequential --data {tmp_path}/data.npz --epochs 1 --device cpu --out {tmp_path}"

    def rate() -> float:
        clean = {name: v for name, v in os.environ.items() if name not in (*WAITING, "OMP_NUM_THREADS")}
        command = [sys.executable, "-m", "plora_ext", "train", *options.split(), "--overwrite"]
        with subprocess.Popen(command, env=clean, stdout=subprocess.DEVNULL, cwd="/") as process:
            os.sched_setaffinity(process.pid, cores)
            assert process.wait() == 0
        run = json.loads((tmp_path / "metrics.json").read_text())["runs"][0]
        return len(images) / float(run["seconds"]["train"])

    if others_work():
        pytest.skip("the machine is busy already")
    calm, busy = rate(), 0.0
    for _ in range(3):  # something else may have had the cores once
        if busy <= calm / 2:
            with neighbour(cores):
                busy = rate()
    if others_work():
        pytest.skip("the machine became busy")
    print(f"{calm:.0f} images/s alone, {busy:.0f} beside a busy process")
    assert busy > calm / 2


def test_an_import_leaves_the_environment_alone(tmp_path: Path) -> None:
    script = tmp_path / "train.py"
    script.write_text("import os\nbefore = dict(os.environ)\nimport plora_ext\nassert dict(os.environ) == before\n")
    for command in ([script, "info"], ["-c", script.read_text(), "plora_ext"]):
        result = run(sys.executable, *command, OMP_WAIT_POLICY=None, GOMP_SPINCOUNT=None, KMP_BLOCKTIME=None)
        assert result.returncode == 0, result.stderr


@pytest.fixture
def copied_package(tmp_path: Path) -> Path:
    """The installed package without its data, in a folder that can be broken."""
    package = tmp_path / "plora_ext"
    shutil.copytree(INSTALLED, package, ignore=shutil.ignore_patterns("data", "__pycache__", "*.npz"))
    return package


@pytest.mark.parametrize(
    "driver, nvcc, loads",
    [(12080, "13.0.88", False), (13000, "13.0.88", True), (12040, "12.8.1", True), (0, "13.0", True)],
)
def test_library_for_a_newer_driver_is_left_out(
    driver: int, nvcc: str, loads: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It would import and then fail at every call; so operators take their twin, and `info` says why."""
    (tmp_path / "libplora_cuda.so").touch()
    asked: list[str] = []
    for name, value in {
        "FOLDER": tmp_path,
        "loaded": {},
        "missing": {},
        "_kernels": {},
        "_load": asked.append,
        "build_info": lambda: {"nvcc": nvcc},
        "_driver_version": lambda: driver,
    }.items():
        monkeypatch.setattr(libraries, name, value)
    monkeypatch.setattr(torch.version, "cuda", "12.8")
    monkeypatch.delenv("PLORA_BACKEND", raising=False)
    libraries.load()
    assert asked == ["cpu", "cuda"][: 1 + loads]
    if not loads:
        assert libraries.missing["cuda"].startswith("built with CUDA 13.0.88, but this driver serves CUDA 12.8: update")


@pytest.mark.skipif(shutil.which("cc") is None, reason="needs a C compiler")
def test_driver_is_asked_for_its_version(tmp_path: Path) -> None:
    source = tmp_path / "driver.c"
    source.write_text("int cuDriverGetVersion(int *version) { *version = 12040; return 0; }")
    assert run("cc", "-shared", "-fPIC", source, "-o", tmp_path / "libcuda.so.1").returncode == 0
    code = "from plora_ext import libraries; print(libraries._driver_version())"
    assert python(code, LD_LIBRARY_PATH=str(tmp_path)).stdout == "12040\n"


@NATIVE
def test_library_that_does_not_load_is_one_clear_error(copied_package: Path) -> None:
    library = copied_package / "lib" / "libplora_cpu.so"
    library.unlink()
    library.write_bytes(b"not a library")
    result = python("import plora_ext", PYTHONPATH=str(copied_package.parent), PLORA_BACKEND=None)
    error = result.stderr.strip().splitlines()[-1]
    built = libraries.build_info()
    assert built is not None
    assert error.startswith(f"ImportError: {library} does not load")
    assert f"built with torch {built['torch']}" in error
    assert f"running are torch {torch.__version__}" in error
    assert libraries.REINSTALL in error and "PLORA_BACKEND=reference" in error

    result = python(
        "import plora_ext; print('works')", PYTHONPATH=str(copied_package.parent), PLORA_BACKEND="reference"
    )
    assert result.stdout.strip() == "works", result.stderr


@NATIVE
def test_source_folder_without_libraries_is_one_clear_error(copied_package: Path) -> None:
    shutil.rmtree(copied_package / "lib")
    result = python("import plora_ext", PYTHONPATH=str(copied_package.parent), PLORA_BACKEND=None)
    error = result.stderr.strip().splitlines()[-1]
    assert error.startswith(f"ImportError: plora_ext at {copied_package} has no compiled library libplora_cpu.so")
    assert "pip install" in error


# --- the libraries ----------------------------------------------------------------------------------------------------


@NATIVE
@pytest.mark.skipif(shutil.which("readelf") is None, reason="needs readelf")
@pytest.mark.parametrize("name", ["cpu", "cuda"])
def test_library_names_torch_and_carries_no_path(name: str) -> None:
    library = INSTALLED / "lib" / f"libplora_{name}.so"
    if not library.is_file():
        pytest.skip(libraries.missing[name])
    text = run("readelf", "-d", library).stdout
    needed = set(re.findall(r"NEEDED.*\[(.+?)\]", text))
    assert {"libtorch_cpu.so", "libc10.so"} <= needed
    assert ("libtorch_cuda.so" in needed) == (name == "cuda")
    assert not [entry for entry in needed if entry.startswith(("libtorch_python", "libpython", "libcudart"))]
    assert "RPATH" not in text and "RUNPATH" not in text


@NATIVE
@pytest.mark.skipif(shutil.which("nm") is None, reason="needs nm")
@pytest.mark.parametrize("name", ["cpu", "cuda"])
def test_library_uses_only_the_stable_interface(name: str) -> None:
    """Torch's C++ symbols change from release to release; the stable interface is a set of C functions."""
    library = INSTALLED / "lib" / f"libplora_{name}.so"
    if not library.is_file():
        pytest.skip(libraries.missing[name])
    undefined = run("nm", "-D", "--undefined-only", library).stdout.split()
    unstable = [symbol for symbol in undefined if re.match(r"_ZNK?(2at|3c10|5torch)", symbol)]
    assert not unstable


@NATIVE
@pytest.mark.skipif(shutil.which("nm") is None, reason="needs nm")
def test_libraries_export_nothing_of_the_cpp_runtime() -> None:
    """Operators register themselves; whatever else is visible could be taken for another library's."""
    for library in INSTALLED.rglob("*.so"):
        exported = [line.split()[-1] for line in run("nm", "-D", "--defined-only", library).stdout.splitlines()]
        assert not [name for name in exported if not re.fullmatch(r"PyInit__C", name)], library


ERRORS = {
    "class_sums(ones(3, 2), ids(0, 1, 7), 3)": "labels must be between -1 and 2, got 7 at position 2",
    "class_sums(ones(3, 2), ids(0, 1, 2).int(), 3)": "class_sums: labels must be Long, got Int",
    "class_sums(ones(3, 2).int(), ids(0, 1, 2), 3)": "class_sums: the dtype must be float32, bfloat16, .*, got Int",
    "class_sums(ones(3, 2), ids(0, 1, 2), 2**50)": "can't allocate memory",  # made by torch's headers
    "lora_merge(ones(4, 3), ones(2, 1, 5), ones(2, 4, 1), ones(2), None)": r"shape \[2, 1, 3\], got \[2, 1, 5\]",
    "lora_indexed_(ones(2, 4), ones(2, 3), ids(0, 9), ones(2, 1, 3), ones(2, 4, 1), ones(2), *[None] * 3, False)": (
        "lora_indexed_: ids must be between -1 and 1, got 9 at position 1"
    ),
    "reconstruct_prototypes(ones(1, 2), ones(1, 2), ones(1, 2), -0.5, True, False)": "tau must be positive, got -0.5",
}


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("shared", ["ON", "OFF"])
def test_errors_with_a_static_cpp_runtime(distributions: Distributions, shared: str) -> None:
    """Toolchains that link libstdc++ statically: the shared one is named first, or none of the static one shows."""
    cmake = shutil.which("cmake")
    if cmake is None or run("g++", "-print-file-name=libstdc++.a").stdout.strip() == "libstdc++.a":
        pytest.skip("needs cmake and a static libstdc++")
    (folder,) = distributions.wheel.parent.glob("unpacked/*/build/cmake-*")  # its objects only need to be linked
    settings = ["-DPLORA_PYTHON=OFF", "-DPLORA_CUDA=OFF", "-DCMAKE_SHARED_LINKER_FLAGS=-static-libstdc++"]
    settings += [f"-DCMAKE_MAKE_PROGRAM={ninja}"] if (ninja := shutil.which("ninja")) else []
    settings += [f"-DPLORA_SHARED_LIBSTDCXX={shared}", "-S", str(folder.parents[1]), "-B", str(folder)]
    for command in (settings, ["--build", folder]):
        result = run(cmake, *command)
        assert result.returncode == 0, result.stdout + result.stderr
    assert not run("nm", "-D", "--defined-only", folder / "libplora_cpu.so").stdout
    for call, message in ERRORS.items():
        code = (
            "import torch; from torch import ones\n"
            f"torch.ops.load_library({str(folder / 'libplora_cpu.so')!r})\n"
            "ids = lambda *values: torch.tensor(values)\n"
            f"try: torch.ops.plora_ext.{call}\n"
            "except RuntimeError as error: print(error)"
        )
        result = python(code)
        assert result.returncode == 0 and re.search(message, result.stdout), (call, result.stdout, result.stderr)


def test_info_names_versions_libraries_and_processor() -> None:
    result = run(sys.executable, "-m", "plora_ext.info")
    assert result.returncode == 0, result.stderr
    facts = dict(re.findall(r"^(.{15}\S?)\s+(.*)$", result.stdout, re.M))
    facts = {name.strip(): text for name, text in facts.items()}
    assert facts["plora_ext"] == plora_ext.__version__
    assert facts["torch"] == torch.__version__
    assert facts["backend"] == libraries.backend()
    for name in ("cpu", "cuda"):
        assert facts[f"{name} library"] == (libraries.loaded.get(name) or f"not loaded: {libraries.missing[name]}")
    assert {"python", "timm", "numpy", "built", "cpu features", "cpu kernels", "gpu kernels"} <= set(facts)


# --- the build's decisions --------------------------------------------------------------------------------------------


def configure(repository: Path, folder: Path, *settings: str, **environment: str | None) -> str:
    """CMake's output for a configuration with these settings."""
    cmake = shutil.which("cmake")
    if cmake is None:
        pytest.skip("needs cmake")
    torch_folder = f"-DPLORA_TORCH_DIR={Path(torch.__file__).parent}"
    clean = {"FORCE_CUDA": None, "PLORA_FORCE_CPU": None, "TORCH_CUDA_ARCH_LIST": None, "CUDA_HOME": None}
    result = run(cmake, "-S", repository, "-B", folder, torch_folder, *settings, **{**clean, **environment})
    return re.sub(r"\s+", " ", result.stdout + result.stderr)  # CMake wraps its messages


@pytest.fixture
def no_nvcc() -> str:
    """A CMake setting that hides the folders in which nvcc lies on this machine."""
    folders = [*os.environ["PATH"].split(os.pathsep), "/usr/local/cuda/bin"]
    return "-DCMAKE_IGNORE_PATH=" + ";".join(folder for folder in folders if Path(folder, "nvcc").exists())


def test_without_nvcc_the_cpu_library_is_built(repository: Path, tmp_path: Path, no_nvcc: str) -> None:
    text = configure(repository, tmp_path, no_nvcc)
    assert "no CUDA because nvcc was not found" in text


def test_force_cuda_without_nvcc_is_one_clear_error(repository: Path, tmp_path: Path, no_nvcc: str) -> None:
    text = configure(repository, tmp_path, no_nvcc, FORCE_CUDA="1")
    assert "FORCE_CUDA=1 asks for the CUDA library, but nvcc was not found" in text
    assert "set PLORA_FORCE_CPU=1" in text


@pytest.mark.parametrize("name, value", [("FORCE_CUDA", "0"), ("PLORA_FORCE_CPU", "1")])
def test_cuda_can_be_switched_off(repository: Path, tmp_path: Path, name: str, value: str) -> None:
    assert f"no CUDA because {name}={value}" in configure(repository, tmp_path, **{name: value})


@pytest.fixture
def nvcc(tmp_path: Path) -> Path:
    """The folder of a toolkit whose nvcc hands everything to the real one, of this machine."""
    real = shutil.which("nvcc") or "/usr/local/cuda/bin/nvcc"
    if not Path(real).is_file():
        pytest.skip("needs nvcc")
    tool = tmp_path / "toolkit" / "bin" / "nvcc"
    tool.parent.mkdir(parents=True)
    tool.write_text(f'#!/bin/sh\nexec {real} "$@"\n')
    tool.chmod(0o755)
    return tool


@pytest.mark.parametrize(
    "archs, targets, changes",
    [
        ("7.5 8.0 8.6 9.0 10.0 12.0+PTX", "sm_80 sm_86 sm_90a sm_100 sm_120 compute_120", ["7.5", "9.0"]),  # NGC's
        ("9.0", "sm_90a", ["9.0"]),
        ("9.0a;9.0+PTX", "sm_90a compute_90", ["9.0+PTX"]),
        ("8.0+PTX", "sm_80 compute_80", []),
    ],
)
@pytest.mark.usefixtures("nvcc")
def test_gpu_lists_of_other_software(
    repository: Path, tmp_path: Path, archs: str, targets: str, changes: list[str]
) -> None:
    text = configure(repository, tmp_path / "build", TORCH_CUDA_ARCH_LIST=archs)
    assert f"; {targets})" in text
    assert [name for name in archs.split() if f"{name} of TORCH_CUDA_ARCH_LIST is left out" in text] == changes[:-1]
    assert re.findall(r"(\S+) of TORCH_CUDA_ARCH_LIST is taken for 9.0a", text)[:1] == changes[-1:]


@pytest.mark.usefixtures("nvcc")
def test_gpus_that_are_all_too_old(repository: Path, tmp_path: Path) -> None:
    reason = "TORCH_CUDA_ARCH_LIST='7.0 7.5' names no GPU of compute capability 8.0 or newer"
    assert f"no CUDA because {reason}" in configure(repository, tmp_path / "1", TORCH_CUDA_ARCH_LIST="7.0 7.5")
    text = configure(repository, tmp_path / "2", TORCH_CUDA_ARCH_LIST="7.0 7.5", FORCE_CUDA="1")
    assert f"FORCE_CUDA=1 asks for the CUDA library, but {reason}" in text
    assert "no CUDA because PLORA_FORCE_CPU=1" in configure(
        repository, tmp_path / "3", TORCH_CUDA_ARCH_LIST="Turing", PLORA_FORCE_CPU="1"
    )


def test_another_nvcc_in_the_same_folder_is_an_error(repository: Path, tmp_path: Path, nvcc: Path) -> None:
    folder = tmp_path / "build"
    assert "CUDA because" in configure(repository, folder)
    text = configure(repository, folder, CUDA_HOME=str(nvcc.parents[1]))
    assert "This build folder was made with another nvcc" in text and f"{nvcc} " in text


def test_nvcc_newer_than_torchs_cuda_is_warned_of(repository: Path, tmp_path: Path, nvcc: Path) -> None:
    """A torch folder that says CUDA 11, older than any nvcc that is taken."""
    folder = tmp_path / "torch"
    folder.mkdir()
    for name in ("include", "lib"):
        (folder / name).symlink_to(Path(torch.__file__).parent / name)
    for cuda, warned in (("11.8", True), ("99.0", False)):
        (folder / "version.py").write_text(f"__version__ = '2.14.1'\ncuda: Optional[str] = '{cuda}'\n")
        text = configure(repository, tmp_path / cuda, f"-DPLORA_TORCH_DIR={folder}")
        assert "CUDA because" in text
        assert (f"torch of CUDA {cuda}. A driver of CUDA 11 cannot run what is built now" in text) == warned


def test_missing_torch_folder_is_one_clear_error(repository: Path, tmp_path: Path) -> None:
    text = configure(repository, tmp_path, "-DPLORA_TORCH_DIR=/nowhere")
    assert "PLORA_TORCH_DIR must be the folder of an installed torch 2.10 or newer" in text
    assert "got '/nowhere'" in text


@pytest.fixture
def toolchain(repository: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(repository / "build_backend"))
    import plora_toolchain

    return plora_toolchain


def test_build_requires_torch_only_where_it_is_missing(toolchain: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    import plora_build

    assert not [name for name in plora_build._requirements() if name.startswith("torch")]
    monkeypatch.setattr(toolchain, "torch_folders", lambda: [])
    assert "torch>=2.10" in plora_build._requirements()


def test_old_torch_does_not_count(toolchain: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PLORA_TORCH_DIR", str(tmp_path))
    (tmp_path / "version.py").write_text("__version__ = '2.9.1+cpu'\n")
    assert toolchain.find_torch() is None
    (tmp_path / "version.py").write_text("__version__ = '2.10.0'\n")
    assert toolchain.find_torch() == tmp_path


def test_compilers_of_the_environment(toolchain: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a build folder remembers, to be dropped when it changes: paths and versions."""
    before = toolchain.compilers()
    assert before == toolchain.compilers()
    for variable, name in (("CXX", "g++-new"), ("CUDA_HOME", "bin/nvcc")):
        tool = tmp_path / name
        tool.parent.mkdir(exist_ok=True)
        tool.write_text("#!/bin/sh\necho 1.0\n")
        tool.chmod(0o755)
        monkeypatch.setenv(variable, str(tool if variable == "CXX" else tmp_path))
        first = toolchain.compilers()
        tool.write_text("#!/bin/sh\necho 2.0\n")  # an upgrade in place
        assert len({before, first, toolchain.compilers()}) == 3
        monkeypatch.delenv(variable)


def test_jobs(toolchain: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MAX_JOBS", "3")
    assert toolchain.jobs() == 3
    monkeypatch.setenv("MAX_JOBS", "many")
    with pytest.raises(SystemExit, match="MAX_JOBS must be a positive number, got 'many'"):
        toolchain.jobs()
    monkeypatch.delenv("MAX_JOBS")
    assert 1 <= toolchain.jobs() <= (os.cpu_count() or 1)
