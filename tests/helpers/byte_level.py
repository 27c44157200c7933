"""A byte-level tokenizer trained on two lines, and what its tokens stand for, read from bytes."""

from functools import cache

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

TEXT = "Q: Paris, Lyon\nA: France\n\nQ: Rome\nA: Italy\n\nCapitals:"


@cache
def tokenizer(*, trim: bool = False) -> PreTrainedTokenizerFast:
    """Knows the words of `TEXT`, each with the space before it; all else byte by byte.

    Args:
        trim: whether offsets leave out the spaces of tokens.
    """
    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    inner.post_processor = processors.ByteLevel(trim_offsets=trim)
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=["<bos>"],
        show_progress=False,
    )
    inner.train_from_iterator([TEXT] * 9, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=inner, bos_token="<bos>")


def characters(made: PreTrainedTokenizerFast, text: str) -> list[list[int]]:
    """The characters of the text that each token has a byte of."""
    of_byte = [i for i, character in enumerate(text) for _ in character.encode()]
    found, start = [], 0
    for token in made(text, add_special_tokens=False).input_ids:
        # Every byte is written as one character.
        stop = start + len(made.convert_ids_to_tokens(token))
        found.append(of_byte[start:stop])
        start = stop
    assert start == len(of_byte)
    return found
