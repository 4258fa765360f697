import pytest
import torch
from torch.utils.data import Dataset
from transformers import TrainingArguments, ViTConfig, ViTModel

from polyscale.training.bootstrapping import BootstrapTrainer, make_student
from polyscale.training.callbacks import LossScaleCallback


TINY = {"feature_width": 8, "num_sampling_points": 4, "generator_width": 16, "num_latent_tokens": 5}


def make_teacher() -> ViTModel:
    torch.manual_seed(0)
    fields = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 64}
    config = ViTConfig(**fields, image_size=16, patch_size=8, initializer_range=0.2)
    return ViTModel(config, add_pooling_layer=False).eval()


class Pictures(Dataset):
    """Sixteen pictures of one colour each."""

    def __len__(self) -> int:
        return 16

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        colour = torch.randn(3, 1, 1, generator=torch.Generator().manual_seed(index))
        return {"pixel_values": colour.expand(3, 16, 16).contiguous()}


def test_a_student_has_the_last_blocks_and_freezes_the_last_third():
    teacher = make_teacher()
    student, report = make_student(teacher, **TINY)
    assert student.config.operations[2:] == [["attn", "mlp"]] * 2
    for layer, block in ((2, 1), (3, 2)):
        weight = student.layers[layer].mlp.fc1.weight
        assert torch.equal(weight, teacher.layers[block].mlp.fc1.weight)
        assert weight.requires_grad == (layer == 2)
    assert torch.equal(student.layernorm.weight, teacher.layernorm.weight)
    assert student.layers[0].mixing.o_proj.weight.requires_grad
    assert "layers.0.mixing.o_proj.weight" in report.new
    with pytest.raises(ValueError, match="between 1 and the teacher's 3, got 4"):
        make_student(teacher, num_blocks=4, **TINY)


def test_the_loss_falls(tmp_path):
    torch.manual_seed(0)
    teacher = make_teacher()
    student, _ = make_student(teacher, restrict_grad_norm=True, **TINY)
    arguments = TrainingArguments(
        output_dir=str(tmp_path),
        per_device_train_batch_size=16,
        max_steps=25,
        learning_rate=3e-3,
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
    )
    trainer = BootstrapTrainer(model=student, args=arguments, train_dataset=Pictures(), teacher=teacher)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert sum(losses[-5:]) < 0.7 * sum(losses[:5])


def test_the_callback_hands_on_the_scale_of_the_scaler():
    student, _ = make_student(make_teacher(), restrict_grad_norm=True, **TINY)
    accelerator = type("Accelerator", (), {"scaler": type("Scaler", (), {"get_scale": lambda self: 512.0})()})()
    callback = LossScaleCallback(accelerator)
    callback.on_step_begin(None, None, None, model=student)
    assert student.loss_scale.item() == 512.0
    accelerator.scaler = None
    callback.on_step_begin(None, None, None, model=student)
    assert student.loss_scale.item() == 1.0
