"""A feedforward model of Llama's kind in tl_loops, transformers, TransformerLens and nnsight.

Run ``python -m tests.benchmarks.neighbours [forward | decoding | patching]`` with each line of
TransformerLens. All sides hold the same random weights and must agree; what is not installed is
left out and said.
"""

import argparse
import tempfile
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from tests.benchmarks.turns import compare
from tl_loops import LoopedTransformer
from tl_loops.patching import activation_patch
from tl_loops.upstream import HAS_HOOKED_TRANSFORMER

VOCABULARY = 4096
Sides = dict[str, Callable[[], Any]]


class Neighbours:
    """The same weights in every library that is installed."""

    def __init__(self, d_model: int, layers: int):
        torch.manual_seed(0)
        config = LlamaConfig(
            hidden_size=d_model,
            intermediate_size=d_model * 11 // 4,
            num_hidden_layers=layers,
            num_attention_heads=d_model // 64,
            vocab_size=VOCABULARY,
            max_position_embeddings=2048,
        )
        self.hf = LlamaForCausalLM(config).eval()
        with tempfile.TemporaryDirectory() as folder:
            self.hf.save_pretrained(folder)
            self.ours = LoopedTransformer.from_pretrained_no_processing(folder, device="cpu")
        self.bridge = self.traced = None
        if HAS_HOOKED_TRANSFORMER:
            print("TransformerLens 3 loads no Llama without the hub: left out")
        else:
            from tests.bridged.models import build_bridge

            self.bridge = build_bridge(self.hf, config)
        if find_spec("nnsight") is None:
            print("nnsight is not installed: left out")
        else:
            from nnsight import NNsight

            self.traced = NNsight(self.ours)

    def forward(self, tokens: Tensor) -> Sides:
        """Logits, bare and with activations kept."""
        hf, ours, bridge, traced = self.hf, self.ours, self.bridge, self.traced
        sides: Sides = {
            "transformers": lambda: hf(tokens).logits,
            "tl_loops": lambda: ours(tokens),
            "tl_loops, all cached": lambda: ours.run_with_cache(tokens)[0],
        }
        if bridge is not None:
            sides["TransformerBridge"] = lambda: bridge(tokens)
            sides["TransformerBridge, all cached"] = lambda: bridge.run_with_cache(tokens)[0]
        if traced is not None:

            def bare() -> Tensor:
                with traced.trace(tokens):
                    logits = traced.output.save()
                return logits

            def streams() -> Tensor:
                kept: list = []
                with traced.trace(tokens):
                    for block in traced.blocks:
                        kept.append(block.hook_resid_post.output.save())
                    logits = traced.output.save()
                return logits

            sides["nnsight"] = bare
            sides["nnsight, each resid_post saved"] = streams
        return sides

    def decoding(self, tokens: Tensor, n_new: int = 32) -> Sides:
        """Greedy tokens with the key-value cache."""
        same = dict(max_new_tokens=n_new, do_sample=False)
        hf = dict(same, min_new_tokens=n_new, attention_mask=torch.ones_like(tokens))
        hf |= dict(pad_token_id=0)
        lens = dict(same, stop_at_eos=False, verbose=False)
        sides: Sides = {
            "transformers": lambda: self.hf.generate(tokens, **hf),  # type: ignore[operator]
            "tl_loops": lambda: self.ours.generate(tokens, **lens),
        }
        if self.bridge is not None:
            bridge = self.bridge
            sides["TransformerBridge"] = lambda: bridge.generate(tokens, **lens)
        return sides

    def patching(self, tokens: Tensor) -> Sides:
        """A grid of the residual stream by block and position; the prompts differ in one token."""
        ours, bridge, traced = self.ours, self.bridge, self.traced
        corrupted, middle = tokens.clone(), tokens.shape[1] // 2
        corrupted[:, middle] = (tokens[:, middle] + 1) % VOCABULARY
        _, cache = ours.run_with_cache(tokens)

        def metric(logits: Tensor) -> Tensor:
            return (logits[:, -1, 3] - logits[:, -1, 5]).mean()

        sides: Sides = {
            "tl_loops": lambda: activation_patch(ours, corrupted, cache, metric, progress=False)
        }
        if bridge is not None:
            from transformer_lens import patching

            patching.tqdm = lambda rows: rows  # type: ignore[attr-defined]
            bridge.enable_compatibility_mode(no_processing=True)
            _, kept = bridge.run_with_cache(tokens)
            sides["TransformerBridge, transformer_lens.patching"] = lambda: (
                patching.get_act_patch_resid_pre(bridge, corrupted, kept, metric)
            )
        if traced is not None:

            def cell(block: int, pos: int) -> Tensor:
                with traced.trace(corrupted):
                    stream = traced.blocks[block].hook_resid_pre.output
                    stream[:, pos] = cache["resid_pre", block][:, pos]
                    logits = traced.output.save()
                return metric(logits)

            sides["nnsight, a trace for each cell"] = lambda: torch.tensor(
                [[cell(i, p) for p in range(tokens.shape[1])] for i in range(ours.cfg.n_layers)]
            )
        return sides


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("what", choices=("forward", "decoding", "patching"), default="forward",
                        nargs="?")  # fmt: skip
    parser.add_argument("--d-model", type=int, default=512)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--pos", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    tokens = torch.randint(0, VOCABULARY, (1, args.pos), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        sides = getattr(Neighbours(args.d_model, args.layers), args.what)(tokens)
        size = f"{args.layers} layers, d_model={args.d_model} pos={args.pos}"
        print(f"{args.what}: {size} threads={args.threads}")
        baseline = next(iter(sides))
        expected = sides[baseline]()
        for name, run in sides.items():
            torch.testing.assert_close(
                run(), expected, rtol=1e-3, atol=1e-4, msg=lambda said, name=name: f"{name}: {said}"
            )
        compare(sides, baseline, args.repeats, warm_up=1 if args.what == "patching" else 2)


if __name__ == "__main__":
    main()
