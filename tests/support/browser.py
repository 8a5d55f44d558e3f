"""A headless Chromium, driven over its debugging pipe: no driver to install, no port, no library."""

from __future__ import annotations

import base64
import contextlib
import itertools
import json
import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

_NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
_TO_BROWSER, _FROM_BROWSER = 3, 4  # the descriptors that --remote-debugging-pipe speaks on
_TIMEOUT = 60.0


def chromium_binary() -> str | None:
    """Return the path of a Chromium; None if none is installed."""
    return next(filter(None, map(shutil.which, _NAMES)), None)


class Browser:
    """One page in a headless Chromium.

    Args:
        profile: a directory of its own.

    Attributes:
        complaints: what the page wrote to the console as errors, exceptions and violated policies included.
    """

    def __init__(self, profile: Path) -> None:
        self.complaints: list[str] = []
        self._ids = itertools.count(1)
        self._answers: dict[int, dict[str, Any]] = {}
        self._rest = b""
        self._start(profile)
        self._session = ""
        target = self._call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self._call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log"):
            self._call(f"{domain}.enable")

    def _start(self, profile: Path) -> None:
        theirs_in, self._out = os.pipe()
        self._in, theirs_out = os.pipe()

        def place_pipes() -> None:
            # by way of numbers that are free: one of the pipes may be 3 or 4 itself
            spare = [os.dup(theirs_in), os.dup(theirs_out)]
            for descriptor, place in zip(spare, (_TO_BROWSER, _FROM_BROWSER), strict=True):
                os.dup2(descriptor, place)

        command = [
            str(chromium_binary()), "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage",
            "--no-first-run", "--remote-debugging-pipe", f"--user-data-dir={profile}", "--window-size=1400,1000",
        ]  # fmt: skip
        self._process = subprocess.Popen(
            command,
            close_fds=False,
            preexec_fn=place_pipes,  # noqa: PLW1509 - four system calls, no locks
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        os.close(theirs_in)
        os.close(theirs_out)

    def _call(self, method: str, **params: Any) -> Any:
        number = next(self._ids)
        session = {"sessionId": self._session} if getattr(self, "_session", "") else {}
        message = {"id": number, "method": method, "params": params, **session}
        os.write(self._out, json.dumps(message).encode() + b"\0")
        while number not in self._answers:
            self._read()
        answer = self._answers.pop(number)
        assert "error" not in answer, (method, answer["error"])
        return answer["result"]

    def _read(self) -> None:
        chunk = os.read(self._in, 1 << 20)
        assert chunk, "the browser has ended"
        *messages, self._rest = (self._rest + chunk).split(b"\0")
        for message in map(json.loads, messages):
            if "id" in message:
                self._answers[message["id"]] = message
            else:
                self._receive(message["method"], message["params"])

    def _receive(self, event: str, said: dict[str, Any]) -> None:
        if event == "Runtime.exceptionThrown":
            self.complaints.append(json.dumps(said["exceptionDetails"]))
        elif event == "Log.entryAdded" and said["entry"]["level"] == "error":
            self.complaints.append(said["entry"]["text"])
        elif event == "Page.javascriptDialogOpening":
            self.complaints.append(f"dialog: {said['message']}")

    def log_in(self, user: str, password: str) -> None:
        """Send a name and a password with every request."""
        credentials = base64.b64encode(f"{user}:{password}".encode()).decode()
        self._call("Network.enable")
        self._call("Network.setExtraHTTPHeaders", headers={"Authorization": f"Basic {credentials}"})

    def prefer(self, scheme: str) -> None:
        """Be a browser whose user likes ``light`` or ``dark`` pages."""
        self._call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])

    def open(self, url: str) -> None:
        """Go to an address."""
        self._call("Page.navigate", url=url)
        self.wait(f"location.href === {json.dumps(url)} && document.readyState === 'complete'")

    def run(self, script: str) -> Any:
        """Return the value of an expression in the page."""
        answer = self._call("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in answer, answer["exceptionDetails"]
        return answer["result"].get("value")

    def wait(self, script: str) -> None:
        """Wait until an expression is true in the page."""
        give_up_at = time.monotonic() + _TIMEOUT
        while True:
            with contextlib.suppress(AssertionError):  # on the way from one page to the next
                if self.run(script):
                    return
            assert time.monotonic() < give_up_at, f"not within {_TIMEOUT} s: {script}\n{self.complaints}"
            time.sleep(0.05)

    def text(self, selector: str) -> str:
        """Return the text that a person sees of an element."""
        return str(self.run(f"document.querySelector({json.dumps(selector)}).innerText"))

    def click(self, selector: str) -> None:
        """Click on the middle of an element with the mouse."""
        box = f"document.querySelector({json.dumps(selector)})"
        self.run(f"{box}.scrollIntoView({{behavior: 'instant', block: 'center', inline: 'center'}})")
        x, y = self.run(
            f"(({{x, y, width, height}}) => [x + width / 2, y + height / 2])({box}.getBoundingClientRect())"
        )
        for kind in ("mousePressed", "mouseReleased"):
            self._call("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", clickCount=1)

    def write(self, text: str) -> None:
        """Type into what has the focus."""
        self._call("Input.insertText", text=text)

    def fits(self, width: int) -> bool:
        """Whether a window of such a width needs no scrolling sideways; the window has its own width again after."""
        with self.as_wide_as(width):
            return bool(self.run(f"document.documentElement.scrollWidth <= {width}"))

    @contextlib.contextmanager
    def as_wide_as(self, width: int) -> Iterator[None]:
        """Be a window of such a width."""
        size = {"width": width, "height": 1000, "deviceScaleFactor": 1, "mobile": False}
        usual = self.run("innerWidth")
        self._call("Emulation.setDeviceMetricsOverride", **size)
        try:
            self.wait(f"innerWidth === {width}")
            yield
        finally:
            self._call("Emulation.clearDeviceMetricsOverride")
            self.wait(f"innerWidth === {usual}")

    def screenshot(self, path: Path, *, width: int = 1400, height: int = 1000) -> None:
        """Save what a person sees in a window of such a width as a PNG."""
        clip = {"x": 0, "y": 0, "width": width, "height": height, "scale": 1}
        with self.as_wide_as(width):
            self.run("scrollTo({top: 0, behavior: 'instant'})")  # what floats above the page lies in its way else
            shot = self._call("Page.captureScreenshot", format="png", clip=clip, captureBeyondViewport=True)
        path.write_bytes(base64.b64decode(shot["data"]))

    def close(self) -> None:
        """End the browser."""
        self._process.kill()
        self._process.wait()
        for descriptor in (self._in, self._out):
            os.close(descriptor)
