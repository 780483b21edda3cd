"""Promises of readable words: people can read every token, and pieces are told from whole words."""

from __future__ import annotations

from embedlens.words import readable_tokens, textless_ids


def test_byte_level_tokens_are_readable(tiny):
    words = dict(zip(tiny.tokenizer.convert_ids_to_tokens(range(len(tiny.tokens))), tiny.tokens, strict=True))
    assert words["Ġdog"] == "dog"  # starts a word
    assert words["what"] == "·what"  # the bare piece
    assert words["<s>"] == "<s>" and words["."] == "." and words["Ċ"] == "⏎" and words["Ġ"] == "␣"
    assert words["ã"] == "<0xE3>"  # one byte of a longer character is no text


def test_every_token_has_a_printable_word(tiny):
    assert len(tiny.tokens) == len(tiny.input_embeddings)
    assert all(word and word.isprintable() for word in tiny.tokens)


def test_sentencepiece_tokens_are_readable():
    """The vocabulary of Llama spells a leading space ▁ and raw bytes <0x0A>."""

    class Llama:
        all_special_tokens = ["<s>"]
        pieces = ["<s>", "▁dog", "og", "▁", "<0x0A>", "<0xE3>", "犬", "▁▁x", "."]

        def convert_ids_to_tokens(self, ids):
            return [self.pieces[index] for index in ids]

        def get_vocab(self):
            return {piece: index for index, piece in enumerate(self.pieces)}

    assert readable_tokens(Llama(), 9) == ["<s>", "dog", "·og", "␣", "⏎", "<0xE3>", "·犬", "␣x", "."]
    assert textless_ids(Llama(), 9) == [0, 5]


def test_special_tokens_and_lone_bytes_are_no_text(tiny):
    none = [tiny.tokens[index] for index in textless_ids(tiny.tokenizer, len(tiny.tokens))]
    assert {"<s>", "</s>", "<0xE3>"} <= set(none)
    assert not {"dog", ".", "⏎", "·what"} & set(none)
