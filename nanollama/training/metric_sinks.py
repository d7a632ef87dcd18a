"""Where training figures go besides metrics.jsonl: TensorBoard and Weights & Biases.

Owns how each package is opened, resumed and closed; both are imported only here, and only when a config asks
for them. Knows nothing of what the figures mean: a sink has `write(step, {name: number})` and `close()`.
"""

import secrets
from collections.abc import Mapping
from pathlib import Path

from nanollama.config import ConfigError
from nanollama.data.files import write_atomic


class TensorBoard:
    """Event files under `directory`, written by tensorboardX."""

    def __init__(self, directory: Path, resume_step: int):
        try:
            from tensorboardX import SummaryWriter
        except ImportError as error:
            raise ConfigError("config.logging.tensorboard", "the package tensorboardX is not installed",
                              "Run `pip install tensorboardX`, or set it to False.") from error
        # purge_step hides what a killed run wrote past its checkpoint; the suffix keeps its file when both
        # runs began in the same second, which is all that tensorboardX's file names tell apart.
        self._writer = SummaryWriter(str(directory), purge_step=resume_step + 1,
                                     filename_suffix=f".{resume_step}")

    def write(self, step: int, numbers: Mapping[str, float]) -> None:
        for name, value in numbers.items():
            self._writer.add_scalar(name, value, step)
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()


class Wandb:
    """One Weights & Biases run per run folder, also across resumes; offline with WANDB_MODE=offline."""

    def __init__(self, workdir: Path, project: str, name: str):
        try:
            import wandb
        except ImportError as error:
            raise ConfigError("config.logging.wandb_project", f"{project!r}, and the package wandb is not installed",
                              "Run `pip install 'nanollama[wandb]'`, or set it to ''.") from error
        remembered = workdir / "wandb_run_id"  # a resumed run goes on in the same W&B run
        if not remembered.is_file():
            write_atomic(remembered, secrets.token_hex(4))
        self._run = wandb.init(project=project, name=name or None, dir=str(workdir), resume="allow",
                               id=remembered.read_text())
        # W&B's own step cannot go back to a checkpoint; a metric used as the x axis can.
        self._run.define_metric("*", step_metric="step")

    def write(self, step: int, numbers: Mapping[str, float]) -> None:
        self._run.log({**numbers, "step": step})

    def close(self) -> None:
        self._run.finish()
