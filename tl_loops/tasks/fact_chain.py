"""The task of the embedded model: follow k facts that stand in the context, one hop per iteration.

A prompt lists facts in random order and asks where a chain of them leads::

    Eve likes Bob . Ann likes Eve . Bob likes Dan . ... 2 hops from Ann :

Two hops from Ann are Ann → Eve → Bob, so the answer is ``Bob``. After ``t`` iterations a model that
takes one hop per iteration is at the person min(t, k) hops away. Every word is one token.

Everybody in a prompt is the subject of exactly one fact, and whom they like is drawn at random; so
neither where a fact stands nor who lacks a fact tells the answer. The prompts of the two splits are
about different groups of people (:func:`split_of`).
"""

import hashlib
import random
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal, get_args

Split = Literal["train", "held_out"]
Fact = tuple[str, str]

SPECIAL_TOKENS = ("<bos>", "<eos>", "<pad>", "<unk>")
NAMES = tuple(
    "Ann Bob Cid Dan Eve Fay Gus Hal Ida Joe Kim Leo Mia Ned Pam Ray Sue Tom Val Zoe".split()
)
_WORDS_IN_A_FACT = 4
_HELD_OUT_ONE_IN = 10


@dataclass(frozen=True)
class FactChainTask:
    """Sizes of the task; the defaults are those that the embedded model was trained on.

    Attributes:
        n_people: People in a prompt, and therefore facts.
        max_hops: Hops that a question asks for at most.
        names: Whom the people are drawn from.

    Raises:
        ValueError: A chain of ``max_hops`` different hops does not fit, names repeat, or there are
            too few of them.
    """

    n_people: int = 10
    max_hops: int = 6
    names: tuple[str, ...] = NAMES

    def __post_init__(self) -> None:
        if self.max_hops < 1:
            raise ValueError(f"max_hops must be at least 1, got {self.max_hops}")
        if self.n_people < self.max_hops + 1:
            raise ValueError(
                f"n_people={self.n_people} is too small: a chain of max_hops={self.max_hops} hops "
                f"visits {self.max_hops + 1} people"
            )
        if len(set(self.names)) != len(self.names):
            raise ValueError("names must differ from each other")
        if self.n_people > len(self.names):
            raise ValueError(f"n_people={self.n_people} exceeds the {len(self.names)} names")


@dataclass(frozen=True)
class Prompt:
    """Facts and a question about them.

    Attributes:
        text: What the model reads, words parted by single spaces, without ``<bos>``.
        start: The person from whom the question starts.
        hops: The person after 1, 2, ..., k hops.
        facts: (who, whom they like) in the order of the text.
    """

    text: str
    start: str
    hops: tuple[str, ...]
    facts: tuple[Fact, ...]

    @property
    def n_hops(self) -> int:
        """Number of hops k that the question asks for."""
        return len(self.hops)

    @property
    def answer(self) -> str:
        """The person after all hops."""
        return self.hops[-1]

    @property
    def words(self) -> list[str]:
        """The words of the text, one per token (``<bos>`` comes in front of them)."""
        return self.text.split()

    @property
    def hop_positions(self) -> tuple[int, ...]:
        """Index into ``words`` of each hop's person, as the object of the fact that leads there.

        In the tokens of a model that prepends ``<bos>`` the position is one more.
        """
        subjects = [who for who, _ in self.facts]
        path = (self.start, *self.hops[:-1])
        return tuple(_WORDS_IN_A_FACT * subjects.index(who) + 2 for who in path)


def fact_chain_prompts(
    n: int,
    n_hops: int | None = None,
    seed: int = 0,
    split: Split = "held_out",
    task: FactChainTask | None = None,
) -> list[Prompt]:
    """Random prompts of one split.

    The start and the people after each asked hop all differ.

    Args:
        n: How many.
        n_hops: Hops that each question asks for, 1 to ``task.max_hops``; ``None``: drawn anew for
            every prompt, all equally likely.
        seed: Fixes the prompts.
        split: ``"train"`` or ``"held_out"``; see :func:`split_of`.
        task: Sizes; ``None``: those of the embedded model.

    Raises:
        ValueError: ``n`` is negative, ``n_hops`` is out of range, the split is unknown, or it has
            no group of people at these sizes.
    """
    task = FactChainTask() if task is None else task
    if n < 0:
        raise ValueError(f"n must be at least 0, got {n}")
    if n_hops is not None and not 1 <= n_hops <= task.max_hops:
        raise ValueError(f"n_hops must be between 1 and {task.max_hops}, got {n_hops}")
    if split not in get_args(Split):
        raise ValueError(f"split must be 'train' or 'held_out', got {split!r}")
    rng = random.Random(f"{split} {seed}")
    prompts = []
    for _ in range(n):
        people = _draw_people(rng, task, split)
        k = rng.randint(1, task.max_hops) if n_hops is None else n_hops
        likes = dict(pairwise(people[: k + 1]))
        for person in people[k:]:
            likes[person] = rng.choice([other for other in people if other != person])
        facts = list(likes.items())
        rng.shuffle(facts)
        prompts.append(_prompt(tuple(facts), people[0], k))
    return prompts


def split_of(people: Iterable[str]) -> Split:
    """The split of all prompts about a group of people, whatever is said or asked about them.

    About one group in ten is held out, by a hash of the names. Shuffling the facts of a prompt,
    changing them and asking something else therefore never leads from one split to the other.
    """
    digest = hashlib.sha256(" ".join(sorted(set(people))).encode()).digest()
    return "held_out" if int.from_bytes(digest[:8], "big") % _HELD_OUT_ONE_IN == 0 else "train"


def corrupt(prompt: Prompt, hop: int | None = None, seed: int = 0) -> Prompt:
    """The prompt with one fact of its chain changed so that the answer differs, for patching.

    The text differs in one word: whom somebody on the chain likes. The new chain visits no person
    twice either.

    Args:
        prompt: A prompt of :func:`fact_chain_prompts`.
        hop: Which hop is led astray, 1 to ``prompt.n_hops``; ``None``: drawn.
        seed: Fixes the choice.

    Raises:
        ValueError: ``hop`` is out of range, or no single change at this hop gives another answer.
    """
    if hop is not None and not 1 <= hop <= prompt.n_hops:
        raise ValueError(f"hop must be between 1 and {prompt.n_hops}, got {hop}")
    path = (prompt.start, *prompt.hops)
    options = []
    for at in range(1, prompt.n_hops + 1) if hop is None else (hop,):
        for other, _ in prompt.facts:
            facts = tuple(
                (who, other if who == path[at - 1] else whom) for who, whom in prompt.facts
            )
            reached = follow(facts, prompt.start, prompt.n_hops)
            if reached[-1] != prompt.answer and len({prompt.start, *reached}) == len(path):
                options.append(facts)
    if not options:
        where = "" if hop is None else f" at hop {hop}"
        raise ValueError(f"no single changed fact{where} gives another answer: {prompt.text}")
    return _prompt(random.Random(seed).choice(options), prompt.start, prompt.n_hops)


def follow(facts: Iterable[Fact], start: str, n_hops: int) -> tuple[str, ...]:
    """The person after 1, 2, ..., ``n_hops`` hops from ``start``.

    Raises:
        KeyError: Somebody on the way has no fact.
    """
    likes, reached = dict(facts), [start]
    for _ in range(n_hops):
        reached.append(likes[reached[-1]])
    return tuple(reached[1:])


def question(start: str, n_hops: int) -> str:
    """The words that ask for the person ``n_hops`` hops from ``start``; the answer comes next."""
    return f"{n_hops} hops from {start} :"


def answer_after(prompt: Prompt, n_iterations: int | None = None) -> str:
    """The person that a model with one hop an iteration is at.

    Args:
        prompt: A prompt.
        n_iterations: Iterations t >= 1, giving min(t, k) hops; ``None``: enough for all hops.

    Raises:
        ValueError: ``n_iterations`` is below 1.
    """
    if n_iterations is None:
        return prompt.answer
    if n_iterations < 1:
        raise ValueError(f"n_iterations must be at least 1, got {n_iterations}")
    return prompt.hops[min(n_iterations, prompt.n_hops) - 1]


def score(
    prompts: Sequence[Prompt], answers: Sequence[str], n_iterations: int | None = None
) -> float:
    """Share of answers that name the right person, between 0 and 1; white space is ignored.

    Args:
        prompts: The prompts.
        answers: One answer for each of them.
        n_iterations: Count the person after min(``n_iterations``, k) hops as right; ``None``: the
            answer to the question.

    Raises:
        ValueError: The numbers of prompts and answers differ, or there are none.
    """
    if len(prompts) != len(answers):
        raise ValueError(f"got {len(prompts)} prompts but {len(answers)} answers")
    if not prompts:
        raise ValueError("there is no score of no prompts")
    right = sum(
        answer.strip() == answer_after(prompt, n_iterations)
        for prompt, answer in zip(prompts, answers, strict=True)
    )
    return right / len(prompts)


def sample_prompts(n_per_hop_count: int = 4) -> list[Prompt]:
    """The built-in sample: always the same held-out prompts, as many of each number of hops."""
    counts = range(1, FactChainTask().max_hops + 1)
    return [p for k in counts for p in fact_chain_prompts(n_per_hop_count, n_hops=k, seed=0)]


def sample_pair(n_hops: int = 4) -> tuple[Prompt, Prompt]:
    """A held-out prompt and its corrupted counterpart, which differs in one word.

    Args:
        n_hops: Hops that the question asks for; the last of them but one is led astray.

    Raises:
        ValueError: ``n_hops`` is out of range.
    """
    hop = max(1, n_hops - 1)
    for prompt in fact_chain_prompts(20, n_hops=n_hops, seed=2):
        try:
            return prompt, corrupt(prompt, hop=hop)
        except ValueError:
            continue  # no single change at this hop gives another answer
    raise ValueError(f"no prompt with {n_hops} hops can be corrupted at hop {hop}")


def vocabulary(task: FactChainTask | None = None) -> list[str]:
    """All words of the task in the order of their token ids, special tokens first."""
    task = FactChainTask() if task is None else task
    numbers = [str(k) for k in range(1, task.max_hops + 1)]
    words = [*SPECIAL_TOKENS, "likes", ".", "hops", "from", ":", *numbers, *task.names]
    repeated = [word for word, count in Counter(words).items() if count > 1]
    if repeated:
        raise ValueError(f"names must differ from the words of the task: {', '.join(repeated)}")
    return words


def _draw_people(rng: random.Random, task: FactChainTask, split: Split) -> list[str]:
    """A group of the split in random order; the first of them are the chain."""
    for _ in range(1000):
        people = rng.sample(task.names, task.n_people)
        if split_of(people) == split:
            return people
    raise ValueError(
        f"found no group of {task.n_people} out of {len(task.names)} names in split {split!r}; "
        "use more names"
    )


def _prompt(facts: tuple[Fact, ...], start: str, n_hops: int) -> Prompt:
    stated = " ".join(f"{who} likes {whom} ." for who, whom in facts)
    text = f"{stated} {question(start, n_hops)}"
    return Prompt(text, start, follow(facts, start, n_hops), facts)
