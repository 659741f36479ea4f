"""Scripts and ranks in forks of this process: as apart as processes are, without importing torch anew for each."""

import atexit
import faulthandler
import json
import os
import resource
import runpy
import select
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path

from tqdm.std import TqdmDefaultWriteLock

real_run = subprocess.run
patience = 480.0  # seconds that a fork may take; those that it starts itself have less, so that these are told of

# Otherwise all forks would share a lock, which one that is killed while it writes a progress bar would never give back.
TqdmDefaultWriteLock.mp_lock = None
os.register_at_fork(after_in_child=TqdmDefaultWriteLock.th_lock._at_fork_reinit)


def fork(
    function: Callable[[], object],
    output: Path | str = os.devnull,
    errors: Path | str | None = None,
    env: Mapping[str, str] | None = None,
) -> int:
    """Calls a function in a fork, whose output goes to files and which never returns; its process id.

    The fork is the first of a process group, so that it can be ended with all that it started.
    """
    global patience
    sys.stdout.flush()
    sys.stderr.flush()
    process = os.fork()
    if process:
        with suppress(OSError):  # whichever of the two is first
            os.setpgid(process, process)
        return process
    code = 1
    try:
        with suppress(OSError):
            os.setpgid(0, 0)
        patience -= 60
        os.dup2(os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), 1)
        os.dup2(1 if errors is None else os.open(errors, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), 2)
        faulthandler.register(signal.SIGUSR1, file=2)
        # pytest's own stdout is an object in memory.
        sys.stdout, sys.stderr = (open(number, "w", closefd=False, buffering=1) for number in (1, 2))  # noqa: SIM115
        if env is not None:
            os.environ.clear()
            os.environ.update(env)
        function()
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def wait(*processes: int) -> list[int]:
    """The exit codes of forks. Those that hang, or that wait for one that failed, write their stacks and are killed."""
    codes, deadline = dict.fromkeys(processes, 0), time.monotonic() + patience
    running, ends = {os.pidfd_open(process): process for process in processes}, select.poll()
    for descriptor in running:
        ends.register(descriptor, select.POLLIN)

    def end(send: Callable[[int, int], None], number: int) -> None:
        for process in running.values():
            with suppress(ProcessLookupError):
                send(process, number)

    def reap(descriptor: int) -> int:
        process = running.pop(descriptor)
        ends.unregister(descriptor)
        os.close(descriptor)
        codes[process] = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
        return codes[process]

    try:
        while running:
            ended = ends.poll(1000 * max(0.0, deadline - time.monotonic()))
            if not ended:
                end(os.kill, signal.SIGUSR1)
                time.sleep(1)  # for the stacks
                break
            if any([reap(descriptor) for descriptor, _ in ended]):
                deadline = min(deadline, time.monotonic() + 20)
    finally:
        end(os.killpg, signal.SIGKILL)
        for descriptor in list(running):
            reap(descriptor)
    return list(codes.values())


def as_script(arguments: Sequence[str]) -> Callable[[], object]:
    """What `python ARGUMENTS` does: a script or `-c CODE`. Python processes that it runs are forks, too."""

    def script():
        subprocess.run = run
        if arguments[0] == "-c":
            sys.argv = ["-c", *arguments[2:]]
            exec(compile(arguments[1], "<string>", "exec"), {"__name__": "__main__"})
        else:
            sys.argv = list(arguments)
            sys.path.insert(0, str(Path(arguments[0]).resolve().parent))
            runpy.run_path(arguments[0], run_name="__main__")

    return script


def run(command: Sequence[str], **settings) -> subprocess.CompletedProcess:
    """`subprocess.run(command, text=True, capture_output=True)` of a Python script, in a fork."""
    if command[0] != sys.executable:
        return real_run(command, **settings)
    with tempfile.TemporaryDirectory() as folder:
        texts = [Path(folder) / name for name in ("stdout", "stderr")]
        process = fork(as_script([str(argument) for argument in command[1:]]), *texts, env=settings.get("env"))
        (code,) = wait(process)
        output, errors = (path.read_text(encoding="utf-8", errors="replace") for path in texts)
    if not settings.get("capture_output"):
        print(output)
        print(errors, file=sys.stderr)
    if code and settings.get("check"):
        raise subprocess.CalledProcessError(code, command, output, errors)
    return subprocess.CompletedProcess(command, code, output, errors)


class Fresh:
    """A process that has imported torch and torchvision, which take most of a start, and neither transformers nor us.

    Its forks start as a new interpreter does, and sooner.
    """

    def __init__(self):
        self.process: subprocess.Popen | None = None

    def run(self, command: Sequence[str], env: Mapping[str, str] | None = None) -> subprocess.CompletedProcess:
        """`subprocess.run([sys.executable, *command])`, with its output as text."""
        if self.process is None:
            code = f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r}); import forks; forks.serve()"
            self.process = subprocess.Popen(
                [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
            )
        with tempfile.TemporaryDirectory() as folder:
            texts = [f"{folder}/stdout", f"{folder}/stderr"]
            request = [list(command), os.getcwd(), *texts, {**os.environ, **(env or {})}]
            print(json.dumps(request), file=self.process.stdin, flush=True)
            try:
                code = int(self.process.stdout.readline())
            except BaseException:  # the answer would be taken for that of the next request
                self.process.send_signal(signal.SIGINT)  # it ends its fork
                self.process = None
                raise
            output, errors = (Path(text).read_text(encoding="utf-8", errors="replace") for text in texts)
        return subprocess.CompletedProcess(command, code, output, errors)

    def end(self) -> None:
        if self.process is not None:
            self.process.stdin.close()
            self.process.wait()


def serve() -> None:
    """What the process of [`Fresh`] does: a fork for each line that it reads."""
    import torch  # noqa: F401
    import torchvision  # noqa: F401

    for line in sys.stdin:
        command, folder, output, errors, env = json.loads(line)
        os.chdir(folder)
        print(*wait(fork(as_script(command), output, errors, env)), flush=True)


FRESH = Fresh()  # one for all tests of a process
atexit.register(FRESH.end)


def call_fresh(function: Callable[..., object], *arguments: str) -> None:
    """Calls a module's function with texts in a fork of [`Fresh`]; if it fails, an AssertionError with its output.

    For what itself forks and trains there: autograd can't be used in a fork of a process that has threads of it.
    """
    module = sys.modules[function.__module__]
    paths = [str(Path(__file__).parent), str(Path(module.__file__).parent)]
    code = f"import sys; sys.path[:0] = {paths!r}; import {module.__name__} as m; m.{function.__name__}(*sys.argv[1:])"
    done = FRESH.run(["-c", code, *arguments])
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]


def fork_ranks(function: Callable[[], object], folder: Path, number: int = 2) -> None:
    """Calls a function on each rank of a group, as torchrun does; if one fails, an AssertionError with their output."""

    def rank(index: int) -> Callable[[], object]:
        def run():
            import torch.distributed as dist
            from accelerate.state import AcceleratorState

            AcceleratorState._reset_state(reset_partial_state=True)  # this process was alone until now
            dist.init_process_group("gloo", f"file://{folder}/store", world_size=number, rank=index)
            function()
            dist.barrier()  # nobody may take the group away from another

        ranks = {"RANK": index, "LOCAL_RANK": index, "WORLD_SIZE": number, "LOCAL_WORLD_SIZE": number}
        places = {**ranks, "MASTER_ADDR": "localhost", "MASTER_PORT": 0}
        return lambda: (os.environ.update({name: str(value) for name, value in places.items()}), run())

    logs = [Path(folder) / f"rank{index}.log" for index in range(number)]
    processes = [fork(rank(index), log) for index, log in enumerate(logs)]
    assert not any(wait(*processes)), "\n".join(log.read_text(errors="replace")[-3000:] for log in logs)


def limit_memory(extra: int) -> None:
    """This process may take so many bytes more than it has now."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * resource.getpagesize() + extra
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
