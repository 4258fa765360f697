"""FlexiViT at run time: kernels and positions of every size, training draws, backbone, bad input."""

import copy

import pytest
import torch
import torch.nn.functional as F

from polyscale import FlexiViTBackbone, FlexiViTConfig, FlexiViTForImageClassification, FlexiViTModel


def plain_kernel(kernel, new_size, interpolation, antialias):
    height, width = kernel.shape[-2:]
    unit_patches = torch.eye(height * width).reshape(-1, 1, height, width)
    resize = F.interpolate(unit_patches, new_size, mode=interpolation, antialias=antialias).flatten(1)
    resized = kernel.flatten(2) @ torch.linalg.pinv(resize, rtol=1e-5).T
    return resized.reshape(*kernel.shape[:2], *new_size)


def plain_embeddings(model, images, patch_size):
    """What the first layer must get: convolution by a resized kernel, resized positions, CLS in front without one."""
    config, embeddings = model.config, model.embeddings
    projection = embeddings.patch_embeddings.projection
    kernel = plain_kernel(projection.weight, patch_size, config.kernel_interpolation, config.kernel_antialias)
    patches = F.conv2d(images, kernel, projection.bias, stride=patch_size)
    rows, columns = patches.shape[-2:]
    grid = embeddings.position_embeddings.reshape(1, *config.position_grid, -1).permute(0, 3, 1, 2)
    grid = F.interpolate(
        grid, (rows, columns), mode=config.position_interpolation, antialias=config.position_antialias
    )
    tokens = (patches + grid).flatten(2).transpose(1, 2)
    return torch.cat([embeddings.prefix_tokens.cls_token.expand(len(images), -1, -1), tokens], dim=1)


@pytest.mark.parametrize("image_size", [(32, 32), (32, 48), (24, 16)])
@pytest.mark.parametrize("patch_size", [(8, 8), (4, 4), (16, 16), (4, 8), (5, 7)])
@pytest.mark.parametrize("kernel", [("bilinear", False), ("bicubic", True)])
def test_embeddings_equal_plain_formula(make_model, image_size, patch_size, kernel):
    model = make_model(kernel_interpolation=kernel[0], kernel_antialias=kernel[1])
    images = torch.randn(2, 3, *image_size)
    with torch.no_grad():
        tokens, patch_grid = model.embeddings(images, patch_size)
        expected = plain_embeddings(model, images, patch_size)
    assert patch_grid == (image_size[0] // patch_size[0], image_size[1] // patch_size[1])
    torch.testing.assert_close(tokens, expected, atol=1e-4, rtol=1e-4)


def test_interpolated_kernels_are_another_choice(make_model, images):
    model = make_model(resize_method="interpolate")
    kernel = model.embeddings.patch_embeddings.projection.weight
    expected = F.interpolate(kernel, (4, 4), mode="bilinear")
    torch.testing.assert_close(model.embeddings.patch_embeddings.kernel_for((4, 4)), expected, atol=1e-6, rtol=1e-5)


def test_a_changed_config_is_followed(make_model, images):
    model = make_model()
    model.config.kernel_interpolation, model.config.kernel_antialias = "bicubic", True
    model.config.remainder = "pad"
    other = make_model(kernel_interpolation="bicubic", kernel_antialias=True, remainder="pad")
    tokens = model(images, patch_size=5).last_hidden_state
    assert tokens.shape[1] == 1 + 49
    assert torch.equal(tokens, other(images, patch_size=5).last_hidden_state)


def test_token_count_is_what_was_promised(make_model):
    for remainder in ("crop", "pad"):
        model = make_model(remainder=remainder, num_register_tokens=2, prefix_positions="cls")
        for image_size in ((32, 32), (30, 44)):
            for patch_size in (4, 7, (6, 9)):
                output = model(torch.randn(1, 3, *image_size), patch_size=patch_size)
                assert output.last_hidden_state.shape[1] == 3 + model.num_tokens_for(image_size, patch_size)
                assert output.pooler_output.shape == (1, 16)


def test_positions_follow_the_shape_of_the_grid(make_model):
    """16 patches as 2 x 8 are not 16 patches as 4 x 4."""
    model = make_model()
    grid = model.embeddings.position_embeddings.reshape(1, 4, 4, 16).permute(0, 3, 1, 2)
    expected = F.interpolate(grid, (2, 8), mode="bilinear", antialias=True).flatten(2).transpose(1, 2)
    actual = model.embeddings.position_embeddings_for((2, 8))
    torch.testing.assert_close(actual, expected, atol=1e-6, rtol=1e-5)
    assert torch.equal(model.embeddings.position_embeddings_for((4, 4)), model.embeddings.position_embeddings)


@pytest.mark.parametrize(("prefix_positions", "placed"), [("none", 0), ("cls", 1), ("all", 3)])
def test_prefix_tokens_get_the_positions_they_have(make_model, images, prefix_positions, placed):
    model = make_model(num_register_tokens=2, prefix_positions=prefix_positions)
    embeddings = model.embeddings
    tokens, _ = embeddings(images)
    expected = embeddings.prefix_tokens(2).clone()
    expected[:, :placed] += embeddings.position_embeddings[:, :placed]
    torch.testing.assert_close(tokens[:, :3], expected)
    patches = embeddings.patch_embeddings(images, (8, 8)) + embeddings.position_embeddings[:, placed:]
    torch.testing.assert_close(tokens[:, 3:], patches)


def test_crop_drops_the_rest_and_pad_adds_zeros(make_model):
    images = torch.randn(2, 3, 30, 35)
    with torch.no_grad():
        crop = make_model(remainder="crop")(images, patch_size=8).last_hidden_state
        assert torch.equal(crop, make_model()(images[:, :, :24, :32].contiguous(), patch_size=8).last_hidden_state)
        pad = make_model(remainder="pad")(images, patch_size=8).last_hidden_state
        padded = torch.zeros(2, 3, 32, 40)
        padded[:, :, :30, :35] = images
        torch.testing.assert_close(pad, make_model()(padded, patch_size=8).last_hidden_state)
    with pytest.raises(ValueError, match="does not divide"):
        make_model(remainder="error")(images, patch_size=8)


def prepared_model(model, patch_size):
    """The same weights with the kernel resized beforehand, in float32: what every call must equal."""
    config = copy.deepcopy(model.config)
    config.base_patch_size, config.patch_size = patch_size, None
    prepared = type(model)(config)
    state_dict = dict(model.state_dict())
    name = next(name for name in state_dict if name.endswith("patch_embeddings.projection.weight"))
    size = (patch_size, patch_size)
    state_dict[name] = plain_kernel(state_dict[name].float(), size, "bilinear", False).to(state_dict[name].dtype)
    prepared.load_state_dict(state_dict)
    return prepared.to(next(model.parameters()).dtype).eval()


def assert_kernel_is_fresh(model, images, atol=1e-4):
    with torch.no_grad():
        actual = model(images, patch_size=4)[0]
        torch.testing.assert_close(actual, prepared_model(model, 4)(images)[0], atol=atol, rtol=1e-3)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_kernels_stay_right_when_the_weights_change(make_model, images, mode):
    """No change of the weights, however it is made, may leave a kernel of old weights behind."""
    model = make_model(num_labels=3)

    def call():
        with mode():
            return model(images, patch_size=4).logits.clone()

    before, initial = call(), copy.deepcopy(model.state_dict())
    assert_kernel_is_fresh(model, images)

    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, fused=True)
    model(images, labels=torch.tensor([0, 1]), patch_size=4).loss.backward()
    optimizer.step()
    assert not torch.allclose(call(), before)
    assert_kernel_is_fresh(model, images)

    model.flexivit.embeddings.patch_embeddings.projection.weight.data.mul_(1.5)
    assert_kernel_is_fresh(model, images)

    model.load_state_dict(initial)
    torch.testing.assert_close(call(), before)

    assert torch.equal(copy.deepcopy(model)(images, patch_size=4).logits, model(images, patch_size=4).logits)


def test_kernels_follow_the_dtype(make_model, images):
    model = make_model()
    expected = model(images, patch_size=4).last_hidden_state
    double = make_model().to(torch.float64)
    torch.testing.assert_close(double(images, patch_size=4).last_hidden_state.float(), expected, atol=1e-5, rtol=1e-4)
    half = make_model().to(torch.bfloat16)
    output = half(images, patch_size=4).last_hidden_state
    assert output.dtype == torch.bfloat16
    torch.testing.assert_close(output.float(), expected, atol=0.15, rtol=0.1)


def test_autocast_resizes_in_float32(make_model, images):
    model = make_model()
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        actual = model(images, patch_size=4).last_hidden_state
        expected = prepared_model(model, 4)(images).last_hidden_state
    torch.testing.assert_close(actual, expected, atol=2e-2, rtol=2e-2)
    assert model.embeddings.patch_embeddings.kernel_for((4, 4)).dtype == torch.float32


def test_gradients_reach_the_stored_kernel_and_positions(make_model, images):
    model = make_model(num_labels=3)
    model(images, labels=torch.tensor([0, 2]), patch_size=4).loss.backward()
    prepared = prepared_model(model, 4)
    prepared(images, labels=torch.tensor([0, 2])).loss.backward()
    name = "flexivit.embeddings.position_embeddings"
    torch.testing.assert_close(model.get_parameter(name).grad, prepared.get_parameter(name).grad, atol=1e-6, rtol=1e-3)
    kernel = model.flexivit.embeddings.patch_embeddings.projection.weight
    leaf = kernel.detach().clone().requires_grad_()
    resized_grad = prepared.flexivit.embeddings.patch_embeddings.projection.weight.grad
    plain_kernel(leaf, (4, 4), "bilinear", False).backward(resized_grad)
    torch.testing.assert_close(kernel.grad, leaf.grad, atol=1e-6, rtol=1e-3)


@pytest.mark.slow
def test_compiled_equals_eager_at_several_sizes(make_model, images):
    model = make_model(num_labels=3)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        for patch_size in (8, 4, 16):
            torch.testing.assert_close(
                compiled(images, patch_size=patch_size).logits, model(images, patch_size=patch_size).logits
            )


def test_training_draws_sizes_with_their_probabilities(make_model, images):
    sizes, probs = [4, 8, [8, 16], 16], [0.1, 0.2, 0.3, 0.4]
    model = make_model(train_patch_sizes=sizes, train_patch_size_probs=probs).train()
    torch.manual_seed(0)
    draws = [model.embeddings.resolve_patch_size(None) for _ in range(4000)]
    for size, prob in zip([(4, 4), (8, 8), (8, 16), (16, 16)], probs, strict=True):
        deviation = (prob * (1 - prob) / 4000) ** 0.5
        assert abs(draws.count(size) / 4000 - prob) < 4 * deviation
    torch.manual_seed(0)
    assert draws[:50] == [model.embeddings.resolve_patch_size(None) for _ in range(50)]
    assert model.embeddings.resolve_patch_size(5) == (5, 5)
    model.embeddings.step_patch_size = 16
    assert {model.embeddings.resolve_patch_size(None) for _ in range(20)} == {(16, 16)}
    assert model.eval().embeddings.resolve_patch_size(None) == (8, 8)


def test_uniform_draws_without_probabilities(make_model):
    model = make_model(train_patch_sizes=[4, 8]).train()
    torch.manual_seed(0)
    draws = [model.embeddings.draw_patch_size() for _ in range(2000)]
    assert abs(draws.count(4) / 2000 - 0.5) < 4 * (0.25 / 2000) ** 0.5


def test_each_training_forward_uses_its_drawn_size(make_model, images):
    model = make_model(train_patch_sizes=[4, 16], hidden_dropout_prob=0.0).train()
    torch.manual_seed(0)
    lengths = {model(images).last_hidden_state.shape[1] for _ in range(12)}
    assert lengths == {1 + 64, 1 + 4}


def test_config_patch_size_is_the_default_of_a_call(make_model, images):
    model = make_model(patch_size=16)
    assert torch.equal(model(images).last_hidden_state, model(images, patch_size=16).last_hidden_state)


def test_classifier_loss_is_cross_entropy(make_model, images):
    model = make_model(num_labels=3)
    output = model(images, labels=torch.tensor([2, 0]), patch_size=4)
    torch.testing.assert_close(output.loss, F.cross_entropy(output.logits, torch.tensor([2, 0])))


@pytest.mark.parametrize("patch_size", [8, 4, (4, 16)])
def test_backbone_gives_hidden_states_as_maps(make_model, images, patch_size):
    model = make_model(num_register_tokens=2, prefix_positions="cls")
    config = copy.deepcopy(model.config)
    config.set_output_features_output_indices(out_features=["stage1", "stage2"], out_indices=None)
    backbone = FlexiViTBackbone(config).eval()
    backbone.flexivit.load_state_dict(model.state_dict())
    with torch.no_grad():
        maps = backbone(images, patch_size=patch_size).feature_maps
        output = model(images, patch_size=patch_size, output_hidden_states=True)
    rows, columns = config.patch_grid_for((32, 32), patch_size)
    assert len(maps) == 2
    for feature_map, hidden_states in zip(maps, output.hidden_states[1:], strict=True):
        expected = model.layernorm(hidden_states)[:, 3:].reshape(2, rows, columns, 16).permute(0, 3, 1, 2)
        torch.testing.assert_close(feature_map, expected)


@pytest.mark.parametrize(
    ("pixel_values", "patch_size", "message"),
    [
        (torch.zeros(1, 3, 32, 32), 0, "patch_size"),
        (torch.zeros(1, 3, 32, 32), -8, "patch_size"),
        (torch.zeros(1, 3, 32, 32), (8, 0), "patch_size"),
        (torch.zeros(1, 3, 32, 32), 33, r"patch_size.*\(33, 33\).*\(32, 32\)"),
        (torch.zeros(1, 3, 32, 16), (8, 17), r"patch_size.*\(8, 17\).*\(32, 16\)"),
        (torch.zeros(1, 3, 32, 32), (8, 8, 8), "patch_size"),
        (torch.zeros(1, 3, 32, 32), 8.0, "patch_size"),
        (torch.zeros(1, 3, 32, 32), "8", "patch_size"),
        (torch.zeros(1, 3, 32, 32), True, "patch_size"),
        (torch.zeros(1, 1, 32, 32), 8, r"3 channels.*got 1"),
        (torch.zeros(1, 4, 32, 32), 8, r"3 channels.*got 4"),
        (torch.zeros(0, 3, 32, 32), 8, "empty batch"),
        (torch.zeros(3, 32, 32), 8, "pixel_values"),
        (None, 8, "pixel_values"),
    ],
)
def test_bad_input_is_refused_by_name(make_model, pixel_values, patch_size, message):
    with pytest.raises(ValueError, match=message):
        make_model()(pixel_values, patch_size=patch_size)


def test_bad_input_is_refused_by_every_class(make_model):
    backbone = FlexiViTBackbone(make_model().config)
    for model in (make_model(num_labels=2), backbone):
        with pytest.raises(ValueError, match="empty batch"):
            model(torch.zeros(0, 3, 32, 32))
        with pytest.raises(ValueError, match="patch_size"):
            model(torch.zeros(1, 3, 32, 32), patch_size=64)


def test_initial_weights_are_those_of_the_config():
    torch.manual_seed(0)
    config = FlexiViTConfig(
        hidden_size=64, num_hidden_layers=1, num_attention_heads=2, initializer_range=0.05, layer_scale_init_value=0.3
    )
    model = FlexiViTForImageClassification(config)
    embeddings, layer = model.flexivit.embeddings, model.flexivit.layers[0]
    for weight in (embeddings.position_embeddings, embeddings.prefix_tokens.cls_token, layer.mlp.fc1.weight):
        assert 0.02 < weight.std().item() < 0.08
    assert torch.equal(layer.mlp_scale.weight, torch.full((64,), 0.3))
    assert layer.mlp.fc1.bias.abs().max() == 0
    assert isinstance(model.flexivit, FlexiViTModel)
