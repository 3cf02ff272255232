"""Encoding of questions, instructions and answers. All prompts are made here."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from moslim.data.encoding import ChatEncoder, Frame, without_start
from moslim.data.sanitizing import ForbiddenText, TakenOut
from moslim.data.types import Message, Question
from moslim.instructions import PreferenceInstruction, instruction_forms
from moslim.preferences import Preference, PreferenceSet
from moslim.utils.errors import UsageError, quoted

_ROLES = ("system", "user", "assistant")


def as_messages(question: Question) -> list[Message]:
    """Returns a question as a chat.

    Raises:
        UsageError: The question is neither text nor a chat, or the chat is empty, has an unknown role, lacks text or
            does not end with a user turn.
    """
    if isinstance(question, str):
        return [{"role": "user", "content": question}]
    if not isinstance(question, list):
        raise UsageError(f"the question is {quoted(question)}: give a text or a list of messages")
    messages = list(question)
    for i, message in enumerate(messages):
        known = isinstance(message, dict) and message.get("role") in _ROLES
        if not known or not isinstance(message.get("content"), str):
            raise UsageError(
                f"message {i} of a question is {quoted(message)}: it needs a role of {_ROLES} and a text as content"
            )
    if not messages or messages[-1]["role"] != "user":
        raise UsageError(
            f"a question must end with a user turn, but the roles are {quoted([m['role'] for m in messages])}"
        )
    return messages


def usable_messages(question: Question, encoder: ChatEncoder) -> list[Message]:
    """Returns the cleaned messages of a question.

    Raises:
        UsageError: The question is invalid (:func:`as_messages`), or a user turn is empty.
    """
    messages = as_messages(question)
    for i, message in enumerate(messages):
        if message["role"] == "user" and not _is_said(encoder.clean(message["content"])):
            turn = "the question" if len(messages) == 1 else f"message {i}, a user turn,"
            why = " once what reads as a control token, a turn or an instruction is taken out"
            raise UsageError(
                f"{turn} is empty{why if _is_said(message['content']) else ''}: fill it, or leave the row out"
            )
    return as_messages(encoder.question(question))


def _is_said(text: str) -> bool:
    """Whether a text is more than white space and characters without width."""
    return bool("".join(text.split()).strip("\0\u00ad\u200b\u200c\u200d\u2060\ufeff"))


def pad_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """Returns the id of padding, or the end token if there is none: attention masks are always explicit."""
    return tokenizer.pad_token_id if tokenizer.pad_token_id is not None else end_id(tokenizer)


def end_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """Returns the id that ends an answer: the end-of-sequence token, or the separator of an encoder.

    Raises:
        UsageError: The tokenizer has neither.
    """
    for token in (tokenizer.eos_token_id, tokenizer.sep_token_id):
        if token is not None:
            return token
    raise UsageError("the tokenizer has no end-of-sequence token, so no answer can end: set tokenizer.eos_token")


def instruction_patterns(instruction: PreferenceInstruction, preferences: PreferenceSet) -> tuple[ForbiddenText, ...]:
    """Returns the patterns that read as an instruction and are removed from questions and answers."""
    strings = [
        pattern for text in instruction.reserved for pattern in (ForbiddenText(text), ForbiddenText(text, match="form"))
    ]
    forms = instruction_forms(instruction, preferences)
    return (*strings, *(ForbiddenText(text, left, "form") for text, left in forms.items()))


class PromptRenderer:
    """Renderer of the prompts of training, evaluation and generation.

    Args:
        tokenizer: Tokenizer of the policy.
        instruction: Instruction that writes a preference into a chat.
        preferences: Dimensions in use.
        max_length: Most tokens of a prompt. A longer question is cut from its start; the instruction is kept.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        instruction: PreferenceInstruction,
        preferences: PreferenceSet,
        max_length: int | None = None,
    ) -> None:
        self.tokenizer = tokenizer
        self.instruction = instruction
        self.preferences = preferences
        self.max_length = max_length
        self.encoder = ChatEncoder(tokenizer, around(tokenizer), instruction_patterns(instruction, preferences))
        self._cutter = _Cutter(max_length, Truncation(), self.encoder)
        self._room = _Room(max_length, self.encoder)
        self._longest = Preference(
            {
                d.name: max(range(len(d.levels)), key=lambda level: len(self.encoder.texts([d.levels[level]])[0]))
                for d in preferences.dimensions
            }
        )

    def question(self, question: Question) -> Question:
        """Returns the question, as text or messages, without control tokens, turns and instructions."""
        return self.encoder.question(question)

    def messages(self, question: Question, preference: Preference) -> list[Message]:
        """Returns the chat with its instruction, not cut to ``max_length``."""
        return self.encoder.fit_roles(self._instructed(as_messages(self.question(question)), preference))

    def ids(self, question: Question, preference: Preference) -> list[int]:
        """Returns the token ids of the prompt, at most ``max_length``.

        Raises:
            UsageError: Instruction and chat template alone are longer than ``max_length``.
        """
        messages = as_messages(self.question(question))
        return self._cutter(messages, lambda cut: self.encoder.prompt(self._instructed(cut, preference)))

    def check(self, question: Question, preference: Preference | None = None) -> bool:
        """Checks a question, and returns whether text is removed from it.

        Args:
            question: Question, or the chat so far.
            preference: Requested levels; None = the longest level of every dimension.

        Raises:
            UsageError: The question makes no valid prompt, or ``max_length`` leaves no room for it.
        """
        messages = usable_messages(question, self.encoder)
        levels = self._longest if preference is None else preference
        self.encoder.render(self._instructed(messages, levels))
        self._room.check(messages, lambda bare: self.encoder.prompt(self._instructed(bare, levels)), levels)
        return messages != as_messages(question)

    def _instructed(self, messages: list[Message], preference: Preference) -> list[Message]:
        return self.instruction.render(messages, preference, self.preferences)


@dataclass
class Truncation:
    """Counts of texts that are cut to fit a length.

    Args:
        pairs: Encoded question-answer pairs.
        questions: Questions that are cut from their start, or dropped.
        answers: Answers that are cut from their start.
    """

    pairs: int = 0
    questions: int = 0
    answers: int = 0

    def __str__(self) -> str:
        return f"of {self.pairs} pairs, {self.questions} questions and {self.answers} answers were cut from their start"


class PairEncoder:
    """Encoder of question-answer pairs for the classifier and for language modelling.

    Questions and answers are sanitised, since a policy could forge an instruction in its completion. The prompt has an
    instruction only if a preference is given.

    Args:
        tokenizer: Tokenizer of the model that reads the pairs.
        max_length: Most tokens of a pair. The question is cut from its start, and then the answer if necessary; the end
            of the answer is always kept.
        instruction: Patterns that read as an instruction and are removed, besides control tokens and turns.
        instruct: Function that writes a preference into a sanitised chat; required if preferences are given.

    Attributes:
        encoder: Encoder of chats and texts.
        truncation: Counts of pairs and of cut texts.
        taken_out: Count of questions from which text was removed.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        max_length: int | None = None,
        instruction: Sequence[ForbiddenText] = (),
        instruct: Callable[[list[Message], Preference], list[Message]] | None = None,
    ) -> None:
        self.tokenizer = tokenizer
        self.max_length = max_length
        self._instruct = instruct
        self.truncation = Truncation()
        self.taken_out = TakenOut()
        self._frame = around(tokenizer)
        self.encoder = ChatEncoder(tokenizer, self._frame, instruction)
        self._cutter = _Cutter(max_length, self.truncation, self.encoder)
        self._room = _Room(max_length, self.encoder)
        self._last: tuple[Question, list[Message], list[int]] | None = None

    def check(self, question: Question, *answers: str, preference: Preference | None = None) -> bool:
        """Checks a question and its answers, and returns whether text is removed from any of them.

        Raises:
            UsageError: The question makes no valid prompt, or its system message or instruction fills ``max_length``.
        """
        messages = usable_messages(question, self.encoder)
        self.encoder.render(self._shown(messages, preference))
        if preference or messages[0]["role"] == "system":
            self._room.check(messages, lambda bare: [*self._ids(bare, preference), end_id(self.tokenizer)], preference)
        return messages != as_messages(question) or any(self.encoder.clean(answer) != answer for answer in answers)

    def spans(
        self, question: Question, answer: str, preference: Preference | None = None
    ) -> tuple[list[int], list[int]]:
        """Returns the token ids of the prompt, and of the answer with its end token; together at most ``max_length``.

        Args:
            question: Question, or the chat so far.
            answer: Answer to it.
            preference: Levels that the prompt requests; None = no instruction.
        """
        return self.many_spans([question], [answer], preference)[0]

    def many_spans(
        self, questions: Sequence[Question], answers: Sequence[str], preference: Preference | None = None
    ) -> list[tuple[list[int], list[int]]]:
        """Returns :meth:`spans` of ``N`` pairs, tokenised in one call."""
        unique = list(dict.fromkeys(answers))
        ids = dict(zip(unique, self.encoder.texts([self.encoder.clean(answer) for answer in unique]), strict=True))
        ends = [[*ids[answer], end_id(self.tokenizer)] for answer in answers]
        return [self._fit(question, end, preference) for question, end in zip(questions, ends, strict=True)]

    def _shown(self, messages: list[Message], preference: Preference | None) -> list[Message]:
        """Returns the chat, with the instruction of the preference if there is one."""
        if not preference:
            return messages
        assert self._instruct is not None, "a preference needs an encoder with `instruct`"
        return self._instruct(messages, preference)

    def _ids(self, messages: list[Message], preference: Preference | None) -> list[int]:
        return self.encoder.prompt(self._shown(messages, preference))

    def _fit(self, question: Question, end: list[int], preference: Preference | None) -> tuple[list[int], list[int]]:
        messages, prompt = self._prompt(question)
        if preference:
            prompt = self._ids(messages, preference)
        self.truncation.pairs += 1
        if self.max_length is None or len(prompt) + len(end) <= self.max_length:
            return prompt, end
        try:
            ids = self._cutter(messages, lambda cut: self._ids(cut, preference) + end)
        except ValueError:
            if preference:
                return self._instruction_alone(messages, end, self.max_length, preference)
            return self._without_question(messages, end, self.max_length)
        return ids[: -len(end)], end

    def _instruction_alone(
        self, messages: list[Message], end: list[int], most: int, preference: Preference
    ) -> tuple[list[int], list[int]]:
        """Returns the prompt without its question, and the end of the answer that fits.

        Raises:
            UsageError: The instruction leaves no room. :meth:`check` raises it earlier if rows are checked.
        """
        prompt = self._ids(without_start(messages, None, self.encoder.least), preference)
        if len(prompt) >= most:
            raise UsageError(
                f"the prompt without its question takes {len(prompt)} tokens, which leaves no room for an answer in "
                f"{most}: raise max_length or shorten the instruction or system message"
            )
        self.truncation.questions += 1
        self.truncation.answers += 1
        return prompt, self._last_tokens(end, most - len(prompt))

    def _without_question(self, messages: list[Message], end: list[int], most: int) -> tuple[list[int], list[int]]:
        """Returns the ends of prompt and answer that fit; the first special token of an encoder is kept."""
        prompt = self.encoder.prompt(without_start(messages, None, self.encoder.least, system=True))
        first = self._frame[0] if self.tokenizer.chat_template is None else []
        room = most - len(first)
        self.truncation.questions += 1
        self.truncation.answers += len(end) > room
        rest = prompt[len(first) :]
        remaining = max(0, room - len(end))
        return first + rest[max(0, len(rest) - remaining) :], self._last_tokens(end, room)

    def _last_tokens(self, end: list[int], room: int) -> list[int]:
        """Returns the last tokens of an answer, cleaned again: cutting the start can expose a forbidden pattern."""
        kept = end[max(0, len(end) - room) :]
        while kept != end and len(kept) > 1:
            text = str(self.tokenizer.decode(kept[:-1], skip_special_tokens=True))
            clean = self.encoder.clean(text)
            shorter = [*self.encoder.texts([clean])[0], end[-1]][-room:]
            if clean == text or len(shorter) >= len(kept):
                break
            kept = shorter
        return kept

    def _prompt(self, question: Question) -> tuple[list[Message], list[int]]:
        """Returns the sanitised question and its ids, uncut. Caches the last question, which often repeats."""
        if self._last is None or self._last[0] != question:
            messages = as_messages(self.encoder.question(question))
            if messages != as_messages(question):
                self.taken_out.add(quoted(question))
            self._last = (question, messages, self.encoder.prompt(messages))
        return self._last[1], self._last[2]

    def encode(self, question: Question, answer: str, preference: Preference | None = None) -> list[int]:
        """Returns the token ids of a pair: prompt, answer, end token."""
        prompt, end = self.spans(question, answer, preference)
        return prompt + end

    def batch(self, questions: Sequence[Question], answers: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Returns input ids and attention mask ``[B, T]`` of ``B`` pairs, right-padded."""
        sequences = [prompt + end for prompt, end in self.many_spans(questions, answers)]
        return pad(sequences, pad_id(self.tokenizer), left=False)


def pad(rows: Sequence[Sequence[int]], value: int, left: bool) -> tuple[Tensor, Tensor]:
    """Returns ids and attention mask ``[B, T]`` int64, padded on one side with ``value``."""
    width = max(map(len, rows))
    ids = torch.full((len(rows), width), value, dtype=torch.long)
    mask = torch.zeros(len(rows), width, dtype=torch.long)
    for i, row in enumerate(rows):
        span = slice(width - len(row), width) if left else slice(0, len(row))
        ids[i, span] = torch.tensor(row, dtype=torch.long)
        mask[i, span] = 1
    return ids, mask


class _Cutter:
    """Cuts a question from its start until its encoding fits. Counts the cut questions and warns of the first one.

    The rest is cleaned again, since some patterns are forbidden only at the start of a line or of a word.
    """

    def __init__(self, max_length: int | None, truncation: Truncation, encoder: ChatEncoder) -> None:
        self.max_length = max_length
        self._truncation = truncation
        self._encoder = encoder
        self._least = encoder.least

    def __call__(self, messages: list[Message], encode: Callable[[list[Message]], list[int]]) -> list[int]:
        ids = encode(messages)
        if self.max_length is None or len(ids) <= self.max_length:
            return ids
        fewest, most = 1, sum(len(m["content"]) for m in messages if m["role"] != "system")
        shortest = encode(without_start(messages, None, self._least))
        if len(shortest) > self.max_length:
            raise UsageError(
                f"without any question the text already takes {len(shortest)} tokens, more than max_length = "
                f"{self.max_length}: raise max_length or shorten the instruction or system message"
            )
        if self._truncation.questions == 0:
            warnings.warn(
                f"a question is cut from its start to fit max_length = {self.max_length} tokens "
                f"(it takes {len(ids)}); later ones are only counted",
                stacklevel=3,
            )
        self._truncation.questions += 1
        ids = shortest
        while fewest < most:  # binary search, assuming that more characters never shorten the encoding
            middle = (fewest + most) // 2
            shorter = encode(self._without_start(messages, middle))
            if len(shorter) <= self.max_length:
                most, ids = middle, shorter
            else:
                fewest = middle + 1
        return ids

    def _without_start(self, messages: list[Message], characters: int) -> list[Message]:
        cut = as_messages(self._encoder.question(without_start(messages, characters, self._least)))
        bare = without_start(messages, None, self._least)
        return [kept if len(kept["content"].strip()) >= self._least else b for kept, b in zip(cut, bare, strict=True)]


class _Room:
    """Check that system message, instruction and template of a chat leave room for the question."""

    def __init__(self, max_length: int | None, encoder: ChatEncoder) -> None:
        self.max_length = max_length
        self._encoder = encoder
        self._taken: dict[Hashable, int] = {}

    def check(
        self,
        messages: list[Message],
        encode: Callable[[list[Message]], list[int]],
        preference: Preference | None = None,
    ) -> None:
        """Encodes the part of a chat that cannot be cut, once for all chats that share it.

        Raises:
            UsageError: This part fills ``max_length``.
        """
        if self.max_length is None:
            return
        fixed = tuple((m["role"], m["content"] if m["role"] == "system" else "") for m in messages)
        key = fixed, None if preference is None else tuple(preference.levels.items())
        if key not in self._taken:
            self._taken[key] = len(encode(without_start(messages, None, self._encoder.least)))
        if self._taken[key] >= self.max_length:
            raise UsageError(
                f"without any question the text already takes {self._taken[key]} of max_length = {self.max_length} "
                "tokens, which leaves no room: raise max_length or shorten the instruction or system message"
            )


def around(tokenizer: PreTrainedTokenizerBase) -> Frame:
    """Returns the special ids that a tokenizer puts before a text, and between two texts.

    Before: the beginning-of-sequence token, or the classification token of an encoder. Between: the separators of an
    encoder, so that a pair reads ``[CLS] question [SEP] answer [SEP]``; empty for tokenizers without a final separator.
    """
    text, bare = tokenizer("a")["input_ids"], tokenizer("a", add_special_tokens=False)["input_ids"]
    if not text:  # the tokenizer drops this letter
        return [], []
    before = text[:1] if text[0] in (tokenizer.bos_token_id, tokenizer.cls_token_id) else []
    if text[-1] != tokenizer.sep_token_id:
        return before, []
    pair = tokenizer("a", "a")["input_ids"]
    return before, pair[len(before) + len(bare) : -len(bare) - 1] or text[-1:]
