"""Sync-point drop written densely from a transformers model: masks of heads and neurons, no shards, no zeros."""

import torch


@torch.no_grad()
def spd_logits(reference, tokens, tp: int, letters: str):
    """Logits (B, T, vocabulary) of a LLaMA-like model under a plan of `F` and `D`, two letters a block."""
    decoder, config = reference.model, reference.config
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    heads, neurons = (
        [torch.zeros(count).index_fill(0, part, 1.0) for part in torch.tensor_split(torch.arange(count), tp)]
        for count in (config.num_attention_heads, config.intermediate_size)
    )
    heads = [mask.repeat_interleave(size) for mask in heads]
    x = decoder.embed_tokens(tokens)
    rotary = decoder.rotary_emb(x, torch.arange(tokens.shape[1])[None])
    pending = [torch.zeros_like(x) for _ in range(tp)]

    def settle(x, layer, partials, policy):
        """Each shard's part pending; the layer's bias is everybody's; a full sync empties all that is pending."""
        x = x if layer.bias is None else x + layer.bias
        held = [p + part for p, part in zip(pending, partials, strict=True)]
        return (x, held) if policy == "D" else (x + sum(held), [torch.zeros_like(x)] * tp)

    for layer, (attention, mlp) in zip(decoder.layers, letters.split(), strict=True):
        out, down, partials = layer.self_attn.o_proj, layer.mlp.down_proj, []
        for mask, p in zip(heads, pending, strict=True):
            caught = []
            hook = out.register_forward_pre_hook(lambda _, inputs, caught=caught: caught.append(inputs[0]))
            layer.self_attn(layer.input_layernorm(x + p), position_embeddings=rotary, attention_mask=None)
            hook.remove()
            partials.append((caught[0] * mask) @ out.weight.T)
        x, pending = settle(x, out, partials, attention)
        partials = []
        for mask, p in zip(neurons, pending, strict=True):
            seen = layer.post_attention_layernorm(x + p)
            inner = layer.mlp.act_fn(layer.mlp.gate_proj(seen)) * layer.mlp.up_proj(seen)
            partials.append((inner * mask) @ down.weight.T)
        x, pending = settle(x, down, partials, mlp)
    return reference.lm_head(decoder.norm(x + sum(pending)))
