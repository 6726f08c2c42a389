"""Noun phrases of a prompt by closed word lists, where no parser is at hand.

T2I-CompBench takes its phrases from a statistical parser whose model no package index has. These
rules agree with what such a parser finds on prompts of the kind "a green bench and a blue bowl";
in longer sentences they can differ, and the benchmark says so.
"""

from __future__ import annotations

import re


def _words(*lines: str) -> frozenset[str]:
    return frozenset(" ".join(lines).split())


MAX_PHRASES = 8
LEFT_OUT = frozenset({"top", "the top", "the side", "the left", "the right", "the bottom"})
"""Parts of a relation, which are no things to be seen."""
DETERMINERS = _words(
    "a an the this that these those its their his her my our your some each every both"
)
BREAKS = _words(
    "and or but while as than with without of in on at to from by for near next onto into over",
    "under above below behind beside between against across along around through inside",
    "outside beneath underneath among upon off up down beyond toward towards within amongst",
    "alongside throughout atop during after before amid past",
    "is are was were be been being has have had do does did can could will would should may",
    "might it they he she there here which who where when whose what not just also very so",
    "together too front back",
)
"""Words that are in no noun phrase: prepositions, conjunctions, auxiliaries, pronouns, adverbs."""
VERBS = _words(
    "sat sits sit stood stands stand shone shines hung hangs hang flew flies fly lay lies lie",
    "held holds hold ran runs run swam swims sped blew blows swung rose rises fell falls led",
    "grew grows sank made makes make cast casts cut gave gives give took takes rests rest",
    "leans lean drives drove rode rides met sleeps slept kept keeps wore wears sang spun",
    "stung clung swept spread spreads contrasts contrast complements complement provide",
    "provides adds add creates create cover covers adorn adorns fills fill surrounds looks",
)
"""Finite verbs that no ending gives away."""
THINGS = _words(
    "painting building ceiling ring earring string spring wing king swing railing bedding",
    "clothing lighting icing thing topping frosting stuffing wrapping pudding morning evening",
    "butterfly family jelly belly dragonfly assembly seaweed",
)
"""Nouns that end like a verb or an adverb."""


def noun_phrases(text: str) -> list[str]:
    """At most eight noun phrases in small letters, in order: ["a green bench", "a blue bowl"]."""
    phrases: list[str] = []
    for clause in re.split(r"[.,;:!?]+", text.lower()):
        phrases += _of_clause(re.findall(r"[^\W_]+(?:['’-][^\W_]+)*", clause))
    seen = [phrase for phrase in phrases if phrase not in LEFT_OUT]
    return seen[:MAX_PHRASES]


def _of_clause(words: list[str]) -> list[str]:
    phrases: list[str] = []
    current: list[str] = []
    for spoken, after in zip(words, [*words[1:], ""], strict=False):
        ends = _is_outside(spoken, after, open_phrase=bool(current))
        if (ends or spoken in DETERMINERS) and current:
            phrases.append(" ".join(current))
            current = []
        if not ends:
            current.append(spoken)
    phrases += [" ".join(current)] if current else []
    # A determiner alone, as in "this is", names nothing.
    return [phrase for phrase in phrases if phrase not in DETERMINERS]


def _is_outside(word: str, after: str, *, open_phrase: bool) -> bool:
    """Whether a word ends a phrase: a closed-class word, an adverb, or a verb."""
    if word in BREAKS:
        return True
    thing_follows = after and after not in BREAKS and after not in DETERMINERS
    if word in VERBS:
        # "a blue rose and ..." and "a trophy stand" are things.
        return open_phrase and after not in ("", "and", "or", "but")
    ending = len(word) > 4 and word.endswith(("ed", "ly", "ing"))
    return ending and word not in THINGS and not thing_follows
