"""Vocabulary entries as words that people can read."""

from __future__ import annotations

import re

SPACES = {"\n": "⏎", "\t": "⇥", "\r": "␍", " ": "␣", "\u00a0": "␣"}
RAW_BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>")
RAW_BYTES = re.compile(r"(<0x[0-9A-F]{2}>)+")


def readable_tokens(tokenizer, n_tokens: int) -> list[str]:
    """One readable word per id from 0 to n_tokens - 1.

    A token that starts a word (leading space) is the bare word: `dog`. A letter or digit piece that continues one has a
    dot before it: `·og`. Special tokens stay as they are: `<s>`. White space is drawn: `⏎`, `␣`. Bytes that are no text
    by themselves are written `<0xE3>`. `tokenizer`: byte-level BPE (GPT-2, Qwen, the miniature) or SentencePiece
    (Llama), fast."""
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    pieces = tokenizer.convert_ids_to_tokens(list(range(n_tokens)))
    special = set(tokenizer.all_special_tokens)
    # To a byte-level decoder Ġ is the byte of a space. The vocabulary cannot tell: LLaMA's has the letter Ġ in it.
    byte_level = tokenizer.convert_tokens_to_string(["xĠx"]) == "x x"
    bytes_of = {character: byte for byte, character in bytes_to_unicode().items()} if byte_level else None
    return [_readable(piece, bytes_of, special) for piece in pieces]


def textless_ids(tokenizer, n_tokens: int) -> list[int]:
    """Ids below n_tokens that are no text: special tokens, and bytes that are no character by themselves."""
    special = {*tokenizer.all_special_tokens, "<none>"}
    words = readable_tokens(tokenizer, n_tokens)
    return [index for index, word in enumerate(words) if word in special or RAW_BYTES.fullmatch(word)]


def _readable(piece: str | None, bytes_of: dict[str, int] | None, special: set[str]) -> str:
    if piece is None:
        return "<none>"
    if piece in special:
        return piece
    if bytes_of is None:
        raw = RAW_BYTE.fullmatch(piece)
        data = bytes([int(raw[1], 16)]) if raw else piece.replace("▁", " ").encode()
    elif all(character in bytes_of for character in piece):
        data = bytes(bytes_of[character] for character in piece)
    else:
        return piece  # an added token: spelled as it is
    try:
        text = data.decode()
    except UnicodeDecodeError:
        return "".join(f"<0x{byte:02X}>" for byte in data)
    return _drawn(text)


def _drawn(text: str) -> str:
    """The text of one token, its white space and control characters made visible.

    >>> [_drawn(text) for text in (" dog", "og", ".", "\\n", " ", "  x", "\\x00")]
    ['dog', '·og', '.', '⏎', '␣', '␣x', '<0x00>']
    """
    starts_word = text.startswith(" ") and text.strip() != ""
    body = text[1:] if starts_word else text
    drawn = "".join(
        SPACES.get(c, c if c.isprintable() else "".join(f"<0x{byte:02X}>" for byte in c.encode())) for c in body
    )
    return "·" + drawn if not starts_word and body[:1].isalnum() else drawn
