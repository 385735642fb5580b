"""Everything checked before anything is trained: the call, the config, and that a refusal ends it in one line.

MONAI accepts a mistyped flag, drops `--x None` and skips a plain-text step, all in silence. `check_run`, the first step
of every bundle, refuses these. It is given the call by `train.py`; under MONAI's own command line it reads that again,
and lays the hook that turns MONAI's forty-line chain into the refusal behind it.
"""

import dataclasses
import difflib
import inspect
import json
import logging
import os
import pydoc
import re
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from fire.parser import DefaultParseValue
from monai.bundle import ConfigParser
from monai.bundle.config_item import ComponentLocator

from app.shared.refusals import Refused
from app.training.key_rules import OTHER_NAMES, RULES
from app.training.run_errors import end_at_once_on_sigterm, one_line_errors

log = logging.getLogger(__name__)

RUN_ARGUMENTS = {
    "run_id", "init_id", "final_id", "meta_file", "config_file", "logging_file", "tracking", "args_file",
}  # fmt: skip
REFERENCE = r"[A-Za-z_]\w*(?:(?:#|::)\w+)*"  # behind an @
STEP_LISTS = ("initialize", "run", "training", "finalize")
SPECIAL_KEYS = ("_target_", "_requires_", "_disabled_", "_desc_", "_mode_", "_wrapper_")  # that MONAI knows


@dataclass(frozen=True)
class CommandLine:
    """A call that trains or evaluates: a `python -m monai.bundle run`, read again, or a `voxelingo train`."""

    run_id: str
    config: dict[str, Any]  # the config files merged, without overrides
    overrides: dict[str, Any]
    raw: dict[str, str]  # overrides as they were typed
    words: tuple[str, ...]  # the whole call


def read_command_line(argv: list[str]) -> CommandLine | None:
    """None when the process is no bundle run."""
    if not (len(argv) > 1 and re.search(r"monai[/\\.]bundle", argv[0]) and argv[1] == "run"):
        return None
    raw, _ = read_words(argv[2:])
    given = values_of(raw)
    config = load_config(given.get("config_file", []))
    overrides = {name: value for name, value in given.items() if name not in RUN_ARGUMENTS}
    first = argv[2] if len(argv) > 2 and not argv[2].startswith("--") else "run"
    return CommandLine(
        raw.get("run_id", first), config, overrides, {name: raw[name] for name in overrides}, tuple(argv)
    )


def read_words(words: Sequence[str]) -> tuple[dict[str, str], list[str]]:
    """--key value, --key=value and --key alone, as they are typed; and the words that belong to no key."""
    raw: dict[str, str] = {}
    strays: list[str] = []
    following = iter([*words[1:], "--"])
    pending = iter(words)
    for word in pending:
        after = next(following)
        if not word.startswith("--"):
            strays.append(word)
            continue
        name, equals, value = word[2:].partition("=")
        if not equals:
            value = "True" if after.startswith("--") else after
            if not after.startswith("--"):
                next(pending)
                next(following)
        raw[name.replace("-", "_")] = value
    return raw, strays


def values_of(raw: dict[str, str]) -> dict[str, Any]:
    """What typed words mean, as MONAI's command line takes them."""
    return {name: DefaultParseValue(value) for name, value in raw.items()}


def load_config(files: str | Sequence[str]) -> dict[str, Any]:
    """The config files laid over one another."""
    files = [files] if isinstance(files, str) else list(files)
    for file in files:
        if not Path(file).is_file():
            raise Refused("NO_CONFIG", f"config file {file} does not exist")
    try:
        return ConfigParser.load_config_files(files)
    except Exception as error:  # what parsers of JSON and YAML raise, and what is no object inside
        raise Refused("BAD_CONFIG", f"{', '.join(files)} cannot be read ({str(error).splitlines()[0]})") from error


def check_run(call: CommandLine | None = None) -> None:
    """The first step of every bundle: without a call it reads MONAI's command line. Logs the scale, data and preset."""
    if call is None:
        one_line_errors()
        call = read_command_line(sys.argv)
        if call is None:
            return
        end_at_once_on_sigterm()
    check_call(call)
    _say_choices(resolved_config(call))


def check_call(call: CommandLine) -> None:
    """Refuses what is wrong with a call or its config."""
    if call.run_id not in call.config:
        steps = [name for name in STEP_LISTS if name in call.config]
        hint = suggestion(call.run_id, steps, otherwise=f"it has {', '.join(steps)}")
        raise Refused("UNKNOWN_RUN", f"this config has no {call.run_id} to run", hint)
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and "process_group" not in call.config:
        raise Refused(
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
    _check_used(call)
    if call.overrides.get("windows") is not None and call.overrides.get("window_type") is not None:
        raise Refused("BAD_VALUE", "windows and window_type are both given", "give one of them")


def _check_override(name: str, value: Any, call: CommandLine) -> None:
    path = re.split(r"::|#", name)
    is_part = isinstance(call.config.get(name), dict) and not (isinstance(value, dict) or str(value)[:1] in "$@%")
    if path[0] not in call.config or is_part:
        known = [ours for ours in OTHER_NAMES.get(path[0], ()) if ours.split()[0] in {*call.config, "torchrun"}]
        if known:
            raise Refused("UNKNOWN_KEY", f"this run has no key {path[0]}", f"here it is {known[0]}")
        if is_part and name not in RULES:
            what = f"{name} is a part of this config, not a setting"
            raise Refused("UNKNOWN_KEY", what, "override it with a dict, or by # keys")
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
            what = f"{name} cannot be null, it must be {rule.says}"
            raise Refused("BAD_VALUE", what, f"pass another --{name} or leave it out")
        if call.raw[name] == "$None":
            return
        what = f"MONAI ignores --{name} None and keeps {node!r}"
        raise Refused("NULL_IGNORED", what, f"write --{name} '$None' to set null")
    if len(path) == 1 and name in RULES:
        _check_value(name, value)


def _check_used(call: CommandLine) -> None:
    """A setting that is given and that nothing refers to, as of a part that an overlay has replaced."""
    values = [value for _, _, value in walk({**call.config, **call.overrides})]
    used = {re.split(r"::|#", reference)[0] for value in values for reference in _references(value)}
    for name in call.overrides:
        if name in RULES and name != "training_stage" and name not in used:  # that one is read by its name
            raise Refused("UNUSED_KEY", f"nothing in this run uses {name}")


def _check_value(name: str, value: Any) -> None:
    rule = RULES[name]
    is_evaluated = (isinstance(value, str) and value.startswith(("$", "@", "%"))) or (
        isinstance(value, dict) and "_target_" in value
    )
    if is_evaluated or (value is None and rule.optional):
        return
    if not rule.allows(value):
        raise Refused("BAD_VALUE", f"{name} must be {rule.says}, got {value!r}", f"pass another --{name}")


def suggestion(name: str, known: Iterable[str], otherwise: str, *, cutoff: float = 0.6) -> str:
    """What to do about a name that is not known."""
    near = difflib.get_close_matches(name, list(known), n=1, cutoff=cutoff)
    return f"did you mean {near[0]}?" if near else otherwise


def _unknown(name: str, known: dict, *, under: str = "") -> NoReturn:
    where = f"{under} has no key {name}" if under else f"this run has no key {name}"
    has = f"it has {', '.join(sorted(map(str, known)))}"
    hint = suggestion(name, [*known, *(() if under else ("config_file",))], has, cutoff=0.5)
    raise Refused("UNKNOWN_KEY", where, hint)


def _check_structure(config: dict[str, Any]) -> None:
    """Mistakes that MONAI passes over: text as a step, a misspelt _target_, a reference to nothing."""
    for name in STEP_LISTS:
        steps = config.get(name, config.get("+" + name, []))
        for i, step in enumerate(steps if isinstance(steps, list) else [steps]):
            if isinstance(step, str) and not re.match(rf"[$%]|@{REFERENCE}$", step):
                raise Refused("PLAIN_STEP", f"{name}#{i} is plain text and would do nothing: {step!r}")
    for path, key, value in walk(config):
        if isinstance(key, str) and key not in SPECIAL_KEYS:
            meant = difflib.get_close_matches(key.lower(), SPECIAL_KEYS, n=1, cutoff=0.8)
            if meant and (key.startswith("_") or key.endswith("_")):
                raise Refused("BAD_TARGET_KEY", f"{path} holds {key}, which MONAI would pass over", f"write {meant[0]}")
        if isinstance(value, dict) and "_target_" in value:
            _check_component(path, value)
        for reference in _references(value):
            node: Any = config
            for part in re.split(r"::|#", reference):
                inside = isinstance(node, list) and part.isdigit() and int(part) < len(node)
                if not inside and not (isinstance(node, dict) and part in node):
                    hint = suggestion(
                        part, node if isinstance(node, dict) else (), "define it, or remove the reference"
                    )
                    raise Refused("MISSING_REFERENCE", f"{path} refers to @{reference}, which does not exist", hint)
                node = node[int(part)] if isinstance(node, list) else node[part]


def _references(value: Any) -> list[str]:
    """What an expression or a reference of a config refers to."""
    return re.findall(rf"@({REFERENCE})", value) if isinstance(value, str) and value[:1] in ("$", "@") else []


def _check_component(path: str, node: dict[str, Any]) -> None:
    """That what `_target_` names exists, and takes the arguments beside it."""
    name = node["_target_"]
    if not isinstance(name, str) or name[:1] in ("$", "@"):
        return
    if "." not in name:  # MONAI's own go by one word
        _check_word(path, name)
        return
    try:
        component = pydoc.locate(name)
    except pydoc.ErrorDuringImport as error:
        what = f"{path} names {name}, which cannot be imported ({error.value})"
        raise Refused("BAD_TARGET", what, "install what it needs") from error
    if component is None:
        module, _, last = name.rpartition(".")
        parent = pydoc.locate(module)
        hint = suggestion(last, dir(parent) if parent else (), "").replace("mean ", f"mean {module}.")
        raise Refused("BAD_TARGET", f"{path} names {name}, which does not exist", hint)
    try:
        # an instance's own call: Python 3.12 gives members of an Enum the signature of their class
        takes = inspect.signature(
            component if inspect.isroutine(component) or isinstance(component, type) else component.__call__
        ).parameters
    except (TypeError, ValueError):  # written in C: it says nothing of its arguments
        return
    named = [p for p in takes.values() if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
    lacking = [p.name for p in named if p.default is p.empty and p.name not in node]
    if lacking and node.get("_mode_", "default") == "default" and not node.get("_disabled_"):
        what = f"{path} makes {name} without {', '.join(lacking)}"
        raise Refused("MISSING_ARGUMENT", what, f"add {lacking[0]} to {path}")
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in takes.values()):
        return
    for key in node:
        if not key.startswith("_") and key not in takes:
            hint = suggestion(key, takes, otherwise=f"it takes {', '.join(takes)}")
            raise Refused("UNKNOWN_ARGUMENT", f"{path} gives {key}, which {name} does not take", hint)


def _check_word(path: str, name: str) -> None:
    """That MONAI has a component of this name."""
    table = ComponentLocator()
    if table.get_component_module_name(name) is None:
        hint = suggestion(name, table._components_table, "")
        raise Refused("BAD_TARGET", f"{path} names {name}, which MONAI does not have", hint)


def walk(node: Any, path: str = "") -> Iterator[tuple[str, Any, Any]]:
    """Path, key and value of everything in a config."""
    items = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
    for key, value in items:
        here = f"{path}#{key}" if path else str(key)
        yield here, key, value
        yield from walk(value, here)


def resolved_config(call: CommandLine | None) -> dict[str, Any]:
    """The config of this run: files, overrides, and in the place of each open flat key what it comes to."""
    if call is None:
        return {}
    parser = ConfigParser(json.loads(json.dumps(call.config)))
    parser.update(call.overrides)
    config = parser.get()
    _fill_open_keys(config)
    return config


def _fill_open_keys(config: dict[str, Any]) -> None:
    """Expressions of flat keys become values, null sizes those of the preset, `demo` what it is here."""
    if "demo" not in config:
        return
    parser = ConfigParser(config)
    expressions = {name: value for name, value in config.items() if name in RULES and str(value)[:1] in ("$", "@")}
    values = {name: parser.get_parsed_content(name) for name in ("demo", *expressions)}
    sizes = dataclasses.asdict(parser.get_parsed_content("sizes")) if "sizes" in config else {}
    open_sizes = [name for name in sizes if name in config["sizes"] and {**config, **values}.get(name) is None]
    values |= {name: sizes[name] for name in open_sizes if name in config}
    config.update({name: list(value) if isinstance(value, tuple) else value for name, value in values.items()})


def _say_choices(config: dict[str, Any]) -> None:
    """Scale, data and preset in the log."""
    if "training_stage" not in config:
        return
    scale, data = "demo" if config["demo"] else "full", config.get("dataset_dir")
    log.info("scale %s: %s", scale, f"your data in {data}" if data else "built-in phantoms")
    what = "preset %s, stage %s; a default a flag does not override comes from scale %s"
    log.info(what, config["preset"], config["training_stage"], scale)
