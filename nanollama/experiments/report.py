"""`python -m nanollama.experiments.report --run=DIR`: a run as one HTML page that needs nothing else.

Owns the page: that it is whole in one file, that text from a run is only ever shown, never run, and that
nothing is fetched. What the figures are is decided in `report_facts` and `report_provenance`, their wording
in `report_words`.
"""

import argparse
import base64
import datetime
import hashlib
import sys
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

import nanollama
from nanollama.data.files import DataError, write_atomic
from nanollama.experiments import report_facts, report_provenance, report_words
from nanollama.experiments.report_files import RunFiles


def build(run: str | Path) -> str:
    """The page of a run folder or a pipeline's working directory. Errors: DataError when no run is there."""
    files = RunFiles(run)
    config = report_facts.resolved(files)
    facts: dict[str, Any] = {
        "name": report_words.cut(files.config.get("name") or files.given.resolve().name, 120),
        "training": report_facts.training(files, config), "held_out": report_facts.held_out(files),
        "charts": report_facts.charts(files), "samples": report_facts.samples(files),
        "stages": report_facts.stages(files), "commands": report_facts.commands(files),
        "model": report_facts.model(config), "recipe": report_facts.recipe(config),
        "sources": report_provenance.sources(files), "tokenizer": report_provenance.tokenizer(files),
        "packed": report_provenance.packed(files), "chain": report_provenance.chain(files)}
    facts["findings"] = report_provenance.findings(files, facts)
    return render({**facts, **report_words.wording(files, facts), "documents": report_words.documents(files)})


def render(facts: Mapping[str, Any]) -> str:
    """The template filled with `facts`. Only the page's own script, known by its hash, may run."""
    templates = resources.files("nanollama.experiments.templates")
    page, style, script = ((templates / f"report.{end}").read_text("utf-8") for end in ("html", "css", "js"))
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = (f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'; "
              "base-uri 'none'; form-action 'none'")
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True)
    environment.filters.update(call=lambda value, name: report_words.FORMATS[name](value),
                               cut=report_words.cut, total=report_words.total)
    today = datetime.datetime.now(datetime.UTC)
    return report_facts.clean(environment.from_string(page).render(
        **facts, policy=policy, style=Markup(style), script=Markup(script), version=nanollama.__version__,
        today=f"{today.day} {today:%B %Y}"))


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m nanollama.experiments.report", description="A run as one HTML page.")
    parser.add_argument("--run", required=True, help="run folder, or the --workdir of a pipeline")
    parser.add_argument("--output", help="file to write (default: report.html in the given directory)")
    options = parser.parse_args(arguments)
    output = Path(options.output or Path(options.run) / "report.html")
    try:
        page = build(options.run)
        write_atomic(output, page)
    except (DataError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"report: {output} ({len(page.encode()) / 1024:.0f} kB)")
    return 0


if __name__ == "__main__":
    sys.exit(main())
