"""A vision-language model that is asked the questions of a prompt, or the prompt itself.

Seven ways to ask and to read the answer (`mode`). An answer that cannot be read is asked for again
and then is missing: it never counts as wrong.

Shape suffixes: N images, H x W pixels, C colour channels, R rows (one question about one image
each), V vocabulary.
"""

from __future__ import annotations

import ast
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol, Self

import torch
from pydantic import Field, PositiveInt, model_validator
from torch import Tensor

from stage_rl.prompts.questions import Question, questions_of
from stage_rl.rewards.base import ReferenceCase, Reward, RewardConfig, Score, cat_or_cup_cases
from stage_rl.rewards.pretrained import on_jpeg
from stage_rl.rewards.vlm.chat import ChatModel, Conversation, Dtype, Reply, question
from stage_rl.rewards.vlm.yes_no import NO, YES
from stage_rl.rewards.vqa import answers_from, tokens_of
from stage_rl.settings import validation_error
from stage_rl.types import Prompt

Mode = Literal[
    "token_probability",
    "yes_share",
    "reply_equals",
    "one_reply_lines",
    "binary_lists",
    "score_line",
    "read_text",
]

ASKED_ONE_BY_ONE = ("token_probability", "yes_share", "reply_equals")
"""One request for each question; the other modes send one for an image."""

PLACES = r"\{(\w+)\}"
"""What a template holds in place of prompt, questions and fields."""


class JudgeRewardConfig(RewardConfig):
    """Questions to an image-text-to-text model that has a chat template."""

    path: str
    """Folder or hub id."""
    mode: Mode
    """token_probability: the probability of the right answer's first token; yes_share: of yes
    against no; reply_equals: the reply is the right word; one_reply_lines: a line that begins with
    yes or no for each question; binary_lists: a list of 0 and 1 between <score> tags and one of
    texts between <analysis> tags; score_line: a number after "Score"; read_text: the reply is the
    text in the image."""
    template: str | None = None
    """What is asked: {question}, {questions} (one a line), {prompt} and fields of the prompt; null:
    the template of the question file."""
    system: str | None = None
    """The turn before it."""
    image_first: bool = True
    """The image stands before the text."""
    answers: tuple[str, ...] = Field(default=("Yes", "yes", " yes", " Yes"), min_length=1)
    """Spellings of the right answer, where a question has none of its own."""
    numbers: tuple[float, ...] = Field(default=(0, 1), min_length=1)
    """Of score_line: what the judge may write; the largest is a value of 1."""
    dtype: Dtype = "bfloat16"
    """Precision of the model."""
    max_new_tokens: PositiveInt = 128
    """Longest reply. A next try may be twice as long as the one before."""
    batch_size: PositiveInt = 8
    """Questions at a time."""
    tries: PositiveInt = 3
    """How often an answer that was cut off and cannot be read is asked for."""
    jpeg_quality: int | None = Field(default=None, ge=1, le=100)
    """Show the images as JPEG of this quality; null: as drawn."""

    @model_validator(mode="after")
    def _has_a_largest_number(self) -> Self:
        if max(self.numbers) <= 0:
            raise validation_error("numbers", "none is above 0; write what the judge may write")
        return self

    def unsupported_reason(self, prompt: Prompt) -> str | None:
        """Also that template or prompt lack what is asked."""
        template = self.template or prompt.metadata.get("template")
        if template is None:
            return "has no template, nor has the prompt; write one"
        known = _places(prompt, None)
        missing = [name for name in re.findall(PLACES, template) if name not in known]
        if missing:
            return f"asks for {{{missing[0]}}}, which this prompt lacks"
        if self.mode in ("one_reply_lines", "binary_lists") and not questions_of(prompt):
            return "needs questions, which this prompt lacks; take prompts of kind questions"
        if self.mode == "read_text" and not prompt.metadata.get("fields", {}).get("text"):
            return "needs fields.text, the text to be read, which this prompt lacks"
        return None

    def build(self, device: torch.device) -> Reward:
        """The reward; a model that cannot chat is a `WeightsError`."""
        model = ChatModel.load(self.path, dtype=self.dtype, device=device)
        return on_jpeg(JudgeReward(model, self), self.jpeg_quality)

    def requests(self, image: int, prompt: Prompt) -> list[Request]:
        """What is asked about an image."""
        questions = questions_of(prompt) or (Question(id=1, text=prompt.text),)
        if self.mode in ASKED_ONE_BY_ONE:
            return [Request(image, self._text(prompt, one), (one,)) for one in questions]
        answered = {"read_text": 0, "score_line": 1}.get(self.mode, len(questions))
        return [Request(image, self._text(prompt, None), questions[:answered])]

    def _text(self, prompt: Prompt, asked: Question | None) -> str:
        known = _places(prompt, asked)
        template = self.template or prompt.metadata["template"]
        return re.sub(PLACES, lambda place: known.get(place[1], place[0]), template)

    def read(self, one: Request, reply: str, prompt: Prompt) -> None:
        """Puts a reply into its request, with what it says where that can be read."""
        one.replies = [_without_thoughts(reply)]
        one.values = self._values(one, str(prompt.metadata.get("fields", {}).get("text", "")))

    def _values(self, one: Request, target: str) -> list[float] | None:
        (reply,) = one.replies
        if self.mode == "read_text":
            return [share_of_words(reply, target)]
        if self.mode == "reply_equals":
            right = one.questions[0].answers or self.answers
            return [float(reply in right)] if reply else None
        if self.mode == "score_line":
            return read_score(reply, self.numbers)
        return READERS[self.mode](reply, one.questions)

    def kept_over(self) -> frozenset[str]:
        """Of a judge that writes also how its replies are read, and how long they may be."""
        if self.mode == "token_probability":
            return frozenset({"tries", "max_new_tokens", "numbers"})
        read_anew = {"answers", "numbers", "tries"}
        # A transcription that is cut off is scored as it is.
        return frozenset(read_anew if self.mode == "read_text" else {*read_anew, "max_new_tokens"})

    def effort(self) -> int:
        """The longest reply of the last try."""
        return self.max_new_tokens * 2 ** (self.tries - 1)

    def asked_of(self, prompt: Prompt) -> Any:
        """The texts; where probabilities are read also what the right answers are."""
        requests = self.requests(0, prompt)
        if self.mode not in ("token_probability", "yes_share"):
            return [one.text for one in requests]
        return [(one.text, one.questions[0].expected, one.questions[0].answers) for one in requests]

    def reread(self, prompt: Prompt, score: Score) -> Score:
        """The score of an image by its replies; of probabilities, which have none, as it was."""
        if self.mode in ("token_probability", "yes_share"):
            return score
        requests = self.requests(0, prompt)
        for one, reply in zip(requests, score.replies, strict=True):
            self.read(one, reply, prompt)
        return _score(requests)

    def reference_cases(self) -> tuple[ReferenceCase, ...]:
        """None where the template comes with the prompts, or text is read."""
        if self.template is None or self.mode not in ASKED_ONE_BY_ONE:
            return ()
        return cat_or_cup_cases()


@dataclass
class Request:
    """One text about one image, and what came back."""

    image: int
    text: str
    questions: tuple[Question, ...]
    """Those that it asks; none where text is read."""
    values: list[float] | None = None
    """How right each answer is, in [0, 1]; None: not yet, or not readable."""
    replies: list[str] = field(default_factory=list)
    note: str = ""
    is_open: bool = True
    """Not asked yet, or cut off before it could be read."""


class Chat(Protocol):
    """What is asked: a `ChatModel`, or what stands in for one."""

    @property
    def tokenizer(self) -> Any: ...

    def next_logits_NV(self, images_NHWC: Tensor, conversations: Sequence[Conversation]) -> Tensor:
        """The logits of the first token of each reply."""
        ...

    def replies(
        self, images_NHWC: Tensor, conversations: Sequence[Conversation], *, max_new_tokens: int
    ) -> list[Reply]:
        """The reply to each conversation."""
        ...


class JudgeReward:
    """The mean of the answers to the questions about an image."""

    def __init__(self, model: Chat, settings: JudgeRewardConfig) -> None:
        self._model = model
        self._settings = settings
        if settings.mode == "yes_share":
            tokenizer = model.tokenizer
            self._yes, self._no = (tokens_of(tokenizer, words) for words in (YES, NO))

    def __call__(self, images_NHWC: Tensor, prompts: list[Prompt]) -> list[Score]:
        """One score per image: the mean of its answers, without one where any is missing.

        The extras q0, q1, ... are the answers that could be read, in the order of the questions;
        `missing` is how many could not.
        """
        asked = [self._settings.requests(n, prompt) for n, prompt in enumerate(prompts)]
        requests = [one for some in asked for one in some]
        if self._settings.mode in ("token_probability", "yes_share"):
            self._weigh(images_NHWC, requests)
        else:
            self._read(images_NHWC, requests, prompts)
        return [_score(some) for some in asked]

    def _conversations(self, requests: Sequence[Request]) -> list[Conversation]:
        settings = self._settings
        return [
            question(one.text, image_first=settings.image_first, system=settings.system)
            for one in requests
        ]

    def _weigh(self, images_NHWC: Tensor, requests: Sequence[Request]) -> None:
        """Reads the answers from the probabilities of the first token."""
        weigh = self._shares if self._settings.mode == "yes_share" else self._probabilities
        for images, some in self._batches(images_NHWC, requests):
            weigh(self._model.next_logits_NV(images, self._conversations(some)).float(), some)

    def _batches(
        self, images_NHWC: Tensor, requests: Sequence[Request]
    ) -> Iterator[tuple[Tensor, Sequence[Request]]]:
        """A few requests at a time with the image of each: all at once would be gigabytes."""
        size = self._settings.batch_size
        for first in range(0, len(requests), size):
            some = requests[first : first + size]
            yield images_NHWC[[one.image for one in some]], some

    def _replies(
        self, images_RHWC: Tensor, requests: Sequence[Request], longest: int
    ) -> Sequence[Reply]:
        """The reply to each request."""
        conversations = self._conversations(requests)
        return self._model.replies(images_RHWC, conversations, max_new_tokens=longest)

    def _shares(self, logits_RV: Tensor, requests: Sequence[Request]) -> None:
        answers = answers_from(logits_RV, self._yes, self._no)
        for one, answer in zip(requests, answers, strict=True):
            expects_no = one.questions[0].expected.lower() == "no"
            one.values = [1 - answer.yes if expects_no else answer.yes]

    def _probabilities(self, logits_RV: Tensor, requests: Sequence[Request]) -> None:
        for one, probability_V in zip(requests, logits_RV.softmax(-1), strict=True):
            tokens = self.first_tokens(one.questions[0])
            one.values = [float(probability_V[tokens].sum())]
            one.note = f" of tokens {tokens}"  # another tokenizer would have others

    def first_tokens(self, asked: Question) -> list[int]:
        """The first token of every spelling of the right answer, each once."""
        spellings = asked.answers or self._settings.answers
        encoded = [self._model.tokenizer(text, add_special_tokens=False) for text in spellings]
        return sorted({one["input_ids"][0] for one in encoded})

    def _read(
        self, images_NHWC: Tensor, requests: Sequence[Request], prompts: Sequence[Prompt]
    ) -> None:
        """Reads the answers from replies; those that were cut off are asked for again."""
        settings = self._settings
        for attempt in range(settings.tries):
            # A judge without chance repeats itself, so a next try differs in its length alone, and
            # what has ended by itself will end there again.
            longest = settings.max_new_tokens * 2**attempt
            for images, some in self._batches(images_NHWC, [o for o in requests if o.is_open]):
                for one, reply in zip(some, self._replies(images, some, longest), strict=True):
                    settings.read(one, reply.text, prompts[one.image])
                    one.is_open = one.values is None and reply.is_cut


def read_lines(reply: str, questions: Sequence[Question]) -> list[float] | None:
    """Of a line that begins with yes or no for each question, whether it is the expected word
    (TIIF-Bench); None unless there are as many.
    """
    words = re.findall(r"(?im)^[^\S\n]*(yes|no)\b", reply)
    if len(words) != len(questions):
        return None
    pairs = zip(words, questions, strict=True)
    return [float(word.lower() == one.expected.lower()) for word, one in pairs]


def read_list(reply: str, questions: Sequence[Question]) -> list[float] | None:
    """The list of 0 and 1 between <score> tags, where one as long stands between <analysis> tags
    (UniGenBench++); None where they are others.
    """
    analysis, values = (_tagged_list(reply, tag) for tag in ("analysis", "score"))
    if analysis is None or values is None or not len(analysis) == len(values) == len(questions):
        return None
    if any(value not in (0, 1) for value in values):
        return None
    return [float(value) for value in values]


def _tagged_list(reply: str, tag: str) -> list[Any] | None:
    found = re.search(rf"<{tag}>(.*?)</{tag}>", reply, re.DOTALL)
    try:
        values = ast.literal_eval(found[1].strip()) if found else None
    except (ValueError, SyntaxError):
        return None
    return values if isinstance(values, list) else None


READERS: Mapping[str, Callable[[str, Sequence[Question]], list[float] | None]] = {
    "one_reply_lines": read_lines,
    "binary_lists": read_list,
}


def read_score(reply: str, numbers: Sequence[float]) -> list[float] | None:
    """The number after "Score", else the only line that is a number (WISE), over the largest one;
    None where there is none of those that may be written.
    """
    found = re.search(r"(?i)score[*\s]*[::]?[*\s]*(\d+(?:\.\d+)?)", reply)
    alone = re.findall(r"(?m)^\s*(\d+(?:\.\d+)?)\s*$", reply)
    text = found[1] if found else alone[0] if len(alone) == 1 else None
    if text is None or float(text) not in numbers:
        return None
    return [float(text) / max(numbers)]


def share_of_words(reply: str, target: str) -> float:
    """The share of a target's words that were read, capitals and marks aside."""
    read, wanted = (" ".join(re.findall(r"\w+", text.lower())) for text in (reply, target))
    matched, total = matched_words(wanted, read)
    return matched / total if total else 0.0


def matched_words(target: str, read: str) -> tuple[int, int]:
    """How many words of a target were read, each as often as it was, and how many it has."""
    words = target.split()
    return (Counter(words) & Counter(read.split())).total(), len(words)


def _places(prompt: Prompt, asked: Question | None) -> dict[str, str]:
    """What may stand in a template, by name."""
    questions = questions_of(prompt) or (Question(id=1, text=prompt.text),)
    fields = {name: str(value) for name, value in prompt.metadata.get("fields", {}).items()}
    return {
        **fields,
        "prompt": prompt.text,
        "question": (asked or questions[0]).text,
        "questions": "\n".join(one.text for one in questions),
    }


def _without_thoughts(reply: str) -> str:
    return re.sub(r"(?s)^.*</think>", "", reply).strip()


def _score(requests: Sequence[Request]) -> Score:
    """The score of an image from all that was asked about it."""
    asked = [(one, place) for one in requests for place in range(len(one.questions))]
    extras = {
        f"q{number}": one.values[place]
        for number, (one, place) in enumerate(asked)
        if one.values is not None
    }
    missing = len(asked) - len(extras)
    extras["missing"] = float(missing)
    replies = tuple(reply for one in requests for reply in one.replies)
    if missing:
        return Score(None, f"{missing} of {len(asked)} answers cannot be read", extras, replies)
    values = [value for one in requests for value in one.values or ()]
    said = ", ".join(
        f"{one.questions[place].text} {extras[f'q{number}']:.2f}{one.note}"
        for number, (one, place) in enumerate(asked)
    )
    why = said or f"reads '{' '.join(replies)}'"
    return Score(sum(values) / len(values), why, extras, replies)
