"""Code points that tokenizers' normalisers change or delete."""

import sys
import unicodedata


def changes(character: str) -> bool:
    """Whether some normalisation or folding changes or deletes a character, or what stands before it."""
    kind = unicodedata.category(character)
    folded = unicodedata.normalize("NFKD", character).casefold()
    return (kind[0] in "MZC" and kind not in ("Co", "Cn")) or folded != character


SOME = [chr(code) for code in range(sys.maxunicode + 1) if not 0xD800 <= code < 0xE000]
SOME = [character for i, character in enumerate(SOME) if changes(character) or i % 97 == 0]
"""All of Unicode that normalisers do something to, and each 97th other code point: the others are alike."""
