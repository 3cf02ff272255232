"""Tiny tokenizers with the chat templates met in the wild, and a source of twelve rows."""

from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from moslim.data.types import Example, Source, Split

TURN = "<|{{ m['role'] }}|>{{ m['content'] }}<|end|>"
WITH_SYSTEM = "{% for m in messages %}" + TURN + "{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
REFUSES_SYSTEM = (
    "{% for m in messages %}{% if m['role'] == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
    + TURN
    + "{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
DROPS_SYSTEM = (
    "{% for m in messages %}{% if m['role'] != 'system' %}"
    + TURN
    + "{% endif %}{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
WORDS = "you are kind how to brew tea boil water a b c d e f g h low mid high short warm size heat Preferences : , . ?"
SPECIAL = ["<|pad|>", "<|unk|>", "<|end|>", "<|system|>", "<|user|>", "<|assistant|>"]


def build_tokenizer(chat_template: str | None) -> PreTrainedTokenizerFast:
    words = [*SPECIAL, *WORDS.split(), "[[", "]]"]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<|unk|>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<|pad|>",
        unk_token="<|unk|>",
        eos_token="<|end|>",
        additional_special_tokens=SPECIAL[3:],
    )
    fast.chat_template = chat_template
    return fast


class Rows(Source):
    """Twelve rows in training, some in other splits; (size 2, heat 1) is held out, (size 0, heat 0) cannot be."""

    def __init__(self, train: int = 12, others: int = 3) -> None:
        self.sizes = {Split.TRAIN: train}
        self.others = others

    def rows(self, kind, split, preferences, seed):
        words = "a b c d e f g h".split()
        return [
            Example(" ".join([*words[: 1 + i % 8], "?"]), "boil water", {"size": i % 3} if i % 2 else {"heat": 1})
            for i in range(self.sizes.get(split, self.others))
        ]

    def held_out(self, preference):
        return preference.levels.get("size") == 2 and preference.levels.get("heat") == 1

    def reachable(self, preference):
        return not (preference.levels.get("size") == 0 and preference.levels.get("heat") == 0)
