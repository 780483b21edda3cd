"""Run chapters side by side in a folder of the command's own, and run none whose inputs are those of a run on disk.

A run is filed under a hash of what it depends on: code cells, parameters, the package with its weights, the versions
installed and the data; beside it lie the records it wrote. Records of others that it may have read are compared
again before it is used. A run is put there whole when its chapter ends, so a kill loses the chapters in flight alone;
and of these, what their studies had measured lies beside it until they end.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import shutil
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from contextlib import contextmanager
from functools import partial
from importlib.metadata import distributions
from pathlib import Path
from typing import Any

from notebook_files import KERNEL, BookError, Notebook, cleaned, read, tagged, write

import embedlens
from embedlens.model_names import MINIATURE

PACKAGE = Path(embedlens.__file__).resolve().parent
MARK, MARKED = ".embedlens-book", "Made by `embedlens book`, which may replace and delete what lies in this folder.\n"
NOT_OURS = ("src", "training", "tests", "LICENSES", ".ci", ".git", ".venv")  # beside the sources of the book
CELL_TIMEOUT = 3600  # seconds for one cell
CHAPTER_MEMORY = 2 << 30  # bytes that a chapter on the miniature needs at most
ROWS = "EMBEDLENS_ROWS"  # names the folder in which `embedlens.run` keeps what it measured, see there
KEPT = 3  # runs of each chapter, of other parameters or sources


class ChapterFailed(BookError):
    """A cell of a chapter raises, or its kernel ends; the message names it."""

    exit_code = 1


# ---------------------------------------------------------------------------------------------------------------------
# The folder of the command


@contextmanager
def owned(root: Path, out: Path | str, sources: Iterable[str]) -> Iterator[Path]:
    """The folder `out`, made and marked by this command and, meanwhile, this process's alone.

    Raises:
        BookError: if it holds files of another hand, overlaps the checkout's own, is in use, or the disk refuses; and
            in place of Ctrl-C.
    """
    from filelock import FileLock, Timeout  # comes with torch

    folder = (root / Path(out).expanduser()).resolve()
    own = [*(root / name for name in (*sources, *NOT_OURS)), PACKAGE]
    overlap = next((path for path in own if folder in (path, *path.parents) or path in folder.parents), None)
    if overlap:
        raise BookError(f"--out {out} would overlap {overlap}: name a folder for the book alone, such as _build")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not (folder / MARK).is_file() and {path.name for path in folder.iterdir()} - {MARK, "lock"}:
            raise BookError(
                f"{folder} holds files that this command did not make (no {MARK}): name another --out, "
                "or if it is an old build, remove it yourself (make clean)"
            )
        (folder / MARK).write_text(MARKED)
        with FileLock(folder / "lock", blocking=False):
            yield folder
    except Timeout:
        raise BookError(f"another process builds in {folder}: wait for its end, or name another --out") from None
    except KeyboardInterrupt:
        raise BookError("stopped: chapters that had ended are kept; the same command goes on from there") from None
    except OSError as error:
        raise BookError(
            f"{error.filename or folder} ({error.strerror or error}): free space there, or name a --out that can be "
            "written; chapters that had ended are kept"
        ) from error


def environment(home: Path, threads: int | None = None) -> dict[str, str]:
    """For kernels and Sphinx: no progress bars, nothing read from or written to the home folder."""
    folders = {f"JUPYTER_{kind}_DIR": str(home) for kind in ("CONFIG", "DATA", "RUNTIME")} | {"IPYTHONDIR": str(home)}
    quiet = {"TQDM_DISABLE": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1", "PYDEVD_DISABLE_FILE_VALIDATION": "1"}
    own = quiet | {"MPLCONFIGDIR": str(home)} | ({"OMP_NUM_THREADS": str(threads)} if threads else {})
    folders["MPLBACKEND"] = "module://matplotlib_inline.backend_inline"  # with another there would be no figures
    return {**own, **os.environ, **folders}


# ---------------------------------------------------------------------------------------------------------------------
# What a run depends on


def digest(paths: Iterable[Path], *more: Any) -> str:
    """Of files' names and contents, and of whatever else can be printed."""
    total = hashlib.sha256(repr(more).encode())
    for path in sorted(paths):
        if path.is_file() and "__pycache__" not in path.parts:
            total.update(f"\0{path.name}\0{path.stat().st_size}\0".encode() + path.read_bytes())
    return total.hexdigest()


def installed() -> str:
    """Digest of the package, its weights, and the version of everything installed."""
    versions = sorted({(str(found.metadata["Name"]), found.version) for found in distributions()})
    return digest(PACKAGE.rglob("*"), sys.version, versions)


def inputs(source: Path, page: Path, values: Mapping[str, Any], package: str) -> str:
    """What a run of `page` depends on but for records: a hash. Prose and outputs do not count."""
    cells = [cell for cell in read(source / page)["cells"] if cell["cell_type"] == "code"]
    code = [(cell["source"], "parameters" in cell["metadata"].get("tags", [])) for cell in cells]
    named = [folder for folder in source.iterdir() if any(f"../{folder.name}/" in text for text, _ in code)]
    files = [path for folder in named if folder.name != "results" for path in folder.rglob("*")]
    stamps = []
    for value in map(str, values.values()):  # a checkpoint's folder, coco:/data/coco/val2017: too large to be read
        place = Path(re.sub(r"^\w+:(?=[/~.])", "", value)).expanduser()
        found = [place, *(place.rglob("*") if place.is_dir() else ())] if "/" in value and place.exists() else []
        stamps += [(str(path), path.stat().st_size, path.stat().st_mtime_ns) for path in sorted(found)]
    return digest(files, code, sorted(values.items(), key=str), stamps, package)


def reads_all_records(source: Path, page: Path) -> bool:
    """Whether a chapter has a parameter `results`, the folder of all records, and so has to wait for the others."""
    return any(re.search(r"^results\b", cell["source"], re.M) for cell in tagged(read(source / page), "parameters"))


def records(source: Path, page: Path, everyones: bool = False) -> list[Path]:
    """The records of a chapter, of any model and parameters; or of all chapters."""
    return sorted((source / "results").glob("*/*.json" if everyones else f"*/{page.stem}*.json"))


# ---------------------------------------------------------------------------------------------------------------------
# Running


def run_all(
    source: Path,
    folder: Path,
    chosen: Mapping[Path, Mapping[str, Any]],
    say: Callable[[str], object],
    jobs: int | None = None,
) -> dict[Path, Path]:
    """Run the chapters that no run on disk stands for; records end up in `source/results`.

    Args:
        source: the staged book. folder: what is `owned`. chosen: values of parameters by page.
        jobs: chapters at a time; None: as cores and memory allow, one where any is to use a GPU.

    Returns:
        the run notebook of each page.

    Raises:
        ChapterFailed: after all others have ended, naming every chapter that failed.
    """
    package = installed()
    filed = {page: inputs(source, page, values, package)[:16] for page, values in chosen.items()}
    places = {page: folder / "runs" / page.stem / name for page, name in filed.items()}
    last = [page for page in chosen if reads_all_records(source, page)]
    failed: list[str] = []
    for group in ([page for page in chosen if page not in last], last):
        stale = [page for page in group if not _restored(source, page, places[page], page in last)]
        if stale and not failed:
            failed += _side_by_side(source, folder, stale, chosen, places, last, say, jobs)
    if failed:
        raise ChapterFailed("\n".join([*failed, "the other chapters are kept, and the pages stay as they were"]))
    return {page: place / "notebook.ipynb" for page, place in places.items()}


class Flight:
    """The chapters that run now: their kernels, and the cell that each is at."""

    def __init__(self) -> None:
        self.kernels: dict[Path, Any] = {}
        self.at: dict[Path, str] = {}
        self.stopped = False

    def stop(self) -> None:
        """End every kernel; one that is still starting ends before its first cell."""
        self.stopped = True
        for kernel in list(self.kernels.values()):
            if kernel.has_kernel:
                kernel.provisioner.process.kill()


def _restored(source: Path, page: Path, place: Path, everyones: bool) -> bool:
    """Whether the run at `place` is still good; if so its records are copied to `source`."""
    try:
        told = json.loads((place / "run.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    others = [path for path in records(source, page, everyones) if str(path.relative_to(source)) not in told["writes"]]
    if told["reads"] != digest(others):
        return False
    _copy(told["writes"], place, source)
    return True


def _copy(names: Iterable[str], source: Path, target: Path) -> None:
    for name in names:
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(source / name, target / name)


def _side_by_side(
    source: Path,
    folder: Path,
    stale: Sequence[Path],
    chosen: Mapping[Path, Mapping[str, Any]],
    places: Mapping[Path, Path],
    last: Sequence[Path],
    say: Callable[[str], object],
    jobs: int | None,
) -> list[str]:
    """Run chapters, those that took longest before first; gives what failed, a text each."""
    jobs, threads = shares([chosen[page] for page in stale], jobs)
    env = environment(folder / "home", threads)
    flight = Flight()
    terminal = sys.stdout.isatty()

    def tell(line: str) -> None:
        print("\r\033[K" if terminal else "", end="", flush=True)
        say(line)

    def work(page: Path) -> None:
        tell(f"running {page}")
        begun = time.monotonic()
        if not chosen[page]:  # its own parameters: no record of another run is to stand in the way
            (source / "results" / MINIATURE / f"{page.stem}.json").unlink(missing_ok=True)
        before = {path: path.stat().st_mtime_ns for path in records(source, page)}
        place = places[page]
        place.parent.mkdir(parents=True, exist_ok=True)
        rows = {ROWS: str(place.with_name(f"{place.name}.rows"))}  # its studies go on from there after a kill
        notebook = _run(source / page, chosen[page], {**env, **rows}, place.parent / "failed.ipynb", page, flight)
        wrote = [path for path in records(source, page) if before.get(path) != path.stat().st_mtime_ns]
        others = [path for path in records(source, page, page in last) if path not in wrote]
        seconds = time.monotonic() - begun
        _keep(notebook, source, place, wrote, {"reads": digest(others), "seconds": round(seconds, 1)})
        for old in place.parent.glob("*.rows"):
            shutil.rmtree(old, ignore_errors=True)
        tell(f"ran {page} in {seconds:.0f} s")

    def cost(page: Path) -> tuple[float, int]:
        before = [json.loads(path.read_text())["seconds"] for path in places[page].parent.glob("*/run.json")]
        return max(before, default=float("inf")), (source / page).stat().st_size

    failed = []
    with ThreadPoolExecutor(jobs) as pool:
        pending = {pool.submit(work, page) for page in sorted(stale, key=cost, reverse=True)}
        try:
            while pending:
                done, pending = wait(pending, 1 if terminal else 60, FIRST_COMPLETED)
                for error in filter(None, (future.exception() for future in done)):
                    if not isinstance(error, BookError):
                        raise error
                    failed.append(str(error))
                    tell(str(error).splitlines()[0])
                if pending and (terminal or not done):
                    status = ", ".join(f"{page.stem} {at}" for page, at in list(flight.at.items()))
                    print(f"\r\033[K{status}", end="", flush=True) if terminal else say(status)
        except BaseException:  # Ctrl-C, a full disk: no kernel stays behind, and no thread begins another chapter
            pool.shutdown(wait=False, cancel_futures=True)
            flight.stop()
            raise
    return failed


def _run(
    path: Path,
    values: Mapping[str, Any],
    env: Mapping[str, str],
    half_run: Path,
    page: Path,
    flight: Flight,
) -> Notebook:
    """Run one notebook by papermill in its own folder, in a kernel of this very Python, whatever home folders name."""
    from jupyter_client.kernelspec import KernelSpecManager
    from jupyter_client.manager import AsyncKernelManager
    from nbclient.exceptions import CellTimeoutError, DeadKernelError
    from papermill import PapermillExecutionError, execute_notebook

    number, cells = 0, len(read(path)["cells"]) + bool(values)

    def started(cell: Notebook, cell_index: int) -> None:
        nonlocal number
        number = cell_index
        if flight.stopped:
            raise ChapterFailed(f"{page}: stopped before cell {cell_index}")
        flight.at[page] = f"cell {cell_index} of {cells}"

    home = Path(env["IPYTHONDIR"])
    home.mkdir(exist_ok=True)
    for name in ("papermill", "embedlens.kernel"):
        logging.getLogger(name).setLevel(logging.CRITICAL + 1)
    kernel = flight.kernels[page] = AsyncKernelManager(
        kernel_name=KERNEL["name"],
        kernel_spec_manager=KernelSpecManager(kernel_dirs=[]),
        connection_file=str(home / f"{page.stem}.json"),
        log=logging.getLogger("embedlens.kernel"),
    )
    kernel.start_kernel = partial(kernel.start_kernel, env=dict(env))  # type: ignore[method-assign]
    try:
        execute_notebook(
            _literal(path),
            _literal(half_run),
            parameters=dict(values),
            kernel_name=KERNEL["name"],
            language="python",
            progress_bar=False,
            execution_timeout=CELL_TIMEOUT,
            start_timeout=120,
            km=kernel,
            extra_arguments=["--IPKernelApp.log_level=40"],  # no warning that it listens on TCP ports of this machine
            resources={"metadata": {"path": str(path.parent)}},  # papermill's own cwd would be that of all threads
            on_cell_start=started,
        )
    except PapermillExecutionError as error:
        raised = f"raises {error.ename}: {str(error.evalue)[:500]}"
        traceback = re.sub(r"\x1b\[[0-9;]*m", "", "\n".join(error.traceback))
        line = re.search(r"^-+> *(\d+) (.*)$", traceback, re.M)
        where = f", line {line[1]}, `{line[2].strip()}`," if line else ""
        said = "\n".join([f"cell {number}{where} {raised}", *(f"    {row}" for row in traceback.splitlines()[-12:])])
    except CellTimeoutError:
        said = f"cell {number} runs for more than {CELL_TIMEOUT} s: ask for less with -p, or mend the cell"
    except DeadKernelError:
        said = f"its kernel was killed in cell {number}; if memory ran out, pass --jobs 1 or ask for less with -p"
    except (RuntimeError, TimeoutError) as error:
        said = f"its kernel does not answer ({str(error)[:200]}): repeat the command with --jobs 1"
    else:
        return cleaned(read(half_run))
    finally:
        del flight.kernels[page]
        flight.at.pop(page, None)
    first, *rest = said.splitlines()
    raise ChapterFailed("\n".join([f"{page}: {first} (run so far: {half_run})", *rest]))


def _literal(path: Path) -> str:
    """As papermill takes it, which reads braces in a path as names of parameters."""
    return str(path).replace("{", "{{").replace("}", "}}")


def _keep(notebook: Notebook, source: Path, place: Path, wrote: Sequence[Path], told: dict[str, Any]) -> None:
    """File a run and its records under `place`, whole or not at all."""
    new = place.with_name(f"{place.name}.new")
    shutil.rmtree(new, ignore_errors=True)
    new.mkdir()
    write(notebook, new / "notebook.ipynb")
    names = [str(path.relative_to(source)) for path in wrote]
    _copy(names, source, new)
    (new / "run.json").write_text(json.dumps({**told, "writes": names}), encoding="utf-8")
    shutil.rmtree(place, ignore_errors=True)
    new.rename(place)
    (place.parent / "failed.ipynb").unlink(missing_ok=True)
    runs = sorted((path.stat().st_mtime, path.parent) for path in place.parent.glob("*/run.json"))
    for _, old in runs[:-KEPT]:
        shutil.rmtree(old, ignore_errors=True)


def shares(chosen: Sequence[Mapping[str, Any]], asked: int | None = None) -> tuple[int, int]:
    """How many of these chapters run at a time, and the threads of each: what is `asked`, else as the machine allows.

    Args:
        chosen: the parameters of each chapter; where one names another device than the CPU, they take turns on it.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    on_gpu = any(str(values.get("device", "cpu")) != "cpu" for values in chosen)
    jobs = asked or (1 if on_gpu else max(1, min(cores, _free_memory() // CHAPTER_MEMORY)))
    return min(jobs, len(chosen)), max(1, cores // min(jobs, len(chosen)))


def _free_memory() -> int:
    from psutil import virtual_memory  # comes with accelerate

    return virtual_memory().available
