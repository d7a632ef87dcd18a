"""The quickstart as a chain of commands: text -> tokenizer -> packed data -> model -> evaluation -> report.

Run by `make quickstart`; each command also works alone. `quickstart.py:tiny` shrinks every stage to seconds.
"""

from ml_collections import ConfigDict

from nanollama.config_files import load, parse_arg

MIXTURE = "configs/mixtures/quickstart.yaml"
PROMPTS = "configs/prompts/quickstart.json"


def get_config(argument: str = "") -> ConfigDict:
    tiny = parse_arg(argument, tiny=False)["tiny"]
    config_file = "configs/quickstart.py:tiny" if tiny else "configs/quickstart.py"
    train_config = load(config_file)
    last_checkpoint = f"{{workdir}}/train/checkpoints/{train_config.steps}"

    config = ConfigDict()
    config.name = "quickstart"
    config.stages = (
        {
            "name": "corpus",
            "about": "collect the text of Python's own library and of package descriptions",
            "command": ["{python}", "-m", "data_pipeline.corpus", f"--config={MIXTURE}"]
            + ["--output={workdir}/corpus", *(["--limit-mb=0.2"] if tiny else [])],
            "inputs": [MIXTURE],
            "outputs": ["{workdir}/corpus"],
        },
        {
            "name": "tokenizer",
            "about": f"train the tokenizer: {train_config.model.vocab_size:,} pieces",
            "command": ["{python}", "-m", "data_pipeline.tokenizer", "--corpus={workdir}/corpus"]
            + ["--output={workdir}/tokenizer", f"--vocab-size={train_config.model.vocab_size}"],
            "inputs": ["{workdir}/corpus"],
            "outputs": ["{workdir}/tokenizer"],
            "continues": "{workdir}/tokenizer",  # frozen: another tokenizer never replaces it in its place
        },
        {
            "name": "pack",
            "about": "encode every document and pack them into records, validation apart",
            "command": ["{python}", "-m", "data_pipeline.pack", "--corpus={workdir}/corpus"]
            + ["--tokenizer={workdir}/tokenizer", "--output={workdir}/packed"]
            + [f"--record-length={train_config.data.sequence_length}"],
            "inputs": ["{workdir}/corpus", "{workdir}/tokenizer"],
            "outputs": ["{workdir}/packed"],
        },
        {
            "name": "pretrain",
            "about": f"train for {train_config.steps} steps; after a kill, go on from the last checkpoint",
            "command": ["{python}", "-m", "nanollama.train", f"--config={_with_workdir(config_file)}"]
            + ["--workdir={workdir}/train", "--resume"],
            "inputs": [config_file, "{workdir}/packed", "{workdir}/tokenizer"],
            "outputs": [last_checkpoint, "{workdir}/train/metrics.jsonl"],
            "continues": "{workdir}/train",
        },
        {
            "name": "evaluate",
            "about": "perplexity and bits per byte on documents that were held out",
            "command": ["{python}", "-m", "evals.perplexity", "--checkpoint={workdir}/train"]
            + ["--data={workdir}/packed", "--split=validation", "--output={workdir}/evaluation"],
            "inputs": [last_checkpoint, "{workdir}/packed"],
            "outputs": ["{workdir}/evaluation"],
        },
        {
            "name": "sample",
            "about": "let the model write",
            "command": ["{python}", "-m", "nanollama.generate", "--checkpoint={workdir}/train"]
            + [f"--prompts={PROMPTS}", "--output={workdir}/samples"],
            "inputs": [last_checkpoint, PROMPTS],
            "outputs": ["{workdir}/samples"],
        },
        {
            "name": "report",
            "about": "one page with everything: data, loss, figures, samples, time",
            "command": ["{python}", "-m", "nanollama.experiments.report", "--run={workdir}"],
            "inputs": ["{workdir}/train/metrics.jsonl", "{workdir}/evaluation", "{workdir}/samples"],
            "outputs": ["{workdir}/report.html"],
        },
    )
    config.report = "{workdir}/report.html"
    config.then = ("{python}", "-m", "nanollama.chat", "--checkpoint={workdir}/train")
    return config


def _with_workdir(config_file: str) -> str:
    return config_file + (",workdir={workdir}" if ":" in config_file else ":workdir={workdir}")
