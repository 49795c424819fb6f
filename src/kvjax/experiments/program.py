"""What every program shares: flags, one clear line for bad input, and result files that survive a kill."""

from __future__ import annotations

import contextlib
import functools
import logging
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import absl.logging
from absl import app, flags
from ml_collections import config_dict, config_flags

import kvjax
from kvjax import Model, hosts
from kvjax.caches.registry import load_plugins
from kvjax.checks import check_path
from kvjax.errors import KvjaxError
from kvjax.evaluate.text import check_unseen
from kvjax.experiments import dry_run, help
from kvjax.experiments.compilation import keep_programs
from kvjax.files import brief

PACKAGE = Path(__file__).parents[1]
HELP = "The study's config."
_WORKDIR = flags.DEFINE_string("workdir", None, "Folder for results and partial work.")
_COMPILE_CACHE = flags.DEFINE_bool(
    "compile_cache", True, "Keeps compiled programs in $KVJAX_CACHE for the next start."
)
_DRY_RUN = flags.DEFINE_bool("dry_run", False, "Says what would be run, and in how many bytes; runs nothing.")
_DISTRIBUTED = flags.DEFINE_bool("distributed", False, "Joins processes that TPU, Slurm or Open MPI started.")
_COORDINATOR = flags.DEFINE_string("coordinator", None, "Joins processes started by hand: host:port of process 0.")
_PROCESSES = flags.DEFINE_integer("processes", None, "How many processes there are, with --coordinator.")
_PROCESS_ID = flags.DEFINE_integer("process_id", None, "The number of this process, from 0, with --coordinator.")


Main = Callable[[config_dict.ConfigDict, Path | None], None]


def run(
    main: Callable[[config_dict.ConfigDict, Path], None],
    config_file: str,
    sizes: Callable[[config_dict.ConfigDict], dry_run.Sizes] | None = None,
) -> None:
    """Parses --config and --workdir and runs `main(config, workdir)`, which appends to result files in workdir.

    Bad input (an unknown flag, field or value, or a KvjaxError) prints one line and exits with 2.

    Args:
      main: the program.
      config_file: its config, in the package's folder.
      sizes: what it would run, for --dry_run; that is refused where None.
    """

    def needs_folder(config: config_dict.ConfigDict, workdir: Path | None) -> None:
        if workdir is None:
            raise KvjaxError("no --workdir; expected a folder for results, as in --workdir=runs/first")
        main(config, workdir)

    run_anywhere(needs_folder, config_file, sizes)


def run_anywhere(
    main: Main, config_file: str, sizes: Callable[[config_dict.ConfigDict], dry_run.Sizes] | None = None
) -> None:
    """`run` for a program that may go without a workdir."""

    def started(config: config_dict.ConfigDict, workdir: Path | None) -> None:
        if _COMPILE_CACHE.value:
            keep_programs()
        with hosts.quiet():
            if not _DRY_RUN.value:
                main(config, workdir)
            elif sizes is None:
                raise KvjaxError("--dry_run is not for this program; expected sweep, generate, tune or evaluate")
            else:
                dry_run.show(config.model, config.dtype, config.mesh, config.replicate, sizes(config))

    def guarded(_: list[str]) -> None:
        _hush()
        hosts.end_on_sigterm()
        try:
            with _processes():
                answer(started, flags.FLAGS.config, None if _DRY_RUN.value else _WORKDIR.value)
        except KvjaxError as error:  # they cannot be joined
            _fail(str(error))

    app.run(guarded, flags_parser=functools.partial(parse, PACKAGE / config_file))


def _processes() -> contextlib.AbstractContextManager[None]:
    """The run as one of several processes, where flags say so."""
    address = _COORDINATOR.value, _PROCESSES.value, _PROCESS_ID.value
    if not _DISTRIBUTED.value and address == (None, None, None):
        return contextlib.nullcontext()
    return hosts.joined(*address)


def answer(main: Main, config: config_dict.ConfigDict, folder: str | None) -> None:
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
    """The model that a program's config names, with adapters and calibrated where it names a file and a text.

    Args:
      config: the config.
      judged: names of texts that figures are stated for.

    Raises:
      KvjaxError: a text is both calibrated on and judged; what `kvjax.load`, `kvjax.adapted` and `kvjax.calibrated`
        raise.
    """
    if judged and config.calibration:
        check_unseen(judged, config.calibration)
    model = load_plain(config)
    model = kvjax.adapted(model, config.adapters) if config.get("adapters") else model
    return kvjax.calibrated(model, config.calibration) if config.calibration else model


def load_plain(config: config_dict.ConfigDict) -> Model:
    """The model that a program's config names, as it is. Raises what `kvjax.load` raises."""
    print(f"loading {config.model}", file=sys.stderr, flush=True)
    return kvjax.load(config.model, config.dtype, mesh=config.mesh, replicate=config.replicate)


def parse(config_file: Path, argv: list[str], values: flags.FlagValues = flags.FLAGS) -> list[str]:
    """Defines and parses the flags, so that all that is wrong with them is said here: one line, and exit 2.

    Args:
      config_file: the program's config.
      argv: the program's name and its arguments; with --help among them, prints the fields and exits.
      values: where the flags are defined.

    Returns:
      The program's name.
    """
    argv = _with_named_config(argv)
    fields = list(help.fields_of(config_file))
    named = _config_of(config_file, argv)
    found = _fields_of(*named)
    if any(re.fullmatch(r"--?(h|help|helpfull|helpshort)", argument) for argument in argv[1:]):
        print(help.help_text(*named))
        sys.exit(0)
    for argument in argv[1:]:
        _check_name(argument, fields, values)
    if not found.keys() >= set(fields):
        _fail(f"--config is the config of another program; this program's fields are {', '.join(fields)}")
    try:
        config_flags.DEFINE_config_file("config", str(config_file), HELP, values, lock_config=True, sys_argv=argv)
        rest = values(argv)
    except (flags.Error, AttributeError, KeyError, TypeError, ValueError, OSError, SyntaxError) as error:
        _fail(" ".join(str(error).split()))
    if len(rest) > 1:
        _fail(f"unexpected argument {rest[1]!r}; fields are set as --config.field=value")
    return rest


def _with_named_config(argv: list[str]) -> list[str]:
    """The arguments, with a config that is named as in `xquant:gqa` or `configs/xquant.py:gqa` as a file."""
    return [_named(argument) for argument in argv]


def _named(argument: str) -> str:
    match = re.fullmatch(r"(--?config=)([^:]*)(:.*)?", argument, re.DOTALL)
    if match is None or Path(match[2]).exists():
        return argument
    stem = re.sub(r"^configs/|\.py$", "", match[2])
    file = help.CONFIGS / f"{stem}.py"
    if not re.fullmatch(r"\w+", stem) or not file.exists():
        _fail(f"{match[2]}: No such file; expected a config, or the name of one in kvjax/configs, such as xquant")
    return f"{match[1]}{file}{match[3] or ''}"


def _config_of(config_file: Path, argv: list[str]) -> tuple[Path, str]:
    """The file and the variant of the config that --config names; the program's own where nothing does."""
    named = [argument.split("=", 1)[1] for argument in argv if re.match(r"--?config=", argument)]
    file, _, variant = (named or [str(config_file)])[-1].partition(":")
    return Path(file), variant


def _fields_of(file: Path, variant: str) -> dict[str, Any]:
    """The fields of a config, which may be any file."""
    try:
        return help.fields_of(file, variant)
    except Exception as error:
        if variant and isinstance(error, KeyError | TypeError | ValueError):
            _fail(f"{file.stem} has no variant {variant!r}: {brief(error)}")
        _fail(f"{file}: {brief(error)}; expected a config file with get_config()")


def _check_name(argument: str, fields: list[str], values: flags.FlagValues) -> None:
    """Says what was meant by an argument that sets no field and no flag."""
    match = re.match(r"--?(?:no)?(config\.)?([^=.]*)[^=]*(=.*)?", argument, re.DOTALL)
    if match is None:
        return
    _, name, value = match.groups()
    if match[1] and name not in fields:
        close = help.nearest(name, fields)
        hint = f"did you mean {close}? " * bool(close)
        _fail(f"unknown config field {name!r}; {hint}this program's fields are {', '.join(fields)}")
    if not match[1] and name in fields and name not in values:
        _fail(f"unknown flag --{name}; it is a field: --config.{name}{value or '=VALUE'}")
    if not match[1] and name not in values and (close := help.nearest(name, fields)):
        _fail(f"unknown flag --{name}; did you mean --config.{close}{value or '=VALUE'}?")


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
