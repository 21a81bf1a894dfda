"""python -m qtjax.report RUN_FOLDER: prints the table of a run and draws its pictures again, from saved files only."""

import argparse
from pathlib import Path
from typing import NoReturn

from rich.console import Console

from qtjax.errors import QtjaxError, door
from qtjax.records.samples import read_samples
from qtjax.report.pictures import draw_run
from qtjax.report.table import summary_markdown, summary_table
from qtjax.report.totals import totals
from qtjax.training.run_folder import read_metrics, read_summary


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m qtjax.report", description=__doc__.split(": ", 1)[1])
    parser.add_argument("run_folder", help="the run.folder of a training run, finished or not")
    parser.add_argument(
        "--out", default="", metavar="FOLDER", help="where the pictures go (default: RUN_FOLDER/pictures)"
    )
    parser.add_argument("--markdown", action="store_true", help="print the table as Markdown")

    def fail(message: str) -> NoReturn:
        raise QtjaxError(f"{message}; --help lists every flag")

    parser.error = fail
    given = parser.parse_args(argv)
    folder = Path(given.run_folder)
    if not (folder / "config.json").is_file():
        raise QtjaxError(f"{folder}: not a run folder (no config.json); name the run.folder of a training run")
    metrics = read_metrics(folder)
    finished = (folder / "summary.json").exists()
    summary = read_summary(folder) if finished else {"title": f"{folder.name} (not finished)", **totals(metrics)}
    console = Console()
    if not metrics and not finished:
        console.print(f"{folder}: no step has been recorded yet", highlight=False, soft_wrap=True, markup=False)
    elif given.markdown:
        print(summary_markdown(summary), end="")
    else:
        console.print(summary_table(summary))
    title = summary.get("title") or folder.name
    for path in draw_run(read_samples(folder / "eu"), metrics, given.out or folder / "pictures", title=title):
        console.print(f"drawn: {path}", highlight=False, soft_wrap=True, markup=False)


if __name__ == "__main__":
    door(main)
