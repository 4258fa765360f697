"""Recipes on `transformers.Trainer`."""

from ..models.flexivit.callbacks_flexivit import PatchSizeCallback
from .interruption import TrainingInterrupted, TrainingStopped
from .recipe import RECIPES, TrainingRecipe, given_choices, make_recipe
from .sampling import TokenBatchSampler
from .train import train
from .trainer import ImageClassificationTrainer


__all__ = [
    "RECIPES",
    "ImageClassificationTrainer",
    "PatchSizeCallback",
    "TokenBatchSampler",
    "TrainingInterrupted",
    "TrainingRecipe",
    "TrainingStopped",
    "given_choices",
    "make_recipe",
    "train",
]
