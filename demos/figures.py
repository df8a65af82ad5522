"""Draw the pictures of ``docs/figures.md``, and ``report``, that of the README.

    python demos/figures.py [NAME ...]

The page holds the calls, this script runs them: the first block of code makes the data, and each
further block ends in the call that makes the picture below it. Figures are drawn by matplotlib
here; circuitsvis views and the report are photographed in a headless Chromium, where there is one.
"""

import argparse
import ast
import io
import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from tl_loops import LoopedTransformer, plots
from tl_loops.report import report_html

DOCUMENT = Path(__file__).parents[1] / "docs" / "figures.md"
REPORT = DOCUMENT.parent / "images" / "report.png"
CARDS = ("Answer after each iteration", "Residual stream before each core layer")
"""Figures of the report that the README shows, by the beginning of their captions."""
LARGEST = 80_000  # bytes of a picture that has no palette

_BLOCK = re.compile(
    r"```python\n(.*?)```(?:\s*!\[[^\]]*\]\((images/figures/[\w-]+\.png)\))?", re.DOTALL
)


@dataclass(frozen=True)
class Example:
    """A block of code, and the picture that it makes (``None``: it prepares the others)."""

    code: str
    picture: str | None

    @property
    def name(self) -> str:
        return "setup" if self.picture is None else Path(self.picture).stem

    @property
    def path(self) -> Path:
        """Where the picture stands."""
        assert self.picture is not None
        return DOCUMENT.parent / self.picture


class WithBackend:
    """``tl_loops.plots`` with another default backend."""

    def __init__(self, backend: str):
        self.backend = backend

    def __getattr__(self, name: str) -> Any:
        found = getattr(plots, name)
        return partial(found, backend=self.backend) if name.startswith("plot_") else found


def examples(text: str) -> list[Example]:
    """The blocks of the page, in order."""
    return [Example(code, picture or None) for code, picture in _BLOCK.findall(text)]


def made(text: str, backend: str = "matplotlib") -> Iterator[tuple[Example, Any]]:
    """Run the page from top to bottom; each example with what its last expression gave."""
    names: dict[str, Any] = {}
    for example in examples(text):
        tree = ast.parse(example.code)
        last = tree.body.pop() if isinstance(tree.body[-1], ast.Expr) else None
        exec(compile(tree, f"figures.md, {example.name}", "exec"), names)
        names["plots"] = WithBackend(backend)
        if example.picture is not None:
            assert isinstance(last, ast.Expr), f"{example.name} does not end in a call"
            call = compile(ast.Expression(last.value), f"figures.md, {example.name}", "eval")
            yield example, eval(call, names)


def png(figure: Any) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return small(buffer.getvalue())


def small(picture: bytes) -> bytes:
    """The picture without an alpha channel; with a palette where it would be large."""
    image = Image.open(io.BytesIO(picture)).convert("RGB")
    buffer = io.BytesIO()
    image.save(buffer, "PNG", optimize=True)
    if buffer.tell() > LARGEST:
        buffer = io.BytesIO()
        # Colours that few points have are kept too.
        few = image.quantize(200, Image.Quantize.MAXCOVERAGE, dither=Image.Dither.NONE)
        few.save(buffer, "PNG", optimize=True)
    return buffer.getvalue()


def photograph(view: plots.CircuitsView, browser: Any) -> bytes:
    """A view as Chromium shows it, without a network."""
    context = browser.new_context(viewport={"width": 1100, "height": 900})
    context.route("http*://**", lambda route: route.abort())
    page = context.new_page()
    page.set_content(f"<!doctype html><meta charset=utf-8>{view.to_html()}")
    page.wait_for_timeout(1500)
    tokens = page.locator(".circuits-frame.tokens span span")
    if tokens.count():
        tokens.nth(tokens.count() // 3 - 1).hover()  # which shows what is behind a token
        page.wait_for_timeout(300)
    picture = page.locator(".circuits-view").screenshot()
    context.close()
    return small(picture)


def photograph_report(browser: Any) -> bytes:
    """Some figures of the embedded model's report, one below the other."""
    model = LoopedTransformer.from_pretrained_no_processing("tl-loops-tiny", device="cpu")
    context = browser.new_context(
        viewport={"width": 860, "height": 900}, device_scale_factor=1.4, color_scheme="light"
    )
    page = context.new_page()
    page.set_content(report_html(model, progress=False))
    page.wait_for_selector("html[data-drawn]")
    cards = []
    for caption in CARDS:
        card = page.locator("figure", has=page.locator(f"figcaption:has-text('{caption}')")).first
        cards.append(Image.open(io.BytesIO(card.screenshot())))
    context.close()
    apart = 16
    height = sum(card.height + apart for card in cards) - apart
    picture, top = Image.new("RGB", (max(card.width for card in cards), height), "white"), 0
    for card in cards:
        picture.paste(card, (0, top))
        top += card.height + apart
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    return small(buffer.getvalue())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("names", nargs="*", help="pictures to write; all when left out")
    chosen = parser.parse_args().names
    torch.set_num_threads(1)
    views = []
    for example, result in made(DOCUMENT.read_text(encoding="utf-8")):
        if chosen and example.name not in chosen:
            continue
        if isinstance(result, plots.CircuitsView):
            views.append((example, result))
        else:
            write(example.path, png(result))
    with_report = not chosen or "report" in chosen
    chromium = shutil.which("chromium") or shutil.which("chromium-browser")
    photographed = [example.name for example, _ in views] + ["report"] * with_report
    if photographed and chromium is None:
        print(f"no Chromium: left out {', '.join(photographed)}")
    elif photographed:
        from playwright.sync_api import sync_playwright

        with sync_playwright() as playwright:
            browser = playwright.chromium.launch(
                executable_path=chromium, args=["--no-sandbox", "--disable-gpu"]
            )
            for example, view in views:
                write(example.path, photograph(view, browser))
            if with_report:
                write(REPORT, photograph_report(browser))
            browser.close()


def write(path: Path, picture: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(picture)
    print(f"{path.name}: {len(picture) / 1000:.0f} kB")


if __name__ == "__main__":
    main()
