"""Problems made by reasoning-gym tasks.

Several tasks iterate over sets or use Python's global random state, so their problems depend on the hash seed of the
interpreter: two processes of one run, or a run and its resumption, would train on different data. Generation therefore
runs in a process of its own with a fixed hash seed (`python -m rlbal.prompts.generate`: a request as JSON on standard
input, one problem per line on standard output).
"""

import contextlib
import dataclasses
import hashlib
import json
import os
import random
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rlbal.errors import DataError, nearest

# Options of every task that the recipe sets elsewhere.
SET_ELSEWHERE = {"size": "data.size", "seed": "seed"}


def generate_problems(task: str, config: dict[str, Any], size: int, seed: int) -> list[dict[str, Any]]:
    """Generate problems in a separate process; the same arguments give the same problems in every process.

    Returns:
        `size` dicts with `question` (str), `answer` (str, or None where a task has no single gold answer) and
        `metadata` (dict, as JSON leaves it: tuples are lists, keys are strings).

    Raises:
        DataError: unknown task or option, values the task refuses, or a task that fails or dies.
    """
    from datasets.utils.tqdm import tqdm

    request = {"task": task, "config": config, "size": size, "seed": seed}
    package_root = str(Path(__file__).parents[2])
    search_path = os.pathsep.join(filter(None, [package_root, os.environ.get("PYTHONPATH")]))
    problems = []
    with subprocess.Popen(
        [sys.executable, "-P", "-W", "ignore", "-m", "rlbal.prompts.generate"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONHASHSEED": "0", "PYTHONPATH": search_path},
        encoding="utf-8",
    ) as process:
        assert process.stdin is not None and process.stdout is not None
        try:
            with contextlib.suppress(BrokenPipeError), process.stdin:  # if it died already, there is no output either
                process.stdin.write(json.dumps(request, default=str))
            quiet = os.environ.get("RANK", "0") != "0" or None  # None: no bar unless a terminal is watching
            for line in tqdm(process.stdout, f"{task} problems", size, delay=2, disable=quiet):
                if not line.endswith("\n"):
                    break  # it died while writing
                problem = json.loads(line)
                if "error" in problem:
                    raise DataError(*problem["error"])
                problems.append(problem)
        finally:
            process.kill()
    if len(problems) < size:
        raise DataError(
            f"reasoning-gym task `{task}` died after {len(problems)} of {size} problems",
            why=f"its process ended with exit code {process.returncode}",
        )
    return problems


def make_problems(task: str, config: dict[str, Any], size: int, seed: int) -> Iterator[dict[str, Any]]:
    """Make problems one by one in this process; see `generate_problems` for fields and errors."""
    # Tasks draw problem i from the seed plus i: neighbouring recipe seeds would share nearly all their problems.
    start = int(hashlib.sha256(f"reasoning_gym {seed}".encode()).hexdigest()[:8], 16) % 2**31
    dataset = _build(task, config, size, start)
    for index in range(size):
        random.seed(start + index)  # for tasks that use the global generator
        try:
            entry = dataset[index]
            answer = entry["answer"]
            problem = {
                "question": str(entry["question"]),
                "answer": answer if answer is None else str(answer),
                "metadata": json.loads(json.dumps(entry["metadata"], default=str)),
            }
        except Exception as error:  # whatever a task may raise for options that it did not check
            what = f"reasoning-gym task `{task}` failed on problem {index + 1} of {size}"
            raise DataError(what, why=_reason(error), fix="try other values in `data.config`") from None
        yield problem


def _build(task: str, config: dict[str, Any], size: int, seed: int) -> Any:
    try:
        import reasoning_gym
        from reasoning_gym.factory import DATASETS
    except ImportError as error:
        raise DataError("reasoning-gym cannot be imported", why=_reason(error), fix="pip install rlbal") from None
    if task not in DATASETS:
        raise DataError(f"`data.task: {task}` is not a reasoning-gym task", fix=nearest(task, DATASETS))
    _check_options(config, DATASETS[task][1], task, "data.config")
    options = {**config, "datasets": _parts(config.get("datasets"))} if task == "composite" else config
    try:
        return reasoning_gym.create_dataset(task, **options, size=size, seed=seed)
    except Exception as error:  # tasks check their options with assert, or not at all
        what = f"reasoning-gym task `{task}` refuses the options under `data.config`"
        raise DataError(what, why=_reason(error)) from None


def _parts(specs: Any) -> list[Any]:
    """The tasks of a composite, each `{name, weight, config}`."""
    from reasoning_gym.composite import DatasetSpec
    from reasoning_gym.factory import DATASETS

    fix = "list the tasks as `{name: chain_sum, weight: 1, config: {}}`"
    if not isinstance(specs, list) or not specs:
        raise DataError("task `composite` needs `data.config.datasets`, a list of tasks", fix=fix)
    parts = []
    for number, spec in enumerate(specs):
        key = f"data.config.datasets.{number}"
        if not isinstance(spec, dict) or not isinstance(spec.get("name"), str):
            raise DataError(f"`{key}` names no task", fix=fix)
        for option in spec:
            if option not in ("name", "weight", "config"):
                raise DataError(f"`{key}.{option}` is unknown", fix=nearest(option, ["name", "weight", "config"]))
        name, config = spec["name"], spec.get("config") or {}
        tasks = [task for task in DATASETS if task != "composite"]
        if name not in tasks:
            raise DataError(f"`{key}.name: {name}` is not a task to compose", fix=nearest(name, tasks))
        _check_options(config, DATASETS[name][1], name, f"{key}.config")
        parts.append(DatasetSpec(name=name, weight=spec.get("weight", 1.0), config=config))
    return parts


def _check_options(config: Any, config_class: Any, task: str, key: str) -> None:
    if not isinstance(config, dict):
        raise DataError(f"`{key}` is not a mapping of options")
    known = {field.name for field in dataclasses.fields(config_class)} - set(SET_ELSEWHERE)
    for option in config:
        if option in SET_ELSEWHERE:
            raise DataError(f"`{key}.{option}`: the recipe sets this", fix=f"use the key `{SET_ELSEWHERE[option]}`")
        if option not in known:
            raise DataError(f"`{key}.{option}` is not an option of task `{task}`", fix=nearest(str(option), known))


def _reason(error: Exception) -> str:
    return f"{type(error).__name__}: {error}" if str(error) else type(error).__name__


def main() -> None:
    """Answer one request on standard input; tasks that print do so on standard error."""
    output, sys.stdout = sys.stdout, sys.stderr
    request = json.load(sys.stdin)
    try:
        for problem in make_problems(**request):
            output.write(json.dumps(problem) + "\n")
    except DataError as error:
        output.write(json.dumps({"error": [error.what, error.why, error.fix]}) + "\n")
    except (KeyboardInterrupt, BrokenPipeError):
        os._exit(130)  # whoever asked is gone; leave without a traceback


if __name__ == "__main__":
    main()
