"""Graphs in which something is wrong, through the command line: one sentence, whatever it is, and no traceback."""

from __future__ import annotations

import contextlib
import io
import shutil
from pathlib import Path
from typing import Any

import onnx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from random_graphs import examples, generated, spoiled

from pi05c.cli import main

SPOILED = st.tuples(generated(most=2), st.randoms(use_true_random=False)).map(
    lambda drawn: spoiled(drawn[0].proto, drawn[1])
)


@pytest.fixture(autouse=True, scope="module")
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Of a module, where the driver's own is of a function: an example is not one."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PI05C_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@examples(60)
@given(SPOILED)
def test_every_command_says_one_sentence_or_does_its_work(
    tmp_path_factory: Any, proto: onnx.ModelProto
) -> None:
    folder: Path = tmp_path_factory.getbasetemp() / "spoiled"
    folder.mkdir(exist_ok=True)
    model = folder / "model.onnx"
    model.write_bytes(proto.SerializeToString())
    for command in (
        ["inspect", model],
        ["explain", model, "--pass", "canonicalize"],
        ["cost", model],
        ["diff", model, model],
        [
            "compile",
            model,
            "--passes",
            "fp16",
            "--backend",
            "onnxruntime",
            "-o",
            folder / "engine",
            "--quiet",
        ],
    ):
        shutil.rmtree(folder / "engine", ignore_errors=True)
        said, printed = io.StringIO(), io.StringIO()
        with contextlib.redirect_stderr(said), contextlib.redirect_stdout(printed):
            status = main([*map(str, command), "--debug"])
        errors = [line for line in said.getvalue().splitlines() if line.startswith("error: ")]
        assert "has a defect" not in said.getvalue(), said.getvalue()
        assert len(errors) == (status not in (0, 1) or (status == 1 and command[0] != "diff")), (
            said.getvalue()
        )
