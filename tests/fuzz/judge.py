"""Makes a call through a door and judges what came of it."""

import faulthandler
import resource
import signal
import traceback
from pathlib import Path
from typing import Any, NamedTuple

from doors import Bad, Door, World
from hypothesis import HealthCheck, Phase

OURS = (str(Path("src") / "transformers_nextflow"), str(Path("src") / "diffusers_nextflow"))
MEMORY_LIMIT = 300 * 2**20
CPU_SECONDS = 20
# Of hypothesis: cases are made, never shrunk or stored, and may take their time.
GENERATE: dict[str, Any] = {
    "deadline": None,
    "database": None,
    "phases": [Phase.generate],
    "suppress_health_check": list(HealthCheck),
}
GRAVE = ("hang", "memory", "wrong result", "accepted")


class Finding(NamedTuple):
    """What is wrong with a call: its kind, what tells it from others, and the case."""

    kind: str
    what: str
    case: str


class Hang(BaseException):
    pass


def _hang(*_):
    raise Hang


def judge(door: Door, world: World, case: dict[str, Any], wall_seconds: float = 300) -> Finding | None:
    """None if the call returned something sane, or raised a ValueError, TypeError or OSError that is clear."""
    peak = _peak()
    signal.signal(signal.SIGPROF, _hang)
    signal.setitimer(signal.ITIMER_PROF, CPU_SECONDS)
    faulthandler.dump_traceback_later(wall_seconds, exit=True)
    try:
        result = door.call(world, dict(case))
        signal.setitimer(signal.ITIMER_PROF, 0)
        wrong = door.look(world, case, result)
        kind, what = ("wrong result", wrong) if wrong else ("", "")
        bad = [name for name, value in case.items() if isinstance(value, Bad) and door.used(case, name)]
        if not wrong and bad:
            kind, what = "accepted", ", ".join(sorted(bad))
    except (ValueError, TypeError, OSError) as error:
        clear = _is_clear(error, door, case)
        kind, what = ("", "") if clear else ("unclear", _place(error))
    except ImportError as error:  # an optional package
        kind, what = ("", "") if "install" in str(error) else ("unclear", _place(error))
    except Hang:
        kind, what = "hang", ", ".join(sorted(case))
    except MemoryError as error:
        kind, what = "memory", _place(error)
    except Exception as error:
        memory = "allocate memory" in str(error)
        kind, what = ("memory" if memory else "unclear"), _place(error)
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        faulthandler.cancel_dump_traceback_later()
    if not kind and _peak() - peak > MEMORY_LIMIT:
        kind, what = "memory", f"{(_peak() - peak) // 2**20} MB: {', '.join(sorted(case))}"
    return Finding(kind, what, repr(case)) if kind else None


def _peak() -> int:
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def _is_clear(error: BaseException, door: Door, case: dict[str, Any]) -> bool:
    """It was raised by our code on purpose, or it names an argument, a value or a file of the case."""
    deepest = traceback.extract_tb(error.__traceback__)[-1]
    text = str(error)
    raised_here = any(ours in deepest.filename for ours in OURS) and (deepest.line or "").startswith(("raise", ")"))
    words = [word for word in (*case, *door.words) if word in text]
    values = (value.value if isinstance(value, Bad) else value for value in case.values())
    words += [value for value in values if isinstance(value, str) and value and value in text]
    return raised_here or bool(words) or "unexpected keyword argument" in text


def _place(error: BaseException) -> str:
    """Type of an error, and where it left our code."""
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if any(o in frame.filename for o in OURS)]
    last = traceback.extract_tb(error.__traceback__)[-1]
    frame = frames[-1] if frames else last
    return f"{type(error).__name__} at {Path(frame.filename).name}:{frame.name}: {str(error).splitlines()[:1]}"[:160]
