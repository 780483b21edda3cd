"""Promises of readable words: people can read every token, and pieces are told from whole words.

LLaMA's spelling, and every named checkpoint's, is read in test_twins.py.
"""

from __future__ import annotations

from embedlens.words import textless_ids


def test_byte_level_tokens_are_readable(tiny):
    words = dict(zip(tiny.tokenizer.convert_ids_to_tokens(range(len(tiny.tokens))), tiny.tokens, strict=True))
    assert words["Ġdog"] == "dog"  # starts a word
    assert words["what"] == "·what"  # the bare piece
    assert words["<s>"] == "<s>" and words["."] == "." and words["Ċ"] == "⏎" and words["Ġ"] == "␣"
    assert words["ã"] == "<0xE3>"  # one byte of a longer character is no text


def test_every_token_has_a_printable_word(tiny):
    assert len(tiny.tokens) == len(tiny.input_embeddings)
    assert all(word and word.isprintable() for word in tiny.tokens)


def test_special_tokens_and_lone_bytes_are_no_text(tiny):
    none = [tiny.tokens[index] for index in textless_ids(tiny.tokenizer, len(tiny.tokens))]
    assert {"<s>", "</s>", "<0xE3>"} <= set(none)
    assert not {"dog", ".", "⏎", "·what"} & set(none)
