"""transformers' side of `decode.py`: imports torch and transformers, takes one JSON argument, prints one JSON line."""

import json
import sys
import time
from typing import Any

import torch
import transformers


def model_of(m: dict[str, Any], dtype: torch.dtype, device: str) -> Any:
    """`LlamaForCausalLM` of these sizes, random weights, SDPA."""
    config = transformers.LlamaConfig(
        vocab_size=m["vocab_size"],
        hidden_size=m["hidden_size"],
        intermediate_size=m["intermediate_size"],
        num_hidden_layers=m["num_layers"],
        num_attention_heads=m["num_heads"],
        num_key_value_heads=m["num_kv_heads"],
        head_dim=m["head_dim"],
        rms_norm_eps=m["norm_eps"],
        tie_word_embeddings=m["tie_embeddings"],
        max_position_embeddings=1 << 16,
        eos_token_id=None,
        bos_token_id=None,
        pad_token_id=0,
        attn_implementation="sdpa",
    )
    with torch.device(device):
        return transformers.LlamaForCausalLM(config).to(dtype).eval()


def seconds(model: Any, prompts: torch.Tensor, tokens: int) -> float:
    """Of a whole call that writes `tokens` tokens a row."""
    start = time.perf_counter()
    mask = torch.ones_like(prompts)
    out = model.generate(prompts, attention_mask=mask, max_new_tokens=tokens, do_sample=False, use_cache=True)
    assert out.shape[1] == prompts.shape[1] + tokens
    if prompts.is_cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - start


@torch.inference_mode()
def run(asked: dict[str, Any]) -> dict[str, Any]:
    """For each batch size the rounds' (seconds to the first token, seconds of the others)."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = model_of(asked["model"], getattr(torch, asked["dtype"]), device)
    times = []
    for batch in asked["batches"]:
        prompts = torch.randint(1, asked["model"]["vocab_size"], (batch, asked["prompt"]), device=device)
        seconds(model, prompts, asked["tokens"])
        rounds = []
        for _ in range(asked["rounds"]):
            first = seconds(model, prompts, 1)
            rounds.append((first, seconds(model, prompts, asked["tokens"]) - first))
        times.append(rounds)
    return {"times": times, "device": device,
            "versions": {"torch": torch.__version__, "transformers": transformers.__version__}}  # fmt: skip


if __name__ == "__main__":
    print(json.dumps(run(json.loads(sys.argv[1]))))
