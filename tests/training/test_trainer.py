import pytest
import torch
from transformers import TrainingArguments

from polyscale import FlexiViTConfig, FlexiViTForImageClassification
from polyscale.training import ImageClassificationTrainer


def tiny_model(seed=0, image_size=16):
    torch.manual_seed(seed)
    shape = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "num_labels": 4}
    return FlexiViTForImageClassification(FlexiViTConfig(**shape, image_size=image_size, base_patch_size=8))


def make_trainer(tmp_path, **options):
    args = TrainingArguments(output_dir=str(tmp_path), report_to=[], use_cpu=True)
    return ImageClassificationTrainer(model=tiny_model().train(), args=args, **options)


@pytest.fixture
def batch():
    torch.manual_seed(1)
    return {"pixel_values": torch.randn(3, 3, 16, 16), "labels": torch.tensor([0, 3, 1])}


def test_loss_of_hard_and_soft_labels(tmp_path, batch):
    trainer = make_trainer(tmp_path, label_smoothing=0.1)
    log_probs = trainer.model(batch["pixel_values"]).logits.log_softmax(-1)
    weights = torch.nn.functional.one_hot(batch["labels"], 4) * 0.9 + 0.1 / 4
    expected = -(weights * log_probs).sum(-1).mean()
    torch.testing.assert_close(trainer.compute_loss(trainer.model, batch), expected)

    soft = torch.tensor([[0.5, 0.5, 0, 0], [0, 0, 0.2, 0.8], [1.0, 0, 0, 0]])
    expected = -((soft * 0.9 + 0.1 / 4) * log_probs).sum(-1).mean()
    torch.testing.assert_close(trainer.compute_loss(trainer.model, {**batch, "labels": soft}), expected)


def test_loss_of_distillation_is_kl_at_the_temperature(tmp_path, batch):
    teacher = tiny_model(seed=5, image_size=32)
    trainer = make_trainer(
        tmp_path, teacher=teacher, temperature=2.0, image_stats=(([0.5] * 3, [0.5] * 3), ([0.4] * 3, [0.2] * 3))
    )
    pictures = ((batch["pixel_values"] * 0.5 + 0.5) - 0.4) / 0.2
    pictures = torch.nn.functional.interpolate(pictures, (32, 32), mode="bicubic", antialias=True)
    target = (teacher(pictures).logits / 2).softmax(-1)
    student = (trainer.model(batch["pixel_values"]).logits / 2).softmax(-1)
    expected = 4 * (target * (target.log() - student.log())).sum(-1).mean()
    loss = trainer.compute_loss(trainer.model, batch)
    torch.testing.assert_close(loss, expected)
    loss.backward()
    assert all(weight.grad is None for weight in teacher.parameters())

    trainer.model.eval()
    logits = trainer.model(batch["pixel_values"]).logits
    torch.testing.assert_close(
        trainer.compute_loss(trainer.model, batch), torch.nn.functional.cross_entropy(logits, batch["labels"])
    )


def test_a_student_that_is_its_teacher_has_no_loss(tmp_path, batch):
    trainer = make_trainer(tmp_path, teacher=tiny_model())
    assert trainer.compute_loss(trainer.model, batch).item() == pytest.approx(0, abs=1e-6)


def test_a_teacher_sees_images_of_its_own_size(tmp_path, batch):
    assert (
        make_trainer(tmp_path, teacher=tiny_model(image_size=32)).teacher_inputs(batch["pixel_values"]).shape[2] == 32
    )
    trainer = make_trainer(tmp_path, teacher=tiny_model(image_size=32), teacher_size=(24, 20))
    assert trainer.teacher_inputs(batch["pixel_values"]).shape == (3, 3, 24, 20)
