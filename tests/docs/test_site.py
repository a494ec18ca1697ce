"""The site is built without a warning, fetches nothing from elsewhere, and leads nowhere that there is nothing.

It is opened in a browser: what follows links here are Chromium's own pages, with their scripts run.
"""

from __future__ import annotations

import functools
import http.server
import importlib.util
import re
import shutil
import subprocess
import sys
import threading
from pathlib import Path
from urllib.parse import unquote, urldefrag, urlparse

import pytest

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
DRIVER = shutil.which("chromedriver")

needs_mkdocs = pytest.mark.skipif(
    importlib.util.find_spec("mkdocstrings") is None, reason="mkdocs is not installed (it needs Python 3.11)"
)
needs_browser = pytest.mark.skipif(
    None in (BROWSER, DRIVER, importlib.util.find_spec("selenium")),
    reason="there is no Chromium with its driver: apt-get install chromium chromium-driver",
)


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The folder of the built site."""
    folder = tmp_path_factory.mktemp("site")
    build = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "-f", HERE / "mkdocs.yml", "-d", folder],
        capture_output=True, text=True,
    )  # fmt: skip
    assert build.returncode == 0, build.stderr
    assert "WARNING -" not in build.stderr
    return folder


class _Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, format, *args):
        pass


@pytest.fixture(scope="module")
def address(site):
    handler = functools.partial(_Quiet, directory=str(site))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/"
        server.shutdown()


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = BROWSER
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    options.page_load_strategy = "normal"
    flags = (
        "headless", "no-sandbox", "disable-gpu", "disable-dev-shm-usage", "disable-background-networking",
        "disable-component-update", "disable-sync", "no-first-run", "disable-extensions",
        f"user-data-dir={tmp_path_factory.mktemp('browser')}",
    )  # fmt: skip
    for flag in flags:
        options.add_argument(f"--{flag}")
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(executable_path=DRIVER))
    yield driver
    driver.quit()


def width(browser, pixels):
    browser.execute_cdp_cmd(
        "Emulation.setDeviceMetricsOverride",
        {"width": pixels, "height": 900, "deviceScaleFactor": 1, "mobile": False},
    )


def wait(browser, condition, otherwise=""):
    """Return what a condition gives once it holds: pages go over to another state in steps."""
    from selenium.webdriver.support.ui import WebDriverWait

    return WebDriverWait(browser, 10, poll_frequency=0.05).until(condition, otherwise)


def prefer(browser, scheme):
    features = [{"name": "prefers-color-scheme", "value": scheme}]
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})


LOOK = """
return {
  links: [...new Set(Array.from(document.querySelectorAll("a[href]"), a => a.href))],
  ids: Array.from(document.querySelectorAll("[id]"), e => e.id),
  fetched: performance.getEntriesByType("resource").map(r => r.name),
  broken: Array.from(document.images).filter(i => i.complete && !i.naturalWidth).map(i => i.src),
}
"""
OVERFLOW = "return document.documentElement.scrollWidth - window.innerWidth"


@needs_mkdocs
@needs_browser
def test_every_internal_link_leads_to_a_page_and_a_place_in_it(browser, address, site):
    waiting, ids, links = [f"{address}index.html"], {}, {}
    while waiting:
        page = waiting.pop()
        browser.get(page)
        found = browser.execute_script(LOOK)
        ids[page] = {*found["ids"], ""}
        for link in found["links"]:
            if link.startswith(address):
                target, place = urldefrag(link)
                links.setdefault((target, unquote(place)), page)
                if target not in ids and target not in waiting:
                    waiting.append(target)
        assert all(url.startswith((address, "data:")) for url in found["fetched"]), found["fetched"]
        assert found["broken"] == [], page
        for pixels in (1280, 400):
            width(browser, pixels)
            wait(browser, lambda b: b.execute_script(OVERFLOW) <= 0, f"{page} is wider than {pixels} pixels")
    assert [e["message"] for e in browser.get_log("browser") if e["level"] == "SEVERE"] == []
    assert len(links) > 300
    lost = {
        f"{target}#{place} in {page}" for (target, place), page in links.items() if place not in ids[target]
    }
    assert lost == set()
    built = {str(path.relative_to(site)) for path in site.rglob("*.html")} - {"404.html"}
    assert {urlparse(page).path[1:] for page in ids} - {""} == built, "a page is not reached by any link"


@needs_mkdocs
@needs_browser
def test_search_finds_a_page_without_another_server(browser, address):
    from selenium.webdriver.common.by import By

    width(browser, 1280)
    browser.get(f"{address}index.html")
    browser.find_element(By.CSS_SELECTOR, "input.md-search__input").send_keys("use_backend")
    results = (By.CSS_SELECTOR, "a.md-search-result__link")
    found = wait(browser, lambda b: [e.get_attribute("href") for e in b.find_elements(*results)])
    assert any("reference/ops.html" in link for link in found)


@needs_mkdocs
@needs_browser
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_site_has_the_colours_that_the_reader_prefers(browser, address, scheme):
    prefer(browser, scheme)
    browser.get(f"{address}reference/ops.html")
    browser.execute_script("localStorage.clear()")
    browser.refresh()
    used = browser.execute_script("return document.body.getAttribute('data-md-color-scheme')")
    assert used == {"light": "default", "dark": "slate"}[scheme]


@needs_mkdocs
def test_the_reference_has_every_public_name(site):
    import opkit

    pages = "".join(path.read_text() for path in (site / "reference").glob("*.html"))
    ids = set(re.findall(r'id="(opkit[\w.]*)"', pages))
    names = {f"opkit.{name}" for name in opkit.__all__ if not name.endswith("Error")}
    modules = {f"opkit.{name}" for name in ("bench", "cpp", "plugins", "testing", "errors")}
    assert names - modules - ids == set()
    for module in ("cpp", "plugins"):
        listed = {f"opkit.{module}.{name}" for name in getattr(opkit, module).__all__}
        assert listed - ids == set()
    errors = {f"opkit.errors.{name}" for name in opkit.__all__ if name.endswith("Error")}
    assert errors - ids == set()
    assert {f"opkit.Op.{name}" for name in ("register_kernel", "register_autograd", "explain")} <= ids


@needs_mkdocs
def test_a_link_that_leads_nowhere_stops_the_build(tmp_path):
    pages = tmp_path / "pages"
    pages.mkdir()
    (pages / "index.md").write_text("# Home\n\n[nothing](nothing.md) and [no place](#none)\n")
    text = (HERE / "mkdocs.yml").read_text()
    text = re.sub(r"(?ms)^(docs_dir|site_dir|watch|hooks|extra_css):.*?$", "", text)
    text = re.sub(r"(?ms)^nav:.*?(?=^markdown)", "", text)
    text = re.sub(r"(?ms)^  - mkdocstrings:.*?(?=^validation)", "", text)
    (tmp_path / "mkdocs.yml").write_text(f"docs_dir: pages\n{text}")
    build = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "-f", tmp_path / "mkdocs.yml", "-d", tmp_path / "out"],
        capture_output=True, text=True,
    )  # fmt: skip
    assert build.returncode == 1
    assert "nothing.md" in build.stderr
    assert "#none" in build.stderr
