"""What servers of vision-language models need: a check before a model is served, and the plugin of vLLM.

vLLM runs a LLaVA with a tower of this library by its Transformers backend (`vllm serve MODEL --model-impl
transformers`). Installing polyscale is enough: vLLM finds the entry point `vllm.general_plugins`, which imports it.
"""

from .servability import ServingCheck, ServingReport, check_servable


def register() -> None:
    """The entry point of vLLM: importing this package has registered the models and processors already."""


__all__ = ["ServingCheck", "ServingReport", "check_servable", "register"]
