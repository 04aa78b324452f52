"""What the README shows must run as it stands."""

import re
from pathlib import Path

import pytest
import yaml

from nexus_core.cli.settings import read_settings

README = Path(__file__).parents[1] / "README.md"
TEXT = README.read_text()


@pytest.mark.parametrize("code", re.findall(r"```python\n(.*?)```", TEXT, flags=re.S))
def test_python_block_runs(code: str) -> None:
    exec(compile(code, str(README), "exec"), {"__name__": "readme"})


def test_config_block_is_a_config(tmp_path: Path) -> None:
    (block,) = re.findall(r"```yaml\n(.*?)```", TEXT, flags=re.S)
    path = tmp_path / "my.yaml"
    path.write_text(block)
    settings = read_settings(str(path))
    assert settings.named == ("data_text", "lr_linear")
    assert yaml.safe_load(block)["preset"] in ("quickstart", "nexus")


def test_links_to_files_hold() -> None:
    targets = re.findall(r"\]\(([^)#:]+)\)", TEXT)
    assert targets
    assert [target for target in targets if not (README.parent / target).exists()] == []
