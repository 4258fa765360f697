import json
import stat

import pytest
import torch
from transformers import ViTConfig, ViTImageProcessor, ViTModel

import polyscale
from polyscale import hub


def tiny_model(cls=polyscale.FlexiViTForImageClassification):
    config = polyscale.FlexiViTConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=16, base_patch_size=8, num_labels=2
    )
    return cls(config)


def test_the_folder_names_every_head_and_both_processors(tmp_path):
    folder = hub.save_with_code(tiny_model(), tmp_path / "model", polyscale.FlexiViTImageProcessor())
    assert folder == tmp_path / "model"
    assert json.loads((folder / "config.json").read_text())["auto_map"] == {
        "AutoBackbone": "modeling_flexivit.FlexiViTBackbone",
        "AutoConfig": "configuration_flexivit.FlexiViTConfig",
        "AutoModel": "modeling_flexivit.FlexiViTModel",
        "AutoModelForImageClassification": "modeling_flexivit.FlexiViTForImageClassification",
    }
    assert json.loads((folder / "preprocessor_config.json").read_text())["auto_map"] == {
        "AutoImageProcessor": {
            "pil": "image_processing_pil_flexivit.FlexiViTImageProcessorPil",
            "torchvision": "image_processing_flexivit.FlexiViTImageProcessor",
        }
    }
    for module in folder.glob("*.py"):
        for line in module.read_text().splitlines():
            assert not line.startswith(("from ..", "import polyscale", "from polyscale")), (module, line)


@pytest.mark.parametrize(
    "cls", [polyscale.FlexiViTModel, polyscale.FlexiViTForImageClassification, polyscale.FlexiViTBackbone]
)
def test_any_head_may_be_saved(cls, tmp_path):
    folder = hub.save_with_code(tiny_model(cls), tmp_path)
    assert set(json.loads((folder / "config.json").read_text())["auto_map"]) == {
        "AutoBackbone",
        "AutoConfig",
        "AutoModel",
        "AutoModelForImageClassification",
    }
    assert not (folder / "preprocessor_config.json").exists()
    assert type(cls.from_pretrained(folder)) is cls


def test_code_is_never_written_unless_asked_for(tmp_path):
    model, processor = tiny_model(), polyscale.FlexiViTImageProcessor()
    hub.save_with_code(model, tmp_path / "with", processor)
    model.save_pretrained(tmp_path / "plain")
    processor.save_pretrained(tmp_path / "plain")
    assert not list((tmp_path / "plain").glob("*.py"))
    for name in ("config.json", "preprocessor_config.json"):
        assert "auto_map" not in json.loads((tmp_path / "plain" / name).read_text())


def test_other_files_of_the_folder_stay(tmp_path):
    (tmp_path / "README.md").write_text("a card")
    hub.save_with_code(tiny_model(), tmp_path)
    assert (tmp_path / "README.md").read_text() == "a card"


def test_foreign_models_and_processors_are_refused(tmp_path):
    vit = ViTModel(ViTConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16))
    with pytest.raises(ValueError, match=r"only a model of a registered family.*save_pretrained"):
        hub.save_with_code(vit, tmp_path / "model")
    with pytest.raises(ValueError, match=r"`processor` is a ViTImageProcessor.*not registered with FlexiViTConfig"):
        hub.save_with_code(tiny_model(), tmp_path / "model", ViTImageProcessor())
    assert not (tmp_path / "model").exists()


def test_a_model_inside_another_travels_with_it(tmp_path):
    config = polyscale.S2VisionConfig(vision_config=tiny_model().config, scales=[1, 2])
    folder = hub.save_with_code(polyscale.S2VisionWrapper(config), tmp_path / "model")
    assert (
        json.loads((folder / "config.json").read_text())["auto_map"]["AutoModel"] == "polyscale_parts.S2VisionWrapper"
    )
    assert {"modeling_flexivit.py", "modeling_s2_vision.py", "polyscale_parts.py"} <= {
        path.name for path in folder.glob("*.py")
    }


class RecordingApi:
    """Stands in for the upload alone: it keeps what would have been sent."""

    def __init__(self, token=None):
        self.token = token
        self.calls = []
        type(self).last = self

    def create_repo(self, repo_id, **kwargs):
        self.calls.append(("create_repo", repo_id, kwargs))

    def upload_folder(self, *, folder_path, **kwargs):
        self.files = {path.name: path.read_bytes() for path in folder_path.iterdir()}
        self.calls.append(("upload_folder", kwargs))
        return "commit"


def test_push_to_hub_uploads_the_same_folder(tmp_path, monkeypatch):
    model, processor = tiny_model(), polyscale.FlexiViTImageProcessor()
    folder = hub.save_with_code(model, tmp_path, processor)
    monkeypatch.setattr(hub, "HfApi", RecordingApi)
    answer = hub.push_to_hub(model, "someone/flexivit-tiny", processor, private=True, token="hf_x", revision="v1")
    api = RecordingApi.last
    assert answer == "commit"
    assert api.token == "hf_x"
    assert api.calls == [
        ("create_repo", "someone/flexivit-tiny", {"private": True, "exist_ok": True}),
        (
            "upload_folder",
            {
                "repo_id": "someone/flexivit-tiny",
                "revision": "v1",
                "commit_message": "Upload the model with its code",
                "create_pr": False,
            },
        ),
    ]
    assert api.files == {path.name: path.read_bytes() for path in folder.iterdir()}


def test_nothing_is_uploaded_when_the_folder_cannot_be_made(monkeypatch):
    monkeypatch.setattr(hub, "HfApi", RecordingApi)
    with pytest.raises(ValueError, match="`processor`"):
        hub.push_to_hub(tiny_model(), "someone/flexivit-tiny", ViTImageProcessor())
    assert RecordingApi.last.calls == []


def test_the_folder_keeps_its_mode_its_links_and_its_notes_and_no_stale_weights(tmp_path):
    model = tiny_model()
    folder, victim = tmp_path / "model", tmp_path / "victim"
    folder.mkdir()
    folder.chmod(0o755)
    victim.write_text("mine")
    (folder / "config.json").symlink_to(victim)
    (folder / "notes.txt").write_text("mine")
    hub.save_with_code(model, folder, max_shard_size="5KB")
    assert stat.S_IMODE(folder.stat().st_mode) == 0o755
    assert victim.read_text() == "mine"
    assert (folder / "notes.txt").read_text() == "mine"
    assert not (folder / "config.json").is_symlink()
    assert (folder / "model.safetensors.index.json").is_file()
    hub.save_with_code(model, folder)
    assert sorted(path.name for path in folder.glob("*model*.safetensors*")) == ["model.safetensors"]
    loaded = type(model).from_pretrained(folder)
    assert all(torch.equal(tensor, loaded.state_dict()[name]) for name, tensor in model.state_dict().items())
