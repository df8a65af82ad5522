"""Prompts, splits, corruption and scores of the embedded model's task."""

import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tl_loops import tasks
from tl_loops.tasks.fact_chain import (
    FactChainTask,
    Prompt,
    corrupt,
    fact_chain_prompts,
    follow,
    score,
)

TASK = FactChainTask()
SEEDS = st.integers(min_value=0, max_value=2**32)
HOPS = st.integers(min_value=1, max_value=TASK.max_hops)
SPLITS = st.sampled_from(["train", "held_out"])


def read(text: str) -> tuple[dict[str, str], str, int]:
    """Facts, start and number of hops, read from the words alone."""
    *facts, asked = [part.split() for part in text.split(" . ")]
    assert all(len(words) == 3 and words[1] == "likes" for words in facts)
    k, hops, origin, start, colon = asked
    assert (hops, origin, colon) == ("hops", "from", ":")
    assert len({words[0] for words in facts}) == len(facts), "a person has two facts"
    return {words[0]: words[2] for words in facts}, start, int(k)


@settings(deadline=None, max_examples=25)
@given(seed=SEEDS, k=HOPS, split=SPLITS)
def test_text_says_what_the_prompt_says(seed: int, k: int, split: tasks.Split):
    (prompt,) = fact_chain_prompts(1, n_hops=k, seed=seed, split=split)
    likes, start, asked = read(prompt.text)
    assert (start, asked) == (prompt.start, k) == (prompt.start, prompt.n_hops)
    assert tuple(likes.items()) == prompt.facts
    person = start
    for hop in prompt.hops:
        person = likes[person]
        assert person == hop
    assert prompt.answer == person
    assert len({start, *prompt.hops}) == k + 1, "the chain visits a person twice"
    assert set(likes) >= set(likes.values()) and len(likes) == TASK.n_people
    assert all(who != whom for who, whom in likes.items())
    assert set(prompt.words) <= set(tasks.vocabulary())


@settings(deadline=None, max_examples=25)
@given(seed=SEEDS, k=HOPS)
def test_hop_positions_are_the_objects_of_the_chain(seed: int, k: int):
    (prompt,) = fact_chain_prompts(1, n_hops=k, seed=seed)
    words = prompt.words
    assert [words[i] for i in prompt.hop_positions] == list(prompt.hops)
    subjects = [words[i - 2] for i in prompt.hop_positions]
    assert subjects == [prompt.start, *prompt.hops[:-1]]


@settings(deadline=None, max_examples=25)
@given(seed=SEEDS, k=HOPS, split=SPLITS)
def test_corruption_changes_one_word_and_the_answer(seed: int, k: int, split: tasks.Split):
    (prompt,) = fact_chain_prompts(1, n_hops=k, seed=seed, split=split)
    for hop in (None, k):
        other = corrupt(prompt, hop=hop, seed=seed)
        changed = [i for i, (a, b) in enumerate(zip(prompt.words, other.words, strict=True))
                   if a != b]  # fmt: skip
        assert len(changed) == 1
        assert changed[0] in prompt.hop_positions
        likes, start, asked = read(other.text)
        assert (start, asked) == (prompt.start, k)
        assert other.hops == follow(likes.items(), start, k)
        assert other.answer != prompt.answer
        assert len({start, *other.hops}) == k + 1
        assert tasks.split_of(likes) == split
    assert changed == [prompt.hop_positions[k - 1]]


def test_corruption_at_a_given_hop_is_there():
    for prompt in fact_chain_prompts(20, n_hops=4, seed=3):
        for hop in (1, 2, 3, 4):
            try:
                other = corrupt(prompt, hop=hop)
            except ValueError as error:
                assert f"at hop {hop}" in str(error)
                continue
            assert other.hops[: hop - 1] == prompt.hops[: hop - 1]
            assert other.hops[hop - 1] != prompt.hops[hop - 1]


def test_corruption_depends_on_its_seed_alone():
    (prompt,) = fact_chain_prompts(1, n_hops=5)
    assert corrupt(prompt, seed=4) == corrupt(prompt, seed=4)
    assert len({corrupt(prompt, seed=seed).text for seed in range(20)}) > 1


def test_corruption_that_cannot_be_is_refused():
    facts = (("Ann", "Bob"), ("Bob", "Ann"))
    prompt = Prompt("Ann likes Bob . Bob likes Ann . 1 hops from Ann :", "Ann", ("Bob",), facts)
    with pytest.raises(ValueError, match="no single changed fact gives another answer"):
        corrupt(prompt)
    with pytest.raises(ValueError, match="hop must be between 1 and 1, got 2"):
        corrupt(prompt, hop=2)


def test_splits_share_no_group_of_people():
    groups = {
        split: {
            frozenset(who for who, _ in p.facts)
            for seed in range(3)
            for p in fact_chain_prompts(300, seed=seed, split=split)
        }
        for split in ("train", "held_out")
    }
    assert not groups["train"] & groups["held_out"]
    assert len(groups["train"]) > 800 and len(groups["held_out"]) > 800


def test_split_depends_on_the_group_alone_and_holds_out_a_tenth():
    (prompt,) = fact_chain_prompts(1)
    people = [who for who, _ in prompt.facts]
    assert tasks.split_of(reversed(people)) == tasks.split_of(people + people) == "held_out"
    counts = Counter(
        tasks.split_of((a, b, c))
        for a in tasks.NAMES
        for b in tasks.NAMES
        for c in tasks.NAMES
        if a < b < c
    )
    assert sum(counts.values()) == 1140
    assert 0.07 < counts["held_out"] / 1140 < 0.13


def test_prompts_are_fixed_by_the_seed_across_processes():
    code = "from tl_loops.tasks import *; print(fact_chain_prompts(2, seed=5)[1].text)"
    source = Path(tasks.__file__).parents[2]
    out = subprocess.run(
        [sys.executable, "-c", code.replace("tl_loops.tasks", "tasks")],
        cwd=source / "tl_loops",
        capture_output=True,
        text=True,
        check=True,
    )
    assert out.stdout.strip() == fact_chain_prompts(2, seed=5)[1].text
    assert fact_chain_prompts(2, seed=5) != fact_chain_prompts(2, seed=6)


def test_tasks_need_nothing_of_the_project_and_no_torch():
    code = (
        "import sys, tasks; "
        "print([m for m in sys.modules if m.split('.')[0] in ('torch', 'tl_loops')])"
    )
    out = subprocess.run(
        [sys.executable, "-c", code],
        cwd=Path(tasks.__file__).parents[1],
        capture_output=True,
        text=True,
        check=True,
    )
    assert out.stdout.strip() == "[]"


def test_no_shortcut_by_position_or_popularity():
    n = 2000
    prompts = fact_chain_prompts(n, seed=1)
    places = Counter(prompt.hop_positions[-1] for prompt in prompts)
    assert len(places) == TASK.n_people
    # A tenth each; five standard deviations of a binomial share.
    assert max(abs(count / n - 0.1) for count in places.values()) < 5 * (0.09 / n) ** 0.5
    most_liked = [Counter(whom for _, whom in p.facts).most_common(1)[0][0] for p in prompts]
    assert score(prompts, most_liked) < 0.3


def test_hops_are_drawn_evenly_unless_given():
    counts = Counter(prompt.n_hops for prompt in fact_chain_prompts(1200, seed=2))
    assert set(counts) == set(range(1, TASK.max_hops + 1))
    assert min(counts.values()) > 130
    assert {p.n_hops for p in fact_chain_prompts(5, n_hops=3)} == {3}


def test_score_counts_the_right_person():
    prompts = fact_chain_prompts(6, n_hops=3)
    final = [f" {prompt.hops[2]}\n" for prompt in prompts]
    first = [prompt.hops[0] for prompt in prompts]
    assert score(prompts, final) == score(prompts, final, n_iterations=3) == 1.0
    assert score(prompts, final, n_iterations=9) == 1.0
    assert score(prompts, first) == 0.0
    assert score(prompts, first, n_iterations=1) == 1.0
    assert score(prompts, final[:3] + first[3:]) == 0.5


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: score(fact_chain_prompts(2), ["Ann"]), "got 2 prompts but 1 answers"),
        (lambda: score([], []), "no score of no prompts"),
        (lambda: tasks.answer_after(fact_chain_prompts(1)[0], 0), "n_iterations must be at least"),
        (lambda: fact_chain_prompts(-1), "n must be at least 0"),
        (lambda: fact_chain_prompts(1, n_hops=7), "n_hops must be between 1 and 6, got 7"),
        (lambda: fact_chain_prompts(1, n_hops=0), "n_hops must be between 1 and 6, got 0"),
        (lambda: FactChainTask(n_people=6), "n_people=6 is too small"),
        (lambda: FactChainTask(max_hops=0), "max_hops must be at least 1"),
        (lambda: FactChainTask(n_people=21), "exceeds the 20 names"),
        (lambda: FactChainTask(2, 1, ("Ann", "Ann")), "names must differ"),
        (lambda: tasks.vocabulary(FactChainTask(2, 1, ("from", "Ann"))), "words of the task: from"),
    ],
)
def test_bad_arguments_are_refused_with_the_reason(call, message: str):
    with pytest.raises(ValueError, match=message):
        call()


def test_unknown_split_and_split_without_a_group():
    only = FactChainTask(2, 1, ("Ann", "Bob"))
    lacking = "train" if tasks.split_of(only.names) == "held_out" else "held_out"
    with pytest.raises(ValueError, match="found no group of 2 out of 2 names"):
        fact_chain_prompts(1, split=lacking, task=only)


def test_other_sizes_keep_their_promises():
    task = FactChainTask(n_people=4, max_hops=3)
    for prompt in fact_chain_prompts(30, task=task, split="train"):
        assert len(prompt.facts) == 4 and prompt.n_hops <= 3
    assert tasks.vocabulary(task).count("4") == 0


def test_vocabulary_is_fixed():
    words = tasks.vocabulary()
    assert words[:4] == ["<bos>", "<eos>", "<pad>", "<unk>"]
    assert len(words) == len(set(words)) == 4 + 5 + TASK.max_hops + len(TASK.names) == 35


def test_sample_is_held_out_and_has_every_number_of_hops():
    sample = tasks.sample_prompts(3)
    assert sample == tasks.sample_prompts(3)
    assert Counter(p.n_hops for p in sample) == dict.fromkeys(range(1, 7), 3)
    assert {tasks.split_of(who for who, _ in p.facts) for p in sample} == {"held_out"}
