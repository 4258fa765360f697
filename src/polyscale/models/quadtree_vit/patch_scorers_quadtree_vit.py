"""The patch scorers by name: those of this library, and any that a user registers."""

from collections.abc import Callable

from transformers import AutoBackbone

from ...utils.validation import shown
from .configuration_quadtree_vit import PATCH_SCORERS, QuadtreeViTConfig
from .feature_scoring_quadtree_vit import FeatureBasedPatchScorer
from .scoring_quadtree_vit import (
    EmbeddingPatchScorer,
    EntropyPatchScorer,
    PatchScorer,
    PixelBlurPatchScorer,
    PrecomputedPatchScorer,
    RandomPatchScorer,
)


def register_patch_scorer(name: str, make: Callable[[QuadtreeViTConfig], PatchScorer]) -> None:
    """Makes a patch scorer known by a name that `QuadtreeViTConfig(patch_scorer=name)` takes.

    Args:
        name (`str`): the name. The scorer's `config_fields` must name it too.
        make (`Callable`): function (config) -> scorer, with its weights drawn anew: those of a checkpoint are loaded
            into it.

    Raises:
        ValueError: for the name of a scorer of this library, no name, or no function.

    Example:

    ```python
    >>> from polyscale import PatchScorer, register_patch_scorer

    >>> class CentrePatchScorer(PatchScorer):
    ...     def config_fields(self):
    ...         return {"patch_scorer": "centre"}
    ...
    ...     def score(self, pixel_values, patch_scores=None):
    ...         return [centre_map(pixel_values, size) for size in self.scored_patch_sizes]

    >>> register_patch_scorer("centre", lambda config: CentrePatchScorer(config.min_patch_size, config.max_patch_size))
    ```
    """
    if not isinstance(name, str) or not name:
        raise ValueError(f"`name` must be a name, got {shown(name)}.")
    if not callable(make):
        raise ValueError(f"`make` must be a function (config) -> scorer, got {shown(make)}.")
    if name in _BUILT_IN:
        raise ValueError(f"`name` {name!r} is a patch scorer of this library: give yours another name.")
    PATCH_SCORERS[name] = make


def make_patch_scorer(config: QuadtreeViTConfig) -> PatchScorer:
    """The scorer that `config` names, without pretrained weights: those are in the checkpoint."""
    return PATCH_SCORERS[config.patch_scorer](config)


def scorer_fields(config: QuadtreeViTConfig) -> dict[str, object]:
    """The fields of a config that its scorer and its patch sizes are made of."""
    return {name: getattr(config, name) for name in _SCORER_FIELDS}


def check_unchanged(fields: dict[str, object], config: QuadtreeViTConfig) -> None:
    """Refuses a config of which `scorer_fields` were set since they gave `fields`: the scorer does not follow.

    Raises:
        ValueError: naming the field.
    """
    for name, value in fields.items():
        if getattr(config, name) != value:
            raise ValueError(
                f"`config.{name}` was {value!r} when the model was made, and is {getattr(config, name)!r} now: set it "
                f"where a model is made or loaded, `from_pretrained(..., {name}=...)`. A scorer of a model in memory "
                "is changed by `set_patch_scorer`."
            )


def check_scorer(scorer: PatchScorer, config: QuadtreeViTConfig) -> None:
    """Refuses a scorer that sees patches of other sizes than a model, or reduced in another way.

    Raises:
        ValueError: naming both.
    """
    sizes = (scorer.min_patch_size, scorer.max_patch_size)
    if sizes != _sizes(config):
        raise ValueError(
            f"`scorer` is for patches of {sizes} pixels (smallest, largest); the model has {_sizes(config)}."
        )
    reduction = scorer.config_fields().get("reduction", config.reduction)
    if reduction != config.reduction:
        raise ValueError(
            f"`scorer` reduces images by {reduction!r}, and the model by {config.reduction!r}, which is all that a "
            f"checkpoint says: make the scorer with `reduction={config.reduction!r}`."
        )


def _feature_scorer(config: QuadtreeViTConfig) -> FeatureBasedPatchScorer:
    backbone_config = config.scorer_backbone_config
    return FeatureBasedPatchScorer(
        config.min_patch_size,
        config.max_patch_size,
        network=None if backbone_config is None else AutoBackbone.from_config(backbone_config),
        stride=config.scorer_stride,
        error=config.scorer_error,
        pretrained=False,
        reduction=config.reduction,
    )


def _sizes(config: QuadtreeViTConfig) -> tuple[int, int]:
    return config.min_patch_size, config.max_patch_size


PATCH_SCORERS.update(
    {
        "pixel_blur": lambda config: PixelBlurPatchScorer(*_sizes(config), config.reduction),
        "feature": _feature_scorer,
        "random": lambda config: RandomPatchScorer(*_sizes(config), seed=config.scorer_seed),
        "precomputed": lambda config: PrecomputedPatchScorer(*_sizes(config)),
        "embedding": lambda config: EmbeddingPatchScorer(*_sizes(config)),
        "entropy": lambda config: EntropyPatchScorer(
            *_sizes(config), config.scorer_image_mean, config.scorer_image_std
        ),
    }
)
_BUILT_IN = frozenset(PATCH_SCORERS)
_SCORER_FIELDS = (
    *("min_patch_size", "max_patch_size", "reduction", "patch_scorer", "scorer_stride", "scorer_error", "scorer_seed"),
    *("scorer_image_mean", "scorer_image_std"),
)

__all__ = ["check_scorer", "check_unchanged", "make_patch_scorer", "register_patch_scorer", "scorer_fields"]
