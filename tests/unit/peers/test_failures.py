"""What counts as a refusal: words that somebody wrote for whoever brings the file, and nothing else."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from quantmatrix.peers.failures import is_meant, reads_meant


def refuse() -> None:
    raise ValueError(
        "Unknown quantization type, got fp8: "
        "supported types are 'bfl' and 'gguf'"
    )  # fmt: skip


def check() -> None:
    assert len({"a"}) == 2, "two halves are expected"


def refuse_because() -> None:
    try:
        {}["quant_type"]
    except KeyError as error:
        raise ValueError("the file has no quant_type") from error


CASES: dict[str, tuple[Callable[[], object], bool]] = {
    "raise": (refuse, True),
    "assert": (check, True),
    "raise from": (refuse_because, True),
    "meta tensors": (lambda: torch.nn.Linear(2, 2, device="meta").to("cpu"), False),
    "sizes in torch": (
        lambda: torch.nn.Linear(2, 2).load_state_dict({"weight": torch.zeros(3, 2)}), False,
    ),
    "native code of torch": (lambda: torch.tensor(1.0).chunk(2), False),
    "a missing argument": (lambda: refuse(1), False),  # type: ignore[call-arg]
    "an index": (lambda: [][0], False),
    "an attribute": (lambda: None.quant_type, False),  # type: ignore[attr-defined]
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_an_exception_is_a_refusal_if_it_was_raised_on_purpose(name: str) -> None:
    run, meant = CASES[name]
    with pytest.raises(Exception) as caught:  # noqa: PT011
        run()
    assert is_meant(caught.value) is meant
    printed = "loading\n" + "".join(__import__("traceback").format_exception(caught.value))
    assert reads_meant(printed) is meant


def test_a_program_that_prints_no_traceback_meant_what_it_printed() -> None:
    assert reads_meant("error: unsupported checkpoint\n")
    assert reads_meant("")


def test_the_last_of_several_tracebacks_counts() -> None:
    frame = '  File "/x/{}.py", line 3, in load\n    {}\n'
    first, last = frame.format("a", "raise ValueError(found)"), frame.format("b", "found[0]")
    head = "Traceback (most recent call last):\n"
    assert not reads_meant(f"{head}{first}ValueError: x\n\n{head}{last}IndexError: y\n")
    assert reads_meant(f"{head}{last}IndexError: y\n\n{head}{first}ValueError: x\n")
    torch_raise = frame.format("site-packages/torch/nn/module", "raise NotImplementedError(")
    assert not reads_meant(f"{head}{first}{torch_raise}NotImplementedError: Cannot copy\n")
