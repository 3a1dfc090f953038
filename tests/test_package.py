"""The package as users get it: what a wheel holds, what importing costs, what the documents say."""

from __future__ import annotations

import configparser
import doctest
import importlib
import json
import pkgutil
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from types import ModuleType

import pytest

import equireg

OPTIONAL = {"itk", "SimpleITK", "matplotlib", "tensorboard", "tqdm", "onnx", "onnxruntime"}
MODULES = ["equireg", *sorted(m.name for m in pkgutil.walk_packages(equireg.__path__, "equireg."))]


def run_python(code: str, *options: str, cwd: Path) -> str:
    """Run code in a fresh interpreter and return what it prints."""
    done = subprocess.run([sys.executable, *options, "-c", code], cwd=cwd, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.fixture(scope="module")
def wheel(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build the wheel from a copy of the sources, so that nothing is written beside them."""
    copy, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for name in ("setup.cfg", "pyproject.toml", "README.md", "LICENSE"):
        if (root / name).exists():
            shutil.copy(root / name, copy / name)
    shutil.copytree(root / "bundle", copy / "bundle", ignore=shutil.ignore_patterns("docs", "__pycache__", "output"))
    command = [sys.executable, "-m", "pip", "wheel", str(copy), "--no-deps", "--no-build-isolation", "--no-index"]
    done = subprocess.run([*command, "--quiet", "--wheel-dir", str(out)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (path,) = out.glob("*.whl")
    return path


def test_wheel_holds_the_package_and_nothing_else(wheel: Path, root: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    assert {name.split("/")[0] for name in names} == {"equireg", f"equireg-{equireg.__version__}.dist-info"}
    scripts, bundle = root / "bundle" / "scripts", root / "bundle"
    expected = {f"equireg/{p.relative_to(scripts).as_posix()}" for p in scripts.rglob("*.py")} | {"equireg/py.typed"}
    for folder, patterns in {"configs": ("*.json", "*.conf"), "models": ("*.pt",)}.items():
        expected |= {f"equireg/{folder}/{p.name}" for pattern in patterns for p in (bundle / folder).glob(pattern)}
    assert {name for name in names if name.startswith("equireg/")} == expected
    assert any(name.endswith("licenses/LICENSE") for name in names)


def test_wheel_works_where_the_sources_are_not(wheel: Path, tmp_path: Path) -> None:
    zipfile.ZipFile(wheel).extractall(tmp_path)
    code = (
        f"import sys; sys.path.insert(0, {str(tmp_path)!r}); import equireg; from equireg import fields, networks;"
        "print(equireg.__file__, networks.__file__, fields.identity_grid([2]).tolist())"
    )
    package, networks, grid = run_python(code, cwd=tmp_path).split(" ", 2)
    assert package == str(tmp_path / "equireg" / "__init__.py")
    assert networks == str(tmp_path / "equireg" / "networks" / "__init__.py")
    assert grid == "[[[0.0, 1.0]]]"


def test_setup_lists_every_subpackage(root: Path) -> None:
    setup = configparser.ConfigParser()
    setup.read(root / "setup.cfg")
    listed = set(setup["options"]["packages"].split())
    scripts = root / "bundle" / "scripts"
    folders = {path.parent.relative_to(scripts) for path in scripts.rglob("*.py")}
    assert listed == {".".join(["equireg", *f.parts]) for f in folders} | {"equireg.configs", "equireg.models"}


def test_one_version_everywhere(wheel: Path, root: Path) -> None:
    assert wheel.name.startswith(f"equireg-{equireg.__version__}-")
    metadata = root / "bundle" / "configs" / "metadata.json"
    if not metadata.exists():
        pytest.skip("bundle/configs/metadata.json does not exist yet")
    described = json.loads(metadata.read_text(encoding="utf-8"))
    assert described["version"] == equireg.__version__
    assert equireg.__version__ in described["changelog"]


def test_importing_the_package_loads_nothing_heavy(tmp_path: Path) -> None:
    code = "import sys, equireg; dir(equireg); print(sorted({'torch', 'monai', 'numpy', 'nibabel'} & set(sys.modules)))"
    assert run_python(code, cwd=tmp_path) == "[]"


@pytest.mark.parametrize("name", equireg.__all__)
def test_public_names_resolve(name: str) -> None:
    assert name in dir(equireg)
    assert getattr(equireg, name) is getattr(equireg, name)


def test_unknown_names_are_attribute_errors() -> None:
    with pytest.raises(AttributeError, match="no attribute 'no_such_name'"):
        _ = equireg.no_such_name
    with pytest.raises(ImportError, match="no_such_name"):
        exec("from equireg import no_such_name")


def load(name: str) -> ModuleType:
    """Import a module of the package, or skip the test if that takes an optional package that is missing."""
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name in OPTIONAL:
            pytest.skip(f"{name} needs the optional package {error.name}")
        raise


@pytest.mark.parametrize("name", MODULES)
def test_examples_in_docstrings_run(name: str) -> None:
    assert doctest.testmod(load(name), optionflags=doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE).failed == 0


@pytest.mark.parametrize("name", MODULES)
def test_modules_are_documented_and_offer_what_they_list(name: str) -> None:
    module = load(name)
    assert module.__doc__, f"{name} has no docstring"
    for public in getattr(module, "__all__", ()):
        value = getattr(module, public)
        assert not callable(value) or value.__doc__, f"{name}.{public} has no docstring"


def sources(root: Path, *patterns: str) -> list[Path]:
    found = [path for pattern in patterns for path in root.glob(pattern)]
    return [path for path in found if ".venv" not in path.parts]


def test_package_imports_itself_relatively(root: Path) -> None:
    wrong = re.compile(r"^\s*(from|import) (scripts|equireg)\b", re.MULTILINE)
    files = sources(root, "bundle/scripts/**/*.py")
    assert files
    for path in files:
        assert not wrong.search(path.read_text(encoding="utf-8")), f"{path.relative_to(root)} imports itself by name"


def test_nothing_speaks_of_one_machine(root: Path) -> None:
    """Documents, configurations and code hold no absolute path of somebody's machine."""
    home = re.compile(r"(?<![\w.}])/(work|home|root|Users|mnt|media)/\w")
    files = sources(root, "*.md", "setup.cfg", "pyproject.toml", "Makefile", "bundle/**/*.md", "bundle/**/*.json")
    files += sources(root, "bundle/**/*.py", "bundle/**/*.conf", "tests/**/*.py")
    assert len(files) > 5
    for path in files:
        found = home.search(path.read_text(encoding="utf-8"))
        assert found is None, f"{path.relative_to(root)} names {found and found.group()}"


def test_licenses_are_one(root: Path) -> None:
    text = (root / "LICENSE").read_text(encoding="utf-8")
    assert "Apache License" in text and "Version 2.0, January 2004" in text
    assert (root / "bundle" / "LICENSE").read_text(encoding="utf-8") == text
