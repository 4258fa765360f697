import torch
from torch import nn

from polyscale import FlexiViTImageProcessor, FlexiViTImageProcessorPil
from polyscale.utils.identity import changes_of, digest_of, processing_of, weights_digest


def test_other_weights_have_another_digest():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(300, 4), nn.LayerNorm(4))
    before = weights_digest(model)
    copy = nn.Sequential(nn.Linear(300, 4), nn.LayerNorm(4))
    assert weights_digest(copy) != before
    copy.load_state_dict(model.state_dict())
    assert weights_digest(copy) == before
    with torch.no_grad():
        copy[1].bias.add_(1e-6)
    assert weights_digest(copy) != before
    with torch.device("meta"):
        assert weights_digest(nn.Linear(300, 4)) != weights_digest(nn.Linear(4, 300))


def test_the_processing_says_what_is_done_and_not_by_whom():
    size = {"height": 32, "width": 32}
    fields = {"size": size, "do_center_crop": False, "image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    one, other = FlexiViTImageProcessor(**fields), FlexiViTImageProcessorPil(**fields)
    assert changes_of(processing_of(one), processing_of(other)) == []
    larger = FlexiViTImageProcessor(**{**fields, "size": {"height": 48, "width": 32}, "image_std": [0.25] * 3})
    assert changes_of(processing_of(one), processing_of(larger)) == [
        "image_std was [0.5, 0.5, 0.5] and is [0.25, 0.25, 0.25]",
        "size height was 32 and is 48",
    ]


def test_digests_of_texts_know_their_borders():
    assert digest_of(["ab", "c"]) != digest_of(["a", "bc"])
    assert digest_of(["ab", "c"]) == digest_of(iter(("ab", "c")))
