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
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from tokenizers.processors import TemplateProcessing
from torch import Tensor
from transformer_lens.hook_points import HookPoint

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

TASK = FactChainTask()
WORDS = vocabulary(TASK)
ID = {word: index for index, word in enumerate(WORDS)}

N_ITERATIONS = 8  # the default of the saved model, and the most that gradients flow through
OLDEST_STATE = 24  # iterations without gradient before a batch that teaches to hold
MOST_HOLDING = 4  # iterations with gradient in such a batch
MOST_QUESTIONS = 6


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


@dataclass
class Batch:
    """Contexts with several questions each.

    Attributes:
        tokens: [batch, pos]
        asked_at: Positions that a person is predicted from, [question].
        targets: Person after iterations 1 to T, [iteration, batch, question].
    """

    tokens: Int[Tensor, "batch pos"]
    asked_at: Int[Tensor, "question"]
    targets: Int[Tensor, "iteration batch question"]


def make_batch(size: int, stage: Stage, iterations: range, rng: random.Random) -> Batch:
    """Training contexts: facts, 1 to 6 questions, and the answer of the last one.

    The loss reads every question, so that one context teaches several lookups.

    Args:
        size: Number of contexts.
        stage: Sets how many people and hops there are.
        iterations: Those whose exits are trained, counted from 0.
        rng: Source of the draws.
    """
    n_people = max(stage.n_people - rng.randint(0, 2), 2)
    task = FactChainTask(n_people, min(TASK.max_hops, stage.n_iterations, n_people - 1))
    n_questions = rng.randint(1, min(MOST_QUESTIONS, n_people))
    prompts = fact_chain_prompts(size, seed=rng.getrandbits(64), split="train", task=task)
    rows, targets = [], []
    for prompt in prompts:
        others = [who for who, _ in prompt.facts if who != prompt.start]
        asked = [(prompt.start, prompt.n_hops)]
        for start in rng.sample(others, n_questions - 1):
            asked.append((start, rng.randint(1, task.max_hops)))
        paths = [follow(prompt.facts, start, k) for start, k in asked]
        more = " ".join(question(start, k) for start, k in asked[1:])
        rows.append(token_ids(f"{prompt.text} {more} {paths[-1][-1]}"))
        targets.append([[ID[path[min(t, len(path) - 1)]] for path in paths] for t in iterations])
    tokens = torch.tensor(rows)
    asked_at = (tokens[0] == ID[":"]).nonzero()[:, 0]
    return Batch(tokens, asked_at, torch.tensor(targets).transpose(0, 1))


def exit_logits(
    model: LoopedTransformer, tokens: Int[Tensor, "batch pos"], iterations: range
) -> Float[Tensor, "iteration batch pos d_vocab"]:
    """Logits of the exits after some successive iterations, each through the coda, from one run.

    Iterations before the first of them run without gradient.
    """
    layout = model.layout
    kept: dict[str, Tensor] = {}

    def keep(activation: Tensor, hook: HookPoint) -> None:
        kept[str(hook.name)] = activation

    def run(*args: Tensor, last: int, **kwargs: object) -> None:
        """Run to the end of an iteration (its state is kept by its hook)."""
        model(
            *args, stop_at_layer=layout.index(iteration=last, layer=layout.n_core - 1) + 1, **kwargs
        )

    def state_out(t: int) -> str:
        return f"iter.{t}.hook_state_out"

    names = ["hook_injection", *(state_out(t) for t in range(iterations.stop))]
    with model.hooks(fwd_hooks=[(name, keep) for name in names]):
        if iterations.start == 0:
            run(tokens, last=iterations[-1])
        else:
            with torch.no_grad():
                run(tokens, last=iterations.start - 1)
            run(
                kept[state_out(iterations.start - 1)],
                last=iterations[-1],
                start_at_iteration=iterations.start,
                injection=kept["hook_injection"],
            )
    states = torch.cat([kept[state_out(t)] for t in iterations])
    logits = model(states, start_at_layer=layout.coda_start)
    return logits.unflatten(0, (len(iterations), -1))


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
            best = exit_logits(model, tokens, range(n_iterations))[:, :, -1].argmax(-1)
            for answers, exit_best in zip(given, best.tolist(), strict=True):
                answers += [WORDS[index] for index in exit_best]
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


def learning_rate(step: int, steps: int, peak: float) -> float:
    """Warm-up over 100 steps, constant until 60 %, then linear to zero."""
    return peak * min(1.0, (step + 1) / 100, (steps - step) / (0.4 * steps))


def train(model: LoopedTransformer, options: argparse.Namespace) -> None:
    """Train in place; prints the loss, the stage and held-out accuracies."""
    rng = random.Random(options.seed)
    torch.manual_seed(options.seed)
    matrices = [p for p in model.parameters() if p.ndim > 1]
    gains = [p for p in model.parameters() if p.ndim == 1]
    optimiser = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": 0.01}, {"params": gains, "weight_decay": 0.0}],
        lr=options.lr,
        betas=(0.9, 0.98),
    )
    stage, running, since = Stage(), 0.0, 0
    mean_loss, began = 0.0, time.monotonic()
    for step in range(options.steps):
        for group in optimiser.param_groups:
            group["lr"] = learning_rate(step, options.steps, options.lr)
        hold = stage.harder() is None and step % 2 == 1
        if hold:
            first = rng.randint(1, OLDEST_STATE)
            iterations = range(first, first + rng.randint(1, MOST_HOLDING))
        else:
            iterations = range(rng.randint(1, stage.n_iterations))
        batch = make_batch(options.batch_size, stage, iterations, rng)
        logits = exit_logits(model, batch.tokens, iterations)
        people = logits[:, :, batch.asked_at]
        ends = logits[:, :, -1]
        n_questions = len(batch.asked_at)
        loss = F.cross_entropy(people.flatten(0, 2), batch.targets.flatten())
        end_loss = F.cross_entropy(
            ends.flatten(0, 1), torch.full((ends[..., 0].numel(),), ID["<eos>"])
        )
        optimiser.zero_grad(set_to_none=True)
        ((n_questions * loss + end_loss) / (n_questions + 1)).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()

        right = (people[-1].argmax(-1) == batch.targets[-1]).float().mean().item()
        running, since = 0.9 * running + 0.1 * right, since + 1
        mean_loss = 0.98 * mean_loss + 0.02 * loss.item() if step else loss.item()
        harder = stage.harder()
        if running > 0.9 and since > 30 and harder is not None:
            stage, running, since = harder, 0.0, 0
            print(f"step {step + 1}: {stage}", flush=True)
        if (step + 1) % 100 == 0:
            seconds = time.monotonic() - began
            print(f"step {step + 1} loss {mean_loss:.4f} {stage} {seconds:.0f} s", flush=True)
        if (step + 1) % options.evaluate_every == 0:
            print(accuracy_table(model, 100, 2 * N_ITERATIONS, options.evaluation_seed), flush=True)
    print(f"trained for {time.monotonic() - began:.0f} s")


def main() -> None:
    parser = argparse.ArgumentParser(description="Train tl-loops-tiny and save it.")
    parser.add_argument("--out", type=Path, required=True, help="directory to save into")
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
    with model.iterations(OLDEST_STATE + MOST_HOLDING):
        train(model, options)

    model.cfg.state_seed = 0  # from here on the state is a function of the position
    options.out.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(options.out)
    write_tokenizer(options.out)
    loaded = LoopedTransformer.from_pretrained_no_processing(str(options.out))
    print(f"\nHeld-out prompts: {options.n_evaluation} a hop count, seed {options.evaluation_seed}")
    print(accuracy_table(loaded, options.n_evaluation, 2 * N_ITERATIONS, options.evaluation_seed))


if __name__ == "__main__":
    main()
