"""A headless Chromium for the tests of the report: the WebDriver protocol in a few lines, nothing to install
but the browser.
"""

import base64
import json
import shutil
import socket
import subprocess
import time
import urllib.error
import urllib.request

FLAGS = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
         "--disable-component-update", "--disable-sync"]  # fmt: skip
BROWSER = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
DRIVER = shutil.which("chromedriver")
KEYS = {"left": "\ue012", "right": "\ue014", "tab": "\ue004", "escape": "\ue00c"}


class Chromium:
    """`with Chromium(profile_folder) as browser`: pages are opened, asked and photographed."""

    def __init__(self, profile):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.driver = subprocess.Popen(
            [DRIVER, f"--port={self.port}"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        options = {"binary": BROWSER, "args": [*FLAGS, f"--user-data-dir={profile}"]}
        wanted = {"alwaysMatch": {"goog:chromeOptions": options, "goog:loggingPrefs": {"browser": "ALL"}}}
        self.session = ""
        self.session = self._ask("POST", "", {"capabilities": wanted})["sessionId"]

    def __enter__(self):
        return self

    def __exit__(self, *_):
        try:
            self._ask("DELETE", "")
        finally:
            self.driver.terminate()
            self.driver.wait()

    def _ask(self, method: str, path: str, body: dict | None = None):
        address = f"http://127.0.0.1:{self.port}/session" + (f"/{self.session}{path}" if self.session else "")
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(address, data, {"Content-Type": "application/json"}, method=method)
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        for _ in range(200):  # until the driver listens
            try:
                with opener.open(request) as answer:
                    return json.load(answer)["value"]
            except urllib.error.HTTPError as error:
                raise AssertionError(error.read().decode()) from None
            except urllib.error.URLError:
                time.sleep(0.1)
        raise AssertionError("chromedriver does not answer")

    def open(self, path, fragment: str = "") -> None:
        self._ask("POST", "/url", {"url": "about:blank"})
        self._ask("POST", "/url", {"url": path.resolve().as_uri() + fragment})

    def run(self, script: str, *arguments):
        """The value of a function body in the page."""
        return self._ask("POST", "/execute/sync", {"script": script, "args": list(arguments)})

    def press(self, key: str) -> None:
        """A key, by name or as itself, wherever the focus is."""
        value = KEYS.get(key, key)
        actions = [{"type": kind, "value": value} for kind in ("keyDown", "keyUp")]
        self._ask("POST", "/actions", {"actions": [{"type": "key", "id": "keys", "actions": actions}]})

    def console(self) -> list[str]:
        """What the page and its policy have complained about since the last call."""
        return [entry["message"] for entry in self._ask("POST", "/se/log", {"type": "browser"})]

    def look(self, width: int = 1200, height: int = 900, dark: bool = False) -> None:
        """How large the window is, and which colours the reader prefers."""
        self._cdp(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=height,
            deviceScaleFactor=1,
            mobile=width < 600,
        )
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self._cdp("Emulation.setEmulatedMedia", features=[scheme])

    def picture(self, path, whole: bool = False) -> None:
        shot = self._cdp("Page.captureScreenshot", format="png", captureBeyondViewport=whole)
        path.write_bytes(base64.b64decode(shot["data"]))

    def _cdp(self, command: str, **parameters):
        return self._ask("POST", "/goog/cdp/execute", {"cmd": command, "params": parameters})
