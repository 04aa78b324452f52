"""Has the README lead into the repository, as PyPI shows it outside of one.

    python .ci/absolute_links.py https://github.com/OWNER/NAME v1.2.3

It changes README.md and pyproject.toml in place; the release workflow does so before it builds.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def absolute(markdown: str, repository: str, tag: str) -> str:
    """Every relative link and picture of a page of the root, in full."""
    pictures = re.sub(r"(!\[[^]]*\]\()(?!https?:|#)", rf"\1{repository}/raw/{tag}/", markdown)
    return re.sub(r"((?<!!)\[[^]]*\]\()(?!https?:|#)", rf"\1{repository}/blob/{tag}/", pictures)


def main(repository: str, tag: str) -> None:
    """Rewrite both files."""
    readme, project = ROOT / "README.md", ROOT / "pyproject.toml"
    readme.write_text(absolute(readme.read_text(), repository, tag))
    links = {
        "Repository": repository,
        "Documentation": f"{repository}/blob/{tag}/docs/index.md",
        "Changelog": f"{repository}/blob/{tag}/CHANGELOG.md",
        "Issues": f"{repository}/issues",
    }
    urls = "".join(f'{name} = "{link}"\n' for name, link in links.items())
    head = "[project.scripts]"
    project.write_text(project.read_text().replace(head, f"[project.urls]\n{urls}\n{head}", 1))


if __name__ == "__main__":
    main(*sys.argv[1:])
