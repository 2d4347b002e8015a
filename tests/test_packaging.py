"""The package is the folders it is made of: from a clone, from a wheel, and beside other people's packages."""

import importlib
import os
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from attnproc import _checkout

ROOT = Path(__file__).parents[1]
SETUPTOOLS = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"]
OPTIONAL = {"gradio", "triton"}


def folder_of(package):
    """The folder of a package by the longest mapped name that it starts with."""
    mapped = SETUPTOOLS["package-dir"]
    name = package
    while name not in mapped:
        name = name.rpartition(".")[0]
    return ROOT / mapped[name] / package[len(name) :].strip(".").replace(".", "/")


def modules():
    for package in SETUPTOOLS["packages"]:
        yield package
        for file in sorted(folder_of(package).glob("*.py")):
            if file.stem not in ("__init__", "__main__"):
                yield f"{package}.{file.stem}"


def run_at_root(code, **environment):
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", **environment}
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_the_checkout_finder_knows_the_folders_of_the_package():
    mapped = {name: folder for name, folder in SETUPTOOLS["package-dir"].items() if name != "attnproc"}
    assert mapped == _checkout.FOLDERS


def test_every_folder_with_an_init_is_listed_once():
    found = {"attnproc"}
    for name, folder in SETUPTOOLS["package-dir"].items():
        for init in (ROOT / folder).rglob("__init__.py"):
            below = init.parent.relative_to(ROOT / folder).parts
            found.add(".".join((name, *below)))
    assert sorted(SETUPTOOLS["packages"]) == sorted(found)


def test_every_module_lies_in_a_listed_package():
    """A module in a folder that is not listed works from a clone and is missing from the wheel."""
    listed = {folder_of(package) for package in SETUPTOOLS["packages"]}
    for folder in SETUPTOOLS["package-dir"].values():
        for file in (ROOT / folder).rglob("*.py"):
            assert file.parent in listed, f"{file.relative_to(ROOT)} is in no package of pyproject.toml"


def test_data_files_are_shipped():
    import fnmatch

    patterns = SETUPTOOLS["package-data"]
    for package, globs in patterns.items():
        assert package in SETUPTOOLS["packages"]
        for file in folder_of(package).glob("*.json"):
            assert any(fnmatch.fnmatch(file.name, glob) for glob in globs), file


def test_no_folder_of_ours_can_be_taken_for_the_package_kernels():
    assert not (ROOT / "kernels" / "__init__.py").exists() and not (ROOT / "kernels.py").exists()


@pytest.mark.parametrize("name", modules())
def test_every_module_imports_by_its_package_name(name):
    try:
        module = importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is None or error.name.split(".")[0] not in OPTIONAL:
            raise
        pytest.skip(f"{error.name} is not installed")
    assert Path(module.__file__).is_relative_to(ROOT)


def test_no_module_is_imported_by_its_folder_name():
    """That would make a second copy, with other classes of the same names."""
    folders = [ROOT / folder for folder in _checkout.FOLDERS.values()]
    for name, module in list(sys.modules.items()):
        file = getattr(module, "__file__", None)
        if file and any(Path(file).is_relative_to(folder) for folder in folders):
            assert name.split(".")[0] == "attnproc", name


def test_the_finder_is_added_once():
    names = [type(finder).__name__ for finder in sys.meta_path]
    _checkout.link_checkout()
    assert [type(finder).__name__ for finder in sys.meta_path] == names
    assert names.count("CheckoutFinder") <= 1


def test_the_finder_answers_for_its_names_only():
    finder = _checkout.CheckoutFinder(ROOT)
    for name, folder in _checkout.FOLDERS.items():
        assert Path(finder.find_spec(name).origin) == ROOT / folder / "__init__.py"
    for name in ("attnproc", "kernels", "pipelines", "attnproc.processor", "attnproc.kernels.cpu", "diffusers"):
        assert finder.find_spec(name) is None


def test_it_imports_with_torch_and_diffusers_alone():
    code = """
import sys
for name in ("triton", "gradio", "rich", "typer", "av", "imageio"):
    sys.modules[name] = None
import attnproc
attnproc.RadialAttnProcessor()
"""
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


def test_it_imports_beside_hugging_face_kernels_and_without_optional_packages(tmp_path):
    """diffusers and transformers import a package named `kernels` when there is one; ours must not be taken for it."""
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels" / "__init__.py").write_text(
        "__version__ = '0.18.3'\n"
        "class Anything:\n"
        "    def __init__(self, *args, **kwargs): pass\n"
        "    def __call__(self, decorated=None, *args, **kwargs): return decorated\n"
        "def __getattr__(name): return Anything\n"
    )
    info = tmp_path / "kernels-0.18.3.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: kernels\nVersion: 0.18.3\n")
    code = """
import sys
sys.modules["triton"] = sys.modules["gradio"] = None
import attnproc
for name in attnproc.__all__:
    getattr(attnproc, name)
from attnproc.kernels import block_sparse_attention
from diffusers import WanPipeline
import kernels
print(kernels.__version__, WanPipeline.attn_processor.__doc__)
"""
    out = run_at_root(code, PYTHONPATH=str(tmp_path))
    assert out.split()[0] == "0.18.3" and "attnproc processor" in out
