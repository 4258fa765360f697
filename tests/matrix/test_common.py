"""Hugging Face's own common test-suite, asked of every family: models, backbones and image processors.

A test is skipped only where the method itself makes its expectation wrong; the reason stands in the family's row.
"""

import copy
import unittest

import pytest
from torch import nn
from transformers import set_seed
from transformers.models.auto import modeling_auto

from polyscale.assets import sample_photographs

from .families import FAMILIES, Family
from .source_distribution import import_common_tests


pytestmark = pytest.mark.slow

_PICTURE = sample_photographs()[0]
_modeling = import_common_tests("test_modeling_common", _PICTURE)
_backbone = import_common_tests("test_backbone_common", _PICTURE)
_processing = import_common_tests("test_image_processing_common", _PICTURE)


@pytest.fixture(autouse=True)
def _families_in_the_auto_mappings(monkeypatch):
    """The suite finds what a class is for by its name in transformers' tables, where third parties are not."""
    for family in FAMILIES:
        name = family.make_config().model_type
        table = "VIDEO" if family.is_video else "IMAGE"
        classifiers = getattr(modeling_auto, f"MODEL_FOR_{table}_CLASSIFICATION_MAPPING_NAMES")
        monkeypatch.setitem(modeling_auto.MODEL_MAPPING_NAMES, name, family.model.__name__)
        monkeypatch.setitem(classifiers, name, family.classifier.__name__)
        if family.backbone is not None:
            monkeypatch.setitem(modeling_auto.MODEL_FOR_BACKBONE_MAPPING_NAMES, name, family.backbone.__name__)


@pytest.fixture(autouse=True)
def _the_same_images_in_every_run():
    """The suite draws its images; where it compares backends, some draws are past its tolerance by a pixel."""
    set_seed(0)


class ModelTester:
    """What the suite asks of a family: a tiny configuration, inputs, and the numbers it compares outputs with."""

    is_training = True
    batch_size = 4

    def __init__(self, family: Family):
        self.family = family
        config = self.get_config()
        for name in ("num_hidden_layers", "num_attention_heads", "hidden_size"):
            setattr(self, name, getattr(config, name, None))
        self.image_size = family.input_shape[-1]
        self.seq_length = getattr(config, "num_prefix_tokens", 0) + family.budgets[0].num_tokens
        for name, value in family.common_tester.items():
            setattr(self, name, value)

    def get_config(self):
        return self.family.make_config(**self.family.common_overrides)

    def prepare_config_and_inputs_for_common(self):
        return self.get_config(), {"pixel_values": self.family.make_inputs(self.batch_size)}


def _skips(family: Family, base: type) -> dict:
    def skipped(reason: str):
        @unittest.skip(reason)
        def test(self):
            """Skipped with its reason."""

        return test

    return {name: skipped(reason) for name, reason in family.common_skips.items() if hasattr(base, name)}


def _model_test(family: Family) -> type:
    def set_up(self):
        self.model_tester = ModelTester(family)

    def test_embeddings(self):
        """As transformers' own vision models ask it: only text models embed with an nn.Embedding."""
        for model_class in self.all_model_classes:
            model = model_class(self.model_tester.get_config())
            assert isinstance(model.get_input_embeddings(), nn.Module)
            assert model.get_output_embeddings() is None

    members = {
        "setUp": set_up,
        "all_model_classes": (family.model, family.classifier),
        "test_resize_embeddings": False,
        "test_can_init_all_missing_weights_before_2023": True,
        "test_model_get_set_embeddings": test_embeddings,
        **_skips(family, _modeling.ModelTesterMixin),
    }
    return type(f"TestCommonModel_{family.name}", (_modeling.ModelTesterMixin, unittest.TestCase), members)


def _projection_test(family: Family) -> type:
    """The model with CLIP's projection; like CLIP's own it computes no loss, so that it is not trained alone."""

    def set_up(self):
        self.model_tester = ModelTester(family)
        self.model_tester.is_training = False

    base = _model_test(family)
    return type(
        f"TestCommonProjection_{family.name}", (base,), {"setUp": set_up, "all_model_classes": (family.projecting,)}
    )


def _backbone_test(family: Family) -> type:
    def set_up(self):
        self.model_tester = ModelTester(family)

    members = {
        "setUp": set_up,
        "all_model_classes": (family.backbone,),
        "config_class": type(family.make_config()),
        **_skips(family, _backbone.BackboneTesterMixin),
    }
    return type(f"TestCommonBackbone_{family.name}", (_backbone.BackboneTesterMixin, unittest.TestCase), members)


def _processor_test(family: Family) -> type:
    def get_classes(self):
        return {"torchvision": family.processor, "pil": family.processor_pil}

    def init(self, parent):
        _processing.ImageProcessingTester.__init__(self, parent, **copy.deepcopy(family.processor_kwargs))

    tester = type(
        f"ProcessorTester_{family.name}",
        (_processing.ImageProcessingTester,),
        {"__init__": init, "_get_image_processing_classes": get_classes},
    )
    members = {
        "image_processor_tester_class": tester,
        "test_cast_dtype": True,
        **_skips(family, _processing.ImageProcessingTestMixin),
    }
    name = f"TestCommonImageProcessor_{family.name}"
    return type(name, (_processing.ImageProcessingTestMixin, unittest.TestCase), members)


for _family in FAMILIES:
    _makers = [_model_test]
    if _family.projecting is not None:
        _makers.append(_projection_test)
    if _family.backbone is not None:
        _makers.append(_backbone_test)
    if _family.processor_pil is not None:
        _makers.append(_processor_test)
    for _make in _makers:
        _class = _make(_family)
        _class.pytestmark = [pytest.mark.matrix_cell("Hugging Face's common test-suite", _family.name)]
        globals()[_class.__name__] = _class
del _class, _make, _makers, _family
