"""Pictures of report.html, for eyes: runs in several states (or sweeps) at two widths, light and dark, and as printed.

    python bench/report_screenshots.py OUT [RUN ...]

Without RUN the runs are made up, as the tests make theirs. Needs chromium, and for the printed pages pdftoppm (poppler).
The pictures are for looking at and are not kept in the repository.
"""

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from PIL import Image, ImageChops

from prefopt.report.page import write_report
from prefopt.report.sweep.files import is_sweep
from prefopt.report.sweep.page import write_sweep_report

sys.path.insert(0, str(Path(__file__).parents[1]))

from tests.report.made import FINDINGS, make_run

BROWSERS = ("chromium", "chromium-browser", "google-chrome")
WIDTHS = (1440, 390)
TALLEST = 16_000
"""Pixels: as tall as the tallest page; what is empty below a page is cut off."""

FLAGS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--hide-scrollbars"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
)
SCHEMES = {"light": "1", "dark": "0"}
"""What `preferredColorScheme` is called inside the browser."""

STATES = {
    "good": {},
    "warned": {"findings": FINDINGS},
    "learned-nothing": {"gain": 0.0},
    "sft": {"method": "sft"},
    "running": {"state": "running", "done": 50, "pid": os.getpid(), "findings": FINDINGS[1:]},
    "killed": {"state": "running", "done": 45, "pid": 2**22 + 1},
    "stopped": {"state": "stopped", "done": 70, "num_held_out": 0, "samples": 0, "message": "stopped after step 70 of 120, as asked"},
    "failed": {"state": "failed", "done": 33, "message": "the loss of step 34 is nan; the weights were not changed."},
    "long": {"num_steps": 3000, "every": 100, "findings": FINDINGS},
    "hostile": {"texts": ["<script>alert(1)</script>", "\u202eturned round", "شكرا جزيلا", "no-end-" * 200, ""]},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("runs", type=Path, nargs="*")
    given = parser.parse_args()
    browser = next((found for name in BROWSERS if (found := shutil.which(name))), None)
    if browser is None:
        sys.exit(f"there is no browser: install one of {', '.join(BROWSERS)}")
    given.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch:
        runs = given.runs or [make_run(Path(scratch) / name, **settings) for name, settings in STATES.items()]
        for run in runs:
            write = write_sweep_report if is_sweep(run) else write_report
            page = write(run, given.out / f"{run.resolve().name}.html").resolve()
            print(f"{page}: {page.stat().st_size / 1000:.0f} kB")
            for width in WIDTHS:
                for scheme in SCHEMES:
                    picture(browser, page, width, scheme, Path(scratch))
            printed(browser, page, Path(scratch))


def picture(browser: str, page: Path, width: int, scheme: str, scratch: Path) -> None:
    """The whole page at a width. It stands in a frame, because browsers without a window are at least 500 pixels wide."""
    frame = scratch / "frame.html"
    frame.write_text(f'<body style="margin:0"><iframe src="{page.as_uri()}" width="{width}" height="{TALLEST}" style="border:0"></iframe>')
    file = page.with_name(f"{page.stem}-{width}-{scheme}.png")
    look = (
        f"--screenshot={file}",
        f"--window-size={max(width, 500)},{TALLEST}",
        f"--blink-settings=preferredColorScheme={SCHEMES[scheme]}",
    )
    start(browser, scratch, *look, frame.as_uri())
    image = Image.open(file).convert("RGB").crop((0, 0, width, TALLEST))
    ground = Image.new("RGB", image.size, image.getpixel((2, TALLEST - 2)))
    _, _, _, bottom = ImageChops.difference(image, ground).getbbox() or (0, 0, 0, TALLEST)
    image.crop((0, 0, width, min(TALLEST, bottom + 40))).save(file)
    print(f"  {file.name}: {width} x {bottom + 40}")


def printed(browser: str, page: Path, scratch: Path) -> None:
    """The page as a printer would have it: a PDF, and its first pages as pictures."""
    file = page.with_suffix(".pdf")
    start(browser, scratch, f"--print-to-pdf={file}", "--no-pdf-header-footer", page.as_uri())
    if shutil.which("pdftoppm"):
        subprocess.run(["pdftoppm", "-r", "60", "-l", "4", "-png", str(file), str(file.with_name(f"{page.stem}-print"))], check=True)
    print(f"  {file.name}")


def start(browser: str, scratch: Path, *words: str) -> None:
    subprocess.run([browser, *FLAGS, f"--user-data-dir={scratch / 'profile'}", *words], check=True, capture_output=True, timeout=120)


if __name__ == "__main__":
    main()
