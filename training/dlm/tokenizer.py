"""The tokenizer that the three mini models share: one token per word, digit and sign, built from `words.py` alone.

Text is lowercased; blanks only separate. Decoding puts the blanks back where a reader wants them, so a problem's text
comes back as it was. A word that is not in the vocabulary becomes `<unk>`. Nothing is put in front of a text.
"""

from __future__ import annotations

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from dlm.mini.words import all_words

PAD, EOS, MASK, UNK = SPECIAL_TOKENS = ("<pad>", "</s>", "<mask>", "<unk>")
_PIECES = r"\p{L}+|\d|####|[^\s\p{L}\d]"
# Blanks that a reader does not want: in numbers, after a sign, before a stop or a mark, after a mark inside a total.
_TIDY = (r"(?<=\d) (?=\d)", r"(?<=[=+-]) (?=\d)", r" (?=[.,?'])", r"(?<=\d[,']) (?=\d)")


def build_tokenizer() -> PreTrainedTokenizerFast:
    """The tokenizer; the same ids every time."""
    vocabulary = {token: number for number, token in enumerate([*SPECIAL_TOKENS, *all_words()])}
    made = Tokenizer(models.WordLevel(vocabulary, unk_token=UNK))
    made.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])
    # Inverted: what the pattern matches are the tokens, what lies between them goes.
    made.pre_tokenizer = pre_tokenizers.Split(Regex(_PIECES), behavior="removed", invert=True)
    made.decoder = decoders.Sequence(
        [
            # Joins with blanks; its marker of a word's continuation does not occur in the vocabulary.
            decoders.WordPiece(prefix="\u0000", cleanup=False),
            decoders.Fuse(),
            *(decoders.Replace(Regex(pattern), "") for pattern in _TIDY),
        ]
    )
    made.add_special_tokens(list(SPECIAL_TOKENS))
    return PreTrainedTokenizerFast(
        tokenizer_object=made,
        pad_token=PAD,
        eos_token=EOS,
        mask_token=MASK,
        unk_token=UNK,
        # A canvas wants every answer to begin in the same column.
        padding_side="left",
        clean_up_tokenization_spaces=False,
    )
