"""Tasks of RULER's forms (arXiv 2404.06654), made from seeds: needles among others like them, chains of variables.

A cache may read a text fluently and still lose one number in it. Both tasks ask for such numbers and names, in
contexts of any length; a sample's mark is the share of what was asked for that the answer holds.
"""

from __future__ import annotations

import dataclasses
import functools
import random
import re
import string
from collections.abc import Callable, Sequence
from typing import ClassVar, Literal, NamedTuple

import numpy as np

from kvjax.caches import fields
from kvjax.checks import check_whole
from kvjax.errors import KvjaxError
from kvjax.evaluate.answers import Answers, Writing
from kvjax.evaluate.task import Figure, Task
from kvjax.evaluate.text import load_text

NOISE = ("The grass is green.", "The sky is blue.", "The sun is yellow.", "Here we go.", "There and back again.")
ADJECTIVES = """
amber ancient bitter bright brittle broken calm clever crooked curious distant dusty eager early faded fierce frozen
gentle golden hidden hollow humble icy idle jagged jolly keen lazy lonely lucky mellow misty modest narrow nimble
noble orange patient plain polite proud quiet rapid rough royal rusty scarlet secret shallow silent silver sleepy
slender solid spicy steady stormy sturdy sudden tender timid velvet violet wild
"""
NOUNS = """
anchor apple arrow barrel basket beacon bell blanket bottle bridge bucket candle canyon carpet castle chimney clock
cottage curtain desert dragon engine feather fiddle forest fountain garden glacier hammer harbor island jacket
kettle ladder lantern meadow mirror mountain needle orchard paddle pebble pencil pillow planet pocket quarry rabbit
ribbon river saddle shadow spider statue temple thunder tunnel turtle valley village walnut whistle window
"""
ROOM = 64  # tokens of an answer, the same for both tasks: one program writes them
MOST = 1000  # of samples, chains and variables
KEYS = [f"{adjective}-{noun}" for adjective in ADJECTIVES.split() for noun in NOUNS.split()]


class Sample(NamedTuple):
    """What is asked once: a question, how its answer begins, and what the answer must hold."""

    question: str
    answer: str
    wanted: list[str]


def marks(texts: Sequence[str], samples: Sequence[Sample]) -> list[float]:
    """Of what each sample asks for, the share that its text holds, whatever the case (RULER's string_match_all)."""
    pairs = zip(texts, samples, strict=True)
    return [sum(w.lower() in text.lower() for w in sample.wanted) / len(sample.wanted) for text, sample in pairs]


@dataclasses.dataclass(frozen=True)
class Needle(Task):
    """Numbers of several keys lie in a text, and the number of one key is asked for (RULER's multikey needle).

    Attributes:
      context: tokens of a sample, its answer included.
      keys: how many numbers lie in the text, where it does not consist of them.
      haystack: what they lie in: sentences that repeat; the demo essays; or `needles`, where all the text is others
        like them, so that only the key says which is meant.
      samples: how many are asked.
      seed: what they are drawn with.
    """

    form: ClassVar[str] = "needle"
    context: int = 1024
    keys: int = 4
    haystack: Literal["noise", "essays", "needles"] = "noise"
    samples: int = 20
    seed: int = 0

    def __post_init__(self) -> None:
        """Raises KvjaxError for settings that make no sample."""
        fields.check(self)
        check_whole(f"{self}: keys", self.keys, 1, len(KEYS))
        check_whole(f"{self}: samples", self.samples, 1, MOST)

    def make(self, draw: random.Random, sentences: int) -> Sample:
        """A sample whose haystack has so many sentences; more draw the same needles."""
        keys = iter(draw.sample(KEYS, len(KEYS)))
        needles = [_hide(next(keys), draw) for _ in range(self.keys)]
        key, number, _ = needles[0]
        places = [draw.random() for _ in needles]
        if self.haystack == "needles":
            filler = [_hide(other, draw)[2] for other, _ in zip(keys, range(sentences), strict=False)]
        else:
            filler = _filler(self.haystack, sentences)
        text = " ".join(_insert(filler, [sentence for *_, sentence in needles], places))
        question = (
            "Some special magic numbers are hidden within the following text. Make sure to memorize it. I will quiz"
            f" you about the numbers afterwards.\n{text}\nWhat is the special magic number for {key} mentioned in the"
            " provided text?"
        )
        return Sample(question, f" The special magic number for {key} mentioned in the provided text is", [number])

    def figures(self, answers: Answers) -> list[Figure]:
        return _figures(self, answers, self.make)


@dataclasses.dataclass(frozen=True)
class Tracking(Task):
    """A variable gets a number, others get its value one after the other; all that have it are asked for.

    Attributes:
      context: tokens of a sample, its answer included.
      chains: how many chains of variables; one is asked for.
      hops: how often a chain's value is handed on.
      samples: how many are asked.
      seed: what they are drawn with.
    """

    form: ClassVar[str] = "tracking"
    context: int = 1024
    chains: int = 1
    hops: int = 4
    samples: int = 20
    seed: int = 0

    def __post_init__(self) -> None:
        """Raises KvjaxError for settings that make no sample."""
        fields.check(self)
        for name in ("chains", "samples"):
            check_whole(f"{self}: {name}", getattr(self, name), 1, MOST)
        check_whole(f"{self}: chains times hops + 1", self.chains * (self.hops + 1), 1, MOST)

    def make(self, draw: random.Random, sentences: int) -> Sample:
        """A sample whose haystack has so many sentences, behind a short one that is solved."""
        example, solved = self._ask(draw, len(NOISE))
        question, names = self._ask(draw, sentences)
        answer = " Answer: The variables that are assigned this value in the text above are:"
        return Sample(f"{example}{answer} {', '.join(solved)}\n\n{question}", answer, names)

    def _ask(self, draw: random.Random, sentences: int) -> tuple[str, list[str]]:
        """A question, and the names that answer it."""
        chains = [_chain(draw, self.hops) for _ in range(self.chains)]
        places = [place for _ in chains for place in sorted(draw.random() for _ in range(self.hops + 1))]
        said = [sentence for _, _, sentences in chains for sentence in sentences]
        text = " ".join(_insert(_filler("noise", sentences), said, places))
        number, names, _ = chains[0]
        question = (
            f"Memorize and track the chain(s) of variable assignment hidden in the following text.\n\n{text}\n"
            f"Question: Find all variables that are assigned the value {number} in the text above."
        )
        return question, names

    def figures(self, answers: Answers) -> list[Figure]:
        return _figures(self, answers, self.make)


def _hide(key: str, draw: random.Random) -> tuple[str, str, str]:
    """A key, its number and the sentence that says so."""
    number = str(draw.randrange(1_000_000, 10_000_000))
    return key, number, f"One of the special magic numbers for {key} is: {number}."


def _chain(draw: random.Random, hops: int) -> tuple[str, list[str], list[str]]:
    """A number, the variables that get it, and the sentences that say so, in order."""
    number = str(draw.randrange(10_000, 100_000))
    names = ["".join(draw.choices(string.ascii_uppercase, k=5)) for _ in range(hops + 1)]
    sources = [number, *(f"VAR {name}" for name in names)]
    return number, names, [f"VAR {name} = {source}." for name, source in zip(names, sources, strict=False)]


def _filler(haystack: str, sentences: int) -> list[str]:
    source = NOISE if haystack == "noise" else _essays()
    return [source[i % len(source)] for i in range(sentences)]


@functools.cache
def _essays() -> list[str]:
    """The sentences of the demo text."""
    return [
        sentence for part in load_text("demo").split("\n") for sentence in re.split(r"(?<=[.!?]) +", part) if sentence
    ]


def _insert(filler: Sequence[str], sentences: Sequence[str], places: Sequence[float]) -> list[str]:
    """The filler with sentences at places from 0 (first) to 1 (last); what falls together keeps the places' order."""
    placed = sorted(zip(places, sentences, strict=True))
    own = [(int(place * (len(filler) + 1)), 0, order, text) for order, (place, text) in enumerate(placed)]
    return [text for *_, text in sorted([*own, *((i, 1, 0, text) for i, text in enumerate(filler))])]


def _figures(task: Needle | Tracking, answers: Answers, make: Callable[[random.Random, int], Sample]) -> list[Figure]:
    samples = fitted(task, answers.encode, make, answers.model.config.max_positions)
    prompts = [answers.encode(sample.question, sample.answer) for sample in samples]
    found = marks(answers.texts(prompts, Writing(ROOM)), samples)
    return [Figure.of(str(task), "found", np.array([found]))]


def fitted(
    task: Needle | Tracking,
    encode: Callable[[str, str], Sequence[int]],
    make: Callable[[random.Random, int], Sample],
    most: int,
) -> list[Sample]:
    """The samples, each as long as the context allows.

    Args:
      task: how many samples, their seed and context.
      encode: token ids of a question and the beginning of its answer.
      make: a sample of a source of draws and a number of sentences.
      most: tokens that the model reads.

    Raises:
      KvjaxError: the context is longer than that, or too short for what is asked.
    """
    if task.context > most:
        raise KvjaxError(f"{task}: context={task.context}; expected at most the model's {most}")

    def sample(number: int, sentences: int) -> tuple[Sample, int]:
        made = make(random.Random(f"{task.form} {task.seed} {number}"), sentences)
        return made, len(encode(made.question, made.answer)) + ROOM

    least, above = 0, task.context
    while least + 1 < above:  # the first sample is searched by halves, the others are about as long
        middle = (least + above) // 2
        least, above = (middle, above) if sample(0, middle)[1] <= task.context else (least, middle)
    made = []
    for number in range(task.samples):
        sizes = (sample(number, sentences) for sentences in range(least, -1, -1))
        fits = next((one for one, tokens in sizes if tokens <= task.context), None)
        if fits is None:
            raise KvjaxError(f"{task}: context={task.context}; expected at least {sample(number, 0)[1]}")
        made.append(fits)
    return made
