"""The report: whole, inert, honest about what is absent, and looked at in a real browser where there is one."""

import base64
import hashlib
import html
import html.parser
import json
import math
import re
import shutil
import subprocess
from pathlib import Path

import jinja2
import pytest
from fake_run import evaluation, make_pipeline, make_run

from nanollama.data.files import write_json
from nanollama.experiments import report, report_facts
from nanollama.experiments.report import build, main

HOSTILE = ('</script></style></title><script>document.title="taken"</script><img src=x onerror=alert(1)> {{ 7*7 }} '
           '{% raw %} &amp; \u202ereversed\u2066 \x00\x07\x1b[31m שלום مرحبا 🦙👩‍👩‍👧 "\'` \ud800')
BROWSER = next((found for name in ("chromium", "chromium-browser", "google-chrome", "chrome")
                if (found := shutil.which(name))), None)
needs_browser = pytest.mark.skipif(BROWSER is None, reason="no chromium or google-chrome on this machine")
VOID = {"meta", "link", "br", "img", "input", "hr"}


class Page(html.parser.HTMLParser):
    """Elements of a page, and whether they are closed in order."""

    def __init__(self, text: str):
        super().__init__()
        self.open, self.elements, self.texts = [], [], []
        self.feed(text)
        assert not self.open, f"never closed: {self.open}"

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self.open and self.open[-1] == tag, f"</{tag}> closes {self.open[-1:]}"
        self.open.pop()

    def handle_data(self, data):
        self.texts.append((self.open[-1] if self.open else "", data))

    @property
    def text(self) -> str:
        shown = " ".join(data for tag, data in self.texts if tag not in ("script", "style", "title"))
        return re.sub(r"\s+", " ", shown)


def check_inert(text: str) -> Page:
    """Nothing is fetched, and no script runs but the page's own, whose hash the policy names."""
    page = Page(text)
    names = [tag for tag, _ in page.elements]
    assert not {"img", "iframe", "link", "object", "embed", "form", "base", "video", "audio"} & set(names)
    for tag, attributes in page.elements:
        assert not any(name.startswith("on") or name in ("src", "srcset", "action") for name in attributes), tag
        assert attributes.get("href", "#").startswith("#")
    scripts = [data for tag, data in page.texts if tag == "script"]
    kinds = [attributes.get("type") for tag, attributes in page.elements if tag == "script"]
    assert kinds.count(None) == 1 and set(kinds) <= {None, "application/json"}
    policy = next(a["content"] for tag, a in page.elements if a.get("http-equiv") == "Content-Security-Policy")
    digest = base64.b64encode(hashlib.sha256(scripts[kinds.index(None)].encode()).digest()).decode()
    assert f"'sha256-{digest}'" in policy and "default-src 'none'" in policy
    for kind, script in zip(kinds, scripts, strict=True):
        if kind:
            json.loads(script)
    style = next(data for tag, data in page.texts if tag == "style")
    assert "url(" not in style and "@import" not in style
    return page


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory) -> Path:
    return make_pipeline(tmp_path_factory.mktemp("pipeline"))


@pytest.fixture
def copy(pipeline, tmp_path) -> Path:
    """The pipeline's directory to change; its config still names the data of the original."""
    return Path(shutil.copytree(pipeline, tmp_path / "work"))


def test_a_whole_run_shows_every_part(pipeline):
    page = check_inert(build(pipeline))
    for shown in ("1.067", "11.56", "3.93 M", "9.83 M", "67.99 per word", "8,192 pieces",
                  "windows of 512 tokens that move by 256", "180,640", "14.2 M", "PSF-2.0",
                  "3.280 characters per token", "51d051d051d051d0", "6 min 38 s", "2 attempts",
                  "python -m nanollama.chat --checkpoint=", "python -m nanollama.corpus",
                  "def read_json(path):", "temperature 0.8", "resumed at step 600",
                  "112 GFLOP/s", "Muon with AdamW", "2 CPU cores", "commit ab12ab12ab12"):
        assert shown in page.text, shown
    assert "not measured" not in page.text.lower() and "Warnings" not in page.text
    assert sum(attributes.get("class", "").startswith("chart ") for _, attributes in page.elements) == 3 + 4 * 2


@pytest.mark.parametrize(("absent", "said"), [
    ("evaluation", "No evaluation has been run"), ("samples", "Not measured: no samples"),
    ("stages", "Not measured: this run was not started by a pipeline"),
    ("train/metrics.jsonl", "Not measured: the run has logged no step"),
    ("train/config.json", "Not measured: config.json is absent"), ("train/environment.json", "environment"),
    ("train/lineage.json", "lineage")])
def test_what_is_absent_is_said_and_the_rest_is_shown(copy, absent, said):
    path = copy / absent
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    page = check_inert(build(copy))
    assert said in page.text


def test_a_run_whose_data_goes_piece_by_piece(tmp_path):
    folder = make_pipeline(tmp_path)
    for absent, said in [("corpus", "9,100"), ("packed", "Not measured: neither the corpus nor the packed set is"),
                         ("tokenizer", "Tokenizer not measured")]:
        shutil.rmtree(folder / absent)
        assert said in check_inert(build(folder)).text


def test_without_the_packed_set_the_corpus_still_tells(tmp_path):
    folder = make_pipeline(tmp_path)
    shutil.rmtree(folder / "packed")
    assert "Packed set not measured" in check_inert(build(folder)).text


def test_a_run_folder_alone_and_barely_begun(tmp_path):
    run = make_run(tmp_path, logged=3)
    for line_count in (4, 1, 0):
        lines = (run / "metrics.jsonl").read_text().splitlines(keepends=True)
        (run / "metrics.jsonl").write_text("".join(lines[:line_count]))
        page = check_inert(build(run))
    assert "has not logged a step yet" in page.text


def test_what_was_not_measured_is_never_zero(copy):
    figures = {**evaluation(), "bits_per_byte": None, "perplexity_word": math.nan}
    (copy / "evaluation/results.json").write_text(json.dumps(figures))
    check_not_zero(build(copy))


def check_not_zero(text: str) -> None:
    value = re.search(r"Bits per byte</dt>\s*<dd[^>]*>(.*?)</dd>", text, re.DOTALL).group(1)
    assert "not measured" in value and "0" not in value


def test_mutant_that_shows_absent_as_zero_is_caught(copy, monkeypatch):
    honest = report_facts._held_out_row
    monkeypatch.setattr(report_facts, "_held_out_row", lambda name, row: {
        key: 0.0 if value is None else value for key, value in honest(name, row).items()})
    with pytest.raises(AssertionError):
        test_what_was_not_measured_is_never_zero(copy)


def hostile_run(folder: Path) -> Path:
    make_pipeline(folder, name=HOSTILE.replace("\ud800", ""))
    texts = [{"prompt": HOSTILE, "text": HOSTILE * 2}, {"prompt": "שלום", "text": " עולם" * 40},
             {"prompt": "long", "text": "x" * 100_000, "tokens": 25_000}, {"text": "🦙" * 400}, {"prompt": 3}, "no"]
    (folder / "samples/samples.json").write_text(json.dumps({"samples": texts}))
    figures = json.loads(json.dumps(evaluation()).replace("\\ud800", ""))
    figures["sources"] = {HOSTILE.replace("\ud800", ""): evaluation(), "s" * 5000: {}, "odd": 7}
    write_json(folder / "evaluation/results.json", figures)
    with open(folder / "train/metrics.jsonl", "a", encoding="utf-8") as file:
        file.write(json.dumps({"step": 1201, "kind": "event", "event": "not_finite", "text": HOSTILE}) + "\n")
        file.write(json.dumps({"step": 1201, "kind": "train", "loss": "nan", "grad_norm": "inf"}) + "\n")
    (folder / "train/config_as_given.txt").write_text("# --config=x.py\n</pre><script>alert(2)</script>")
    return folder


def test_hostile_text_is_shown_and_never_run(tmp_path):
    text = build(hostile_run(tmp_path))
    page = check_inert(text)
    text.encode("utf-8")  # no halves of surrogate pairs
    assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f\u202e\u2066]", text)
    assert '<script>document.title="taken"' in page.text and "{{ 7*7 }}" in page.text and "שלום" in page.text
    assert "97,000 more characters are not shown" in page.text and len(text) < 250_000
    assert "not finite in 1 of the logged steps, first at step 1,201" in page.text


def test_mutant_without_escaping_is_caught(tmp_path, monkeypatch):
    folder, real = hostile_run(tmp_path), jinja2.Environment
    monkeypatch.setattr(report.jinja2, "Environment", lambda **options: real(**{**options, "autoescape": False}))
    with pytest.raises(AssertionError):
        check_inert(build(folder))


def test_broken_files_are_warnings(copy):
    (copy / "evaluation/results.json").write_text('{"kind": "perpl')
    (copy / "samples/samples.json").write_text("[1, 2]")
    (copy / "train/lineage.json").write_bytes(b"\xff\xfe")
    page = check_inert(build(copy))
    assert page.text.count("could not be read") == 3
    assert "Validation at step 1,200" in page.text  # the next best figure, named as what it is


def test_a_config_of_another_version_is_said(copy):
    write_json(copy / "train/config.json", {"name": "old", "layers": 3})
    assert "config.json is not one this version can read" in check_inert(build(copy)).text


@pytest.mark.parametrize(("change", "said"), [
    ({"steps": 2000}, "The run is not finished: the last step logged is 1,200 of 2,000."), ({}, None)])
def test_unfinished_runs_say_so(tmp_path, change, said):
    text = check_inert(build(make_pipeline(tmp_path, **change))).text
    assert (said or "Warnings") in text if said else "Warnings" not in text


def test_links_that_do_not_fit_are_warned_of(copy):
    lineage = json.loads((copy / "train/lineage.json").read_text())
    lineage["sets"][0]["dataset_id"], lineage["tokenizer"]["sha256"] = "e" * 64, "f" * 64
    write_json(copy / "train/lineage.json", lineage)
    text = check_inert(build(copy)).text
    assert "is not the one this run was trained on (eeeeeeeeeeee)" in text
    assert "belongs to tokenizer 8c1f8c1f8c1f, but the run used ffffffffffff" in text


def test_overfitting_and_an_older_checkpoint_are_warned_of(copy):
    with open(copy / "train/metrics.jsonl", "a") as file:
        file.write(json.dumps({"step": 1200, "kind": "validation", "nll": 4.0}) + "\n")
    write_json(copy / "evaluation/results.json", {**evaluation(), "checkpoint": {"step": 1000}})
    text = check_inert(build(copy)).text
    assert "ended at 4.0000: the model overfits" in text
    assert "held-out figures are of step 1,000, training went on to step 1,200" in text


def test_command_line(pipeline, tmp_path, capsys):
    assert main([f"--run={pipeline}", f"--output={tmp_path / 'deep/page.html'}"]) == 0
    assert "page.html" in capsys.readouterr().out and (tmp_path / "deep/page.html").stat().st_size < 300_000
    assert main([f"--run={tmp_path}"]) == 2
    assert "no run was started there" in capsys.readouterr().err
    assert main([f"--run={tmp_path / 'nowhere'}"]) == 2
    assert "no such directory" in capsys.readouterr().err


def test_pipeline_and_its_run_folder_give_the_same_page(pipeline):
    assert build(pipeline) == build(pipeline / "train")


def test_home_directories_do_not_leave_the_machine(copy, monkeypatch):
    monkeypatch.setenv("HOME", str(copy.parent))
    text = build(copy)
    assert str(copy.parent) not in text and "~/work/train" in text


# What a browser makes of it: a script put into the page looks around and tells the page it is framed in.
PROBE = """<script>
const drawn = [...document.querySelectorAll("svg.chart")].filter((svg) => svg.getBoundingClientRect().width > 0);
const box = drawn[0].getBoundingClientRect();
drawn[0].dispatchEvent(new PointerEvent("pointermove", {clientX: box.left + box.width / 2, clientY: box.top + 30}));
parent.postMessage({
  name: NAME, title: document.title, width: innerWidth, readout: document.querySelector(".readout").textContent,
  charts: drawn.map((svg) => [svg.getBoundingClientRect(), svg.viewBox.baseVal.width]).map(
    ([box, width]) => ({width: box.width, height: box.height, zoom: box.width / width})),
  bars: [...document.querySelectorAll(".bars i")].map((bar) => bar.getBoundingClientRect().width),
  overflow: document.documentElement.scrollWidth - document.documentElement.clientWidth,
  widest: [...document.querySelectorAll("main *")].map((node) => [node.getBoundingClientRect().right, node.outerHTML])
    .sort((a, b) => b[0] - a[0])[0].join(" ").slice(0, 200),
  headline: [...document.querySelectorAll(".figures .value")].map((node) => node.innerText)}, "*");
</script>"""
FRAMES = """<!doctype html><script>
const seen = {};
addEventListener("message", (event) => {
  seen[event.data.name] = event.data;
  document.documentElement.dataset.probe = JSON.stringify(seen);
});
</script>"""


def browse(page: Path, profile: Path) -> tuple[str, list[str]]:
    """The page as the browser has it in the end, and what was said on its console."""
    done = subprocess.run(
        [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-sync",
         "--disable-background-networking", "--disable-component-update", "--enable-logging=stderr",
         f"--user-data-dir={profile}", "--window-size=1400,900", "--virtual-time-budget=3000", "--dump-dom",
         page.as_uri()], capture_output=True, text=True, timeout=60)
    return done.stdout, [line for line in done.stderr.splitlines() if "CONSOLE" in line]


@needs_browser
def test_in_a_browser_at_desktop_and_phone_width(tmp_path, pipeline):
    pages = {"whole": build(pipeline), "hostile": build(hostile_run(tmp_path / "hostile")),
             "begun": build(make_run(tmp_path / "begun", logged=40))}
    frames = FRAMES
    for name, text in pages.items():
        (tmp_path / f"{name}.html").write_text(text, encoding="utf-8")  # as it is: its policy is in force
        frames += f'<iframe src="{name}.html" width="1000"></iframe>'
        for width in (1280, 900, 700, 390, 340):
            probe = PROBE.replace("NAME", f'"{name} {width}"') + "</body>"
            probed = re.sub(r'<meta http-equiv="Content-Security-Policy"[^>]*>', "", text)
            path = tmp_path / f"{name}-{width}.html"
            path.write_text(probed.replace("</body>", probe), encoding="utf-8")
            frames += f'<iframe src="{path.name}" width="{width}" height="800" style="border:0"></iframe>'
    (tmp_path / "frames.html").write_text(frames)
    dom, said = browse(tmp_path / "frames.html", tmp_path / "profile")
    assert said == []
    seen = json.loads(html.unescape(re.search(r'data-probe="(.*?)"', dom).group(1)))
    assert len(seen) == 15
    for name, found in seen.items():
        assert found["width"] == int(name.split()[1])
        assert found["overflow"] <= 0, f"{name}: scrolls sideways, because of {found['widest']}"
        assert len(found["charts"]) >= 3, name
        for chart in found["charts"]:  # zoom: labels are 12 pixels times this
            assert chart["width"] > 250 and chart["height"] > 120 and 0.75 < chart["zoom"] < 1.5, (name, chart)
        assert found["readout"].startswith("step ") and "train" in found["readout"]
        assert found["title"].endswith(": training report")
    assert seen["whole 390"]["headline"][:2] == seen["whole 1280"]["headline"][:2] == ["1.067", "11.56"]
    assert min(seen["whole 390"]["bars"]) > 2 and max(seen["whole 390"]["bars"]) > 250


@needs_browser
def test_mutant_page_that_runs_a_foreign_script_is_caught_on_the_console(tmp_path, pipeline):
    page = tmp_path / "page.html"
    page.write_text(build(pipeline).replace("</body>", "<script>document.title = 1</script></body>"))
    _, said = browse(page, tmp_path / "profile")
    assert any("Content Security Policy" in line for line in said)
