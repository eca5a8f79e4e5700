"""Catalog: every template file below the templates folder. Nothing else registers a kernel."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from pathlib import Path

from autoflash import settings
from autoflash.codegen.template import LANGUAGES, Template, environment, load
from autoflash.device import Device
from autoflash.errors import TemplateError, UnknownName
from autoflash.problem import FOREIGN_OPS, Problem


@dataclass(frozen=True, slots=True)
class Catalog:
    """The templates of one folder, by name.

    A file `<family>/<kernel>.<py|cu|cpp|flex>.jinja` is the kernel `<family>/<kernel>`; a leading
    underscore marks a part that kernels share.
    """

    root: Path
    templates: dict[str, Template]

    @classmethod
    def load(cls, root: Path) -> Catalog:
        """Read and check every template below `root`."""
        if not root.is_dir():
            raise TemplateError(
                root, None, "there is no templates folder here (AUTOFLASH_TEMPLATES)"
            )
        env = environment(root)
        paths = [
            path
            for path in sorted(root.rglob("*.jinja"))
            if not path.name.startswith("_") and path.name.endswith(tuple(LANGUAGES))
        ]
        loaded = [load(path, root, env) for path in paths]
        return cls(root, {template.name: template for template in loaded})

    def get(self, name: str) -> Template:
        """The template of that name, or UnknownName."""
        if name not in self.templates:
            raise UnknownName.of("template", name, self.templates)
        return self.templates[name]

    def serving(self, problem: Problem, device: Device) -> list[Template]:
        """The templates that accept this problem on this device, by name."""
        return [t for t in self.templates.values() if t.refusal(problem, device) is None]

    def refusals(self, problem: Problem, device: Device) -> dict[str, str]:
        """Template name -> why it does not accept this problem on this device.

        Left out are templates for calls of another library, where `problem` is one of attention(),
        and the other way round: nobody would expect them to.
        """
        alike = (t for t in self.templates.values() if (t.op in FOREIGN_OPS) == problem.is_foreign)
        reasons = ((t.name, t.refusal(problem, device)) for t in alike)
        return {name: reason for name, reason in reasons if reason is not None}


@cache
def installed() -> Catalog:
    """The catalog of this installation (settings.templates_dir)."""
    return Catalog.load(settings.get().templates_dir)
