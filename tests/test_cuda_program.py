"""The train step as XLA's CUDA compiler makes it for an H200, with the flags of a run.

Nobody could look at it on a card; what is asked here are things that cost a step its speed or its order.
"""

import dataclasses
import functools
import re
from typing import Any

import pytest
from tiny import MODEL, tiny_config

from nanollama.config import ComputeConfig, LossConfig, ModelConfig, MoeConfig
from nanollama.models import decoder
from nanollama.parallel import backend
from nanollama.planning import aot, targets

pytestmark = pytest.mark.filterwarnings("ignore:The Pallas Triton backend is deprecated:DeprecationWarning")
ROWS, LENGTH = 2, 256
DENSE = dataclasses.replace(MODEL, vocab_size=512, hidden_size=128, intermediate_size=256, head_dim=64)
EXPERTS = dataclasses.replace(DENSE, moe=MoeConfig(8, 2, 64))


@functools.cache
def program(model: ModelConfig, **compute: Any) -> str:
    """The compiled program's text, with what stands for attention in a plan."""
    where = targets.parse("h200x1")
    if absent := aot.missing(where):
        pytest.skip(absent)
    config = tiny_config(
        rows=ROWS,
        model=model,
        compute=ComputeConfig(dtype="bfloat16", loss_chunk_tokens=256, scan_unroll=1, **compute),
        loss=LossConfig(balance_loss=0.01 if model.moe else 0.0),
    )
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, sequence_length=LENGTH))
    return str(aot.compiled_step(config, where).as_text())


def sorted_numbers(text: str) -> list[int]:
    """Of each sort, how many numbers."""
    return [int(count) for count in re.findall(r"= \(?\w+\[(\d+)[^=]* sort\(", text)]


def trips(text: str) -> list[int]:
    """Of each loop, how often it runs."""
    return [int(count) for count in re.findall(r'known_trip_count":\{"n":"(\d+)"', text)]


def test_no_scatter_becomes_a_loop_or_a_sort_of_everything() -> None:
    """What the deterministic flag makes of scatter-adds: an iteration a token (0.10), a sort of all numbers (0.12)."""
    assert "--xla_gpu_deterministic_ops=true" in backend.known_flags("gpu")
    text = program(EXPERTS)
    assert max(sorted_numbers(text)) <= ROWS * LENGTH  # ids of tokens
    assert max(trips(text)) <= 8  # layers, chunks of the loss


def test_experts_read_their_own_rows_only() -> None:
    """`ragged_dot` there copies all rows for each expert: an array of experts x assignments x width."""
    text = program(EXPERTS)
    assert "grouped_rows" in text and "grouped_weights" in text
    experts = EXPERTS.moe.num_experts
    assignments = ROWS * LENGTH * EXPERTS.moe.experts_per_token
    assert not re.search(rf"\[{experts},{assignments},|\[{assignments},{experts},\d", text)


def test_every_product_of_the_layers_is_in_8_bits() -> None:
    """Forward, its input's gradient and its weight's, of seven weights; results as wide as the activations."""
    products = r'= \(?(\w+)\[.* custom_call_target="__cublas\$lt\$matmul(\$f8)?"'
    results = re.findall(products, program(DENSE, fp8=True))
    assert [dtype for dtype, eight in results if eight] == ["bf16"] * 3 * 7
    assert len([dtype for dtype, eight in results if not eight]) == 3  # the head's


def test_a_scatter_add_would_be_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decoder, "look_up", lambda table_VD, tokens_BT: table_VD[tokens_BT])
    text, tokens = program.__wrapped__(DENSE), ROWS * LENGTH
    assert max(sorted_numbers(text), default=0) > tokens or max(trips(text)) >= tokens
