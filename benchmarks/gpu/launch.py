"""One process a row, so that the two frameworks never share the device's memory, and a row's peak is its own."""

import json
import os
import subprocess
from pathlib import Path
from typing import Any

from benchmarks.gpu.plan import Row
from benchmarks.gpu.shapes import SIZES

ROOT = Path(__file__).resolve().parents[2]


class Launcher:
    """Starts jobs and waits for them.

    Args: folder: for jobs, answers and logs; cache: of compiled programs; pythons: interpreter by framework.
    """

    def __init__(self, size: str, folder: Path, cache: Path, pythons: dict[str, str]):
        self.size, self.folder, self.cache, self.pythons, self.count = size, folder, cache, pythons, 0
        self.backend = ""

    def row(self, row: Row, rows: int, memory: str, seconds: float, limit: float) -> dict[str, Any]:
        """Runs a row with `rows` of it in a microbatch, timing for `seconds`, for at most `limit` in all."""
        job = {"kind": row.kind, "model": row.model, "length": row.length, "rows": rows, "memory": memory, "seconds": seconds, "weights": row.weights}
        return self.job(row.framework, job, limit)

    def job(self, framework: str, job: dict[str, Any], limit: float) -> dict[str, Any]:
        """The answer: its status is done, missing, no memory, no time or failed."""
        self.count += 1
        place = self.folder / str(self.count)
        out = place.with_suffix(".out.json")
        job = {"size": self.size, "cache": str(self.cache), "backend": self.backend, "out": str(out)} | self.shape(job) | job
        place.with_suffix(".json").write_text(json.dumps(job))
        log = place.with_suffix(".log")
        module = {"qtjax": "benchmarks.gpu.ours", "torch": "benchmarks.gpu.peer"}[framework]
        try:
            with log.open("wb") as spoken:
                done = subprocess.run(
                    [self.pythons[framework], "-m", module, str(place.with_suffix(".json"))], cwd=ROOT, env=environment(),
                    stdin=subprocess.DEVNULL, stdout=spoken, stderr=subprocess.STDOUT, timeout=max(limit, 0), check=False,
                )  # fmt: skip
        except subprocess.TimeoutExpired:
            return {"status": "no time", "said": f"stopped after {limit:.0f} s"}
        except OSError as error:
            return {"status": "failed", "said": f"{self.pythons[framework]}: {error.strerror}"}
        if out.exists():
            return json.loads(out.read_text())
        said = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
        return {"status": "failed", "said": f"exit status {done.returncode}: {said[-1][:200] if said else 'nothing was said'}", "log": said[-40:]}

    def shape(self, job: dict[str, Any]) -> dict[str, Any]:
        """The model as transformers calls it, for an interpreter that cannot look it up."""
        if "model" not in job:
            return {}
        size = SIZES[self.size]
        return {"hf": size.models[job["model"]].to_hf(), "tokens": size.tokens, "rank": size.rank}


def environment() -> dict[str, str]:
    """This process's, with nearly all of the device's memory for whoever runs, and this checkout's code first."""
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    defaults = {
        "XLA_PYTHON_CLIENT_MEM_FRACTION": "0.92", "PYTORCH_ALLOC_CONF": "expandable_segments:True", "TF_CPP_MIN_LOG_LEVEL": "2",
        "JAX_TRACEBACK_FILTERING": "off", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false",
    }  # fmt: skip
    return defaults | os.environ | {"PYTHONPATH": path, "PYTHONUNBUFFERED": "1"}
