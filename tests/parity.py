"""`make test-parity`: every family against transformers on torch, in both directions; prints a table.

Needs the extra [parity]. `--write-golden` stores what transformers computed, for the tests that run without it.
"""

import argparse
import contextlib
import copy
import io
import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))
import nanollama  # noqa: F401 - before JAX, which it keeps from printing of its own cache

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # tiny matrices: more threads only wait for each other

import numpy as np
import torch
import transformers
from family_cases import CASES, GOLDEN, GREEDY, LAYOUTS, Case, Results, gradient_error, load, ours, prompt, rows
from flax.traverse_util import unflatten_dict
from safetensors.numpy import load_file, save_file

from nanollama.export.huggingface import export
from nanollama.export.import_huggingface import import_model
from nanollama.models.families import FAMILIES
from nanollama.training.checkpoint import restore_numpy

LOGITS, GRADIENTS = 1e-4, 1e-4  # largest difference allowed; gradients relative to the tensor's largest


def reference(case: Case) -> Any:
    """The transformers model with the case's weights, eager, float32."""
    with tempfile.TemporaryDirectory() as name:
        write_folder(Path(name), case.config, case.given)
        return from_folder(Path(name)).eval()


def write_folder(folder: Path, config: dict[str, Any], arrays: dict[str, np.ndarray]) -> None:
    """A published model."""
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    save_file(arrays, folder / "model.safetensors", metadata={"format": "pt"})


def from_folder(folder: Path) -> Any:
    model, loading = transformers.AutoModelForCausalLM.from_pretrained(
        folder, attn_implementation="eager", experts_implementation="eager", dtype=torch.float32,
        output_loading_info=True)  # fmt: skip
    assert not any(loading[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")), loading
    return model


def forget(model: Any) -> None:
    """With dynamic NTK transformers goes on using the frequencies of the longest text it has seen: start afresh."""
    model.model.rotary_emb = type(model.model.rotary_emb)(model.config)


def theirs(case: Case, model: Any) -> Results:
    """Each document alone: what a padded or packed row must equal."""
    V = case.model.vocab_size
    logits = {}
    model.zero_grad()
    for layout, row_lengths in LAYOUTS.items():
        batch = rows(layout, V)
        logits[layout] = np.zeros((*batch["tokens"].shape, V), np.float32)
        for row, lengths in enumerate(row_lengths):
            start = 0
            for length in lengths:
                forget(model)
                tokens = torch.tensor(batch["tokens"][row, start : start + length])[None].long()
                out = model(tokens, use_cache=False).logits[0]
                torch.nn.functional.cross_entropy(out[:-1], tokens[0, 1:], reduction="sum").backward()
                logits[layout][row, start : start + length] = out.detach().numpy()
                start += length
    by_name = published_gradients(model)
    gradients = {tensor.name: by_name[tensor.name] for tensor, _ in case.compared}
    forget(model)
    greedy = model.generate(torch.tensor(prompt(V))[None], max_new_tokens=GREEDY, min_new_tokens=GREEDY,
                            do_sample=False, pad_token_id=0, eos_token_id=None)  # fmt: skip
    return Results(logits, gradients, greedy[0].numpy())


def published_gradients(model: Any) -> dict[str, np.ndarray]:
    """By published names, which transformers knows how to make of its own stacked experts."""
    twin = copy.deepcopy(model)
    for parameter, original in zip(twin.parameters(), model.parameters(), strict=True):
        parameter.data = torch.zeros_like(original) if original.grad is None else original.grad.clone()
    with tempfile.TemporaryDirectory() as name:
        twin.save_pretrained(name)
        return load_file(Path(name) / "model.safetensors")


def round_trip(case: Case, model: Any) -> float:
    """transformers -> folder -> run -> folder -> transformers; largest difference of weights and logits: 0."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        own = FAMILIES[case.model.family].exported is not None
        if own:  # transformers cannot write what it cannot load
            write_folder(folder / "published", CASES[case.name], case.weights.arrays)
        else:
            model.save_pretrained(folder / "published")
        import_model(folder / "published", folder / "run", say=lambda line: None)
        export(folder / "run", folder / "exported", shard_bytes=1 << 16)
        before = case.given if own else load_file(folder / "published/model.safetensors")
        after: dict[str, np.ndarray] = {}
        for path in (folder / "exported").glob("*.safetensors"):
            after |= load_file(path)
        difference = max(float(np.abs(before[name] - after[name]).max()) for name in after)
        assert all(name in after or name == "lm_head.weight" for name in before)
        saved = restore_numpy(folder / "run")["params"]
        difference += float(np.abs(saved["embedding"] - unflatten_dict(case.params, sep="/")["embedding"]).max())
        loaded = from_folder(folder / "exported")
        tokens = torch.tensor(rows("padded", case.model.vocab_size)["tokens"])[:1].long()
        forget(model)
        with torch.no_grad():
            difference += float((model(tokens).logits - loaded(tokens).logits).abs().max())
        return difference


def write_golden(case: Case, expected: Results) -> None:
    """A sample of the reference: every eighth position's logits, gradient norms, greedy tokens."""
    GOLDEN.mkdir(parents=True, exist_ok=True)
    arrays = {f"logits/{layout}": values[:, ::8] for layout, values in expected.logits.items()}
    arrays["gradients"] = np.array([np.linalg.norm(expected.gradients[t.name]) for t, _ in case.compared], np.float32)
    np.savez_compressed(GOLDEN / f"{case.name}.npz", greedy=expected.greedy.astype(np.uint8), **arrays)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--write-golden", action="store_true", help="store what transformers computed")
    parser.add_argument("--family", default="", help="only these, with commas between")
    options = parser.parse_args()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    torch.manual_seed(0)
    print(f"transformers {transformers.__version__}, torch {torch.__version__}; 2 x 64 tokens, float32")
    print(f"{'family':<17} {'logits':>10} {'gradients':>10} {'greedy':>8} {'round trip':>11}")
    failed = 0
    for name in options.family.split(",") if options.family else CASES:
        case = load(name)
        model = reference(case)
        expected, found = theirs(case, model), ours(case)
        logits = max(float(np.abs(found.logits[x] - expected.logits[x]).max()) for x in LAYOUTS)
        gradients = gradient_error(found.gradients, expected.gradients)
        same = int((found.greedy == expected.greedy)[-GREEDY:].sum())
        with contextlib.redirect_stderr(io.StringIO()):
            trip = round_trip(case, model)
        good = logits <= LOGITS and gradients <= GRADIENTS and same == GREEDY and trip == 0
        failed += not good
        figures = f"{logits:>10.1e} {gradients:>10.1e} {same:>5}/{GREEDY} {'bit-exact' if trip == 0 else trip:>11}"
        print(f"{name:<17} {figures}{'' if good else '   FAILED'}", flush=True)
        if options.write_golden:
            write_golden(case, expected)
    print(f"{len(CASES) - failed} passed, {failed} failed" if not options.family else "")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
