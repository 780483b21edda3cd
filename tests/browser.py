"""Headless Chromium over its DevTools protocol: what a page looks like, says and asks for, at a width and in a scheme.

The protocol runs through two pipes, so nothing beyond the standard library is needed. Without one `chromium()` is
None, and who asks for a tab skips.
"""

from __future__ import annotations

import json
import os
import select
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
SECONDS = 60  # that one command may take


def chromium() -> str | None:
    """The browser of this machine, if it has one."""
    return next(filter(None, map(shutil.which, NAMES)), None)


class Tab:
    """One tab; the same one is resized and sent from page to page."""

    def __init__(self, read: int, write: int):
        self.read, self.write, self.number, self.rest = read, write, 0, b""
        self.heard: list[dict[str, Any]] = []
        self.session: dict[str, str] = {}
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self.session = {"sessionId": self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]}
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")

    def _message(self) -> dict[str, Any]:
        while b"\0" not in self.rest:
            if not select.select([self.read], [], [], SECONDS)[0]:
                raise TimeoutError(f"the browser says nothing for {SECONDS} s")
            piece = os.read(self.read, 1 << 20)
            if not piece:
                raise RuntimeError("the browser has ended")
            self.rest += piece
        message, _, self.rest = self.rest.partition(b"\0")
        return json.loads(message)

    def call(self, method: str, **parameters: Any) -> Any:
        """The result of one command; events that come meanwhile are kept in `heard`."""
        self.number += 1
        command = {"id": self.number, "method": method, "params": parameters, **self.session}
        data = json.dumps(command).encode() + b"\0"
        while data:
            data = data[os.write(self.write, data) :]
        while (message := self._message()).get("id") != self.number:
            self.heard.append(message)
        if "error" in message:
            raise RuntimeError(f"{method}: {message['error']}")
        return message["result"]

    def evaluate(self, script: str):
        """The value of an expression in the page; a promise is waited for."""
        done = self.call("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        if "exceptionDetails" in done:
            raise RuntimeError(done["exceptionDetails"])
        return done["result"].get("value")

    def open(self, address: str, width: int = 1400, dark: bool = False) -> None:
        """Load a page and wait until it is laid out; `heard` then has the protocol's events since."""
        self.view(width, dark, settle=False)
        self.heard = []
        self.call("Page.navigate", url=address)
        end = time.monotonic() + SECONDS
        while not any(event.get("method") == "Page.loadEventFired" for event in self.heard):
            if time.monotonic() > end:
                raise TimeoutError(f"{address} does not end loading within {SECONDS} s")
            self.call("Runtime.evaluate", expression="0")
        self.evaluate(SETTLED)

    def view(self, width: int, dark: bool = False, settle: bool = True) -> None:
        """Show what is open at another width, or to a reader who prefers a dark page."""
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=900, deviceScaleFactor=1, mobile=False)
        scheme = [{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}]
        self.call("Emulation.setEmulatedMedia", features=scheme)
        if settle:
            self.evaluate(SETTLED)

    def press(self, key: str, times: int = 1) -> None:
        """A key down and up, as a reader's own; a letter writes itself."""
        names = {"Tab": 9, "Enter": 13, "Escape": 27, "ArrowLeft": 37, "ArrowUp": 38, "ArrowRight": 39, "ArrowDown": 40}
        text = "\r" if key == "Enter" else key if len(key) == 1 else ""
        same = {"key": key, "windowsVirtualKeyCode": names.get(key) or ord(key.upper())}
        for _ in range(times):
            self.call("Input.dispatchKeyEvent", type="keyDown" if text else "rawKeyDown", text=text, **same)
            self.call("Input.dispatchKeyEvent", type="keyUp", **same)


# Formulas are typeset after the page has loaded and move what is below them; sidebars glide; lazy pictures wait.
SETTLED = """(async () => {
  if (!document.getElementById('still')) {
    const still = Object.assign(document.createElement('style'), {id: 'still'});
    still.textContent = '* { transition: none !important; animation: none !important; }';
    document.head.append(still);
  }
  document.querySelectorAll('img[loading]').forEach(image => image.removeAttribute('loading'));
  await Promise.all([...document.images].map(image => image.decode().catch(() => 0)));
  for (let n = 0; n < 50 && window.MathJax && !(MathJax.startup && MathJax.startup.promise); n++)
    await new Promise(done => setTimeout(done, 100));
  if (window.MathJax && MathJax.startup && MathJax.startup.promise) await MathJax.startup.promise;
  await document.fonts.ready;
  await new Promise(done => requestAnimationFrame(() => requestAnimationFrame(done)));
})()"""


@contextmanager
def tab() -> Iterator[Tab]:
    """A browser of our own, ended with the block."""
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        flags = ["--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--hide-scrollbars", "--disable-sync"]
        flags += ["--disable-background-networking", "--disable-component-update", "--remote-debugging-pipe"]
        (theirs_in, ours_out), (ours_in, theirs_out) = os.pipe(), os.pipe()

        def hand_over() -> None:  # the protocol wants the numbers 3 and 4; the copies are never both in the other's way
            copies = os.dup(theirs_in), os.dup(theirs_out)
            os.dup2(copies[0], 3)
            os.dup2(copies[1], 4)

        command = [str(chromium()), *flags, f"--user-data-dir={profile}", "about:blank"]
        silent = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        process = subprocess.Popen(command, preexec_fn=hand_over, pass_fds=(3, 4), **silent)
        for theirs in (theirs_in, theirs_out):
            os.close(theirs)
        try:
            yield Tab(ours_in, ours_out)
        finally:
            for ours in (ours_out, ours_in):
                os.close(ours)
            process.terminate()
            process.wait(20)
