"""What the package says of itself."""

import inspect
import pathlib
import subprocess
import sys

import gearbox


def test_every_public_name_has_a_docstring_and_a_stub():
    stub = pathlib.Path(gearbox.__file__).with_name("_gearbox.pyi").read_text()
    for name in gearbox.__all__:
        thing = getattr(gearbox, name)
        if name.startswith("__"):
            continue
        assert inspect.getdoc(thing), name
        if thing.__module__ != "gearbox._sweep":
            assert f"class {name}" in stub or f"def {name}(" in stub, name
        if inspect.isclass(thing) and thing is not gearbox.GearboxError:
            for method, held in vars(thing).items():
                if not method.startswith("_"):
                    assert inspect.getdoc(held), f"{name}.{method}"
                    assert f"def {method}(" in stub or thing.__module__ == "gearbox._sweep", f"{name}.{method}"


def test_package_needs_nothing_but_numpy():
    code = "import gearbox, sys; print(sorted({'ray', 'torch', 'transformers', 'pandas'} & set(sys.modules)))"
    told = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout
    assert told.strip() == "[]"


def test_examples_of_the_docstring_hold():
    import doctest

    assert doctest.testmod(gearbox).failed == 0
