"""The pipeline runner, on stages that are tiny programs: what runs, what does not, kills, locks, gates."""

import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from nanollama.run import NO_GO, main
from nanollama.stages import Run, load_pipeline

# a -> b -> c: each copies its input and notes in runs.txt that it ran
COPY = (
    "import sys, pathlib; name, source, target, journal = sys.argv[1:];"
    "pathlib.Path(target).parent.mkdir(exist_ok=True);"
    "pathlib.Path(target).write_text(pathlib.Path(source).read_text().strip() + name);"
    "open(journal, 'a').write(name)"
)


def stage(name, source, **more):
    target = "{workdir}/" + name + "/out.txt"
    command = ["{python}", "-c", COPY, name, source, target, "{workdir}/runs.txt"]
    fields = {
        "name": name,
        "about": f"copy {name}",
        "command": command,
        "inputs": [source],
        "outputs": [target],
    }
    return fields | more


def chain(tmp_path, **changes):
    """A pipeline of three copying stages; `changes` replace fields of stages by name."""
    stages = [
        stage("a", str(tmp_path / "source.txt")),
        stage("b", "{workdir}/a/out.txt"),
        stage("c", "{workdir}/b/out.txt"),
    ]
    stages = [fields | changes.get(fields["name"], {}) for fields in stages]
    return write_pipeline(tmp_path, {"name": "chain", "stages": stages, "report": "{workdir}/c/out.txt"})


def write_pipeline(tmp_path, content):
    path = tmp_path / "pipeline.py"
    path.write_text(f"def get_config(arg=''):\n    return {content!r}\n")
    source = tmp_path / "source.txt"
    if not source.exists():
        source.write_text("x")
    return path


def run(pipeline, workdir, *more):
    return main([f"--pipeline={pipeline}", f"--workdir={workdir}", *more])


def journal(workdir):
    """Names of the stages that ran since the last look."""
    path = workdir / "runs.txt"
    text = path.read_text() if path.exists() else ""
    path.unlink(missing_ok=True)
    return text


@pytest.fixture
def workdir(tmp_path):
    return tmp_path / "a run, with spaces & signs"


@pytest.fixture
def finished(tmp_path, workdir):
    pipeline = chain(tmp_path)
    assert run(pipeline, workdir) == 0
    assert journal(workdir) == "abc"
    return pipeline


def test_all_stages_run_and_a_second_run_does_nothing(finished, workdir, capsys):
    before = json.loads((workdir / "stages" / "c.json").read_text())
    capsys.readouterr()
    begin = time.monotonic()
    assert run(finished, workdir) == 0
    assert time.monotonic() - begin < 3
    assert journal(workdir) == ""
    assert json.loads((workdir / "stages" / "c.json").read_text()) == before
    printed = capsys.readouterr().out
    assert "[3/3] c: done before" in printed
    assert f"Report: {workdir}/c/out.txt" in printed


def test_a_changed_input_runs_the_stage_and_what_depends_on_it(finished, workdir, tmp_path):
    (tmp_path / "source.txt").write_text("y")
    assert run(finished, workdir) == 0
    assert journal(workdir) == "abc"
    assert (workdir / "c" / "out.txt").read_text() == "yabc"


def test_a_change_without_effect_stops_early(finished, workdir, tmp_path):
    (tmp_path / "source.txt").write_text(
        "x\n"
    )  # stage a strips it: its output stays, so b and c are still done
    assert run(finished, workdir) == 0
    assert journal(workdir) == "a"


@pytest.mark.parametrize("harm", ["delete", "change"])
def test_a_lost_or_changed_output_is_made_again(finished, workdir, harm):
    output = workdir / "b" / "out.txt"
    if harm == "delete":
        output.unlink()
    else:
        output.write_text("xaX")
    assert run(finished, workdir) == 0
    assert journal(workdir) == "b"  # and its output is the old one, so c is still done
    assert output.read_text() == "xab"


def test_a_changed_command_runs_again(finished, workdir, tmp_path):
    other = stage("b", "{workdir}/a/out.txt")["command"] + []
    other[3] = "B"
    assert run(chain(tmp_path, b={"command": other}), workdir) == 0
    assert journal(workdir) == "Bc"


def test_a_moved_workdir_stays_done(finished, workdir, tmp_path):
    workdir.rename(tmp_path / "moved")
    assert run(finished, tmp_path / "moved") == 0
    assert journal(tmp_path / "moved") == ""


def test_force_and_from(finished, workdir, tmp_path):
    assert run(finished, workdir, "--force", "b") == 0
    assert journal(workdir) == "b"
    (tmp_path / "source.txt").write_text("z")
    assert run(finished, workdir, "--from", "b") == 0
    assert journal(workdir) == ""
    assert run(finished, workdir, "--from", "bb") == 2


def test_list_runs_nothing(tmp_path, workdir, capsys):
    pipeline = chain(tmp_path)
    assert run(pipeline, workdir, "--list") == 0
    printed = capsys.readouterr().out
    assert not workdir.exists()
    assert "[1/3] a: copy a (to do)" in printed
    assert "[2/3] b: copy b (waits for an earlier stage)" in printed


def test_a_config_file_counts_as_what_it_resolves_to(tmp_path, workdir):
    config = tmp_path / "config.py"
    config.write_text("def get_config(arg=''):\n    return {'steps': 3}\n")
    pipeline = chain(tmp_path, b={"inputs": ["{workdir}/a/out.txt", str(config)]})
    assert run(pipeline, workdir) == 0
    journal(workdir)
    config.write_text("# a comment\ndef get_config(arg=''):\n    return dict(steps=1 + 2)\n")
    assert run(pipeline, workdir) == 0
    assert journal(workdir) == ""
    config.write_text("def get_config(arg=''):\n    return {'steps': 4}\n")
    assert run(pipeline, workdir) == 0
    assert journal(workdir) == "b"


def test_what_a_command_continues_is_moved_aside_when_inputs_change(tmp_path, workdir):
    pipeline = chain(tmp_path, b={"continues": "{workdir}/b"})
    assert run(pipeline, workdir) == 0
    (workdir / "b" / "old").write_text("from the first inputs")
    assert run(pipeline, workdir) == 0
    assert (workdir / "b" / "old").exists()  # nothing changed: it stays
    (tmp_path / "source.txt").write_text("y")
    assert run(pipeline, workdir) == 0
    assert not (workdir / "b" / "old").exists()
    assert (workdir / "b.before" / "old").exists()


def test_a_failure_shows_its_last_lines_the_command_and_passes_its_code(tmp_path, workdir, capsys):
    program = "import sys; print('line one'); print('broken: no such thing', file=sys.stderr); sys.exit(7)"
    pipeline = chain(tmp_path, b={"command": ["{python}", "-c", program]})
    assert run(pipeline, workdir) == 7
    printed = capsys.readouterr().out
    assert "failed with exit code 7" in printed
    assert "  | broken: no such thing" in printed
    assert f"--pipeline={pipeline}" in printed
    assert json.loads((workdir / "stages" / "b.json").read_text())["state"] == "failed"
    assert run(chain(tmp_path), workdir) == 0  # mended: a is not run again
    assert journal(workdir) == "abc"


def test_success_without_the_outputs_is_a_failure(tmp_path, workdir, capsys):
    assert run(chain(tmp_path, b={"command": ["{python}", "-c", "pass"]}), workdir) == 1
    assert "did not make" in capsys.readouterr().out


def test_unknown_program_and_missing_input_are_explained(tmp_path, workdir, capsys):
    assert run(chain(tmp_path, a={"command": ["no-such-program"]}), workdir) == 2
    assert "no program 'no-such-program'" in capsys.readouterr().err
    assert run(chain(tmp_path, a={"inputs": ["nowhere.txt"]}), workdir) == 2
    assert "'nowhere.txt' does not exist" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("bounds", "code"), [({"max": 2.0}, 0), ({"max": 1.0}, NO_GO), ({"min": 3.0}, NO_GO)]
)
def test_gate(tmp_path, workdir, capsys, bounds, code):
    program = (
        "import json, sys; open(sys.argv[1] + '/result.json', 'w').write(json.dumps({'all': {'loss': 1.5}}));"
        "open(sys.argv[1] + '/runs.txt', 'a').write('g')"
    )
    fields = {
        "command": ["{python}", "-c", program, "{workdir}"],
        "outputs": ["{workdir}/result.json"],
        "gate": {"file": "{workdir}/result.json", "field": "all.loss", **bounds},
    }
    last = {"inputs": ["{workdir}/a/out.txt"], "command": stage("c", "{workdir}/a/out.txt")["command"]}
    pipeline = chain(tmp_path, b=fields, c=last)
    assert run(pipeline, workdir) == code
    assert journal(workdir) == ("agc" if code == 0 else "ag")
    assert ("NO GO" in capsys.readouterr().out) == (code != 0)
    fields["gate"] = {"file": "{workdir}/result.json", "field": "all.loss", "max": 9.0}
    assert run(chain(tmp_path, b=fields, c=last), workdir) == 0  # another bound: the stage itself stays done
    assert journal(workdir) == ("" if code == 0 else "c")
    fields["gate"] = {"file": "{workdir}/result.json", "field": "all.los", "max": 9.0}
    assert run(chain(tmp_path, b=fields, c=last), workdir) == 2
    assert "Did you mean 'loss'" in capsys.readouterr().err


def test_nan_never_passes_a_gate(tmp_path, workdir):
    program = "import sys; open(sys.argv[1], 'w').write('{\"loss\": NaN}')"
    gate = {"file": "{workdir}/result.json", "field": "loss", "max": 9.0}
    fields = {
        "command": ["{python}", "-c", program, "{workdir}/result.json"],
        "outputs": ["{workdir}/result.json"],
        "gate": gate,
    }
    assert run(chain(tmp_path, c=fields), workdir) == NO_GO


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"outputs": []}, "no command or no outputs"),
        ({"name": "b"}, "not a name of its own"),
        ({"inptus": []}, "Did you mean 'inputs'?"),
        ({"command": "python x"}, "is not a list"),
    ],
)
def test_a_wrong_pipeline_file_is_refused_before_any_work(tmp_path, workdir, capsys, change, message):
    assert run(chain(tmp_path, a=change), workdir) == 2
    assert message in capsys.readouterr().err
    assert not workdir.exists()


# a stage that counts to 40 with a file as its memory, and starts a child of its own that would live on;
# it stays at 20 while there is a file `hold`, so that a busy machine cannot let it end before its test acts
COUNT = textwrap.dedent("""
    import pathlib, subprocess, sys, time
    folder = pathlib.Path(sys.argv[1]); folder.mkdir(exist_ok=True)
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"], start_new_session=True)
    (folder / "pids").open("a").write(f"{child.pid}\\n")
    memory = folder / "count"
    count = int(memory.read_text()) if memory.exists() else 0
    (folder / "starts").open("a").write(f"{count}\\n")
    while count < 40:
        time.sleep(0.02)
        if count == 20 and (folder.parent / "hold").exists():
            continue
        count += 1
        temporary = folder / "count.new"
        temporary.write_text(str(count))
        temporary.rename(memory)
    child.kill()
    (folder / "result").write_text("counted")
""")


@pytest.fixture
def counting(tmp_path):
    program = tmp_path / "count.py"
    program.write_text(COUNT)
    fields = {"command": ["{python}", str(program), "{workdir}/n"], "outputs": ["{workdir}/n/result"]}
    return chain(tmp_path, b=fields, c=stage("c", "{workdir}/n/result"))


def start(pipeline, workdir):
    command = [sys.executable, "-m", "nanollama.run", f"--pipeline={pipeline}", f"--workdir={workdir}"]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def hold(workdir):
    workdir.mkdir()
    (workdir / "hold").touch()


def wait_for(condition, seconds=60):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.01)


def counted(workdir):
    memory = workdir / "n" / "count"
    return int(memory.read_text()) if memory.exists() else 0


def alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().split()[2] != "Z"
    except FileNotFoundError:
        return False


def commands_of(workdir):
    """Process ids whose command line names the working directory."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if str(workdir).encode() in path.read_bytes():
                found.append(int(path.parent.name))
        except OSError:
            continue
    return [pid for pid in found if pid != os.getpid() and alive(pid)]


@pytest.mark.skipif(sys.platform != "linux", reason="processes are found through /proc")
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT, signal.SIGTERM])
def test_killed_at_any_moment_it_goes_on_and_leaves_nothing_behind(counting, workdir, number):
    hold(workdir)
    process = start(counting, workdir)
    wait_for(lambda: counted(workdir) > 5)
    process.send_signal(number)
    printed, _ = process.communicate(timeout=60)
    wait_for(lambda: not commands_of(workdir))
    if number != signal.SIGKILL:
        assert process.returncode == 128 + number
        assert f"--workdir='{workdir}'" in printed or f"'--workdir={workdir}'" in printed
    marker = json.loads((workdir / "stages" / "b.json").read_text())
    assert marker["state"] == ("running" if number == signal.SIGKILL else "stopped")
    at_kill = counted(workdir)
    (workdir / "hold").unlink()

    assert run(counting, workdir) == 0
    starts = [int(line) for line in (workdir / "n" / "starts").read_text().split()]
    assert starts == [0, at_kill]
    pids = [int(line) for line in (workdir / "n" / "pids").read_text().split()]
    assert not any(alive(pid) for pid in pids)
    after = json.loads((workdir / "stages" / "b.json").read_text())
    assert after["attempts"] == 2
    assert after["seconds"] > marker["seconds"]


@pytest.mark.skipif(sys.platform != "linux", reason="processes are found through /proc")
def test_one_run_per_folder(counting, workdir, capsys):
    hold(workdir)
    process = start(counting, workdir)
    try:
        wait_for(lambda: counted(workdir) > 2)
        assert run(counting, workdir) == 2
        assert f"in use by process {process.pid}" in capsys.readouterr().err
    finally:
        (workdir / "hold").unlink()
        process.communicate(timeout=60)
    assert process.returncode == 0


def test_a_signal_during_a_stage_that_then_exits_0_is_no_success(tmp_path, workdir):
    """A trainer saves and exits 0 on SIGTERM: that must not count as trained."""
    program = tmp_path / "polite.py"
    program.write_text(
        "import pathlib, signal, sys, time\n"
        "def leave(*_): pathlib.Path(sys.argv[1]).write_text('half'); sys.exit(0)\n"
        "signal.signal(signal.SIGTERM, leave); print('ready', flush=True); time.sleep(30)\n"
    )
    fields = {"command": ["{python}", str(program), "{workdir}/half"], "outputs": ["{workdir}/half"]}
    process = start(chain(tmp_path, b=fields), workdir)
    log = workdir / "stages" / "b.log"
    wait_for(lambda: log.exists() and "ready" in log.read_text())
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGTERM
    assert (workdir / "half").exists()
    assert json.loads((workdir / "stages" / "b.json").read_text())["state"] == "stopped"


def test_hash_cache_notices_a_change_of_the_same_size(tmp_path, workdir):
    pipeline = load_pipeline(str(chain(tmp_path)))
    runner = Run(pipeline, workdir)
    path = tmp_path / "file"
    path.write_text("one")
    first = runner.content_hash(path)
    path.write_text("two")
    assert runner.content_hash(path) != first
    assert runner.content_hash(tmp_path / "nothing") is None
    (tmp_path / "empty").mkdir()
    assert runner.content_hash(tmp_path / "empty") is None
