"""Networks as data: a Flax module as JSON values and back, so that a saved network can say what it is.

``to_data`` writes a module by its importable name and its fields, ``from_data`` builds it again, ``differences`` compares two:

    {"module": "pdo_jax.networks.MnistRotNet", "fields": {"num_classes": 10, "group": {"group": "p12", "elements": [[[1.0, …

Data may come from anyone: building from it runs no code but the constructors of Flax modules that are in this library, in Flax
or in what the program has imported itself. Functions are looked up in a few modules that only compute. No other is imported.
"""

import contextlib
import dataclasses
import functools
import importlib
import json
import math
import sys
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from pdo_jax import fields, groups

FUNCTIONS = ("pdo_jax.stencils", "pdo_jax.sampling", "pdo_jax.nonlinearities", "jax.nn", "jax.nn.initializers", "jax.numpy",
             "flax.linen.pooling")
"""Where the functions that a network holds are looked up."""

_PUBLIC = ("pdo_jax", "flax.linen")  # classes are written by these names where they have one
_OURS = ("pdo_jax", "experiments")  # packages whose modules are imported as they are needed, if the package itself is already
_TOUCH_FILES = ("load", "save", "savez", "fromfile")  # functions of jax.numpy that are not taken
_DEEPEST = 50  # levels of data
_LARGEST = 2 ** 25  # numbers in the matrices of a representation


def to_data(network: nn.Module) -> dict[str, Any]:
    """A Flax module as JSON values.

    Its fields may be numbers, text, None, tuples, lists, dicts, arrays, dtypes, groups, representations, modules, subclasses of
    Module, functions of `FUNCTIONS` or of importable modules, and functools.partial of these. Any other function that is the
    default of its field, such as an initialiser made by a call, is noted as the default.

    Raises:
      ValueError: a field that cannot be described, such as a lambda or a class within a function; the message names it.

    >>> to_data(nn.Sequential([nn.Dense(3), nn.relu]))["fields"]["layers"][1]
    {'function': 'jax.nn.relu'}
    """
    if not isinstance(network, nn.Module):
        raise ValueError(f"expected a flax.linen module, got {network!r}")
    return _write(network, type(network).__name__, {})


def from_data(data: Mapping[str, Any], trust: Collection[str] = ()) -> nn.Module:
    """The network that `to_data` described, its groups equal to the bit.

    Args:
      data: what `to_data` gave, perhaps out of a file from someone else.
      trust: packages or modules of your own, from which classes and functions may be imported too.

    Raises:
      ValueError: data of another form, or a name that is not one of those that may be built.

    >>> from_data(to_data(nn.Dense(3))) == nn.Dense(3)
    True
    """
    if not (isinstance(data, Mapping) and "module" in data):
        raise ValueError(f"expected the data of a network, {{'module': …, 'fields': …}}, got {_show(data)}")
    return _read(data, str(data["module"]).rpartition(".")[2], {}, frozenset(trust), 0)


def differences(there: nn.Module | Mapping[str, Any], here: nn.Module | Mapping[str, Any]) -> list[str]:
    """Where two networks, or their data, differ: one line for each field, empty for equal ones.

    Groups and representations are compared by their matrices, to 1e-9; their names are labels. A field that is missing, as in
    data from before it was added, counts as the default of its class.

    >>> import pdo_jax as pdo
    >>> differences(pdo.networks.MnistRotNet(), pdo.networks.MnistRotNet(group=pdo.groups.dihedral(4)))
    ['group: p12 there, p4m here']
    """
    there, here = (to_data(network) if isinstance(network, nn.Module) else network for network in (there, here))
    return list(_compare(there, here, ""))


# Writing


def _write(value, path, seen):
    if value is None or type(value) in (bool, int, str):
        return value
    if type(value) is float:
        return value if math.isfinite(value) else {"float": str(value)}
    if isinstance(value, groups.Group):
        return {"group": value.name, "elements": value.elements.tolist()}
    if isinstance(value, fields.Representation):
        of = {"representation": value.name, "of": _write(value.group, path, seen)}
        images = value.matrices.argmax(1)
        if np.array_equal(value.matrices, _permutations(images)):  # the regular one of 120 elements has 1.7 million entries
            return of | {"images": images.tolist()}
        return of | {"matrices": value.matrices.tolist()}
    if isinstance(value, np.dtype) or isinstance(value, type) and (issubclass(value, np.generic) or type(value) is _SCALAR):
        return {"dtype": jnp.dtype(value).name}
    if isinstance(value, np.ndarray | np.generic | jax.Array) and not isinstance(value, jax.core.Tracer):
        if value.dtype == bool or jnp.issubdtype(value.dtype, jnp.integer) or jnp.issubdtype(value.dtype, jnp.floating):
            return {"array": np.asarray(value, _plain(value.dtype)).tolist(), "of": value.dtype.name}
    if type(value) is tuple:
        return {"tuple": [_write(item, f"{path}[{k}]", seen) for k, item in enumerate(value)]}
    if isinstance(value, list):
        return [_write(item, f"{path}[{k}]", seen) for k, item in enumerate(value)]
    if isinstance(value, Mapping):
        return {"dict": [[_write(key, path, seen), _write(item, f"{path}[{key!r}]", seen)] for key, item in value.items()]}
    if isinstance(value, functools.partial):
        return {"partial": _write(value.func, path, seen), "arguments": _write(list(value.args), path, seen),
                "keywords": _write(dict(value.keywords), path, seen)}
    if isinstance(value, nn.Module):
        return _write_module(value, path, seen)
    if isinstance(value, type) and issubclass(value, nn.Module):
        return {"class": _name_of(value, path, _PUBLIC)}
    if isinstance(value, Callable) and not isinstance(value, type):
        return {"function": _name_of(value, path, FUNCTIONS)}
    raise ValueError(f"{path} is {value!r}, which cannot be written as data: use numbers, text, tuples, arrays, groups, "
                     "representations, modules or functions, or hand over the network itself where it is read")


def _write_module(module, path, seen):
    if id(module) in seen:  # one module in two places has one set of parameters
        return {"same": seen[id(module)]}
    written = {}
    for field in dataclasses.fields(module):
        if not field.init or field.name == "parent" or field.name == "name" and module.name is None:
            continue
        written[field.name] = _write_field(field, getattr(module, field.name), f"{path}.{field.name}", seen)
    seen[id(module)] = path
    return {"module": _name_of(type(module), path, _PUBLIC), "fields": written}


def _write_field(field, value, path, seen):
    if value is field.default and isinstance(value, Callable) and not _is_named(value):
        return {"default": field.name}
    return _write(value, path, seen)


def _name_of(thing, path, public):
    """The name under which a class or function can be imported again."""
    name = getattr(thing, "__name__", "")
    for module in (*public, getattr(thing, "__module__", None)):
        if vars(sys.modules.get(module, object)).get(name) is thing:
            return f"{module}.{name}"
    raise ValueError(f"{path} is {thing!r}, which stands under no name at the top of an imported module (a lambda, a local "
                     "class): define it in a module that can be imported, or hand over the network itself where it is read")


def _is_named(thing):
    return any(vars(sys.modules[module]).get(getattr(thing, "__name__", "")) is thing for module in FUNCTIONS)


# Reading


def _read(data, path, seen, trust, depth):
    if depth > _DEEPEST:
        raise ValueError(f"the data of {path[:80]}… is nested deeper than {_DEEPEST} levels")
    read = lambda item, place=path: _read(item, place, seen, trust, depth + 1)  # noqa: E731
    if data is None or isinstance(data, bool | int | float | str):
        return data
    if isinstance(data, list):
        return [read(item, f"{path}[{k}]") for k, item in enumerate(data)]
    match data:
        case {"module": str(name), "fields": dict(values)} if len(data) == 2:
            cls = _class(name, path, trust)
            known = {field.name for field in dataclasses.fields(cls) if field.init} - {"parent"}
            if unknown := sorted(values.keys() - known):
                raise ValueError(f"{path}: {name} has no field {unknown[0]!r} here; its fields are {', '.join(sorted(known))}")
            given = {key: read(value, f"{path}.{key}") for key, value in values.items() if value != {"default": key}}
            module = seen[path] = _call(lambda: cls(**given), path)
            return module
        case {"same": str(place)} if len(data) == 1 and place in seen:
            return seen[place]
        case {"group": str(name), "elements": list(elements)} if len(data) == 2:
            return _call(lambda: groups.from_elements(elements, name=name), path)
        case {"representation": str(name), "of": dict(group), "images": list(images)} if len(data) == 3:
            group, images = read(group), _array(images, "int64", path)
            return _call(lambda: fields.Representation(name, group, _permutations(images)), path)
        case {"representation": str(name), "of": dict(group), "matrices": list(matrices)} if len(data) == 3:
            group = read(group)
            return _call(lambda: fields.Representation(name, group, matrices), path)
        case {"dtype": str(name)} if len(data) == 1:
            return _dtype(name, path)
        case {"float": "nan" | "inf" | "-inf" as number} if len(data) == 1:
            return float(number)
        case {"array": values, "of": str(name)} if len(data) == 2:
            return _array(values, name, path)
        case {"tuple": list(items)} if len(data) == 1:
            return tuple(read(items))
        case {"dict": list(items)} if len(data) == 1 and all(isinstance(item, list) and len(item) == 2 for item in items):
            pairs = [read(item) for item in items]
            return _call(lambda: dict(pairs), path)
        case {"partial": dict(function), "arguments": list(arguments), "keywords": {"dict": _} as options} if len(data) == 3:
            function, arguments, options = read(function), read(arguments), read(options)
            if not callable(function) or isinstance(function, nn.Module) or not all(isinstance(key, str) for key in options):
                _refuse(data, path)
            return _call(lambda: functools.partial(function, *arguments, **options), path)
        case {"class": str(name)} if len(data) == 1:
            return _class(name, path, trust)
        case {"function": str(name)} if len(data) == 1:
            return _function(name, path, trust)
    _refuse(data, path)


def _class(name, path, trust):
    module = name.rpartition(".")[0]
    imported = module in sys.modules or _within(module, (root for root in _OURS if root in sys.modules))
    found = _look_up(name, trust) if imported or _within(module, trust) else None
    if not (isinstance(found, type) and issubclass(found, nn.Module)):
        raise ValueError(f"{path} is named {name[:80]!r}, which is no flax.linen module of this library, of Flax or of what "
                         "this program has imported: import its module first if you trust it, or hand over the network itself")
    return found


def _function(name, path, trust):
    module, _, last = name.rpartition(".")
    allowed = module in FUNCTIONS and last not in _TOUCH_FILES or _within(module, trust)
    found = _look_up(name, trust) if allowed else None
    if not callable(found) or isinstance(found, type):
        raise ValueError(f"{path} is named {name[:80]!r}, which is no function of {', '.join(FUNCTIONS)}: name its module in "
                         "trust= if it is yours, or hand over the network itself")
    return found


def _look_up(name, trust):
    """What stands under a dotted name at the top level of a module, or None."""
    module, _, last = name.rpartition(".")
    if not all(part.isidentifier() for part in name.split(".")) or last.startswith("_") and not _within(module, trust):
        return None
    if module not in sys.modules:
        try:
            importlib.import_module(module)
        except ImportError:
            return None
    return vars(sys.modules[module]).get(last)


def _within(module, packages):
    return any(module == package or module.startswith(package + ".") for package in packages)


def _permutations(images):
    """[order, d] -> [order, d, d]: value k goes to place images[:, k]."""
    if images.ndim != 2 or images.size * images.shape[1] > _LARGEST:
        raise ValueError(f"expected permutations [order, d], order · d² at most {_LARGEST}, got shape {images.shape}")
    return np.swapaxes(np.eye(images.shape[-1])[images], -1, -2)


def _dtype(name, path):
    found = vars(jnp).get(name)
    return found if isinstance(found, _SCALAR) else _refuse({"dtype": name}, path)


def _array(values, name, path):
    dtype = _dtype(name, path)
    return _call(lambda: np.asarray(values, _plain(dtype)).astype(jnp.dtype(dtype)), path)


def _plain(dtype):
    """A dtype of numpy's own that holds a dtype exactly: bfloat16 and its like have no text form."""
    dtype = jnp.dtype(dtype)
    return np.dtype("float64") if jnp.issubdtype(dtype, jnp.floating) else dtype


def _call(function, path):
    try:
        return function()
    except Exception as error:  # whatever wrong fields make a constructor raise
        raise ValueError(f"{path} cannot be built: {type(error).__name__}: {error}") from error


def _refuse(data, path):
    raise ValueError(f"{path[:200]} is {_show(data)}, which is nothing that pdo_jax.architecture.to_data writes")


_SCALAR = type(jnp.float32)  # of jax.numpy's scalar types, which are no subclasses of numpy's


# Comparing


def _compare(there, here, path) -> Iterator[str]:
    match there, here:
        case _ if there == here:
            return
        case {"module": name, "fields": dict(ours)}, {"module": other, "fields": dict(theirs)} if name == other:
            for key in ours | theirs:
                sides = [values[key] if key in values else _default(name, key) for values in (ours, theirs)]
                yield from _compare(*sides, f"{path}.{key}".lstrip("."))
        case {"tuple": list(ours)}, {"tuple": list(theirs)} if len(ours) == len(theirs):
            for k, sides in enumerate(zip(ours, theirs, strict=True)):
                yield from _compare(*sides, f"{path}[{k}]")
        case ({"group": _}, {"group": _}) | ({"representation": _}, {"representation": _}) if _close(there, here):
            return
        case _:
            shown = [_show(data) for data in (there, here)]
            more = ", with other matrices" if shown[0] == shown[1] else ""
            yield f"{path or 'network'}: {shown[0]} there, {shown[1]} here{more}"


def _default(name, key):
    """What stands for a field that the data of a module lack, since its class had none of that name when they were written."""
    with contextlib.suppress(ValueError):  # a class that is not here, a field without a default
        for field in dataclasses.fields(_class(name, name, ())):
            if field.name == key:
                return _write_field(field, field.default, key, {})
    return {"default": key}


def _close(there, here):
    if there.keys() != here.keys() or "of" in there and not _close(there["of"], here["of"]):
        return False
    try:
        numbers = [[np.asarray(data[key], float) for data in (there, here)] for key in ("elements", "images", "matrices")
                   if key in there]
    except (TypeError, ValueError):  # damaged
        return False
    return all(a.shape == b.shape and np.allclose(a, b, atol=1e-9) for a, b in numbers)


def _show(data) -> str:
    """A few words for a piece of data."""
    match data:
        case {"group": name} | {"representation": name} | {"dtype": name}:
            return str(name)
        case {"module": name} | {"function": name} | {"class": name}:
            return str(name).rpartition(".")[2]
        case {"tuple": [*items]}:
            return "(" + ", ".join(map(_show, items)) + ")"
        case {"partial": function, "arguments": [*arguments], "keywords": {"dict": [*keywords]}}:
            keywords = (f"{key}={_show(value)}" for key, value in keywords)
            return f"partial({', '.join([_show(function), *map(_show, arguments), *keywords])})"
        case {"default": _}:
            return "its default"
    text = json.dumps(data, default=repr) if not isinstance(data, str) else repr(data)
    return text if len(text) <= 80 else text[:77] + "…"
