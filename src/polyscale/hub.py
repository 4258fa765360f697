"""Checkpoints that carry their own code: they load with `trust_remote_code=True` where polyscale is not installed.

transformers copies the modules of a custom model flat, beside the weights, but only those of one folder and with one
head. A polyscale model spreads over `models/<family>/` and `layers/`, so the modules it needs are written here: all in
one folder, their imports rewritten, and an `auto_map` that names every head and every processor backend.
"""

import ast
import json
import os
import re
import sys
import tempfile
from pathlib import Path

from huggingface_hub import CommitInfo, HfApi
from transformers import (
    IMAGE_PROCESSOR_MAPPING,
    VIDEO_PROCESSOR_MAPPING,
    AutoImageProcessor,
    AutoVideoProcessor,
    PreTrainedModel,
    ProcessorMixin,
)
from transformers.models.auto import modeling_auto
from transformers.utils import CONFIG_NAME, IMAGE_PROCESSOR_NAME, PROCESSOR_NAME, VIDEO_PROCESSOR_NAME

from .hub_parts import MODULE, Parts, inner_configs
from .models.auto import family_of


_PACKAGE = __name__.partition(".")[0]
_WEIGHTS = re.compile(r"(model|pytorch_model)(-\d+-of-\d+)?\.(safetensors|bin)(\.index\.json)?")


def _package(module_name: str) -> str:
    return module_name.partition(".")[0]


def _packages_of(model: PreTrainedModel) -> frozenset[str]:
    """The packages whose modules travel with a model: this one, and the one that its family is defined in.

    Raises:
        ValueError: for a model of no registered family, or one that is defined in no file.
    """
    classes = (type(model), type(model.config))
    if family_of(model.config) is None:
        raise ValueError(
            f"`model` is a {classes[0].__module__}.{classes[0].__name__}: only a model of a registered family carries "
            "its code. Save other models with `model.save_pretrained`."
        )
    for cls in classes:
        if getattr(sys.modules[cls.__module__], "__file__", None) is None:
            raise ValueError(
                f"`model`: {cls.__name__} is defined in no file. Put its family into a module of its own."
            )
    return frozenset({_PACKAGE, *(_package(cls.__module__) for cls in classes)})


def _flat_name(module_name: str) -> str:
    return module_name.rpartition(".")[2]


def _reference(cls: type) -> str:
    return f"{_flat_name(cls.__module__)}.{cls.__name__}"


def _target_module(node: ast.ImportFrom, module_name: str, packages: frozenset[str]) -> str | None:
    """The full name of the module of `packages` that an import statement of `module_name` reads from, if it is one."""
    if node.level == 0:
        return node.module if _package(node.module) in packages else None
    parents = module_name.split(".")[: -node.level]
    return ".".join([*parents, node.module] if node.module else parents)


def _flatten(module_name: str, packages: frozenset[str]) -> tuple[str, set[str]]:
    """The source of a module with its imports from `packages` made flat, and the names of the modules it imports from.

    Raises:
        ValueError: for an import that has no flat form.
    """
    source = Path(sys.modules[module_name].__file__).read_text(encoding="utf-8")
    lines = source.splitlines(keepends=True)
    targets = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import) and any(_package(alias.name) in packages for alias in node.names):
            raise ValueError(
                f"{module_name}, line {node.lineno}: `import {node.names[0].name}` cannot travel with weights."
            )
        target = _target_module(node, module_name, packages) if isinstance(node, ast.ImportFrom) else None
        if target is None:
            continue
        if Path(sys.modules[target].__file__).name == "__init__.py":
            raise ValueError(
                f"{module_name}, line {node.lineno}: only imports from a module, not from the package {target}, can "
                "travel with weights."
            )
        targets.add(target)
        line = lines[node.lineno - 1]
        written = f"from {'.' * node.level}{node.module or ''} import"
        lines[node.lineno - 1] = line.replace(written, f"from .{_flat_name(target)} import", 1)
    return "".join(lines), targets


def _flat_sources(classes: list[type], packages: frozenset[str]) -> dict[str, str]:
    """File name -> source, for the modules of `classes` and all they import from `packages`.

    Raises:
        ValueError: if two modules have the same name, or an import has no flat form.
    """
    modules: dict[str, str] = {}
    sources = {}
    waiting = sorted({cls.__module__ for cls in classes})
    while waiting:
        module_name = waiting.pop()
        file_name = f"{_flat_name(module_name)}.py"
        if modules.setdefault(file_name, module_name) != module_name:
            raise ValueError(f"{modules[file_name]} and {module_name} would both be written as {file_name}.")
        if file_name not in sources:
            sources[file_name], targets = _flatten(module_name, packages)
            waiting.extend(sorted(targets))
    return sources


def _model_classes(config_class: type) -> dict[str, type]:
    """Auto class name -> model class, for every Auto class that `config_class` is registered with."""
    classes = {}
    for name in modeling_auto.__all__:
        mapping = getattr(getattr(modeling_auto, name), "_model_mapping", None)
        if name.startswith("Auto") and mapping is not None and config_class in mapping:
            classes[name] = mapping[config_class]
    return classes


def _processor_classes(config_class: type, processor) -> tuple[str, str, dict[str, type]]:
    """(file, Auto class, backend -> class) of a processor."""
    kinds = (
        (IMAGE_PROCESSOR_NAME, AutoImageProcessor, IMAGE_PROCESSOR_MAPPING),
        (VIDEO_PROCESSOR_NAME, AutoVideoProcessor, VIDEO_PROCESSOR_MAPPING),
    )
    for file_name, auto_class, mapping in kinds:
        if config_class not in mapping:
            continue
        registered = mapping[config_class]
        classes = registered if isinstance(registered, dict) else {"torchvision": registered}
        if type(processor) in classes.values():
            return file_name, auto_class.__name__, classes
    raise ValueError(
        f"`processor` is a {type(processor).__name__}, which is not registered with {config_class.__name__}. Give the "
        "image or video processor of the model's own family."
    )


def _plan_parts(model: PreTrainedModel, processor) -> Parts | None:
    """The models of registered families inside a model, and what holds them, where there are any."""
    inside = list(inner_configs(model.config))
    inside = [config for config in inside if family_of(config) is not None or _package_of(config) == _PACKAGE]
    if not inside:
        return None
    is_whole = isinstance(processor, ProcessorMixin) and _package_of(processor) == _PACKAGE
    parts = Parts.of(inside, processor if is_whole else None)
    if family_of(model.config) is None:
        parts.outer = type(model)
    return parts


def _package_of(thing: object) -> str:
    return _package(type(thing).__module__)


def _add_auto_map(path: Path, auto_map: dict) -> None:
    content = json.loads(path.read_text(encoding="utf-8"))
    content["auto_map"] = auto_map
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _put_into(scratch: Path, folder: Path) -> None:
    """Moves files into a folder that keeps its own mode; a link there is replaced, and not what it points at.

    Weights of an earlier save that the new one does not have are removed: a loader would prefer them, or mix both.
    """
    written = sorted(path for path in scratch.rglob("*") if path.is_file())
    for path in written:
        target = folder / path.relative_to(scratch)
        target.parent.mkdir(parents=True, exist_ok=True)
        os.replace(path, target)
    kept = {path.name for path in written}
    for path in folder.iterdir():
        if _WEIGHTS.fullmatch(path.name) and path.name not in kept:
            path.unlink()


def save_with_code(model: PreTrainedModel, save_directory: str | os.PathLike, processor=None, **kwargs) -> Path:
    """Saves a model, and its processor if given, together with the code that both need.

    The folder is what `model.save_pretrained` writes, plus the Python modules of the family, flat, and an `auto_map`.
    It loads in a process without polyscale: `AutoModel.from_pretrained(folder, trust_remote_code=True)`, and so do the
    other Auto classes of the family, both backends of the image processor and the pipelines. Where polyscale is
    imported, its own classes are used instead. Nothing is written before every module was found and rewritten.

    A LLaVA with a tower of a registered family carries the tower's code and that of its processor; it loads with
    `AutoModelForImageTextToText` and `AutoProcessor`.

    Args:
        model: a model of any registered family, with any head, or a LLaVA with a tower of one.
        save_directory: created if missing. Files of the same names are replaced (a link itself, not what it points
            at), weights of an earlier save removed, other files left alone.
        processor: the image or video processor of the same family; of a LLaVA, its processor.
        kwargs: passed to `model.save_pretrained`, e.g. `max_shard_size`.

    Returns:
        The folder.

    Raises:
        ValueError: if `model` or `processor` is not of a registered family, and no such model is inside of it.
    """
    config_class = type(model.config)
    parts = _plan_parts(model, processor)
    if parts is not None and parts.outer is not None:
        return _save_with_parts(model, Path(save_directory), processor, parts, **kwargs)
    packages = _packages_of(model)
    model_classes = _model_classes(config_class)
    auto_map = {"AutoConfig": _reference(config_class)}
    auto_map.update({name: _reference(cls) for name, cls in model_classes.items()})
    needed = [config_class, type(model), *model_classes.values()]
    processor_file, processor_map = None, {}
    if processor is not None:
        processor_file, auto_class, classes = _processor_classes(config_class, processor)
        needed.extend(classes.values())
        processor_map = {auto_class: {backend: _reference(cls) for backend, cls in classes.items()}}
    if parts is not None:  # the module that registers what is inside holds the outer classes too
        parts.others += list(dict.fromkeys(needed))
        auto_map = {name: f"{MODULE}.{reference.rpartition('.')[2]}" for name, reference in auto_map.items()}
        needed, packages = parts.classes, packages | parts.packages
    sources = _flat_sources(needed, packages) | ({} if parts is None else {f"{MODULE}.py": parts.source()})

    folder = Path(save_directory)
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as scratch_name:
        scratch = Path(scratch_name)
        model.save_pretrained(scratch, **kwargs)
        _add_auto_map(scratch / CONFIG_NAME, auto_map)
        if processor_file is not None:
            processor.save_pretrained(scratch)
            _add_auto_map(scratch / processor_file, processor_map)
        for file_name, source in sources.items():
            (scratch / file_name).write_text(source, encoding="utf-8")
        _put_into(scratch, folder)
    return folder


def _save_with_parts(model: PreTrainedModel, folder: Path, processor, parts: Parts, **kwargs) -> Path:
    """A model of transformers with models of polyscale inside: a LLaVA with another tower, say."""
    sources = _flat_sources(parts.classes, parts.packages) | {f"{MODULE}.py": parts.source()}
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as scratch_name:
        scratch = Path(scratch_name)
        # Under the names of the model itself: transformers knows the older names of its own classes alone.
        model.save_pretrained(scratch, **{"save_original_format": False, **kwargs})
        _add_auto_map(scratch / CONFIG_NAME, parts.auto_map(_model_classes(type(model.config))))
        if processor is not None:
            processor.save_pretrained(scratch)
            if type(processor) in parts.others:
                _add_auto_map(scratch / PROCESSOR_NAME, {"AutoProcessor": f"{MODULE}.{type(processor).__name__}"})
        for file_name, source in sources.items():
            (scratch / file_name).write_text(source, encoding="utf-8")
        _put_into(scratch, folder)
    return folder


def push_to_hub(
    model: PreTrainedModel,
    repo_id: str,
    processor=None,
    *,
    private: bool | None = None,
    token: str | None = None,
    revision: str | None = None,
    commit_message: str = "Upload the model with its code",
    create_pr: bool = False,
    **kwargs,
) -> CommitInfo:
    """Uploads to the Hugging Face Hub the folder that `save_with_code` makes.

    Args:
        model, processor, kwargs: as in `save_with_code`.
        repo_id: "user/name"; created if missing.
        private: whether a new repository is private; the organisation's default when None.
        token: of the Hub; the one saved on this machine when None.
        revision: the branch to commit to.
        commit_message: of the commit.
        create_pr: whether to open a pull request instead of committing.

    Returns:
        What `huggingface_hub` says about the commit.

    Raises:
        ValueError: as `save_with_code`; nothing is uploaded then.
    """
    api = HfApi(token=token)
    with tempfile.TemporaryDirectory() as scratch:
        folder = save_with_code(model, Path(scratch) / "model", processor, **kwargs)
        api.create_repo(repo_id, private=private, exist_ok=True)
        return api.upload_folder(
            repo_id=repo_id,
            folder_path=folder,
            revision=revision,
            commit_message=commit_message,
            create_pr=create_pr,
        )


__all__ = ["push_to_hub", "save_with_code"]
