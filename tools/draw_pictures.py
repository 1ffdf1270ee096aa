"""Draw the pictures of the docs from the code beside them.

    python tools/draw_pictures.py          # writes docs/pictures/*.png

It needs the folder of real weights ($NOESIS_DATA, else ../shared/data beside the checkout).
"""

from __future__ import annotations

import os
import re
import tempfile
from pathlib import Path

from PIL import Image

ROOT = Path(__file__).parents[1]
PICTURES = ROOT / "docs" / "pictures"
#: Pages that have pictures, each drawn by its own code; what the README shows is among them.
PAGES = [
    ROOT / "docs" / name
    for name in (
        "gallery.md",
        "guides/diffusion.md",
        "guides/language-models.md",
        "guides/what-changed.md",
        "guides/surprise.md",
    )
]
DATA = Path(os.environ.get("NOESIS_DATA", ROOT.parent / "shared" / "data"))
BLOCK = re.compile(r"(?<!-->\n)^(?:<!-- data: \w+ -->\n)?```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)
NAMED = re.compile(r"\]\((?:\.\./)?pictures/([\w.]+)\)")
#: Pictures hold few colours: a palette is a third of the bytes, and looks the same.
COLOURS = 128


def run(page: Path, folder: Path, data: Path) -> None:
    """Run the code of the page in a folder, in one namespace, with the models of `data` beside it."""
    for model in data.iterdir():
        (folder / model.name).symlink_to(model)
    before = Path.cwd()
    os.chdir(folder)
    try:
        namespace = {"__name__": "__main__"}
        for block in BLOCK.findall(page.read_text(encoding="utf-8")):
            exec(compile(block, str(page), "exec", dont_inherit=True), namespace)
    finally:
        os.chdir(before)


def main() -> None:
    """Replace the pictures by those that the pages name."""
    for old in PICTURES.glob("*.png"):
        old.unlink()
    for page in PAGES:
        with tempfile.TemporaryDirectory() as folder:
            run(page, Path(folder), DATA)
            for name in NAMED.findall(page.read_text(encoding="utf-8")):
                path = PICTURES / name
                picture = Image.open(Path(folder) / name).convert("RGB")
                picture.quantize(COLOURS, dither=Image.Dither.NONE).save(path, optimize=True)
                print(f"{path.relative_to(ROOT)}: {path.stat().st_size / 1000:.0f} kB")


if __name__ == "__main__":
    main()
