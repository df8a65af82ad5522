"""Does a loop compose facts that it keeps in its weights? (2405.15071, 2604.07822, 2505.23653)

    python demos/findings/multi_hop.py [--quick]

A small world of entities and relations: every pair of both leads to one entity. Its facts are
learnt one by one (``h r``, answer t), and chained (``h r1 r2`` and ``h r1 r2 r3``). One fact in ten
never stands in a chain, and one two-hop chain in ten of the others is held out. Three phases are
looked for, on the last token's answer: training chains (memorisation), held-out chains of facts
that stand in other chains (in distribution), and chains of facts that were only ever learnt one by
one (out of distribution). Chains of one fact of either kind say which hop is in the way.

A looped model of one layer and four iterations is compared with a feedforward one of equal
parameters (two layers with narrower MLPs) and one of equal depth (four layers). Over training, the
state where the intermediate entity should be is compared with its centroid over the facts that
stand in chains. At the end, chains of up to six hops are run with up to ten iterations.
"""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from finding import bootstrap, merged
from finding import main as run_finding
from torch import Tensor

from tl_loops import LoopedTransformer, LoopedTransformerConfig
from tl_loops.metrics import cosine_clustering, shuffled_cosine_clustering
from tl_loops.plots import plot_curves
from tl_loops.training import (
    UNTRAINED,
    ConstantIterations,
    TrainingBatch,
    TrainingSettings,
    UniformIterations,
    train,
)

N_RELATIONS = 16
ONE_IN = 10
"""One fact in so many stands in no chain; one chain in so many is held out."""
MOST_HOPS = 6
"""Of chains that are asked at the end; three at most are trained."""
ITERATIONS = tuple(range(1, 11))
_LOOP: Mapping[str, Any] = dict(n_core=1, n_iterations=4, d_mlp=256, injection=None)
ARMS: Mapping[str, Mapping[str, Any]] = {
    "looped, 1 layer, 4 iterations": {**_LOOP, "initial_state": "embed"},
    "feedforward, 2 layers (equal parameters)": dict(n_core=2, d_mlp=86),
    "feedforward, 4 layers (equal depth)": dict(n_core=4, d_mlp=256),
}
PHASES = ("facts", "training", "in_distribution", "out_of_distribution")
MIXED = ("first_fact_alone", "second_fact_alone")
"""Chains of one fact that stands in chains and one that does not."""
MERGED = ("final", "by_iterations")
"""What is also given over all seeds; intervals of a single run are over its chains."""


@dataclass(frozen=True)
class World:
    """Facts, and which of them stand in chains.

    Attributes:
        leads: The entity that an entity and a relation lead to, [entity, relation].
        alone: Whether a fact stands in no training chain, [entity, relation].
        held_out: Whether a two-hop chain is held out, [entity, relation, relation].
    """

    leads: Tensor
    alone: Tensor
    held_out: Tensor

    @property
    def n_entities(self) -> int:
        """Entities; tokens of relations come after theirs, and one for padding at the end."""
        return self.leads.shape[0]

    @property
    def padding(self) -> int:
        """Token after the end of a question."""
        return sum(self.leads.shape)

    def follow(self, start: Tensor, relations: Tensor) -> tuple[Tensor, Tensor]:
        """Entities along chains [chain, hop + 1], and whether each fact stands alone."""
        path, alone = [start], []
        for relation in relations.unbind(1):
            alone.append(self.alone[path[-1], relation])
            path.append(self.leads[path[-1], relation])
        return torch.stack(path, 1), torch.stack(alone, 1)

    def tokens(self, start: Tensor, relations: Tensor, n_hops: int) -> Tensor:
        """Questions [chain, n_hops + 1], padded at the end."""
        given = torch.cat([start[:, None], self.n_entities + relations], 1)
        padding = torch.full((len(given), n_hops + 1 - given.shape[1]), self.padding)
        return torch.cat([given, padding], 1)


@dataclass(frozen=True)
class Chains:
    """Questions of one length: where they start, their relations, and the entities on the way."""

    start: Tensor
    relations: Tensor
    path: Tensor

    @property
    def answers(self) -> Tensor:
        """The entity after all hops."""
        return self.path[:, -1]

    def cut(self, n: int) -> "Chains":
        """The first ``n``."""
        return Chains(self.start[:n], self.relations[:n], self.path[:n])


def make_world(n_entities: int, seed: int) -> World:
    """A random world."""
    generator = torch.Generator().manual_seed(seed)
    shape = (n_entities, N_RELATIONS)
    return World(
        torch.randint(n_entities, shape, generator=generator),
        torch.rand(shape, generator=generator) < 1 / ONE_IN,
        torch.rand((*shape, N_RELATIONS), generator=generator) < 1 / ONE_IN,
    )


def all_chains(world: World, n_hops: int) -> Chains:
    """Every chain of one or two hops, in the order of its tokens."""
    axes = [torch.arange(world.n_entities), *[torch.arange(N_RELATIONS)] * n_hops]
    start, *relations = (each.flatten() for each in torch.meshgrid(*axes, indexing="ij"))
    chosen = torch.stack(relations, 1)
    return Chains(start, chosen, world.follow(start, chosen)[0])


def subset(chains: Chains, which: Tensor, seed: int) -> Chains:
    """Those that ``which`` names, in random order."""
    rows = which.nonzero()[:, 0]
    rows = rows[torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed))]
    return Chains(chains.start[rows], chains.relations[rows], chains.path[rows])


def phases(world: World, seed: int) -> dict[str, Chains]:
    """Facts, the two-hop chains by phase, and the mixed ones."""
    facts, chains = all_chains(world, 1), all_chains(world, 2)
    alone = world.follow(chains.start, chains.relations)[1]
    known, held = ~alone.any(1), world.held_out.flatten()
    everything = torch.ones_like(facts.start, dtype=torch.bool)
    first, second = alone.unbind(1)
    which = (known & ~held, known & held, first & second, first & ~second, second & ~first)
    found = {"facts": subset(facts, everything, seed)}
    for name, rows in zip((*PHASES[1:], *MIXED), which, strict=True):
        found[name] = subset(chains, rows, seed)
    return found


def draw_long(
    world: World, n: int, n_hops: int, generator: torch.Generator, trained: bool = True
) -> Chains:
    """Random longer chains of facts that stand in chains.

    Args:
        world: Where they lie.
        n: Chains that are drawn; those that break a rule are left out.
        n_hops: Of each.
        generator: Of the draws.
        trained: Leave out those with a held-out chain of two hops inside.
    """
    start = torch.randint(world.n_entities, (n,), generator=generator)
    relations = torch.randint(N_RELATIONS, (n, n_hops), generator=generator)
    path, alone = world.follow(start, relations)
    keep = ~alone.any(1)
    for hop in range(n_hops - 1) if trained else ():
        keep &= ~world.held_out[path[:, hop], relations[:, hop], relations[:, hop + 1]]
    return Chains(start[keep], relations[keep], path[keep])


def make(fields: Mapping[str, Any], world: World, seed: int, d_model: int) -> LoopedTransformer:
    """A model of the world's tokens."""
    return LoopedTransformer(
        LoopedTransformerConfig(
            **fields,
            d_model=d_model,
            n_heads=4,
            d_head=d_model // 4,
            d_vocab=world.padding + 1,
            n_ctx=MOST_HOPS + 1,
            tie_word_embeddings=True,
            initializer_range=0.5 * d_model**-0.5,
            seed=seed,
            device="cpu",
        )
    )


@torch.no_grad()
def right(model: LoopedTransformer, world: World, chains: Chains) -> Tensor:
    """Whether each chain is answered rightly, [chain]."""
    n_hops = chains.relations.shape[1]
    logits = model(world.tokens(chains.start, chains.relations, n_hops))
    return (logits[:, -1, : world.n_entities].argmax(-1) == chains.answers).double()


@torch.no_grad()
def clustering(model: LoopedTransformer, world: World) -> dict[str, list[float]]:
    """Cosine to the centroid of the intermediate entity at its place, after each unrolled layer.

    That place is the first relation. As nothing after it is seen there, a fact is one query.

    Returns:
        Of facts that stand in chains (``cohesion``) and of those that do not (``alignment``), both
        with the mean of all states taken away, and the first under shuffled entities
        (``shuffled``).
    """
    facts = all_chains(world, 1)
    _, cache = model.run_with_cache(world.tokens(facts.start, facts.relations, 1))
    layers = range(model.cfg.n_layers)
    states = torch.stack([cache["resid_post", layer][:, 1] for layer in layers])
    alone, entity = world.alone.flatten(), facts.answers
    known = states[:, ~alone], entity[~alone]
    found = cosine_clustering(*known, states[:, alone], entity[alone], mean_center=True)
    shuffled, _ = shuffled_cosine_clustering(*known, seed=0, n_shuffles=3, mean_center=True)
    return {
        "cohesion": found.entity_cohesion.nanmean(-1).tolist(),
        "alignment": [] if found.alignment is None else found.alignment.tolist(),
        "shuffled": shuffled.mean(0).tolist(),
    }


@dataclass(frozen=True)
class Questions:
    """Training data: a quarter facts, half two-hop chains, the rest three-hop chains.

    Attributes:
        world: Where they lie.
        sets: Its facts and chains, by phase.
        seed: Of the world.
    """

    world: World
    sets: Mapping[str, Chains]
    seed: int

    def draw(self, n: int, generator: torch.Generator) -> TrainingBatch:
        """Questions [question, 4], each with its answer at its last relation."""
        long = draw_long(self.world, n // 2, 3, generator).cut(n // 4)  # about half break a rule
        drawn = [long]
        for name, size in (("facts", n // 4), ("training", n // 2)):
            of = self.sets[name]
            rows = torch.randint(len(of.start), (size,), generator=generator)
            drawn.append(Chains(of.start[rows], of.relations[rows], of.path[rows]))
        tokens = torch.cat([self.world.tokens(of.start, of.relations, 3) for of in drawn])
        ends = torch.cat([torch.full_like(of.start, of.relations.shape[1]) for of in drawn])
        targets = torch.full_like(tokens, UNTRAINED)
        targets[torch.arange(len(tokens)), ends] = torch.cat([of.answers for of in drawn])
        return TrainingBatch(tokens, targets)

    def identity(self) -> dict[str, Any]:
        """Size and seed of the world."""
        return {"n_entities": self.world.n_entities, "seed": self.seed}


def train_on(
    model: LoopedTransformer,
    world: World,
    sets: Mapping[str, Chains],
    n_steps: int,
    n_batch: int,
    seed: int,
) -> list[dict[str, Any]]:
    """Train, and look at the phases and at the clustering every now and then.

    A looped model runs 3 to 6 iterations in training, drawn anew for each step.

    Returns:
        A row per look, about evenly spread over the logarithm of the step.
    """
    looped = model.cfg.n_iterations > 1
    settings = TrainingSettings(
        n_steps=n_steps,
        batch_size=n_batch,
        iterations=UniformIterations(3, 6) if looped else ConstantIterations(1),
        learning_rate=3e-3,
        decay=0.2,
        weight_decay=0.6,
        seed=seed,
    )
    looks = {round(n_steps * 0.01 ** (1 - i / 20)) for i in range(21)}

    def look(step: int) -> dict[str, Any] | None:
        if step not in looks:
            return None
        accuracy = {name: right(model, world, of.cut(600)).mean() for name, of in sets.items()}
        return {
            "accuracy": {name: float(share) for name, share in accuracy.items()},
            "clustering": clustering(model, world),
        }

    log = train(model, Questions(world, sets, seed), settings, look=look, progress=False)
    losses = log.column("loss")
    return [{"step": step, "loss": losses[step - 1], **row} for step, row in log.looks]


def by_iterations(
    model: LoopedTransformer, world: World, n_chains: int, seed: int
) -> dict[int, dict[str, Any]]:
    """Accuracy on random chains of 1 to 6 hops, of facts that stand in chains, by iterations."""
    generator = torch.Generator().manual_seed(seed)
    found = {}
    for n_hops in range(1, MOST_HOPS + 1):
        chains = draw_long(world, 4 * n_chains, n_hops, generator, trained=False).cut(n_chains)
        each = []
        for n in ITERATIONS:
            with model.iterations(n):
                each.append(right(model, world, chains))
        found[n_hops] = bootstrap(torch.stack(each, 1), seed=seed)
    return found


def measured(
    name: str, n_entities: int, d_model: int, n_steps: int, n_batch: int, seed: int
) -> dict[str, Any]:
    """Train one model in the world of its seed, and measure it."""
    world = make_world(n_entities, seed)
    sets = phases(world, seed)
    model = make(ARMS[name], world, seed, d_model)
    began = time.monotonic()
    rows = train_on(model, world, sets, n_steps, n_batch, seed)
    found: dict[str, Any] = {
        "n_params": model.cfg.n_params,
        "seconds": time.monotonic() - began,
        "n_chains": {phase: len(of.start) for phase, of in sets.items()},
        "training": rows,
        "final": {
            phase: bootstrap(right(model, world, of), seed=seed) for phase, of in sets.items()
        },
    }
    if model.cfg.n_iterations > 1:
        found["by_iterations"] = by_iterations(model, world, 20 if n_steps < 10 else 400, seed)
    return found


def measure(quick: bool, seed: int) -> dict[str, Any]:
    """All models, each seed in a world of its own."""
    n_entities, d_model, n_steps, n_batch, n_seeds = (
        (8, 16, 3, 32, 1) if quick else (40, 64, 8000, 256, 3)
    )
    sizes = (n_entities, d_model, n_steps, n_batch)
    models = {
        name: [measured(name, *sizes, s) for s in range(seed, seed + n_seeds)] for name in ARMS
    }
    return {
        "n_entities": n_entities,
        "n_relations": N_RELATIONS,
        "n_steps": n_steps,
        "n_seeds": n_seeds,
        "batch": n_batch,
        "chance": 1 / n_entities,
        "models": models,
        "over_seeds": {
            name: merged([{key: run[key] for key in MERGED if key in run} for run in runs])
            for name, runs in models.items()
        },
    }


def draw(results: dict[str, Any]) -> Any:
    """Accuracy on two-hop chains over training, mean and spread of the seeds."""
    curves, bands, steps = {}, {}, []
    for name, runs in results["models"].items():
        steps = [float(row["step"]) for row in runs[0]["training"]]
        looped = name.startswith("looped")
        for phase in (PHASES[2], MIXED[1], PHASES[3]) if looped else (PHASES[2], MIXED[1]):
            label = f"{name.split(' (')[0]}: {phase.replace('_', ' ')}"
            of = torch.tensor([[row["accuracy"][phase] for row in run["training"]] for run in runs])
            curves[label] = of.mean(0)
            bands[label] = (of.amax(0) - of.amin(0)) / 2
    return plot_curves(
        curves,
        "Held-out two-hop chains over training",
        x=steps,
        x_label="step",
        y_label="share answered rightly",
        std=bands,
        bounds=(0, 1),
        backend="matplotlib",
    )


def main(given: Sequence[str] | None = None) -> dict[str, Any]:
    return run_finding("multi_hop", __doc__.splitlines()[0], measure, draw, given)


if __name__ == "__main__":
    main()
