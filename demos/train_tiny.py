"""Train the embedded model ``tl-loops-tiny`` and save it with its tokenizer.

    python demos/train_tiny.py --out tl_loops/tiny

The model learns the task of ``tl_loops.tasks``: follow k facts that stand in the context, one hop
an iteration. Every exit is trained: the state after iteration t goes through the coda, and the
target is the person after min(t, k) hops. The task grows with success: more people in the context
first (finding one fact is the slow part), then more iterations and hops. Once it is whole, every
other batch starts from a state that already is up to 24 iterations old, through which no gradient
flows; so the model also learns to hold its answer.
"""

import argparse
import json
import random
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from tokenizers.processors import TemplateProcessing
from torch import Tensor

from tl_loops import LoopedTransformer, LoopedTransformerConfig
from tl_loops.tasks.fact_chain import (
    FactChainTask,
    Prompt,
    fact_chain_prompts,
    follow,
    question,
    score,
    vocabulary,
)
from tl_loops.training import (
    UNTRAINED,
    TrainingBatch,
    TrainingSettings,
    exit_logits,
    train,
    training_pass,
)

TASK = FactChainTask()
WORDS = vocabulary(TASK)
ID = {word: index for index, word in enumerate(WORDS)}

N_ITERATIONS = 8  # the default of the saved model, and the most that gradients flow through
OLDEST_STATE = 24  # iterations without gradient before a batch that teaches to hold
MOST_HOLDING = 4  # iterations with gradient in such a batch
MOST_QUESTIONS = 6
N_STEPS_OF_A_STAGE = 30  # at least


def make_config(seed: int) -> LoopedTransformerConfig:
    """The architecture: (1, 2⊗8, 1)_I with Llama-style blocks."""
    d_model, n_heads = 64, 4
    return LoopedTransformerConfig(
        model_name="tl-loops-tiny",
        d_model=d_model,
        n_heads=n_heads,
        d_head=d_model // n_heads,
        d_mlp=192,
        d_vocab=len(WORDS),
        n_ctx=128,
        n_prelude=1,
        n_core=2,
        n_coda=1,
        n_iterations=N_ITERATIONS,
        block_norm="pre",
        injection="concat",
        initial_state="normal",
        initial_state_std=0.02,
        state_seed=None,  # drawn afresh at every training step
        initializer_range=d_model**-0.5,
        seed=seed,
        device="cpu",
    )


def write_tokenizer(directory: Path) -> None:
    """Write a word-level tokenizer that puts ``<bos>`` in front, as transformers reads it."""
    tokenizer = Tokenizer(WordLevel(ID, unk_token="<unk>"))
    tokenizer.pre_tokenizer = Whitespace()  # type: ignore[assignment]
    tokenizer.add_special_tokens(["<bos>", "<eos>", "<pad>", "<unk>"])
    tokenizer.post_processor = TemplateProcessing(  # type: ignore[assignment]
        single="<bos> $A",
        pair="<bos> $A $B",
        special_tokens=[("<bos>", ID["<bos>"])],
    )
    tokenizer.save(str(directory / "tokenizer.json"))
    settings = {
        "add_bos_token": True,
        "bos_token": "<bos>",
        "clean_up_tokenization_spaces": False,
        "eos_token": "<eos>",
        "model_max_length": 128,
        "pad_token": "<pad>",
        "padding_side": "right",
        "tokenizer_class": "PreTrainedTokenizerFast",
        "unk_token": "<unk>",
    }
    (directory / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n")


def token_ids(text: str) -> list[int]:
    """Token ids of a text in the task's words, with ``<bos>`` in front."""
    return [ID["<bos>"], *(ID[word] for word in text.split())]


@dataclass
class Stage:
    """How hard the training task is at present; :meth:`harder` gives the next stage."""

    n_people: int = 3
    n_iterations: int = 1

    def harder(self) -> "Stage | None":
        if self.n_people < TASK.n_people:
            return Stage(self.n_people + 1, self.n_iterations)
        if self.n_iterations < N_ITERATIONS:
            return Stage(self.n_people, self.n_iterations + 1)
        return None


def questions(size: int, stage: Stage, rng: random.Random) -> tuple[Tensor, Tensor]:
    """Training contexts: facts, 1 to 6 questions, and the answer of the last one.

    The loss reads every question, so that one context teaches several lookups, and the end.

    Args:
        size: Number of contexts.
        stage: Sets how many people and hops there are.
        rng: Source of the draws.

    Returns:
        Tokens [batch, pos] and targets [iteration, batch, pos]: after t iterations the person
        after min(t, k) hops.
    """
    n_people = max(stage.n_people - rng.randint(0, 2), 2)
    task = FactChainTask(n_people, min(TASK.max_hops, stage.n_iterations, n_people - 1))
    n_questions = rng.randint(1, min(MOST_QUESTIONS, n_people))
    prompts = fact_chain_prompts(size, seed=rng.getrandbits(64), split="train", task=task)
    rows, answers = [], []
    for prompt in prompts:
        others = [who for who, _ in prompt.facts if who != prompt.start]
        asked = [(prompt.start, prompt.n_hops)]
        for start in rng.sample(others, n_questions - 1):
            asked.append((start, rng.randint(1, task.max_hops)))
        paths = [follow(prompt.facts, start, k) for start, k in asked]
        more = " ".join(question(start, k) for start, k in asked[1:])
        rows.append(token_ids(f"{prompt.text} {more} {paths[-1][-1]}"))
        answers.append(
            [[ID[path[min(t, len(path) - 1)]] for path in paths] for t in range(task.max_hops)]
        )
    tokens = torch.tensor(rows)
    targets = torch.full((task.max_hops, *tokens.shape), UNTRAINED)
    asked_at = (tokens[0] == ID[":"]).nonzero()[:, 0]
    targets[:, :, asked_at] = torch.tensor(answers).transpose(0, 1)
    targets[:, :, -1] = ID["<eos>"]
    return tokens, targets


@dataclass
class Curriculum:
    """Training data that get harder with success.

    Attributes:
        stage: How hard they are.
        right: Running share of questions that are answered rightly.
        n_steps: Of this stage.
    """

    stage: Stage = field(default_factory=Stage)
    right: float = 0.0
    n_steps: int = 0

    def draw(self, n: int, generator: torch.Generator) -> TrainingBatch:
        """Contexts of the stage; once the task is whole, about every other batch holds answers."""
        rng = random.Random(int(torch.randint(2**62, (), generator=generator)))
        if self.stage.harder() is None and rng.random() < 0.5:
            n_gradient = rng.randint(1, MOST_HOLDING)
            n_iterations = rng.randint(1, OLDEST_STATE) + n_gradient
        else:
            n_iterations = n_gradient = rng.randint(1, self.stage.n_iterations)
        return TrainingBatch(*questions(n, self.stage, rng), n_iterations, n_gradient)

    def after_step(self, batch: TrainingBatch, right: Tensor) -> None:
        """Go to the next stage after enough steps with more than 90 % right."""
        share = float(right[batch.tokens == ID[":"]].float().mean())
        self.right, self.n_steps = 0.9 * self.right + 0.1 * share, self.n_steps + 1
        harder = self.stage.harder()
        if self.right > 0.9 and self.n_steps > N_STEPS_OF_A_STAGE and harder is not None:
            self.stage, self.right, self.n_steps = harder, 0.0, 0
            print(harder, flush=True)

    def identity(self) -> dict[str, Any]:
        """The task."""
        return {"task": "fact chains", "n_people": TASK.n_people, "max_hops": TASK.max_hops}

    def state(self) -> dict[str, Any]:
        """Stage and success."""
        return asdict(self)

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Go to a stage."""
        self.stage = Stage(**state["stage"])
        self.right, self.n_steps = state["right"], state["n_steps"]


@torch.no_grad()
def answers_per_exit(
    model: LoopedTransformer, prompts: list[Prompt], n_iterations: int, batch_size: int = 250
) -> list[list[str]]:
    """The likeliest next word after iterations 1 to T: one list of answers an iteration count."""
    given: list[list[str]] = [[] for _ in range(n_iterations)]
    with model.iterations(n_iterations):
        for first in range(0, len(prompts), batch_size):
            texts = [prompt.text for prompt in prompts[first : first + batch_size]]
            tokens = torch.tensor([token_ids(text) for text in texts])
            run = training_pass(model, tokens, n_iterations)
            for answers, logits in zip(given, exit_logits(model, tokens, run), strict=True):
                answers += [WORDS[index] for index in logits[:, -1].argmax(-1).tolist()]
    return given


def accuracy_table(model: LoopedTransformer, n_prompts: int, most: int, seed: int) -> str:
    """Held-out accuracy in per cent, a row per iteration count and a column per hop count.

    A prompt counts as right where the answer is the one after all k hops. The last column is the
    share of all prompts whose answer is the person after min(t, k) hops.
    """
    by_hops = [
        fact_chain_prompts(n_prompts, n_hops=k, seed=seed) for k in range(1, TASK.max_hops + 1)
    ]
    everything = [prompt for prompts in by_hops for prompt in prompts]
    heads = [f"k={k}" for k in range(1, TASK.max_hops + 1)]
    lines = ["| iterations | " + " | ".join(heads) + " | all k | person after min(t, k) hops |"]
    lines.append("|" + "---:|" * (len(heads) + 3))
    for t, given in enumerate(answers_per_exit(model, everything, most), start=1):
        parts = [given[i * n_prompts : (i + 1) * n_prompts] for i in range(len(by_hops))]
        cells = [score(p, a) for p, a in zip(by_hops, parts, strict=True)]
        cells += [score(everything, given), score(everything, given, n_iterations=t)]
        lines.append(f"| {t} | " + " | ".join(f"{100 * cell:.1f}" for cell in cells) + " |")
    return "\n".join(lines)


def train_curriculum(model: LoopedTransformer, options: argparse.Namespace) -> None:
    """Train in place; prints the stages and held-out accuracies."""
    settings = TrainingSettings(
        n_steps=options.steps,
        batch_size=options.batch_size,
        exit_loss="mean",
        learning_rate=options.lr,
        seed=options.seed,
    )

    def look(n_done: int) -> None:
        if n_done % options.evaluate_every == 0:
            n = min(100, options.n_evaluation)
            print(accuracy_table(model, n, 2 * N_ITERATIONS, options.evaluation_seed), flush=True)

    began = time.monotonic()
    train(
        model,
        Curriculum(),
        settings,
        look=look,
        checkpoint=options.checkpoint,
        stop_after=options.stop_after,
    )
    print(f"trained for {time.monotonic() - began:.0f} s in this process")


def main() -> None:
    parser = argparse.ArgumentParser(description="Train tl-loops-tiny and save it.")
    parser.add_argument("--out", type=Path, required=True, help="directory to save into")
    parser.add_argument("--checkpoint", type=Path, help="file to go on from")
    parser.add_argument("--stop-after", type=int, help="steps that are done; without it all")
    parser.add_argument("--seed", type=int, default=0, help="weights, prompts, initial states")
    parser.add_argument("--steps", type=int, default=5000)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--lr", type=float, default=3e-3, help="peak learning rate")
    parser.add_argument("--evaluate-every", type=int, default=1000, help="steps")
    parser.add_argument("--evaluation-seed", type=int, default=1000, help="of held-out prompts")
    parser.add_argument(
        "--n-evaluation", type=int, default=1000, help="prompts a hop count at the end"
    )
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()

    torch.set_num_threads(options.threads)
    model = LoopedTransformer(make_config(options.seed))
    print(model.cfg.describe())
    train_curriculum(model, options)

    model.cfg.state_seed = 0  # from here on the state is a function of the position
    options.out.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(options.out)
    write_tokenizer(options.out)
    loaded = LoopedTransformer.from_pretrained_no_processing(str(options.out))
    print(f"\nHeld-out prompts: {options.n_evaluation} a hop count, seed {options.evaluation_seed}")
    print(accuracy_table(loaded, options.n_evaluation, 2 * N_ITERATIONS, options.evaluation_seed))


if __name__ == "__main__":
    main()
