import numpy as np
import pytest
import torch
from PIL import Image
from transformers import (
    AutoImageProcessor,
    AutoModelForImageClassification,
    ViTConfig,
    ViTForImageClassification,
    ViTModel,
)

from polyscale import (
    FlexiViTImageProcessor,
    FlexiViTImageProcessorPil,
    QuadtreeViTConfig,
    QuadtreeViTForImageClassification,
    QuadtreeViTImageProcessor,
    S2ImageProcessor,
    S2VisionWrapper,
    SparseFormerConfig,
    SparseFormerImageProcessor,
    SparseFormerModel,
)
from polyscale.assets import sample_photographs
from polyscale.classification import classify_images, load_classifier
from polyscale.figures import (
    MAX_PICTURES,
    draw_classification,
    features_to_rgb,
    image_drawer,
    make_grid,
    show,
)
from polyscale.models.flexivit.plot_flexivit import draw_flexivit, draw_kernels, draw_patch_grid, flexivit_features
from polyscale.models.quadtree_vit.plot_quadtree_vit import draw_quadtrees, quadtree_image
from polyscale.models.s2_vision.plot_s2_vision import draw_s2
from polyscale.utils.processors import seen_region

from .tiny_checkpoints import save_tiny_flexivit


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return save_tiny_flexivit(tmp_path_factory.mktemp("flexivit"))


@pytest.fixture(scope="module")
def model(checkpoint):
    return AutoModelForImageClassification.from_pretrained(checkpoint).eval()


@pytest.fixture(scope="module")
def processor(checkpoint):
    return AutoImageProcessor.from_pretrained(checkpoint)


@pytest.fixture(scope="module")
def photograph():
    return Image.open(sample_photographs()[0]).convert("RGB")


def lines(axis) -> tuple[list[float], list[float]]:
    """The x of the vertical and the y of the horizontal lines on an axis."""
    vertical, horizontal = (
        [segment[0][coordinate] for segment in collection.get_segments()]
        for coordinate, collection in enumerate(axis.collections)
    )
    return vertical, horizontal


def dimmed(axis) -> list[tuple[float, ...]]:
    """(left, top, right, bottom) of the dimmed parts, in pixels of the model's input."""
    boxes = []
    for patch in axis.patches:
        corners = axis.transData.inverted().transform(patch.get_transform().transform(patch.get_path().vertices))
        boxes.append((*corners.min(axis=0).round(6).tolist(), *corners.max(axis=0).round(6).tolist()))
    return boxes


# the picture as the model sees it


@pytest.mark.parametrize("processor_class", [FlexiViTImageProcessor, FlexiViTImageProcessorPil])
@pytest.mark.parametrize("size", [(100, 60), (60, 100), (300, 300)])
def test_seen_region_is_what_the_processor_keeps(processor_class, size):
    processor = processor_class(
        size={"shortest_edge": 40},
        crop_size={"height": 20, "width": 30},
        do_normalize=False,
        do_rescale=False,
    )
    ramp = np.zeros((size[1], size[0], 3), dtype=np.uint8)
    ramp[..., 0] = np.linspace(0, 255, size[0])
    ramp[..., 1] = np.linspace(0, 255, size[1])[:, None]
    image = Image.fromarray(ramp)
    region = seen_region(image, processor).resize((30, 20), Image.Resampling.BICUBIC)
    seen = processor(images=image, return_tensors="np")["pixel_values"][0].transpose(1, 2, 0)
    assert np.abs(np.asarray(region, dtype=float) - seen).max() < 6


def test_seen_region_is_everything_without_a_crop(processor, photograph):
    assert seen_region(photograph, processor) is photograph


# patch grids


def test_patch_grid_lines_are_patch_borders(photograph):
    _, [[axis]] = make_grid(1, 1)
    draw_patch_grid(axis, photograph, (24, 32), (6, 8))
    assert lines(axis) == ([0, 8, 16, 24, 32], [0, 6, 12, 18, 24])
    assert (axis.get_xlim(), axis.get_ylim()) == ((0, 32), (24, 0))
    assert dimmed(axis) == []


def test_what_an_uneven_patch_size_drops_is_dimmed(photograph):
    figure, [[axis]] = make_grid(1, 1)
    draw_patch_grid(axis, photograph, (32, 32), 12)
    figure.draw_without_rendering()
    assert lines(axis) == ([0, 12, 24], [0, 12, 24])
    assert dimmed(axis) == [(24, 0, 32, 32), (0, 24, 24, 32)]

    _, [[padded]] = make_grid(1, 1)
    draw_patch_grid(padded, photograph, (32, 32), 12, remainder="pad")
    assert lines(padded) == ([0, 12, 24], [0, 12, 24])
    assert len(padded.patches) == 0


# features


def test_colours_are_principal_components_common_to_all_maps():
    generator = np.random.default_rng(0)
    directions = np.linalg.qr(generator.normal(size=(8, 3)))[0].T
    coefficients = generator.uniform(-1, 1, size=(4, 6, 3)) * [9, 3, 1]
    fine = coefficients @ directions + 5
    coarse = fine[::2, ::2] + 7
    colours = features_to_rgb([fine, coarse])
    assert [colour.shape for colour in colours] == [(4, 6, 3), (2, 3, 3)]
    assert all(colour.min() >= 0 and colour.max() <= 1 for colour in colours)
    # the strongest direction is the first channel, up to its sign
    correlation = np.corrcoef(colours[0][..., 0].ravel(), coefficients[..., 0].ravel())[0, 1]
    assert abs(correlation) > 0.98


def test_colours_do_not_depend_on_the_mean_of_a_map():
    features = np.random.default_rng(0).normal(size=(3, 4, 5))
    np.testing.assert_allclose(features_to_rgb([features + 3]), features_to_rgb([features]), atol=1e-9)
    first, second = features_to_rgb([features + 3, features - 4])
    np.testing.assert_allclose(first, second, atol=1e-9)


def test_colours_of_one_token_and_of_different_widths():
    assert features_to_rgb([np.ones((1, 1, 4))])[0].shape == (1, 1, 3)
    with pytest.raises(ValueError, match=r"`feature_maps` must all have one width, got \[4, 5\]"):
        features_to_rgb([np.ones((1, 1, 4)), np.ones((1, 1, 5))])


def test_flexivit_features_are_the_patch_tokens_in_raster_order(model, processor, photograph):
    pixel_values = processor(images=photograph, return_tensors="pt")["pixel_values"]
    fine, coarse = flexivit_features(model, pixel_values, [4, (8, 16)])
    assert (fine.shape, coarse.shape) == ((8, 8, 24), (4, 2, 24))
    with torch.no_grad():
        tokens = model.base_model(pixel_values, patch_size=4).last_hidden_state[0, 1:]
    np.testing.assert_array_equal(fine.reshape(64, 24), tokens.numpy())


# figures


def test_draw_flexivit_has_a_column_a_patch_size(model, processor, photograph):
    figure = draw_flexivit(model, processor, photograph, [4, 16])
    titles = [axis.get_title() for axis in figure.axes]
    assert titles == ["patch size 4\n64 tokens", "patch size 16\n4 tokens", "", ""]
    assert figure.axes[2].images[0].get_array().shape == (8, 8, 3)
    with pytest.raises(ValueError, match="`patch_size` must not be larger than the image"):
        draw_flexivit(model, processor, photograph, [40])


def test_draw_kernels_shows_resized_kernels_in_the_range_of_a_picture(model):
    figure = draw_kernels(model, [4, (8, 16)], count=3)
    arrays = [np.asarray(axis.images[0].get_array()) for axis in figure.axes]
    assert [array.shape for array in arrays] == [(4, 4, 3)] * 3 + [(8, 16, 3)] * 3
    for array in arrays:
        assert (array.min(), array.max()) == (0, 1)
    assert [figure.axes[index].get_ylabel() for index in (0, 3)] == ["4", "8x16"]


def test_draw_classification_has_a_row_a_picture_and_a_column_a_budget(model, processor, checkpoint, tmp_path):
    files = sample_photographs()[:2]
    records, _ = classify_images(files, checkpoint, [4, 8])
    figure = draw_classification(model, processor, records)
    assert len(figure.axes) == 4
    for axis, record in zip(figure.axes, records, strict=True):
        assert axis.get_xlabel() == f"{record['label']}  {record['score']:.0%}"
        assert len(lines(axis)[0]) == 32 // record["budget"] + 1
    assert [axis.get_title() for axis in figure.axes[:2]] == ["patch size 4\n64 tokens", "patch size 8\n16 tokens"]
    assert figure.axes[2].get_ylabel() == files[1].name
    figure.savefig(tmp_path / "sheet.png")
    with Image.open(tmp_path / "sheet.png") as picture:
        assert picture.size == (360, 405)


def test_draw_classification_draws_a_limited_number_and_needs_one(model, processor, tmp_path):
    records = []
    for index in range(MAX_PICTURES + 3):
        Image.new("RGB", (8, 8)).save(tmp_path / f"{index}.png")
        file = str(tmp_path / f"{index}.png")
        records.append({"file": file, "budget": 16, "tokens": 4, "label": "cat", "score": 1.0, "milliseconds": 1.0})
    assert len(draw_classification(model, processor, records).axes) == MAX_PICTURES
    with pytest.raises(ValueError, match="`records` is empty"):
        draw_classification(model, processor, [])


def test_a_model_without_patches_to_choose_is_drawn_as_the_picture(processor, photograph):
    config = ViTConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, image_size=32, patch_size=8
    )
    _, [[axis]] = make_grid(1, 1)
    image_drawer(ViTForImageClassification(config), processor)(axis, photograph, None)
    assert (len(axis.images), len(axis.collections)) == (1, 0)


def test_draw_s2_has_a_column_a_scale(photograph):
    base = ViTConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, image_size=32, patch_size=8
    )
    model = S2VisionWrapper.from_vision_model(ViTModel(base), scales=[1, 2]).eval()
    processor = S2ImageProcessor(size={"height": 64, "width": 64}, do_center_crop=False)
    figure = draw_s2(model, processor, photograph)
    titles = [axis.get_title() for axis in figure.axes]
    assert titles == ["32 x 32 pixels\n1 tile", "64 x 64 pixels\n4 tiles", "", ""]
    assert [axis.images[0].get_array().shape for axis in figure.axes[2:]] == [(4, 4, 3), (8, 8, 3)]
    with pytest.raises(ValueError, match="`scales` must be a list with one entry per scale, got 1"):
        draw_s2(model, processor, photograph, [1, 2])
    several = draw_s2(model, processor, photograph, [[1, 2], [2, 3]])
    assert [axis.get_title() for axis in several.axes if axis.get_title()] == [
        *titles[:2],
        "64 x 64 pixels\n4 tiles",
        "96 x 96 pixels\n9 tiles",
    ]
    assert several.axes[0].get_ylabel() == "tiles\n1+2"


def save_tiny_quadtree(folder):
    config = QuadtreeViTConfig(
        image_size=64,
        min_patch_size=8,
        max_patch_size=32,
        num_tokens=16,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
    )
    QuadtreeViTForImageClassification(config).save_pretrained(folder)
    QuadtreeViTImageProcessor(size={"height": 64, "width": 64}, do_center_crop=False).save_pretrained(folder)
    return folder


def test_a_quadtree_is_drawn_as_the_model_sees_it(tmp_path):
    save_tiny_quadtree(tmp_path)
    picture = Image.new("RGB", (64, 64))
    picture.paste((255, 255, 255), (40, 40, 60, 60))  # the lower right quarter is busy
    classifier = load_classifier(tmp_path, device="cpu")
    drawn = quadtree_image(classifier.model, classifier.image_processor, picture, num_tokens=7)
    assert drawn.size == (128, 128)
    borders = [drawn.getpixel((x, 96)) == (255, 255, 255) for x in (0, 63, 64, 16, 95)]
    assert borders == [True, True, True, False, True]  # a border at 16 px only where the quarter is split

    picture.save(tmp_path / "picture.png")
    records, _ = classify_images([tmp_path / "picture.png"], classifier, [4, 16])
    figure = draw_classification(classifier.model, classifier.image_processor, records)
    assert [axis.get_title() for axis in figure.axes] == ["4 tokens", "16 tokens"]
    assert [axis.get_title() for axis in draw_quadtrees(*models_of(classifier), picture).axes] == ["16 tokens"]
    with pytest.raises(ValueError, match="nearest legal budgets are 4 and 7"):
        draw_quadtrees(*models_of(classifier), picture, [5])


def models_of(classifier):
    return classifier.model, classifier.image_processor


def test_show_draws_a_sparseformer_and_takes_no_budget_for_it(tmp_path):
    config = SparseFormerConfig.preset("sparseformer_v1_tiny", num_latent_tokens=4)
    SparseFormerModel(config).save_pretrained(tmp_path)
    SparseFormerImageProcessor().save_pretrained(tmp_path)
    assert show(tmp_path, sample_photographs()[0]).mode == "RGB"
    with pytest.raises(ValueError, match="`budgets` must be None: the tokens of a SparseFormer"):
        show(tmp_path, sample_photographs()[0], [4])


def test_show_takes_a_checkpoint_and_a_file(checkpoint, tmp_path):
    assert show(checkpoint, sample_photographs()[0]).size == (567, 396)
    with pytest.raises(ValueError, match=r"missing\.png: no such file"):
        show(checkpoint, tmp_path / "missing.png")
    ViTConfig().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="`model` is of type 'vit', which has no drawing; those that have one"):
        show(tmp_path, sample_photographs()[0])
