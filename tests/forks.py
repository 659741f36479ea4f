"""Scripts run in forks of this process: as apart as a process is, without importing torch anew for each."""

import os
import resource
import runpy
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

real_run = subprocess.run


def fork(
    function: Callable[[], object],
    output: Path | str = os.devnull,
    errors: Path | str | None = None,
    env: Mapping[str, str] | None = None,
) -> int:
    """Calls a function in a fork, whose output goes to files and which never returns; its process id.

    The fork is the first of a process group, so that it can be ended with all that it started.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    process = os.fork()
    if process:
        return process
    code = 1
    try:
        os.setpgid(0, 0)
        os.dup2(os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), 1)
        os.dup2(1 if errors is None else os.open(errors, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), 2)
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
        _, status = os.waitpid(process, 0)
        output, errors = (path.read_text(encoding="utf-8", errors="replace") for path in texts)
    code = os.waitstatus_to_exitcode(status)
    if not settings.get("capture_output"):
        print(output)
        print(errors, file=sys.stderr)
    if code and settings.get("check"):
        raise subprocess.CalledProcessError(code, command, output, errors)
    return subprocess.CompletedProcess(command, code, output, errors)


def limit_memory(extra: int) -> None:
    """This process may take so many bytes more than it has now."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * resource.getpagesize() + extra
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
