"""Readies a checkout for its release: the tag is the version's, and links are those of the repository.

    python .ci/release.py TAG ADDRESS    # v0.1.0 https://example.org/owner/chunked-embed

The address of the repository is known where a release is made, and written nowhere else. README.md gets absolute links,
because an index shows it without the files beside it, and pyproject.toml its [project.urls].
"""

import re
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
VERSION = re.compile(r'^__version__ = "(.+)"$', re.M)
LINK = re.compile(r"(?P<image>!?)\[(?P<text>[^\]]*)\]\((?!\w+:|#)(?P<target>[^)\s]+)\)")


def absolute(page: str, tag: str, address: str) -> str:
    """The page with its relative links made absolute; images are named as files, everything else as pages."""

    def link(found: re.Match[str]) -> str:
        kind = "raw" if found["image"] else "blob"
        return f"{found['image']}[{found['text']}]({address}/{kind}/{tag}/{found['target']})"

    return LINK.sub(link, page)


def urls(tag: str, address: str) -> str:
    told = {
        "Source": address,
        "Documentation": f"{address}/blob/{tag}/docs/index.md",
        "Changelog": f"{address}/blob/{tag}/CHANGELOG.md",
        "Issues": f"{address}/issues",
    }
    return "\n[project.urls]\n" + "".join(f'{name} = "{url}"\n' for name, url in told.items())


def main(tag: str, address: str) -> None:
    found = VERSION.search((ROOT / "chunked_embed" / "__init__.py").read_text())
    if found is None or tag != f"v{found[1]}":
        raise SystemExit(f"expected the tag v{found and found[1]}, as in chunked_embed/__init__.py, got {tag}")
    address = address.rstrip("/")
    for name, change in {
        "README.md": lambda text: absolute(text, tag, address),
        "pyproject.toml": lambda text: text + urls(tag, address),
    }.items():
        path = ROOT / name
        path.write_text(change(path.read_text()))


if __name__ == "__main__":
    if len(sys.argv) != 3:
        raise SystemExit(__doc__)
    main(*sys.argv[1:])
