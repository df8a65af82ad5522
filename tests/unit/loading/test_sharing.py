"""The model card of a saved checkpoint, and putting it on the hub."""

import re

import pytest
import torch
from huggingface_hub import HfApi, ModelCard

from tests.models import tiny_model, tiny_tokens
from tl_loops import CheckpointError, LoopedTransformer
from tl_loops.loading.card import model_card


@pytest.fixture(scope="module")
def model():
    return tiny_model("ouro")


def test_a_saved_model_has_a_card_that_the_hub_reads(model, tmp_path):
    model.save_pretrained(tmp_path)
    card = ModelCard.load(tmp_path / "README.md")
    assert card.data.library_name == "tl_loops" and "transformer-lens" in card.data.tags
    assert model.cfg.describe() in card.text and model.cfg.notation in card.text


def test_the_code_of_the_card_loads_the_model(model, tmp_path, monkeypatch):
    model.save_pretrained(tmp_path)
    text = (tmp_path / "README.md").read_text(encoding="utf-8")
    code = re.search(r"```python\n(.*?)```", text, re.S).group(1)
    loading = code.split("logits", 1)[0].replace("REPOSITORY OR DIRECTORY", str(tmp_path))
    names = {}
    exec(loading, names)
    assert torch.equal(names["model"](tiny_tokens()), model(tiny_tokens()))


def test_an_edited_card_stays_and_ours_follows_the_model(model, tmp_path):
    model.save_pretrained(tmp_path)
    other = tiny_model("ouro", n_iterations=2)
    other.save_pretrained(tmp_path)
    path = tmp_path / "README.md"
    assert path.read_text(encoding="utf-8") == model_card(other.cfg)
    path.write_text("mine", encoding="utf-8")
    model.save_pretrained(tmp_path)
    assert path.read_text(encoding="utf-8") == "mine"


def test_a_push_is_one_commit_of_the_saved_directory(model, tmp_path, monkeypatch):
    seen = {}

    class Address:
        repo_id, commit_url = "me/looped", "the commit"

    def create(self, repo_id, **options):
        seen["made"] = (repo_id, options["private"])
        return Address

    def upload(self, repo_id, folder_path, **options):
        seen["to"] = (repo_id, options["revision"], options["commit_message"])
        loaded = LoopedTransformer.from_pretrained_no_processing(folder_path)
        seen["logits"] = loaded(tiny_tokens())
        return Address

    monkeypatch.setattr(HfApi, "create_repo", create)
    monkeypatch.setattr(HfApi, "upload_folder", upload)
    assert model.push_to_hub("looped", private=True) == "the commit"
    assert seen["made"] == ("looped", True)
    assert seen["to"] == ("me/looped", None, "Upload model")
    assert torch.equal(seen["logits"], model(tiny_tokens()))


def test_a_hub_that_cannot_be_reached_is_one_error(model, monkeypatch):
    def fail(self, repo_id, **options):
        raise OSError("no network")

    monkeypatch.setattr(HfApi, "create_repo", fail)
    with pytest.raises(CheckpointError, match=r"'me/looped' could not be uploaded.*no network"):
        model.push_to_hub("me/looped")
