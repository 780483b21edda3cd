"""Where the book lives on the web, and the buttons that open a notebook of it elsewhere.

The address is `repository: url:` in `_config.yml`, else git's `origin`. Without one there are no buttons, which would
lead nowhere.
"""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

BUTTONS = {
    "notebook_interface": "jupyterlab",
    "binderhub_url": "https://mybinder.org",
    "colab_url": "https://colab.research.google.com",
}


def address_of(root: Path) -> str:
    """Web address of the repository: `repository: url:` in `_config.yml`, else git's origin, else empty.

    >>> web_address("git@github.com:owner/name.git"), web_address("https://token@github.com/owner/name.git")
    ('https://github.com/owner/name', 'https://github.com/owner/name')
    >>> web_address("/srv/git/name.git")
    ''
    """
    import yaml

    config = yaml.safe_load((root / "_config.yml").read_text(encoding="utf-8")) or {}
    chosen = (config.get("repository") or {}).get("url") or ""
    if chosen:
        return str(chosen)
    try:
        done = subprocess.run(["git", "remote", "get-url", "origin"], cwd=root, capture_output=True, text=True)
    except OSError:  # no git on this machine
        return ""
    return web_address(done.stdout.strip()) if done.returncode == 0 else ""


def web_address(remote: str) -> str:
    """A git remote as the address of its page, without user and token; empty where it is on no server."""
    remote = remote.removesuffix("/").removesuffix(".git")
    match = re.fullmatch(r"(?:https?://|ssh://|git://)?(?:[^@/]+@)?([\w.-]+\.\w+)(?::\d+)?[:/](?!/)([\w./-]+)", remote)
    return f"https://{match[1]}/{match[2]}" if match else ""


def configured(config: str, address: str) -> str:
    """The text of `_config.yml` with the address and, where Colab and Binder can open it, the launch buttons.

    Comments are lost: it is for the copy that is rendered.
    """
    import yaml

    if not address:
        return config
    content = yaml.safe_load(config)
    content["repository"] = {"path_to_book": "", "branch": "main", **(content.get("repository") or {}), "url": address}
    if "//github.com/" in address and not content.get("launch_buttons"):
        content["launch_buttons"] = dict(BUTTONS)
    return yaml.safe_dump(content, sort_keys=False, allow_unicode=True)
