"""Template: one kernel file, its declaration and its Jinja body. The only user of jinja2."""

from __future__ import annotations

import hashlib
import itertools
import json
import re
import sys
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NoReturn

import jinja2
import jinja2.meta

from autoflash.codegen import ops
from autoflash.codegen.space import Space
from autoflash.config import Config, Value
from autoflash.device import Device
from autoflash.errors import InvalidInput, TemplateError, UnknownName
from autoflash.problem import Problem

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

LANGUAGES = {
    ".py.jinja": "python",
    ".cu.jinja": "cuda",
    ".cpp.jinja": "cpp",
    ".flex.jinja": "flex",
}
"""File ending -> language of the rendered source."""

_DECLARATION = re.compile(r"\A\s*\{#-*\n(?P<toml>.*?)-*#\}", re.DOTALL)
_KEYS = {
    "summary": str,
    "source": str,
    "op": str,
    "accepts": dict,
    "yields": dict,
    "facts": dict,
    "tunables": dict,
    "default": dict,
    "seeds": list,
    "derived": dict,
    "constraints": dict,
    "options": dict,
}
_REQUIRED = ("summary", "source", "op", "accepts", "tunables", "default")
_READS = re.compile(r"\bproblem\b(?:\.(\w+))?")
_NAMES = frozenset({"problem", "device"})


@dataclass(frozen=True, slots=True)
class Source:
    """A rendered kernel, ready to be built.

    Attributes:
        template: name of the template it came from.
        language: "python" (Triton, Gluon), "cuda", "cpp" or "flex" (Python that calls PyTorch's
            FlexAttention).
        text: the source itself.
        op: its argument list.
        dtype: element type of the pointers.
        aligned: whether pointers and strides may be taken for multiples of 16 bytes.
        options: what the declaration passes to the compiler (num_warps, flags, ...).
    """

    template: str
    language: str
    text: str
    op: str
    dtype: str
    aligned: bool
    options: Mapping[str, Value]

    @property
    def digest(self) -> str:
        """sha256 over all that decides what is built, compiler and target apart."""
        parts = (self.template, self.language, self.op, self.dtype, str(self.aligned),
                 repr(sorted(self.options.items())), self.text)  # fmt: skip
        return hashlib.sha256("\0".join(parts).encode()).hexdigest()


class _Traits(SimpleNamespace):
    """The view of a Problem that a body gets: only what a kernel may be compiled for."""

    def __getattr__(self, name: str) -> NoReturn:
        raise jinja2.UndefinedError(
            f"problem.{name} is not known when a kernel is compiled; the body may use problem."
            + ", problem.".join(sorted(vars(self)))
        )


@dataclass(frozen=True)
class Template:
    """A kernel file: what it declares, and how it becomes source.

    Attributes:
        name: path below the templates folder without ending, such as "triton/fwd".
        path: the file.
        language: as in Source.
        summary: one line saying what kernel this is.
        source: the paper section or file whose idea it follows.
        op: which argument list it implements (codegen/ops.py).
        accepts: what a problem and device must satisfy: message -> expression.
        yields: where its default stands back for those of other templates: message -> expression.
        facts: name -> expression of problem and device; each may use those above it.
        tunables: name -> choices.
        default: name -> value, or an expression of facts, problem and device.
        seeds: configs worth trying first; missing names take the default.
        derived: name -> expression of tunables, facts, problem and device; each may use those
            above it.
        constraints: message -> expression of all those.
        options: what the compiler is told: name -> expression.
        digest: sha256 of all that decides what a config renders to: the body, its shared parts,
            `facts`, `derived` and `options`. A record holds only while it stands; widening the
            space or adding a seed retires nothing.
    """

    name: str
    path: Path
    language: str
    summary: str
    source: str
    op: str
    accepts: Mapping[str, str]
    yields: Mapping[str, str]
    facts: Mapping[str, str]
    tunables: Mapping[str, tuple[Value, ...]]
    default: Mapping[str, Value]
    seeds: tuple[Mapping[str, Value], ...]
    derived: Mapping[str, str]
    constraints: Mapping[str, str]
    options: Mapping[str, str]
    digest: str
    _environment: jinja2.Environment = field(repr=False, compare=False)
    _file: str = field(repr=False)

    def __hash__(self) -> int:
        return hash((self.name, self.digest))

    # What is asked ------------------------------------------------------------------------------

    def refusal(self, problem: Problem, device: Device) -> str | None:
        """Why this template cannot serve `problem` on `device`; None if it can."""
        if problem.op != self.op:
            return f"op is {self.op}"
        scope = self._facts(problem, device)
        for message, expression in self.accepts.items():
            if not self._evaluate(expression, scope, f'accepts "{message}"'):
                return message
        return None

    def gives_way(self, problem: Problem, device: Device) -> str | None:
        """Why the default of another template is likely faster here; None if it is not."""
        scope = self._facts(problem, device)
        for message, expression in self.yields.items():
            if self._evaluate(expression, scope, f'yields "{message}"'):
                return message
        return None

    def decisive(self, problem: Problem, device: Device) -> tuple[object, ...]:
        """What the declaration sees of a problem: where it is equal, all its answers are.

        Serving remembers them by it, since Jinja takes some 20 us per expression and decoding
        makes a new Problem with every token.
        """
        if problem.op != self.op:
            return (problem.op,)
        facts = self._facts(problem, device)
        reads = (getattr(problem, name) if name else problem for name in self._reads)
        return (problem.op, *reads, *(facts[name] for name in self.facts))

    @cached_property
    def _reads(self) -> tuple[str, ...]:
        """The fields of a problem that expressions read other than through facts; "": all."""
        texts = [text for _, text in self.expressions() if text not in self.facts.values()]
        texts += [str(value) for seed in self.seeds for value in seed.values()]
        return tuple(sorted({name for text in texts for name in _READS.findall(text)}))

    def default_config(self, problem: Problem, device: Device) -> Config:
        """The declared default, its expressions evaluated for this problem and device."""
        return self._complete({}, problem, device)

    def seed_configs(self, problem: Problem, device: Device) -> list[Config]:
        """The default and the declared seeds that are feasible here, without repeats."""
        wanted = [self._complete(seed, problem, device) for seed in ({}, *self.seeds)]
        return [c for c in dict.fromkeys(wanted) if self.broken(c, problem, device) is None]

    def _complete(self, values: Mapping[str, Value], problem: Problem, device: Device) -> Config:
        scope = self._facts(problem, device)
        chosen: dict[str, Value] = {}
        for name, choices in self.tunables.items():
            value = values.get(name, self.default[name])
            if isinstance(value, str) and value not in choices:
                value = self._evaluate(value, scope, f"default {name}")
            chosen[name] = value
        return Config.of(self.name, chosen)

    def broken(self, config: Config, problem: Problem, device: Device) -> str | None:
        """The first constraint that `config` breaks, or None: the space's one validity test."""
        for name, choices in self.tunables.items():
            if name not in config:
                return f"{name} has no value"
            if config[name] not in choices:
                return f"{name}={config[name]} is not one of {list(choices)}"
        return self._broken(config, problem, device, {})

    def _broken(
        self, config: Config, problem: Problem, device: Device, known: dict[Any, Any]
    ) -> str | None:
        """`broken` of values that are among the choices; `known` as in `_scope`."""
        scope = self._scope(config, problem, device, known)
        for message, expression in self.constraints.items():
            key = (message, *[scope[name] for name in self._depends[expression]])
            if key not in known:
                known[key] = self._evaluate(expression, scope, f'constraint "{message}"')
            if not known[key]:
                return message
        return None

    def space(self, problem: Problem, device: Device) -> Space:
        """Every feasible config, with a count of what rejected the others."""
        names = list(self.tunables)
        feasible: list[Config] = []
        rejected: Counter[str] = Counter()
        size = 0
        known: dict[Any, Any] = {}  # most expressions depend on few tunables
        # Constraint, the places of the tunables that decide it, its value for theirs: most of tens
        # of thousands of combinations are looked up, and tenths of a second do what took seconds.
        checks: list[tuple[str, str, list[int], dict[tuple[Value, ...], bool]]] = [
            (message, expression, [names.index(n) for n in self._depends[expression]], {})
            for message, expression in self.constraints.items()
        ]
        for values in itertools.product(*self.tunables.values()):
            size += 1
            for message, expression, places, found in checks:
                decisive = tuple([values[place] for place in places])
                holds = found.get(decisive)
                if holds is None:
                    config = Config.of(self.name, dict(zip(names, values, strict=True)))
                    scope = self._scope(config, problem, device, known)
                    holds = bool(self._evaluate(expression, scope, f'constraint "{message}"'))
                    found[decisive] = holds
                if not holds:
                    rejected[message] += 1
                    break
            else:
                feasible.append(Config.of(self.name, dict(zip(names, values, strict=True))))
        return Space(self.name, tuple(feasible), size, rejected)

    def derive(self, config: Config, problem: Problem, device: Device) -> dict[str, Any]:
        """The derived values of a config, such as smem_bytes."""
        scope = self._scope(config, problem, device)
        return {name: scope[name] for name in self.derived}

    # What is made -------------------------------------------------------------------------------

    def render(self, config: Config, problem: Problem, device: Device) -> Source:
        """Source text for a config.

        The body sees the tunables, derived values, `device`, `op` and those fields of `problem`
        that a kernel may be compiled for, so that problems that differ only in size share source.

        Raises:
            InvalidInput: the config breaks a constraint.
            TemplateError: the body has a mistake.
        """
        if (message := self.broken(config, problem, device)) is not None:
            raise InvalidInput(f'{self.path}: {config} breaks "{message}" for {problem.name}')
        scope = self._scope(config, problem, device)
        options = {
            name: self._evaluate(expression, scope, f"option {name}")
            for name, expression in self.options.items()
        }
        traits = _Traits(**problem.traits, element_size=problem.element_size)
        body = {**scope, "problem": traits, "op": ops.get(self.op)}
        try:
            text = self._environment.get_template(self._file).render(body)
        except jinja2.TemplateSyntaxError as error:
            raise TemplateError(error.filename or self.path, error.lineno, str(error)) from error
        except Exception as error:
            path, line = _place(error) or (self.path, None)
            raise TemplateError(path, line, f"{type(error).__name__}: {error}") from error
        return Source(
            template=self.name,
            language=self.language,
            text=text.lstrip("\n"),
            op=self.op,
            dtype=problem.dtype,
            aligned=problem.aligned,
            options=options,
        )

    # Expressions --------------------------------------------------------------------------------

    def _scope(
        self,
        config: Config,
        problem: Problem,
        device: Device,
        known: dict[Any, Any] | None = None,
    ) -> dict[str, Any]:
        """All names of an expression; `known` keeps values for other configs of one problem."""
        known = {} if known is None else known
        if "facts" not in known:
            known["facts"] = self._facts(problem, device)
        scope: dict[str, Any] = {**dict(config.pairs), **known["facts"]}
        for name, expression in self.derived.items():
            key = (name, *[scope[tunable] for tunable in self._depends[expression]])
            if key not in known:
                known[key] = self._evaluate(expression, scope, f"derived {name}")
            scope[name] = known[key]
        return scope

    def _facts(self, problem: Problem, device: Device) -> dict[str, Any]:
        """The names that need no config: problem, device and the declared facts."""
        scope: dict[str, Any] = {"problem": problem, "device": device}
        try:
            context = self._all_facts.new_context(scope)
            for _ in self._all_facts.root_render_func(context):
                pass
            found = {name: context.vars[name] for name in self.facts}
        except Exception:  # which one it is, the way below says
            found = {}
        if not found or any(isinstance(value, jinja2.Undefined) for value in found.values()):
            for name, expression in self.facts.items():
                scope[name] = self._evaluate(expression, scope, f"fact {name}")
        return {**scope, **found}

    @cached_property
    def _all_facts(self) -> jinja2.Template:
        """The facts as one program, for serving asks for them with every new length.

        One by one they take Jinja some 20 us each.
        """
        lines = (f"{{% set {name} = ({text}) %}}" for name, text in self.facts.items())
        return self._environment.from_string("".join(lines))

    @cached_property
    def _depends(self) -> dict[str, tuple[str, ...]]:
        """Expression of a derived value or constraint -> the tunables that decide its value."""
        of_name: dict[str, set[str]] = {name: {name} for name in self.tunables}
        depends: dict[str, tuple[str, ...]] = {}
        for name, expression in (*self.derived.items(), *self.constraints.items()):
            used = jinja2.meta.find_undeclared_variables(
                self._environment.parse("{{ " + expression + " }}")
            )
            tunables = set().union(*(of_name.get(other, set()) for other in used))
            depends[expression] = tuple(sorted(tunables))
            if name in self.derived:
                of_name[name] = tunables
        return depends

    def _evaluate(self, expression: str, scope: Mapping[str, Any], what: str) -> Any:
        try:
            value = self._compiled(expression, what)(**scope)
        except TemplateError:
            raise
        except Exception as error:
            line = _line_of(self.path, expression)
            raise TemplateError(self.path, line, f"{what}: {expression!r}: {error}") from error
        if isinstance(value, jinja2.Undefined):
            line = _line_of(self.path, expression)
            raise TemplateError(
                self.path, line, f"{what}: {expression!r}: {value._undefined_message}"
            )
        return value

    @cached_property
    def _expressions(self) -> dict[str, Callable[..., Any]]:
        return {}

    def _compiled(self, expression: str, what: str) -> Callable[..., Any]:
        compiled = self._expressions.get(expression)
        if compiled is None:
            try:
                compiled = self._environment.compile_expression(expression, undefined_to_none=False)
            except jinja2.TemplateSyntaxError as error:
                line = _line_of(self.path, expression)
                raise TemplateError(self.path, line, f"{what}: {expression!r}: {error}") from error
            self._expressions[expression] = compiled
        return compiled

    def expressions(self) -> Iterator[tuple[str, str]]:
        """Every (what it is, expression) of the declaration."""
        for kind, table in (
            ("accepts", self.accepts),
            ("yields", self.yields),
            ("fact", self.facts),
            ("derived", self.derived),
            ("constraint", self.constraints),
            ("option", self.options),
        ):
            for name, expression in table.items():
                yield f'{kind} "{name}"', expression
        for name, value in self.default.items():
            if isinstance(value, str) and value not in self.tunables[name]:
                yield f"default {name}", value


def environment(root: Path) -> jinja2.Environment:
    """The Jinja environment of a templates folder: undefined names are errors."""
    env = jinja2.Environment(
        loader=jinja2.FileSystemLoader(root),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        autoescape=False,
    )
    # repr, so that strings and booleans become literals of the target language's Python.
    env.filters["literal"] = repr
    return env


def load(path: Path, root: Path, env: jinja2.Environment) -> Template:
    """Read a template file and check its declaration.

    Raises:
        TemplateError: with file, line and name of the first mistake.
    """
    text = path.read_text(encoding="utf-8")
    declaration = _declaration(path, text)
    file = path.relative_to(root).as_posix()
    ending = next(end for end in LANGUAGES if file.endswith(end))
    tunables = {name: tuple(choices) for name, choices in declaration["tunables"].items()}
    template = Template(
        name=file.removesuffix(ending),
        path=path,
        language=LANGUAGES[ending],
        summary=declaration["summary"],
        source=declaration["source"],
        op=declaration["op"],
        accepts=declaration["accepts"],
        yields=declaration.get("yields", {}),
        facts=declaration.get("facts", {}),
        tunables=tunables,
        default=declaration["default"],
        seeds=tuple(declaration.get("seeds", ())),
        derived=declaration.get("derived", {}),
        constraints=declaration.get("constraints", {}),
        options=declaration.get("options", {}),
        digest=_digest(file, declaration, env),
        _environment=env,
        _file=file,
    )
    _check(template)
    return template


def _declaration(path: Path, text: str) -> dict[str, Any]:
    found = _DECLARATION.match(text)
    if not found:
        raise TemplateError(path, 1, "a template starts with its declaration: {#--- TOML ---#}")
    first_line = text[: found.start("toml")].count("\n") + 1
    try:
        declaration = tomllib.loads(found["toml"])
    except tomllib.TOMLDecodeError as error:
        at = re.search(r"line (\d+)", str(error))
        line = first_line + int(at[1]) - 1 if at else first_line
        raise TemplateError(path, line, f"declaration: {error}") from error
    for name, value in declaration.items():
        if name not in _KEYS:
            raise TemplateError(
                path, _line_of(path, name), str(UnknownName.of("declaration key", name, _KEYS))
            )
        if not isinstance(value, _KEYS[name]):
            raise TemplateError(
                path, _line_of(path, name), f"{name} must be a {_KEYS[name].__name__}"
            )
    for name in _REQUIRED:
        if name not in declaration:
            raise TemplateError(path, first_line, f"the declaration lacks {name!r}")
    return declaration


def _check(template: Template) -> None:
    """What can be wrong in a declaration and is certain to be so for every problem."""
    path = template.path
    if template.op not in ops.OPS:
        message = str(UnknownName.of("op", template.op, ops.OPS))
        raise TemplateError(path, _line_of(path, template.op), message)
    for name, choices in template.tunables.items():
        if not choices or len(set(choices)) != len(choices):
            raise TemplateError(path, _line_of(path, name), f"tunable {name}: no or equal choices")
    for table, names in (("default", set(template.default)), *(
        (f"seed {number}", set(seed)) for number, seed in enumerate(template.seeds, 1)
    )):  # fmt: skip
        if unknown := names - set(template.tunables):
            name = min(unknown)
            message = f"{table}: {UnknownName.of('tunable', name, template.tunables)}"
            raise TemplateError(path, _line_of(path, name), message)
    for name, choices in template.tunables.items():
        if name not in template.default:
            raise TemplateError(path, _line_of(path, name), f"tunable {name} has no default")
        value = template.default[name]
        if not isinstance(value, str) and value not in choices:
            message = f"default {name}={value!r} is not one of {list(choices)}"
            raise TemplateError(path, _line_of(path, f"{name} = {value}"), message)
    given = _NAMES | set(template.facts)
    every = given | set(template.tunables) | set(template.derived)
    used: set[str] = set()
    for what, expression in template.expressions():
        template._compiled(expression, what)
        names = jinja2.meta.find_undeclared_variables(
            template._environment.parse("{{ " + expression + " }}")
        )
        known = given if what.startswith(("accepts", "yields", "fact", "default")) else every
        if unknown := names - known:
            message = f"{what}: {UnknownName.of('name', min(unknown), known)}"
            raise TemplateError(path, _line_of(path, expression), message)
        if what.startswith(("derived", "option")):
            used |= names
    body: set[str] = set()
    for file in _files(template._file, template._environment):
        body |= _free_names(file, template._environment)
    if unused := set(template.tunables) - used - body:
        name = min(unused)
        raise TemplateError(path, _line_of(path, name), f"tunable {name} is used nowhere")


def _free_names(file: str, env: jinja2.Environment) -> set[str]:
    assert env.loader is not None
    source, filename, _ = env.loader.get_source(env, file)
    try:
        return jinja2.meta.find_undeclared_variables(env.parse(source, file, filename))
    except jinja2.TemplateSyntaxError as error:
        raise TemplateError(filename or file, error.lineno, str(error.message)) from error


def _files(file: str, env: jinja2.Environment) -> list[str]:
    """A template file and every shared part it includes, in order of first mention."""
    assert env.loader is not None
    found = [file]
    for name in found:
        try:
            source, filename, _ = env.loader.get_source(env, name)
            references = jinja2.meta.find_referenced_templates(env.parse(source, name, filename))
            found += [ref for ref in references if ref is not None and ref not in found]
        except jinja2.TemplateNotFound as error:
            raise TemplateError(
                file, None, f"includes {error.name}, which does not exist"
            ) from error
        except jinja2.TemplateSyntaxError as error:
            raise TemplateError(error.filename or name, error.lineno, str(error.message)) from error
    return found


def _digest(file: str, declaration: Mapping[str, Any], env: jinja2.Environment) -> str:
    assert env.loader is not None
    tables = [declaration.get(name, {}) for name in ("facts", "derived", "options")]
    digest = hashlib.sha256(json.dumps(tables, sort_keys=True).encode())
    for name in _files(file, env):
        text, _, _ = env.loader.get_source(env, name)
        body = _DECLARATION.sub("", text, count=1)
        digest.update(f"{name}\0{body}\0".encode())
    return digest.hexdigest()[:16]


def _place(error: BaseException) -> tuple[Path, int] | None:
    """File and line of the template frame an exception came through; Jinja rewrites these."""
    for frame in reversed(traceback.extract_tb(error.__traceback__)):
        if frame.filename.endswith(".jinja"):
            return Path(frame.filename), frame.lineno or 1
    return None


def _line_of(path: Path, text: str) -> int | None:
    """The first line of a file that holds the first of `text`: where a mistake stands."""
    first = text.strip().partition("\n")[0]
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        if first in line:
            return number
    return None
