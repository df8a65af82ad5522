"""The notebooks of demos/ as pages, with what they printed and drew; nothing is run.

Where the address of the repository is known (``repo_url``, see mkdocs.yml), each has a link that
opens it in Colab.
"""

import re
from pathlib import Path
from typing import Any

import nbformat
from mkdocs.structure.files import File, Files
from nbconvert import MarkdownExporter

DEMOS = Path(__file__).parents[2] / "demos"
GITHUB = re.compile(r"https://github\.com/([\w.-]+/[\w.-]+?)/?$")
NEIGHBOUR = re.compile(r"\]\((\w+)\.ipynb\)")
"""A link to another notebook, whose page stands beside this one."""

TABLE = re.compile(
    r'<div>\n<style scoped>.*?</style>\n<table border="1" class="dataframe">(.*?)</table>\n'
    r"(<p>.*?</p>\n)?</div>",
    re.S,
)
"""A table of pandas, whose style the site's own takes the place of."""

TRUNK = "main"


def on_files(files: Files, config: Any) -> Files:
    """Add a page for every notebook, and its pictures."""
    for path in sorted(DEMOS.glob("*.ipynb")):
        notebook = nbformat.read(path, as_version=4)
        text, resources = MarkdownExporter().from_notebook_node(notebook)
        for name, content in resources["outputs"].items():
            picture = f"notebooks/{path.stem}_{name}"
            files.append(File.generated(config, picture, content=content))
            text = text.replace(f"]({name})", f"]({path.stem}_{name})")
        text = TABLE.sub(_table, text)
        text = NEIGHBOUR.sub(r"](\1.md)", text)
        text = text.replace("![png]", f"![A figure of {path.stem.replace('_', ' ')}]")
        title, _, rest = text.partition("\n")
        page = f"{title}\n\n{_where(path.name, config.repo_url)}\n{_indented_output(rest)}"
        files.append(File.generated(config, f"notebooks/{path.stem}.md", content=page))
    return files


def _table(found: re.Match[str]) -> str:
    """Without the spaces in front of lines, which would make them code."""
    rows = re.sub(r"^ +", "", found[1], flags=re.M)
    return f"<table>{rows}</table>\n\n{found[2] or ''}"


def _where(name: str, repository: str | None) -> str:
    """Where the notebook itself is."""
    said = f"A notebook: `demos/{name}` in the repository, with what it printed."
    found = GITHUB.match(repository or "")
    if found is None:
        return f"{said}\n"
    url = f"https://colab.research.google.com/github/{found[1]}/blob/{TRUNK}/demos/{name}"
    return f"{said} [Open it in Colab]({url}){{ .md-button }}\n"


def _indented_output(text: str) -> str:
    """Output, which nbconvert indents, in fences; a cell's code keeps its own."""
    parts = re.split(r"(```.*?```)", text, flags=re.S)
    indented = re.compile(r"(?:^    .*\n|^\s*\n(?=    \S))+", re.M)
    for place in range(0, len(parts), 2):
        parts[place] = indented.sub(_fenced, parts[place])
    return "".join(parts)


def _fenced(found: re.Match[str]) -> str:
    lines = [line[4:] for line in found[0].strip("\n").split("\n")]
    body = "\n".join(lines).strip("\n")
    return f"\n```text\n{body}\n```\n" if body else found[0]
