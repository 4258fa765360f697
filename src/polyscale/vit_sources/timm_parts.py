"""What a ViT of timm is made of, and which of its parts FlexiViT does not have."""

from collections.abc import Iterator

from torch import nn


# Activation classes of torch and timm by the names that transformers gives them.
_ACTIVATIONS = {
    "GELU": "gelu",
    "GELUTanh": "gelu_pytorch_tanh",
    "QuickGELU": "quick_gelu",
    "SiLU": "silu",
    "ReLU": "relu",
}


def layer_norms(model: nn.Module) -> Iterator[nn.Module]:
    for block in model.blocks:
        yield from (block.norm1, block.norm2)
    yield from (model.norm_pre, model.norm, model.fc_norm)
    yield getattr(attention_pooling(model), "norm", None)


def attention_pooling(model: nn.Module) -> nn.Module | None:
    return getattr(model, "attn_pool", None)


def is_absent(module: nn.Module | None) -> bool:
    return module is None or isinstance(module, nn.Identity)


def activation_name(block: nn.Module) -> str | None:
    """Of the MLP of a block, or of attention pooling."""
    activation = block.mlp.act
    if isinstance(activation, nn.GELU) and activation.approximate == "tanh":
        return "gelu_pytorch_tanh"
    return _ACTIVATIONS.get(type(activation).__name__)


def mlp_kind(block: nn.Module) -> str | None:
    """ "mlp", "swiglu" (timm's SwiGLU), "packed" (gate and value in one matrix), or None for another one."""
    kind, mlp = type(block.mlp).__name__, block.mlp
    if kind == "Mlp":
        return "mlp"
    if kind == "SwiGLU" and isinstance(mlp.act, nn.SiLU):
        return "swiglu"
    if kind == "GluMlp" and isinstance(mlp.act, nn.SiLU) and not mlp.gate_last:
        return "packed"
    return None


def _unsupported_block_parts(block: nn.Module) -> Iterator[str]:
    if type(block).__name__ != "Block":
        yield f"blocks of type {type(block).__name__}"
        return
    if type(block.attn).__name__ != "Attention":
        yield f"attention of type {type(block.attn).__name__}"
        return
    attention = block.attn
    if not is_absent(attention.q_norm) or not is_absent(attention.k_norm):
        yield "normalised queries and keys (qk_norm)"
    if not is_absent(getattr(attention, "norm", None)):
        yield "a norm inside the attention (scale_attn_norm)"
    if not is_absent(getattr(attention, "gate", None)):
        yield "gated attention"
    if attention.proj.bias is None:
        yield "projections without bias (proj_bias=False)"
    if attention.num_heads * attention.head_dim != attention.proj.out_features:
        yield "heads that do not fill the width (attn_head_dim)"
    if mlp_kind(block) is None:
        yield f"an MLP of type {type(block.mlp).__name__} with {type(block.mlp.act).__name__}"
    elif mlp_kind(block) == "mlp" and activation_name(block) is None:
        yield f"the activation {type(block.mlp.act).__name__}"
    if not is_absent(getattr(block.mlp, "norm", None)):
        yield "a norm inside the MLP (scale_mlp_norm)"


def _unsupported_pooling_parts(model: nn.Module) -> Iterator[str]:
    """What timm's attention pooling has that ours, which is SigLIP's, does not."""
    pool, block = model.attn_pool, model.blocks[0]
    if type(pool).__name__ != "AttentionPoolLatent":
        yield f"attention pooling of type {type(pool).__name__} (global_pool={model.global_pool!r})"
        return
    if model.num_prefix_tokens and not model.pool_include_prefix:
        yield "attention pooling that leaves prefix tokens out (pool_include_prefix=False)"
    if pool.pos_embed is not None:
        yield "positions in the attention pooling (pos_embed)"
    if pool.latent_len != 1:
        yield f"attention pooling with {pool.latent_len} queries (latent_len)"
    if not isinstance(pool.q, nn.Linear) or pool.q.bias is None:
        yield "attention pooling without a projection of its query, or a bias in it (q_proj, qkv_bias)"
    if not is_absent(pool.q_norm) or not is_absent(pool.k_norm):
        yield "normalised queries and keys in the attention pooling (qk_norm)"
    if pool.num_heads != block.attn.num_heads:
        yield f"attention pooling with {pool.num_heads} heads, the blocks {block.attn.num_heads} (num_heads)"
    if pool.mlp is None or is_absent(pool.norm):
        yield "attention pooling without an MLP or its norm"
    elif (mlp_kind(pool), activation_name(pool)) != ("mlp", activation_name(block)):
        yield "attention pooling with another kind of MLP than the blocks"
    elif pool.mlp.fc2.in_features != block.mlp.fc2.in_features:
        yield "attention pooling with an MLP of another width than the blocks (mlp_ratio)"


def _foreign_positions(model: nn.Module) -> Iterator[str]:
    """Positions that enter the attention, not the tokens."""
    if getattr(model, "rope", None) is not None:
        yield "rotary positions (RoPE)"
    biases = ("relative_position_bias_table", "rel_pos")
    own = [getattr(module, name, None) for module in model.modules() for name in biases]
    if getattr(model, "rel_pos_bias", None) is not None or any(bias is not None for bias in own):
        yield "a relative position bias"


def _unsupported_parts(model: nn.Module) -> Iterator[str]:
    """What a timm model has that FlexiViT does not, by timm's names."""
    if type(model).__name__ not in ("VisionTransformer", "VisionTransformerDistilled"):
        yield f"the architecture {type(model).__name__}"
        yield from _foreign_positions(model)
        return
    if type(model.patch_embed).__name__ != "PatchEmbed":
        yield f"patch embeddings of type {type(model.patch_embed).__name__}"
    elif not is_absent(model.patch_embed.norm):
        yield "a norm in the patch embedding (embed_norm_layer)"
    if model.pos_embed is None:
        yield "no learned positions (pos_embed)"
    if attention_pooling(model) is not None:
        yield from _unsupported_pooling_parts(model)
    elif model.global_pool not in ("token", "avg", ""):
        yield f"pooling global_pool={model.global_pool!r}"
    elif model.global_pool == "" and not is_absent(model.head):
        yield "a classifier on every token (global_pool='')"
    if model.global_pool == "avg" and model.pool_include_prefix and model.num_prefix_tokens:
        yield "pooling over prefix tokens (pool_include_prefix)"
    for block in model.blocks:
        yield from _unsupported_block_parts(block)
    norms = [norm for norm in layer_norms(model) if not is_absent(norm)]
    for norm in norms:
        if not isinstance(norm, nn.LayerNorm):
            yield f"norms of type {type(norm).__name__}"
        elif norm.weight is None or norm.bias is None:
            yield "norms without weight or bias"
    if len({getattr(norm, "eps", None) for norm in norms}) > 1:
        yield "norms with different epsilons"
    if len({is_absent(getattr(block, scale, None)) for block in model.blocks for scale in ("ls1", "ls2")}) > 1:
        yield "layer scale in some layers only"


def check_supported(model: nn.Module, source: str) -> None:
    """Raises ValueError naming each part of a timm model that FlexiViT does not have."""
    parts = list(dict.fromkeys(_unsupported_parts(model)))
    if parts:
        raise ValueError(f"{source} cannot become a FlexiViT, which does not have: {'; '.join(parts)}.")


__all__ = ["activation_name", "attention_pooling", "check_supported", "is_absent", "layer_norms", "mlp_kind"]
