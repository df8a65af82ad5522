"""Damaged checkpoints: each ends in a right model or in one clear error, soon and in little memory.

``python -m tests.fuzz.checkpoints --full`` runs 680 of them and prints a table of outcomes;
``--cases`` and ``--seed`` choose others. Every case runs in a process of its own with limits.
"""

import argparse
import json
import os
import random
import resource
import select
import shutil
import signal
import sys
import tempfile
import time
import warnings
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from tests.fuzz.mutations import KINDS
from tl_loops import LoopedTransformer
from tl_loops.errors import CheckpointError, ConfigError

FIXTURES = Path(__file__).parents[1] / "parity" / "fixtures"
BASES = (
    *("huginn", "ouro", "parcae", "nanochat_recursive", "hrm_text"),
    *("retrofitted_llama_llama3", "retrofitted_olmo_default", "native"),
)
SEED = 20_000
PER_KIND = 40
"""Cases of each kind in the full run."""

SECONDS = 20.0
MORE_BYTES = 3_000_000_000
"""Limits of a case: its time, and address space beyond what the imports take."""

CLEAR, RIGHT = "one clear error", "a right model"
_BARE = ("object has no attribute", "unhashable", "not supported between", "NoneType", "KeyError")
_HUGE = 1e12
"""Finite weights of this size may give logits that are infinite, as they would elsewhere."""


@dataclass(frozen=True)
class Outcome:
    """How one case ended.

    Attributes:
        kind: Its kind.
        number: Its number; with the seed it says all.
        result: ``CLEAR``, ``RIGHT``, or what went wrong.
        told: The message, where there was one.
        seconds: Time it took.
    """

    kind: str
    number: int
    result: str
    told: str
    seconds: float

    @property
    def fine(self) -> bool:
        """Whether it ended as it should."""
        return self.result in (CLEAR, RIGHT)


def make_bases(folder: Path) -> dict[str, Path]:
    """The checkpoints that are damaged, with a tokenizer of 40 words each."""
    words = {w: i for i, w in enumerate(("<bos>", "<eos>", "<unk>"))}
    words |= {f"w{i}": i for i in range(len(words), 40)}
    built = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    built.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=built, bos_token="<bos>", eos_token="<eos>", unk_token="<unk>"
    )
    made = {}
    for name in BASES:
        made[name] = folder / name
        if name == "native":
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                model = LoopedTransformer.from_pretrained_no_processing(FIXTURES / "huginn")
            model.save_pretrained(made[name])
        else:
            made[name].mkdir()
            for file in ("config.json", "model.safetensors"):
                shutil.copy(FIXTURES / name / file, made[name] / file)
        tokenizer.save_pretrained(made[name])
    return made


def cases(n: int) -> list[tuple[int, str]]:
    """Number and kind of ``n`` cases, the kinds in turn."""
    kinds = list(KINDS)
    return [(number, kinds[number % len(kinds)]) for number in range(n)]


def run(n: int, seed: int = SEED) -> list[Outcome]:
    """Run ``n`` cases of a seed."""
    with tempfile.TemporaryDirectory() as folder:
        bases = make_bases(Path(folder))
        return [
            run_case(bases, Path(folder) / "case", number, kind, seed) for number, kind in cases(n)
        ]


def run_case(bases: dict[str, Path], directory: Path, number: int, kind: str, seed: int) -> Outcome:
    """Damage a copy of a checkpoint and load it, in a process of its own with limits."""
    rng = random.Random(f"{seed} {number} {kind}")
    shutil.rmtree(directory, ignore_errors=True)
    shutil.copytree(bases[rng.choice(BASES)], directory)
    must_refuse = KINDS[kind](directory, rng)
    started = time.monotonic()
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reading)
        _in_child(directory, must_refuse, writing)
    os.close(writing)
    told = _read(reading, SECONDS)
    seconds = time.monotonic() - started
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    result, message = json.loads(told) if told else ("killed or out of time", "")
    return Outcome(kind, number, result, message, seconds)


def _read(reading: int, seconds: float) -> bytes:
    told, end = b"", time.monotonic() + seconds
    while (left := end - time.monotonic()) > 0 and select.select([reading], [], [], left)[0]:
        piece = os.read(reading, 1 << 16)
        if not piece:
            os.close(reading)
            return told
        told += piece
    os.close(reading)
    return b""


def _in_child(directory: Path, must_refuse: bool, writing: int) -> None:
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        limit = pages * resource.getpagesize() + MORE_BYTES
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # Rust writes its panics there
        os.write(writing, json.dumps(_outcome(directory, must_refuse)).encode())
    finally:
        os._exit(0)


def _outcome(directory: Path, must_refuse: bool) -> tuple[str, str]:
    warnings.simplefilter("ignore")
    try:
        model = LoopedTransformer.from_pretrained_no_processing(directory)
    except (CheckpointError, ConfigError) as error:
        message = str(error)
        clear = len(message) < 4000 and not any(bare in message for bare in _BARE)
        message.encode()
        return (CLEAR if clear else "an unclear error"), message[:500]
    except BaseException as error:
        return "a bare error", f"{type(error).__name__}: {str(error)[:300]}"
    if must_refuse:
        return "accepted, must be refused", ""
    try:
        return _use(model, directory), ""
    except BaseException as error:
        return "fails at first use", f"{type(error).__name__}: {str(error)[:300]}"


def _use(model: Any, directory: Path) -> str:
    load_file(directory / "model.safetensors")  # the format's own library reads it, too
    with torch.no_grad():
        logits = model(torch.arange(6)[None] % model.cfg.d_vocab)
        largest = max(float(w.abs().max()) for w in model.physical_state_dict().values())
        if not bool(logits.isfinite().all()) and largest < _HUGE:
            return "logits that are no numbers"
        if model.tokenizer is not None:
            tokens = model.to_tokens("w5 w7")
            model.to_str_tokens("w5 w7")
            if int(tokens.max()) < model.cfg.d_vocab:
                model(tokens)
    return RIGHT


def table(outcomes: list[Outcome]) -> str:
    """Outcomes by kind, in Markdown."""
    lines = [
        "| kind | cases | one clear error | a right model | else | slowest |",
        "|---" * 6 + "|",
    ]
    for kind in (*KINDS, "all"):
        of_kind = [o for o in outcomes if kind in (o.kind, "all")]
        if of_kind:
            counts = Counter(o.result for o in of_kind)
            wrong = len(of_kind) - counts[CLEAR] - counts[RIGHT]
            slowest = max(o.seconds for o in of_kind)
            lines.append(
                f"| {kind} | {len(of_kind)} | {counts[CLEAR]} | {counts[RIGHT]} | {wrong} "
                f"| {slowest:.1f} s |"
            )
    return "\n".join(lines)


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description="Load damaged checkpoints.")
    parser.add_argument("--full", action="store_true", help="the full run")
    parser.add_argument("--cases", type=int, default=2 * len(KINDS), help="how many")
    parser.add_argument("--seed", type=int, default=SEED, help="of the damage")
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    started = time.monotonic()
    n = PER_KIND * len(KINDS) if chosen.full else chosen.cases
    outcomes = run(n, chosen.seed)
    print(table(outcomes))
    print(f"\nseed {chosen.seed}, {time.monotonic() - started:.0f} seconds")
    wrong = [outcome for outcome in outcomes if not outcome.fine]
    for outcome in wrong:
        print(f"{outcome.number} {outcome.kind}: {outcome.result}: {outcome.told}")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
