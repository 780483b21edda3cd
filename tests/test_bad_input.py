"""A chat template that cannot be used gets its sentence; whatever ends a command is one sentence."""

from __future__ import annotations

import errno
import re
import sys
from copy import deepcopy

import pytest
from notebook_files import BookError

from embedlens import EmbedLensError, __main__
from embedlens.vlm import VisionLanguageModel


@pytest.mark.parametrize(
    ("template", "sentence"),
    [
        ("{{ raise_exception('No pictures,\n please') }}", "raises TemplateError .No pictures, please."),
        ("{% for message in messages %}", "raises TemplateSyntaxError"),
        ("{{ 'USER: ' + messages[0]['content'] }}", "raises TypeError"),
        ("USER: {{ messages[0]['content'][1]['text'] }}", "writes no picture"),
    ],
)
def test_a_chat_template_that_cannot_be_used_is_named_at_once(tiny, template, sentence):
    processor = deepcopy(tiny.processor)
    processor.chat_template = template
    with pytest.raises(EmbedLensError, match=f"its chat template {sentence}.*: take chat_template.jinja"):
        VisionLanguageModel(tiny.hf, processor, "mine")


class FailedChapter(BookError):
    exit_code = 1


ENDS: list[tuple[BaseException, str, int]] = [
    (EmbedLensError("no such thing: pass another"), "no such thing: pass another", 2),
    (FailedChapter("02: cell 3 raises"), "02: cell 3 raises", 1),
    (KeyboardInterrupt(), "stopped; what was finished is on disk, and the same command goes on from there", 2),
    (OSError(errno.ENOSPC, "No space left on device"), "No space left on device.: free space on that disk", 2),
    (OSError(errno.EROFS, "Read-only file system", "/mnt/a"), "/mnt/a .Read-only file system.: pass a place that", 2),
    (PermissionError(errno.EACCES, "Permission denied", "b"), "b .Permission denied.: pass a place that", 2),
    (FileNotFoundError(errno.ENOENT, "No such file or directory", "c"), "c .No such file.*: check the path", 2),
    (MemoryError(), "too little memory .MemoryError.: pass a smaller model", 2),
    (ModuleNotFoundError("No module named 'x'"), "No module named 'x': install it", 2),
    (KeyError("bbox"), "KeyError: 'bbox' is a fault of .*: EMBEDLENS_TRACEBACK=1 before the command shows where", 2),
]


def ended_by(error: BaseException, monkeypatch) -> None:
    def fails() -> None:
        raise error

    monkeypatch.setattr("embedlens.memory.sizes", fails)
    monkeypatch.setattr(sys, "argv", ["embedlens", "models"])
    __main__.main()


@pytest.mark.parametrize(("error", "sentence", "code"), ENDS, ids=[type(error).__name__ for error, *_ in ENDS])
def test_whatever_ends_a_command_is_one_sentence(error, sentence, code, monkeypatch, capsys):
    with pytest.raises(SystemExit) as exited:
        ended_by(error, monkeypatch)
    said = capsys.readouterr()
    assert exited.value.code == code and not said.out
    assert len(said.err.splitlines()) == 1 and re.match(f"embedlens: .*{sentence}", said.err)


def test_where_a_command_was_ended_can_be_seen(monkeypatch):
    monkeypatch.setenv("EMBEDLENS_TRACEBACK", "1")
    with pytest.raises(KeyError, match="bbox"):
        ended_by(KeyError("bbox"), monkeypatch)
