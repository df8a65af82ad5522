"""The names that load, and what each stands for."""

from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

from tl_loops.config.config import LoopedTransformerConfig
from tl_loops.errors import near_names as near_names_of
from tl_loops.families.base import Family, KnownModel
from tl_loops.families.registry import FAMILIES
from tl_loops.loading.files import CONFIG_FILE
from tl_loops.loading.json_file import read_json


@dataclass(frozen=True)
class CatalogueEntry:
    """A model that loads by name, with what is known of it without network."""

    family: Family
    known: KnownModel

    @property
    def name(self) -> str:
        """The name to load it by."""
        return self.known.name

    @property
    def source(self) -> str:
        """Where its files come from."""
        if self.known.packaged is not None:
            return "packaged with tl_loops"
        source = f"https://huggingface.co/{self.known.name}"
        return f"{source} (pickles: convert them first)" if self.known.pickled else source

    def config(self) -> LoopedTransformerConfig:
        """Its config, with notation and exact number of parameters.

        Fields in ``known.unverified`` were not seen in the released file.
        """
        released, where = self.known.released, self.known.name
        if self.known.packaged is not None:
            path = packaged_directory(self.known.packaged) / CONFIG_FILE
            released, where = read_json(path), str(path)
        fields = self.family.config_fields(released, where)
        short = self.known.name.split("/")[-1]
        return LoopedTransformerConfig.from_dict({"model_name": short, **fields, "device": "cpu"})


def catalogue() -> list[CatalogueEntry]:
    """All models that load by name, the packaged ones first."""
    return [CatalogueEntry(family, known) for family in FAMILIES for known in family.known]


def find_known(name: str) -> CatalogueEntry | None:
    """The known model of a name or alias, in any case of letters; ``None`` if there is none."""
    wanted = name.lower()
    for entry in catalogue():
        if wanted in (entry.name.lower(), *entry.known.aliases):
            return entry
    return None


def near_names(name: str) -> list[str]:
    """Names and aliases that resemble an unknown one."""
    shown = {}
    for entry in catalogue():
        for known in (entry.name, *entry.known.aliases):
            shown[known.lower()] = known
    return [shown[near] for near in near_names_of(name, shown)]


def packaged_directory(name: str) -> Path:
    """Directory of a checkpoint that ships inside the package."""
    return Path(str(files("tl_loops").joinpath(name)))
