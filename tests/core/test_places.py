"""Code by path: found, imported once, with clear errors, and completely copied."""

from __future__ import annotations

import hashlib
import pickle
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from torch.utils.data import DataLoader

from nexus_core import ConfigError
from nexus_core.places import absolute, in_settings, load, only_named, sources, with_colon
from nexus_core.sources import forget, look_in


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Each test runs in its own folder with a user's files."""
    monkeypatch.chdir(tmp_path)
    write("net.py", "import widths\n\n\nclass Net:\n    width = widths.WIDTH\n\n\ndef build():\n"
          "    return Net()\n")  # fmt: skip
    write("widths.py", "WIDTH = 64\n")
    write("pack/__init__.py", "")
    write("pack/net.py", "from . import sizes\nfrom .sizes import SIZE\n\n\nclass Net:\n"
          "    size = SIZE\n")  # fmt: skip
    write("pack/sizes.py", "SIZE = 3\n")
    write("loose/deep.py", "DEEP = 1\n")
    yield tmp_path
    forget()


def write(path: str, text: str) -> None:
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(path).write_text(text)


def test_two_places_of_a_file_are_one_module_and_neighbours_can_be_imported() -> None:
    """Fails if a file is executed twice, so that a class is not identical to itself."""
    net: Any = load("./net.py:Net")
    build: Any = load("net.py:build")
    assert isinstance(build(), net)
    assert net.width == 64
    assert load("net.py") is sys.modules["net"]
    assert load("net.py:Net.width") == 64


@pytest.mark.parametrize(
    ("place", "name"),
    [
        ("./pack/net.py:Net", "pack.net"),
        ("pack.net:Net", "pack.net"),
        ("pack.net.Net", "pack.net"),
        ("collections:OrderedDict", "collections"),
        ("collections.OrderedDict", "collections"),
        ("torch.optim.AdamW", "torch.optim.adamw"),
    ],
)
def test_a_module_is_the_one_of_its_package(place: str, name: str, folder: Path) -> None:
    look_in(folder)
    found: Any = load(place)
    assert found.__module__ == name


def test_a_relative_file_is_relative_to_the_base(folder: Path, monkeypatch: Any) -> None:
    (folder / "elsewhere").mkdir()
    monkeypatch.chdir(folder / "elsewhere")
    assert absolute("./net.py:build", folder) == f"{folder}/net.py:build"
    assert absolute("../net.py") == f"{folder}/net.py"
    assert absolute("pack.net:Net", folder) == "pack.net:Net"
    assert load("./net.py:build", folder) is load("../net.py:build")


@pytest.mark.parametrize("method", ["forkserver", "spawn"])
@pytest.mark.slow
def test_a_class_of_a_file_reaches_worker_processes(method: str) -> None:
    """Fails if only this process finds the file: workers unpickle data sets by their class."""
    write("rows.py", "import widths\n\n\nclass Rows:\n    def __len__(self):\n        return 2\n\n"
          "    def __getitem__(self, index):\n        return widths.WIDTH + index\n")  # fmt: skip
    rows: Any = load("./rows.py:Rows")
    loader = DataLoader(rows(), num_workers=1, multiprocessing_context=method, timeout=120)
    assert [batch.tolist() for batch in loader] == [[64], [65]]
    assert type(pickle.loads(pickle.dumps(sys.path))[-1]) is str


def test_sources_are_the_file_and_what_it_imports_beside_it(folder: Path) -> None:
    """Fails if a copy of a run's files cannot be imported, or includes installed packages."""
    look_in(folder)
    write(
        "late.py", "import torch\n\n\ndef build():\n    from pack.net import Net\n    import net\n"
    )
    found = sources(absolute("late.py:build"))
    expected = {
        "late.py",
        "pack/__init__.py",
        "pack/net.py",
        "pack/sizes.py",
        "net.py",
        "widths.py",
    }
    assert {source.file for source in found} == expected
    assert found[0].file == "late.py"
    assert {source.root for source in found} == {folder}
    assert [s.file for s in sources("loose.deep:DEEP")] == ["loose/deep.py"]
    assert sources("torch.optim.AdamW") == sources("collections:OrderedDict") == ()


def test_sources_are_those_that_were_loaded(folder: Path) -> None:
    """Fails if a file edited during startup is recorded as the code that ran."""
    place = absolute("net.py:build")
    load(place)
    write("widths.py", "WIDTH = 99\n")
    digests = {source.file: source.sha256 for source in sources(place)}
    assert digests["widths.py"] == hashlib.sha256(b"WIDTH = 64\n").hexdigest()
    forget()
    assert load("net.py:Net.width") == 99, "another command looks again"


@pytest.mark.parametrize(
    ("place", "expected"),
    [
        ("pack.net.Net.size", "pack.net:Net.size"),
        ("pack.net:Net", "pack.net:Net"),
        ("net.txt.gz", "net:txt.gz"),
        ("./net.Net", "./net.Net"),
        ("torch.optim.AdamW", "torch.optim.AdamW"),
    ],
)
def test_local_code_with_a_dot_is_a_place_that_a_run_keeps(place: str, expected: str) -> None:
    """Fails if `net.Net` is trained on without a copy and a hash of `net.py`."""
    look_in(Path.cwd())
    assert with_colon(place) == expected


@pytest.mark.parametrize(
    ("place", "message"),
    [
        ("./nett.py:build", r"no file './nett.py'. Did you mean 'net.py'\?"),
        ("./pack.py", "no file './pack.py'"),
        ("./net.py:biuld", r"'./net.py' has no 'biuld'. Did you mean 'build'\?"),
        ("./net.py:Net.wdth", r"has no 'Net.wdth'. Did you mean 'width'\?"),
        ("./my-net.py:build", "is not a name that Python can import; rename it"),
        ("./json.py:build", "another module, .*json.__init__.py; rename"),
        ("./uses.py:build", r"'./random.py' cannot be imported: its name is taken by another"),
        ("./bad.py:build", r"NameError: name 'nme' is not defined \(./bad.py, line 3\)"),
        ("./worse.py:build", r"'./worse.py' cannot be imported: .*nme.* \(./bad.py, line 3\)"),
        ("./comma.py", r"SyntaxError: .*\(./comma.py, line 2\)"),
        ("./leaves.py", r"SystemExit: 3 \(./leaves.py, line 2\)"),
        ("collections:OrderdDict", r"'collections' has no 'OrderdDict'. Did you mean 'Ordered"),
        ("colections:OrderedDict", "ModuleNotFoundError: No module named 'colections'$"),
    ],
)
def test_what_cannot_be_loaded_is_one_error(place: str, message: str) -> None:
    for name in ("my-net", "json", "random"):
        write(f"{name}.py", "build = 1\n")
    write("uses.py", "def build():\n    import random\n")
    write("bad.py", "import torch\n\nnme.x = torch\n")
    write("worse.py", "import bad\n")
    write("comma.py", "x = 1\ny = (1,\n")
    write("leaves.py", "import sys\nsys.exit(3)\n")
    with pytest.raises(ConfigError, match=message):
        load(place)


def test_two_files_of_one_name_are_refused() -> None:
    """Fails if the second is mistaken for the first, or hides it from worker processes."""
    write("other/net.py", "build = 1\n")
    load("net.py:build")
    with pytest.raises(ConfigError, match=r"'./other/net.py' cannot .* another module, .*/net.py"):
        load("other/net.py:build")


def test_only_what_the_user_has_named_is_loaded(folder: Path) -> None:
    """Fails if a config that came with a checkpoint can execute code."""
    with only_named({absolute("net.py:build")}, "name it yourself"):
        load("./net.py:build")
        for place in ("widths.py:WIDTH", "os:system", "os.system", "net.py:Net"):
            with pytest.raises(ConfigError, match="is not loaded: name it yourself"):
                load(place)
    assert load("widths.py:WIDTH") == 64


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("./net.py:build", True), ("/a b/net.py:Net.make", True), ("pack.net:Net", True),
        ("net.py", False), ("corpus.txt", False), ("https://x.org/a.py", False),
        ("1:30:00", False), ("a: b", False), (3, False), ("net.py:", False),
    ],
)  # fmt: skip
def test_a_place_in_settings_is_told_from_text(value: object, expected: bool) -> None:
    assert in_settings(value) is expected


def test_a_folder_that_python_looks_in_anyway_stays_when_it_is_forgotten(tmp_path: Path) -> None:
    """Fails if forgetting a plugin's folder also removes the program's own import path."""
    sys.path.insert(0, str(tmp_path))
    before = list(sys.path)
    look_in(tmp_path)
    forget()
    assert list(map(str, sys.path)) == before
    assert all(type(entry) is str for entry in sys.path)
    sys.path.remove(str(tmp_path))
