"""The plugin that pytest finds where opkit is installed: a test for each backend of an op, and ops that go away again.

    @pytest.mark.opkit_op("demo::scale")
    def test_scale(opkit_backend):         # once for each backend that can run here: cpp, reference, ...
        assert scale(x, 2.0).equal(2 * x)

    def test_declares(opkit_registry):     # ops defined here are gone after the test
        @opkit.op("demo::mine", shapes="n -> n")
        ...

The marker takes the name of an op, or `op=scale`; given the op alone pytest would take it for the test.

`--opkit-backend=cpp` runs only the tests of that backend. pytest loads this in every run, whatever the tests are about:
it imports nothing but pytest, and opkit's name without torch. It works where torch is missing, too.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from opkit._op import Op

_MARKER = "opkit_op"
_HELP = (
    f"{_MARKER}(op, device='cpu', strict=True): the name of the op, or op=f, whose backends the fixture opkit_backend "
    "goes over; strict=False allows other ops in the test, such as its gradient, to run another backend."
)


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the option."""
    parser.getgroup("opkit").addoption(
        "--opkit-backend",
        action="append",
        default=[],
        metavar="NAME",
        help="run tests with the fixture opkit_backend for this backend only; may be given more than once, or as a,b",
    )


def pytest_configure(config: pytest.Config) -> None:
    """Make the marker known."""
    config.addinivalue_line("markers", _HELP)


def pytest_report_header(config: pytest.Config) -> str:
    """Say which opkit this is, and which backends were chosen."""
    import opkit

    chosen = _chosen(config)
    return f"opkit: {opkit.__version__}" + (f", only backend {', '.join(chosen)}" if chosen else "")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Have a test for each backend of the op that its marker names."""
    if "opkit_backend" not in metafunc.fixturenames:
        return
    marker = metafunc.definition.get_closest_marker(_MARKER)
    where = metafunc.definition.nodeid
    if marker is None or len(marker.args) + ("op" in marker.kwargs) != 1:
        found = "without the op that it is about" if marker is None else f"with opkit_op{marker.args}"
        raise pytest.Collector.CollectError(
            f"collecting {where}: found the fixture opkit_backend {found}; expected one op, whose backends it goes "
            f"over. Write @pytest.mark.{_MARKER}('demo::f') above the test, or in the module "
            f"pytestmark = pytest.mark.{_MARKER}(op=f)."
        )
    unknown = sorted(set(marker.kwargs) - {"op", "device", "strict"})
    if unknown:
        raise pytest.Collector.CollectError(
            f"collecting {where}: found {_MARKER}(..., {unknown[0]}=); expected op=, device= or strict=. Remove it."
        )
    given = marker.args[0] if marker.args else marker.kwargs["op"]
    device = marker.kwargs.get("device", "cpu")
    params = _params(_op(given, where), device, _chosen(metafunc.config))
    metafunc.parametrize("opkit_backend", params, indirect=True)


@pytest.fixture
def opkit_backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """The name of a backend, which runs the calls of the test: of each that the op of `opkit_op` has here, in turn.

    Calls that it cannot take raise, as opkit.use_backend(name, strict=True) does, rather than test another one.
    """
    import opkit

    marker = request.node.get_closest_marker(_MARKER)
    strict = marker is None or marker.kwargs.get("strict", True)
    with opkit.use_backend(request.param, strict=strict):
        yield request.param


@pytest.fixture
def opkit_registry() -> Iterator[None]:
    """Ops that the test defines, and kernels that it registers on others, are gone after it."""
    import opkit
    from opkit.testing.isolation import isolated

    opkit.list_ops()  # those of plugins would be taken for the test's own
    with isolated():
        yield


def _chosen(config: pytest.Config) -> list[str]:
    """Return the backends that the command line names."""
    given: list[str] = config.getoption("--opkit-backend")
    return [name for text in given for name in text.split(",") if name]


def _op(given: Any, where: str) -> Op[..., Any]:
    """Return the op of a marker."""
    import opkit

    if isinstance(given, opkit.Op):
        return given
    if isinstance(given, str):
        try:
            return opkit.get(given)
        except opkit.OpkitError as error:
            raise pytest.Collector.CollectError(f"collecting {where}: {error}") from None
    raise pytest.Collector.CollectError(
        f"collecting {where}: found {_MARKER}({given!r}); expected an opkit.Op or its name. Pass op=f, what "
        "@opkit.op made."
    )


def _params(op: Op[..., Any], device: str, chosen: list[str]) -> list[Any]:
    """Return a parameter for each backend of an op on a device; one that cannot run here is skipped with the reason."""
    from opkit.testing.devices import is_there

    found = {k.backend: k for k in op.kernels if k.device in (device, "any")}
    params = []
    for name in chosen or found:
        kernel = found.get(name)
        if not is_there(device):
            why = f"there is no device {device} here"
        elif kernel is None:
            why = f"{op.name} has no {name} kernel for {device}; it has {', '.join(found)}"
        else:
            why = kernel.reason if kernel.status == "rejected" else ""
        params.append(pytest.param(name, marks=[pytest.mark.skip(reason=why)] if why else [], id=name))
    return params
