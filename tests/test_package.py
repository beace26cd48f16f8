"""The package as an import: light, lazy, typed, and without side effects."""

import ast
import json
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path
from typing import Any

import pytest

import gendiff

ROOT = Path(__file__).parents[1]
HEAVY = ["accelerate", "diffusers", "matplotlib", "peft", "transformers"]
SUBMODULES = [
    "attention",
    "data",
    "guidance",
    "interop",
    "lora",
    "math",
    "objectives",
    "plot",
    "random",
    "sampling",
    "testing",
    "training",
]
LOADS = ["EMA", "ParamGroup", "TrainConfig", "Trainer", "WarmupCosine", "plot", "testing", "training"]  # much
NAMES = [
    "Codec",
    "Condition",
    "Denoised",
    "Denoiser",
    "Draw",
    "EMA",
    "Guider",
    "LossTerms",
    "Objective",
    "ParamGroup",
    "Rng",
    "TrainConfig",
    "Trainer",
    "WarmupCosine",
    "cfg",
    "iterate",
    "sample",
]
TOUCH = f"for name in {sorted({*NAMES, *SUBMODULES} - {*LOADS})}:\n    getattr(gendiff, name)\n"


def fresh(code: str) -> Any:
    """What `code` prints as JSON, run in an interpreter that has imported nothing."""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_public_names() -> None:
    """A change of this list is a change of the public surface, for the changelog."""
    assert sorted(gendiff.__all__) == sorted([*NAMES, *SUBMODULES])
    assert set(gendiff.__all__) <= set(dir(gendiff))


@pytest.mark.parametrize("name", NAMES)
def test_every_name_resolves_to_itself(name: str) -> None:
    assert getattr(gendiff, name).__name__ == name


@pytest.mark.parametrize("name", SUBMODULES)
def test_every_submodule_resolves_to_itself(name: str) -> None:
    assert getattr(gendiff, name) is sys.modules[f"gendiff.{name}"]


def test_the_typing_block_and_the_table_agree() -> None:
    """What a type checker reads and what `__getattr__` does are written down twice."""
    tree = ast.parse(Path(gendiff.__file__).read_text())
    block = next(node for node in tree.body if isinstance(node, ast.If))
    imports = [node for node in block.body if isinstance(node, ast.ImportFrom)]
    pairs = [(alias, node.module) for node in imports for alias in node.names]
    homes = {alias.name: f"gendiff.{alias.name}" if home == "gendiff" else home for alias, home in pairs}
    assert homes == gendiff._HOME
    assert all(alias.asname == alias.name for alias, _ in pairs), "only `X as X` is a re-export"


def test_an_unknown_name_is_an_error_with_the_nearest() -> None:
    with pytest.raises(AttributeError, match=r"attribute of gendiff 'smaple'; did you mean 'sample'\?"):
        gendiff.smaple  # noqa: B018
    assert not hasattr(gendiff, "Trainee")


def test_version_is_the_one_of_pyproject() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert gendiff.__version__ == project["version"]


@pytest.mark.parametrize("touch", ["", TOUCH], ids=["import", "every name"])
def test_nothing_heavy_is_loaded(touch: str) -> None:
    code = f"import json, sys, gendiff\n{touch}print(json.dumps(sorted(sys.modules)))"
    modules = fresh(code)
    assert "gendiff" in modules
    assert not set(HEAVY) & set(modules)


def test_import_costs_little_more_than_torch() -> None:
    """At most 0.3 s after torch: `import gendiff` by the clock, every public name by processor time.

    A busy machine can triple the time that loading every module takes by the clock. Processor time does not
    see the neighbours, nor would it see a module that waits; the import itself is short enough for the clock.
    """
    code = (
        "import json, time, torch\nstart, cpu = time.perf_counter(), time.process_time()\nimport gendiff\n"
        f"clock = time.perf_counter() - start\n{TOUCH}"
        "print(json.dumps([clock, time.process_time() - cpu]))"
    )
    runs = [fresh(code) for _ in range(3)]
    clock, processor = map(min, zip(*runs, strict=True))
    assert clock <= 0.3, runs
    assert processor <= 0.3, runs


def test_import_changes_nothing_global() -> None:
    before, after = fresh(
        f"""
import json, logging, os, random, signal, sys, warnings
import numpy, torch

def state():
    loggers = [logging.getLogger(), *map(logging.getLogger, sorted(logging.root.manager.loggerDict))]
    return dict(
        environment=dict(os.environ),
        path=sys.path,
        hooks=[repr(sys.excepthook), repr(sys.displayhook), repr(sys.meta_path), repr(sys.path_hooks)],
        signals=[repr(signal.getsignal(s)) for s in (signal.SIGINT, signal.SIGTERM)],
        log_handlers=[repr(h) for log in loggers for h in log.handlers],
        log_levels=[logging.root.level, logging.root.manager.disable],
        warning_filters=repr(warnings.filters),
        random=hash(random.getstate()),
        numpy=repr(numpy.random.get_state()),
        torch_rng=torch.get_rng_state().tolist(),
        torch_default=[repr(torch.get_default_dtype()), repr(torch.get_default_device())],
        threads=[torch.get_num_threads(), torch.get_num_interop_threads()],
        grad=torch.is_grad_enabled(),
        deterministic=torch.are_deterministic_algorithms_enabled(),
        matmul=torch.get_float32_matmul_precision(),
        tf32=[torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32],
        cudnn=[torch.backends.cudnn.benchmark, torch.backends.cudnn.deterministic],
        attention=[torch.backends.cuda.flash_sdp_enabled(), torch.backends.cuda.math_sdp_enabled()],
        process_group=torch.distributed.is_available() and torch.distributed.is_initialized(),
        cuda=torch.cuda.is_initialized(),
    )

before = state()
import gendiff
{TOUCH}
print(json.dumps([before, state()]))
"""
    )
    assert after == before


def test_types_are_checked_in_tests_of_every_module_but_attention() -> None:
    """As pyproject.toml lists them for jaxtyping, which a new one must be added to."""
    options = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["pytest"]["ini_options"]["addopts"]
    (listed,) = (option for option in options if option.startswith("--jaxtyping-packages="))
    names = listed.removeprefix("--jaxtyping-packages=").split(",")[:-1]
    found = {f"gendiff.{path.stem}" for path in (ROOT / "src/gendiff").iterdir() if path.name[:2] != "__"}
    assert set(names) == found - {"gendiff.attention", "gendiff.py"}


def test_the_mathematics_imports_torch_jaxtyping_and_the_standard_library_only() -> None:
    """The positive form of the import contract: a list of forbidden packages cannot be complete."""
    accepted = {"gendiff", "jaxtyping", "torch", *sys.stdlib_module_names}
    files = sorted((ROOT / "src/gendiff/math").rglob("*.py"))
    assert files
    for file in files:
        for node in ast.walk(ast.parse(file.read_text())):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) and node.level == 0 else []
            assert {name.split(".")[0] for name in names} <= accepted, f"{file}:{getattr(node, 'lineno', 0)}"


def test_the_wheel_ships_the_typed_marker_and_nothing_but_the_package(tmp_path: Path) -> None:
    build = [sys.executable, "-m", "hatchling", "build", "--target", "wheel", "--directory", str(tmp_path)]
    done = subprocess.run(build, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    (wheel,) = tmp_path.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert "gendiff/py.typed" in names
    assert any(name.endswith("licenses/LICENSE") for name in names)
    assert {name.split("/")[0] for name in names} == {"gendiff", names[-1].split("/")[0]}
    sources = {str(p.relative_to(ROOT / "src")) for p in (ROOT / "src/gendiff").rglob("*.py")}
    assert {name for name in names if name.endswith(".py")} == sources
