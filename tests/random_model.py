"""A model of random weights that is as quick as it can be and still answers, ends, and gives scores that spread."""

from __future__ import annotations

from pathlib import Path


def make_tiny(demo_folder: Path, folder: Path, *, head_dim: int, ends: float = 0.1) -> Path:
    """The tiny model in `folder`; vLLM on a CPU takes no heads narrower than 32.

    Feature 0 of every embedding is large, so that after the last norm it is about 4 everywhere: the output row of the end-of-sequence
    token turns it into a constant bias. About one token in ten (`ends`) ends the answer, so that few answers are empty and few exceed 24
    tokens.
    """
    import torch
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    tokenizer = AutoTokenizer.from_pretrained(demo_folder)
    eos = tokenizer.eos_token_id
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=head_dim,
            max_position_embeddings=2048,
            tie_word_embeddings=False,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=eos,
            pad_token_id=tokenizer.pad_token_id,
        )
    )
    with torch.no_grad():
        model.model.embed_tokens.weight[:, 0] = 0.1
        for layer in model.model.layers:  # what was said must matter for scores: large values, small residual
            layer.self_attn.v_proj.weight.mul_(5)
            layer.self_attn.o_proj.weight[1:].mul_(5)
            layer.self_attn.o_proj.weight[0] = 0
            layer.mlp.down_proj.weight[0] = 0
        model.lm_head.weight.mul_(25)  # a nucleus of hundreds of tokens, not of all
        model.lm_head.weight[:, 0] = 0
        ids = torch.randint(3, len(tokenizer), (64, 32), generator=torch.Generator().manual_seed(1))
        hidden = model.model(ids).last_hidden_state.reshape(-1, 64)
        others = model.lm_head(hidden).logsumexp(-1).mean()
        model.lm_head.weight[eos] = 0
        model.lm_head.weight[eos, 0] = (others + torch.log(torch.tensor(ends))) / hidden[:, 0].mean()
        for choice in (" Yes", " No"):  # scores that spread
            model.lm_head.weight[tokenizer(choice, add_special_tokens=False)["input_ids"][0]] *= 3
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
