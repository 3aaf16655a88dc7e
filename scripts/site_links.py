"""MkDocs hook: let pages link to the rest of the repository.

On GitHub `[text](../modeling/model.py)` opens the file. The site holds only docs/, so the link leads to `repo_url` if
mkdocs.yml names one, and is plain text otherwise. Images outside docs/ are copied into the site.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[1]
IMAGE = re.compile(r"!\[([^]]*)\]\(\.\./([^)#]+)\)")
LINK = re.compile(r"\[([^]]+)\]\(\.\./([^)]+)\)")


def on_files(files: Files, config: Any) -> Files:
    """Add the images outside docs/ that pages show."""
    for page in Path(config.docs_dir).glob("*.md"):
        for _, path in IMAGE.findall(page.read_text(encoding="utf-8")):
            if files.get_file_from_path(f"images/{Path(path).name}") is None:
                files.append(File.generated(config, f"images/{Path(path).name}", abs_src_path=str(ROOT / path)))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    """Rewrite links that leave docs/."""
    markdown = IMAGE.sub(lambda match: f"![{match[1]}](images/{Path(match[2]).name})", markdown)
    if config.repo_url:
        return LINK.sub(rf"[\1]({config.repo_url.rstrip('/')}/blob/main/\2)", markdown)
    return LINK.sub(r"\1", markdown)
