"""A tiny LLaVA with its processor, and tiny towers, for the tests of the tower swap."""

import warnings

import numpy as np
import torch
from PIL import Image
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import (
    CLIPImageProcessor,
    CLIPVisionConfig,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    Gemma3ImageProcessor,
    Gemma3Processor,
    Gemma3TextConfig,
    GemmaConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    LlavaNextImageProcessor,
    LlavaNextProcessor,
    LlavaOnevisionConfig,
    LlavaOnevisionForConditionalGeneration,
    LlavaOnevisionImageProcessor,
    LlavaOnevisionProcessor,
    LlavaOnevisionVideoProcessor,
    LlavaProcessor,
    PaliGemmaConfig,
    PaliGemmaForConditionalGeneration,
    PaliGemmaProcessor,
    PreTrainedTokenizerFast,
    SiglipImageProcessor,
    SiglipVisionConfig,
    VipLlavaConfig,
    VipLlavaForConditionalGeneration,
)

from polyscale.llava import swap_vision_tower
from polyscale.llava.hosts import adapter_of
from polyscale.models.flexivit import FlexiViTConfig, FlexiViTModel
from polyscale.models.quadtree_vit import QuadtreeViTConfig, QuadtreeViTModel
from polyscale.models.s2_vision import S2VisionWrapper
from polyscale.models.sparseformer import SparseFormerConfig, SparseFormerModel


CLIP = {
    "hidden_size": 16,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "image_size": 32,
    "patch_size": 8,
}
ENCODER = {"hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 24}
WORDS = [
    "<pad>",
    "<s>",
    "</s>",
    "<unk>",
    "<image>",
    "what",
    "is",
    "this",
    "a",
    "cat",
    "dog",
    "USER:",
    "ASSISTANT:",
    "?",
    "the",
]
CHAT = (
    "{% for m in messages %}{% for c in m['content'] %}{% if c['type'] == 'image' %}<image> {% else %}{{ "
    "c['text'] }} {% endif %}"
    "{% endfor %}{% endfor %}"
)
PROMPTS = ["USER: <image> what is this ? ASSISTANT:", "USER: <image> the cat"]


def make_tokenizer(words=WORDS, **named) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(WordLevel({word: index for index, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    special = [word for word in ("<image>",) if word in words]
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        **({"extra_special_tokens": named} if named else {"additional_special_tokens": special}),
    )


TEXT = {
    "vocab_size": len(WORDS) + 1,
    "hidden_size": 24,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def make_text_config(**fields) -> LlamaConfig:
    return LlamaConfig(**{**TEXT, **fields})


PINPOINTS = [[32, 64], [64, 32], [64, 64]]


def make_llava_next() -> tuple[LlavaNextForConditionalGeneration, LlavaNextProcessor]:
    torch.manual_seed(0)
    config = LlavaNextConfig(
        vision_config=CLIPVisionConfig(**CLIP),
        text_config=make_text_config(),
        image_token_index=4,
        image_grid_pinpoints=PINPOINTS,
    )
    image_processor = LlavaNextImageProcessor(
        size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}, image_grid_pinpoints=PINPOINTS
    )
    processor = LlavaNextProcessor(
        image_processor,
        make_tokenizer(),
        patch_size=8,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=CHAT,
    )
    return LlavaNextForConditionalGeneration(config).eval(), processor


def make_llava_onevision() -> tuple[LlavaOnevisionForConditionalGeneration, LlavaOnevisionProcessor]:
    torch.manual_seed(0)
    config = LlavaOnevisionConfig(
        vision_config=SiglipVisionConfig(**CLIP, vision_use_head=False),
        text_config=make_text_config(),
        image_token_index=4,
        video_token_index=15,
        image_grid_pinpoints=PINPOINTS,
    )
    size = {"height": 32, "width": 32}
    processor = LlavaOnevisionProcessor(
        LlavaOnevisionImageProcessor(size=size, image_grid_pinpoints=PINPOINTS),
        make_tokenizer([*WORDS, "<video>"]),
        LlavaOnevisionVideoProcessor(size=size),
        num_image_tokens=16,
        vision_feature_select_strategy="full",
        chat_template=CHAT,
    )
    return LlavaOnevisionForConditionalGeneration(config).eval(), processor


def make_vipllava() -> tuple[VipLlavaForConditionalGeneration, LlavaProcessor]:
    torch.manual_seed(0)
    config = VipLlavaConfig(
        vision_config=CLIPVisionConfig(**CLIP),
        text_config=make_text_config(),
        image_token_index=4,
        vision_feature_layer=[-2, -1],
    )
    _, processor = make_llava()
    return VipLlavaForConditionalGeneration(config).eval(), processor


def make_llava(**fields) -> tuple[LlavaForConditionalGeneration, LlavaProcessor]:
    torch.manual_seed(0)
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(**CLIP), text_config=make_text_config(), image_token_index=4, **fields
    )
    image_processor = CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    processor = LlavaProcessor(
        image_processor,
        make_tokenizer(),
        patch_size=8,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=CHAT,
    )
    return LlavaForConditionalGeneration(config).eval(), processor


def make_paligemma() -> tuple[PaliGemmaForConditionalGeneration, PaliGemmaProcessor]:
    torch.manual_seed(0)
    config = PaliGemmaConfig(
        vision_config=SiglipVisionConfig(**CLIP, vision_use_head=False),
        text_config=GemmaConfig(**TEXT, head_dim=12),
        image_token_index=4,
        projection_dim=24,
        hidden_size=24,
    )
    image_processor = SiglipImageProcessor(size={"height": 32, "width": 32}, image_seq_length=16)
    processor = PaliGemmaProcessor(image_processor, make_tokenizer(), chat_template=CHAT)
    return PaliGemmaForConditionalGeneration(config).eval(), processor


def make_gemma3() -> tuple[Gemma3ForConditionalGeneration, Gemma3Processor]:
    """`<image>` stands in its prompts, `<soft>` for each token of an image."""
    torch.manual_seed(0)
    words = [*WORDS, "<soft>", "<end>"]
    config = Gemma3Config(
        vision_config=SiglipVisionConfig(**CLIP, vision_use_head=False),
        text_config=Gemma3TextConfig(**{**TEXT, "vocab_size": len(words)}, head_dim=12, query_pre_attn_scalar=12),
        mm_tokens_per_image=4,
        boi_token_index=words.index("<image>"),
        eoi_token_index=words.index("<end>"),
        image_token_index=words.index("<soft>"),
    )
    processor = Gemma3Processor(
        Gemma3ImageProcessor(size={"height": 32, "width": 32}),
        make_tokenizer(words, boi_token="<image>", image_token="<soft>", eoi_token="<end>"),
        chat_template=CHAT,
        image_seq_length=4,
    )
    model = Gemma3ForConditionalGeneration(config).eval()
    torch.nn.init.normal_(model.model.multi_modal_projector.mm_input_projection_weight, std=0.1)  # made as zeros
    return model, processor


def swapped(name: str, host: str = "llava", **options):
    """A model of a kind with a tiny tower in it, and its processor."""
    model, processor = HOSTS[host]()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the projector, which is new
        processor = swap_vision_tower(model, make_tower(name, model), processor, **options)
    # A widened projector does not read the higher scales until it is trained.
    reads = adapter_of(model).projector_input(model.model.multi_modal_projector)
    torch.nn.init.normal_(reads.weight, std=0.1)
    return model, processor


def _sparseformer(**fields) -> SparseFormerModel:
    looking = ["attn", "roi_adj", "sampling_m", "mlp"]
    defaults = {
        "num_latent_tokens": 5,
        "widths": [8, 16, 16],
        "repeats": [2, 1, 1],
        "operations": [looking, looking, ["attn", "mlp"]],
        "feature_width": 8,
        "num_sampling_points": 4,
        "num_attention_heads": 2,
        "image_size": 64,
    }
    return SparseFormerModel(SparseFormerConfig(**{**defaults, **fields}))


def _quadtree(**fields) -> QuadtreeViTModel:
    return QuadtreeViTModel(QuadtreeViTConfig(**ENCODER, image_size=64, min_patch_size=8, max_patch_size=16, **fields))


def _s2(llava, **fields) -> S2VisionWrapper:
    return S2VisionWrapper.from_vision_model(llava.model.vision_tower, scales=[1, 2], **fields)


HOSTS = {
    "llava": make_llava,
    "llava_next": make_llava_next,
    "llava_onevision": make_llava_onevision,
    "vipllava": make_vipllava,
    "paligemma": make_paligemma,
    "gemma3": make_gemma3,
}

# name -> tower; tokens of an image that reach the language model, None where they depend on the image
TOWERS = {
    "s2": (_s2, 16),
    "s2_dynamic": (lambda llava: _s2(llava, dynamic=True, max_tiles=6, resize_output_to_idx=-1), None),
    "flexivit": (
        lambda _: FlexiViTModel(FlexiViTConfig(**ENCODER, image_size=48, base_patch_size=8, patch_size=12)),
        16,
    ),
    "flexivit_registers": (
        lambda _: FlexiViTModel(
            FlexiViTConfig(**ENCODER, image_size=48, base_patch_size=8, patch_size=13, num_register_tokens=2)
        ),
        9,
    ),
    "flexivit_no_cls": (
        lambda _: FlexiViTModel(
            FlexiViTConfig(**ENCODER, image_size=48, base_patch_size=8, use_cls_token=False, pooling="mean")
        ),
        36,
    ),
    "flexivit_merging": (
        lambda _: FlexiViTModel(FlexiViTConfig(**ENCODER, image_size=48, base_patch_size=8, merge_tokens_to=11)),
        11,
    ),
    "quadtree": (lambda _: _quadtree(num_tokens=31), 31),
    "quadtree_merging": (lambda _: _quadtree(num_tokens=31, merge_tokens_to=10), 10),
    "quadtree_threshold": (lambda _: _quadtree(split_threshold=1.0), None),
    "sparseformer": (lambda _: _sparseformer(), 5),
    "sparseformer_cls": (
        lambda _: _sparseformer(
            operations=[
                ["sampling_m", "pe_inject", "attn", "mlp", "roi_adj"],
                ["sampling_m", "pe_inject"],
                ["attn", "mlp"],
            ],
            cls_token_layer=2,
            pooling="cls",
        ),
        5,
    ),
}


def make_tower(name: str, llava) -> torch.nn.Module:
    torch.manual_seed(1)
    return TOWERS[name][0](llava).eval()


def make_photographs() -> list[Image.Image]:
    """A wide and a high image, calm on the left and busier to the right; the second calmer than the first."""
    generator = np.random.default_rng(0)
    photographs = []
    for height, width, strength in ((40, 90, 120), (90, 30, 40)):
        noise = generator.uniform(-1, 1, (height, width, 3)) * np.linspace(0, strength, width)[:, None]
        photographs.append(Image.fromarray(np.clip(120 + noise, 0, 255).astype(np.uint8)))
    return photographs


def encode_photographs(processor) -> dict[str, torch.Tensor]:
    return dict(processor(images=make_photographs(), text=PROMPTS, padding=True, return_tensors="pt"))
