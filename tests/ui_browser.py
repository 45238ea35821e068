"""Debian's Chromium, headless, on pages of the MLflow UI: what is drawn there, and pictures of it."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

CHROMIUM, CHROMEDRIVER = shutil.which("chromium"), shutil.which("chromedriver")
_FLAGS = (
    "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync", "--disable-dev-shm-usage",
)  # fmt: skip
# A chart: the title on its card, the axes' types, and of every trace its name and number of points.
_CHARTS = """
return [...document.querySelectorAll('.js-plotly-plot')].filter(plot => plot.data && plot.layout.xaxis).map(plot => {
  const card = plot.closest('[data-testid="experiment-view-compare-runs-card"]');
  const traces = plot.data.filter(trace => trace.name && (trace.mode || '').includes('lines'));
  return {title: card ? card.innerText.split('\\n')[0] : '', x: plot.layout.xaxis.type, y: plot.layout.yaxis.type,
          traces: traces.map(trace => [trace.name, (trace.x || []).length])};
});
"""
# A first visit opens a panel of the assistant over the charts.
_NO_ASSISTANT = "localStorage.setItem('mlflow.assistant.fab.autoOpenedOnFirstLoad_v1', 'true')"


class Page:
    """A browser's window."""

    def __init__(self, driver: Any) -> None:
        self.driver = driver

    def open(self, address: str, *, width: int = 1600, height: int = 1000) -> None:
        """Load an address afresh. Only what lies within the window is drawn: a high one shows all charts."""
        self.driver.set_window_size(width, height)
        self.driver.get(address.partition("#")[0])
        self.driver.execute_script(_NO_ASSISTANT)
        self.driver.get("about:blank")
        self.driver.get(address)

    def charts(self) -> dict[str, dict[str, Any]]:
        """The drawn charts by title: axes' types and number of points of each run."""
        found = self.driver.execute_script(_CHARTS)
        return {chart["title"]: chart | {"traces": dict(chart["traces"])} for chart in found}

    def text(self) -> str:
        return str(self.driver.execute_script("return document.body.innerText"))

    def wait(self, condition: Callable[[], Any], what: str, *, seconds: float = 60.0) -> Any:
        """What `condition` returns once it is true."""
        deadline = time.monotonic() + seconds
        while not (found := condition()):
            if time.monotonic() > deadline:
                raise AssertionError(f"not on the page after {seconds:.0f} s: {what}. It says:\n{self.text()[:3000]}")
            time.sleep(0.5)
        return found

    def settle(self, seconds: float = 3.0) -> None:
        """Until the number of drawn traces has not changed for a while."""
        state, since = None, time.monotonic()
        while time.monotonic() - since < seconds:
            now = [(title, len(chart["traces"])) for title, chart in self.charts().items()]
            if now != state:
                state, since = now, time.monotonic()
            time.sleep(0.3)

    @contextmanager
    def frame(self) -> Iterator[None]:
        """Inside the page's (first) frame, once it is there."""
        (frame, *_) = self.wait(lambda: self.driver.find_elements("css selector", "iframe"), "a frame")
        self.driver.switch_to.frame(frame)
        yield
        self.driver.switch_to.default_content()


@contextmanager
def browser(profile: Path) -> Iterator[Page]:
    """A browser with a new profile."""
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service

    options = webdriver.ChromeOptions()
    options.binary_location = str(CHROMIUM)
    for flag in (*_FLAGS, f"--user-data-dir={profile}"):
        options.add_argument(flag)
    driver = webdriver.Chrome(service=Service(CHROMEDRIVER), options=options)
    driver.set_script_timeout(60)
    try:
        yield Page(driver)
    finally:
        driver.quit()
