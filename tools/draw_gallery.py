"""Draw the pictures of docs/gallery.md from the code beside them.

    python tools/draw_gallery.py          # writes docs/pictures/*.png

It needs the folder of real weights ($NOESIS_DATA, else ../shared/data beside the checkout).
"""

from __future__ import annotations

import os
import re
import tempfile
from pathlib import Path

from PIL import Image

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "gallery.md"
PICTURES = ROOT / "docs" / "pictures"
DATA = Path(os.environ.get("NOESIS_DATA", ROOT.parent / "shared" / "data"))
BLOCK = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)
NAMED = re.compile(r"\]\(pictures/([\w.]+)\)")
#: Pictures hold few colours: a palette is a third of the bytes, and looks the same.
COLOURS = 128


def run(page: str, folder: Path, data: Path) -> None:
    """Run all code of the page in a folder, in one namespace, with the models of `data` beside it."""
    for model in data.iterdir():
        (folder / model.name).symlink_to(model)
    before = Path.cwd()
    os.chdir(folder)
    try:
        namespace = {"__name__": "__main__"}
        for block in BLOCK.findall(page):
            exec(compile(block, str(PAGE), "exec", dont_inherit=True), namespace)
    finally:
        os.chdir(before)


def main() -> None:
    """Replace the pictures by those that the page names."""
    page = PAGE.read_text(encoding="utf-8")
    with tempfile.TemporaryDirectory() as folder:
        run(page, Path(folder), DATA)
        PICTURES.mkdir(exist_ok=True)
        for old in PICTURES.glob("*.png"):
            old.unlink()
        for name in NAMED.findall(page):
            path = PICTURES / name
            picture = Image.open(Path(folder) / name).convert("RGB")
            picture.quantize(COLOURS, dither=Image.Dither.NONE).save(path, optimize=True)
            print(f"{path.relative_to(ROOT)}: {path.stat().st_size / 1000:.0f} kB")


if __name__ == "__main__":
    main()
