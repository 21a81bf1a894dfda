"""The interpreters of the rows: one virtual environment for all that is torch, one for Tunix, made when first needed."""

import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from qtjax.errors import QtjaxError

# torch: exactly this version. On a machine without an accelerator any other may bring gigabytes of CUDA libraries.
REQUIREMENTS = {
    "torch": ("torch==2.13.0", "transformers==5.24.0", "trl==1.16.0", "peft==0.21.2", "datasets==5.2.0", "accelerate==1.15.0"),
    "tunix": ("google-tunix==0.1.7",),
}
_DONE = "installed.txt"


def python_of(name: str, envs: str, say: Callable[[str], None]) -> str:
    """The interpreter of an environment, installed first where it is not there or has other requirements.

    Args: envs: folder of the environments; "": this interpreter for all. say: hears that an installation begins.
    Raises QtjaxError, one line, when it cannot be installed.
    """
    if name == "qtjax" or not envs:
        return sys.executable
    folder, wanted = Path(envs) / name, "\n".join(REQUIREMENTS[name]) + "\n"
    python, done = folder / "bin" / "python", folder / _DONE
    if python.exists() and done.exists() and done.read_text() == wanted:
        return str(python)
    say(f"{folder}: installing {', '.join(REQUIREMENTS[name])}")
    shutil.rmtree(folder, ignore_errors=True)
    _run(name, [sys.executable, "-m", "venv", str(folder)])
    _run(name, [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *REQUIREMENTS[name]])
    done.write_text(wanted)
    return str(python)


def _run(name: str, command: list[str]) -> None:
    try:
        done = subprocess.run(command, capture_output=True, text=True)
    except OSError as error:
        raise QtjaxError(f"--envs: {name}: {command[0]}: {error.strerror}; choose another folder") from None
    if done.returncode:
        said = [line.strip() for line in (done.stderr + done.stdout).splitlines() if line.strip()]
        reason = next((line for line in said if line.startswith("ERROR")), said[-1] if said else f"status {done.returncode}")
        remedy = "mend it: every row is checked against torch" if name == "torch" else "mend it, or leave its rows out with --rows"
        raise QtjaxError(f"--envs: {name} cannot be installed ({reason[:200]}); {remedy}")
