"""Several processes of one run: their launcher, their devices, and how they share results."""

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
import torch.distributed as dist

from tl_loops.runs.shards import Shard

_LAUNCHED = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def launched(environment: Mapping[str, str] | None = None) -> bool:
    """Whether torchrun, accelerate launch or the like started this process as one of several."""
    given = os.environ if environment is None else environment
    return all(name in given for name in _LAUNCHED) and given["WORLD_SIZE"] != "1"


def rank_device() -> torch.device:
    """The device of this process: the GPU of its place on the machine, else the CPU.

    Raises:
        ValueError: There are GPUs, but fewer than processes on this machine.
    """
    local = int(os.environ.get("LOCAL_RANK", "0"))
    n_gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if not n_gpus:
        return torch.device("cpu")
    if local >= n_gpus:
        raise ValueError(
            f"process {local} of this machine has no GPU of its own: there are {n_gpus}; start at "
            f"most {n_gpus} per machine (torchrun --nproc-per-node {n_gpus})"
        )
    return torch.device("cuda", local)


@contextmanager
def process_group() -> Iterator[Shard]:
    """The group of the processes that the launcher started: nccl with GPUs, else gloo.

    A group that exists is used and left alone.

    Yields:
        Which shard this process takes.
    """
    ours = not dist.is_initialized()
    if ours:
        device = rank_device()
        if device.type == "cuda":
            torch.cuda.set_device(device)
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    try:
        yield this_rank()
    finally:
        if ours:
            dist.destroy_process_group()


def this_rank() -> Shard:
    """The shard of this process in the default process group.

    Raises:
        ValueError: There is no process group.
    """
    if not (dist.is_available() and dist.is_initialized()):
        raise ValueError(
            "shard='distributed' needs a process group of torch.distributed: start the script with "
            "torchrun or accelerate launch and call torch.distributed.init_process_group() first, "
            "or give the shard as (k, n)"
        )
    return Shard(dist.get_rank(), dist.get_world_size())


def exchange(content: bytes) -> list[bytes]:
    """What each process gives, in the order of ranks, on every one of them."""
    found: list[bytes] = [b""] * dist.get_world_size()
    dist.all_gather_object(found, content)
    return found
