"""Pictures of a study's pages in the MLflow UI, for the docs:

    python tests/ui_screenshots.py --tracking-uri sqlite:///runs/mlflow.db --experiment cifar10_cpu --out docs/images

Needs Debian's chromium and chromium-driver, and selenium. Each picture is 1400 pixels wide and smaller than 250 kB.
"""

from __future__ import annotations

import argparse
import socket
import tempfile
from pathlib import Path

from PIL import Image
from ui_browser import Page, browser

from cluster.tracking import page_lines
from cluster.ui import serving
from trainer.tracking.mlflow_pages import experiment_pages

# Width and height of the window: as much as a person would have after closing the messages.
_WINDOWS = {"Fits": (1950, 960), "Report": (1400, 1300), "Scaling curves": (1400, 1150)}
_WINDOW = (1400, 1150)
_WIDTH, _COLOURS, _MOST_BYTES = 1400, (256, 128, 64, 32), 250_000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tracking-uri", required=True)
    parser.add_argument("--experiment", required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--port", type=int, default=0)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    port = args.port or _free_port()
    with serving(args.tracking_uri, port), tempfile.TemporaryDirectory() as profile, browser(Path(profile)) as page:
        (pages,) = experiment_pages(args.tracking_uri, args.experiment)
        for line in page_lines(pages, f"http://127.0.0.1:{port}"):
            name, address = line.rsplit(maxsplit=1)
            path = args.out / f"mlflow_{name.strip().lower().replace(' ', '_')}.png"
            take(page, name.strip(), address, path)
            print(f"{path}: {path.stat().st_size:,} bytes")


def take(page: Page, name: str, address: str, path: Path) -> None:
    """A picture of one page when everything on it is drawn."""
    width, height = _WINDOWS.get(name, _WINDOW)
    page.open(address, width=width, height=height)
    page.wait(lambda: "matching run" in page.text() or page.driver.find_elements("css selector", "iframe"), name)
    page.settle(6.0)
    if name == "Report":
        with page.frame():  # to its first figure
            page.wait(lambda: page.driver.find_elements("css selector", ".js-plotly-plot"), "a figure")
            page.driver.execute_script("document.querySelector('.js-plotly-plot').scrollIntoView({block: 'center'})")
        page.settle(2.0)
    page.driver.save_screenshot(str(path))
    shrink(path)


def shrink(path: Path) -> None:
    """To the docs' width, and to so few colours as keep it small."""
    with Image.open(path) as picture:
        image = picture.convert("RGB")
    if image.width != _WIDTH:
        image = image.resize((_WIDTH, round(image.height * _WIDTH / image.width)), Image.Resampling.LANCZOS)
    image.save(path, optimize=True)
    for colours in _COLOURS:
        if path.stat().st_size > _MOST_BYTES:
            image.quantize(colours, kmeans=2, dither=Image.Dither.NONE).save(path, optimize=True)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


if __name__ == "__main__":
    main()
