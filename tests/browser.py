"""In a real browser: JupyterLab opens a lesson, runs all of it, and a slider changes its picture.

    make browser        # or: python tests/browser.py [--pictures FOLDER] [NOTEBOOK ...]

It needs Chromium and the package `playwright` (`pip install -e '.[browser]'`), and is skipped where
either is missing. With --pictures it leaves what it saw, before and after, to be looked at.
"""
import argparse, contextlib, json, os, shutil, socket, subprocess, sys, tempfile, time
import urllib.request
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LESSONS = ["00_tour.ipynb", "05_guidance.ipynb"]
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))),
                None)


def free_port() -> int:
    with contextlib.closing(socket.socket()) as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


@contextlib.contextmanager
def jupyter(folder: Path):
    "The address of a JupyterLab that serves a copy of the notebooks, with settings of its own."
    shutil.copytree(ROOT/"nbs", folder/"nbs")
    settings = folder/"settings"/"@jupyterlab"/"notebook-extension"
    settings.mkdir(parents=True)
    (settings.parent/"apputils-extension").mkdir()
    (settings.parent/"apputils-extension"/"notification.jupyterlab-settings").write_text(
        json.dumps({"fetchNews": "false", "checkForUpdates": False}))
    # cells far below are drawn too; JupyterLab leaves them out otherwise
    (settings/"tracker.jupyterlab-settings").write_text(json.dumps({"windowingMode": "none"}))
    port = free_port()
    env = os.environ | {"PYTHONPATH": str(ROOT), "JUPYTERLAB_SETTINGS_DIR": str(folder/"settings"),
                        "JUPYTERLAB_WORKSPACES_DIR": str(folder/"workspaces"),
                        "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "jupyterlab", "--no-browser", f"--port={port}",
               "--ServerApp.port_retries=0", "--IdentityProvider.token=", "--allow-root",
               "--LabApp.expose_app_in_browser=True",
               f"--ServerApp.root_dir={folder/'nbs'}"]
    with open(folder/"jupyter.log", "w") as log:
        server = subprocess.Popen(command, env=env, stdout=log, stderr=log)
    try:
        address, deadline = f"http://127.0.0.1:{port}", time.time() + 60
        while True:
            with contextlib.suppress(OSError):
                urllib.request.urlopen(f"{address}/api", timeout=2)
                break
            if server.poll() is not None or time.time() > deadline:
                raise RuntimeError((folder/"jupyter.log").read_text()[-2000:])
            time.sleep(0.3)
        yield address
    finally:
        server.terminate()
        server.wait(20)


def run_all(page, address: str, notebook: str) -> None:
    "Open a notebook and do what the menu's Run All Cells does."
    page.goto(f"{address}/lab/tree/{notebook}?reset", wait_until="domcontentloaded")
    page.wait_for_selector(".jp-NotebookPanel .jp-CodeCell", timeout=60_000)
    page.wait_for_function("window.jupyterapp.shell.currentWidget?.sessionContext", timeout=60_000)
    page.evaluate("""async () => {
        await window.jupyterapp.shell.currentWidget.sessionContext.ready;
        await window.jupyterapp.commands.execute('notebook:run-all-cells');  // until it is done
    }""")
    assert not page.locator(".jp-Dialog").count(), f"{notebook}: Jupyter asks before it runs"


def move_slider(page, pictures: Path | None, name: str) -> float:
    "Move the first slider until its picture changes; the seconds from move to picture."
    errors = page.locator(".jp-RenderedText[data-mime-type='application/vnd.jupyter.error']")
    assert errors.count() == 0, f"{name}: {errors.first.inner_text()[:500]}"
    widget = page.locator(".jp-OutputArea-child:has(.widget-slider), "
                          ".jp-OutputArea:has(.widget-slider)").last
    slider = widget.locator(".noUi-handle").first
    slider.scroll_into_view_if_needed()
    picture = widget.locator("img").last
    picture.wait_for()
    before = picture.get_attribute("src")
    if pictures: page.screenshot(path=pictures/f"{name}_before.png")
    slider.focus()
    start = time.time()
    for _ in range(3): page.keyboard.press("ArrowRight")
    deadline = start + 20
    while widget.locator("img").last.get_attribute("src") == before:
        assert time.time() < deadline, f"{name}: the slider was moved and its picture stays"
        page.wait_for_timeout(10)
    seconds = time.time() - start
    page.wait_for_timeout(500)
    if pictures: page.screenshot(path=pictures/f"{name}_after.png")
    return seconds


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("notebooks", nargs="*", default=LESSONS, help="paths in nbs/")
    parser.add_argument("--pictures", type=Path, metavar="FOLDER", help="leave screenshots there")
    args = parser.parse_args()
    try: from playwright.sync_api import sync_playwright
    except ImportError:
        print("skipped: playwright is not installed (pip install -e '.[browser]')")
        return 0
    if not CHROMIUM:
        print("skipped: there is no Chromium")
        return 0
    if args.pictures: args.pictures.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder, jupyter(Path(folder)) as address, \
            sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        for notebook in args.notebooks:
            page = browser.new_page(viewport={"width": 1300, "height": 1000})
            run_all(page, address, notebook)
            seconds = move_slider(page, args.pictures, Path(notebook).stem)
            print(f"{notebook}: run from top to bottom; slider to picture {seconds:.2f} s")
            page.close()
        browser.close()
    return 0


if __name__ == "__main__": sys.exit(main())
