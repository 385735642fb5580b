"""Everything checked before anything is trained, and the one way to end a run over a user's mistake.

MONAI accepts a mistyped flag, drops `--x None` and skips a plain-text step, all in silence. `check`, the first step of
every bundle, reads the command line again and refuses these in one line each. `fail` writes that line and leaves; any
other exception would reach the user as MONAI's forty-line chain.
"""

import dataclasses
import difflib
import errno
import inspect
import json
import logging
import os
import pydoc
import re
import signal
import sys
import traceback
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from fire.parser import DefaultParseValue
from monai.bundle import ConfigParser
from monai.bundle.config_item import ComponentLocator

from app.shared.refusals import fail
from app.training.key_rules import OTHER_NAMES, RULES

log = logging.getLogger(__name__)

RUN_ARGUMENTS = {
    "run_id", "init_id", "final_id", "meta_file", "config_file", "logging_file", "tracking", "args_file",
}  # fmt: skip
LOST_RANK = r"Connection (?:closed|reset) by peer|NCCL \w+ error|Broken pipe"  # how gloo and NCCL say it
REFERENCE = r"[A-Za-z_]\w*(?:(?:#|::)\w+)*"  # behind an @
STEP_LISTS = ("initialize", "run", "training", "finalize")
SPECIAL_KEYS = ("_target_", "_requires_", "_disabled_", "_desc_", "_mode_", "_wrapper_")  # that MONAI knows


@dataclass(frozen=True)
class CommandLine:
    """A `python -m monai.bundle run` call, read again."""

    run_id: str
    config: dict[str, Any]  # the config files merged, without overrides
    overrides: dict[str, Any]
    raw: dict[str, str]  # overrides as they were typed


def read_command_line(argv: list[str]) -> CommandLine | None:
    """None when the process is no bundle run."""
    if not (len(argv) > 1 and re.search(r"monai[/\\.]bundle", argv[0]) and argv[1] == "run"):
        return None
    raw: dict[str, str] = {}
    words = iter(enumerate(argv[2:], start=2))
    for i, word in words:
        if not word.startswith("--"):
            continue
        name, equals, value = word[2:].partition("=")
        if not equals:
            following = argv[i + 1] if i + 1 < len(argv) else "--"
            value = "True" if following.startswith("--") else following
            if not following.startswith("--"):
                next(words)
        raw[name.replace("-", "_")] = value
    files = DefaultParseValue(raw.get("config_file", "[]"))
    config = ConfigParser.load_config_files(files)
    overrides = {name: DefaultParseValue(value) for name, value in raw.items() if name not in RUN_ARGUMENTS}
    first = argv[2] if len(argv) > 2 and not argv[2].startswith("--") else "run"
    return CommandLine(raw.get("run_id", first), config, overrides, {name: raw[name] for name in overrides})


def check() -> None:
    """The first step of every bundle. Says nothing when all is well."""
    one_line_errors()
    call = read_command_line(sys.argv)
    if call is None:
        return
    end_at_once_on_sigterm()
    if call.run_id not in call.config:
        steps = [name for name in STEP_LISTS if name in call.config]
        near = difflib.get_close_matches(call.run_id, steps, n=1)
        hint = f"did you mean {near[0]}?" if near else f"it has {', '.join(steps)}"
        fail("UNKNOWN_RUN", f"this config has no {call.run_id} to run", hint)
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and "process_group" not in call.config:
        fail(
            "NO_OVERLAY",
            f"torchrun started {os.environ['WORLD_SIZE']} processes, this config is for one: each would do it all",
            "lay bundles/multi_gpu.json over it: --config_file \"['bundles/….json','bundles/multi_gpu.json']\"",
        )
    _check_structure(call.config)
    for name, value in call.config.items():
        is_open = value is None and "training" not in call.config  # an evaluation may leave any key open
        if name in RULES and name not in call.overrides and not is_open:
            _check_value(name, value)
    for name, value in call.overrides.items():
        _check_override(name, value, call)
    if call.overrides.get("windows") is not None and call.overrides.get("window_type") is not None:
        fail("BAD_VALUE", "windows and window_type are both given", "give one of them")
    _say_choices(resolved_config())


def _check_override(name: str, value: Any, call: CommandLine) -> None:
    path = re.split(r"::|#", name)
    is_part = isinstance(call.config.get(name), dict) and not (isinstance(value, dict) or str(value)[:1] in "$@%")
    if path[0] not in call.config or is_part:
        known = [ours for ours in OTHER_NAMES.get(path[0], ()) if ours.split()[0] in {*call.config, "torchrun"}]
        if known:
            fail("UNKNOWN_KEY", f"this run has no key {path[0]}", f"here it is {known[0]}")
        if is_part and name not in RULES:
            fail(
                "UNKNOWN_KEY",
                f"{name} is a part of this config, not a setting",
                "override it with a dict, or by # keys",
            )
        if not is_part:
            _unknown(path[0], call.config)
    node: Any = call.config
    for depth, part in enumerate(path):
        if isinstance(node, dict) and part not in node:
            _unknown(part, node, under="#".join(path[:depth]))
        if isinstance(node, dict | list):
            node = node[int(part) if isinstance(node, list) else part]
    if call.raw[name] in ("None", "$None"):
        if node is None:  # what the file has is null already
            return
        rule = RULES.get(name)
        if rule is not None and not rule.optional:
            fail(
                "BAD_VALUE", f"{name} cannot be null, it must be {rule.says}", f"pass another --{name} or leave it out"
            )
        if call.raw[name] == "$None":
            return
        fail("NULL_IGNORED", f"MONAI ignores --{name} None and keeps {node!r}", f"write --{name} '$None' to set null")
    if len(path) == 1 and name in RULES:
        _check_value(name, value)


def _check_value(name: str, value: Any) -> None:
    rule = RULES[name]
    is_made = (isinstance(value, str) and value.startswith(("$", "@", "%"))) or (
        isinstance(value, dict) and "_target_" in value
    )
    if is_made or (value is None and rule.optional):
        return
    if not rule.allows(value):
        fail("BAD_VALUE", f"{name} must be {rule.says}, got {value!r}", f"pass another --{name}")


def _unknown(name: str, known: dict, *, under: str = "") -> NoReturn:
    near = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    where = f"{under} has no key {name}" if under else f"this run has no key {name}"
    fail("UNKNOWN_KEY", where, f"did you mean {near[0]}?" if near else f"it has {', '.join(sorted(map(str, known)))}")


def _check_structure(config: dict[str, Any]) -> None:
    """Mistakes that MONAI passes over: text as a step, a misspelt _target_, a reference to nothing."""
    for name in STEP_LISTS:
        steps = config.get(name, config.get("+" + name, []))
        for i, step in enumerate(steps if isinstance(steps, list) else [steps]):
            if isinstance(step, str) and not re.match(rf"[$%]|@{REFERENCE}$", step):
                fail("PLAIN_STEP", f"{name}#{i} is plain text and would do nothing: {step!r}", "begin it with $")
    for path, key, value in _walk(config):
        if isinstance(key, str) and key not in SPECIAL_KEYS:
            meant = difflib.get_close_matches(key.lower(), SPECIAL_KEYS, n=1, cutoff=0.8)
            if meant and (key.startswith("_") or key.endswith("_")):
                fail("BAD_TARGET_KEY", f"{path} holds {key}, which MONAI would pass over", f"write {meant[0]}")
        if isinstance(value, dict) and "_target_" in value:
            _check_component(path, value)
        if not isinstance(value, str) or value[:1] not in "$@":
            continue
        for reference in re.findall(rf"@({REFERENCE})", value):
            node: Any = config
            for part in re.split(r"::|#", reference):
                inside = isinstance(node, list) and part.isdigit() and int(part) < len(node)
                if not inside and not (isinstance(node, dict) and part in node):
                    near = difflib.get_close_matches(part, list(node) if isinstance(node, dict) else [], n=1)
                    hint = f"did you mean {near[0]}?" if near else "define it, or remove the reference"
                    fail("MISSING_REFERENCE", f"{path} refers to @{reference}, which does not exist", hint)
                node = node[int(part)] if isinstance(node, list) else node[part]


def _check_component(path: str, node: dict[str, Any]) -> None:
    """That what `_target_` names is there, and takes the arguments it is given."""
    name = node["_target_"]
    if not isinstance(name, str) or name[:1] in ("$", "@"):
        return
    if "." not in name:  # MONAI's own go by one word
        _check_word(path, name)
        return
    try:
        made = pydoc.locate(name)
    except pydoc.ErrorDuringImport as error:
        fail("BAD_TARGET", f"{path} names {name}, which cannot be imported ({error.value})", "install what it needs")
    if made is None:
        module, _, last = name.rpartition(".")
        near = difflib.get_close_matches(last, dir(pydoc.locate(module)) if pydoc.locate(module) else [], n=1)
        hint = f"did you mean {module}.{near[0]}?" if near else "give the dotted path of a class or function"
        fail("BAD_TARGET", f"{path} names {name}, which does not exist", hint)
    try:
        takes = inspect.signature(made).parameters
    except (TypeError, ValueError):  # written in C: it says nothing of its arguments
        return
    named = [p for p in takes.values() if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
    lacking = [p.name for p in named if p.default is p.empty and p.name not in node]
    if lacking and node.get("_mode_", "default") == "default" and not node.get("_disabled_"):
        fail("MISSING_ARGUMENT", f"{path} makes {name} without {', '.join(lacking)}", f"add {lacking[0]} to {path}")
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in takes.values()):
        return
    for key in node:
        if not key.startswith("_") and key not in takes:
            near = difflib.get_close_matches(key, list(takes), n=1)
            hint = f"did you mean {near[0]}?" if near else f"it takes {', '.join(takes)}"
            fail("UNKNOWN_ARGUMENT", f"{path} gives {key}, which {name} does not take", hint)


def _check_word(path: str, name: str) -> None:
    """That MONAI has a component of this name."""
    table = ComponentLocator()
    if table.get_component_module_name(name) is None:
        near = difflib.get_close_matches(name, list(table._components_table), n=1)
        hint = f"did you mean {near[0]}?" if near else "give the dotted path of a class or function"
        fail("BAD_TARGET", f"{path} names {name}, which MONAI does not have", hint)


def _walk(node: Any, path: str = "") -> Iterator[tuple[str, Any, Any]]:
    items = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
    for key, value in items:
        here = f"{path}#{key}" if path else str(key)
        yield here, key, value
        yield from _walk(value, here)


def resolved_config() -> dict[str, Any]:
    """The config of this run: files, overrides, and in the place of each open flat key what it comes to."""
    call = read_command_line(sys.argv)
    if call is None:
        return {}
    config = json.loads(json.dumps(call.config))
    for name, value in call.overrides.items():
        node, *rest = config, *re.split(r"::|#", name)
        for part in rest[:-1]:
            node = node[int(part) if isinstance(node, list) else part]
        node[int(rest[-1]) if isinstance(node, list) else rest[-1]] = value
    _fill_open_keys(config)
    return config


def _fill_open_keys(config: dict[str, Any]) -> None:
    """Expressions of flat keys become values, null sizes those of the preset, `demo` what it is here."""
    if "demo" not in config:
        return
    parser = ConfigParser(config)
    made = {name: value for name, value in config.items() if name in RULES and str(value)[:1] in ("$", "@")}
    found = {name: parser.get_parsed_content(name) for name in ("demo", *made)}
    sizes = dataclasses.asdict(parser.get_parsed_content("sizes")) if "sizes" in config else {}
    open_sizes = [name for name in sizes if name in config["sizes"] and {**config, **found}.get(name) is None]
    found |= {name: sizes[name] for name in open_sizes if name in config}
    config.update({name: list(value) if isinstance(value, tuple) else value for name, value in found.items()})


def _say_choices(config: dict[str, Any]) -> None:
    """What the keys that were left open come to."""
    if "training_stage" not in config:
        return
    scale, data = "demo" if config["demo"] else "full", config.get("dataset_dir")
    log.info("scale %s: %s", scale, f"your data in {data}" if data else "built-in phantoms")
    what = "preset %s, stage %s; a default a flag does not override comes from scale %s"
    log.info(what, config["preset"], config["training_stage"], scale)


def one_line_errors() -> None:
    """From here on a mistake of the user ends the process in one line; the trace goes to the log.

    A ValueError raised in this project's code is such a mistake: that is how it refuses values. Anything else is a
    fault of ours and keeps its trace.
    """
    for name in ("SupervisedTrainer", "SupervisedEvaluator"):
        logging.getLogger(f"ignite.engine.engine.{name}").addFilter(_says_more)
    usual = sys.excepthook

    def hook(kind: type[BaseException], error: BaseException, trace: Any) -> None:
        chain = [error]
        while chain[-1].__cause__ is not None:
            chain.append(chain[-1].__cause__)
        cause = chain[-1]
        if isinstance(error, KeyboardInterrupt):
            _leave("STOPPED: ended by Ctrl-C. Run again; where this run had saved a step, with --resume latest.\n", 130)
        refused = next((part for part in reversed(chain) if _refusal(part) is not None), None)
        if refused is not None:
            log.debug("".join(traceback.format_exception(kind, error, trace)))
            code, said = getattr(refused, "code", "BAD_VALUE"), _refusal(refused)
            _leave(f"{code}: {said.removeprefix(f'{code}: ')}\n", 2)
        unread = isinstance(cause, SyntaxError) and cause.filename in ("<string>", "<unknown>")
        if unread or _files_of(cause)[-1:] == ["<string>"]:  # it failed in a config's own `$` expression
            what = f"{type(cause).__name__}: {cause}".splitlines()[0]
            text = f"${(cause.text or '').strip()}" if unread else _expression(error)
            _leave(f"BAD_EXPRESSION: {text} gives {what}. Correct it in the config or on the line.\n", 2)
        if isinstance(cause, OSError) and cause.errno in (errno.ENOSPC, errno.EDQUOT):
            place, again = cause.filename or "output_dir", "Free space and run again, training with --resume latest"
            _leave(f"DISK_FULL: {cause.strerror}: {place}. {again}.\n", 2)
        if isinstance(cause, OSError) and cause.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
            _leave(f"NO_ACCESS: {cause.strerror}: {cause.filename}. Check the path and who may use it.\n", 2)
        if (lost := re.search(LOST_RANK, str(cause))) and "RANK" in os.environ:
            remedy = "Look above for why it ended, then --resume latest; torchrun --max_restarts=3 does so by itself"
            _leave(f"LOST_RANK: another process of this run is gone ({lost[0]}), so this one ends. {remedy}.\n", 1)
        if type(cause).__name__ == "OutOfMemoryError":
            advice = "lower, in this order: batch_size_per_gpu, max_points, resolution; or pass --use_checkpoint True"
            _leave(f"OUT_OF_MEMORY: {str(cause).splitlines()[0]} {advice}.\n", 2)
        usual(kind, error, trace)

    sys.excepthook = hook


def end_at_once_on_sigterm() -> None:
    """Until steps are taken nothing is lost; a line tells it, like that of Ctrl-C."""
    process = os.getpid()

    def end(number: int, _frame: object) -> None:
        if os.getpid() == process:  # what was forked from here has nothing to say
            os.write(
                2, b"STOPPED: ended by SIGTERM. Run again; where this run had saved a step, with --resume latest.\n"
            )
        os._exit(128 + number)

    signal.signal(signal.SIGTERM, end)


def _says_more(_record: logging.LogRecord) -> bool:
    """Not what ignite's engines say on the way out after `fail`, which has said all: an exit's number."""
    return not isinstance(sys.exc_info()[1], SystemExit)


def _refusal(error: BaseException) -> str | None:
    """What a refusal of ours says; None for any other error. A loader's worker sends its trace as text, cause first."""
    text, refused, files = str(error).strip(), isinstance(error, ValueError), _files_of(error)
    if " in DataLoader worker process " in text:
        cause = re.split(r"\n\n(?:The above exception|During handling)", text)[0]
        files = re.findall(r'^ *File "(.+?)", line', cause, re.MULTILINE)
        _, refused, text = cause.rpartition("\nValueError: ")
    here = Path(__file__).resolve().parents[2]
    ours = bool(files) and any(
        Path(files[-1]).is_relative_to(here / part) for part in ("app", "transforms", "networks")
    )
    return text.splitlines()[0] if refused and ours and text else None


def _files_of(error: BaseException) -> list[str]:
    """Where it went through, outermost first."""
    return [frame.filename for frame in traceback.extract_tb(error.__traceback__)]


def _expression(error: BaseException | None) -> str:
    """The expression that MONAI says it could not evaluate, the innermost of several."""
    found = "an expression"
    while error is not None:
        if match := re.match(r"Failed to evaluate \w+:\s*'?(.+?)'?$", str(error), re.DOTALL):
            found = match[1]
        error = error.__cause__
    return found


def _leave(line: str, status: int) -> NoReturn:
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.write(line)
    sys.stderr.flush()
    os._exit(status)  # an exception hook cannot choose the exit status otherwise
