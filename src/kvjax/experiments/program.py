"""What every program shares: flags, one clear line for bad input, and result files that survive a kill."""

from __future__ import annotations

import contextlib
import functools
import logging
import re
import runpy
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

import absl.logging
from absl import app, flags
from ml_collections import config_dict, config_flags

import kvjax
from kvjax import Model, hosts
from kvjax.caches.registry import load_plugins
from kvjax.checks import check_path
from kvjax.errors import KvjaxError
from kvjax.evaluate.text import check_unseen
from kvjax.experiments.compilation import keep_programs
from kvjax.files import brief

PACKAGE = Path(__file__).parents[1]
HELP = "The study's config."
_WORKDIR = flags.DEFINE_string("workdir", None, "Folder for results and partial work.")
_COMPILE_CACHE = flags.DEFINE_bool(
    "compile_cache", True, "Keeps compiled programs in $KVJAX_CACHE for the next start."
)
_DISTRIBUTED = flags.DEFINE_bool("distributed", False, "Joins processes that TPU, Slurm or Open MPI started.")
_COORDINATOR = flags.DEFINE_string("coordinator", None, "Joins processes started by hand: host:port of process 0.")
_PROCESSES = flags.DEFINE_integer("processes", None, "How many processes there are, with --coordinator.")
_PROCESS_ID = flags.DEFINE_integer("process_id", None, "The number of this process, from 0, with --coordinator.")


def run(main: Callable[[config_dict.ConfigDict, Path], None], config_file: str) -> None:
    """Parses --config and --workdir and runs `main(config, workdir)`, which appends to result files in workdir.

    Bad input (an unknown flag, field or value, or a KvjaxError) prints one line and exits with 2.
    """

    def needs_folder(config: config_dict.ConfigDict, workdir: Path | None) -> None:
        if workdir is None:
            raise KvjaxError("no --workdir; expected a folder for results")
        main(config, workdir)

    run_anywhere(needs_folder, config_file)


def run_anywhere(main: Callable[[config_dict.ConfigDict, Path | None], None], config_file: str) -> None:
    """`run` for a program that may go without a workdir."""

    def started(config: config_dict.ConfigDict, workdir: Path | None) -> None:
        if _COMPILE_CACHE.value:
            keep_programs()
        with hosts.quiet():
            main(config, workdir)

    def guarded(_: list[str]) -> None:
        _hush()
        hosts.end_on_sigterm()
        try:
            with _processes():
                answer(started, flags.FLAGS.config, _WORKDIR.value)
        except KvjaxError as error:  # they cannot be joined
            _fail(str(error))

    app.run(guarded, flags_parser=functools.partial(parse, PACKAGE / config_file))


def _processes() -> contextlib.AbstractContextManager[None]:
    """The run as one of several processes, where flags say so."""
    address = _COORDINATOR.value, _PROCESSES.value, _PROCESS_ID.value
    if not _DISTRIBUTED.value and address == (None, None, None):
        return contextlib.nullcontext()
    return hosts.joined(*address)


def answer(
    main: Callable[[config_dict.ConfigDict, Path | None], None], config: config_dict.ConfigDict, folder: str | None
) -> None:
    """Runs a program: bad input prints one line and exits with 2, an interrupt with 130, SIGTERM with 143.

    Where another process is lost it prints one line and exits with 1.

    Args:
      main: the program.
      config: its config.
      folder: for results; made where it is missing.
    """
    try:
        workdir = check_path("workdir", folder) if folder else None
        if workdir is not None:
            hosts.on_first(lambda: _make_folder(workdir))
        load_plugins(config.get("plugins", ""))  # before anything names a cache
        main(config, workdir)
    except KvjaxError as error:
        _fail(str(error))
    except OSError as error:
        _fail(": ".join(str(part) for part in (error.filename, error.strerror or error) if part))
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
    except hosts.Terminated:
        sys.exit(hosts.TERMINATED)
    except Exception as error:  # jax raises several kinds
        if not hosts.tells_of_loss(error):
            raise
        print(f"another process is lost ({brief(error)}); started again, all go on where they were", file=sys.stderr)
        sys.exit(1)


def load(config: config_dict.ConfigDict, judged: str = "") -> Model:
    """The model that a program's config names, calibrated where it names a text for that.

    Args:
      config: the config.
      judged: names of texts that figures are stated for.

    Raises:
      KvjaxError: a text is both calibrated on and judged; what `kvjax.load` and `kvjax.calibrated` raise.
    """
    if judged and config.calibration:
        check_unseen(judged, config.calibration)
    model = kvjax.load(config.model, config.dtype, mesh=config.mesh, replicate=config.replicate)
    return kvjax.calibrated(model, config.calibration) if config.calibration else model


def parse(config_file: Path, argv: list[str], values: flags.FlagValues = flags.FLAGS) -> list[str]:
    """Defines and parses the flags, so that all that is wrong with them is said here: one line, and exit 2.

    Args:
      config_file: the program's config.
      argv: the program's name and its arguments.
      values: where the flags are defined.

    Returns:
      The program's name.
    """
    fields = list(runpy.run_path(str(config_file))["get_config"]().keys())
    expected = f"this program's fields are {', '.join(fields)}"
    for argument in argv[1:]:
        match = re.match(r"--?(?:no)?config\.([^=]*)", argument)
        if match and match[1] not in fields:
            _fail(f"unknown config field {match[1]!r}; {expected}")
    try:
        config_flags.DEFINE_config_file("config", str(config_file), HELP, values, lock_config=True, sys_argv=argv)
        rest = values(argv)
        fits = all(field in values.config for field in fields)
    except (KeyError, AttributeError):
        fits = False
    except (flags.Error, TypeError, ValueError, OSError, SyntaxError) as error:
        _fail(" ".join(str(error).split()))
    if not fits:
        _fail(f"--config is the config of another program; {expected}")
    if len(rest) > 1:
        _fail(f"unexpected argument {rest[1]!r}; fields are set as --config.field=value")
    return rest


def _hush() -> None:
    """What Orbax raises, its loggers, its event loop and its storage's threads also tell in pages."""
    absl.logging.set_verbosity(absl.logging.FATAL)
    logging.getLogger("asyncio").setLevel(logging.CRITICAL)
    sys.unraisablehook = lambda _: None


def _make_folder(folder: Path) -> None:
    if folder.exists() and not folder.is_dir():
        raise KvjaxError(f"{folder} is a file; expected a folder for results")
    folder.mkdir(parents=True, exist_ok=True)


def _fail(message: str) -> NoReturn:
    print(f"error: {message}", file=sys.stderr)
    sys.exit(2)
