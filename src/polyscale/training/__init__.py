"""Recipes on `transformers.Trainer`."""

from .callbacks import PatchSizeCallback
from .recipe import RECIPES, TrainingRecipe, make_recipe
from .train import train
from .trainer import ImageClassificationTrainer


__all__ = ["RECIPES", "ImageClassificationTrainer", "PatchSizeCallback", "TrainingRecipe", "make_recipe", "train"]
