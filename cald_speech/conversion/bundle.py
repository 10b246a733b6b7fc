"""One Python file out of many: the definitions that a piece of code needs, each as it stands in its module.

What is needed is found by names. A definition needs those of its module that it mentions; a class keeps the methods
whose names are mentioned anywhere, and those that its bases of other packages call. Modules come in the order in which
they import each other, so that whatever is run while the file is imported has been defined before.
"""

import ast
import builtins
import inspect
import re
from collections.abc import Collection, Iterator, Mapping
from functools import cache
from graphlib import TopologicalSorter
from importlib import import_module
from typing import NamedTuple

WIDTH = 120
EXAMPLE = re.compile(r'\n+[ ]*Examples?\n[ ]*-+\n.*?(?=\n?[ ]*""")', re.DOTALL)
Function = ast.FunctionDef | ast.AsyncFunctionDef


class CannotBundle(Exception):
    """The code is written in a way that cannot be taken apart; the message says where."""


class Imported(NamedTuple):
    """What an import of another package binds: ``from module import name``, or ``import module`` for no name."""

    module: str
    name: str | None


class Defined(NamedTuple):
    """A name at the top of one of our modules."""

    module: str
    name: str


class Module:
    """A module's source: what is defined and imported at its top."""

    def __init__(self, name: str, source: str | None = None):
        if source is None:
            try:
                source = inspect.getsource(import_module(name))
            except (OSError, TypeError, ImportError) as error:
                raise CannotBundle(f"the source of {name} cannot be had") from error
        self.name, self.lines = name, source.splitlines()
        self.definitions: dict[str, list[ast.stmt]] = {}
        self.imports: dict[str, Imported] = {}
        for node in ast.parse(source).body:
            if isinstance(node, ast.Import | ast.ImportFrom):
                self._import(node)
            else:
                for bound in bound_by(node):
                    self.definitions.setdefault(bound, []).append(node)

    def _import(self, node: ast.Import | ast.ImportFrom) -> None:
        for alias in node.names:
            if isinstance(node, ast.ImportFrom):
                if node.level or alias.name == "*":
                    raise CannotBundle(f"{self.name}: expected absolute imports of names, line {node.lineno}")
                self.imports[alias.asname or alias.name] = Imported(node.module, alias.name)
            elif alias.asname:
                package, _, name = alias.name.rpartition(".")
                self.imports[alias.asname] = Imported(package, name) if package else Imported(name, None)
            else:
                top = alias.name.partition(".")[0]
                self.imports[top] = Imported(top if alias.name == top else alias.name, None)

    def text(self, node: ast.AST) -> str:
        """The lines of a statement, with the comments right before it."""
        first = min([node.lineno, *(d.lineno for d in getattr(node, "decorator_list", ()))])
        return self.between(self._with_comments(first), node.end_lineno)

    def head(self, node: ast.ClassDef) -> str:
        """The lines of a class before the first statement in it."""
        first = min([node.lineno, *(d.lineno for d in node.decorator_list)])
        return self.between(self._with_comments(first), self._with_comments(node.body[0].lineno) - 1)

    def _with_comments(self, first: int) -> int:
        while first > 1 and self.lines[first - 2].lstrip().startswith("#"):
            first -= 1
        return first

    def between(self, first: int, last: int) -> str:
        return "\n".join(self.lines[first - 1 : last])


def bound_by(node: ast.stmt) -> list[str]:
    """The names that a statement at the top of a module binds or changes.

    Example
    -------
    >>> [bound_by(node) for node in ast.parse("a = b = 1; a += 2; print(a)").body]
    [['a', 'b'], ['a'], []]
    """
    if isinstance(node, Function | ast.ClassDef):
        return [node.name]
    targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
    return [n.id for target in targets if target for n in ast.walk(target) if isinstance(n, ast.Name)]


class Bundle:
    """What ``main`` needs of the modules called ``ours``, or in packages of these names.

    Arguments
    ---------
    main : source of a module, all of which is kept; it comes last.
    ours : packages and modules whose definitions are taken over; others are imported by the file too.
    instead : modules in whose place others are read, where those have the name.

    Example
    -------
    >>> text = Bundle("from cald_speech.errors import some_of", ours=("cald_speech",)).text()
    >>> "def some_of(" in text or "nothing of main mentions it"
    'nothing of main mentions it'
    >>> "def some_of(" in Bundle("from cald_speech.errors import some_of\\nf = some_of", ours=("cald_speech",)).text()
    True
    """

    MAIN = "main"

    def __init__(self, main: str, *, ours: Collection[str], instead: Mapping[str, str] | None = None):
        self.ours, self.instead = tuple(ours), dict(instead or {})
        self.modules = {self.MAIN: Module(self.MAIN, main)}
        self.mentioned: set[str] = set()
        self.kept: dict[Defined, dict[str, Defined | Imported]] = {
            Defined(self.MAIN, name): {} for name in self.modules[self.MAIN].definitions
        }
        size = None
        while size != (size := (len(self.kept), len(self.mentioned))):
            for one in list(self.kept):
                self._follow(one)

    def _follow(self, one: Defined) -> None:
        """Keep what a definition mentions."""
        module = self._module(one.module)
        for node in self._parts(one):
            names, mentioned, imports = _mentions(node)
            if imports:
                raise CannotBundle(f"{one.module}: {one.name} has an import inside")
            self.mentioned |= mentioned
            for name in names:
                if (found := self._resolve(module, name)) is not None:
                    self.kept[one][name] = found
                    if isinstance(found, Defined):
                        self.kept.setdefault(found, {})

    def _module(self, name: str) -> Module:
        if name not in self.modules:
            self.modules[name] = _read(name)
        return self.modules[name]

    def _is_ours(self, module: str) -> bool:
        return any(module == name or module.startswith(f"{name}.") for name in self.ours)

    def _resolve(self, module: Module, name: str) -> Defined | Imported | None:
        """What a name means at the top of a module; None for a builtin or a local one."""
        if name in module.definitions:
            return Defined(module.name, name)
        target = module.imports.get(name)
        if target is None or not self._is_ours(target.module):
            return target
        for place in (self.instead.get(target.module), target.module):
            if place and target.name and (found := self._resolve(self._module(place), target.name)):
                return found
        raise CannotBundle(f"{module.name}: {name} is a module, or nothing that {target.module} has")

    def _parts(self, one: Defined) -> Iterator[ast.AST]:
        """The nodes of a definition that are kept."""
        for node in self._module(one.module).definitions[one.name]:
            if not isinstance(node, ast.ClassDef):
                yield node
                continue
            yield from (*node.decorator_list, *node.bases, *node.keywords)
            yield from self._body(one, node)

    def _body(self, one: Defined, node: ast.ClassDef) -> list[ast.stmt]:
        called = () if one.module == self.MAIN else _called_by_others(one, self.ours)
        return [
            inner
            for inner in node.body
            if not isinstance(inner, Function)
            or (inner.name.startswith("__") and inner.name.endswith("__"))
            or inner.name in self.mentioned
            or inner.name in called
        ]

    # --- the file -----------------------------------------------------------------------------------------------------

    def text(self) -> str:
        """The file: imports, and then the definitions."""
        order = self._order()
        imported = [of for one in order for of in self.kept[one].values() if isinstance(of, Imported)]
        names = self._names(list(dict.fromkeys(imported)), order)
        parts = [_import_lines({of: names[of] for of in imported})]
        for one in order:
            changes = {name: names[of] for name, of in self.kept[one].items() if names[of] != name}
            if names[one] != one.name:
                changes[one.name] = names[one]
            parts += self._written(one, changes)
        return EXAMPLE.sub("", "\n\n\n".join(parts)) + "\n"

    def _order(self) -> list[Defined]:
        """Modules as they import each other, and in each the order of its source."""
        needs: dict[str, set[str]] = {}
        for one, mentioned in self.kept.items():
            others = {of.module for of in mentioned.values() if isinstance(of, Defined)}
            needs.setdefault(one.module, set()).update(others - {one.module})
        place = {name: i for i, name in enumerate(TopologicalSorter(needs).static_order())}
        return sorted(self.kept, key=lambda one: (place[one.module], self._definitions(one)[0].lineno))

    def _definitions(self, one: Defined) -> list[ast.stmt]:
        return self._module(one.module).definitions[one.name]

    def _names(self, imported: list[Imported], order: list[Defined]) -> dict[Defined | Imported, str]:
        """What each is called in the file: as before, where nothing else is."""
        wanted = {}
        for one in order:
            for name, of in self.kept[one].items():
                wanted.setdefault(of, name if isinstance(of, Imported) else of.name)
        names, taken = {}, set(dir(builtins))
        # What main calls by a name keeps it: others look for it there.
        for of in (*imported, *(o for o in order if o.module == self.MAIN), *order):
            if of in names:
                continue
            name = base = wanted.get(of, of.name)
            tail = of.module.rpartition(".")[2]
            count = 0
            while name in taken:
                count += 1
                name = f"{base}_of_{tail}" + (f"_{count}" if count > 1 else "")
            taken.add(name)
            names[of] = name
        return names

    def _written(self, one: Defined, changes: Mapping[str, str]) -> list[str]:
        """A definition's text, with names changed where they must be (and then without its comments)."""
        module, written = self._module(one.module), []
        for node in self._definitions(one):
            is_class = isinstance(node, ast.ClassDef)
            body = self._body(one, node) if is_class else None
            if changes:
                again = ast.parse(module.text(node)).body[0]
                if is_class:
                    names = {inner.name for inner in body if isinstance(inner, Function)}
                    again.body = [n for n in again.body if not isinstance(n, Function) or n.name in names]
                    again.body = again.body or [ast.Pass()]
                written.append(ast.unparse(ast.fix_missing_locations(Renamed(changes).visit(again))))
            elif is_class:
                pieces = [module.head(node), *_spaced(module, body)] if body else [module.head(node), "    pass"]
                written.append("\n".join(pieces))
            else:
                written.append(module.text(node))
        return ["\n".join(written)]


@cache
def _read(name: str) -> Module:
    return Module(name)


def _spaced(module: Module, body: list[ast.stmt]) -> Iterator[str]:
    """A class's statements, with an empty line around each function and docstring."""
    for index, node in enumerate(body):
        if index and any(isinstance(n, Function | ast.Expr) for n in (node, body[index - 1])):
            yield ""
        yield module.text(node)


_seen: dict[ast.AST, tuple[frozenset[str], frozenset[str], bool]] = {}


def _mentions(node: ast.AST) -> tuple[frozenset[str], frozenset[str], bool]:
    """The names in a piece of code; all that could be a method's, attributes and texts that look like one; imports."""
    if node not in _seen:
        found = list(ast.walk(node))
        names = frozenset(n.id for n in found if isinstance(n, ast.Name))
        attributes = {n.attr for n in found if isinstance(n, ast.Attribute)}
        texts = {n.value for n in found if isinstance(n, ast.Constant) and isinstance(n.value, str)}
        imports = any(isinstance(n, ast.Import | ast.ImportFrom) for n in found)
        _seen[node] = names, frozenset(attributes | {text for text in texts if text.isidentifier()}), imports
    return _seen[node]


@cache
def _called_by_others(one: Defined, ours: tuple[str, ...]) -> frozenset[str]:
    """What bases of a class have that come from other packages: these call what stands in its place."""
    cls = getattr(import_module(one.module), one.name, None)
    bases = cls.__mro__ if isinstance(cls, type) else ()
    others = [b for b in bases if b is not object and not any((b.__module__ + ".").startswith(f"{o}.") for o in ours)]
    return frozenset(name for base in others for name in vars(base))


class Renamed(ast.NodeTransformer):
    """Changes names where they mean what stands at the top of the module, and not where they are a function's own."""

    def __init__(self, changes: Mapping[str, str]):
        self.changes, self.own = dict(changes), []

    def visit_Name(self, node: ast.Name) -> ast.Name:
        if node.id in self.changes and not any(node.id in names for names in self.own):
            return ast.copy_location(ast.Name(self.changes[node.id], node.ctx), node)
        return node

    def visit_ClassDef(self, node: ast.ClassDef) -> ast.ClassDef:
        self._called(node)
        return self.generic_visit(node)

    def visit_FunctionDef(self, node: ast.FunctionDef) -> ast.FunctionDef:
        self._called(node)
        # Decorators, defaults and annotations are outside the function, but none of ours has a parameter of their name.
        self.own.append(_own_names(node))
        node = self.generic_visit(node)
        self.own.pop()
        return node

    visit_AsyncFunctionDef = visit_FunctionDef

    def visit_Lambda(self, node: ast.Lambda) -> ast.Lambda:
        self.own.append({a.arg for a in _arguments(node)})
        node = self.generic_visit(node)
        self.own.pop()
        return node

    def _called(self, node: ast.ClassDef | Function) -> None:
        if getattr(node, "col_offset", 0) == 0 and node.name in self.changes:
            node.name = self.changes[node.name]


def _arguments(node: Function | ast.Lambda) -> list[ast.arg]:
    a = node.args
    return [*a.posonlyargs, *a.args, *a.kwonlyargs, *(v for v in (a.vararg, a.kwarg) if v)]


def _own_names(function: Function) -> set[str]:
    """Parameters, and what is assigned in a function; what it calls global is not its own."""
    own, outside = {a.arg for a in _arguments(function)}, set()
    for node in ast.walk(function):
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            own.add(node.id)
        elif isinstance(node, Function) and node is not function:
            own.add(node.name)
        elif isinstance(node, ast.Global):
            outside |= set(node.names)
    return own - outside


def _import_lines(names: Mapping[Imported, str]) -> str:
    """The imports, sorted; each under the name that it has in the file."""
    plain, of_module = set(), {}
    for one, name in names.items():
        if one.name is None:
            plain.add(f"import {one.module}" + (f" as {name}" if name != one.module.partition(".")[0] else ""))
        else:
            shown = one.name if name == one.name else f"{one.name} as {name}"
            of_module.setdefault(one.module, set()).add(shown)
    lines = sorted(plain)
    for module, shown in sorted(of_module.items()):
        line = f"from {module} import {', '.join(sorted(shown))}"
        if len(line) > WIDTH:
            line = f"from {module} import (\n" + "".join(f"    {name},\n" for name in sorted(shown)) + ")"
        lines.append(line)
    return "\n".join(lines)
