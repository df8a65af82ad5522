"""Peak memory of loading a checkpoint of Ouro-1.4B's shape, as a multiple of its weights.

Writes random weights in shards to a temporary directory, loads them with ``from_pretrained`` in a
fresh process, and prints that process's peak resident memory above what it had after its imports.

    python tests/benchmarks/loading_memory.py [--layers 24] [--stored float32] [--dtype float32]

Exit code 1 if the ratio is above 1.15. Needs the size of the weights (5.7 GB for 24 layers) once on
disk and once in memory.
"""

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

LIMIT = 1.15


def config(n_layers: int) -> dict:
    return {
        "model_type": "ouro",
        "architectures": ["OuroForCausalLM"],
        "vocab_size": 49152,
        "hidden_size": 2048,
        "intermediate_size": 5632,
        "num_hidden_layers": n_layers,
        "num_attention_heads": 16,
        "num_key_value_heads": 16,
        "head_dim": 128,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1e6,
        "max_position_embeddings": 65536,
        "tie_word_embeddings": False,
        "total_ut_steps": 4,
        "early_exit_threshold": 1.0,
    }


def make(directory: Path, n_layers: int, stored: str) -> None:
    """Write a checkpoint of random weights, one shard a layer."""
    import torch

    from tl_loops.families.ouro import OURO
    from tl_loops.loading.open import Checkpoint, load_config
    from tl_loops.loading.save import write_safetensors

    (directory / "config.json").write_text(json.dumps(config(n_layers)))
    cfg = load_config(Checkpoint(directory, "random"), device="cpu")
    generator = torch.Generator().manual_seed(0)
    shards: dict[str, list] = {}
    for spec in OURO.tensors(cfg):
        layer = spec.key.split(".")[2] if ".layers." in spec.key else spec.key
        shards.setdefault(layer, []).append(spec)
    weight_map = {}
    for number, specs in enumerate(shards.values()):
        file = f"model-{number:05d}.safetensors"
        tensors = (torch.empty(spec.shape, dtype=getattr(torch, stored)) for spec in specs)
        filled = [tensor.normal_(0, 0.02, generator=generator) for tensor in tensors]
        write_safetensors(
            directory / file, [(spec.key, t) for spec, t in zip(specs, filled, strict=True)]
        )
        weight_map |= {spec.key: file for spec in specs}
    index = json.dumps({"weight_map": weight_map})
    (directory / "model.safetensors.index.json").write_text(index)


def load(directory: Path, dtype: str) -> None:
    """Load in this process; print the growth of resident memory and its ratio to the weights."""
    import warnings

    import torch

    import tl_loops

    torch.set_num_threads(1)
    before, start = resident(), time.perf_counter()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = tl_loops.LoopedTransformer.from_pretrained(
            str(directory), dtype=dtype, device="cpu"
        )
    seconds = time.perf_counter() - start
    parameters = list(model.physical_named_parameters())
    weights = sum(p.numel() * p.element_size() for _, p in parameters)
    assert model.cfg.n_params == sum(p.numel() for _, p in parameters)
    loaded = peak() - before
    ratio = loaded / weights
    print(
        f"{model.cfg.n_params:,} parameters, {weights / 1e9:.3f} GB of weights in {dtype}\n"
        f"before loading {before / 1e9:.3f} GB, peak above that {loaded / 1e9:.3f} GB, "
        f"ratio {ratio:.3f} (limit {LIMIT}), {seconds:.1f} s"
    )
    sys.exit(ratio > LIMIT)


def peak() -> int:
    """Peak resident memory of this process, in bytes."""
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def resident() -> int:
    """Resident memory now, in bytes; where the system does not tell, the peak so far."""
    statm = Path("/proc/self/statm")
    if statm.exists():
        return int(statm.read_text().split()[1]) * resource.getpagesize()
    return peak()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=24)
    parser.add_argument("--stored", default="float32", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--step", choices=["make", "load"], help=argparse.SUPPRESS)
    parser.add_argument("--directory", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.step == "make":
        make(args.directory, args.layers, args.stored)
    elif args.step == "load":
        load(args.directory, args.dtype)
    else:
        # Both steps in processes of their own: a child starts with its parent's peak on Linux, so
        # this process must stay small.
        with tempfile.TemporaryDirectory() as directory:
            arguments = [sys.executable, __file__, *sys.argv[1:], "--directory", directory]
            subprocess.run([*arguments, "--step", "make"], check=True)
            sys.exit(subprocess.run([*arguments, "--step", "load"]).returncode)


if __name__ == "__main__":
    main()
