"""Training checkpoints of LLaVA models that a resumed `Trainer` reads whole."""

from pathlib import Path

from transformers import PreTrainedModel, TrainerCallback
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR


class ResumableCheckpoints(TrainerCallback):
    """Writes the weights of each training checkpoint under the names that the model in memory has.

    transformers saves LLaVA models, CLIP and others under the names of older versions, and `from_pretrained` knows
    both; a `Trainer` that resumes does not, and goes on with weights of before the training. Give this callback to the
    `Trainer` of a LLaVA model that is trained whole (`callbacks=[ResumableCheckpoints()]`). Adapters (LoRA) need none;
    under FSDP and DeepSpeed, which keep weights in a format of their own, it does nothing.
    """

    def on_save(self, args, state, control, model=None, **kwargs) -> None:
        is_sharded = bool(getattr(args, "fsdp", None)) or bool(getattr(args, "deepspeed", None))
        if not state.is_world_process_zero or is_sharded or not isinstance(model, PreTrainedModel):
            return
        folder = Path(args.output_dir) / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"
        model.save_pretrained(folder, save_original_format=False)


__all__ = ["ResumableCheckpoints"]
