"""Numbers of a few checkpoints that must be the same on every line of TransformerLens.

``python -m tests.both_lines`` writes them to the file that the test reads; TransformerLens 3.9 gave
them. Everything is in float64, so that no processor moves them by more than rounding.
"""

import json
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tl_loops import LoopedTransformer, lens, measure
from tl_loops.patching import activation_patch

STORED = Path(__file__).parent / "parity" / "both_lines.json"
FIXTURES = Path(__file__).parent / "parity" / "fixtures"
CHECKPOINTS = {
    "tl-loops-tiny": "tl-loops-tiny",
    "ouro": str(FIXTURES / "ouro"),
    "huginn": str(FIXTURES / "huginn"),
    "retrofitted_olmo": str(FIXTURES / "retrofitted_olmo_default"),
}


def metric(logits: Tensor) -> Tensor:
    return (logits[:, -1, 5] - logits[:, -1, 8]).sum()


@torch.no_grad()
def numbers(name: str) -> dict[str, list[float]]:
    """What the library says of one checkpoint, by what it is."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model: Any = LoopedTransformer.from_pretrained(
            CHECKPOINTS[name], device="cpu", dtype="float64", n_iterations=3
        )
    generator = torch.Generator().manual_seed(1)
    clean, corrupted = torch.randint(0, model.cfg.d_vocab, (2, 1, 5), generator=generator)
    logits, cache = model.run_with_cache(clean)
    found = {
        "logits": logits[0, -1],
        "loss": model(clean, return_type="loss"),
        **{
            f"cache {key}": cache[key].where(cache[key].isfinite(), 0).abs().mean() for key in cache
        },
        "decompose_resid": cache.decompose_resid()[:, 0, -1].norm(dim=-1),
        "stack_head_results": cache.stack_head_results()[:, 0, -1].norm(dim=-1),
        "logit_attrs": cache.logit_attrs(cache.decompose_resid(), 5)[:, 0, -1],
        "accumulated_resid": cache.accumulated_resid(apply_ln=True)[:, 0, -1].norm(dim=-1),
        "patching": activation_patch(
            model, corrupted, cache, metric, "z", ("block", "pos"), progress=False
        ),
        "lens": lens.logit_lens(model, clean).entropy,
        "generated": model.generate(
            clean, max_new_tokens=4, do_sample=False, stop_at_eos=False, verbose=False
        ),
    }
    profile = measure(model, [clean[0], corrupted[0]], progress=False)
    for key in profile.metrics:
        found[f"measure {key}"] = profile.mean(key)
    return {key: value.double().nan_to_num(-1.0).flatten().tolist() for key, value in found.items()}


if __name__ == "__main__":
    written = {name: numbers(name) for name in CHECKPOINTS}
    lines = [
        f'"{name}": {{\n'
        + ",\n".join(
            f'  "{key}": [{", ".join(f"{x:.10g}" for x in values)}]'
            for key, values in found.items()
        )
        + "\n}"
        for name, found in written.items()
    ]
    STORED.write_text("{\n" + ",\n".join(lines) + "\n}\n")
    json.loads(STORED.read_text())
