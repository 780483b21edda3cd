"""The byte-level BPE tokenizer, learned on the world's own sentences."""

from __future__ import annotations

from collections.abc import Iterator

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from embedlens.samples.miniworld import language, scene
from embedlens.samples.miniworld.sprites import CATEGORIES
from training.documents import document
from training.recipe import ASSISTANT, SYSTEM, USER

SPECIAL = ("<pad>", "<s>", "</s>", "<image>")
# a coordinate such as " 0.25" stays one piece; otherwise words, digits, punctuation, spaces, as GPT-2 splits them
PIECES = Regex(r" ?0\.\d\d| ?[A-Za-z]+| ?\d| ?[^\sA-Za-z\d]+|\s+")


def sentences(documents: int) -> Iterator[str]:
    for index in range(documents):
        rng = scene.rng_of("train", index)
        drawn = scene.scene(rng, "train")
        yield f"{SYSTEM}{USER}{document(drawn, rng)} {language.caption(drawn, rng)}"
        for question in language.questions(drawn, rng):
            yield f"\n{question.text}{ASSISTANT} {question.answer}"
    for category in CATEGORIES:  # both numbers of every name, so that neither is rarer than a letter pair
        yield from (f" {category.name} {language.plural(category.name)}" for _ in range(200))


def learn(vocabulary: int, documents: int = 20_000, rare: int = 25) -> PreTrainedTokenizerFast:
    """Learn the merges. Pairs seen fewer than `rare` times stay apart, so that unusual words are several tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(PIECES, "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        min_frequency=rare,
        special_tokens=list(SPECIAL),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(sentences(documents), trainer)
    bos = SPECIAL[1]
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A", pair=f"{bos} $A $B", special_tokens=[(bos, tokenizer.token_to_id(bos))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        additional_special_tokens=["<image>"],
        padding_side="left",
        model_max_length=1024,
        clean_up_tokenization_spaces=False,
        extra_special_tokens={"image_token": "<image>"},
    )
