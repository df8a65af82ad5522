"""A feedforward model of Llama's kind in tl_loops, transformers, TransformerLens and nnsight.

Run ``python -m tests.benchmarks.neighbours`` with each line of TransformerLens. All sides hold the
same random weights and must agree; what is not installed is left out and said.
"""

import argparse
import tempfile
from collections.abc import Callable
from importlib.util import find_spec

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from tests.benchmarks.turns import compare
from tl_loops import LoopedTransformer
from tl_loops.upstream import HAS_HOOKED_TRANSFORMER


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--d-model", type=int, default=512)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--pos", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    d = args.d_model
    hf = LlamaForCausalLM(
        LlamaConfig(hidden_size=d, intermediate_size=d * 11 // 4, num_hidden_layers=args.layers,
                    num_attention_heads=d // 64, vocab_size=4096, max_position_embeddings=2048)
    ).eval()  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        hf.save_pretrained(folder)
        ours = LoopedTransformer.from_pretrained_no_processing(folder, device="cpu")
    tokens = torch.randint(0, 4096, (1, args.pos), generator=torch.Generator().manual_seed(0))

    sides: dict[str, Callable[[], object]] = {
        "transformers": lambda: hf(tokens).logits,
        "tl_loops": lambda: ours(tokens),
        "tl_loops, all cached": lambda: ours.run_with_cache(tokens),
    }
    add_transformer_lens(sides, hf, tokens)
    add_nnsight(sides, ours, tokens)
    print(f"{args.layers} layers, d_model={d} pos={args.pos} threads={args.threads}")
    with torch.no_grad():
        expected = hf(tokens).logits
        for name, run in sides.items():
            found = run()
            if isinstance(found, torch.Tensor):
                torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4, msg=name)
        compare(sides, "transformers", args.repeats)


def add_transformer_lens(sides: dict, hf: LlamaForCausalLM, tokens: torch.Tensor) -> None:
    """The bridge of TransformerLens 4, around the same modules."""
    if HAS_HOOKED_TRANSFORMER:
        print("TransformerLens 3 loads no Llama without the hub: left out")
        return
    from tests.bridged.models import build_bridge

    bridge = build_bridge(hf, hf.config)
    sides["TransformerBridge"] = lambda: bridge(tokens)
    sides["TransformerBridge, all cached"] = lambda: bridge.run_with_cache(tokens)


def add_nnsight(sides: dict, ours: LoopedTransformer, tokens: torch.Tensor) -> None:
    """nnsight around our model: traced, and with the stream after every block saved."""
    if find_spec("nnsight") is None:
        print("nnsight is not installed: left out")
        return
    from nnsight import NNsight

    traced = NNsight(ours)

    def bare() -> object:
        with traced.trace(tokens):
            logits = traced.output.save()
        return logits

    def streams() -> object:
        kept: list = []
        with traced.trace(tokens):
            for block in traced.blocks:
                kept.append(block.hook_resid_post.output.save())
        return kept

    sides["nnsight"] = bare
    sides["nnsight, each resid_post saved"] = streams


if __name__ == "__main__":
    main()
