"""A virtual environment for a test, with access to the packages of the current one."""

from __future__ import annotations

import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

COMMANDS = {
    "nexus-run": "from nexus_core.cli.run import main; main()",
    "nexus-plugins": "from nexus_core.cli.plugins import main; main()",
}


class FreshVenv:
    """A new environment: installs are local to it, other packages are those of the current one."""

    def __init__(self, folder: Path) -> None:
        venv.create(folder, with_pip=False)
        self.python = folder / "bin/python"
        (site,) = folder.glob("lib/python*/site-packages")
        seen = sysconfig.get_paths()["purelib"]
        (site / "outer.pth").write_text(f"import site; site.addsitedir({seen!r})\n")

    def pip(self, *arguments: str) -> None:
        """Install or uninstall, without a network."""
        command = [sys.executable, "-m", "pip", "--python", str(self.python), *arguments]
        quiet = ["--quiet", "--disable-pip-version-check"]
        done = subprocess.run([*command, *quiet], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr

    def run(self, command: str, *arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
        """Run one of the trainer's commands, or a module such as pytest."""
        known = COMMANDS.get(command)
        start = ["-c", known] if known else ["-m", command]
        return subprocess.run(
            [str(self.python), *start, *arguments],
            cwd=cwd,
            capture_output=True,
            text=True,
            check=False,
        )
