"""A mechanism that nobody knows, in one file and one place of the list, works everywhere."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import tl_loops

PACKAGE = Path(tl_loops.__file__).parent

LEAK = '''
"""Some of the state before an iteration leaks into the state after it."""

from typing import Any

import torch
from torch import Tensor, nn

from tl_loops.layout.names import spec
from tl_loops.mechanisms.block_parts import AttentionPart
from tl_loops.mechanisms.mechanism import Config, Mechanism, Part, Run, Setting
from tl_loops.mechanisms.tensors import PhysicalTensor, Tensors, add_parameters, vector
from tl_loops.upstream import HookPoint


class Leak(nn.Module):
    """The share that leaks in every dimension: ``sigmoid(b_leak)``."""

    b_leak: nn.Parameter

    def __init__(self, cfg: Config, device: Any = None):
        super().__init__()
        add_parameters(self, LEAK.weights(cfg), "leak", cfg.dtype, device)

    def forward(self, state: Tensor) -> Tensor:
        return torch.sigmoid(self.b_leak).expand_as(state).clone()


class _Leak(Part):
    def enter(self, t: int, state: Tensor) -> Tensor:
        self._before = state
        return state

    def leave(self, t: int, state: Tensor) -> Tensor:
        share = self.run.model.iter[t].hook_leak(self.run.model.leak(state))
        return state + share * self._before


class _Heads(AttentionPart):
    def __init__(self, attention: Any):
        self._attention = attention

    def heads(self, z: Tensor, query_input: Tensor) -> Tensor:
        return self._attention.hook_leak(z * (1 + self._attention.b_leak[:, None]))


class _LeakMechanism(Mechanism):
    name = "leak"
    owners = ("leak",)
    settings = (Setting("leak", bool, False, "Whether the state before an iteration leaks."),)
    points = (
        spec("hook_leak", "iteration", "batch pos d_model"),
        spec("attn.hook_leak", "block", "batch pos head d_head"),
    )
    with_stacks = False

    def phrases(self, cfg: Config) -> dict[str, str]:
        return {"leave": "x = x + σ(b)·s"}

    def weights(self, cfg: Config) -> Tensors:
        return {"leak.b_leak": vector(cfg.d_model)}

    def block_weights(self, cfg: Config, number: int) -> Tensors:
        return {"attn.b_leak": PhysicalTensor((cfg.n_heads,))}

    def modules(self, cfg: Config, device: Any = None) -> dict[str, nn.Module]:
        return {"leak": Leak(cfg, device)}

    def block_modules(self, cfg: Config, number: int, device: Any = None) -> dict[str, nn.Module]:
        return {"attn.hook_leak": HookPoint()}

    def attention_part(self, attention: Any, context: Any) -> AttentionPart:
        return _Heads(attention)

    def part(self, run: Run) -> Part:
        return _Leak(run)

    def carries(self, cfg: Config) -> str:
        return "what leaks"

    def remixes(self, cfg: Config) -> bool:
        return True


LEAK = _LeakMechanism()
'''

SCRIPT = """
import sys
import torch
from torch.testing import assert_close
import tl_loops
from tl_loops import (
    ConfigError, LoopedSemanticsError, LoopedTransformer, LoopedTransformerConfig, patching
)

assert tl_loops.__file__.startswith(sys.argv[1]), tl_loops.__file__
fields = dict(
    n_prelude=1, n_core=2, n_coda=1, n_iterations=3, injection="add", d_model=16, d_head=4,
    n_heads=4, d_mlp=32, d_vocab=11, n_ctx=16, seed=0, initializer_range=0.4, d_vocab_out=11,
)
cfg = LoopedTransformerConfig(**fields, leak=True)
plain = LoopedTransformer(LoopedTransformerConfig(**fields))
model = LoopedTransformer(cfg)
tokens = torch.tensor([[1, 2, 3, 4, 5]])

# Built and run, by its equations.
assert "leak.b_leak" in dict(model.physical_named_parameters())
assert cfg.n_params == plain.cfg.n_params + 16 + 4 * 4  # 4 physical layers of 4 heads
logits, cache = model.run_with_cache(tokens)
for t in range(3):
    left = cache["resid_post", model.layout.index(iteration=t, layer=1)]
    assert_close(cache["state_out", t], left + 0.5 * cache["state_in", t])
assert not torch.allclose(logits, plain(tokens))

# Described, checked, written and read.
assert "x = x + σ(b)·s" in cfg.describe() and "σ(b)" not in plain.cfg.describe()
assert LoopedTransformerConfig.from_dict(cfg.to_dict()) == cfg
try:
    LoopedTransformerConfig(**{**fields, "n_iterations": 4}, leak=True, stacks=("L", "H"))
except ConfigError as error:
    assert "leak is not supported with stacks" in str(error)
else:
    raise AssertionError("two stacks were accepted")
with torch.no_grad():
    model.leak.b_leak.normal_()
    model.blocks[1].attn.b_leak.normal_()  # that of every iteration
model.save_pretrained(sys.argv[2])
loaded = LoopedTransformer.from_pretrained_no_processing(sys.argv[2])
logits, cache = model.run_with_cache(tokens)
assert torch.equal(loaded(tokens), model(tokens))

# Cached, hooked by coordinate, patched.
assert cache["leak", 2].shape == (1, 5, 16)
heads = cache["pattern", 5] @ cache["v", 5].transpose(1, 2)
heads = heads.transpose(1, 2) * (1 + model.blocks[1].attn.b_leak[:, None])
assert_close(cache["blocks.5.attn.hook_leak"], heads)
assert_close(cache["z", 5], heads)
other = torch.tensor([[5, 4, 3, 2, 1]])
grid = patching.activation_patch(
    model, other, cache, lambda x: x[0, -1, 3], activation="leak", axes=("iteration",),
    progress=False,
)
put = lambda x, hook: cache[hook.name]
one = model.run_with_hooks(other, fwd_hooks=[("iter.1.hook_leak", put)])
assert_close(grid[1], one[0, -1, 3])

# Refused by what it is not exact for, in its own words.
for call in (lambda: cache.decompose_resid(), lambda: model(logits.new_zeros(1, 5, 16),
             start_at_iteration=1, injection=logits.new_zeros(1, 5, 16))):
    try:
        call()
    except LoopedSemanticsError as error:
        assert "leak" in str(error), error
    else:
        raise AssertionError("a sum along one path was given")
print("it works")
"""


def test_a_mechanism_of_one_file_works_everywhere(tmp_path):
    copy = tmp_path / "house"
    shutil.copytree(PACKAGE, copy / "tl_loops", ignore=shutil.ignore_patterns("__pycache__"))
    room = copy / "tl_loops" / "mechanisms"
    (room / "leak.py").write_text(LEAK, encoding="utf-8")
    listed = (room / "__init__.py").read_text(encoding="utf-8")
    listed = listed.replace("    CODA_INPUT,\n", "    LEAK,\n    CODA_INPUT,\n")
    listed = listed.replace(
        "MECHANISMS: tuple", "from tl_loops.mechanisms.leak import LEAK\n\nMECHANISMS: tuple", 1
    )
    (room / "__init__.py").write_text(listed, encoding="utf-8")
    script = tmp_path / "script.py"
    script.write_text(SCRIPT, encoding="utf-8")
    done = subprocess.run(
        [sys.executable, str(script), str(copy), str(tmp_path / "saved")],
        env={"PYTHONPATH": str(copy), "PATH": "", "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
    )
    assert done.stdout.strip() == "it works", done.stderr[-3000:]


NAMES_NONE = (
    *("config/config.py", "config/checks.py", "config/describe.py", "config/weights.py"),
    *("config/readout.py", "layout/names.py", "model/looped.py", "model/weights.py"),
    *("nn/loop/run.py", "nn/loop/hooks.py", "nn/unrolling.py"),
    *("nn/attention.py", "nn/block.py", "nn/block_modules.py", "nn/context.py"),
)
"""What goes over the list of mechanisms."""


@pytest.mark.parametrize("file", NAMES_NONE)
def test_what_goes_over_the_list_names_no_module_of_it(file):
    text = (PACKAGE / file).read_text(encoding="utf-8")
    for module in (PACKAGE / "mechanisms").glob("*.py"):
        if module.stem not in (
            *(
                "__init__",
                "mechanism",
                "block_parts",
                "tensors",
                "norm",
                "exclusions",
                "kv_sharing",
            ),
        ):
            allowed = module.stem == "iteration_weights"
            assert allowed or f"mechanisms.{module.stem} " not in text, (file, module.stem)
